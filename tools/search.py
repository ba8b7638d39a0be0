"""What was tried for the recipes of the tales, the quickstart's first of all: each variant gets the same time of one CPU core, and is then measured.

    python tools/search.py quickstart 120      two minutes of training a variant, each appended to tools/search.json
    python tools/search.py tales 300 "3 layers" "d_model 192"      these variants only
    python tools/search.py                     the table of what was tried, as README.md shows it

The seconds are the process's own, so a busy machine is no excuse. A variant that stands in the file is not run again.
"""
import copy
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import torch

from minillm.__main__ import start_model
from minillm.checkpoints import read_json, write_json
from minillm.data import TALE_CORPORA, prepare
from minillm.evaluation import score_tales
from minillm.model import MiniLLM
from minillm.tales import TaleWorld
from minillm.training import load_recipe, train

RESULTS = Path(__file__).with_name("search.json")
COMMON = {"max_samples": 32_000, "evaluate_every": 0, "progress": False}
VARIANTS = {
    "the recipe": {},
    "Muon, 1e-2": {"learning_rate": 1e-2},
    "Muon, 1.2e-3": {"learning_rate": 1.2e-3},
    "AdamW, 3e-3": {"optimizer": "adamw", "learning_rate": 3e-3},
    "3 layers": {"n_layers": 3},
    "16 tales a step": {"batch_size": 16},
    "4 tales a step": {"batch_size": 4},
    "2 heads": {"n_heads": 2},
    "no weight decay": {"weight_decay": 0.0},
    "cosine schedule": {"schedule": "cosine"},
    "constant, the last half cooled down": {"schedule": "wsd", "cooldown_share": 0.5},
    "d_model 192": {"d_model": 192, "n_heads": 6, "d_ff": 384},
    "no norm on queries and keys": {"qk_norm": False},
    "1 layer": {"n_layers": 1},
    "tied embeddings": {"tie_embeddings": True},
    "Muon, 5e-3": {"learning_rate": 5e-3},
    "AdamW, 1e-3": {"optimizer": "adamw", "learning_rate": 1e-3},
    "d_model 96": {"d_model": 96, "n_heads": 3, "d_ff": 192},
    "512 tokens in the vocabulary": {"tokenizer": "bpe:512:tales"},
}


def try_variant(name: str, changes: dict, seconds: float, folder: str) -> dict:
    "Train one variant of the recipe `name` for so many seconds of CPU time; what it reached on 500 unseen tales."
    recipe = load_recipe(name, **{**COMMON, **changes})
    fresh, tokenizer = start_model(recipe)
    files = prepare(recipe.data, tokenizer, folder, max_samples=recipe.max_samples, progress=False)[0]
    def run(steps: int) -> tuple[float, MiniLLM]:
        model, start = copy.deepcopy(fresh), time.process_time()
        train(model, files, dataclasses.replace(recipe.train, steps=steps), tokenizer=tokenizer)
        return time.process_time() - start, model
    run(20)                                         # the first steps of a process are slow
    a_step = (run(120)[0] - run(20)[0]) / 100
    steps = max(50, round(seconds / a_step))
    spent, model = run(steps)
    world = TaleWorld(TALE_CORPORA[recipe.data], seed=3_000_000)
    scores = score_tales(model, tokenizer, world, (tale.text for tale in world.tales(500)), kinds=True)
    return {"parameters": model.num_parameters(), "steps": steps, "seconds": round(spent),
            "excess_nats_per_tale": round(scores.excess.value, 2), "interval": [round(scores.excess.low, 2), round(scores.excess.high, 2)],
            "recall": round(scores.kind_excess["recall"].value, 2)}


def table(results: dict) -> str:
    "What was tried, the best first."
    rows = ["| variant | parameters | steps | CPU seconds | nats a tale over the floor | of it at words that recall what was said |", "|---|---|---|---|---|---|"]
    for name, r in sorted(results.items(), key=lambda row: row[1]["excess_nats_per_tale"]):
        rows.append(f"| {name} | {r['parameters']:,} | {r['steps']:,} | {r['seconds']} | {r['excess_nats_per_tale']:.2f} | {r['recall']:.2f} |")
    return "\n".join(rows)


def main(name: str = "", seconds: str = "60", *wanted: str) -> None:
    results = read_json(RESULTS) if RESULTS.exists() else {}
    torch.set_num_threads(1)
    for variant, changes in VARIANTS.items() if name else ():
        tried = results.setdefault(name, {})
        if variant in tried or (wanted and variant not in wanted): continue
        with tempfile.TemporaryDirectory() as folder: tried[variant] = try_variant(name, changes, float(seconds), folder)
        write_json(RESULTS, results)
        print(variant, tried[variant], flush=True)
    for recipe, tried in results.items(): print(f"\n{recipe}\n\n{table(tried)}")


if __name__ == "__main__": main(*sys.argv[1:])
