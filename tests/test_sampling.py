"""Sampling against transformers' processors, against itself one text at a time, and by probabilities instead of draws."""
import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch

from minillm.model import MiniLLM, ModelConfig
from minillm.sampling import (
    Chat,
    Continuation,
    GenerationConfig,
    Generator,
    TextStream,
    beam_search,
    draw_tokens,
    generate_ids,
    judge,
    land,
    left_pad,
    min_p,
    repetition_penalty,
    speculative,
    temperature,
    throw,
    top_k,
    top_p,
)
from minillm.tokenizer import BPETokenizer

FREE = GenerationConfig(max_new_tokens=20, top_k=None, top_p=1.0, seed=5)      # the model's own distribution
GREEDY = GenerationConfig(max_new_tokens=20, temperature=0.0)
TINY = ModelConfig(vocab_size=3, context_length=8, d_model=8, n_layers=1, n_heads=2, d_ff=16)


def make(config: ModelConfig, seed: int = 0, scale: float = 8.0) -> MiniLLM:
    "A random model with opinions: at its initialisation all tokens are about as likely."
    torch.manual_seed(seed)
    model = MiniLLM(config).eval()
    for weight in model.parameters(): weight.requires_grad_(False).mul_(scale if weight.ndim > 1 else 1)
    return model


def small(**changes) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 300, "context_length": 40, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, **changes})


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["Zoë saw a 🦊 fox. A fox saw Zoë! The end.", "naïve café 日本語 " * 3], 290)


@pytest.fixture
def generator(tokenizer):
    return Generator(make(small(vocab_size=290)), tokenizer)


# the processors

@pytest.mark.parametrize("ours, name, setting", [
    *[(temperature, "TemperatureLogitsWarper", t) for t in (0.3, 1.7)],
    *[(top_k, "TopKLogitsWarper", k) for k in (1, 5, 99, 1000)],
    *[(top_p, "TopPLogitsWarper", p) for p in (0.01, 0.3, 0.9, 0.999)],
    *[(min_p, "MinPLogitsWarper", p) for p in (0.0, 0.02, 0.5, 1.0)],
    *[(repetition_penalty, "RepetitionPenaltyLogitsProcessor", p) for p in (0.7, 1.3)]])
def test_processors_are_those_of_transformers(ours, name, setting):
    theirs = getattr(pytest.importorskip("transformers"), name)(setting)
    for seed in range(20):
        dice = torch.Generator().manual_seed(seed)
        logits, ids = 4 * torch.randn(3, 100, generator=dice), torch.randint(0, 100, (3, 30), generator=dice)
        assert torch.equal(ours(setting)(logits, ids), theirs(ids, logits.clone()))


def test_no_truncation_ever_removes_the_likeliest_token():
    logits = torch.stack([torch.zeros(50), torch.arange(50.0), torch.eye(50)[7] * 200])
    for process in (top_k(1), top_p(1e-9), min_p(1.0)):
        kept = process(logits, torch.zeros(3, 0, dtype=torch.int64)).isfinite()
        assert kept[torch.arange(3), logits.argmax(-1)].all()


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]])[:, [2, 0, 3, 1]].log()
    for p, kept in [(0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.96, [0, 1, 2, 3])]:
        assert top_p(p)(logits, logits)[0].isfinite().nonzero().flatten().tolist() == kept


def test_the_penalty_does_not_count_padding_as_token_zero():
    logits = torch.ones(2, 4)
    changed = repetition_penalty(2.0)(logits, torch.tensor([[-1, -1, 3], [-1, 0, 3]])) != logits
    assert changed.tolist() == [[False, False, False, True], [True, False, False, True]]


# drawing

