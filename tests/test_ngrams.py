"""N-grams against dictionaries and pencil, probabilities that sum to one, counts found again by gradient, our autograd against torch's."""
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from minillm.ngrams import SMOOTHINGS, NGram, Traced, as_documents, count_levels, find, ladder, traced
from minillm.tales import TaleWorld
from minillm.tokenizer import BPETokenizer

each_smoothing = pytest.mark.parametrize("smoothing", SMOOTHINGS)


def random_documents(rng, vocab_size, n=30, longest=12):
    "Documents that begin and end with token 0 and have it nowhere else; later tokens of the vocabulary are never used."
    return [[0, *(rng.randint(1, vocab_size - 3) for _ in range(rng.randint(0, longest))), 0] for _ in range(n)]


class Dictionary:
    "The same models, slowly, in dictionaries, as the papers write them."
    def __init__(self, order, vocab_size, smoothing, documents):
        self.order, self.V, self.smoothing = order, vocab_size, smoothing
        self.counts, befores = defaultdict(Counter), defaultdict(set)
        for document in documents:
            for end in range(1, len(document)):
                for n in range(min(order, end + 1)):
                    self.counts[n, tuple(document[end - n:end])][document[end]] += 1
                    if end - n > 0: befores[tuple(document[end - n:end + 1])].add(document[end - n - 1])
        if smoothing == "kneser-ney":
            for (n, context), followers in self.counts.items():
                if n < order - 1:
                    for token in followers: followers[token] = len(befores[(*context, token)]) or followers[token]

    def share(self, context, token):
        p = 1 / self.V
        for n in range(min(self.order, len(context) + 1)):
            followers = self.counts.get((n, tuple(context[len(context) - n:])))
            if not followers: continue
            total, kinds, c = sum(followers.values()), len(followers), followers[token]
            p = (c + kinds * p) / (total + kinds) if self.smoothing == "witten-bell" else (max(c - 0.75, 0) + 0.75 * kinds * p) / total
        return p


@each_smoothing
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_formulas(smoothing, order):
    rng, V = random.Random(order), 8
    documents, unseen = random_documents(rng, V), [0, 7, 3, 3, 6, 1, 0]
    model, slow = NGram(order, V, smoothing).fit(documents), Dictionary(order, V, smoothing, documents)
    for document in [*random_documents(rng, V, n=5), unseen]:
        expected = [math.log(slow.share(document[:end], document[end])) for end in range(1, len(document))]
        assert np.allclose(model.log_probs([document]), expected, atol=1e-12, rtol=0)
        assert math.isclose(model.log_prob(document), sum(expected))
        assert np.allclose([math.log(model.next(document[:end])[document[end]]) for end in range(1, len(document))], expected, atol=1e-12)


@each_smoothing
@pytest.mark.parametrize("order", [1, 2, 4])
def test_each_distribution_sums_to_one_after_any_context(smoothing, order):
    rng, V = random.Random(0), 9
    model = NGram(order, V, smoothing).fit(random_documents(rng, V))
    for _ in range(200):
        context = [rng.randrange(V) for _ in range(rng.randint(0, 6))]
        shares = model.next(context)
        assert math.isclose(shares.sum(), 1, abs_tol=1e-12) and shares.min() > 0, context


def test_witten_bell_by_hand():
    "a b a b a c: a was followed by b twice and c once; b by a twice. V = 4, and d was never seen."
    model = NGram(2, 4).fit([0, 1, 0, 1, 0, 2])
    unigram = [(2 + 3 / 4) / 8, (2 + 3 / 4) / 8, (1 + 3 / 4) / 8, (0 + 3 / 4) / 8]      # five targets, of three kinds
    assert np.allclose(model.shorter(1).next([]), unigram)
    assert np.allclose(model.next([0]), [2 * unigram[0] / 5, (2 + 2 * unigram[1]) / 5, (1 + 2 * unigram[2]) / 5, 2 * unigram[3] / 5])
    assert np.allclose(model.next([3]), unigram)                                       # nothing is known after d
    assert math.isclose(model.cross_entropy([0, 1, 0]), -(math.log(model.next([0])[1]) + math.log(model.next([1])[0])) / 2)


