"""How skills come during training, for lesson 13: `python tools/evaluation_results.py training` writes minillm/evaluation.json.

The quickstart's recipe on tales without six pairs of an animal and a thing, with lesson 13's whole report every 50 steps: five minutes on
a quiet core.
"""
import json
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch

from minillm.checkpoints import atomic_write
from minillm.data import Corpus, tokenize_once
from minillm.evaluation import Watch, encode_document, estimate_mean, is_tale, tale_report, token_nats
from minillm.model import PRESETS, MiniLLM
from minillm.sampling import Generator
from minillm.tales import TaleWorld
from minillm.tokenizer import BPETokenizer, Tokenizer
from minillm.training import load_recipe, train

STORE = Path(__file__).resolve().parent.parent / "minillm" / "evaluation.json"
PAIRS = {("fox", "scarf"), ("bear", "kite"), ("rabbit", "hat"), ("mouse", "ball"), ("squirrel", "flag"), ("frog", "ribbon")}
WORLD = TaleWorld("short")


def tales_of(held_out: bool, n: int, seed: int) -> list[str]:
    "`n` tales with one of the held-out pairs, or with none of them."
    told = (t for t in TaleWorld("short", seed=seed).tales() if ((t.facts["kind"], t.facts["object"]) in PAIRS) == held_out)
    return [tale.text for tale in islice(told, n)]


def trained(texts: list[str], watch: Watch, tokenizer: Tokenizer, **changes) -> Generator:
    "The quickstart's model after its recipe on these tales; `watch` looks on."
    recipe = load_recipe("quickstart", evaluate_every=0, progress=False, **changes)
    torch.manual_seed(recipe.train.seed)
    model = MiniLLM(PRESETS[recipe.preset].replace(vocab_size=tokenizer.vocab_size, **recipe.model))
    with tempfile.TemporaryDirectory() as folder:
        corpora = [Corpus("tales-short", split, lambda part=part: iter(part), f"lesson 13 {split}", "short", WORLD.world.version)
                   for split, part in (("train", texts), ("validation", texts[:100]))]
        files = tuple(tokenize_once(corpus, tokenizer, folder, progress=False) for corpus in corpora)
        train(model, files, recipe.train, watch, tokenizer=tokenizer)
    return Generator(model, tokenizer)


def seen_at_a_step(model: MiniLLM, tokenizer: Tokenizer, tales: int, samples: int, questions: int) -> dict:
    "What is kept of lesson 13's report."
    report, _ = tale_report(Generator(model, tokenizer), "short", tales=tales, samples=samples, questions=questions)
    def short(value): return round(value, 4)
    return {"excess": short(report["excess_nats_per_tale"]),
            "by_kind": {kind: short(found["excess"]) for kind, found in report["excess_by_kind"].items()},
            "valid": {name: short(report[f"valid_{name}"]) for name in ("bound", "expected", "share")},
            "distinct_4grams": short(report["distinct_4grams"]),
            "skills": {skill: [short(found["accuracy"]), short(found["belief"])] for skill, found in report["skills"].items()},
            "chance": {skill: short(found["chance"]) for skill, found in report["skills"].items()}}


def around_the_thing(generator: Generator, texts: list[str]) -> dict:
    "Excess (nats a tale) at the word that draws the thing and behind it; how often the tale, told on from there, is valid."
    parses = [WORLD.parse(text) for text in texts]
    paid = token_nats(generator.model, [encode_document(generator.tokenizer, text) for text in texts])
    places, at, behind = [parse.mentions["object"][0] for parse in parses], [], []
    for parse, place, nats in zip(parses, places, paid):
        if len(nats) != len(parse.words) + 1: raise ValueError("a word of several tokens")
        over = [cost + word.log_prob for cost, word in zip(nats.tolist(), parse.words)]
        at.append(over[place])
        behind.append(sum(over[place + 1:]))
    begun = [parse.text[:parse.words[place].end] for parse, place in zip(parses, places)]
    told = generator.generate(begun, temperature=1.0, top_k=None, top_p=1.0, max_new_tokens=180, seed=0)
    valid = sum(is_tale(WORLD, start + rest) for start, rest in zip(begun, told))
    means = {"at the thing": estimate_mean(at), "behind it": estimate_mean(behind)}
    return {"tales": len(texts), "valid": valid, **{name: [round(x, 3) for x in found[:3]] for name, found in means.items()}}


def training(every: int = 50, tales: int = 100, samples: int = 40, questions: int = 20, n: int = 200, **changes) -> dict:
    "The report at every `every` steps, and tales with and without the held-out pairs at the end."
    texts = tales_of(False, 15_200, 0)
    tokenizer = BPETokenizer.train(texts, 1024, pattern="tales")
    watch = Watch(lambda model: seen_at_a_step(model, tokenizer, tales, samples, questions), every)
    generator = trained(texts, watch, tokenizer, **changes)
    chance = [record.pop("chance") for record in watch.records][-1]
    return {"command": "python tools/evaluation_results.py training", "pairs": sorted(map(list, PAIRS)), "questions": questions,
            "samples": samples, "chance": chance, "held out": around_the_thing(generator, tales_of(True, n, 4_000_000)),
            "seen": around_the_thing(generator, tales_of(False, n, 4_000_000)), "records": watch.records}


def store(found: dict, path: Path = STORE) -> None:
    "A line for each record: small, and a change of one is a change of one line."
    head = {key: value for key, value in found.items() if key != "records"}
    records = ",\n".join(json.dumps(record) for record in found["records"])
    with atomic_write(path) as temporary:
        temporary.write_text(f'{{"training": {json.dumps(head)[:-1]}, "records": [\n{records}\n]}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["training"]: sys.exit(__doc__)
    torch.set_num_threads(1)
    store(training())