def test_a_dart_never_lands_on_a_token_of_probability_zero():
    "Zeros before, between and behind; darts at 0, on every edge, and as near to 1 as they come."
    dice = torch.Generator().manual_seed(0)
    last = 1 - 2.0**-53
    for trial in range(300):
        logits = 5 * torch.randn(1, 40, generator=dice)
        logits[0, torch.rand(40, generator=dice) < 0.7] = -torch.inf
        logits[0, trial % 40] = 0.0
        edges = logits.double().softmax(-1).cumsum(-1)[0]
        darts = torch.cat([torch.tensor([0.0, last, torch.finfo(torch.float64).tiny], dtype=torch.float64), (edges / edges[-1]).clamp(max=last)])
        drawn = draw_tokens(logits.expand(len(darts), -1), darts)
        assert logits[0, drawn].isfinite().all()


def test_the_share_of_the_line_that_a_token_owns_is_its_probability():
    "By bisection on the dart, no draws: where the drawn token changes must be an edge of the exact distribution."
    logits = torch.tensor([[0.1, -torch.inf, 1.3, -2.0, 0.7]])
    owned, low = Counter(), 0.0
    while low < 1:
        token = int(draw_tokens(logits, torch.tensor([low], dtype=torch.float64)))
        inside, outside = low, 1.0
        while outside - inside > 1e-12:
            middle = (inside + outside) / 2
            if int(draw_tokens(logits, torch.tensor([middle], dtype=torch.float64))) == token: inside = middle
            else: outside = middle
        owned[token] += outside - low
        low = outside if outside < 1 else 1.0
    for token, probability in enumerate(logits.double().softmax(-1)[0].tolist()):
        assert owned[token] == pytest.approx(probability, abs=1e-9)


@pytest.mark.parametrize("logits", [[math.nan, 0.0], [-math.inf, -math.inf], [math.inf, 0.0]])
@pytest.mark.parametrize("dart", [None, torch.zeros(1)])
def test_logits_that_allow_nothing_are_an_error(logits, dart):
    with pytest.raises(ValueError, match="check the model's weights and the processors"):
        draw_tokens(torch.tensor([logits]), dart)
    with pytest.raises(ValueError, match="all weights are 0"): land(torch.zeros(1, 3), torch.zeros(1))


def test_darts_depend_on_seed_plus_row_alone():
    darts = throw(3, 50, seed=7)
    for row in range(3): assert torch.equal(throw(1, 50, seed=7 + row)[0], darts[row])
    assert not torch.equal(throw(1, 5), throw(1, 5))


# many texts at once

POSITIONS = [{}, {"position": "learned"}, {"position": "alibi"}, {"window": 6, "sinks": 1}, {"window": 5, "n_kv_heads": 2},
             {"n_experts": 4, "n_active_experts": 2}]


@pytest.mark.parametrize("config", [GREEDY, FREE, GenerationConfig(seed=3, max_new_tokens=25, repetition_penalty=1.3)],
                         ids=["greedy", "sampled", "penalty"])
@pytest.mark.parametrize("changes", POSITIONS, ids=str)
def test_a_batch_of_unequal_prompts_gives_what_single_prompts_give(changes, config):
    "Up to the context's end, which each text reaches at its own time; texts that end leave the batch."
    import dataclasses
    model = make(small(**changes))
    prompts = [torch.randint(1, 300, (n,)).tolist() for n in (1, 30, 7, 39, 12)]
    free = generate_ids(model, prompts, config)
    eos_id = free[2].ids[3]                           # something that does occur early in one of them
    for end in (None, eos_id):
        together = generate_ids(model, prompts, config, eos_id=end)
        for i, (prompt, found) in enumerate(zip(prompts, together)):
            seed = None if config.seed is None else config.seed + i
            alone = generate_ids(model, [prompt], dataclasses.replace(config, seed=seed), eos_id=end)[0]
            assert found.ids == alone.ids
            torch.testing.assert_close(torch.tensor(found.log_probs), torch.tensor(alone.log_probs), atol=1e-4, rtol=1e-3)
            room = math.inf if model.config.max_length is None else 40 - len(prompt)
            assert len(found.ids) == min(config.max_new_tokens, room) or found.ids[-1] == end
            if end in found.ids: assert found.ids.index(end) == len(found.ids) - 1


