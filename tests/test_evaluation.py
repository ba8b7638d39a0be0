"""Evaluation against references: slow loops, cases computed by hand, and what must add up."""
import json
import math
import random
from importlib import resources

import numpy as np
import pytest
import torch

from minillm.checkpoints import RunFolder, load_model, save_model, write_json
from minillm.data import Batches, load_corpus, prepare, tokenize_once
from minillm.evaluation import (
    WORD_KINDS,
    ChoiceItem,
    SuffixAutomaton,
    TaleScores,
    Watch,
    choice_nats,
    common_spans,
    diversity_report,
    encode_document,
    estimate_mean,
    estimate_share,
    is_tale,
    kind_costs,
    load_choices,
    longest_copies,
    make_quiz,
    plot_report,
    retell,
    row_nats,
    score_choices,
    score_quiz,
    score_tales,
    score_text,
    seen_among,
    self_overlap,
    tale_record,
    tale_report,
    tell_tales,
    text_report,
    token_nats,
    training_record,
    watch_skills,
)
from minillm.model import MiniLLM, ModelConfig, cross_entropy
from minillm.sampling import Generator
from minillm.tales import TaleWorld, World, words
from minillm.tokenizer import BPETokenizer, CharTokenizer, UnigramTokenizer
from minillm.training import TrainConfig, evaluate, train

TALES = [tale.text for tale in TaleWorld("short", seed=5).tales(60)]


def small(vocab_size: int, context_length: int = 32, **changes) -> MiniLLM:
    torch.manual_seed(0)
    return MiniLLM(ModelConfig(**{"vocab_size": vocab_size, "context_length": context_length, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16, **changes}))


@pytest.fixture(scope="module")
def packaged(): return load_model("tales-short", "cpu", "float32")


# the price of text


