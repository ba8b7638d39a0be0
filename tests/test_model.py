"""The model: published counts, transformers' logits, cached against uncached, and every impossible configuration."""
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minillm.model import PRESETS, MiniLLM, ModelConfig, cross_entropy, listen

TINY = ModelConfig(vocab_size=61, context_length=48, d_model=32, n_layers=3, n_heads=4, d_ff=48)
GPT = dict(norm="layernorm", activation="gelu_tanh", bias=True)
LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_context_length": 16}
KINDS = {
    "rope": dict(), "grouped": dict(n_kv_heads=2), "multi-query": dict(n_kv_heads=1), "wide heads": dict(head_dim=16),
    "linear scaling": dict(rope_scaling={"kind": "linear", "factor": 4.0}), "llama3 scaling": dict(rope_scaling=LLAMA3),
    "learned": dict(position="learned", **GPT), "sinusoidal": dict(position="sinusoidal", **GPT),
    "alibi": dict(position="alibi", **GPT), "none": dict(position="none"), "qk norm": dict(qk_norm=True),
    "post-norm": dict(norm_position="post", **GPT), "qkv bias": dict(bias="qkv"), "attention bias": dict(bias="attention"),
    "experts": dict(n_experts=4, n_active_experts=2), "untied, relu": dict(tie_embeddings=False, activation="relu"),
    "window": dict(window=7), "window, grouped": dict(window=7, n_kv_heads=2),
    "local and global": dict(window=7, global_every=3), "window, sinks": dict(window=7, sinks=3),
    "alibi, window": dict(position="alibi", window=7), "learned, window": dict(position="learned", window=7),
    "none, window, sinks": dict(position="none", window=7, sinks=2),
    "prefix": dict(prefix=5), "prefix, window": dict(prefix=5, window=7),
}
MOE = KINDS["experts"]
each_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def model_of(changes=None, config=TINY, dtype=torch.float32) -> MiniLLM:
    "A model in evaluation mode whose weights are larger than at the start of training, so that a mistake shows."
    model = MiniLLM(config.replace(**(changes or {}))).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def tokens(*shape) -> torch.Tensor: return torch.randint(0, 61, shape)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    "The largest difference, relative to the largest logit."
    return ((a - b).abs().max() / b.abs().max()).item()


# -- presets ---------------------------------------------------------------------------------------------------------

PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
             "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400,
             "mistral-7b": 7_241_732_096, "smollm2-135m": 134_515_008, "qwen2.5-0.5b": 494_032_768,
             "qwen3-0.6b": 596_049_920, "mini-50m": 50_049_408}
MILLIONS = {"small-4b": 4200, "mini-80m": 80, "tiny-51m": 51.2, "small-20m": 20.3}

@pytest.mark.parametrize("name, count", PUBLISHED.items())
def test_presets_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"): assert MiniLLM.from_preset(name).num_parameters() == count


@pytest.mark.parametrize("name, millions", MILLIONS.items())
def test_teaching_presets_have_about_the_named_number_of_parameters(name, millions):
    with torch.device("meta"): assert abs(MiniLLM.from_preset(name).num_parameters() / (1e6 * millions) - 1) < 0.012


def test_published_presets_have_the_published_settings():
    def has(name, **fields):
        got = PRESETS[name].to_dict()
        assert {k: got[k] for k in fields} == fields, name
    has("gpt2", position="learned", norm="layernorm", norm_eps=1e-5, activation="gelu_tanh", bias=True,
        context_length=1024, tie_embeddings=True)
    has("llama-2-7b", rope_theta=1e4, norm_eps=1e-5, context_length=4096, n_kv_heads=32, tie_embeddings=False)
    has("llama-3-8b", rope_theta=5e5, norm_eps=1e-5, context_length=8192, n_kv_heads=8, tie_embeddings=False)
    has("llama-3.2-1b", rope_theta=5e5, context_length=131072, n_kv_heads=8, head_dim=64, tie_embeddings=True,
        rope_scaling=LLAMA3 | {"factor": 32.0, "original_context_length": 8192})
    has("mistral-7b", rope_theta=1e4, norm_eps=1e-5, context_length=32768, window=4096, tie_embeddings=False)
    has("smollm2-135m", rope_theta=1e5, norm_eps=1e-5, context_length=8192, n_kv_heads=3, tie_embeddings=True)
    has("qwen2.5-0.5b", rope_theta=1e6, norm_eps=1e-6, context_length=32768, head_dim=64, bias="qkv",
        tie_embeddings=True)
    has("qwen3-0.6b", rope_theta=1e6, norm_eps=1e-6, context_length=40960, head_dim=128, qk_norm=True, bias=False,
        tie_embeddings=True)


