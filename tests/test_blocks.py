"""Blocks: norms and networks against torch and their formulas, residual lines by hand, experts against a loop."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minillm.blocks import (
    ACTIVATIONS,
    MLP,
    Block,
    LayerNorm,
    MixtureOfExperts,
    PostNormBlock,
    RMSNorm,
    SwiGLU,
    load_balance,
)

class Branch(nn.Module):
    "Stands for attention: a linear map that notes what it was called with."
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x, rotate=None, bias=None, cache=None):
        self.called_with = rotate, bias, cache
        return self.linear(x)


def shaken(module: nn.Module) -> nn.Module:
    "The module with all its parameters moved away from 0 and 1."
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn_like(p) * 0.3)
    return module


@pytest.mark.parametrize("ours, theirs", [
    (LayerNorm(24, 1e-5), nn.LayerNorm(24, 1e-5)), (LayerNorm(24, 1e-3, bias=False),
                                                    nn.LayerNorm(24, 1e-3, bias=False)),
    (RMSNorm(24, 1e-6), nn.RMSNorm(24, 1e-6))], ids=["layernorm", "no bias", "rmsnorm"])
def test_norms_equal_those_of_torch_with_the_same_state_and_gradients(ours, theirs):
    theirs.load_state_dict(shaken(ours).state_dict())
    x = torch.randn(3, 5, 24, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    assert torch.equal(ours(x), theirs(y)) and torch.equal(x.grad, y.grad)
    for p, q in zip(ours.parameters(), theirs.parameters()): assert torch.equal(p.grad, q.grad)


def test_norms_equal_their_formulas_with_eps_under_the_root():
    x = torch.randn(4, 24, dtype=torch.float64) * 1e-2
    layer, rms = shaken(LayerNorm(24, 1e-3).double()), shaken(RMSNorm(24, 1e-3).double())
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.weight + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert torch.allclose(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * rms.weight, atol=1e-12)


def test_rms_of_bfloat16_is_taken_in_float32():
    x = (torch.randn(8, 512) * 30).bfloat16()
    exact = RMSNorm(512)(x.float())
    assert (RMSNorm(512).bfloat16()(x).float() - exact).abs().max() < 2 ** -8 * exact.abs().max()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_formulas(name):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    by_hand = {"relu": x.clamp(min=0), "gelu": x * 0.5 * (1 + torch.erf(x / 2 ** 0.5)), "silu": x / (1 + (-x).exp()),
               "gelu_tanh": 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))}
    assert torch.allclose(ACTIVATIONS[name](x), by_hand[name], atol=1e-12)


def test_networks_equal_their_formulas():
    x = torch.randn(2, 3, 8)
    mlp, gated = MLP(8, 20, "gelu_tanh"), SwiGLU(8, 20)
    up = x @ mlp.up.weight.T + mlp.up.bias
    assert torch.allclose(mlp(x), F.gelu(up, approximate="tanh") @ mlp.down.weight.T + mlp.down.bias, atol=1e-6)
    gate = x @ gated.gate.weight.T
    assert torch.allclose(gated(x), (gate * gate.sigmoid() * (x @ gated.up.weight.T)) @ gated.down.weight.T, atol=1e-6)
    assert {n for n, _ in gated.named_parameters()} == {"gate.weight", "up.weight", "down.weight"}
    with pytest.raises(ValueError, match="one of relu, gelu, gelu_tanh, silu; got 'gelo'"): MLP(8, 20, "gelo")


def make(kind, dropout=0.0):
    return kind(Branch(8), MLP(8, 16), shaken(LayerNorm(8)), shaken(LayerNorm(8)), dropout=dropout)


def test_pre_norm_leaves_the_stream_alone_and_post_norm_normalises_it():
    x = torch.randn(2, 3, 8)
    pre, post = make(Block), make(PostNormBlock)
    middle = x + pre.attention(pre.attention_norm(x))
    assert torch.equal(pre(x), middle + pre.mlp(pre.mlp_norm(middle)))
    middle = post.attention_norm(x + post.attention(x))
    assert torch.equal(post(x), post.mlp_norm(middle + post.mlp(middle)))


@pytest.mark.parametrize("kind", [Block, PostNormBlock])
def test_a_block_hands_positions_and_cache_to_its_attention(kind):
    block = make(kind)
    block(torch.randn(2, 3, 8), "rotate", "bias", "cache")
    assert block.attention.called_with == ("rotate", "bias", "cache")


def test_dropout_falls_on_both_branches_and_never_on_the_stream():
    block, x = make(Block, dropout=0.5), torch.randn(40, 50, 8)
    for silent, loud in [("attention.linear", "mlp.down"), ("mlp.down", "attention.linear")]:
        for name in (silent, loud):
            linear = block.get_submodule(name)
            nn.init.zeros_(linear.weight), nn.init.constant_(linear.bias, float(name == loud))
        added = (block.train()(x) - x).round(decimals=3)
        assert set(added.unique().tolist()) == {0.0, 2.0}, "half of what a branch adds is dropped, the rest doubled"
        assert abs((added == 0).float().mean() - 0.5) < 0.02
        assert torch.allclose(block.eval()(x), x + 1)


def experts(n_experts=5, n_active=2):
    return MixtureOfExperts(8, n_experts, n_active, lambda: SwiGLU(8, 12))


def test_experts_equal_a_loop_over_tokens():
    moe, x = experts(), torch.randn(3, 7, 8)
    expected = torch.empty_like(x)
    for row in range(3):
        for t in range(7):
            scores = moe.router(x[row, t])
            best = sorted(range(5), key=lambda e: -scores[e])[:2]
            shares = torch.stack([scores[e] for e in best]).softmax(0)
            expected[row, t] = sum(share * moe.experts[e](x[row, t]) for share, e in zip(shares, best))
    assert torch.allclose(moe(x), expected, atol=1e-6)


def test_the_router_learns_with_one_active_expert_too():
    for n_active in (1, 2):
        moe, x = experts(4, n_active), torch.randn(6, 8)
        moe(x).square().sum().backward()
        assert moe.router.weight.grad.abs().max() > 0
    best = moe.router(x).softmax(-1).max(-1)
    moe.n_active = 1
    expected = torch.stack([p * moe.experts[e](token) for p, e, token in zip(*best, x)])
    assert torch.allclose(moe(x), expected, atol=1e-6), "one alone counts by its probability, as in Fedus et al. 2021"


def test_one_expert_is_the_plain_network_and_all_active_a_full_mixture():
    x = torch.randn(4, 8)
    one, every = experts(1, 1), experts(3, 3)
    assert torch.allclose(one(x), one.experts[0](x), atol=1e-7)
    shares = every.router(x).softmax(-1)
    assert torch.allclose(every(x), sum(shares[:, e:e + 1] * every.experts[e](x) for e in range(3)), atol=1e-6)


def test_an_expert_that_nobody_chose_gets_a_gradient_of_zero_and_not_none():
    moe = experts(4, 1)
    with torch.no_grad(): moe.router.weight.copy_(torch.tensor([9.0, 0, 0, 0])[:, None].expand(4, 8))
    moe(torch.rand(6, 8)).sum().backward()
    used, unused = (moe.experts[e].down.weight.grad.abs().sum() for e in (0, 1))
    assert used > 0 and unused == 0


@pytest.mark.parametrize("n_experts, n_active", [(4, 5), (4, 0)])
def test_impossible_numbers_of_experts_are_errors(n_experts, n_active):
    with pytest.raises(ValueError, match=f"n_active = {n_active}.*n_experts = 4"): experts(n_experts, n_active)


def test_load_balance_is_one_for_even_routers_and_experts_over_active_for_the_worst():
    even = torch.eye(4).repeat(10, 1) * 1e-4
    assert abs(load_balance(even, 1) - 1) < 1e-3
    worst = torch.tensor([20.0, 20.0, -20.0, -20.0]).repeat(10, 1)
    assert abs(load_balance(worst, 2) - 2) < 1e-3
    by_hand = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])   # two of three tokens go to expert 0
    share = by_hand.softmax(-1).mean(0)
    assert torch.allclose(load_balance(by_hand, 1), 2 * (2 / 3 * share[0] + 1 / 3 * share[1]))


def test_load_balance_pulls_scores_of_crowded_experts_down():
    scores = torch.tensor([[2.0, 1.0, 0.0]] * 5, requires_grad=True)
    load_balance(scores, 1).backward()
    assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 2] < 0).all()
