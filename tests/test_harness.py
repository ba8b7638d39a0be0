"""Our models in lm-evaluation-harness: the numbers are ours. With the library only where it is there (`make test-lm-eval`)."""
import json
import sys

import pytest
import torch

from minillm.checkpoints import load_model
from minillm.interop import continuation_log_probs, encode_pair, generate_text, harness_model
from minillm.model import MiniLLM, ModelConfig
from minillm.sampling import Generator
from minillm.tales import TaleWorld
from minillm.tokenizer import BPETokenizer, FallbackTokenizer

@pytest.fixture(scope="module")
def packaged():
    model, tokenizer, _ = load_model("tales-short", "cpu")
    return model, tokenizer


@pytest.fixture(scope="module")
def questions():
    world = TaleWorld("short", seed=2_000_000)
    return [question for skill in world.skills for question in world.quiz(skill, 2)]


def by_hand(model, tokenizer, context, continuation):
    "The log-probability of a continuation, token by token, each from a forward pass of its own."
    ids, total = [tokenizer.eos_id, *tokenizer.encode(context)], 0.0
    for token in tokenizer.encode(context + continuation)[len(ids) - 1:]:
        total += model(torch.tensor([ids])).detach().double().log_softmax(-1)[0, -1, token].item()
        ids.append(token)
    return total


# Without the library

def test_log_probs_are_those_of_one_token_after_another(packaged, questions):
    model, tokenizer = packaged
    asked = [(q.prefix, " " + word) for q in questions for word in (q.right[0], q.wrong[0])]
    pairs = [encode_pair(tokenizer, *pair) for pair in asked]
    found = continuation_log_probs(model, pairs)
    for (context, continuation), (total, _) in zip(asked, found):
        assert total == pytest.approx(by_hand(model, tokenizer, context, continuation), abs=1e-4)


def test_greedy_says_whether_each_token_was_the_likeliest(packaged):
    model, tokenizer = packaged
    start = TaleWorld("short", seed=1).tell().text[:60].rsplit(" ", 1)[0]
    ids = [tokenizer.eos_id, *tokenizer.encode(start)]
    best = model.generate(torch.tensor([ids]), 5, temperature=0)[0, len(ids):].tolist()
    other = [*best[:-1], (best[-1] + 1) % 256]
    assert [greedy for _, greedy in continuation_log_probs(model, [(ids, best), (ids, other)])] == [True, False]


def test_spaces_between_belong_to_the_continuation():
    bpe = BPETokenizer.train(["the hen then the hen "] * 9, 280)
    for context, continuation in [("the", " hen"), ("the ", "hen"), ("the  ", "hen"), ("", "the hen"), ("th", "en")]:
        first, second = encode_pair(bpe, context, continuation)
        assert first[0] == bpe.eos_id and bpe.decode([*first[1:], *second]) == context + continuation
        assert bpe.decode(first[1:]) == context.rstrip(" ")
    assert encode_pair(bpe, "the", " hen") == encode_pair(bpe, "the ", "hen")
    names = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁then") + ["▁t", "▁h"]
    marks = FallbackTokenizer({name: i for i, name in enumerate(names)}, front="prepend")
    marks.begin = [7]
    first, second = encode_pair(marks, "then", " hen")
    assert first[0] == 7 and marks.decode_bytes(second) == b" hen"


def test_a_long_context_loses_its_beginning():
    bpe = BPETokenizer.train(["the hen then the hen "] * 9, 280)
    torch.manual_seed(0)
    model = MiniLLM(ModelConfig(vocab_size=bpe.vocab_size, context_length=16, d_model=16, n_layers=1, n_heads=2)).eval()
    long = "the hen then " * 20
    first, second = encode_pair(bpe, long, " hen")
    [(total, _)] = continuation_log_probs(model, [(first, second)])
    log_probs = model(torch.tensor([[*first, *second][-17:-1]])).detach().log_softmax(-1)[0]
    assert total == pytest.approx(sum(float(log_probs[i - len(second), token]) for i, token in enumerate(second)), abs=1e-4)
    with pytest.raises(ValueError, match="too long"): continuation_log_probs(model, [([0], [1] * 40)])


def test_a_text_is_generated_as_a_generator_does(packaged):
    model, tokenizer = packaged
    assert generate_text(model, tokenizer, "", {"until": ["."], "max_gen_toks": 40}) == Generator(model, tokenizer).generate(
        "", temperature=0, max_new_tokens=40, stop=["."])


def test_without_the_library_the_error_says_what_to_install(packaged, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm-eval"): harness_model(*packaged)


# With it

def test_the_harness_says_what_we_say_of_the_tales_quiz(packaged, questions, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager
    model, tokenizer = packaged
    rows = [{"prefix": q.prefix, "choices": [q.right[0], *q.wrong]} for q in questions]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {"task": "tales_quiz", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "quiz.jsonl")}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prefix}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}]}
    results = lm_eval.simple_evaluate(model=harness_model(model, tokenizer), tasks=[task], log_samples=True, bootstrap_iters=0,
                                      task_manager=TaskManager(include_defaults=False), verbosity="ERROR")
    right = 0
    for sample in results["samples"]["tales_quiz"]:
        scores = [by_hand(model, tokenizer, sample["doc"]["prefix"], " " + word) for word in sample["doc"]["choices"]]
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(scores, abs=1e-4)
        right += max(range(len(scores)), key=scores.__getitem__) == 0
    assert results["results"]["tales_quiz"]["acc,none"] == pytest.approx(right / len(rows))
    assert right / len(rows) > 0.5


def test_the_harness_asks_for_whole_texts_and_for_new_ones(packaged):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    model, tokenizer = packaged
    theirs, tale = harness_model(model, tokenizer), TaleWorld("short", seed=3).tell().text
    def ask(kind, *arguments): return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
    assert isinstance(theirs, lm_eval.api.model.LM)
    [total] = theirs.loglikelihood_rolling([ask("loglikelihood_rolling", tale)])
    assert total == pytest.approx(by_hand(model, tokenizer, "", tale), abs=1e-3)
    [long] = theirs.loglikelihood_rolling([ask("loglikelihood_rolling", " ".join([tale] * 5))])
    assert long < 2 * total
    [text] = theirs.generate_until([ask("generate_until", "", {"until": ["."], "max_gen_toks": 30})])
    assert text and "." not in text
