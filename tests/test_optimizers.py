"""Ours against PyTorch's, against hand-computed steps, and against themselves after a save and a load."""
import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minillm.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    SGD,
    AdamW,
    Lion,
    Muon,
    MuonAdamW,
    clip_gradients,
    make_optimizer,
    orthogonalize,
    parameter_groups,
    restore_optimizer,
    schedule,
)

class Tiny(nn.Module):
    "What a language model has: tied embeddings, learned positions, matrices, norms and biases in blocks."

    def __init__(self, tied: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.positions = nn.Module()
        self.positions.table = nn.Parameter(torch.randn(6, 8))
        self.blocks = nn.ModuleList([nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False), nn.LayerNorm(8)])
        self.head = nn.Linear(8, 11, bias=False)
        if tied: self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids) + self.positions.table
        for block in self.blocks: x = block(x)
        return self.head(x)


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (4, 7), generator=generator)
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def same_walk(ours, theirs, shape=(5, 3), steps=20, dtype=torch.float64):
    "The largest difference between two optimizers that walk from the same point along the same gradients."
    a = nn.Parameter(torch.randn(shape, dtype=dtype))
    b = nn.Parameter(a.detach().clone())
    ours, theirs = ours([a]), theirs([b])
    for _ in range(steps):
        a.grad = torch.randn(shape, dtype=dtype)
        b.grad = a.grad.clone()
        ours.step(); theirs.step()
    return (a - b).abs().max().item()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_equals_torch(momentum, decay):
    settings = {"lr": 0.05, "momentum": momentum, "weight_decay": decay}
    assert same_walk(lambda p: SGD(p, **settings), lambda p: torch.optim.SGD(p, **settings)) < 1e-14


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch(fused, decay):
    settings = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": decay}
    assert same_walk(lambda p: AdamW(p, **settings), lambda p: torch.optim.AdamW(p, **settings, fused=fused)) < 1e-13


def test_adamw_and_torch_load_each_others_state():
    model = Tiny()
    ours = AdamW(model.parameters(), lr=0.01)
    train(model, ours, 3)
    twin = copy.deepcopy(model)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01)
    theirs.load_state_dict({"state": copy.deepcopy(ours.state_dict()["state"]), "param_groups": theirs.state_dict()["param_groups"]})
    train(model, ours, 3, start=3); train(twin, theirs, 3, start=3)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (64, 16)])
def test_muon_equals_torch(shape):
    # bfloat16 carries 8 bits: the two round in the same places, so even these steps agree far below that.
    theirs = lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    difference = same_walk(lambda p: Muon(p, lr=0.02, dtype=torch.bfloat16), theirs, shape, dtype=torch.float32)
    assert difference < 1e-6


def test_lion_follows_a_step_computed_by_hand():
    # lr 0.1, betas 0.9 and 0.5, decay 0.2; weight 1.0; gradients 2, then -1.
    # step 1: c = 0.1 * 2 = 0.2 -> +1;                w = 1.00 * (1 - 0.02) - 0.1 = 0.88;   m = 0.5 * 2 = 1
    # step 2: c = 0.9 * 1 + 0.1 * -1 = 0.8 -> +1;     w = 0.88 * 0.98 - 0.1 = 0.7624;       m = 0.5 * 1 - 0.5 = 0
    # step 3, gradient -1: c = -0.1 -> -1;            w = 0.7624 * 0.98 + 0.1 = 0.847152
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    lion = Lion([weight], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    for gradient, expected in ((2.0, 0.88), (-1.0, 0.7624), (-1.0, 0.847152)):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        lion.step()
        assert weight.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (20, 7), (7, 20)])