def test_every_preset_builds_small_and_runs():
    for name, config in PRESETS.items():
        shrink = dict(vocab_size=61, context_length=32, n_layers=2)
        groups = config.n_heads // config.n_kv_heads
        if config.d_model > 256: shrink |= dict(d_model=64, n_heads=4, n_kv_heads=4 if groups == 1 else 2, d_ff=96)
        assert MiniLLM(config.replace(**shrink))(tokens(2, 9)).shape == (2, 9, 61), name


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'gpt-2' is no preset; the nearest is 'gpt2'"): MiniLLM.from_preset("gpt-2")
    assert MiniLLM.from_preset("tiny", vocab_size=99, n_layers=1).config.vocab_size == 99


# -- the configuration -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, said", [
    (dict(n_heads=5), ["d_model = 32", "n_heads = 5", "head_dim"]),
    (dict(n_kv_heads=3), ["n_heads = 4", "n_kv_heads = 3"]),
    (dict(head_dim=7), ["rope", "head_dim = 7", "odd"]),
    (dict(d_model=33, head_dim=8, position="sinusoidal"), ["sinusoidal", "d_model = 33"]),
    (dict(position="alibi", rope_scaling={"kind": "linear", "factor": 2.0}), ["rope_scaling", "position = 'alibi'"]),
    (dict(rope_scaling={"kind": "linear"}), ["factor"]),
    (dict(rope_scaling={"kind": "yarn", "factor": 2.0}), ["yarn"]),
    (dict(global_every=2), ["global_every = 2", "window is None"]),
    (dict(sinks=2), ["sinks = 2", "window is None"]),
    (dict(prefix=49), ["prefix = 49", "context_length = 48"]),
    (dict(n_experts=4), ["n_active_experts = 0", "n_experts = 4"]),
    (dict(n_experts=4, n_active_experts=5), ["n_active_experts = 5", "n_experts = 4"]),
    (dict(n_active_experts=1), ["n_active_experts = 1", "n_experts = 0"]),
    (dict(dropout=1.0), ["dropout = 1.0", "below 1"]),
    (dict(norm_eps=0.0), ["norm_eps = 0.0", "above 0"]),
    (dict(window=0), ["window must be a whole number, at least 1; got 0"]),
    (dict(n_layers=0), ["n_layers must be a whole number, at least 1; got 0"]),
    (dict(d_model="32"), ["d_model must be a whole number, at least 1; got '32'"]),
    (dict(d_model=32.0), ["d_model must be a whole number, at least 1; got 32.0"]),
    (dict(qk_norm=1), ["qk_norm must be True or False; got 1"]),
    (dict(norm_eps="1e-5"), ["norm_eps must be a number; got '1e-5'"]),
    (dict(rope_scaling="llama3"), ["rope_scaling must be a dict", "'llama3'"]),
    (dict(position="rotary"), ["'rotary' is no position", "rope"]),
    (dict(norm="rms"), ["'rms' is no norm", "'rmsnorm'"]),
    (dict(activation="swigl"), ["the nearest is 'swiglu'"]),
    (dict(bias="kqv"), ["the nearest is 'qkv'"]),
    (dict(n_head=2), ["'n_head' is no field of ModelConfig", "the nearest is 'n_heads'"]),
])
def test_what_cannot_be_is_an_error_that_says_which_fields_clash(changes, said):
    with pytest.raises(ValueError) as caught: TINY.replace(**changes)
    for part in said: assert part in str(caught.value)


@each_kind
def test_a_config_goes_through_json_and_back(changes):
    config = TINY.replace(**changes)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_replace_derives_anew_what_was_derived_and_keeps_the_rest():
    assert (TINY.n_kv_heads, TINY.head_dim, TINY.d_ff) == (4, 8, 48)
    wider = TINY.replace(d_model=64, n_heads=8)
    assert (wider.n_kv_heads, wider.head_dim, wider.d_ff) == (8, 8, 48)
    assert TINY.replace(n_kv_heads=2).replace(n_heads=8, d_model=64).n_kv_heads == 2
    gpt = PRESETS["gpt2"].replace(d_model=1024, n_heads=16)
    assert (gpt.d_ff, gpt.head_dim, gpt.replace(activation="swiglu").d_ff) == (4096, 64, 2752)
    assert len(TINY.to_dict()) <= 25
    with pytest.raises(AttributeError): TINY.d_model = 64