def test_rows_of_all_lengths_cost_what_each_costs_alone_and_the_model_is_as_it_was():
    model, rng = small(20, dropout=0.5).train(), random.Random(0)
    rows = [[rng.randrange(20) for _ in range(n)] for n in (5, 33, 2, 1, 17, 9)]
    dice = torch.get_rng_state()
    found = row_nats(model, rows)
    assert model.training and torch.equal(dice, torch.get_rng_state())
    model.eval()
    for row, nats in zip(rows, found):
        assert len(nats) == len(row) - 1
        if len(row) > 1:
            with torch.no_grad(): expected, _ = cross_entropy(model(torch.tensor([row[:-1]])), torch.tensor([row[1:]]))
            assert float(nats.sum()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("window, stride", [(8, 8), (8, 4), (8, 3), (8, 1), (1, 1), (32, 16), (5, 2)])
def test_each_token_is_paid_once_and_behind_the_context_that_the_stride_promises(window, stride):
    model = small(11).eval()
    ids = torch.randint(11, (41,)).tolist()
    [nats] = token_nats(model, [ids], window=window, stride=stride)
    assert len(nats) == 40
    for place in range(1, 41):
        if place <= window: start = 0
        else: start = -(-(place - window) // stride) * stride       # the first window that reaches so far
        with torch.no_grad(): alone = -model(torch.tensor([ids[start:place]]))[0, -1].log_softmax(-1)[ids[place]]
        assert float(nats[place - 1]) == pytest.approx(float(alone), abs=1e-5)
        assert place - start >= min(place, window - stride + 1)


@pytest.mark.parametrize("window, stride", [(0, 1), (8, 9), (33, 1), (8, 0)])
def test_a_window_or_stride_that_cannot_be_is_refused(window, stride):
    if window == 0 or stride == 0: window, stride = window or -1, stride or -1       # 0 means: choose for me
    with pytest.raises(ValueError, match="window <= 32, the context"): token_nats(small(11), [[1, 2, 3]], window=window, stride=stride)


def test_bits_per_byte_of_a_uniform_model_are_known_whatever_the_tokenizer():
    texts = ["Zoë met a fox.", "One red kite."]
    size = sum(len(text.encode()) for text in texts)
    for tokenizer in (CharTokenizer.train(texts), BPETokenizer.train(texts, 270)):
        model = small(tokenizer.vocab_size)
        model.head.weight.data.zero_()
        score = score_text(model, tokenizer, texts)
        tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
        assert (score.tokens, score.n_bytes, score.documents, score.lossy) == (tokens, size, 2, 0)
        assert score.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-4)
        assert score.bits_per_byte == pytest.approx(tokens * math.log2(tokenizer.vocab_size) / size, rel=1e-4)
        assert sum(n for _, n in score.positions) == tokens and sum(nats for nats, _ in score.positions) == pytest.approx(score.nats)
    with pytest.raises(ValueError, match="no text"): score_text(model, tokenizer, [])
    lossy = CharTokenizer("abc ", unknown="<?>")
    assert score_text(small(lossy.vocab_size), lossy, ["abc", "abd"]).lossy == 1


def test_tales_cost_what_the_training_loop_says(packaged, tmp_path):
    model, tokenizer, _ = packaged
    corpus = load_corpus("tales-short", "validation", max_samples=40)
    scores = score_tales(model, tokenizer, TaleWorld("short"), corpus)
    result = evaluate(model, Batches(tokenize_once(corpus, tokenizer, tmp_path, progress=False), tokenizer, batch_size=7,
                                     sequence_length=model.config.context_length, kind="documents"))
    assert scores.nats.sum() == pytest.approx(result.nats, rel=1e-5) and scores.floors.sum() == pytest.approx(result.floor)
    assert scores.excess.value == pytest.approx(result.excess, abs=1e-3) and scores.loss == pytest.approx(result.loss, rel=1e-5)
    assert score_text(model, tokenizer, corpus).nats == pytest.approx(result.nats, rel=1e-5)


# intervals


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    means = [estimate_mean(rng.exponential(2.0, 100).tolist()) for _ in range(1000)]
    shares = [estimate_share(int(rng.binomial(50, 0.04)), 50) for _ in range(1000)]
    assert 0.91 < np.mean([e.low <= 2 <= e.high for e in means]) < 0.97
    assert 0.91 < np.mean([e.low <= 0.04 <= e.high for e in shares]) < 0.99
    assert estimate_share(0, 10).low == 0 and estimate_share(10, 10).high == pytest.approx(1) and estimate_share(0, 10).high > 0.2
    assert estimate_mean([3.0]).high == math.inf
    with pytest.raises(ValueError, match="n is 0"): estimate_share(0, 0)


# tokens and words


def test_spans_of_two_cuts_by_hand():
    spans = list(common_spans([3, 4, 9], [1, 3, 9]))          # tokens end at 3, 4, 9; words at 1, 3, 9
    assert spans == [(slice(0, 1), slice(0, 2)), (slice(1, 3), slice(2, 3))]


TOKENIZERS = {"word": lambda: BPETokenizer.train(TALES, 1024, pattern="tales"), "byte pairs": lambda: BPETokenizer.train(TALES, 300, pattern="gpt2"),
              "glued": lambda: BPETokenizer.train(TALES, 1500, pattern="gpt2"), "characters": lambda: CharTokenizer.train(TALES),
              "unigram": lambda: UnigramTokenizer.train(TALES, 400)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_parts_by_kind_add_up_whatever_the_tokenizer(name):
    world, tokenizer = TaleWorld("short"), TOKENIZERS[name]()
    model = small(tokenizer.vocab_size, context_length=700)
    scores = score_tales(model, tokenizer, world, TALES[:20], kinds=True)
    assert tuple(scores.kinds) == WORD_KINDS
    total = sum(scores.kinds.values())
    assert np.allclose(total[:, 1], scores.nats) and np.allclose(total[:, 2], scores.floors)
    assert total[:, 0].tolist() == [len(words(text)) + 1 for text in TALES[:20]], "every word once, and the end"
    assert sum(e.value for e in scores.kind_excess.values()) == pytest.approx(scores.excess.value)
    if name == "word":
        for kind in WORD_KINDS: assert scores.kinds[kind][0, 0] == sum(w.kind == kind for w in world.parse(TALES[0]).words) + (kind == "forced")
        assert np.allclose(scores.kinds["forced"][:, 2], 0)


def test_what_each_kind_costs_by_hand():
    def story(say):
        say("{hero:names} ran.", "{hero:names} sat.")
        say("{hero} slept.")
    world = TaleWorld(World("nap", "1", story, {"names": ["Mia", "Tom"]}))
    tokenizer = CharTokenizer.train(["Mia ran. Mia slept. Tom sat."])
    text = "Mia ran. Mia slept."
    found = kind_costs(world.parse(text), tokenizer, tokenizer.encode(text) + [tokenizer.eos_id], [1.0] * len(text) + [5.0])
    assert found["new"] == (1, 3.0, pytest.approx(math.log(2))) and found["recall"] == (1, 4.0, 0.0)
    assert found["template"] == (1, 4.0, pytest.approx(math.log(2)))            # " ran"
    assert found["forced"] == (4, 1 + 6 + 1 + 5.0, 0.0) and found["count"] == (0, 0, 0)       # . slept . and the end
    with pytest.raises(ValueError, match="do not spell"): kind_costs(world.parse(text), tokenizer, tokenizer.encode(text[1:]) + [0], [1.0] * len(text))


def test_what_cannot_have_a_floor_is_refused(packaged):
    model, tokenizer, _ = packaged
    world = TaleWorld("short")
    with pytest.raises(ValueError, match="there could be"): score_tales(model, tokenizer, world, ["Once upon a bear."])
    with pytest.raises(ValueError, match="that is cut has no floor"): score_tales(small(tokenizer.vocab_size, 64), tokenizer, world, TALES)
    lossy = CharTokenizer("abc ", unknown="<?>")
    with pytest.raises(ValueError, match="does not give these tales back"): score_tales(small(lossy.vocab_size), lossy, world, TALES)


# validity


def test_the_bound_and_the_expected_share_by_hand():
    "Two tales of odds 3/4 and 1/4; a model that gives them 0.6 and 0.3 and wastes 0.1."
    times = [3, 1]
    scores = TaleScores(np.repeat(-np.log([0.6, 0.3]), times), np.repeat(-np.log([0.75, 0.25]), times), np.ones(4), 4, {})
    divergence = 0.75 * math.log(0.75 / 0.6) + 0.25 * math.log(0.25 / 0.3)
    assert scores.excess.value == pytest.approx(divergence)
    assert scores.bound == pytest.approx(math.exp(-divergence)) and scores.bound < 0.9
    assert scores.expected_valid.value == pytest.approx(0.9)


def test_what_is_told_agrees_with_the_bound_and_what_was_expected(packaged):
    model, tokenizer, _ = packaged
    world = TaleWorld("short", seed=2_000_000)
    scores = score_tales(model, tokenizer, world, [tale.text for tale in world.tales(300)])
    texts = tell_tales(Generator(model, tokenizer), 150, seed=1)
    share = estimate_share(sum(is_tale(world, text) for text in texts), 150)
    assert len(set(texts)) > 140 and texts[100:] == tell_tales(Generator(model, tokenizer), 50, seed=101)
    expected = scores.expected_valid
    assert share.high > scores.bound and share.low < expected.high and share.high > expected.low
    assert scores.bound < expected.value + 0.02


def test_new_is_what_no_training_tale_is():
    record = tale_record("tales-short", 300, 7)
    told = list(retell(record))
    assert told == [tale.text for tale in TaleWorld("short", seed=7).tales(300)]
    fresh = TALES[:5]
    assert seen_among([*fresh, told[0], told[-1], told[0][:-1]], retell(record)) == {told[0], told[-1]}
    assert tale_record("tales", None, 0)["count"] == 100_000
    with pytest.raises(ValueError, match="version 0 of the world 'short', which is now at 1"): retell({**record, "version": "0"})


def test_a_run_records_its_training_and_that_of_the_model_it_began_from(tmp_path):
    model = small(9)
    for name, start, steps in (("a", None, 3), ("b", "a", 2)):
        run = RunFolder(tmp_path / name)
        run.start(model)
        run.save_step(2, model, {}, best=True)
        write_json(run.path / "recipe.json", {"data": "tales-short", "max_samples": 50, "seed": 4, "init_from": start and str(tmp_path / start)})
        for step in range(1, steps + 1): run.log({"step": step, "loss": 1.0, "tokens": 10 * step})
        run.log({"step": 2, "excess": 1.0})
    told = tale_record("tales-short", 50, 4)
    assert training_record(tmp_path / "a") == {"data": ["tales-short"], "tales": [told], "tokens": 30}
    assert training_record(tmp_path / "b") == {"data": ["tales-short"] * 2, "tales": [told] * 2, "tokens": 30 + 30}
    assert training_record(tmp_path / "b" / "step-2")["tokens"] == 60
    save_model(tmp_path / "known", model, info={"training": {"tokens": 5}}, flat=True)
    save_model(tmp_path / "unknown", model)
    assert training_record(tmp_path / "known") == {"tokens": 5} and training_record(tmp_path / "unknown") == {}


# copies


def longest_by_trying(text, documents) -> int:
    spans = {tuple(d[i:j]) for d in documents for i in range(len(d)) for j in range(i + 1, len(d) + 1)}
    return max((j - i for i in range(len(text)) for j in range(i + 1, len(text) + 1) if tuple(text[i:j]) in spans), default=0)


def test_longest_copies_are_those_found_by_trying_all_spans():
    rng = random.Random(0)
    for trial in range(150):
        letters = "ab" if trial % 2 else "abcd"
        texts = ["".join(rng.choices(letters, k=rng.randint(0, 12))) for _ in range(rng.randint(1, 4))]
        documents = ["".join(rng.choices(letters, k=rng.randint(0, 15))) for _ in range(rng.randint(0, 4))]
        for text, copy in zip(texts, longest_copies(texts, documents)):
            assert copy.length == longest_by_trying(text, documents)
            assert not copy.length or any(text[copy.start:copy.start + copy.length] in d for d in documents)


def test_the_machine_is_small_and_knows_every_span_and_nothing_else():
    text = "abbcbabbacb" * 3
    machine = SuffixAutomaton(text)
    assert len(machine.link) <= 2 * len(text) and sum(map(len, machine.next)) <= 3 * len(text)
    assert len({text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)}) == sum(
        machine.length[s] - machine.length[machine.link[s]] for s in range(1, len(machine.link))), "each different span once"
    assert [length for _, length in SuffixAutomaton("banana").walk("anab")] == [1, 2, 3, 1]


def test_diversity_by_hand():
    texts = ["a b a b", "a b c"]
    assert diversity_report(["one two three four five"] * 2) == {"distinct_4grams": 0.5, "self_overlap_8": 0.0}
    said = [text.split() for text in texts]
    assert self_overlap(said, 2) == pytest.approx((2 / 3 + 1 / 2) / 2)          # ab, ba, ab | ab, bc: only ab is in both


# skills and choices


def test_choices_cost_what_the_whole_texts_cost():
    "Whatever the tokenizer joins, and whether an ending is one token or several."
    for tokenizer in (BPETokenizer.train(TALES, 400, pattern="tales"), BPETokenizer.train(TALES, 1500), CharTokenizer.train(TALES)):
        model = small(tokenizer.vocab_size, 128).eval()
        prefix, endings = 'Mia lost her', [" red kite", " red", " blue ball.", "self"]
        [costs] = choice_nats(model, tokenizer, [(prefix, endings)])
        whole = [float(n.sum()) for n in row_nats(model, [encode_document(tokenizer, prefix + e)[:-1] for e in endings])]
        start = float(row_nats(model, [[tokenizer.eos_id, *tokenizer.encode(prefix)]])[0].sum())
        for cost, total, ending in zip(costs, whole, endings):
            if tokenizer.encode(prefix + ending)[:len(tokenizer.encode(prefix))] == tokenizer.encode(prefix):
                assert cost == pytest.approx(total - start, abs=1e-4)
    with pytest.raises(ValueError, match="empty or too long"): choice_nats(model, tokenizer, [("Mia", [""])])
    with pytest.raises(ValueError, match="empty or too long"): choice_nats(model, tokenizer, [("Mia", [" ran" * 99])])


def test_a_text_begins_as_its_tokenizer_says():
    bpe = BPETokenizer.train(["the hen then the hen "] * 9, 280)
    assert encode_document(bpe, "the hen") == [bpe.eos_id, *bpe.encode("the hen"), bpe.eos_id]
    torch.manual_seed(0)
    model = MiniLLM(ModelConfig(vocab_size=bpe.vocab_size, context_length=32, d_model=16, n_layers=1, n_heads=2)).eval()
    before = choice_nats(model, bpe, [("the", [" hen", " the"])])
    bpe.begin = [3]
    assert encode_document(bpe, "the hen") == [3, *bpe.encode("the hen"), bpe.eos_id]
    assert choice_nats(model, bpe, [("the", [" hen", " the"])]) != before


def test_a_long_context_loses_its_beginning():
    tokenizer = CharTokenizer.train(TALES)
    model = small(tokenizer.vocab_size, 16).eval()
    long, short = (choice_nats(model, tokenizer, [(prefix, [" ran"])])[0][0] for prefix in (TALES[0][:200] + " Mia said so to Tom", "so and so Mia said so to Tom"))
    assert long == pytest.approx(short, abs=1e-5)


def test_a_model_without_opinions_scores_at_chance_and_a_good_one_above(packaged):
    model, tokenizer, _ = packaged
    quiz = make_quiz(TaleWorld("short", seed=3), 16)
    assert list(quiz) == TaleWorld("short").skills
    knows = score_quiz(model, tokenizer, quiz)
    for skill in ("hero", "ending", "pronoun", "count"): assert knows[skill].accuracy.low > knows[skill].chance and knows[skill].belief > 0.7
    blank = small(tokenizer.vocab_size, 256)
    blank.head.weight.data.zero_()
    guesses = score_quiz(blank, tokenizer, quiz)
    assert all(guesses[skill].belief == pytest.approx(guesses[skill].chance, abs=1e-3) for skill in ("hero", "object", "colour"))
    mean = sum(s.accuracy.value - s.chance for s in guesses.values()) / len(guesses)
    assert abs(mean) < 0.12, "ties favour nobody"


def test_multiple_choice_by_hand(tmp_path):
    "A model that knows only how likely each character is: what is shorter is likelier, unless lengths are divided out."
    tokenizer = CharTokenizer("abc d\n")
    model = small(tokenizer.vocab_size, 64)
    model.head.weight.data.zero_()
    items = [ChoiceItem("a", ["ab", "abcd"], 0), ChoiceItem("a", ["abcd", "ab"], 0)]
    score = score_choices(model, tokenizer, items)
    assert score.accuracy.value == 0.5 and score.chance == 0.5 and score.accuracy.n == 2
    # each character costs ln V, and so does the space: 3 against 5, but 3/2 against 5/4 for each character
    assert score.by_length.value == 0.5
    plain, each = ([nats < other for nats, other in [(3, 5)]], [nats < other for nats, other in [(3 / 2, 5 / 4)]])
    assert plain == [True] and each == [False]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(item._asdict()) + "\n" for item in items), encoding="utf-8")
    assert load_choices(tmp_path / "q.jsonl") == items
    few = score_choices(model, tokenizer, items, examples=items[:1])
    assert few.accuracy.value == 0.5


