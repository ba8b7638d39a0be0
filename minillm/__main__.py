"""The command line, `python -m minillm COMMAND`: the roof of the house. It parses, calls what the lessons built, and prints.

By hand. Flags are made by tyro from the functions below and from the lessons' dataclasses; their docstrings and
comments are the help. What goes wrong is one line on standard error and a non-zero exit status.
"""
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import math
import os
import re
import secrets
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import torch
import tyro
import yaml
from tyro.conf import OmitArgPrefixes, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from . import __version__
from .budget import count_parameters, flops_per_token, inference_memory, training_memory
from .checkpoints import RunFolder, choose_device, find_model, load_model, packaged_models, read_json, write_json
from .data import TALE_CORPORA, TokenFile, load_corpus, prepare
from .evaluation import (
    is_tale,
    load_choices,
    plot_report,
    score_choices,
    score_tales,
    tale_report,
    tell_tales,
    text_report,
    training_record,
)
from .interop import hub_model_config, is_hub_folder, is_hub_id, open_model, save_pretrained, to_gguf
from .model import PRESETS, MiniLLM, ModelConfig, check_choice
from .sampling import GenerationConfig, Generator
from .scaling import continue_from, missing_jobs, run_sweep, save_results
from .tales import TaleError, TaleWorld, join, words
from .tokenizer import (
    PATTERNS,
    BPETokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    UnigramTokenizer,
    load_tokenizer,
)
from .training import (
    Evaluation,
    History,
    Plan,
    Recipe,
    TrainConfig,
    TrainingError,
    load_recipe,
    make_recipe,
    plot_losses,
)
from .training import train as train_model

PROGRAM = "python -m minillm"
ModelName = Annotated[str, Positional, arg(metavar="MODEL")]
Sampling = OmitArgPrefixes[GenerationConfig]


# ---- the commands --------------------------------------------------------------------------------------------------


def quickstart(*, seed: int = 0, out_dir: str = "runs/quickstart", plots: Path = Path("plots"),
               samples: int = 200) -> None:
    """From nothing to a model that tells tales: two minutes of one CPU core, nothing to download.

    Trains a small model on freshly told tales, draws its loss beside the lowest that any model can reach, and checks
    what it tells.

    Args:
        seed: of the tales, the model and the samples
        out_dir: the run's folder; one that is taken gets a number
        plots: the folder of the picture, quickstart.png
        samples: tales that the model tells, and that are checked
    """
    world = TaleWorld("short", seed=seed)
    print("Three tales of the storyteller, who knows the exact probability of each:\n")
    for tale in world.tales(3): print(f"  {tale.text}\n  (its log-probability: {tale.log_prob:.1f} nats)\n")
    recipe = load_recipe("quickstart", seed=seed, out_dir=free_folder(out_dir))
    generator, history = run_recipe(recipe)
    plots.mkdir(parents=True, exist_ok=True)
    history.plot(plots / "quickstart.png")
    result = history.evaluations[max(history.evaluations)]
    report_evaluation(result)
    report_told("short", tell_tales(generator, samples, seed=seed), result.excess, show=2)
    print(f"\nThe curve: {plots / 'quickstart.png'}. Now try:\n"
          f"  {PROGRAM} generate {recipe.train.out_dir} --prompt \"Once upon a time\"")


def tokenize(*, data: str, out_dir: Path, tokenizer: str = "auto", field: str = "text", max_samples: int | None = None,
             seed: int = 0) -> None:
    """Train a tokenizer, or take one, and write a corpus as token files, which `train --data OUT_DIR` takes.

    Args:
        data: a named corpus, a file, a folder, a hub id, or a mixture such as "tales:0.7,notes.txt:0.3"
        out_dir: the folder for the token files and tokenizer.json
        tokenizer: auto, char, bpe:SIZE, bpe:SIZE:PATTERN, unigram:SIZE, sentencepiece:SIZE, gpt2, or a tokenizer.json
        field: the column of .jsonl, .parquet and hub data that holds the text
        max_samples: documents to read; None: all
        seed: of the tales, and of the split into training and validation
    """
    made = make_tokenizer(tokenizer, data, field, max_samples, seed)
    files = prepare(data, made, out_dir, max_samples=max_samples, seed=seed, field=field)
    made.save(out_dir / "tokenizer.json")
    for name, tokens in zip(("train", "validation"), files):
        print(f"{name:10} {tokens.n_documents:>9,} documents {tokens.n_tokens:>12,} tokens   {tokens.path}")
    print(f"{'tokenizer':10} {made.vocab_size:>9,} entries   {out_dir / 'tokenizer.json'}")


def train(recipe: Recipe) -> None:
    "Train a model; a recipe, a preset and single flags say how. Ctrl-C leaves a checkpoint that --resume goes on from."
    out_dir = recipe.train.out_dir
    _, history = run_recipe(recipe)
    if history.evaluations: report_evaluation(history.evaluations[max(history.evaluations)])
    if out_dir: print(f"The run is in {out_dir}. Now try:\n  {PROGRAM} generate {out_dir} --num-samples 3")


