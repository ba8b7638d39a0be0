"""Reading and changing what goes on inside: against sums, copies with other weights, and loops that work it out by hand."""
import copy
import math
from unittest.mock import patch as replaced

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minillm.interpretability import (
    ablate_heads,
    attention_maps,
    control_labels,
    direct_logit_attribution,
    fit_probe,
    frozen_norm,
    logit_lens,
    patch,
    patching_map,
    prefix_matching_score,
    previous_token_score,
    probe_accuracy,
    record,
    repeated_tokens,
    residual_stream,
    stream_names,
    stream_parts,
    token_places,
)
from minillm.model import MiniLLM, ModelConfig
from minillm.tokenizer import BPETokenizer, CharTokenizer

SHAPES = {
    "llama": {},
    "gpt2": {"position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True},
    "grouped": {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False},
    "qwen": {"n_kv_heads": 1, "bias": "qkv", "head_dim": 6},
    "window": {"window": 3, "sinks": 1, "position": "alibi"},
    "experts": {"n_experts": 3, "n_active_experts": 2, "position": "sinusoidal"},
    "prefix": {"prefix": 3, "position": "none"},
}
each_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)


def make(seed: int = 0, **changes) -> MiniLLM:
    "A random model in float64 with weights large enough for opinions, none of them special (norms and biases too)."
    torch.manual_seed(seed)
    model = MiniLLM(ModelConfig(**{"vocab_size": 50, "context_length": 24, "d_model": 32, "n_layers": 3, "n_heads": 4,
                                   "d_ff": 40, **changes})).double().eval()
    for weight in model.parameters():
        weight.requires_grad_(False)
        if weight.ndim > 1: weight.mul_(6)
        else: weight.add_(0.3 * torch.randn_like(weight))
    return model