@pytest.mark.parametrize("row", [{"context": "a", "choices": ["b"], "answer": 1}, {"context": "a", "choices": [], "answer": 0}, {"choices": ["b"], "answer": 0},
                                 {"context": "a", "choices": ["b", ""], "answer": 0}, {"context": "a", "choices": ["b"], "answer": "b"}])
def test_a_faulty_item_is_named(row, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"context": "a", "choices": ["b"], "answer": 0}\n' + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="item 2: wanted are"): load_choices(tmp_path / "q.jsonl")


# during training, and reports


def test_watching_a_run_does_not_change_it(tmp_path):
    tokenizer = BPETokenizer.train(TALES, 1024, pattern="tales")
    files = prepare("tales-short", tokenizer, tmp_path, max_samples=60, progress=False)
    config = TrainConfig(steps=5, batch_size=2, dtype="float32", device="cpu", evaluate_every=0, progress=False, sequence_length=200)
    def run(on_step):
        return train(small(tokenizer.vocab_size, 256, dropout=0.2), files, config, on_step, tokenizer=tokenizer).train_loss
    watch = watch_skills(tokenizer, TaleWorld("short"), questions=2, every=2)
    assert run(watch) == run(None)
    assert [record["step"] for record in watch.records] == [2, 4, 5]
    assert set(watch.records[0]) == {"step", *TaleWorld("short").skills}
    seen = Watch(lambda model: {"training": model.training, "gradients": torch.is_grad_enabled()}, 5)
    run(seen)
    assert seen.records == [{"step": 5, "training": False, "gradients": False}]