def test_kneser_ney_counts_company_not_occurrences():
    "Token 5 is frequent but follows only 4; token 6 is rarer and follows three others. After an unknown context 6 is likelier."
    documents = [[0, 4, 5, 0]] * 5 + [[0, 1, 6, 0], [0, 2, 6, 0], [0, 3, 6, 0]]
    after_unknown = {s: NGram(2, 9, s).fit(documents).next([8]) for s in SMOOTHINGS}
    assert after_unknown["kneser-ney"][6] > after_unknown["kneser-ney"][5]
    assert after_unknown["witten-bell"][6] < after_unknown["witten-bell"][5]


@each_smoothing
def test_no_ngram_reaches_over_the_edge_of_a_document(smoothing):
    documents = random_documents(random.Random(1), 8)
    here, there = (NGram(4, 8, smoothing).fit(order) for order in (documents, documents[::-1]))
    held_out = random_documents(random.Random(2), 8)
    assert np.allclose(here.log_probs(held_out), there.log_probs(held_out))
    assert len(here.log_probs(held_out)) == sum(len(document) - 1 for document in held_out)


@each_smoothing
def test_a_shorter_model_is_the_one_fitted_at_that_order(smoothing):
    documents, held_out = random_documents(random.Random(3), 8), random_documents(random.Random(4), 8)
    model = NGram(5, 8, smoothing).fit(documents)
    for order in range(1, 6):
        assert np.array_equal(model.shorter(order).log_probs(held_out), NGram(order, 8, smoothing).fit(documents).log_probs(held_out))


def test_levels_hold_every_ngram_once_with_its_count():
    tokens, first = as_documents([[0, 1, 2, 1, 2, 0], [0, 1, 2, 0]], 4)
    levels, _ = count_levels(tokens, first, 3, 4)
    assert levels[0].counts.tolist() == [2, 3, 3, 0]
    assert dict(zip(levels[1].keys.tolist(), levels[1].counts.tolist())) == {0 * 4 + 1: 2, 1 * 4 + 2: 3, 2 * 4 + 0: 2, 2 * 4 + 1: 1}
    assert [int(find(levels[1].keys, np.array([key]))[0]) for key in (1, 6, 3)] == [0, 1, -1]
    assert levels[2].counts.sum() == 6 and levels[1].totals.tolist() == [2, 3, 3, 0] and levels[1].kinds.tolist() == [1, 1, 2, 0]


def test_generation_ends_with_the_end_token_and_repeats_with_its_seed():
    model = NGram(3, 8).fit(random_documents(random.Random(5), 8))
    ids = model.generate([0], 500, eos_id=0, seed=3)
    assert ids == model.generate([0], 500, eos_id=0, seed=3) and ids[0] == ids[-1] == 0 and 0 not in ids[1:-1]
    assert len(model.generate([0], 4)) == 5


