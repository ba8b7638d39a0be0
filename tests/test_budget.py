"""The calculator against real models: their parameters, their operations, the bytes that they and their caches really take."""
import itertools
import math
import warnings

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from minillm.budget import (
    BYTES,
    OPTIMIZER_NUMBERS,
    activation_bytes,
    active_parameters,
    count_parameters,
    flops_per_token,
    inference_memory,
    layer_keeps,
    matrix_weights,
    training_memory,
    training_seconds,
)
from minillm.model import PRESETS, MiniLLM, ModelConfig, cross_entropy, listen
from minillm.optimizers import OPTIMIZERS, make_optimizer

TINY = ModelConfig(vocab_size=100, context_length=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96)
B, T = 3, 48


def on_meta(config):
    with torch.device("meta"): return MiniLLM(config)


def ids_of(config): return torch.randint(0, config.vocab_size, (B, T))


def test_by_hand():
    "V 10, C 4, one layer, two heads, F 6, GPT-2's way without a bias: every number on paper."
    c = ModelConfig(vocab_size=10, context_length=8, d_model=4, n_layers=1, n_heads=2, d_ff=6, position="learned",
                    norm="layernorm", activation="gelu")
    assert count_parameters(c) == {"embedding": 40, "positions": 32, "attention": 64, "networks": 48, "routers": 0,
                                   "head": 0, "biases": 0, "norms": 12}
    assert sum(count_parameters(c).values()) == 196 == on_meta(c).num_parameters()
    assert flops_per_token(c, 8) == 2 * (64 + 48 + 40) + 4 * 4 * 8
    assert flops_per_token(c, 8, training=True) == 3 * flops_per_token(c, 8)
    memory = training_memory(c, 1, 8)
    assert (memory["weights"], memory["gradients"], memory["optimizer"], memory["logits"]) == (784, 784, 1568, 960)
    assert inference_memory(c, 1, 8, dtype="float32") == {"weights": 784, "cache": 8 * 2 * 4 * 4}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_as_many_parameters_as_is_counted(name):
    assert sum(count_parameters(PRESETS[name]).values()) == on_meta(PRESETS[name]).num_parameters()


def test_every_combination_of_options_is_counted():
    options = {"norm": ["rmsnorm", "layernorm"], "bias": [False, True, "qkv", "attention"], "position": ["learned"],
               "activation": ["swiglu", "relu"], "qk_norm": [False, True], "n_experts": [0, 3], "tie_embeddings": [True, False],
               "norm_position": ["pre", "post"], "head_dim": [16]}
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values))
        c = ModelConfig(**TINY.to_dict() | chosen | {"n_active_experts": 2 if chosen["n_experts"] else 0})
        parts, model = count_parameters(c), on_meta(c)
        assert sum(parts.values()) == model.num_parameters(), chosen
        of_norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
        of_biases = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name and name.endswith("bias"))
        assert (parts["norms"], parts["biases"]) == (of_norms, of_biases), chosen


def test_a_token_works_with_its_experts_only():
    c = TINY.replace(n_experts=5, n_active_experts=2)
    model = on_meta(c)
    idle = sum(p.numel() for name, p in model.named_parameters() if any(f"experts.{e}." in name for e in (0, 1, 2)))
    assert active_parameters(c) == model.num_parameters() - idle
    assert active_parameters(TINY) == sum(count_parameters(TINY).values())


SHAPES = {"llama": {}, "gpt2": dict(norm="layernorm", activation="gelu", bias=True, position="learned"), "many heads": dict(n_kv_heads=4),
          "wide heads": dict(head_dim=16), "untied": dict(tie_embeddings=False), "relu": dict(activation="relu"), "qk": dict(qk_norm=True),
          "post": dict(norm_position="post"), "post layernorm": dict(norm_position="post", norm="layernorm"), "none": dict(position="none"),
          "window": dict(window=8, sinks=1), "alibi": dict(position="alibi"), "experts": dict(n_experts=4, n_active_experts=2),
          "an expert": dict(n_experts=4, n_active_experts=1)}
each_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)


@each_shape
def test_operations_are_those_that_torch_counts(changes):
    "With somebody listening attention takes its explicit way: the counter does not know the CPU's fused kernel."
    c = TINY.replace(**changes)
    model, ids = MiniLLM(c), ids_of(c)
    with listen(model, {f"blocks.{n}.attention.weights": lambda weights: None for n in range(c.n_layers)}):
        with FlopCounterMode(display=False) as counter: nats, _ = cross_entropy(model(ids), ids)
        forward = counter.get_total_flops()
        with counter: nats.backward()
    assert forward == B * T * flops_per_token(c, T)
    assert forward + counter.get_total_flops() == B * T * flops_per_token(c, T, training=True)