def test_log_probabilities_are_the_models_own_in_a_full_forward():
    "Before temperature, truncation and penalty, and whatever those were."
    model, prompts = make(small()), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    for config in (FREE, GREEDY, GenerationConfig(temperature=0.5, repetition_penalty=1.5, seed=1)):
        for prompt, found in zip(prompts, generate_ids(model, prompts, config)):
            ids = torch.tensor([prompt + found.ids])
            full = model(ids)[0, len(prompt) - 1:-1].log_softmax(-1)
            full = full[torch.arange(len(found.ids)), torch.tensor(found.ids)]
            torch.testing.assert_close(torch.tensor(found.log_probs), full, atol=1e-4, rtol=1e-4)


def test_greedy_is_the_argmax_of_a_full_forward_at_each_step():
    model, ids = make(small()), [9, 8, 7]
    found = generate_ids(model, [ids], GREEDY)[0].ids
    for token in found:
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids = [*ids, token]
    assert generate_ids(model, [[9, 8, 7]], GenerationConfig(max_new_tokens=20, top_k=1, seed=0))[0].ids == found


def test_each_pair_of_tokens_owns_its_share_of_the_square_of_darts(monkeypatch):
    "Just inside the four corners of a pair's cell, whose area is the pair's probability, generation gives the pair."
    model, config = make(TINY), GenerationConfig(max_new_tokens=2, top_k=None, top_p=1.0)
    edges = lambda ids: torch.nn.functional.pad(model(torch.tensor([ids]))[0, -1].double().softmax(-1).cumsum(-1), (1, 0)).tolist()
    first, area = edges([1]), 0.0
    for a in range(3):
        second = edges([1, a])
        for b in range(3):
            area += (first[a + 1] - first[a]) * (second[b + 1] - second[b])
            for darts in itertools.product((first[a] + 1e-6, first[a + 1] - 1e-6), (second[b] + 1e-6, second[b + 1] - 1e-6)):
                monkeypatch.setattr("minillm.sampling.throw", lambda *_, darts=darts: torch.tensor([darts], dtype=torch.float64))
                assert generate_ids(model, [[1]], config)[0].ids == [a, b]
    assert area == pytest.approx(1)


def test_a_model_in_training_is_sampled_without_dropout_and_stays_in_training():
    model = make(small(dropout=0.5))
    quiet = generate_ids(model, [[1, 2]], FREE)
    model.train()
    assert generate_ids(model, [[1, 2]], FREE) == quiet and model.training
    assert beam_search(model, [1, 2], 2, 5) == beam_search(model.eval(), [1, 2], 2, 5)


def test_no_prompts_give_no_texts(generator):
    assert generate_ids(generator.model, []) == [] and generator.generate([]) == []


@pytest.mark.parametrize("prompt, message", [([], "prompt 1 is empty"), ([1] * 40, "prompt 1 has 40 tokens .* 39 or fewer")])
def test_a_prompt_that_cannot_be_continued_is_an_error(prompt, message):
    with pytest.raises(ValueError, match=message): generate_ids(make(small()), [[1], prompt])


def test_processors_of_ones_own_come_last_and_see_the_text_so_far():
    seen = []
    def only_even(logits, ids):
        seen.append(ids.shape)
        return logits.masked_fill(torch.arange(logits.shape[-1]) % 2 == 1, -torch.inf)
    found = generate_ids(make(small()), [[1, 1], [1]], GenerationConfig(max_new_tokens=3, top_k=None, top_p=1, seed=0), processors=[only_even])
    assert all(token % 2 == 0 for c in found for token in c.ids)
    assert seen == [(2, 2), (2, 3), (2, 4)]


def test_left_pad_marks_pads():
    assert left_pad([[1, 2], [3]]).tolist() == [[1, 2], [-1, 3]]


# settings

@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"temperature": -0.1}, {"temperature": math.nan},
                                   {"temperature": math.inf}, {"top_k": 0}, {"top_k": 2.5}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1},
                                   {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"stop": ""}, {"stop": ("a", "")}, {"stop": (1,)},
                                   {"seed": 1.5}], ids=str)