def plot(runs: Annotated[tuple[str, ...], Positional, arg(metavar="RUN...")], *,
         out: Path = Path("plots/loss.png")) -> None:
    """Draw the loss curves of finished runs, several in one picture.

    Args:
        runs: folders of runs
        out: the picture: .png, .svg or .pdf
    """
    if not runs: raise ValueError("which runs? give the folder of one, or of several")
    curves = {run if len(runs) > 1 else "": History.of_run(run) for run in runs}
    out.parent.mkdir(parents=True, exist_ok=True)
    plot_losses(curves).figure.savefig(out, dpi=150)
    print(out)


def generate(model: ModelName, *, prompt: str | None = None, prompts: tuple[str, ...] = (), num_samples: int = 1,
             device: str = "auto", sampling: Sampling = GenerationConfig()) -> None:
    """Continue one prompt, several, or what stands on standard input.

    Args:
        model: a run, a saved model's folder, a packaged name, a folder as Hugging Face has them, or a hub id
        prompt: the text to continue; with none, and nothing on standard input, the model begins by itself
        prompts: several texts to continue, each by itself
        num_samples: continuations of each prompt
        device: auto, cpu, cuda or mps
        sampling: how to continue
    """
    if num_samples < 1: raise ValueError(f"num_samples must be at least 1; it is {num_samples}")
    generator = Generator(*open_model(model, device)[:2])
    wanted = [*([] if prompt is None else [prompt]), *prompts]
    if not wanted: wanted = [sys.stdin.read().rstrip("\r\n") if not sys.stdin.isatty() else ""]
    wanted = [text for text in wanted for _ in range(num_samples)]
    told = generator.generate(wanted, **dataclasses.asdict(sampling))
    print("\n\n".join(text + more for text, more in zip(wanted, told)))


def chat(model: ModelName, *, device: str = "auto", sampling: Sampling = GenerationConfig()) -> None:
    """Type, and the model goes on with your text as you watch; `quit` ends. It was not trained to answer.

    Args:
        model: a run, a saved model's folder, a packaged name, a folder as Hugging Face has them, or a hub id
        device: auto, cpu, cuda or mps
        sampling: how to continue
    """
    session, prompt = Generator(*open_model(model, device)[:2]).chat(), "> " if sys.stdin.isatty() else ""
    while True:
        try: text = input(prompt)
        except EOFError: return
        if text.strip() == "quit": return
        try:
            for piece in session.stream(text, **dataclasses.asdict(sampling)): print(piece, end="", flush=True)
        except ValueError as error: print(f"({error})", end="")
        print(flush=True)


def evaluate(model: ModelName, *, data: str | None = None, field: str | None = None, max_samples: int | None = None,
             samples: int | None = None, json: Path | None = None, sequence_length: int | None = None,
             stride: int | None = None, choices: Path | None = None, shots: int = 0, seed: int = 0,
             device: str = "auto") -> None:
    """What a model is worth on unseen text: loss, bits a byte; on tales the excess, what is valid and new, and skills.

    Args:
        model: a run, a saved model's folder, a packaged name, a folder as Hugging Face has them, or a hub id
        data: a corpus, whose validation part is taken; None: what the model was trained on. Tales are told afresh
        field: the column that holds the text; None: as in training
        max_samples: documents to read; None: 1,000 of tales, as in training of others
        samples: texts that the model tells, to check, or to seek in its training text; None: 200 tales, 20 others
        json: a file for all figures; a picture of the same name is drawn beside it
        sequence_length: tokens that the model sees at a time in text that is no tale; None: its context, 2,048 at most
        stride: tokens from one such window to the next; None: half a window
        choices: multiple-choice questions, a .jsonl file of {"context", "choices", "answer"}, asked as well
        shots: questions at the file's beginning that are shown answered before each of the others
        seed: of the tales, told and checked
        device: auto, cpu, cuda or mps
    """
    found, tokenizer, about = open_model(model, device, "float32")
    generator, recorded = Generator(found, tokenizer), run_settings(model)
    recipe, known = make_recipe(recorded), recorded.get("data") or about.get("data")
    if not (data or known): raise ValueError(f"nobody recorded what {model} was trained on: say --data")
    if data and data != known: recipe = dataclasses.replace(recipe, max_samples=None)
    recipe = dataclasses.replace(recipe, data=data or known, field=field or recipe.field,
                                 max_samples=max_samples or recipe.max_samples)
    if recipe.data in TALE_CORPORA:
        report, texts = tale_report(generator, TALE_CORPORA[recipe.data], tales=max_samples or 1000,
                                    samples=200 if samples is None else samples, seed=seed,
                                    training=training_record(model))
        report_tales(report, texts)
    else:
        files = token_files(recipe, tokenizer)
        training, unseen = (decoded(part, tokenizer) for part in files)
        if (found.config.max_length or 0) > 2048: sequence_length = sequence_length or 2048     # else memory runs out
        report, texts = text_report(generator, unseen, window=sequence_length, stride=stride,
                                    samples=20 if samples is None else samples, seed=seed,
                                    training=training if recipe.data == known else None)
        report_text(report)
    if choices: report["choices"] = ask_choices(generator, choices, shots)
    if json: write_report(json, {"model": model, "data": recipe.data, "parameters": found.num_parameters(), **report})


