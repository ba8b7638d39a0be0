"""A trained run as a model of the package: `python tools/package.py runs/tales-short tales-short`.

Measures it on 1,000 freshly told tales, and keeps the figures in its JSON file.
"""
import sys
import tempfile
from pathlib import Path

from minillm.checkpoints import load_model, read_json, save_model
from minillm.data import TALE_CORPORA, Batches, load_corpus, tokenize_once
from minillm.training import evaluate

PACKAGE = Path(__file__).resolve().parent.parent / "minillm"


def main(run: str, name: str) -> None:
    model, tokenizer, about = load_model(run, "cpu", "float32")
    data = read_json(Path(run) / "recipe.json")["data"]
    if data not in TALE_CORPORA: sys.exit(f"{run} was trained on {data}: only a model of tales is packaged here")
    with tempfile.TemporaryDirectory() as folder:
        tales = load_corpus(data, "validation", max_samples=1000, seed=2_000_000)
        batches = Batches(tokenize_once(tales, tokenizer, folder, progress=False), tokenizer, batch_size=16,
                          sequence_length=model.config.context_length, kind="documents")
        result = evaluate(model, batches)
    info = {"data": data, "recipe": name, "step": about["step"], "loss_nats_per_token": round(result.loss, 4),
            "excess_nats_per_tale": round(result.excess, 3)}
    save_model(PACKAGE / name, model, tokenizer, info=info, flat=True)
    print(name, info)


if __name__ == "__main__": main(*sys.argv[1:])