# -- against transformers --------------------------------------------------------------------------------------------

LLAMA_NAMES = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "blocks": "model.layers",
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attention": "self_attn",
    "query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "query_norm": "q_norm",
    "key_norm": "k_norm", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
GPT2_NAMES = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.output": "attn.c_proj", "mlp.up": "mlp.c_fc",
              "mlp.down": "mlp.c_proj"}
SHARED = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=48, rms_norm_eps=1e-5, attn_implementation="eager")
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


def renamed(name: str) -> str: return ".".join(LLAMA_NAMES.get(part, part) for part in name.split("."))


@pytest.mark.parametrize("kind, theirs, changes", [
    ("Llama", dict(tie_word_embeddings=False, rope_parameters=PLAIN), dict(tie_embeddings=False)),
    ("Llama", dict(tie_word_embeddings=True, rope_parameters=SCALED), dict(rope_scaling=LLAMA3)),
    ("Mistral", dict(tie_word_embeddings=False, rope_parameters=PLAIN, sliding_window=7),
     dict(tie_embeddings=False, window=7)),
    ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=PLAIN), dict(bias="qkv")),
    ("Qwen3", dict(tie_word_embeddings=True, rope_parameters=PLAIN, head_dim=16), dict(head_dim=16, qk_norm=True)),
], ids=["llama", "llama3 scaling, tied", "mistral", "qwen2", "qwen3"])
def test_logits_equal_those_of_transformers_with_the_same_weights(kind, theirs, changes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**SHARED | theirs)
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in reference.parameters(): p.mul_(3) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    ours, ids, state = model_of(changes | dict(n_kv_heads=2)), tokens(2, 40), reference.state_dict()
    ours.load_state_dict({name: state[renamed(name)] for name in ours.state_dict()})
    assert apart(ours(ids), reference(ids).logits) < 1e-5


def test_logits_equal_those_of_gpt2_in_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=61, n_positions=48, n_embd=32, n_layer=3, n_head=4)
    reference = transformers.GPT2LMHeadModel(config).eval()
    ours, ids = model_of(dict(position="learned", d_ff=128, **GPT)), tokens(2, 40)
    state = {k.removeprefix("transformer."): v.mT if v.ndim == 2 else v for k, v in reference.state_dict().items()}
    words, places = (state[f"{name}.weight"].T for name in ("wte", "wpe"))   # only linear layers are turned
    new = {"embedding.weight": words, "head.weight": words, "positions.table.weight": places,
           "norm.weight": state["ln_f.weight"], "norm.bias": state["ln_f.bias"]}
    for i in range(3):
        for kind in ("weight", "bias"):
            for name, theirs in GPT2_NAMES.items(): new[f"blocks.{i}.{name}.{kind}"] = state[f"h.{i}.{theirs}.{kind}"]
            for name, part in zip(("query", "key", "value"), state[f"h.{i}.attn.c_attn.{kind}"].chunk(3)):
                new[f"blocks.{i}.attention.{name}.{kind}"] = part
    ours.load_state_dict(new)
    assert apart(ours(ids), reference(ids).logits) < 1e-5


# -- what every kind of model keeps ----------------------------------------------------------------------------------

@each_kind
def test_no_token_sees_what_follows_it(changes):
    model, ids = model_of(changes, dtype=torch.float64), tokens(2, 30)
    other = ids.clone()
    other[:, 20:] = (other[:, 20:] + 1) % 61
    a, b = model(ids), model(other)
    assert torch.allclose(a[:, :20], b[:, :20], atol=1e-12) and (a[:, 20:] - b[:, 20:]).abs().amax(-1).min() > 1e-3


@each_kind
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)],
                         ids=["float32", "float64"])
@pytest.mark.parametrize("chunks", [[48], [9] + [1] * 39, [20, 5, 1, 1, 15, 6], [6, 42]], ids=str)
def test_cached_logits_equal_uncached_ones_up_to_the_context(changes, dtype, tolerance, chunks):
    model, ids = model_of(changes, dtype=dtype), tokens(2, 48)
    for max_chunk in (1, 64):
        cache = model.new_cache(2, 48, max_chunk=max_chunk)
        cached = torch.cat([model(chunk, cache) for chunk in ids.split(chunks, dim=1)], dim=1)
        assert apart(cached, model(ids)) < tolerance