def race(run: ModelName, *, tales: int = 1000, seed: int | None = None, device: str = "auto") -> None:
    """The race to the floor: nats a tale over it on freshly told tales of the full world, the same way for everybody.

    A model may have 1,000,000 parameters and have been trained on 10,000,000 tokens of the full world's tales.

    Args:
        run: a run's folder, or a packaged name
        tales: how many are told
        seed: of the tales; None: a fresh one, which is printed so that a score can be repeated
        device: auto, cpu, cuda or mps
    """
    found, tokenizer, _ = load_model(run, device, "float32")
    record = training_record(run)
    if refusal := not_in_race(found, record): raise ValueError(f"{run} cannot race: {refusal}")
    if seed is None: seed = secrets.randbits(48)
    world = TaleWorld("full", seed=seed)
    scores = score_tales(found, tokenizer, world, (tale.text for tale in world.tales(tales)))
    excess = scores.excess
    print(f"{found.num_parameters():,} parameters, {record['tokens']:,} tokens of training (by the run's own log)")
    print(f"{tales:,} tales of the full world, version {world.version}, told with --seed {seed}")
    print(f"{excess.value:.3f} nats a tale over the floor of {scores.floor:.3f} ({excess.value / scores.floor:.2%}); "
          f"95 % interval {excess.low:.3f} to {excess.high:.3f}")


def info(name: Annotated[str, Positional, arg(metavar="PRESET|MODEL")] = "", *, batch_size: int = 1,
         sequence_length: int | None = None) -> None:
    """Parameters, memory and FLOPs a token of a preset, a run or a saved model; without a name, all presets.

    Args:
        name: a preset, a run, a saved model's folder, a packaged name, a folder as Hugging Face has them, or a hub id
        batch_size: texts at a time
        sequence_length: tokens in each; None: the context length
    """
    if not name:
        for preset, config in PRESETS.items():
            print(f"{preset:16} {sum(count_parameters(config).values()):>14,} parameters  {config.n_layers:>3} layers "
                  f"of {config.d_model:>5}  context {config.context_length:>7,}")
        return
    config, length = find_config(name), sequence_length
    if name in PRESETS and name in packaged_models(): print(f"{name} is a preset and a packaged model, which is shown")
    length = length or config.context_length
    parts = {part: number for part, number in count_parameters(config).items() if number}
    print(f"parameters     {sum(parts.values()):,} ({', '.join(f'{part} {n:,}' for part, n in parts.items())})")
    size = f"{batch_size} x {length} tokens"
    report_memory("to train", training_memory(config, batch_size, length), f"{size}, AdamW, float32")
    report_memory("to run", inference_memory(config, batch_size, length), f"{size}, bfloat16")
    forward, both = (flops_per_token(config, length, training=training) for training in (False, True))
    print(f"FLOPs a token  {forward:,} forward, {both:,} in training")
    shape = [f"{field} = {value}" for field, value in config.to_dict().items()]
    print(f"{'shape':15}" + f"\n{'':15}".join(shape))


def scaling(*, out_dir: Path = Path("runs/scaling"), results: Path | None = None,
            max_minutes: float = math.inf) -> None:
    """The sweep behind lesson 15: small models of many sizes and lengths of training. Killed, it goes on where it was.

    All of it is about an hour and a half of one quiet CPU core; one process at a time. `--results minillm/scaling.json`
    continues the course's own sweep.

    Args:
        out_dir: the sweep's folder
        results: the file for points and forecast, written after each point; None: scaling.json in OUT_DIR. If it is
            there and OUT_DIR is new, what it holds is not trained again
        max_minutes: no further point is begun after so many
    """
    torch.set_num_threads(1)
    target = results or out_dir / "scaling.json"
    continue_from(target, out_dir)

    def report(points: list[dict]) -> None:
        save_results(out_dir, target)
        for p in points:
            unit = p["documents"] if p["floor"] else p["targets"]
            loss = f"{p['nats'] / unit:8.3f} nats a {'tale' if p['floor'] else 'token'}"
            above = f", {(p['nats'] - p['floor']) / unit:7.3f} over the floor" if p["floor"] else ""
            cooled = "cooled" if p["cooled"] else "trunk "
            print(f"{p['corpus']:11} width {p['width']:4} {p['tokens']:>11,} tokens {cooled} {loss}{above}", flush=True)

    rows = run_sweep(out_dir, report, max_seconds=60 * max_minutes)
    save_results(out_dir, target)
    print(f"{len(rows)} points in {target}; {len(missing_jobs(rows))} branches to go")