def test_on_tales_each_order_costs_less_and_none_less_than_the_floor():
    world, held_out = TaleWorld("short"), TaleWorld("short", seed=1)
    train, texts = [tale.text for tale in world.tales(1500)], [tale.text for tale in held_out.tales(100)]
    tokenizer = BPETokenizer.train(train, 1024, pattern="tales")
    documents, unseen = ([[tokenizer.eos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(these)] for these in (train, texts))
    model = NGram(4, tokenizer.vocab_size).fit(documents)
    steps = ladder(documents, unseen, tokenizer.vocab_size, orders=(1, 2, 3, 4))
    assert list(steps) == ["uniform", "unigram", "bigram", "trigram", "4-gram"]
    assert math.isclose(steps["uniform"], math.log(tokenizer.vocab_size) * sum(len(ids) - 1 for ids in unseen) / len(unseen))
    uniform, *cost = steps.values()
    assert math.isclose(cost[-1], -model.log_probs(unseen).sum() / len(unseen))
    floor = -sum(map(world.log_prob, texts)) / len(texts)
    assert cost == sorted(cost, reverse=True) and uniform > cost[0] > 4 * cost[2] and cost[-1] > floor


def test_the_bigram_found_by_gradient_is_the_counted_one():
    rng, V = random.Random(6), 6
    pairs = np.zeros((V, V))
    for document in random_documents(rng, V, n=200):
        for a, b in zip(document, document[1:]): pairs[a, b] += 1
    pairs = torch.tensor(pairs[:V - 2, :V - 2])
    shares = pairs / pairs.sum(1, keepdim=True)
    weights = torch.zeros_like(shares, requires_grad=True)
    for _ in range(3000):
        loss = -(shares * weights.log_softmax(1)).sum()
        weights.grad = None
        loss.backward()
        weights.data -= 2 * weights.grad
    assert torch.allclose(weights.softmax(1), shares, atol=1e-3)
    entropy = -(shares * shares.log().nan_to_num(neginf=0)).sum()
    assert 0 <= loss.item() - entropy.item() < 2e-3


def random_expression(rng, leaves, sums, powers, log):
    "A number made of `leaves`, matrices (3, 3), a row (3) and a number, in some random way that stays finite."
    pool = list(leaves)
    for _ in range(rng.randint(3, 9)):
        a, b = rng.choice(pool), rng.choice(pool)
        match rng.randrange(6):
            case 0: new = a + b
            case 1: new = a - b
            case 2: new = a * b
            case 3: new = rng.choice(leaves[:2]) @ rng.choice(leaves[:2])
            case 4: new = sums(a * 0.5, rng.choice([None, *range(len(a.data.shape))]))
            case _: new = log(powers(a * 0.1) + 1.0)
        pool.append(new)
    return sums(pool[-1] * pool[-2], None)


@pytest.mark.parametrize("seed", range(60))
def test_our_gradients_are_torchs(seed):
    numbers = np.random.default_rng(seed)
    values = [numbers.normal(size=(3, 3)), numbers.normal(size=(3, 3)), numbers.normal(size=3), numbers.normal(size=())]
    ours, theirs = [Traced(v) for v in values], [torch.tensor(v, requires_grad=True) for v in values]
    result = random_expression(random.Random(seed), ours, Traced.sum, Traced.exp, Traced.log)
    keep = lambda x, axis: x.sum().reshape([1] * x.ndim) if axis is None else x.sum(axis, keepdim=True)
    expected = random_expression(random.Random(seed), theirs, keep, torch.exp, torch.log)
    assert np.allclose(result.data, expected.detach())
    result.backward()
    expected.sum().backward()
    for our, their in zip(ours, theirs):
        assert np.allclose(our.grad, 0 if their.grad is None else their.grad, rtol=1e-9, atol=1e-9)


def test_gradients_add_up_over_calls_and_over_uses():
    x = Traced(3.0)
    (x * x + x * 2.0).backward()
    assert x.grad == 8.0
    (x * 1.0).backward()
    assert x.grad == 9.0 and traced(x) is x


def test_wrong_input_is_an_error_that_helps():
    with pytest.raises(ValueError, match="vocab_size = 4 allows 0 to 3"): NGram(2, 4).fit([0, 1, 4])
    with pytest.raises(ValueError, match="nothing to predict"): NGram(2, 4).fit([[0], [1]])
    with pytest.raises(ValueError, match="nothing to predict"): NGram(2, 4).fit([])
    with pytest.raises(ValueError, match="witten-bell"): NGram(2, 4, "add-one")
    with pytest.raises(ValueError, match="at least 1"): NGram(0, 4)
    with pytest.raises(ValueError, match="from 1 to 2"): NGram(2, 4).fit([0, 1]).shorter(3)
    with pytest.raises(ValueError, match="fit"): NGram(2, 4).next([0])