@each_kind
def test_rows_padded_at_the_left_give_what_they_give_alone(changes):
    model, padding = model_of(changes), torch.tensor([0, 9, 4])
    rows = [tokens(1, 24 - int(p)) for p in padding]
    ids = torch.cat([F.pad(row, (int(p), 0)) for row, p in zip(rows, padding)])
    cache = model.new_cache(3, 30, padding)
    first = model(ids, cache)
    new = tokens(3, 4)
    after = torch.cat([model(new[:, i:i + 1], cache) for i in range(4)], dim=1)
    for row, p in enumerate(padding.tolist()):
        alone = model(torch.cat([rows[row], new[row:row + 1]], dim=1))[0]
        assert apart(torch.cat([first[row, p:], after[row]]), alone) < 1e-5


ENDLESS = ["alibi", "alibi, window", "window", "window, grouped", "none, window, sinks"]

@pytest.mark.parametrize("name", ENDLESS)
def test_past_the_context_a_cached_model_equals_a_full_forward_under_the_same_mask(name):
    model, ids = model_of(KINDS[name]), tokens(2, 120)
    assert model.config.max_length is None
    cache = model.new_cache(2, 120, max_chunk=8)
    cached = torch.cat([model(chunk, cache) for chunk in ids.split([50, 6] + [1] * 20 + [44], dim=1)], dim=1)
    assert apart(cached, model(ids)) < 1e-5


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ENDLESS])
def test_past_the_context_the_others_say_so_with_and_without_a_cache(name):
    model = model_of(KINDS[name])
    with pytest.raises(ValueError, match="49 tokens are more than context_length = 48"): model(tokens(1, 49))
    cache = model.new_cache(1, 60)
    model(tokens(1, 48), cache)
    with pytest.raises(ValueError, match="49 tokens are more than context_length = 48"): model(tokens(1, 1), cache)
    with pytest.raises(ValueError, match="context_length = 48"): model.generate(tokens(1, 40), 20)


def test_layers_with_different_windows_get_caches_of_different_size():
    model = model_of(dict(window=7, global_every=3, n_layers=6))
    assert model.config.windows == [7, 7, None, 7, 7, None]
    cache = model.new_cache(1, 48, max_chunk=4)
    assert [layer.keys.shape[2] for layer in cache.layers] == [11, 11, 48, 11, 11, 48]


def test_a_cache_that_was_cut_back_goes_on_as_if_nothing_had_been():
    for changes in ({}, dict(window=7), dict(window=7, global_every=3)):
        model, ids = model_of(changes), tokens(1, 40)
        cache = model.new_cache(1, 48, max_chunk=8)
        model(ids[:, :30], cache), model(tokens(1, 6), cache)
        cache.truncate(30)
        assert apart(model(ids[:, 30:], cache), model(ids)[:, 30:]) < 1e-5


def test_half_precision_runs_with_a_cache():
    for dtype in (torch.bfloat16, torch.float16):
        model, ids = model_of(dtype=dtype), tokens(2, 20)
        cache = model.new_cache(2, 20)
        cached = torch.cat([model(chunk, cache) for chunk in ids.split([15, 5], dim=1)], dim=1)
        assert cached.dtype == dtype and apart(cached.float(), model(ids).float()) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        model = model_of(MOE)
        assert apart(model(ids, model.new_cache(2, 20)).float(), model(ids).float()) < 0.05


def test_ids_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match=r"ids must be \(B, T\).*\(7,\)"): model_of()(tokens(7))


# -- initialisation --------------------------------------------------------------------------------------------------

def test_a_new_model_knows_nothing_so_its_loss_is_ln_V():
    for name in ("tales-short", "mini-sinusoidal"):
        model = MiniLLM.from_preset(name, vocab_size=512, dropout=0.0)
        nats, count = cross_entropy(model(torch.randint(0, 512, (4, 64))), torch.randint(0, 512, (4, 64)))
        assert abs(nats / count - math.log(512)) < 0.12


@pytest.mark.parametrize("changes", [{}, dict(position="learned", **GPT), MOE], ids=["llama", "gpt", "experts"])
def test_weights_start_as_gpt2_says(changes):
    model = MiniLLM(TINY.replace(d_model=128, d_ff=512, n_layers=8, **changes))
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"): assert (p == 1).all()
        elif name.endswith("bias"): assert (p == 0).all()
        else:
            expected = 0.02 / 4 if name.endswith(("output.weight", "down.weight")) else 0.02
            assert abs(p.std() / expected - 1) < 0.1, name


