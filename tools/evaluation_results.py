"""Small results of lesson 13, each kept under its name in minillm/evaluation.json: `python tools/evaluation_results.py real_text training`.

real_text: 1 minute on a quiet core, on the runs of the README's section "Real text"; the lesson shows it.
training: 4 minutes, the quickstart's recipe on tales without six pairs of an animal and a thing, with a quiz every 50 steps; not
stored yet: the lesson trains a model of a smaller world instead, in seconds.
"""
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from minillm.checkpoints import load_model, read_json, write_json
from minillm.data import Corpus, load_corpus, tokenize_once
from minillm.evaluation import (
    Watch,
    encode_document,
    is_tale,
    longest_copies,
    make_quiz,
    score_quiz,
    score_text,
    tell_tales,
    token_nats,
)
from minillm.model import PRESETS, MiniLLM
from minillm.sampling import Generator
from minillm.tales import TaleWorld, words
from minillm.tokenizer import BPETokenizer, Tokenizer
from minillm.training import load_recipe, train

STORE = Path(__file__).resolve().parent.parent / "minillm" / "evaluation.json"
HELD_OUT = {("fox", "scarf"), ("bear", "kite"), ("rabbit", "hat"), ("mouse", "ball"), ("squirrel", "flag"), ("frog", "ribbon")}


def tales_of(pairs: bool | None, n: int, seed: int) -> list[str]:
    "`n` tales: only held-out pairs (True), none of them (False), or all as they come (None)."
    told = (t for t in TaleWorld("short", seed=seed).tales() if pairs is None or ((t.facts["kind"], t.facts["object"]) in HELD_OUT) == pairs)
    return [tale.text for tale in islice(told, n)]


def train_quickstart(texts: list[str], measure: Callable, every: int) -> tuple[Generator, Watch]:
    "The quickstart's model after its recipe on these tales, and what was seen on the way."
    recipe = load_recipe("quickstart", evaluate_every=0)
    tokenizer = BPETokenizer.train(texts, 1024, pattern="tales")
    torch.manual_seed(recipe.train.seed)
    model = MiniLLM(PRESETS[recipe.preset].replace(vocab_size=tokenizer.vocab_size, **recipe.model))
    watch = Watch(lambda model: measure(model, tokenizer), every)
    with tempfile.TemporaryDirectory() as folder:
        corpora = [Corpus("tales-short", split, lambda t=t: iter(t), f"lesson 13 {split}", "short", "1") for split, t in (("train", texts), ("validation", texts[:100]))]
        train(model, tuple(tokenize_once(c, tokenizer, folder, progress=False) for c in corpora), recipe.train, watch, tokenizer=tokenizer)
    return Generator(model, tokenizer), watch


def training() -> dict:
    "A quiz and the price of tales with and without the held-out pairs, every 50 steps; then tales begun with a pair."
    quiz, world = make_quiz(TaleWorld("short", seed=3_000_000), 25), TaleWorld("short")
    sets = {"held out": tales_of(True, 100, 2_000_000), "seen": tales_of(False, 100, 2_000_000)}
    def measure(model: MiniLLM, tokenizer: Tokenizer) -> dict:
        scores = score_quiz(model, tokenizer, quiz)
        pairs = {name: [round(part, 3) for part in split_at_object(model, tokenizer, world, texts)] for name, texts in sets.items()}
        return {"skills": {skill: [round(s.accuracy.value, 3), round(s.belief, 3)] for skill, s in scores.items()}, **pairs}
    generator, watch = train_quickstart(tales_of(False, 15_200, 0), measure, 50)
    valid = {}
    for name, texts in {"held out": tales_of(True, 300, 4_000_000), "seen": tales_of(False, 300, 4_000_000)}.items():
        parses = [world.parse(text) for text in texts]
        prefixes = [p.text[:p.words[p.mentions["object"][0]].end] for p in parses]
        told = generator.generate(prefixes, temperature=1.0, top_k=None, top_p=1.0, max_new_tokens=180, seed=0)
        valid[name] = sum(is_tale(world, prefix + more) for prefix, more in zip(prefixes, told))
    chance = {skill: round(sum(len(q.right) / (len(q.right) + len(q.wrong)) for q in asked) / len(asked), 3) for skill, asked in quiz.items()}
    return {"pairs": sorted(map(list, HELD_OUT)), "questions": 25, "chance": chance, "records": watch.records, "valid_of_300": valid}


def split_at_object(model: MiniLLM, tokenizer: Tokenizer, world: TaleWorld, texts: list[str]) -> tuple[float, float]:
    "Excess nats a tale at the word that draws the object, and in all words behind it; every word is one token here."
    draw = rest = 0.0
    for text, nats in zip(texts, token_nats(model, [encode_document(tokenizer, t) for t in texts])):
        parse = world.parse(text)
        place = parse.mentions["object"][0]
        over = [paid + word.log_prob for paid, word in zip(nats.tolist(), parse.words)]
        if len(nats) != len(parse.words) + 1: raise ValueError("a word of several tokens")
        draw, rest = draw + over[place], rest + sum(over[place + 1:])
    return draw / len(texts), rest / len(texts)


def real_text() -> dict:
    "The stride on pydocs and tinyshakespeare, and what samples of the pydocs model copy."
    found = {}
    for run, data in (("runs/pydocs", "pydocs"), ("runs/shakespeare", read_json("runs/shakespeare/recipe.json")["data"])):
        model, tokenizer, _ = load_model(run, "cpu", "float32")
        some = [text for text in islice(load_corpus(data, "validation"), 60) if len(text) > 1000][:12]
        found[Path(run).name] = {stride: [round(score.loss, 4), round(score.bits_per_byte, 4)] for stride in (128, 64, 32, 16)
                                 for score in [score_text(model, tokenizer, some, window=128, stride=stride)]}
        if data == "pydocs": found["copies"] = copies(Generator(model, tokenizer), data)
    return found


def copies(generator: Generator, data: str) -> dict:
    "The longest copied spans, in words, of 100 samples at two temperatures and of unseen documents, cut to 60 words: how often each length."
    texts = {f"temperature {t}": tell_tales(generator, 100, temperature=t, max_new_tokens=120) for t in (1.0, 0.5)}
    texts["unseen documents"] = list(islice((d for d in load_corpus(data, "validation") if len(words(d)) >= 60), 100))
    documents, result = [words(d) for d in load_corpus(data)], {}
    for name, some in texts.items(): result[name] = dict(sorted(Counter(c.length for c in longest_copies([words(t)[:60] for t in some], documents)).items()))
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        made = {"training": training, "real_text": real_text}[name]()
        stored = read_json(STORE) if STORE.exists() else {}
        write_json(STORE, {**stored, name: {"command": f"python tools/evaluation_results.py {name}", **made}})
