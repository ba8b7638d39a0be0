"""Attention against loops, against itself cached, against transformers' Llama, and by hand."""
import math
import random
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from minillm.attention import (
    Attention,
    KVCache,
    attend,
    attend_by_position,
    attention_mask,
    merge_heads,
    ring_columns,
    ring_slot,
    sdpa,
    split_heads,
    visible,
)
from minillm.positions import ALiBi, RotaryPositions

def random_qkv(B=2, H=4, K=2, T=5, S=7, D=8, dtype=torch.float64):
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, K, S, D), torch.randn(B, K, S, D)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attend_by_loops(q, k, v, mask):
    "The definition, one number at a time: (B, H, T, D)."
    (B, H, T, D), K = q.shape, k.shape[1]
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(k.shape[2]) if mask[t, s]]
                scores = [math.exp(float(q[b, h, t] @ k[b, h * K // H, s]) / math.sqrt(D)) for s in seen]
                for score, s in zip(scores, seen): out[b, h, t] += score / sum(scores) * v[b, h * K // H, s]
    return out


# ---------------------------------------------------------------------------------------------------------------- masks

def shown(mask):
    return ["".join(".x"[int(cell)] for cell in row) for row in mask.tolist()]


def test_masks_by_hand():
    assert shown(attention_mask(4, 4)) == ["x...", "xx..", "xxx.", "xxxx"]
    assert shown(attention_mask(2, 4)) == ["xxx.", "xxxx"]
    assert shown(attention_mask(1, 3)) == ["xxx"]
    assert shown(attention_mask(4, 4, window=2)) == ["x...", "xx..", ".xx.", "..xx"]
    assert shown(attention_mask(5, 5, window=2, sinks=1)) == ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]
    assert shown(attention_mask(4, 4, prefix=2)) == ["xx..", "xx..", "xxx.", "xxxx"]
    assert shown(attention_mask(4, 4, window=1, prefix=2)) == ["xx..", "xx..", "xxx.", "xx.x"]


def test_a_padded_row_sees_what_the_unpadded_row_sees_and_no_row_is_empty():
    mask = attention_mask(5, 5, window=2, sinks=1, padding=torch.tensor([0, 2]))
    assert mask.shape == (2, 1, 5, 5)
    assert torch.equal(mask[0, 0], attention_mask(5, 5, window=2, sinks=1))
    assert torch.equal(mask[1, 0, 2:, 2:], attention_mask(3, 3, window=2, sinks=1))
    assert not mask[1, 0, 2:, :2].any() and mask.any(dim=-1).all()


def test_more_queries_than_keys_is_an_error():
    with pytest.raises(ValueError, match="T = 3 must not exceed S = 2"): attention_mask(3, 2)


# ------------------------------------------------------------------------------------------------------------ functions

@pytest.mark.parametrize("K", [4, 2, 1])
@pytest.mark.parametrize("rules", [{}, {"window": 3}, {"window": 2, "sinks": 1}, {"prefix": 3}])
def test_loops_matmul_and_torch_agree(K, rules):
    q, k, v = random_qkv(K=K)
    mask = attention_mask(5, 7, **rules)
    expected = attend_by_loops(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, mask=mask)[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(sdpa(q, k, v, mask=mask), expected, rtol=0, atol=1e-12)
    by_position = attend_by_position(q, k, v, torch.arange(2, 7), torch.arange(7), **rules)
    torch.testing.assert_close(by_position, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("T, S", [(7, 7), (1, 7), (3, 7), (1, 1)])
def test_every_shortcut_is_the_causal_mask(T, S):
    q, k, v = random_qkv(T=T, S=S)
    expected = attend(q, k, v, mask=attention_mask(T, S))[0]
    torch.testing.assert_close(attend_by_position(q, k, v, torch.arange(S - T, S), torch.arange(S)), expected)


def test_weights_sum_to_one_and_bias_is_added_to_scores():
    q, k, v = random_qkv()
    mask, bias = attention_mask(5, 7), torch.randn(4, 5, 7, dtype=torch.float64)
    out, weights = attend(q, k, v, mask=mask, bias=bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
    assert (weights[..., ~mask] == 0).all()
    torch.testing.assert_close(sdpa(q, k, v, mask=mask, bias=bias), out)
    plain = attend(q, k, v, bias=torch.full((4, 5, 7), 3.0))[0]          # the same for all keys: no difference
    torch.testing.assert_close(plain, attend(q, k, v)[0])


def test_a_query_that_may_look_nowhere_gets_zeros_and_a_finite_gradient():
    q, k, v = random_qkv(T=2, S=3)
    q.requires_grad_()
    mask = torch.tensor([[True, False, False], [False, False, False]])
    out, weights = attend(q, k, v, mask=mask)
    out.sum().backward()
    assert (out[:, :, 1] == 0).all() and (weights[:, :, 1] == 0).all() and q.grad.isfinite().all()


def test_grouped_heads_are_repeated_heads():
    q, k, v = random_qkv(H=6, K=2, T=7)
    repeated = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    torch.testing.assert_close(attend(q, k, v)[0], attend(q, *repeated)[0])
    torch.testing.assert_close(sdpa(q, k, v, causal=True), sdpa(q, *repeated, causal=True))


def test_keys_are_repeated_where_torch_has_no_fast_grouped_kernel(monkeypatch):
    q, k, v = random_qkv(T=7)
    expected = sdpa(q, k, v, causal=True)
    monkeypatch.setattr("minillm.attention.grouping_is_fast", lambda q, mask: False)
    kernel, calls = F.scaled_dot_product_attention, []
    spy = lambda *a, **k: calls.append(k["enable_gqa"]) or kernel(*a, **k)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(sdpa(q, k, v, causal=True), expected)
    assert calls == [False]


def test_heads_are_split_and_merged():
    x = torch.arange(24.0).view(1, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (1, 2, 3, 4) and heads[0, 1, 0].tolist() == [4, 5, 6, 7]
    assert torch.equal(merge_heads(heads), x)


# --------------------------------------------------------------------------------------------------------------- module

def test_attention_is_multihead_attention_of_torch():
    ours = Attention(32, 4, bias=True)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.out_proj.bias.copy_(ours.output.bias)
    x = torch.randn(2, 9, 32)
    expected, weights = theirs(x, x, x, attn_mask=~attention_mask(9, 9), average_attn_weights=False)
    torch.testing.assert_close(ours(x), expected)
    seen = []
    with_hook = ours.weights.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(ours(x), expected)
    with_hook.remove()
    torch.testing.assert_close(seen[0], weights)


@pytest.mark.parametrize("scaling", [None, "llama3"])
def test_attention_is_llamas(scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    ours_scaling = None
    if scaling:
        numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 64, **numbers}
        ours_scaling = {"kind": "llama3", "original_context_length": 64, **numbers}
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
                                      rope_parameters=rope, max_position_embeddings=512, attn_implementation="eager")
    theirs, ours = LlamaAttention(config, layer_idx=0), Attention(64, 4, 2, 24)
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    ours.load_state_dict({f"{names[n.split('.')[0]]}.weight": w for n, w in theirs.state_dict().items()})
    x = torch.randn(2, 90, 64)
    mask = torch.zeros(90, 90).masked_fill(~attention_mask(90, 90), -torch.inf)[None, None]
    expected = theirs(x, LlamaRotaryEmbedding(config)(x, torch.arange(90)[None]), attention_mask=mask)[0]
    torch.testing.assert_close(ours(x, RotaryPositions(24, scaling=ours_scaling)), expected, rtol=0, atol=2e-6)


def test_a_hook_sees_the_weights_and_may_replace_them():
    attention, x = Attention(16, 2, window=3), torch.randn(1, 6, 16)
    plain = attention(x)
    identity = torch.eye(6).expand(1, 2, 6, 6)
    handle = attention.weights.register_forward_hook(lambda module, inputs, output: identity)
    expected = attention.output(attention.value(x))                     # each token looks at itself alone
    torch.testing.assert_close(attention(x), expected)
    handle.remove()
    torch.testing.assert_close(attention(x), plain)


def test_without_positions_order_is_invisible():
    attention, x = Attention(16, 4).double(), torch.randn(1, 6, 16, dtype=torch.float64)
    order = torch.randperm(6)
    everywhere = torch.arange(6)

    def mixed(x):
        q, k, v = (split_heads(f(x), 4) for f in (attention.query, attention.key, attention.value))
        return attend_by_position(q, k, v, everywhere, everywhere, prefix=6)    # everyone sees everyone

    torch.testing.assert_close(mixed(x[:, order]), mixed(x)[:, :, order])
    last = attention(x)[:, -1]                                                   # causal: the last one sees all
    torch.testing.assert_close(attention(torch.cat([x[:, order[order != 5]], x[:, -1:]], 1))[:, -1], last)


def test_dropout_drops_weights_in_training_only():
    attention, x = Attention(16, 2, dropout=0.5), torch.randn(4, 8, 16)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    attention.train()
    seen = []
    handle = attention.output.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    attention.weights.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    attention.value.weight.data.fill_(0.0)
    attention.value.weight.data[:, 0] = 1.0
    attention(torch.ones(64, 64, 16))
    handle.remove()
    assert seen[0].mean().item() == pytest.approx(64, rel=0.05)                  # half dropped, the rest doubled


def test_qk_norm_is_applied_to_each_head_before_the_rotation():
    attention, x = Attention(16, 2, qk_norm=torch.nn.RMSNorm), torch.randn(1, 5, 16)
    sizes = []
    def rotate(x, positions):
        sizes.append(x.square().mean(-1))
        return x
    attention(100 * x, rotate)
    for size in sizes: torch.testing.assert_close(size, torch.ones_like(size))
    assert attention.query_norm.weight.shape == (8,)


@pytest.mark.parametrize("arguments, message", [
    (dict(d_model=10, n_heads=4), "d_model = 10 must be a multiple of n_heads = 4"),
    (dict(d_model=16, n_heads=4, n_kv_heads=3), "n_heads = 4 must be a multiple of n_kv_heads = 3"),
    (dict(d_model=16, n_heads=4, window=0), "window = 0 must be at least 1")])
def test_impossible_shapes_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message): Attention(**arguments)


def test_biases_and_names_of_parameters():
    names = dict(Attention(16, 4, 2, bias=True, output_bias=False).named_parameters())
    of_all = {f"{name}.{kind}" for name in ("query", "key", "value", "output") for kind in ("weight", "bias")}
    assert set(names) == of_all - {"output.bias"}
    assert names["key.weight"].shape == (8, 16)
    with torch.device("meta"): assert Attention(4096, 32, 8, 128)(torch.empty(1, 3, 4096)).shape == (1, 3, 4096)


# ---------------------------------------------------------------------------------------------------------------- cache

def stack(kind, heads, kv_heads, windows, dtype, **rules):
    "Attention layers with residuals, as one function of x and a cache."
    layers = [Attention(32, heads, kv_heads, 8, window=w, layer=i, **rules).to(dtype) for i, w in enumerate(windows)]
    rotate, bias = RotaryPositions(8) if kind == "rope" else None, ALiBi(heads) if kind == "alibi" else None

    def forward(x, cache=None):
        for layer in layers: x = x + layer(x, rotate, bias, cache)
        return x
    return forward


def uncached(forward, x, pads):
    "Each row alone and without its padding; zeros at the padding."
    if pads is None: return forward(x)
    out = torch.zeros_like(x)
    for row, pad in enumerate(pads.tolist()): out[row, pad:] = forward(x[row:row + 1, pad:])[0]
    return out


def relative(a, b): return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["none", "rope", "alibi"])
def test_cached_is_uncached_for_all_masks_chunks_paddings_and_cuts(kind, dtype, tolerance):
    rng = random.Random(kind)
    cuts = 0
    for _ in range(80):
        heads, kv_heads = rng.choice([(4, 4), (4, 2), (4, 1)])
        windows = [rng.choice([None, 1, 3, 7]) for _ in range(rng.choice([1, 2]))]
        rules = {"sinks": rng.choice([0, 0, 2]), "prefix": rng.choice([0, 0, 4])}
        rows, length = rng.choice([1, 3]), rng.randint(2, 40)
        pads = torch.randint(0, min(5, length), (rows,)) if rng.random() < 0.5 else None
        must = rules["prefix"] + (0 if pads is None else int(pads.max()))        # a prefix is fed whole
        forward, x = stack(kind, heads, kv_heads, windows, dtype, **rules), torch.randn(rows, length, 32, dtype=dtype)
        cache = KVCache(len(windows), rows, length, kv_heads, 8, window=windows, sinks=max(rules.values()),
                        max_chunk=rng.choice([1, 3, 8]), dtype=dtype, padding=pads)
        got, at = torch.zeros_like(x), 0
        while at < length:
            n = rng.randint(1, rng.choice([1, 3, 10, 40]))
            n = min(length - at, n if at else max(n, must))
            with torch.no_grad(): got[:, at:at + n] = forward(x[:, at:at + n], cache)
            at += n
            back = at - rng.randint(0, 12)
            if rng.random() < 0.3 and at < length and back >= max(must, 1):
                try:
                    cache.truncate(back)
                    at, cuts = back, cuts + 1
                except ValueError: pass                              # refused: what it holds must still be right
            assert cache.length == at
        if pads is not None:
            for row, pad in enumerate(pads.tolist()): got[row, :pad] = 0
        assert got.isfinite().all()
        assert relative(got, uncached(forward, x, pads)) < tolerance, (windows, rules, pads, length)
    assert cuts > 20


def test_slots_of_the_ring_and_back():
    for keep, ring in [(0, 3), (2, 4)]:
        for end in range(15):
            held = ring_columns(keep, ring, end)
            written = {}
            for column in range(end): written[int(ring_slot(torch.tensor(column), keep, ring))] = column
            assert held.tolist() == [written.get(slot, -2**30) for slot in range(keep + ring)]


def test_a_window_keeps_little_memory_however_long_the_text():
    short, long = (KVCache(2, 1, n, 2, 8, window=16, sinks=4, max_chunk=8) for n in (100, 1_000_000))
    assert short.nbytes == long.nbytes == 2 * 2 * 2 * (4 + 16 + 8) * 8 * 4
    local_global = KVCache(2, 1, 100, 2, 8, window=[16, None], max_chunk=8, dtype=torch.float32)
    assert local_global.nbytes == 2 * 2 * (24 + 100) * 8 * 4
    assert KVCache(1, 1, 100, 2, 8, dtype=torch.bfloat16).nbytes == 2 * 2 * 100 * 8 * 2


def test_nothing_is_allocated_while_generating():
    cache = KVCache(1, 1, 64, 2, 8, window=8, max_chunk=4)
    places = [cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()]
    for _ in range(40):
        k, v, _ = cache.update(0, torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        assert [k.data_ptr(), v.data_ptr()] == places


def test_a_ring_is_cut_back_by_max_chunk_and_no_further():
    attention, x = Attention(16, 2, window=4).double(), torch.randn(1, 40, 16, dtype=torch.float64)
    expected = attention(x)
    for back in range(1, 12):
        cache = KVCache(1, 1, 40, 2, 8, window=4, max_chunk=6, dtype=torch.float64)
        for t in range(30): attention(x[:, t:t + 1], cache=cache)
        if back <= 7:
            cache.truncate(30 - back)
            torch.testing.assert_close(attention(x[:, 30 - back:], cache=cache), expected[:, 30 - back:])
        else:
            with pytest.raises(ValueError, match="window = 4 keeps max_chunk = 6 more"): cache.truncate(30 - back)
            assert cache.length == 30
            torch.testing.assert_close(attention(x[:, 30:], cache=cache), expected[:, 30:])
    cache.truncate(0)                                                            # a fresh start is always possible
    torch.testing.assert_close(attention(x, cache=cache), expected)


def test_a_cache_cut_to_nothing_is_as_good_as_new():
    attention, x = Attention(16, 2, window=4).double(), torch.randn(1, 40, 16, dtype=torch.float64)
    cache = KVCache(1, 1, 40, 2, 8, window=4, max_chunk=2, dtype=torch.float64)
    attention(x, cache=cache)
    cache.truncate(0)
    attention(x[:, :6], cache=cache)
    cache.truncate(5)
    torch.testing.assert_close(attention(x[:, 5:], cache=cache), attention(x)[:, 5:])


def test_rows_can_be_repeated_reordered_and_dropped():
    forward, x = stack("rope", 4, 2, [3, None], torch.float64), torch.randn(2, 12, 32, dtype=torch.float64)
    pads = torch.tensor([0, 2])
    cache = KVCache(2, 2, 12, 2, 8, window=[3, None], max_chunk=2, dtype=torch.float64, padding=pads)
    forward(x[:, :8], cache)
    rows = torch.tensor([1, 1, 0])
    cache.select(rows)
    got = forward(x[rows, 8:], cache)
    torch.testing.assert_close(got, uncached(forward, x, pads)[rows, 8:])


def test_past_the_end_is_an_error_that_leaves_the_cache_as_it_was():
    attention, cache = Attention(16, 2), KVCache(1, 1, 4, 2, 8)
    attention(torch.randn(1, 3, 16), cache=cache)
    with pytest.raises(ValueError, match="max_length = 4, holds 3 tokens and was given 2 more"):
        attention(torch.randn(1, 2, 16), cache=cache)
    with pytest.raises(ValueError, match="max_length = 4"): cache.update(0, *torch.randn(2, 1, 2, 2, 8))
    assert cache.length == 3
    with pytest.raises(ValueError, match="length = 4 must be from 0 to 3"): cache.truncate(4)


def test_a_cache_that_does_not_fit_is_an_error():
    x = torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match="batch_size"): Attention(16, 2)(x, cache=KVCache(1, 1, 8, 2, 8))
    with pytest.raises(ValueError, match="no layer 1"): Attention(16, 2, layer=1)(x, cache=KVCache(1, 2, 8, 2, 8))
    narrow = KVCache(1, 2, 80, 2, 8, window=4, max_chunk=2)
    for rules in [{}, {"window": 5}, {"window": 4, "sinks": 1}]:
        with pytest.raises(ValueError, match="looks at window"): Attention(16, 2, **rules)(x, cache=narrow)
    Attention(16, 2, window=3)(x, cache=narrow)
    with pytest.raises(ValueError, match="n_layers = 2"): KVCache(2, 1, 8, 2, 8, window=[4])
    with pytest.raises(ValueError, match="batch_size = 2"): KVCache(1, 2, 8, 2, 8, padding=torch.tensor([1]))


def test_a_prefix_fed_in_pieces_is_an_error():
    attention, x, cache = Attention(16, 2, prefix=4), torch.randn(1, 6, 16), KVCache(1, 1, 8, 2, 8)
    attention(x[:, :3], cache=cache)
    with pytest.raises(ValueError, match="but the first chunk ended after 3"): attention(x[:, 3:], cache=cache)


def test_generation_builds_no_graph():
    attention, cache = Attention(16, 2), KVCache(1, 1, 8, 2, 8)
    for _ in range(3): attention(torch.randn(1, 1, 16), cache=cache)
    assert not cache.layers[0].keys.requires_grad


COMPILES = """
import torch
from minillm.attention import Attention, KVCache
from minillm.positions import ALiBi, RotaryPositions
torch.set_num_threads(1)
class Both(torch.nn.Module):
    def __init__(self, rotate, bias, **rules):
        super().__init__()
        self.attention, self.rotate, self.bias = Attention(32, 4, 2, **rules), rotate, bias
    def forward(self, x): return self.attention(x, self.rotate, self.bias)
x, longer = torch.randn(2, 10, 32), torch.randn(2, 17, 32)
for rules in [{}, {"window": 4, "sinks": 1}, {"prefix": 3}]:
    for rotate, bias in [(RotaryPositions(8), None), (None, ALiBi(4))]:
        torch._dynamo.reset()
        both = Both(rotate, bias, **rules)
        compiled = torch.compile(both, fullgraph=True, backend="eager", dynamic=True)
        any_length = {"x": {1: torch.export.Dim("T", min=2, max=100)}}
        exported = torch.export.export(both, (x,), dynamic_shapes=any_length).module()
        for given in (x, longer):
            torch.testing.assert_close(compiled(given), both(given))
            torch.testing.assert_close(exported(given), both(given))
torch._dynamo.reset()
attention = Attention(32, 4, 2, window=4)
compiled = torch.compile(attention, fullgraph=True, backend="eager")
caches = [KVCache(1, 2, 50, 2, 8, window=4, max_chunk=2) for _ in range(2)]
with torch.no_grad():
    for n in (9, 1, 1, 1, 1, 2):
        x = torch.randn(2, n, 32)
        got = (compiled if n < 3 else attention)(x, cache=caches[0])
        torch.testing.assert_close(got, attention(x, cache=caches[1]))
print("compiled and exported")
"""


def test_compiles_as_one_graph_and_exports_with_any_length():
    # in a process of its own: here the shape comments are assertions, which break graphs
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True)
    assert done.stdout == "compiled and exported\n", done.stderr[-2000:]


def test_visible_takes_positions_in_any_order():
    order = torch.randperm(9)
    expected = attention_mask(9, 9, window=3, sinks=1)[:, order]
    assert torch.equal(visible(torch.arange(9), order, window=3, sinks=1), expected)