def test_a_wrong_setting_is_named_with_its_value(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*; got ") as error: GenerationConfig(**wrong)
    assert repr(value).strip("()") in str(error.value)


def test_an_unknown_setting_names_the_nearest(generator):
    for call in (generator.generate, lambda *a, **k: list(generator.stream(*a, **k)), generator.chat().send):
        with pytest.raises(ValueError, match="nearest is 'temperature'"): call("a", temperatur=1.0)


def test_defaults_are_the_documented_ones():
    assert GenerationConfig() == GenerationConfig(max_new_tokens=100, temperature=1.0, top_k=50, top_p=0.9, min_p=0.0, repetition_penalty=1.0,
                                                  stop=(), seed=None)
    assert len(GenerationConfig().processors()) == 2 and not FREE.processors()
    assert GenerationConfig(stop="x").stop == ("x",)


# text, streams, stops

TEXTS = ["Zoë and the 🦊 – naïve café", "日本語", "👩‍👩‍👧", "plain"]


def cuts(data: bytes):
    "Every way to cut `data` into one, two or three pieces, and byte by byte."
    yield [data]
    yield [data[i:i + 1] for i in range(len(data))]
    for i in range(len(data)): yield [data[:i], data[i:]]
    for i, j in itertools.combinations(range(0, len(data) + 1, 2), 2): yield [data[:i], data[i:j], data[j:]]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_never_shows_half_a_character_however_it_is_cut(text):
    for pieces in cuts(text.encode()):
        stream, shown = TextStream(), []
        for piece in pieces:
            shown.append(stream.add(piece))
            assert text.startswith("".join(shown)) and "\ufffd" not in shown[-1]
        assert "".join(shown) + stream.add(b"", final=True) == text


@pytest.mark.parametrize("text, stop, expected", [
    ("one. two. three", [". t"], "one"), ("abcabd!", ["abd"], "abc"), ("aaab", ["aab"], "a"), ("no stop here", ["xyz"], "no stop here"),
    ("ends with its beginning: st", ["stop"], "ends with its beginning: st"), ("abcd", ["bc", "abcd"], "a"), ("xabc", ["bc", "abc"], "x"),
    ("Zoë 🦊!", ["🦊"], "Zoë "), ("é🦊é", ["🦊é"], "é"), ("stop", ["stop"], ""), ("a\n\nb", ["\n\n"], "a")])
def test_stop_strings_across_pieces(text, stop, expected):
    "Whatever the cuts, the same text; nothing of a stop string is ever shown."
    for pieces in cuts(text.encode()):
        stream, shown = TextStream(stop), ""
        for piece in pieces:
            shown += stream.add(piece)
            assert expected.startswith(shown)
        assert shown + stream.add(b"", final=True) == expected
        assert stream.ended == (expected != text)


def test_bytes_that_are_no_text_become_one_mark_at_the_end():
    stream = TextStream()
    assert stream.add("🦊".encode()[:2]) == "" and stream.add(b"", final=True) == "\ufffd"


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"seed": 4}, {"seed": 4, "top_k": None, "top_p": 1.0, "stop": ("a", "é")}], ids=str)
def test_streaming_gives_what_generate_gives(generator, settings):
    for prompt in ("", "Zoë", "A fox saw"):
        whole = generator.generate(prompt, **settings)
        pieces = list(generator.stream(prompt, **settings))
        assert "".join(pieces) == whole and "" not in pieces
        assert not any(s in whole for s in settings.get("stop", ()))


def test_generate_is_the_text_of_generate_ids(generator):
    config, tokenizer = GenerationConfig(seed=2), generator.tokenizer
    prompts = ["Zoë", "", "The end. A fox"]
    for text, found in zip(generator.generate(prompts, seed=2), generate_ids(generator.model, [generator.ids(p) for p in prompts], config,
                                                                           eos_id=tokenizer.eos_id)):
        assert text == tokenizer.decode([i for i in found.ids if i != tokenizer.eos_id])