def some_ids(n_rows: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def apart(a, b) -> float:
    return (a - b).abs().max().item()


# reading

@each_shape
def test_an_unheard_model_is_unchanged_and_never_takes_the_explicit_way(changes):
    model, ids = make(**changes), some_ids()
    before, weights = model(ids), {name: value.clone() for name, value in model.state_dict().items()}
    attention_maps(model, ids), residual_stream(model, ids), stream_parts(model, ids)
    direct_logit_attribution(model, ids, ids[:, 0])
    with ablate_heads(model, [(0, 1)]), patch(model, record(model, ids, ["blocks.0"]), [2]): model(ids)
    patching_map(model, ids[:1], ids[1:], lambda logits: logits[:, 0])
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with replaced("minillm.attention.attend", side_effect=AssertionError("explicit attention, and nobody listens")):
        assert torch.equal(model(ids), before)
        residual_stream(model, ids)                             # the stream alone needs no weights either
        with pytest.raises(AssertionError, match="nobody listens"): attention_maps(model, ids)


def test_record_gives_names_in_order_with_dropout_off_and_puts_the_mode_back():
    model, ids = make(dropout=0.5), some_ids()
    expected = model(ids)
    model.train()
    heard = record(model, ids, ["", "blocks.1", "dropout"])
    assert list(heard) == ["", "blocks.1", "dropout"] and torch.equal(heard[""], expected) and model.training
    with pytest.raises(ValueError, match="the nearest is 'blocks.1'"): record(model, ids, ["block.1"])
    with pytest.raises(IndexError): record(model, ids + 50, ["blocks.1"])
    assert model.training and not any(module._forward_hooks for module in model.modules())


@each_shape
def test_maps_are_distributions_over_what_a_token_may_see(changes):
    model, ids = make(**changes), some_ids()
    maps = attention_maps(model, ids)
    assert maps.shape == (3, 2, 4, 11, 11) and apart(maps.sum(-1), torch.ones(1)) < 1e-9
    if not changes.get("prefix"): assert maps.triu(1).abs().max() == 0
    if changes.get("window"): assert maps.tril(-3)[..., 1:].abs().max() == 0


@each_shape
def test_the_last_lens_is_the_model_and_the_first_reads_embeddings(changes):
    model, ids = make(**changes), some_ids()
    stream = residual_stream(model, ids)
    lens = logit_lens(model, stream)
    assert stream.shape == (4, 2, 11, 32) and len(stream_names(model)) == 4 and torch.equal(lens[-1], model(ids))
    if changes.get("position", "rope") == "rope":
        assert apart(lens[0], model.head(model.norm(model.embedding(ids)))) == 0


def test_streams_of_a_post_norm_model_are_read_but_are_no_sum():
    model, ids = make(norm_position="post"), some_ids()
    assert torch.equal(logit_lens(model, residual_stream(model, ids))[-1], model(ids))
    with pytest.raises(ValueError, match="norm_position = 'post'"): stream_parts(model, ids)


# attribution

@each_shape
def test_the_parts_add_up_to_the_stream(changes):
    model, ids = make(**changes), some_ids()
    last = residual_stream(model, ids)[-1]
    coarse, fine = stream_parts(model, ids, heads=False), stream_parts(model, ids)
    assert torch.equal(sum(coarse.values()), last)                  # the same numbers added in the same order
    assert apart(sum(fine.values()), last) < 1e-10 * last.abs().max()
    assert sum(name.startswith("head") for name in fine) == 12 and list(coarse) == [
        "embedding", *(f"{part} {layer}" for layer in range(3) for part in ("attention", "mlp"))]


@each_shape
@pytest.mark.parametrize("heads", [True, False])
def test_attributions_add_up_to_the_logit_and_to_a_difference_of_two(changes, heads):
    model, ids = make(**changes), some_ids()
    right, wrong = torch.tensor([3, 7]), torch.tensor([8, 8])
    logits = model(ids)
    one = sum(direct_logit_attribution(model, ids, right, heads=heads).values())
    two = sum(direct_logit_attribution(model, ids, right, wrong, heads=heads).values())
    for row in range(2):
        assert apart(one[row], logits[row, :, right[row]]) < 1e-9
        assert apart(two[row], logits[row, :, right[row]] - logits[row, :, 8]) < 1e-9


@each_shape
def test_what_a_head_writes_is_what_is_missing_without_its_columns_of_the_output_matrix(changes):
    "In the first layer: later layers would answer to the change."
    model, ids = make(**changes), some_ids()
    D = model.config.head_dim
    before = record(model, ids, ["blocks.0.attention"])["blocks.0.attention"]
    for head in range(4):
        cut = copy.deepcopy(model)
        cut.blocks[0].attention.output.weight[:, head * D:(head + 1) * D] = 0
        missing = before - record(cut, ids, ["blocks.0.attention"])["blocks.0.attention"]
        assert apart(stream_parts(model, ids)[f"head 0.{head}"], missing) < 1e-10


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_frozen_norm_is_the_norm_at_its_own_point_and_linear_elsewhere(norm):
    norm = make(norm=norm, bias=True).norm
    x, y = torch.randn(2, 5, 32, dtype=torch.float64)
    through, bias = frozen_norm(norm, x), getattr(norm, "bias", None)
    assert apart(through(x) + (0 if bias is None else bias), norm(x)) < 1e-12
    assert apart(through(2 * x - 3 * y), 2 * through(x) - 3 * through(y)) < 1e-10
    assert apart(frozen_norm(norm, y)(x), through(x)) > 0.01


def test_attribution_by_hand():
    "Three numbers a token, no layers to speak of: the stream is the embedding [5, 1, 1], whose root mean square is 3."
    model = make(vocab_size=4, d_model=3, n_layers=1, n_heads=1, position="none", tie_embeddings=False, norm_eps=1e-12)
    for name in ("attention.output", "mlp.down"): model.blocks[0].get_submodule(name).weight.zero_()
    model.norm.weight.fill_(1.0)
    model.embedding.weight[2] = torch.tensor([5.0, 1.0, 1.0])
    model.head.weight[1], model.head.weight[3] = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 3.0])
    adds = direct_logit_attribution(model, torch.tensor([[2]]), torch.tensor([1]), torch.tensor([3]))
    assert {name: round(value.item(), 6) for name, value in adds.items()} == {"embedding": 1.0, "head 0.0": 0.0, "mlp 0": 0.0}


# places

