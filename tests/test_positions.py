"""Positions against their formulas by hand, and against transformers."""
import math

import pytest
import torch

from minillm.positions import (
    ALiBi,
    LearnedPositions,
    RotaryPositions,
    SinusoidalPositions,
    alibi_slopes,
    rotary_frequencies,
    rotate_halves,
    rotate_pairs,
)

LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_context_length": 8192}
LINEAR = {"kind": "linear", "factor": 4.0}


def test_sinusoids_by_hand():
    vectors = SinusoidalPositions(None, 6)(torch.tensor([0, 3]))
    assert vectors[0].tolist() == [0, 1, 0, 1, 0, 1]
    expected = [f(3 / 10000 ** (i / 6)) for i in (0, 2, 4) for f in (math.sin, math.cos)]
    torch.testing.assert_close(vectors[1], torch.tensor(expected))
    assert SinusoidalPositions(None, 6)(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 6)


def test_a_sinusoid_shifted_is_a_turn_that_depends_on_the_shift_only():
    vectors = SinusoidalPositions(None, 8)(torch.arange(50)).double()
    products = vectors @ vectors.T
    for shift in (1, 7): assert products.diagonal(shift).std() < 1e-5


def test_learned_positions_are_rows_of_a_table():
    learned = LearnedPositions(8, 4)
    torch.testing.assert_close(learned(torch.tensor([[3, 0]])), learned.table.weight[[3, 0]][None])
    assert [name for name, _ in learned.named_parameters()] == ["table.weight"]


@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
def test_past_the_context_is_an_error_and_padding_counts_as_zero(kind):
    positions = kind(8, 4)
    torch.testing.assert_close(positions(torch.tensor([-2, -1, 7])), positions(torch.tensor([0, 0, 7])))
    with pytest.raises(ValueError, match="position 8 is not below context_length = 8"): positions(torch.arange(9))


def test_odd_sizes_are_errors():
    with pytest.raises(ValueError, match="head_dim = 7 must be even"): RotaryPositions(7)
    with pytest.raises(ValueError, match="d_model = 7 must be even"): SinusoidalPositions(8, 7)


def test_rotation_by_hand():
    x, quarter = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([math.pi / 2, 0.0])
    torch.testing.assert_close(rotate_pairs(x, quarter.cos(), quarter.sin()), torch.tensor([0.0, 1.0, 0.0, 2.0]))
    x = torch.tensor([1.0, 0.0, 0.0, 2.0])                                        # planes (0, 2) and (1, 3)
    torch.testing.assert_close(rotate_halves(x, quarter.cos(), quarter.sin()), torch.tensor([0.0, 0.0, 1.0, 2.0]))


def test_pairs_and_halves_are_equal_after_a_permutation():
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    turned = rotate_pairs(x, angles.cos(), angles.sin())[..., order]
    torch.testing.assert_close(turned, rotate_halves(x[..., order], angles.cos(), angles.sin()))


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
def test_scores_depend_on_distance_only_and_lengths_stay(scaling):
    rotate = RotaryPositions(16, scaling=scaling)
    q, k = torch.randn(2, 1, 1, 1, 16)
    q, k = (x.expand(1, 1, 40, 16) for x in (q, k))
    scores = (rotate(q, torch.arange(40)) @ rotate(k, torch.arange(40)).transpose(-2, -1))[0, 0]
    for distance in (0, 1, 9, -9): assert scores.diagonal(distance).std() < 1e-5
    moved = (rotate(q, torch.arange(1000, 1040)) @ rotate(k, torch.arange(1000, 1040)).transpose(-2, -1))[0, 0]
    torch.testing.assert_close(moved, scores, rtol=0, atol=2e-3)                   # float32 angles near 1,000 radians
    torch.testing.assert_close(rotate(q, torch.arange(40)).norm(dim=-1), q.norm(dim=-1))


def test_rows_of_a_batch_may_stand_elsewhere():
    rotate, x = RotaryPositions(8), torch.randn(2, 3, 5, 8)
    both = rotate(x, torch.stack([torch.arange(5), torch.arange(-2, 3)]))
    torch.testing.assert_close(both[0], rotate(x[:1], torch.arange(5))[0])
    torch.testing.assert_close(both[1, :, 2:], rotate(x[1:, :, 2:], torch.arange(3))[0])