def test_a_list_of_prompts_gives_what_each_prompt_gives(generator):
    prompts = ["Zoë saw a fox. Zoë saw", "", "A"]
    for settings in ({"temperature": 0.0}, {"seed": 11}, {"seed": 11, "stop": "a"}):
        texts = generator.generate(prompts, **settings)
        for i, (prompt, text) in enumerate(zip(prompts, texts)):
            own = settings | ({"seed": settings["seed"] + i} if "seed" in settings else {})
            assert generator.generate(prompt, **own) == text


def test_a_text_that_met_its_stop_string_leaves_the_batch(generator):
    rows, forward, settings = [], generator.forward, {"seed": 1, "max_new_tokens": 30, "top_p": 1.0}
    alone = generator.generate("", **settings)
    stop = alone[4:6]
    generator.forward = lambda ids, cache: rows.append(len(ids)) or forward(ids, cache)
    assert generator.generate(["", "fox"], **settings, stop=stop)[0] == alone[:alone.index(stop)]
    assert rows[0] == 2 and rows[-1] == 1 and rows.count(2) < 30


def test_each_text_begins_with_the_end_token_unless_told_otherwise(tokenizer):
    model = make(small())
    assert Generator(model, tokenizer).ids("A") == [tokenizer.eos_id, *tokenizer.encode("A")]
    assert Generator(model, tokenizer, begin=[]).ids("A") == tokenizer.encode("A")
    assert tokenizer.eos_id not in Generator(model, tokenizer, begin=[]).ids("<|endoftext|>")
    with pytest.raises(ValueError, match="prompt 0 is empty"): Generator(model, tokenizer, begin=[]).generate("")


def test_rows_that_no_token_has_are_never_drawn(tokenizer):
    model = make(small(vocab_size=400))
    assert all(Generator(model, tokenizer).generate([""] * 20, seed=0, top_k=None, top_p=1.0))


def test_a_generator_checks_its_tokenizer(tokenizer):
    with pytest.raises(ValueError, match="needs a tokenizer"): Generator(make(small()), None)
    with pytest.raises(ValueError, match="has 290 tokens, the model 100"): Generator(make(small(vocab_size=100)), tokenizer)


def test_a_saved_model_writes_the_same(generator, tmp_path):
    from minillm.checkpoints import save_model
    save_model(tmp_path / "saved", generator.model, generator.tokenizer)
    again = Generator.from_checkpoint(tmp_path / "saved", device="cpu")
    assert again.generate("Zoë", seed=1) == generator.generate("Zoë", seed=1)


# chat

def test_a_base_model_continues_all_that_was_said(generator):
    chat = generator.chat()
    first = chat.send("Zoë", seed=1, max_new_tokens=5)
    assert first == generator.generate("Zoë", seed=1, max_new_tokens=5)
    second = "".join(chat.stream(" saw", seed=2, max_new_tokens=5))
    assert second == generator.generate("Zoë" + first + " saw", seed=2, max_new_tokens=5)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_a_template_makes_the_prompt_as_text_or_as_ids(generator):
    template = lambda messages: "".join(f"<{m['role']}>{m['content']}" for m in messages)
    assert generator.chat(template).send("A", temperature=0.0) == generator.generate("<user>A", temperature=0.0)
    as_ids = lambda messages: generator.ids(template(messages))
    assert generator.chat(as_ids).send("A", temperature=0.0) == generator.generate("<user>A", temperature=0.0)


def test_what_does_not_fit_is_forgotten_from_the_front(generator):
    chat = Chat(generator)
    chat.messages = [{"role": "user", "content": c * 15} for c in "abc"]
    message = {"role": "user", "content": "d" * 10}
    assert chat.prompt([*chat.messages, message], 1) == generator.ids("c" * 15 + "d" * 10)
    assert chat.prompt([*chat.messages, message], 100) == generator.ids("d" * 10)
    with pytest.raises(ValueError, match="shorten it"): chat.send("e" * 200)
    assert len(chat.messages) == 3


def test_a_turn_that_was_broken_off_leaves_no_trace(generator):
    chat = generator.chat()
    stream = chat.stream("Zoë", temperature=0.0)
    next(stream)
    stream.close()
    assert chat.messages == []


