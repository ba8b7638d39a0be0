"""A trained run as a model of the package: `python tools/package.py runs/tales-short tales-short`; `python tools/package.py` draws their curves.

Measures it (on 1,000 freshly told tales; on the first 200 unseen documents of other text), and keeps the figures in its
JSON file, with its curve and what it was trained on: for tales enough to tell them all again.
"""
import hashlib
import sys
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt

from minillm.checkpoints import load_model, read_json, read_lines, save_model
from minillm.data import TALE_CORPORA, load_corpus
from minillm.evaluation import tale_report, text_report, training_record
from minillm.sampling import Generator

PACKAGE = Path(__file__).resolve().parent.parent / "minillm"
KEPT = ("excess_nats_per_tale", "excess_interval", "loss_nats_per_token", "floor_nats_per_token", "valid_share", "valid_bound", "new_share",
        "samples", "tales", "bits_per_byte", "documents")


def unseen(data: str) -> list[str]:
    "The documents that a model of real text is measured on."
    return list(islice(load_corpus(data, "validation"), 200))


def fingerprint(documents: list[str]) -> str:
    "Of a corpus that differs from one Python to another: figures hold for this text."
    return hashlib.blake2b("\0".join(documents).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def curve(run: Path) -> list[list[float]]:
    "Tokens of training, in millions, and nats over the floor a tale (other text: nats a token) at each evaluation, those of the run it began from first."
    start, points = read_json(run / "recipe.json")["init_from"], []
    before = curve(Path(start)) if start else []
    tokens = before[-1][0] * 1e6 if before else 0
    for row in read_lines(run / "metrics.jsonl"):
        tokens += row.get("tokens", 0)
        if "validation_loss" not in row: continue
        loss = row["validation_loss"] if row["excess"] is None else row["excess"]
        points.append([round(tokens / 1e6, 3), round(loss, 3)])
    return before + points


def draw(path: Path) -> None:
    "How far the packaged models of tales were from the floor along their training."
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for name in ("tales", "tales-short"):
        tokens, excess = zip(*read_json(PACKAGE / f"{name}.json")["info"]["curve"])
        axes.plot(tokens, excess, ".-", label=name)
    axes.set(yscale="log", xlabel="million tokens of training", ylabel="nats a tale over the floor")
    axes.yaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(run: str = "", name: str = "") -> None:
    if not run: return draw(PACKAGE.parent / "plots" / "packaged.png")
    model, tokenizer, about = load_model(run, "cpu", "float32")
    data, generator = read_json(Path(run) / "recipe.json")["data"], Generator(model, tokenizer)
    info = {"data": data, "recipe": name, "step": about["step"], "training": training_record(run), "curve": curve(Path(run))}
    if data in TALE_CORPORA:
        report, _ = tale_report(generator, TALE_CORPORA[data], samples=1000, questions=0, training=info["training"])
    else:
        documents = unseen(data)
        info["fingerprint"] = fingerprint(documents)
        report, _ = text_report(generator, documents)
    info |= {key: round(value, 4) if isinstance(value, float) else value for key, value in report.items() if key in KEPT}
    save_model(PACKAGE / name, model, tokenizer, info=info, flat=True)
    print(name, info)


if __name__ == "__main__": main(*sys.argv[1:])