def test_angles_worked_out_once_are_the_same():
    rotate, x, positions = RotaryPositions(8, theta=500.0), torch.randn(2, 3, 5, 8), torch.arange(5)
    assert torch.equal(rotate.at(positions)(x, positions), rotate(x, positions))


def test_half_precision_models_still_turn_by_exact_angles():
    rotate = RotaryPositions(8).to(torch.bfloat16)
    assert not list(rotate.parameters()) and not list(rotate.buffers())
    near, far = rotate.angles(torch.tensor([4096])), rotate.angles(torch.tensor([4097]))
    assert near[0].dtype == torch.float32 and not torch.equal(near[0], far[0])
    assert rotate(torch.randn(1, 1, 1, 8, dtype=torch.bfloat16), torch.tensor([4097])).dtype == torch.bfloat16


@pytest.mark.parametrize("scaling, theta", [(None, 1e4), (None, 5e5), (LINEAR, 1e4), (LLAMA3, 5e5),
                                            (LLAMA3 | {"factor": 32.0}, 5e5)])
def test_frequencies_are_transformers(scaling, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        names = {"kind": "rope_type", "original_context_length": "original_max_position_embeddings"}
        rope |= {names.get(key, key): value for key, value in scaling.items()}
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64,
                                                           rope_parameters=rope))
    torch.testing.assert_close(rotary_frequencies(64, theta, scaling), theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 100, 8191])
    cos, sin = RotaryPositions(64, theta, scaling).angles(positions)
    their_cos, their_sin = theirs(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos[0], their_cos[0, :, :32], rtol=0, atol=1e-3)     # 8,191 radians in float32
    torch.testing.assert_close(sin[0], their_sin[0, :, :32], rtol=0, atol=1e-3)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    q, k = torch.randn(2, 1, 4, 4, 64)
    for ours, expected in zip((q, k), apply_rotary_pos_emb(q, k, their_cos, their_sin)):
        torch.testing.assert_close(RotaryPositions(64, theta, scaling)(ours, positions), expected, rtol=0, atol=5e-3)


def test_llama3_scaling_keeps_the_fast_and_divides_the_slow():
    plain, scaled = rotary_frequencies(128, 500000.0), rotary_frequencies(128, 500000.0, LLAMA3)
    ratio = plain / scaled
    turns = 8192 * plain / (2 * math.pi)
    assert (ratio[turns > 4] == 1).all() and torch.allclose(ratio[turns < 1], torch.tensor(8.0))
    assert (ratio.diff() > -1e-4).all() and ((ratio > 1.01) & (ratio < 7.9)).any()


@pytest.mark.parametrize("scaling", [{}, {"kind": "yarn"}, {"kind": "linear"}, LINEAR | {"low": 1.0}])
def test_an_unknown_scaling_is_an_error(scaling):
    with pytest.raises(ValueError, match="the keys of that kind"): RotaryPositions(8, scaling=scaling)


def slopes_of_the_paper(n):
    "As the authors' code has them, by recursion."
    if math.log2(n).is_integer(): return [2 ** (-8 * (i + 1) / n) for i in range(n)]
    lower = 2 ** math.floor(math.log2(n))
    return slopes_of_the_paper(lower) + slopes_of_the_paper(2 * lower)[0::2][:n - lower]


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0 ** -i for i in range(1, 9)]
    for n in range(1, 41): torch.testing.assert_close(alibi_slopes(n), torch.tensor(slopes_of_the_paper(n)))


def test_alibi_by_hand():
    bias = ALiBi(2)(torch.tensor([1, 2]), torch.tensor([0, 1, 2]))
    assert bias.tolist() == [[[-s, 0, -s], [-2 * s, -s, 0]] for s in (2 ** -4, 2 ** -8)]
    assert ALiBi(2)(torch.zeros(3, 1), torch.zeros(3, 5)).shape == (3, 2, 1, 5)