def test_orthogonalized_matrix_keeps_its_directions_and_loses_its_lengths(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalize(matrix, dtype=torch.float64) @ vh.T
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-9
    big = s > s[0] * 0.05
    assert inside.diagonal()[big].min() > 0.6 and inside.diagonal().max() < 1.25


def test_a_muon_update_is_as_long_as_adamws():
    weight = nn.Parameter(torch.zeros(96, 256))
    weight.grad = torch.randn(96, 256)
    Muon([weight], lr=1.0).step()
    assert 0.15 < weight.detach().square().mean().sqrt() < 0.25


@pytest.mark.parametrize("make", [lambda p: SGD(p, weight_decay=0.5), lambda p: AdamW(p, weight_decay=0.5),
                                  lambda p: Lion(p, weight_decay=0.5), lambda p: Muon(p, weight_decay=0.5)])
def test_a_weight_without_gradient_is_left_alone(make):
    weight = nn.Parameter(torch.ones(2, 2))
    make([weight]).step()
    assert torch.equal(weight, torch.ones(2, 2))


# --- groups ---

def test_matrices_decay_and_norms_biases_embeddings_do_not():
    decayed, others = ([name for name, _ in group["params"]] for group in parameter_groups(Tiny(), 0.1))
    assert decayed == ["blocks.0.weight", "blocks.2.weight"]
    assert others == ["embedding.weight", "positions.table", "blocks.0.bias", "blocks.3.weight", "blocks.3.bias"]


def test_an_untied_head_decays_and_frozen_parameters_are_left_out():
    model = Tiny(tied=False)
    model.blocks[0].weight.requires_grad_(False)
    assert [name for name, _ in parameter_groups(model, 0.1)[0]["params"]] == ["blocks.2.weight", "head.weight"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_trainable_parameter_stands_in_one_group(name, tied):
    model = Tiny(tied)
    held = [id(p) for g in make_optimizer(model, name).param_groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    optimizer = make_optimizer(Tiny(tied=False), "muon", learning_rate=0.01)
    assert type(optimizer.muon) is Muon and type(optimizer.adamw) is torch.optim.AdamW
    assert [g["param_names"] for g in optimizer.muon.param_groups] == [["blocks.0.weight", "blocks.2.weight"]]
    assert "head.weight" in optimizer.adamw.param_groups[0]["param_names"]
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}


def test_training_uses_pytorchs_own_and_fused():
    assert type(make_optimizer(Tiny(), "adamw")) is torch.optim.AdamW
    assert make_optimizer(Tiny(), "adamw").param_groups[0]["fused"]
    assert make_optimizer(Tiny(), "momentum", beta1=0.8).param_groups[0]["momentum"] == 0.8
    assert make_optimizer(Tiny(), "sgd").param_groups[0]["momentum"] == 0


@pytest.mark.parametrize("change, words", [({"name": "adam"}, "did you mean 'adamw'"), ({"learning_rate": -1.0}, "learning_rate is -1.0"),
                                           ({"beta2": 1.0}, "beta2 is 1.0"), ({"weight_decay": math.nan}, "weight_decay is nan")])
def test_bad_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words): make_optimizer(Tiny(), **change)


def test_nothing_to_train_and_nothing_for_muon_are_errors():
    with pytest.raises(ValueError, match="nothing to train"): make_optimizer(Tiny().requires_grad_(False))
    with pytest.raises(ValueError, match="choose adamw"): make_optimizer(nn.Linear(3, 3), "muon")


def test_muon_goes_from_pytorchs_to_ours_and_back():
    # A run begun on a GPU, with PyTorch's, goes on on a CPU, with ours: one state.
    model = Tiny()
    ours, matrices = make_optimizer(model, "muon"), parameter_groups(model, 0.1, matrices_of="blocks.")[0]
    theirs = MuonAdamW(torch.optim.Muon([matrices], 1e-3, adjust_lr_fn="match_rms_adamw"), make_optimizer(model, "muon").adamw)
    train(model, theirs, 2)
    restore_optimizer(ours, copy.deepcopy(theirs.state_dict()))
    restore_optimizer(theirs, copy.deepcopy(ours.state_dict()))
    weight = model.blocks[0].weight
    assert ours.muon.state[weight]["momentum_buffer"].equal(theirs.muon.state[weight]["momentum_buffer"])
    train(model, ours, 1, start=2); train(model, theirs, 1, start=3)


# --- the loop, the scaler and checkpoints treat all alike ---

@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    model = Tiny()
    optimizer = make_optimizer(model, name, learning_rate={"sgd": 0.3, "momentum": 0.1, "lion": 0.003}.get(name, 0.02))
    before = loss_of(model, 0).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
    assert loss_of(model, 0).item() < 0.6 * before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_continues_bit_for_bit(name):
    model = Tiny()
    optimizer = make_optimizer(model, name)
    train(model, optimizer, 5)
    twin = copy.deepcopy(model)
    resumed = make_optimizer(twin, name)
    restore_optimizer(resumed, copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 5, start=5); train(twin, resumed, 5, start=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_tensors_and_plain_values_only(name):
    model = Tiny()
    optimizer = make_optimizer(model, name)
    train(model, optimizer, 1)

    def check(tree):
        if isinstance(tree, dict): [check(v) for v in tree.values()]
        elif isinstance(tree, (list, tuple)): [check(v) for v in tree]
        else: assert tree is None or isinstance(tree, (torch.Tensor, bool, int, float, str)), tree
    check(optimizer.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_scaler_skips_the_step_that_overflowed(name):
    model = Tiny()
    optimizer, scaler = make_optimizer(model, name), torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
    scaler.scale(loss_of(model, 0)).backward()
    model.blocks[0].weight.grad[0, 0] = math.inf
    before = copy.deepcopy(model.state_dict())
    scaler.unscale_(optimizer); scaler.step(optimizer); scaler.update()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and scaler.get_scale() == 2.0 ** 9
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    gradient = model.blocks[0].weight.grad.clone()
    scaler.step(optimizer); scaler.update()
    assert not torch.equal(before["blocks.0.weight"], model.blocks[0].weight)
    model.load_state_dict(before)
    model.zero_grad()
    loss_of(model, 0).backward()
    assert torch.allclose(gradient, model.blocks[0].weight.grad, atol=1e-7)       # unscaled, in Muon's half too


def test_restoring_keeps_todays_settings():
    model = Tiny()
    old = make_optimizer(model, weight_decay=0.3)
    train(model, old, 2)
    new = make_optimizer(model, weight_decay=0.1, learning_rate=0.5)
    restore_optimizer(new, old.state_dict())
    assert [g["weight_decay"] for g in new.param_groups] == [0.1, 0.0] and new.param_groups[0]["lr"] == 0.5
    assert new.state_dict()["state"][0]["step"] == 2


def test_a_foreign_state_is_refused_and_changes_nothing():
    model = Tiny()
    states = {name: make_optimizer(model, name) for name in OPTIMIZERS}
    for optimizer in states.values(): train(model, optimizer, 1)
    for name, other in (("adamw", "lion"), ("lion", "adamw"), ("adamw", "muon"), ("muon", "adamw"), ("adamw", "sgd")):
        fresh = make_optimizer(model, name)
        with pytest.raises(ValueError, match="another kind"): restore_optimizer(fresh, states[other].state_dict())
        assert not fresh.state_dict().get("state")
    with pytest.raises(ValueError, match="other parameters"):
        restore_optimizer(make_optimizer(Tiny(tied=False)), states["adamw"].state_dict())
    bent = copy.deepcopy(states["muon"].state_dict())
    bent["adamw"]["state"][0]["exp_avg"] = torch.zeros(3)
    fresh = make_optimizer(model, "muon")
    with pytest.raises(ValueError, match="'embedding.weight' has the shape"): restore_optimizer(fresh, bent)
    assert not fresh.muon.state and isinstance(fresh, MuonAdamW)


# --- schedules and clipping ---

@given(name=st.sampled_from(SCHEDULES), steps=st.integers(1, 500), warmup=st.integers(0, 100), minimum=st.floats(0, 1),
       share=st.floats(0, 1))
def test_schedules_rise_once_then_never_again(name, steps, warmup, minimum, share):
    factors = [schedule(name, s, steps=steps, warmup_steps=warmup, minimum=minimum, cooldown_share=share) for s in range(steps + 5)]
    assert all(0 <= f <= 1 for f in factors)
    top = min(warmup, len(factors))
    assert factors[:top] == sorted(factors[:top])
    assert all(a >= b - 1e-12 for a, b in zip(factors[top:], factors[top + 1:]))
    no_way_down = name == "constant" or (name == "wsd" and round(share * steps) == 0)
    if warmup < steps: assert factors[warmup] == 1.0 and (no_way_down or factors[steps] == pytest.approx(minimum))


def test_schedules_by_hand():
    at = lambda name, step, **more: schedule(name, step, steps=100, **more)
    assert [at("cosine", s, warmup_steps=4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert at("cosine", 50) == pytest.approx(0.5) and at("cosine", 25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert at("linear", 30, minimum=0.1) == pytest.approx(0.1 + 0.9 * 0.7)
    assert [at("wsd", s, cooldown_share=0.2) for s in (0, 79, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.5, 0])
    assert at("constant", 99) == 1.0


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'cosine'"): schedule("cosin", 0, steps=10)


@pytest.mark.parametrize("maximum", [0.01, 1.0, 1e6])
def test_clipping_equals_torch(maximum):
    ours = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    for p in ours[:2]: p.grad = torch.randn_like(p)
    theirs = copy.deepcopy(ours)
    for a, b in zip(ours, theirs): b.grad = None if a.grad is None else a.grad.clone()
    norm = clip_gradients(ours, maximum)
    assert torch.allclose(norm, nn.utils.clip_grad_norm_(theirs, maximum))
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-6) for a, b in zip(ours[:2], theirs))
    assert ours[2].grad is None


def test_clipping_with_none_measures_only_and_tells_of_nan():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([weight], None) == 5 and weight.grad.tolist() == [3, 4]
    weight.grad = torch.tensor([math.nan, 1.0])
    assert clip_gradients([weight], 1.0).isnan()
    assert clip_gradients([nn.Parameter(torch.zeros(1))], 1.0) == 0
