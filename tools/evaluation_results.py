"""What lesson 13 and README.md show and a lesson has no time for; each command writes its part of minillm/evaluation.json.

    python tools/evaluation_results.py training        how skills come: the quickstart's recipe on tales without six pairs of an animal and
                                                       a thing, with lesson 13's whole report every 50 steps; eight minutes of CPU
    python tools/evaluation_results.py temperatures    a thousand tales of each packaged model at five temperatures; ten minutes
"""
import json
import math
import sys
import tempfile
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from statistics import fmean

import torch

from minillm.checkpoints import atomic_write, load_model, read_json
from minillm.data import TALE_CORPORA, Corpus, tokenize_once
from minillm.evaluation import (
    Estimate,
    Watch,
    copy_report,
    encode_document,
    estimate_mean,
    estimate_share,
    is_tale,
    retell,
    seen_among,
    tale_report,
    tell_tales,
    token_nats,
)
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


def seen_at_a_step(model: MiniLLM, tokenizer: Tokenizer, learnt: list[str], groups: dict, **wanted) -> dict:
    "What is kept of lesson 13's report, with copies from the tales that were `learnt` and the prices of each group of tales around the thing."
    report, told = tale_report(Generator(model, tokenizer), "short", **wanted)
    def short(value): return round(value, 4)
    return {"excess": short(report["excess_nats_per_tale"]),
            "by_kind": {kind: short(found["excess"]) for kind, found in report["excess_by_kind"].items()},
            "valid": {name: short(report[f"valid_{name}"]) for name in ("bound", "expected", "share")},
            "distinct_4grams": short(report["distinct_4grams"]), "copied_words": copy_report(told, learnt)["copied_words_median"],
            "pairs": {name: [short(e.value) for e in around_the_thing(model, tokenizer, some).values()] for name, some in groups.items()},
            "skills": {skill: [short(found["accuracy"]), short(found["belief"])] for skill, found in report["skills"].items()},
            "chance": {skill: short(found["chance"]) for skill, found in report["skills"].items()}}


def around_the_thing(model: MiniLLM, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Estimate]:
    "Excess, in nats a tale, at the word that draws the thing and behind it."
    parses, at, behind = [WORLD.parse(text) for text in texts], [], []
    for parse, nats in zip(parses, token_nats(model, [encode_document(tokenizer, text) for text in texts])):
        if len(nats) != len(parse.words) + 1: raise ValueError("a word of several tokens")
        over, place = [cost + word.log_prob for cost, word in zip(nats.tolist(), parse.words)], parse.mentions["object"][0]
        at.append(over[place])
        behind.append(sum(over[place + 1:]))
    return {"at the thing": estimate_mean(at), "behind it": estimate_mean(behind)}


def told_on(generator: Generator, texts: list[str]) -> dict:
    "The prices around the thing; and how many of the tales are valid when the model tells them on from there."
    parses, prices = [WORLD.parse(text) for text in texts], around_the_thing(generator.model, generator.tokenizer, texts)
    begun = [parse.text[:parse.words[parse.mentions["object"][0]].end] for parse in parses]
    told = generator.generate(begun, temperature=1.0, top_k=None, top_p=1.0, max_new_tokens=180, seed=0)
    valid = sum(is_tale(WORLD, start + rest) for start, rest in zip(begun, told))
    return {"tales": len(texts), "valid": valid, **{name: [round(x, 3) for x in found[:3]] for name, found in prices.items()}}


def training(every: int = 50, tales: int = 100, samples: int = 40, questions: int = 20, n: int = 200, **changes) -> dict:
    "The report at every `every` steps, and tales with and without the held-out pairs."
    texts, groups = tales_of(False, 15_200, 0), {name: tales_of(name == "held out", n, 4_000_000) for name in ("held out", "seen")}
    tokenizer = BPETokenizer.train(texts, 1024, pattern="tales")
    wanted = {"tales": tales, "samples": samples, "questions": questions}
    watch = Watch(lambda model: seen_at_a_step(model, tokenizer, texts, groups, **wanted), every)
    generator = trained(texts, watch, tokenizer, **changes)
    chance = [record.pop("chance") for record in watch.records][-1]
    return {"command": "python tools/evaluation_results.py training", "pairs": sorted(map(list, PAIRS)), "questions": questions,
            "samples": samples, "chance": chance, **{name: told_on(generator, some) for name, some in groups.items()},
            "world itself": copy_report([tale.text for tale in TaleWorld("short", seed=5_000_000).tales(samples)], texts)["copied_words_median"],
            "records": watch.records}


def temperatures(names: tuple = ("tales", "tales-short"), grid: tuple = (0.2, 0.4, 0.6, 0.8, 1.0), samples: int = 1000) -> dict:
    """What packaged models tell at each temperature: how much is valid, new, different from the rest; `names_in_use`, how many equally
    frequent heroes would have the same entropy; `surprise`, the nats that the storyteller itself pays for a valid tale."""
    records = []
    for name in names:
        model, tokenizer, about = load_model(name, "cpu", "float32")
        generator, world = Generator(model, tokenizer), TaleWorld(TALE_CORPORA[about["data"]])
        told = {T: tell_tales(generator, samples, temperature=T) for T in grid}
        valid = {T: [text for text in texts if is_tale(world, text)] for T, texts in told.items()}
        seen = seen_among(list(chain.from_iterable(valid.values())), chain.from_iterable(map(retell, about["training"]["tales"])))
        for T in grid:
            share, parses = estimate_share(len(valid[T]), samples), [world.parse(text) for text in valid[T]]
            heroes = [count / len(parses) for count in Counter(parse.facts["hero"] for parse in parses).values()]
            records.append({"model": name, "temperature": T, "valid": [round(x, 3) for x in share[:3]],
                            "new": round(fmean(text not in seen for text in valid[T]), 4), "different": len(set(told[T])) / samples,
                            "names_in_use": round(math.exp(-sum(p * math.log(p) for p in heroes)), 1),
                            "surprise": round(fmean(-parse.log_prob for parse in parses), 2)})
            print(records[-1], flush=True)
    return {"command": "python tools/evaluation_results.py temperatures", "samples": samples, "records": records}


def store(part: str, found: dict, path: Path = STORE) -> None:
    "A line for each record: small, and a change of one is a change of one line. The other parts of the file stay."
    def lines(found: dict) -> str:
        head = {key: value for key, value in found.items() if key != "records"}
        records = ",\n".join(json.dumps(record) for record in found["records"])
        return f'{json.dumps(head)[:-1]}, "records": [\n{records}\n]}}'
    parts = {**(read_json(path) if path.exists() else {}), part: found}
    text = ",\n".join(f'"{name}": {lines(content)}' for name, content in parts.items())
    with atomic_write(path) as temporary: temporary.write_text("{" + text + "}\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    commands = {"training": training, "temperatures": temperatures}
    if len(sys.argv) != 2 or sys.argv[1] not in commands: sys.exit(__doc__)
    store(sys.argv[1], commands[sys.argv[1]]())