@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_every_place_is_in_the_token_that_holds_it(text):
    for tokenizer in (BPE, CharTokenizer(sorted(set(text)))):
        ids = tokenizer.encode(text)
        owners = [number for number, token in enumerate(ids) for _ in tokenizer.decode_bytes([token])]
        starts = [len(text[:place].encode()) for place in range(len(text))]
        assert token_places(tokenizer, text, range(len(text))) == [owners[start] for start in starts]


BPE = BPETokenizer.train(["Zoë saw a fox. A fox saw Zoë! The end."] * 3, 280)


# ablation

@each_shape
def test_a_silenced_head_is_a_head_without_an_output_matrix(changes):
    model, ids = make(**changes), some_ids()
    cut, D = copy.deepcopy(model), model.config.head_dim
    for layer, head in [(0, 3), (0, 1), (2, 0)]: cut.blocks[layer].attention.output.weight[:, head * D:(head + 1) * D] = 0
    with ablate_heads(model, [(0, 3), (0, 1), (2, 0)]): silenced = model(ids)
    assert apart(silenced, cut(ids)) < 1e-9 and apart(silenced, model(ids)) > 0.01
    with ablate_heads(model, []): assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("head", [(3, 0), (0, 4), (-1, 0), (0, -1)])
def test_a_head_that_is_not_there_is_an_error(head):
    with pytest.raises(ValueError, match="layers are 0 to 2, heads 0 to 3"): ablate_heads(make(), [head])


# induction

def test_repeated_tokens_repeat_after_their_period_and_not_before():
    ids, period = repeated_tokens(200, 30, 16, (3, 9), torch.Generator().manual_seed(1))
    assert ids.shape == (200, 30) and set(period.tolist()) == set(range(3, 10)) and int(ids.max()) == 15
    for row, p in zip(ids.tolist(), period.tolist()):
        assert row[p:] == row[:-p] and len(set(row[:p])) == p
    for periods in [(0, 4), (5, 4), (3, 17)]:
        with pytest.raises(ValueError, match="from 1 to vocab_size = 16"): repeated_tokens(2, 9, 16, periods)


def prefix_score_by_loops(weights, ids):
    scores = []
    for head in range(weights.shape[1]):
        seen = []
        for row, text in enumerate(ids.tolist()):
            for t, token in enumerate(text):
                after = [s + 1 for s in range(t) if text[s] == token]
                if after: seen.append(sum(weights[row, head, t, s].item() for s in after))
        scores.append(sum(seen) / len(seen))
    return scores


def test_prefix_matching_is_what_a_loop_counts():
    dice = torch.Generator().manual_seed(0)
    for vocab_size in (2, 5, 40):
        ids = torch.randint(0, vocab_size, (3, 12), generator=dice)
        weights = torch.randn(3, 4, 12, 12, generator=dice).tril().exp().tril()
        weights = weights / weights.sum(-1, keepdim=True)
        assert prefix_matching_score(weights, ids).tolist() == pytest.approx(prefix_score_by_loops(weights, ids), abs=1e-5)


def test_ideal_heads_score_one_and_uniform_ones_what_chance_gives():
    ids, period = repeated_tokens(5, 20, 30, (7, 7), torch.Generator().manual_seed(2))
    ideal = torch.zeros(5, 2, 20, 20)
    for t in range(20):
        ideal[:, 0, t, max(t - 1, 0)] = 1
        ideal[:, 1, t, t - 6 if t >= 7 else 0] = 1
    assert previous_token_score(ideal).tolist() == [1, 0] or previous_token_score(ideal)[0] == 1
    assert prefix_matching_score(ideal, ids)[1] == 1 and prefix_matching_score(ideal, ids)[0] == 0
    uniform = torch.ones(20, 20).tril() / torch.arange(1, 21).unsqueeze(1)
    chance = sum((t // 7) / (t + 1) for t in range(7, 20)) / 13
    assert prefix_matching_score(uniform.expand(5, 1, 20, 20), ids).item() == pytest.approx(chance, abs=1e-6)
    with pytest.raises(ValueError, match="no token occurs twice"): prefix_matching_score(ideal[..., :7, :7], ids[:, :7])


# probes

def test_the_probe_is_the_minimum_of_its_loss_and_finds_a_linear_rule():
    dice = torch.Generator().manual_seed(0)
    rule, x = torch.randn(20, 5, generator=dice), 3 + 7 * torch.randn(800, 20, generator=dice)
    labels = (x @ rule).argmax(-1)
    probe = fit_probe(x[:600], labels[:600], 5)
    assert probe_accuracy(probe, x[600:], labels[600:]) > 0.85

    mean, scale = x[:600].mean(0), x[:600].std(0)
    W = (probe.weight * scale).double().requires_grad_()
    b = (probe.bias + probe.weight @ mean).double().requires_grad_()
    loss = F.cross_entropy(((x[:600] - mean) / scale).double() @ W.T + b, labels[:600]) + 1e-3 * W.square().sum()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [W, b])])
    assert gradient.abs().max() < 1e-3                          # convex: where the slope is 0 nothing is better