def export(model: ModelName, *, to: Literal["hf", "gguf"], out: Path | None = None, dtype: str = "auto",
           tokenizer: bool = True, license: str | None = None) -> None:
    """Write a model for other programs: a folder that transformers loads and the hub takes, or a file for llama.cpp.

    Args:
        model: a run, a saved model's folder, a packaged name, a folder as Hugging Face has them, or a hub id
        to: hf: a folder with config, weights, tokenizer and model card; gguf: one file with model and tokenizer
        out: the folder or file to write; None: exports/NAME or exports/NAME.gguf
        dtype: of the weights; hf: float32, bfloat16, float16; gguf: f32, f16, q8_0; auto: float32, f32
        tokenizer: write it too; without, the other program takes and gives ids
        license: the licence that the model card names; None: mit, but unknown for weights that came from elsewhere
    """
    check_choice("dtype of this export", dtype, ["auto", *(["float32", "bfloat16", "float16"] if to == "hf" else
                                                           ["f32", "f16", "q8_0"])])
    found, its_tokenizer, about = open_model(model, "cpu", "float32")
    taken = its_tokenizer if tokenizer else None
    target = out or Path("exports") / (Path(model).name + (".gguf" if to == "gguf" else ""))
    if to == "hf":
        kept = None if dtype == "auto" else getattr(torch, dtype)
        save_pretrained(found, taken, target, dtype=kept, info=known_of(model, about), license=license)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        to_gguf(found, taken, target, "f32" if dtype == "auto" else dtype, name=Path(model).name)
    print(target)


# ---- what they share -----------------------------------------------------------------------------------------------


TRAINED = {"bpe": BPETokenizer, "unigram": UnigramTokenizer, "sentencepiece": SentencePieceTokenizer}


def make_tokenizer(spec: str, data: str, field: str = "text", max_samples: int | None = None,
                   seed: int = 0) -> Tokenizer:
    """The tokenizer that `spec` describes; one that must be trained learns from the first 20 MB of the corpus `data`.

    auto: what `tokenize` left in the folder `data`; else bpe:1024:tales for tales, bpe:2048:gpt4 for other text.
    ValueError or FileNotFoundError for a spec that means nothing.
    """
    if spec == "auto":
        ready = Path(data) / "tokenizer.json"
        spec = str(ready) if ready.is_file() else "bpe:1024:tales" if data in TALE_CORPORA else "bpe:2048:gpt4"
    if spec == "gpt2": return BPETokenizer.from_tiktoken("gpt2")
    for file in (Path(spec), Path(spec) / "tokenizer.json"):
        if file.is_file(): return load_tokenizer(file)
    if spec.endswith(".json"): raise FileNotFoundError(f"there is no tokenizer file {spec}")
    kind, *details = spec.split(":")
    check_choice("tokenizer", kind, ["auto", "char", "gpt2", *TRAINED])
    texts = first_characters(load_corpus(data, max_samples=max_samples, seed=seed, field=field), 20_000_000)
    if spec == "char": return CharTokenizer.train(texts, unknown="<|unknown|>")
    if kind not in TRAINED or not 1 <= len(details) <= 2 or not details[0].isdigit():
        raise ValueError(f"tokenizer {spec!r} says too little or too much; give {kind}:SIZE, such as bpe:2048")
    if kind == "sentencepiece": choices, keyword = ("bpe", "unigram"), "model_type"
    else: choices, keyword = PATTERNS, "pattern"
    for detail in details[1:]: check_choice(f"{keyword} of a tokenizer", detail, choices)
    detail = details[1] if len(details) == 2 else "bpe" if kind == "sentencepiece" else "gpt4"
    return TRAINED[kind].train(texts, int(details[0]), **{keyword: detail})


def first_characters(corpus: Iterable[str], limit: int) -> Iterator[str]:
    "The documents of a corpus until `limit` characters have been read."
    read = 0
    for document in corpus:
        yield document
        if (read := read + len(document)) >= limit: return