# beams

def exhaustive(model, prompt, length, eos_id=None):
    "All continuations, likeliest first."
    found = []
    def grow(ids, log_probs):
        if len(ids) == length or (ids and ids[-1] == eos_id): return found.append(Continuation(ids, log_probs))
        paid = model(torch.tensor([prompt + ids]))[0, -1].double().log_softmax(-1)
        for token in range(len(paid)): grow([*ids, token], [*log_probs, float(paid[token])])
    with torch.no_grad(): grow([], [])
    return sorted(found, key=lambda c: -sum(c.log_probs))


@pytest.mark.parametrize("eos_id", [None, 0, 2])
def test_beams_wide_enough_are_exhaustive_search(eos_id):
    model = make(TINY)
    expected = exhaustive(model, [1], 4, eos_id)
    found = beam_search(model, [1], 3**4, 4, eos_id=eos_id)
    assert [c.ids for c in found] == [c.ids for c in expected]
    for ours, theirs in zip(found, expected): assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)
    assert beam_search(model, [1], 7, 1) == [c for c in beam_search(model, [1], 3, 1)]


def test_one_beam_is_greedy_and_more_beams_are_no_worse_here():
    model = make(small())
    assert beam_search(model, [1, 2], 1, 10)[0].ids == generate_ids(model, [[1, 2]], GenerationConfig(temperature=0, max_new_tokens=10))[0].ids
    totals = [sum(beam_search(model, [1, 2], width, 6)[0].log_probs) for width in (1, 50)]
    assert totals[1] >= totals[0]
    with pytest.raises(ValueError, match="n_beams must be at least 1"): beam_search(model, [1], 0, 3)


class Markov:
    "A model whose next token depends on the last alone, by a table of probabilities: nothing to cache."
    training, config = False, TINY

    def __init__(self, table):
        self.table, self.embedding = torch.tensor(table).log(), torch.nn.Embedding(1, 1)
        self.new_cache = lambda *_, **__: self

    def __call__(self, ids, cache): return self.table[ids]
    def select(self, rows): pass


def test_an_end_keeps_its_place_only_while_it_is_likely_enough():
    "Token 2 is the end. At once it has 0.22; after one more step two texts are likelier, or three."
    found = beam_search(Markov([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [0.5, 0.28, 0.22]]), [2], 3, 2, eos_id=2)
    assert [c.ids for c in found] == [[0, 0], [1, 0], [2]]                 # 0.3, 0.28, 0.22; [0, 1] has 0.2
    found = beam_search(Markov([[0.55, 0.45, 0.0], [1.0, 0.0, 0.0], [0.5, 0.28, 0.22]]), [2], 3, 2, eos_id=2)
    assert [c.ids for c in found] == [[1, 0], [0, 0], [0, 1]]              # 0.28, 0.275, 0.225: the end is out


# speculation, by its probabilities

class Path:
    "A `draw` that makes given choices, then always the first possible one, and tells which others there were."
    def __init__(self, choices):
        self.choices, self.turn, self.chance, self.others = list(choices), 0, 1.0, []

    def __call__(self, weights):
        if self.turn == len(self.choices):
            first, *others = weights.nonzero().flatten().tolist()
            self.others += [[*self.choices, other] for other in others]
            self.choices.append(first)
        choice = self.choices[self.turn]
        self.turn, self.chance = self.turn + 1, self.chance * float(weights[choice] / weights.sum())
        return choice


def outcomes(program) -> Counter:
    "Each result of `program(draw)` with its exact probability: every choice that `draw(weights)` could make is made."
    found, waiting = Counter(), [[]]
    while waiting:
        path = Path(waiting.pop())
        found[program(path)] += path.chance
        waiting += path.others
    return found


def test_outcomes_of_two_dice():
    pair = outcomes(lambda draw: (draw(torch.tensor([0.5, 0.5])), draw(torch.tensor([0.2, 0.0, 0.8]))))
    assert pair == pytest.approx({(0, 0): 0.1, (0, 2): 0.4, (1, 0): 0.1, (1, 2): 0.4})