def test_tied_weights_are_one_tensor_counted_once():
    tied, untied = MiniLLM(TINY), MiniLLM(TINY.replace(tie_embeddings=False))
    assert tied.head.weight is tied.embedding.weight and untied.num_parameters() - tied.num_parameters() == 61 * 32
    tied.embedding.requires_grad_(False)
    assert tied.num_parameters() - tied.num_parameters(trainable_only=True) == 61 * 32


# -- training through it ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(position="alibi", dropout=0.2), MOE], ids=["plain", "dropout", "experts"])
def test_gradient_checkpointing_changes_no_gradient(changes):
    model, ids = model_of(changes).train(), tokens(2, 20)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        cross_entropy(model(ids), ids)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_every_parameter_learns():
    for changes in KINDS.values():
        model = model_of(changes).train()
        cross_entropy(model(tokens(4, 40)), tokens(4, 40))[0].backward()
        for name, p in model.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, (changes, name)


def test_dropout_acts_in_training_only():
    model, ids = model_of(dict(dropout=0.3)), tokens(2, 10)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_cross_entropy_is_a_sum_and_a_count_that_skip_padding():
    logits, targets = torch.randn(3, 4, 7), torch.randint(0, 7, (3, 4))
    targets[1, 2:] = -100
    by_hand = -sum(logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(3) for t in range(4) if targets[b,
                                                                                                              t] >= 0)
    nats, count = cross_entropy(logits, targets)
    assert torch.allclose(nats, by_hand, atol=1e-5) and count == 10
    parts = [cross_entropy(logits[b:b + 1], targets[b:b + 1]) for b in range(3)]
    assert torch.allclose(sum(p[0] for p in parts), nats) and sum(p[1] for p in parts) == count
    nothing = cross_entropy(logits, torch.full((3, 4), -100))
    assert nothing[0] == 0 and nothing[1] == 0
    assert cross_entropy(logits.bfloat16(), targets)[0].dtype == torch.float32


# -- generate --------------------------------------------------------------------------------------------------------

@each_kind
def test_greedy_generation_takes_the_likeliest_token_of_a_full_forward(changes):
    model, ids = model_of(changes), tokens(2, 6)
    out = model.generate(ids, 20, temperature=0)
    assert out.shape == (2, 26) and torch.equal(out[:, :6], ids)
    assert torch.equal(out[:, 6:], model(out[:, :-1])[:, 5:].argmax(-1))