def test_a_probe_knows_no_more_than_the_shares_where_features_say_nothing():
    probe = fit_probe(torch.ones(40, 3), torch.tensor([0] * 30 + [1] * 10), 2)
    assert probe(torch.ones(1, 3)).softmax(-1)[0, 0].item() == pytest.approx(0.75, abs=1e-3)


def test_control_labels_are_fixed_by_the_type_and_by_nothing_else():
    types = torch.randint(0, 300, (4000,))
    labels = control_labels(types, 4, seed=3)
    assert all(len(set(labels[types == kind].tolist())) == 1 for kind in types.unique().tolist())
    assert torch.equal(labels, control_labels(types, 4, seed=3)) and not torch.equal(labels, control_labels(types, 4, seed=4))
    assert labels.bincount(minlength=4).min() > 4000 / 4 / 2


# patching

@each_shape
def test_patching_everything_of_one_place_gives_the_other_text_from_there(changes):
    model, ids = make(**changes), some_ids()
    ours, other = ids[:1], ids[1:]
    for name in stream_names(model):
        with patch(model, record(model, other, [name]), range(11)): patched = model(ours)
        assert apart(patched, model(other)) < 1e-9, name


@each_shape
def test_the_map_in_batches_is_the_map_one_patch_at_a_time(changes):
    model, ids = make(**changes), some_ids()
    ours, other = ids[:1], ids[1:]
    names = ["dropout", "blocks.1", "blocks.0.attention", "blocks.2.mlp"]
    metric = lambda logits: logits[:, 4] - logits[:, 9]
    found = patching_map(model, ours, other, metric, names)
    values = record(model, other, names)
    for row, name in enumerate(names):
        for t in range(11):
            with patch(model, {name: values[name]}, [t]): one = metric(model(ours)[:, -1])
            assert found[row, t].item() == pytest.approx(one.item(), abs=1e-9)


def test_in_a_causal_model_a_patch_reaches_only_what_comes_after_and_a_difference_of_one_token_lies_there():
    model, ours = make(), some_ids(1)
    other = ours.clone()
    other[0, 4] = (other[0, 4] + 1) % 50
    metric = lambda logits: logits[:, 4]
    found = patching_map(model, ours, other, metric)
    assert found.shape == (4, 11)
    assert apart(found[:, :4], metric(model(ours)[:, -1])) < 1e-9                   # nothing differs before token 4
    assert apart(found[0, 4], metric(model(other)[:, -1])) < 1e-9 > apart(found[-1, -1], metric(model(other)[:, -1]))
    assert apart(found[-1, :-1], metric(model(ours)[:, -1])) < 1e-9                 # the last stream is read at the end only


def test_a_patched_prompt_tells_on_and_the_patch_falls_on_the_prompt_alone():
    model, ids = make(), some_ids()
    ours, other = ids[:1], ids[1:]
    values = record(model, other, ["dropout"])
    with patch(model, values, range(11)): told = model.generate(ours, 5, temperature=0)
    assert told[0, 11:].tolist() == model.generate(other, 5, temperature=0)[0, 11:].tolist()
    with pytest.raises(ValueError, match="give equal lengths"), patch(model, values, [0]): model(ours[:, :4])
    with pytest.raises(ValueError, match="equally long"): patching_map(model, ours, other[:, :4], math.fsum)