def test_the_stored_curves_hold_what_they_say():
    "minillm/evaluation.json, by tools/evaluation_results.py: the parts are the whole, the bound is that of the excess."
    stored = json.loads((resources.files("minillm") / "evaluation.json").read_text(encoding="utf-8"))["training"]
    skills, steps = set(TaleWorld("short").skills), [record["step"] for record in stored["records"]]
    assert steps == sorted(set(steps)) and len(steps) > 10 and set(stored["chance"]) == skills
    for record in stored["records"]:
        assert sum(record["by_kind"].values()) == pytest.approx(record["excess"], abs=1e-3)
        assert record["valid"]["bound"] == pytest.approx(math.exp(-record["excess"]), abs=1e-3)
        assert set(record["skills"]) == skills and all(0 <= belief <= 1 for _, belief in record["skills"].values())
    for name in ("held out", "seen"): assert 0 <= stored[name]["valid"] <= stored[name]["tales"]
    last = stored["records"][-1]["pairs"]
    for name, prices in last.items(): assert prices == pytest.approx([stored[name][where][0] for where in ("at the thing", "behind it")], abs=1e-3)


def test_cold_dice_make_more_tales_valid_and_none_old():
    "minillm/evaluation.json again: at each temperature below 1 more is valid, and all of it new, whatever the packaged model."
    stored = json.loads((resources.files("minillm") / "evaluation.json").read_text(encoding="utf-8"))["temperatures"]
    for name in ("tales", "tales-short"):
        rows = {row["temperature"]: row for row in stored["records"] if row["model"] == name}
        assert set(rows) == {0.2, 0.4, 0.6, 0.8, 1.0} and all(row["new"] == row["different"] == 1 for row in rows.values())
        assert all(rows[T]["valid"][1] > rows[1.0]["valid"][2] for T in rows if T < 1)
        record = json.loads((resources.files("minillm") / f"{name}.json").read_text(encoding="utf-8"))["info"]
        assert rows[1.0]["valid"][0] == pytest.approx(record["valid_share"], abs=1e-3)