def test_generation_repeats_with_a_seed_and_follows_the_distribution():
    model, ids = model_of(), tokens(1, 5)
    draw = lambda seed: model.generate(ids, 12, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    many = model.generate(ids.expand(20000, -1), 1, temperature=2.0, top_k=5)[:, -1]
    kept = (model(ids)[0, -1] / 2).topk(5)
    shares = torch.bincount(many, minlength=61) / 20000
    assert (shares > 0).sum() == 5 and (shares[kept.indices] - kept.values.softmax(-1)).abs().max() < 0.02


def test_generation_stops_at_eos_and_fills_the_rest_of_a_finished_row():
    model, ids = model_of(), tokens(8, 3)
    torch.manual_seed(3)
    free = model.generate(ids, 30)
    eos = int(free[0, 8])
    torch.manual_seed(3)
    out = model.generate(ids, 30, eos_id=eos)
    for row, reference in zip(out[:, 3:], free[:, 3:]):
        ends = (reference == eos).nonzero().flatten().tolist()
        end = ends[0] if ends else len(row)
        assert torch.equal(row[:end], reference[:end]) and (row[end:] == eos).all()
    assert (model.generate(ids[:1], 30, eos_id=int(model(ids[:1])[0, -1].argmax()), temperature=0)).shape == (1, 4)


def test_generation_leaves_the_mode_as_it_was_and_makes_no_graph():
    model = model_of(dict(dropout=0.5)).train()
    start = tokens(1, 3)
    assert torch.equal(model.generate(start, 8, temperature=0), model.generate(start, 8, temperature=0))
    assert model.training and all(m.training for m in model.modules())
    assert model.generate(tokens(1, 47), 2).shape == (1, 49), "the last token need not be read"
    assert model.generate(tokens(2, 5), 0).shape == (2, 5)


# -- hooks, swaps, names, compilers ----------------------------------------------------------------------------------

@each_kind
def test_listening_changes_nothing_and_sees_weights_that_sum_to_one(changes):
    model, ids, seen = model_of(changes), tokens(2, 30), {}
    silent = model(ids)
    parts = ["", ".attention", ".mlp", ".attention.weights"]
    names = ["embedding", "norm", "head", *(f"blocks.{i}{part}" for i in range(3) for part in parts)]
    with listen(model, {name: lambda x, name=name: seen.update({name: x}) for name in names}): heard = model(ids)
    assert list(seen) and set(seen) == set(names) and apart(heard, silent) < 1e-5
    assert torch.equal(seen["head"], heard) and seen["blocks.2"].shape == (2, 30, 32)
    assert seen["blocks.1.attention.weights"].shape == (2, 4, 30, 30)
    assert torch.allclose(seen["blocks.1.attention.weights"].sum(-1), torch.ones(2, 4, 30), atol=1e-5)
    assert torch.equal(model(ids), silent)


def test_what_a_listener_returns_takes_the_place_of_what_it_saw():
    model, ids = model_of(), tokens(2, 10)
    with listen(model, {"blocks.1": lambda x: x * 0}): silenced = model(ids)
    alone = model.blocks[2](torch.zeros(2, 10, 32), model.positions.at(torch.arange(10)))
    assert torch.allclose(silenced, model.head(model.norm(alone)), atol=1e-6)
    uniform = lambda w: torch.ones_like(w).tril() / torch.arange(1, 11).view(-1, 1)
    with listen(model, {"blocks.0.attention.weights": uniform}): assert apart(model(ids), silenced) > 0.01


def test_listeners_are_gone_after_an_error_and_unknown_names_are_errors():
    model, ids = model_of(), tokens(1, 4)
    def fail(x): raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"), listen(model, {"blocks.0": fail, "blocks.1": fail}): model(ids)
    model(ids)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="'blocks.0.atention' is no submodule; the nearest is 'blocks.0.attention'"):
        with listen(model, {"blocks.1": fail, "blocks.0.atention": fail}): pass
    model(ids)


def test_linear_layers_can_be_swapped_without_editing_the_model():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0
        def forward(self, x):
            self.calls += 1
            return self.inner(x)
    for changes in ({}, MOE, dict(position="learned", **GPT)):
        model, ids = model_of(changes), tokens(1, 12)
        before = model(ids)
        for name in [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
            model.set_submodule(name, Wrapped(model.get_submodule(name)))
        assert torch.equal(model(ids), before)
        assert all(m.calls > 0 for m in model.modules() if isinstance(m, Wrapped))


def test_parameter_names_shard_by_pattern():
    last = {"query", "key", "value", "gate", "up", "output", "down", "embedding", "head", "router", "table"}
    for changes in KINDS.values():
        for name, p in MiniLLM(TINY.replace(**changes)).named_parameters():
            if p.ndim == 2: assert name.split(".")[-2] in last, name


@pytest.mark.parametrize("name", ["rope", "learned", "sinusoidal", "alibi", "window", "prefix", "qk norm", "experts"])
def test_export_keeps_the_logits_for_any_length(name):
    model, ids = model_of(KINDS[name]), tokens(2, 20)
    length = torch.export.Dim("length", min=2, max=48)
    exported = torch.export.export(model, (ids,), dynamic_shapes={"ids": {1: length}}).module()
    assert apart(exported(ids[:, :13]), model(ids[:, :13])) < 1e-5


@pytest.mark.parametrize("name", ["rope", "learned", "sinusoidal", "alibi", "window", "prefix"])
def test_the_forward_pass_is_one_graph(name):
    model, ids = model_of(KINDS[name]).train(), tokens(2, 20)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cross_entropy(compiled(ids), ids)[0].backward()
    assert apart(compiled(ids), model(ids)) < 1e-5


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits():
    model, ids = model_of(dict(n_layers=1)), tokens(2, 20)
    torch._dynamo.reset()
    assert apart(torch.compile(model, fullgraph=True)(ids), model(ids)) < 1e-5


def test_a_model_on_the_meta_device_takes_weights_from_elsewhere():
    with torch.device("meta"): empty = MiniLLM(TINY)
    full = model_of()
    empty.load_state_dict(full.state_dict(), assign=True)
    ids = tokens(1, 9)
    assert torch.equal(empty.eval()(ids), full(ids))