def run_recipe(recipe: Recipe) -> tuple[Generator, History]:
    "From a recipe to a trained model: data, tokenizer, model, loop."
    config = recipe.train
    choose_device(config.device)            # what cannot work is said before the long work
    check_folder(config)
    model, tokenizer = start_model(recipe)
    print(f"Training on {recipe.data}" + (f"; the run is in {config.out_dir}" if config.out_dir else ""), flush=True)
    if model.num_parameters() < 5e6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)            # a second one gains little here, and loses much on a busy machine
    files = token_files(recipe, tokenizer)

    def continue_prompts(model: MiniLLM, prompts: tuple[str, ...]) -> list[str]:
        return Generator(model, tokenizer).generate(prompts, max_new_tokens=60, seed=config.seed)

    def describe(plan: Plan) -> None:
        if config.out_dir: write_recipe(recipe)
        report_plan(plan, model.config, config)

    try: history = train_model(model, files, config, tokenizer=tokenizer, sample=continue_prompts, describe=describe)
    except KeyboardInterrupt:
        if config.out_dir and (latest := RunFolder(config.out_dir).latest()):
            print(f"To go on from {latest}: {PROGRAM} train --out-dir {config.out_dir} --resume")
        raise
    return Generator(model, tokenizer), history


def start_model(recipe: Recipe) -> tuple[MiniLLM, Tokenizer]:
    "A new model and its tokenizer, or those of the run that is to go on, or of the model to start from."
    config = recipe.train
    torch.manual_seed(config.seed)
    started = RunFolder(config.out_dir).latest() if config.resume and config.out_dir else None
    if recipe.init_from:
        if recipe.model: raise ValueError(f"init_from brings its own shape: leave out {', '.join(recipe.model)}")
        model, tokenizer, _ = open_model(started or recipe.init_from, "cpu", "float32")
        if tokenizer is None: raise ValueError(f"{recipe.init_from} has no tokenizer: no text can be made into ids")
        return model, tokenizer
    check_choice("preset", recipe.preset, PRESETS)
    shape = PRESETS[recipe.preset].replace(**recipe.model)      # a shape that cannot be is an error before the data
    spec = str(started.parent / "tokenizer.json") if started else recipe.tokenizer
    tokenizer = make_tokenizer(spec, recipe.data, recipe.field, recipe.max_samples, config.seed)
    return MiniLLM(shape.replace(**{"vocab_size": tokenizer.vocab_size, **recipe.model})), tokenizer


def check_folder(config: TrainConfig) -> None:
    "ValueError where a new run would stand in the folder of an old one, or where there is none to go on with."
    if not config.out_dir: return
    if config.resume:
        if not run_settings(config.out_dir): raise ValueError(f"{config.out_dir} holds no run to go on with")
        return
    if RunFolder(config.out_dir).latest() or RunFolder(config.out_dir).metrics():
        raise ValueError(f"{config.out_dir} holds a run already: go on with it by --resume, or choose another "
                         "--out-dir")


def token_files(recipe: Recipe, tokenizer: Tokenizer) -> tuple[TokenFile, TokenFile]:
    "The token files of a recipe: those that `tokenize` left in its data folder, or made for it in the run's folder."
    folder = Path(recipe.data)
    if not folder.is_dir() or not any(folder.glob("*.tokens")):
        return prepare(recipe.data, tokenizer, data_folder(recipe.train.out_dir), max_samples=recipe.max_samples,
                       seed=recipe.train.seed, field=recipe.field, progress=recipe.train.progress)
    if recipe.max_samples:
        raise ValueError(f"{folder} holds token files: give max_samples to `tokenize`, which made them")
    found = [tokens for tokens in map(TokenFile, sorted(folder.glob("*.tokens")))
             if tokens.header["fingerprint"] == tokenizer.fingerprint]
    if sorted(tokens.header["split"] for tokens in found) != ["train", "validation"]:
        raise ValueError(f"{folder} has {len(found)} token files of this tokenizer, not one of a training and one of a "
                         "validation part: run `tokenize` once more, with another --out-dir")
    return found[0], found[1]       # sorted by split


def data_folder(out_dir: str | None = None) -> Path:
    "Where token files are kept: in the run's folder, else among what this computer keeps for minillm."
    return Path(out_dir or os.environ.get("MINILLM_CACHE", "~/.cache/minillm")).expanduser() / "data"


def decoded(tokens: TokenFile, tokenizer: Tokenizer) -> Iterator[str]:
    "The documents of a token file, as text."
    for begin, end in itertools.pairwise(tokens.documents.tolist()): yield tokenizer.decode(tokens.tokens[begin+1:end])


RACE = {"data": "tales", "parameters": 1_000_000, "tokens": 10_000_000}


def not_in_race(model: MiniLLM, record: Mapping) -> str:
    "Why a model may not race; nothing if it may."
    if (n := model.num_parameters()) > RACE["parameters"]:
        return f"it has {n:,} parameters, and {RACE['parameters']:,} are allowed"
    if model.config.prefix: return "with prefix > 0 it sees the words that it is to predict"
    if not record: return f"nobody recorded what it was trained on; train it by `{PROGRAM} train --data tales`"
    if other := set(record["data"]) - {RACE["data"]}:
        return f"it was trained on {', '.join(sorted(other))}, and only {RACE['data']!r}, the full world, is allowed"
    if (n := record["tokens"]) > RACE["tokens"]:
        return f"it was trained on {n:,} tokens, and {RACE['tokens']:,} are allowed"
    return ""