def test_the_report_of_tales_has_its_keys_and_is_json(packaged, tmp_path):
    model, tokenizer, _ = packaged
    generator = Generator(model, tokenizer)
    report, texts = tale_report(generator, "short", tales=30, samples=12, questions=3, training={"tales": [tale_record("tales-short", 20, 0)]})
    assert {"excess_nats_per_tale", "excess_interval", "loss_nats_per_token", "floor_nats_per_token", "valid_share", "new_share"} <= report.keys()
    assert json.loads(json.dumps(report)) == report and len(texts) == 12
    assert report["excess_nats_per_tale"] == pytest.approx(sum(k["excess"] for k in report["excess_by_kind"].values()))
    low, high = report["excess_interval"]
    assert low < report["excess_nats_per_tale"] < high
    if report["valid_share"]: assert report["new_share"] == 1
    plot_report(report).savefig(tmp_path / "report.png")
    without, texts = tale_report(generator, "short", tales=5, samples=0, questions=0)
    assert not texts and "valid_share" not in without and "skills" not in without
    plot_report(without).savefig(tmp_path / "price.svg")


def test_the_report_of_text_says_what_was_copied(tmp_path):
    docs = [" ".join(text.split()) for text in (math.__doc__, json.__doc__, random.__doc__, str.__doc__, dict.__doc__)]
    tokenizer = BPETokenizer.train(docs, 300)
    report, texts = text_report(Generator(small(tokenizer.vocab_size), tokenizer), docs[:5], samples=3, training=docs)
    assert len(texts) == 3 and report["copied_words_most"] >= 1 and report["documents"] == 5
    assert words(report["copied_most"])[0] in " ".join(docs)
    plot_report(report).savefig(tmp_path / "report.png")