def test_one_judged_guess_has_the_distribution_of_the_truth():
    dice = torch.Generator().manual_seed(0)
    for _ in range(20):
        truth, belief = torch.rand(2, 5, generator=dice, dtype=torch.float64).softmax(-1) ** 3
        truth[3], belief[1] = 0.0, 0.0
        truth, belief = truth / truth.sum(), belief / belief.sum()
        found = outcomes(lambda draw, p=truth, q=belief: judge([p, p], [q], [draw(q)], draw)[0])
        assert [found[i] for i in range(5)] == pytest.approx(truth.tolist(), abs=1e-12)


@pytest.mark.parametrize("n_draft", [1, 2, 3])
@pytest.mark.parametrize("config, eos_id", [
    (GenerationConfig(max_new_tokens=3, top_k=None, top_p=1.0), None), (GenerationConfig(max_new_tokens=3, top_k=None, top_p=1.0), 2),
    (GenerationConfig(max_new_tokens=3, top_k=2, top_p=1.0, temperature=0.7, repetition_penalty=1.4), 0)])
def test_speculation_leaves_the_distribution_unchanged(n_draft, config, eos_id):
    "Exactly: the probability of every text, summed over all that the draft might guess and the judge might do."
    model, draft = make(TINY, seed=1), make(TINY, seed=2, scale=5.0)
    found = outcomes(lambda draw: tuple(speculative(model, draft, [1, 2], config, n_draft=n_draft, eos_id=eos_id, draw=draw)[0]))
    expected = Counter()
    def grow(ids, chance):
        if len(ids) == 3 or (ids and ids[-1] == eos_id): expected[tuple(ids)] = chance; return
        logits = model(torch.tensor([[1, 2, *ids]]))[:, -1]
        for process in config.processors(): logits = process(logits, torch.tensor([[1, 2, *ids]]))
        for token, p in enumerate(logits[0].double().softmax(-1).tolist()):
            if p: grow([*ids, token], chance * p)
    with torch.no_grad(): grow([], 1.0)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert {k: v for k, v in found.items() if v > 1e-9} == pytest.approx(expected, abs=1e-5)      # cached float32 logits


def test_greedy_speculation_is_greedy_and_a_perfect_draft_is_always_accepted():
    model, draft, other = make(small()), make(small(n_layers=1)), make(small(window=6, sinks=1))
    for big in (model, other):
        greedy = generate_ids(big, [[1, 2]], GREEDY)[0].ids
        assert speculative(big, draft, [1, 2], GREEDY)[0] == greedy
        ids, accepted = speculative(big, big, [1, 2], GREEDY)
        assert (ids, accepted) == (greedy, 1.0)
    ids, accepted = speculative(model, model, [1, 2], FREE)
    assert len(ids) == 20 and accepted == 1.0
    assert speculative(model, draft, [1] * 35, FREE)[0] == speculative(model, draft, [1] * 35, FREE)[0]
    assert len(speculative(model, draft, [1] * 35, FREE)[0]) == 5            # the context's end


def test_speculation_needs_one_vocabulary():
    with pytest.raises(ValueError, match="one tokenizer.* 300 and 299"): speculative(make(small()), make(small(vocab_size=299)), [1])


def test_a_compiled_model_says_the_same_and_is_not_compiled_for_each_length(tokenizer, monkeypatch):
    "Once for prompts and once for single tokens. (The graphs are counted; no C++ compiler is asked.)"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, counters = make(small(vocab_size=290, n_layers=1)), torch._dynamo.utils.counters["stats"]
    before, settings = counters["unique_graphs"], {"temperature": 0.0, "max_new_tokens": 6}
    plain, fast = Generator(model, tokenizer), Generator(model, tokenizer, compile=True)
    for prompt in ("Zoë saw", "A fox saw Zoë! The"):
        assert fast.generate(prompt, **settings) == plain.generate(prompt, **settings)
    assert 2 <= counters["unique_graphs"] - before <= 3