def ask_choices(generator: Generator, path: Path, shots: int) -> dict:
    "The scores of multiple-choice questions in a file, of which the first `shots` are examples."
    items = load_choices(path)
    if not 0 <= shots < len(items): raise ValueError(f"shots is {shots}, and {path} has {len(items)} questions")
    score = score_choices(generator.model, generator.tokenizer, items[shots:], examples=items[:shots])
    print(f"{score.accuracy.value:.1%} of {score.accuracy.n} questions right, {score.by_length.value:.1%} when costs "
          f"are divided by length; {score.chance:.1%} by chance")
    return {"questions": score.accuracy.n, "shots": shots, "accuracy": score.accuracy.value,
            "interval": [score.accuracy.low, score.accuracy.high], "accuracy_by_length": score.by_length.value,
            "chance": score.chance}


def write_report(path: Path, report: dict) -> None:
    "All figures of an evaluation as JSON, and a picture of them beside it."
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    picture = path.with_suffix(".png")
    plot_report(report).savefig(picture, dpi=150)
    print(f"\nThe report: {path}; its picture: {picture}")


def write_recipe(recipe: Recipe) -> None:
    "Keeps the settings of a run beside it, side by side as in a recipe, for `--resume`, `evaluate` and whoever asks."
    own = {name: getattr(recipe, name) for name in RECIPE_FIELDS}
    write_json(Path(recipe.train.out_dir) / "recipe.json", {**own, **recipe.model, **dataclasses.asdict(recipe.train)})


def run_settings(folder: str | Path) -> dict:
    "The settings of the run in `folder` (or of the step folder in it), wherever it stands now; {}: there are none."
    for place in (Path(folder), Path(folder).parent):
        if (place / "recipe.json").is_file(): return {**read_json(place / "recipe.json"), "out_dir": str(place)}
    return {}


def known_of(model: str, about: Mapping) -> dict:
    "What is recorded of a model, for its card: the settings of its run, and the evaluation of the step that it is."
    settings = run_settings(model)
    shape = ["init_from"] if settings.get("init_from") else ["tokenizer", "preset"]     # it brings its own of both
    wanted = ("data", *shape, "steps", "batch_size", "optimizer", "learning_rate", "seed")
    recorded = {name: settings[name] for name in wanted if name in settings}
    found = next((record for record in RunFolder(model).metrics()
                  if "validation_loss" in record and record["step"] == about.get("step")), {})
    figures = {"validation_loss_nats_a_token": found.get("validation_loss"), "excess_nats_a_tale": found.get("excess")}
    return {**recorded, **{name: round(value, 4) for name, value in figures.items() if value is not None}, **about}