def kept_bytes(model, ids, dtype="float32"):
    "What autograd keeps between forward and backward, but for the weights themselves: each piece of memory once."
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own: kept[storage.data_ptr()] = tensor     # held, so that no address is used twice
        return tensor

    with warnings.catch_warnings(), saved_tensors_hooks(note, lambda tensor: tensor):
        warnings.simplefilter("ignore")
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"): cross_entropy(model(ids), ids)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@each_shape
@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.005), ("bfloat16", 0.09)])
def test_activations_are_what_a_step_keeps(changes, dtype, tolerance):
    c = TINY.replace(**changes)
    logits = 4 * B * T * c.vocab_size                        # the probabilities, which stay for the backward pass
    copies = 0 if dtype == "float32" else 2 * sum(matrix_weights(c).values())
    assert activation_bytes(c, B, T, dtype) + copies + logits == pytest.approx(kept_bytes(MiniLLM(c), ids_of(c), dtype), rel=tolerance)


@pytest.mark.parametrize("changes", [{}, SHAPES["gpt2"]])
def test_activations_with_dropout_and_with_gradient_checkpointing(changes):
    c = TINY.replace(**changes, dropout=0.1)
    logits = 4 * B * T * c.vocab_size
    model, ids = MiniLLM(c), ids_of(c)
    assert activation_bytes(c, B, T) + logits == pytest.approx(kept_bytes(model, ids), rel=0.02)
    model.gradient_checkpointing = True
    layer = B * T * sum(layer_keeps(c, T).values())          # made anew in the backward pass, one layer at a time
    assert activation_bytes(c, B, T, gradient_checkpointing=True) - layer + logits == pytest.approx(kept_bytes(model, ids), rel=0.02)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_keep_what_is_counted(name):
    c = TINY.replace(tie_embeddings=False)
    model = MiniLLM(c)
    optimizer = make_optimizer(model, name)
    cross_entropy(model(ids_of(c)), ids_of(c))[0].backward()
    optimizer.step()
    parts = [optimizer.muon, optimizer.adamw] if name == "muon" else [optimizer]
    kept = sum(t.nbytes for part in parts for state in part.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim)
    memory = training_memory(c, B, T, optimizer=name)
    assert memory["optimizer"] == kept
    assert memory["weights"] == memory["gradients"] == sum(p.grad.nbytes for p in model.parameters())


def test_all_optimizers_and_types_of_the_course_are_known():
    from minillm.training import DTYPES
    assert set(OPTIMIZER_NUMBERS) == set(OPTIMIZERS) and set(BYTES) == set(DTYPES)


@pytest.mark.parametrize("changes", [{}, dict(window=8), dict(window=8, sinks=2), dict(window=16, global_every=2), dict(window=8, prefix=3),
                                     dict(n_kv_heads=1), dict(head_dim=16)])
@pytest.mark.parametrize("length, max_chunk", [(64, 64), (64, 1), (1000, 16)])
def test_the_cache_takes_the_bytes_that_are_counted(changes, length, max_chunk):
    model = MiniLLM(TINY.replace(**changes))
    for dtype in (torch.float32, torch.bfloat16):
        cache = model.new_cache(5, length, max_chunk=max_chunk, dtype=dtype)
        assert inference_memory(model.config, 5, length, dtype=str(dtype).removeprefix("torch."), max_chunk=max_chunk)["cache"] == cache.nbytes


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_cache_and_weights_that_are_counted(name):
    model = on_meta(PRESETS[name]).to(torch.bfloat16)
    memory = inference_memory(model.config, 2, model.config.context_length)
    assert memory["cache"] == model.new_cache(2, model.config.context_length).nbytes
    assert memory["weights"] == sum(p.nbytes for p in model.parameters())


def test_time_is_operations_over_speed():
    seconds = training_seconds(TINY, 1e6, 64, peak=1e12, mfu=0.5, devices=2)
    assert math.isclose(seconds, 1e6 * flops_per_token(TINY, 64, training=True) / 1e12)


def test_wrong_names_and_shares_are_errors_that_help():
    with pytest.raises(ValueError, match="'adamw'"): training_memory(TINY, 1, 8, optimizer="adam")
    with pytest.raises(ValueError, match="'bfloat16'"): training_memory(TINY, 1, 8, dtype="bf16")
    with pytest.raises(ValueError, match="'float32'"): inference_memory(TINY, 1, 8, dtype="fp32")
    with pytest.raises(ValueError, match="at most 1"): training_seconds(TINY, 1, 8, peak=1.0, mfu=40)