def free_folder(wanted: str) -> str:
    "`wanted`, or wanted-2, wanted-3, ...: the first that is not there yet."
    names = itertools.chain([wanted], (f"{wanted}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def find_config(name: str) -> ModelConfig:
    "The configuration of a preset, or of anything that `open_model` opens, without its weights."
    if name in PRESETS and name not in packaged_models(): return PRESETS[name]
    if is_hub_folder(name) or is_hub_id(name): return hub_model_config(name)
    try: return ModelConfig.from_dict(read_json(find_model(name)[1])["model"])
    except FileNotFoundError:
        known = [*PRESETS, *packaged_models()]
        if not Path(name).exists(): check_choice("preset, run, model or hub id (OWNER/NAME)", name, known)
        raise


# ---- what they print -----------------------------------------------------------------------------------------------


def report_plan(plan: Plan, shape: ModelConfig, config: TrainConfig) -> None:
    memory = training_memory(shape, config.batch_size, config.sequence_length or shape.context_length,
                             optimizer=config.optimizer, dtype=plan.dtype,
                             gradient_checkpointing=config.gradient_checkpointing)
    print(f"{plan.parameters:,} parameters, about {gigabytes(sum(memory.values()))} of memory; {plan.steps:,} steps of "
          f"{plan.tokens_per_step:,} tokens, about {duration(plan.seconds)} on {plan.device} in {plan.dtype} "
          f"({plan.dtype_reason})", flush=True)


def report_memory(what: str, parts: Mapping[str, int], setting: str) -> None:
    listed = ", ".join(f"{part} {gigabytes(size)}" for part, size in parts.items() if size)
    print(f"{what:14} {gigabytes(sum(parts.values()))} for {setting} ({listed})")


def report_evaluation(result: Evaluation) -> None:
    perplexity = math.exp(min(result.loss, 700.0))          # beyond, a float has no room
    print(f"loss {result.loss:.4f} nats a token, perplexity {perplexity:,.3f}, on {result.tokens:,} tokens")
    if result.excess is None: return
    tales = result.documents
    print(f"{result.nats / tales:.2f} nats a tale; no model can do better than {result.floor / tales:.2f} on average: "
          f"{result.excess:.2f} ({100 * (result.nats - result.floor) / result.floor:.1f} %) over the floor")


def report_tales(report: Mapping, texts: list[str], show: int = 1) -> None:
    "What a `tale_report` found: the price, what is valid and new, the skills; and some of the tales."
    floor, excess, (low, high) = (report[k] for k in ("floor_nats_per_tale", "excess_nats_per_tale", "excess_interval"))
    print(f"loss {report['loss_nats_per_token']:.4f} nats a token, perplexity {report['perplexity']:,.3f}, on "
          f"{report['tokens']:,} tokens; {report['bits_per_byte']:.4f} bits a byte")
    print(f"{floor + excess:.2f} nats a tale; no model can do better than {floor:.2f} on average: {excess:.2f} "
          f"({report['excess_percent']:.1f} %) over the floor; 95 % interval {low:.2f} to {high:.2f}")
    print("of which " + ", ".join(f"{kind} {k['excess']:.2f}" for kind, k in report["excess_by_kind"].items()))
    if texts: report_told(report["world"], texts, excess, report["new_share"], show)
    if "skills" in report:
        print("\nright answers (chance): " + ", ".join(f"{skill} {s['accuracy']:.0%} ({s['chance']:.0%})"
                                                       for skill, s in report["skills"].items()))


def report_told(world_name: str, texts: list[str], excess: float, new_share: float | None = None,
                show: int = 1) -> None:
    "How many of the told tales are valid, and new; and some of them, up to the word that fails."
    world, samples = TaleWorld(world_name), len(texts)
    valid = [text for text in texts if is_tale(world, text)]
    print(f"{len(valid)} of {samples} tales told at temperature 1 are valid ({len(valid) / max(samples, 1):.0%}); "
          f"at least exp(-{excess:.2f}) = {math.exp(-excess):.0%} must be, on average")
    if new_share is not None: print(f"{new_share:.1%} of the valid ones are new: not among the tales of its training")
    for text in valid[:show]: print(f"\n  {text}")
    for text in [text for text in texts if text not in valid][:show]:
        try: world.parse(text)
        except TaleError as error: print(f"\n  {join(words(text)[:error.position])} >>> {error}")


def report_text(report: Mapping) -> None:
    "What a `text_report` found."
    print(f"loss {report['loss_nats_per_token']:.4f} nats a token, perplexity {report['perplexity']:,.3f}, on "
          f"{report['tokens']:,} tokens, {report['documents']:,} documents; {report['bits_per_byte']:.4f} bits a byte")
    if report["lossy"]: print(f"{report['lossy']:,} documents hold what the tokenizer cannot spell: that cost nothing")
    if "copied_words_most" in report:
        print(f"the longest span it copied from its training: {report['copied_words_most']} words (median "
              f"{report['copied_words_median']:.0f}): {report['copied_most']}")


def gigabytes(n_bytes: float) -> str: return f"{n_bytes / 1e9:,.2f} GB" if n_bytes > 1e8 else f"{n_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    if seconds < 120: return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---- parsing -------------------------------------------------------------------------------------------------------


RECIPE_FIELDS = [f.name for f in dataclasses.fields(Recipe) if f.name not in ("about", "model", "train")]
YAML_FLAG = PrimitiveConstructorSpec(nargs=1, metavar="YAML", instance_from_str=lambda found: yaml.safe_load(found[0]),
                                     is_instance=lambda value: value is None or isinstance(value, dict),
                                     str_from_instance=lambda value: [str(value)])


def model_flags() -> type:
    "ModelConfig as flags: its fields with their comments, unchecked, so that one that is derived may follow another."
    comments = dict(re.findall(r"^    (\w+): .*?# (.+)$", inspect.getsource(ModelConfig), re.M))
    comments["vocab_size"] = "None: as many as the tokenizer has"
    found = []
    for name, hint in get_type_hints(ModelConfig).items():
        if "dict" in str(hint): hint = Annotated[hint, YAML_FLAG]
        if name == "vocab_size": hint = hint | None
        found.append((name, Annotated[hint, arg(help=comments.get(name, ""))], None))
    return dataclasses.make_dataclass("ModelFlags", found, kw_only=True, frozen=True,
                                      namespace={"__doc__": "The model's shape, where it differs from the preset's."})


ModelFlags = model_flags()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Train a model. A flag stands over the recipe, a recipe over the preset; defaults are those of both.

    Ctrl-C leaves a checkpoint. `--out-dir RUN --resume`, with nothing else, goes on with that run's own settings.
    """
    recipe: str | None                  # a recipe of the package (mini-50m, ...) or a YAML file of your own
    data: str                           # a named corpus, file, folder, hub id, or mixture "tales:0.7,notes.txt:0.3"
    field: str                          # the column of .jsonl, .parquet and hub data that holds the text
    max_samples: int | None             # documents to read; None: all
    tokenizer: str                      # auto, char, bpe:SIZE, bpe:SIZE:PATTERN, unigram:SIZE, gpt2, a tokenizer.json
    preset: str                         # the model's shape: `info` lists them
    init_from: str | None               # a run, saved model or packaged name whose weights and tokenizer to start from
    training: OmitArgPrefixes[TrainConfig]      # the update, the machine, what is watched and kept
    model: OmitArgPrefixes[ModelFlags]          # fields of ModelConfig that differ from the preset's


def given_flags(arguments: list[str]) -> dict[str, str]:
    "Each flag and the word after it, before anything is parsed: some change what the others default to."
    found = {}
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            found[flag.replace("-", "_")] = value if equals else following
    return found


def parse_flags(command: Callable, name: str, arguments: list[str], **more):
    "`tyro.cli`, whose box of an error becomes a ValueError of one line."
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(command, prog=f"{PROGRAM} {name}", args=arguments, **more)
    except SystemExit as end:
        if not end.code: raise                                  # after --help
        lines = [line.strip(" │╰╯") for line in box.getvalue().splitlines()[1:]]
        parts = re.split(r"^[─-]{10,}$|^Got errors:$", "\n".join(lines), flags=re.MULTILINE)
        said = [" ".join(part.split()).rstrip(".") for part in parts]
        kept = [part for part in said if part and not part.startswith(("For full help", "- <class"))]
        raise ValueError(". ".join(kept)) from None


def parse_train(arguments: list[str]) -> Recipe:
    "The recipe that the flags of `train` describe: they stand over the run's own settings to resume, or a recipe's."
    given = given_flags(arguments)
    recorded = run_settings(given["out_dir"]) if {"resume", "out_dir"} <= given.keys() else {}
    base = make_recipe(recorded) if recorded else load_recipe(given["recipe"]) if "recipe" in given else make_recipe({})
    own = {name: given[name] if name in given and name in ("data", "preset") else getattr(base, name)
           for name in RECIPE_FIELDS}
    check_choice("preset", own["preset"], PRESETS)
    shape = {**PRESETS[own["preset"]].replace(**base.model).to_dict(), "vocab_size": base.model.get("vocab_size")}
    training = base.train
    if "steps" in given and "epochs" not in given: training = dataclasses.replace(training, epochs=None)
    if training.out_dir is None and "resume" not in given:      # whoever trains from here wants to keep the model
        name = re.sub(r"\.[a-z]+", "", Path(given.get("recipe") or own["data"]).name)
        folder = "runs/" + (re.sub(r"[^\w.-]+", "-", name) or "run")
        training = dataclasses.replace(training, out_dir=free_folder(folder))
    default = TrainFlags(recipe=given.get("recipe"), **own, training=training, model=ModelFlags(**shape))
    found = parse_flags(TrainFlags, "train", arguments, default=default)
    changes = {name: value for name, value in vars(found.model).items() if value != shape[name]}
    return Recipe(**{name: getattr(found, name) for name in RECIPE_FIELDS}, model={**base.model, **changes},
                  train=found.training)


def later(command: Callable) -> Callable:
    "With the same flags: the call, not yet made."
    return functools.wraps(command)(lambda *values, **named: functools.partial(command, *values, **named))


COMMANDS: dict[str, Callable] = {"quickstart": quickstart, "tokenize": tokenize, "train": train, "plot": plot,
                                 "generate": generate, "chat": chat, "evaluate": evaluate, "race": race, "info": info,
                                 "export": export, "scaling": scaling}

USAGE = f"usage: {PROGRAM} COMMAND [OPTIONS]\n\n" + "\n".join(
    f"  {name:11} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()) + (
    f"\n\n`{PROGRAM} COMMAND --help` lists the options of one.")


def main(arguments: list[str] | None = None) -> int:
    "Runs one command; returns its exit status."
    os.environ.setdefault("MPLBACKEND", "agg")                  # pictures go to files, on machines without a screen too
    warnings.filterwarnings("ignore", "Mismatch dtype")         # of RMSNorm under autocast: slower, and timed
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if name in ("--version", "-V"): print(f"minillm {__version__}")
        elif name in ("--help", "-h"): print(USAGE)
        else:
            check_choice("command", name, COMMANDS)
            if name == "train": train(parse_train(rest))
            else: parse_flags(later(COMMANDS[name]), name, rest)()
        sys.stdout.flush()
    except BrokenPipeError:                                     # whoever read has gone: `| head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, TrainingError) as error:
        said = str(error)
        if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
            wanted = Path(error.filename)
            file = next((path for path in (wanted, *wanted.parents) if path.is_file()), wanted)
            said = f"{wanted} cannot be a folder, for {file} is a file"
        print(f"minillm {name}: {' '.join(said.split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"minillm {name}: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__": sys.exit(main())
