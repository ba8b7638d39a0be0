"""The commands as a user meets them: one small run of them all, what they refuse, and the recipes."""
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SHARED

import minillm
import minillm.__main__ as commands
from minillm.__main__ import COMMANDS, main, parse_train
from minillm.checkpoints import RunFolder, save_model
from minillm.interop import save_pretrained
from minillm.model import PRESETS, MiniLLM, ModelConfig
from minillm.tales import TaleWorld, words
from minillm.tokenizer import BPETokenizer
from minillm.training import History, load_recipe

SMALL = ["--n-layers", "1", "--d-model", "32", "--n-heads", "2", "--n-kv-heads", "2", "--d-ff", "32", "--batch-size", "4",
         "--evaluate-batches", "2", "--dtype", "float32", "--device", "cpu", "--no-progress"]
RECIPES = sorted(path.stem for path in Path(minillm.__file__).parent.glob("*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder of its own to stand in, with a text file, and a cache that is not the user's."
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    kept = os.environ.get("MINILLM_CACHE")
    os.environ["MINILLM_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    (folder / "mine.txt").write_text("\n\n".join(tale.text for tale in TaleWorld("short").tales(60)), encoding="utf-8")
    yield folder
    os.chdir(before)
    os.environ.pop("MINILLM_CACHE")
    if kept is not None: os.environ["MINILLM_CACHE"] = kept


@pytest.fixture
def say(place, capsys):
    "Runs a command in this process; gives its exit status, what it printed, and what it complained of."
    def run(*arguments):
        capsys.readouterr()
        try: status = main([str(a) for a in arguments])
        except SystemExit as end: status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err
    return run


def process(*arguments, **options):
    "Runs a command as a process of its own."
    return subprocess.run([sys.executable, "-m", "minillm", *arguments], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def run(place):
    "A run on tales, too short to learn much."
    assert main(["train", "--data", "tales-short", "--tokenizer", "bpe:400:tales", "--max-samples", "200", "--steps", "6",
                 "--warmup-steps", "2", "--learning-rate", "5e-3", "--context-length", "512", "--out-dir", "run", *SMALL]) == 0
    return "run"


# the package and its commands


def test_public_names_are_lazy_and_a_wrong_one_is_named():
    names = dir(minillm)
    assert {"MiniLLM", "Generator", "load", "train", "__version__"} <= set(names) and "torch" not in names
    with pytest.raises(AttributeError, match="'Generater'; its public names are TaleWorld"): getattr(minillm, "Generater")  # noqa: B009
    assert minillm.PRESETS is PRESETS


def test_the_module_prints_its_commands(tmp_path):
    done = process(cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert all(re.search(rf"^  {name} +\w.{{20,}}", done.stdout, re.M) for name in COMMANDS)
    assert list(COMMANDS) == "quickstart tokenize train plot generate chat evaluate race info export scaling".split()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_each_of_its_flags(command, say):
    status, printed, _ = say(command, "--help")
    assert status == 0 and printed.startswith(f"usage: python -m minillm {command}")
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", printed).replace("this help message and exit", "(default)")
    flags = re.findall(r" (--[a-z][\w-]*)(?:, --no-[\w-]+)?(?: (?:\{[^}]*\}\S*|\[STR.*?\]\]|[A-Z|{}]+))? (.*?)\((?:default|required)", text)
    assert {"generate": "--max-new-tokens", "chat": "--top-p", "train": "--learning-rate", "evaluate": "--data", "race": "--tales",
            "info": "--batch-size", "plot": "--out", "export": "--dtype", "scaling": "--max-minutes", "tokenize": "--tokenizer", "quickstart": "--seed"}[command] in dict(flags)
    known = {"--n-layers", "--position", "--rope-theta", "--norm", "--norm-eps", "--norm-position", "--activation"}
    assert not [flag for flag, said in flags if not said.strip() and flag not in known], "flags without a word of help"


def test_version_and_usage_need_no_command(say):
    assert say("--version") == (0, f"minillm {minillm.__version__}\n", "")
    assert say("--help")[0] == say()[0] == 0


# what is refused


def refused(result, wanted: str) -> None:
    "Asserts one clear complaint that matches `wanted`, and an exit status that says so."
    status, printed, complaint = result
    assert status == 1 and "Traceback" not in complaint
    assert re.search(wanted, complaint + printed), complaint + printed
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("name, content, wanted", [
    ("empty.txt", b"", "empty.txt is empty"),
    ("binary.dat", bytes(range(256)) * 4, "binary.dat is a binary file"),
    ("latin.txt", b"caf\xe9 " * 99, "not UTF-8: byte 3 is 0xe9"),
    ("word.txt", b"word", "give more text"),
    ("rows.jsonl", b'{"story": "x"}', "no column 'text', only 'story'"),
    ("missing.txt", None, "no file, folder or corpus 'missing.txt'"),
])
def test_what_cannot_be_read_is_one_clear_line(name, content, wanted, say):
    if content is not None: Path(name).write_bytes(content)
    refused(say("train", "--data", name, "--tokenizer", "bpe:300", "--out-dir", "no", *SMALL), wanted)
    assert not RunFolder("no").latest()


def test_a_text_shorter_than_the_context_is_one_clear_line(say):
    Path("short.txt").write_text(" ".join(tale.text for tale in TaleWorld("short").tales(6)), encoding="utf-8")
    refused(say("train", "--data", "short.txt", "--tokenizer", "char", "--out-dir", "no", "--context-length", "4000", *SMALL),
            r"has \d+ tokens; a row needs 4001: give more text, or a smaller sequence_length")


@pytest.mark.parametrize("arguments, wanted", [
    ("trian", "'trian' is no command; the nearest is 'train'"),
    ("train --learning-rat 1", "Perhaps you meant: --learning-rate"),
    ("generate run --temprature 1", "Perhaps you meant: --temperature"),
    ("train --steps ten", "parsing --steps: invalid literal"),
    ("generate run --top-k 1.5", r"instantiated from \['1.5'\]. Argument helptext: --top-k"),
    ("train --steps 0", "steps must be at least 1"),
    ("train --optimizer adam", "adamw"),
    ("train --resume", "resume needs the out_dir"),
    ("train --resume --out-dir nowhere", "nowhere holds no run to go on with"),
    ("generate tales-shrt", "did you mean 'tales-short'"),
    ("train --preset tinny", "no preset; the nearest is 'tiny'"),
    ("train --recipe mini-50", "no recipe; the nearest is 'mini-50m'"),
    ("train --recipe gone.yaml", "no recipe file gone.yaml"),
    ("train --data mine.txt --out-dir no --device tpu", "device 'tpu' is not available"),
    ("train --data mine.txt --out-dir no --n-heads 3", "no multiple of n_heads = 3"),
    ("train --data mine.txt --out-dir no --tokenizer bp:300", "no tokenizer; the nearest is 'bpe'"),
    ("train --data mine.txt --out-dir no --tokenizer bpe", "give bpe:SIZE"),
    ("train --data mine.txt --out-dir no --tokenizer gone.json", "no tokenizer file gone.json"),
    ("train --data tale-short --out-dir no", "did you mean 'tales-short'"),
    ("generate nowhere --prompt x", "'nowhere' is neither a folder nor a packaged model"),
    ("generate", "MODEL"),
    ("evaluate mine.txt", "neither a folder nor a packaged model"),
    ("plot nowhere", "nowhere holds no run"),
    ("plot", "give the folder of one"),
    ("info mini-50", "the nearest is 'mini-50m'"),
    ("tokenize --data mine.txt", "--out-dir"),
    ("export tales-short", "--to"),
    ("export tales-short --to onnx", "gguf"),
    ("export tales-short --to hf --dtype q8_0", "'q8_0' is no dtype of this export"),
    ("export tales-short --to hf --out mine.txt", "mine.txt holds other things than an exported model"),
    ("export nowhere --to hf", "'nowhere' is neither a folder nor a packaged model"),
    ("generate someone/some-model", "'someone/some-model' is no folder here, and the Hugging Face hub does not answer; offline there are"),
    ("info someone/some-model", "the Hugging Face hub does not answer"),
])
def test_what_makes_no_sense_is_one_clear_complaint(arguments, wanted, say): refused(say(*arguments.split()), wanted)


@pytest.mark.parametrize("text, wanted", [("stepz: 3", "nearest is 'steps'"), ("a: [1", "is not YAML"), ("learning_rate: fast", "must be a number"),
                                         ("- 1", "`name: value`"), ("d_modle: 3", "nearest is 'd_model'"),
                                         ("steps: many", "steps must be a whole number"), ("compile: perhaps", "compile must be True or False"),
                                         ("sample_prompts: Once", "must be a list of texts"), ("data: 5", "data must be a text")])
def test_a_faulty_recipe_is_one_clear_line(text, wanted, say):
    Path("faulty.yaml").write_text(text, encoding="utf-8")
    refused(say("train", "--recipe", "faulty.yaml", "--data", "mine.txt"), wanted)


def test_a_process_fails_with_a_status_and_no_traceback(place):
    Path("empty.txt").write_bytes(b"")
    done = process("train", "--data", "empty.txt")
    assert done.returncode == 1 and done.stderr == "minillm train: empty.txt is empty (0 bytes); expected text in UTF-8\n"
    assert not done.stdout


def test_a_missing_library_is_one_clear_line(run, say, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)                          # as Python marks what cannot be imported
    refused(say("export", run, "--to", "gguf", "--no-tokenizer", "--out", "x.gguf"), "pip install gguf")


def test_a_new_run_does_not_overwrite_an_old_one(run, say):
    before = Path(run, "recipe.json").read_text()
    refused(say("train", "--data", "tales-short", "--out-dir", run), "run holds a run already: go on with it by --resume")
    assert Path(run, "recipe.json").read_text() == before


def test_a_file_where_a_folder_is_wanted_is_one_clear_line(say, tmp_path):
    file = tmp_path / "a-file"
    file.touch()
    refused(say("tokenize", "--data", "tales-short", "--max-samples", 20, "--out-dir", file), "a-file cannot be a folder, for")
    refused(say("train", "--data", "tales-short", "--max-samples", 20, "--steps", 1, "--out-dir", file / "run"), "a-file is a file")


# one run through all commands


def test_quickstart_trains_draws_and_checks(say, monkeypatch):
    short = {"steps": 2, "max_samples": 200, "n_layers": 1, "d_model": 32, "n_heads": 2, "evaluate_batches": 2, "progress": False}
    monkeypatch.setattr("minillm.__main__.load_recipe", functools.partial(load_recipe, **short))
    for folder in ("runs/quickstart", "runs/quickstart-2"):
        status, printed, complaint = say("quickstart", "--samples", "3", "--plots", "pictures")
        assert status == 0 and not complaint and f"generate {folder} --prompt" in printed
        assert "no model can do better than" in printed and "of 3 tales told" in printed
        assert Path("pictures/quickstart.png").is_file() and History.of_run(folder).steps == [1, 2]


def test_resume_alone_repeats_the_settings_of_the_run(run, say):
    recorded = json.loads(Path(run, "recipe.json").read_text())
    status, printed, complaint = say("train", "--out-dir", run, "--resume", "--steps", "9")
    assert status == 0 and not complaint and "9 steps of" in printed and "over the floor" in printed
    assert {**json.loads(Path(run, "recipe.json").read_text()), "steps": 6, "resume": False} == recorded
    assert History.of_run(run).steps == list(range(1, 10))
    refused(say("train", "--out-dir", run, "--resume", "--learning-rate", "1e-2"), "has learning_rate=0.005, now it is 0.01")
    refused(say("train", "--out-dir", run, "--resume", "--n-layers", "2"), "has n_layers|holds a run with n_layers=1")


def test_generate_continues_prompts_from_flags_and_from_standard_input(run, say, monkeypatch):
    flags = ["--max-new-tokens", "5", "--seed", "1", "--temperature", "0.8", "--top-k", "20", "--top-p", "0.9"]
    _, three, _ = say("generate", run, "--prompts", "Once", "One day", "In", *flags)
    assert [text[:2] for text in three.rstrip("\n").split("\n\n")] == ["On", "On", "In"]
    _, twice, _ = say("generate", run, "--prompt", "Once", "--num-samples", "2", *flags)
    assert twice.count("Once") >= 2 and three.startswith(twice.split("\n\n")[0])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n"))
    assert say("generate", run, *flags) == (0, twice.split("\n\n")[0] + "\n", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert say("generate", run, *flags)[0] == 0
    refused(say("generate", run, "--prompt", "x", "--top-p", "2"), "top_p must be above 0")
    refused(say("generate", run, "--prompt", "Once " * 600), r"has \d+ tokens and the context")


def test_a_model_as_it_is_packaged_can_be_generated_from_and_evaluated(run, say):
    known = minillm.load(run, "cpu")
    save_model("packed", known.model, known.tokenizer, info={"data": "tales-short"}, flat=True)
    assert say("generate", "packed", "--prompt", "Once", "--max-new-tokens", "4")[1].startswith("Once")
    assert "over the floor" in say("evaluate", "packed", "--max-samples", "5", "--samples", "0")[1]
    save_model("unknown", known.model, known.tokenizer)
    refused(say("evaluate", "unknown"), "nobody recorded what unknown was trained on: say --data")


def test_chat_streams_until_quit(run):
    done = process("chat", run, "--max-new-tokens", "4", input="Once upon\na time\nquit\nnever\n")
    assert done.returncode == 0 and not done.stderr
    assert len(done.stdout.rstrip("\n").split("\n")) == 2


def test_chat_ends_with_its_input_and_survives_a_message_that_is_too_long(run, say, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once " * 600 + "\nOnce\n"))
    status, printed, _ = say("chat", run, "--max-new-tokens", "4")
    assert status == 0 and printed.startswith("(") and "the context" in printed and len(printed.splitlines()) == 2


def test_evaluate_prints_loss_floor_excess_and_valid_share(run, say):
    status, printed, complaint = say("evaluate", run, "--max-samples", "30", "--samples", "4")
    assert status == 0 and not complaint
    loss, perplexity = (float(n.replace(",", "")) for n in re.search(r"loss (\S+) nats a token, perplexity (\S+), on", printed).groups())
    assert abs(perplexity - 2.718281828**loss) < 0.01 * perplexity
    nats, floor, excess = map(float, re.search(r"([\d.]+) nats a tale; .* than ([\d.]+) on average: ([\d.]+) ", printed).groups())
    assert 30 < floor < 40 and abs(nats - floor - excess) < 0.02
    failed, position = re.search(r"\n\n  (.*) >>> word (\d+) is", printed).groups()
    assert len(words(failed)) == int(position), "the tale is shown up to the word that could not be"
    assert re.search(r"\d of 4 tales told at temperature 1 are valid \(\d+%\); at least exp\(-[\d.]+\) = 0% must be", printed)


def test_evaluate_takes_other_data_and_the_runs_own_where_it_now_stands(run, say, place):
    status, printed, _ = say("evaluate", run, "--data", "mine.txt")
    assert status == 0 and "loss" in printed and "floor" not in printed
    Path(run).rename("moved")
    try: assert say("evaluate", "moved", "--max-samples", "5", "--samples", "0")[0] == 0
    finally: Path("moved").rename(run)


@pytest.mark.parametrize("flags, window", [([], 2048), (["--sequence-length", "64"], 64)])
def test_a_model_of_the_hub_with_a_long_context_reads_in_windows(say, monkeypatch, flags, window):
    tokenizer = BPETokenizer.train([Path("mine.txt").read_text(encoding="utf-8")], 300, pattern="gpt2")
    model = MiniLLM(ModelConfig(vocab_size=300, context_length=32768, d_model=16, n_layers=1, n_heads=2))
    if not Path("long").exists(): save_pretrained(model, tokenizer, "long")
    seen, report = [], commands.text_report
    monkeypatch.setattr(commands, "text_report", lambda *given, **settings: (seen.append(settings), report(*given, **settings))[1])
    status, printed, _ = say("evaluate", "long", "--data", "mine.txt", "--samples", "0", *flags)
    assert status == 0 and "bits a byte" in printed and seen[0]["window"] == window
    assert seen[0]["training"] is None, "nobody knows what it was trained on"


def test_evaluate_writes_a_report_and_its_picture(run, say):
    Path("questions.jsonl").write_text("".join(json.dumps({"context": "Once", "choices": choices, "answer": 0}) + "\n"
                                               for choices in (["upon", "there was"], ["there", "a"], ["upon a time", "x"])), encoding="utf-8")
    status, printed, _ = say("evaluate", run, "--max-samples", "20", "--samples", "3", "--json", "reports/tales.json", "--choices", "questions.jsonl",
                             "--shots", "1")
    assert status == 0 and "of 2 questions right" in printed and "right answers (chance): hero" in printed
    report = json.loads(Path("reports/tales.json").read_text())
    keys = {"excess_nats_per_tale", "excess_interval", "loss_nats_per_token", "floor_nats_per_token", "valid_share", "new_share", "skills", "choices"}
    assert keys <= report.keys() and report["samples"] == 3 and report["tales"] == 20
    assert Path("reports/tales.png").read_bytes().startswith(b"\x89PNG")
    status, printed, _ = say("evaluate", run, "--data", "mine.txt", "--samples", "2", "--json", "reports/text.json", "--stride", "100")
    assert status == 0 and "bits a byte" in printed and "copied" not in printed, "it was trained on something else"
    assert {"loss_nats_per_token", "bits_per_byte", "distinct_4grams"} <= json.loads(Path("reports/text.json").read_text()).keys()
    refused(say("evaluate", run, "--max-samples", "2", "--samples", "0", "--choices", "questions.jsonl", "--shots", "3"), "shots is 3, and questions.jsonl has 3")


@pytest.fixture(scope="module")
def racer(place):
    "A run that may race."
    assert main(["train", "--data", "tales", "--tokenizer", "bpe:700:tales", "--max-samples", "60", "--steps", "3", "--context-length", "512",
                 "--out-dir", "racer", *SMALL]) == 0
    return "racer"


def test_the_race_scores_fresh_tales_and_can_be_repeated(racer, say):
    status, first, complaint = say("race", racer, "--tales", "12")
    assert status == 0 and not complaint
    seed, excess, floor = re.search(r"--seed (\d+)\n([\d.]+) nats a tale over the floor of ([\d.]+)", first).groups()
    assert float(excess) > float(floor) and f"{sum(r['tokens'] for r in RunFolder(racer).metrics() if 'loss' in r):,} tokens of training" in first
    assert say("race", racer, "--tales", "12", "--seed", seed) == (0, first, "")
    assert f"--seed {seed}\n" not in say("race", racer, "--tales", "12")[1], "fresh every time"


def test_who_may_not_race_is_told_why(racer, run, say, monkeypatch):
    refused(say("race", run), "run cannot race: it was trained on tales-short, and only 'tales', the full world, is allowed")
    monkeypatch.setitem(minillm.__main__.RACE, "tokens", 10)
    refused(say("race", racer), r"it was trained on [\d,]+ tokens, and 10 are allowed")
    monkeypatch.setitem(minillm.__main__.RACE, "parameters", 100)
    refused(say("race", racer), r"it has [\d,]+ parameters, and 100 are allowed")
    known = minillm.load(racer, "cpu")
    monkeypatch.undo()
    save_model("stray", known.model, known.tokenizer)
    refused(say("race", "stray"), "nobody recorded what it was trained on")


def test_plot_draws_one_run_or_several(run, say):
    assert say("plot", run) == (0, f"{Path('plots/loss.png')}\n", "")
    assert say("plot", run, run, "--out", "other/two.svg")[0] == 0
    assert Path("plots/loss.png").read_bytes().startswith(b"\x89PNG") and "<svg" in Path("other/two.svg").read_text(encoding="utf-8")


def test_info_of_a_preset_a_run_and_all(run, say):
    _, printed, _ = say("info", "gpt2", "--batch-size", "2", "--sequence-length", "100")
    assert "124,439,808" in printed and "2 x 100 tokens" in printed and "FLOPs a token" in printed and "to run" in printed
    tokens = 100 * 2 * 6 * 124_439_808
    training = int(re.search(r"forward, ([\d,]+) in training", printed)[1].replace(",", ""))
    assert 0.9 < 200 * training / tokens < 1.1, "about six operations a parameter and token"
    model = minillm.load(run, device="cpu").model
    assert f"{model.num_parameters():,}" in say("info", run)[1]
    save_model("flat", model, info={"data": "mine.txt"}, flat=True)
    assert f"{model.num_parameters():,}" in say("info", "flat")[1]
    assert all(name in say("info")[1] for name in PRESETS)


def test_a_folder_that_tokenize_made_can_be_trained_on(say):
    status, printed, _ = say("tokenize", "--data", "mine.txt", "--out-dir", "tokens", "--tokenizer", "unigram:300")
    assert status == 0 and re.search(r"train +\d+ documents +[\d,]+ tokens", printed)
    arguments = ["train", "--data", "tokens", "--steps", "2", "--context-length", "16", *SMALL]
    assert say(*arguments, "--out-dir", "on-tokens")[0] == 0
    assert not list(Path("on-tokens").glob("data/*"))
    assert minillm.load("on-tokens", device="cpu").tokenizer.kind == "unigram"
    assert "the longest span it copied from its training" in say("evaluate", "on-tokens")[1]
    refused(say(*arguments, "--out-dir", "no", "--max-samples", "3"), "give max_samples to `tokenize`")
    refused(say("train", "--data", "tokens", "--tokenizer", "char", "--out-dir", "no"), "no text in folder|0 token files")


def test_a_run_can_start_from_another(run, say):
    start = ["train", "--data", "tales-short", "--max-samples", "50", "--init-from", run, "--steps", "2", "--batch-size", "2",
             "--evaluate-batches", "1", "--no-progress"]
    assert say(*start, "--out-dir", "further")[0] == 0
    assert minillm.load("further", "cpu").tokenizer.fingerprint == minillm.load(run, "cpu").tokenizer.fingerprint
    refused(say(*start, "--out-dir", "no", "--n-layers", "2"), "init_from brings its own shape: leave out n_layers")


def test_an_exported_folder_opens_wherever_a_run_does(run, say, monkeypatch):
    assert say("export", run, "--to", "hf", "--out", "exports/mine") == (0, f"{Path('exports/mine')}\n", "")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} == {
        file.name for file in Path("exports/mine").iterdir()}
    card = Path("exports/mine/README.md").read_text(encoding="utf-8")
    assert "`tales-short`: tales that a program tells" in card and "| validation loss nats a token |" in card and "| steps | " in card
    same = ["--prompt", "Once", "--max-new-tokens", "8", "--temperature", "0"]
    assert say("generate", run, *same) == say("generate", "exports/mine", *same)
    assert say("info", run)[1].splitlines()[:3] == say("info", "exports/mine")[1].splitlines()[:3]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n"))
    assert say("chat", "exports/mine", "--max-new-tokens", "4")[0] == 0
    losses = [re.search("loss (\\S+) ", say("evaluate", name, "--data", "tales-short", "--max-samples", "10", "--samples", "0")[1])[1]
              for name in (run, "exports/mine")]
    assert losses[0] == losses[1]
    assert say("train", "--data", "tales-short", "--max-samples", "50", "--init-from", "exports/mine", "--steps", "2", "--batch-size", "2",
               "--evaluate-batches", "1", "--no-progress", "--out-dir", "from-export")[0] == 0
    again = minillm.load("from-export", "cpu")
    assert again.tokenizer.encode("Once upon a time") == minillm.load(run, "cpu").tokenizer.encode("Once upon a time")
    assert say("export", "exports/mine", "--to", "hf", "--dtype", "bfloat16", "--out", "exports/half")[0] == 0
    assert "license: unknown" in (card := Path("exports/half/README.md").read_text(encoding="utf-8")) and "The weights are those of `mine`" in card
    assert say("export", "from-export", "--to", "hf", "--out", "exports/further")[0] == 0
    assert "It did not start from nothing, but from `mine`." in Path("exports/further/README.md").read_text(encoding="utf-8")
    assert Path("exports/half/model.safetensors").stat().st_size < 0.6 * Path("exports/mine/model.safetensors").stat().st_size


def test_a_gguf_is_written_with_a_tokenizer_that_llama_cpp_knows_or_without(run, say):
    pytest.importorskip("gguf")
    refused(say("export", run, "--to", "gguf", "--out", "mine.gguf"), "llama.cpp knows no way of cutting a text by the pattern")
    assert not Path("mine.gguf").exists()
    assert say("export", run, "--to", "gguf", "--out", "mine.gguf", "--no-tokenizer", "--dtype", "f16")[0] == 0
    assert Path("mine.gguf").read_bytes().startswith(b"GGUF")


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_ctrl_c_leaves_a_checkpoint_that_resumes(place, say):
    arguments = ["train", "--data", "mine.txt", "--tokenizer", "char", "--steps", "100000", "--evaluate-every", "0",
                 "--context-length", "16", "--out-dir", "stopped", *SMALL]
    with subprocess.Popen([sys.executable, "-m", "minillm", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        log, end = Path("stopped/metrics.jsonl"), time.monotonic() + 60
        while time.monotonic() < end and (not log.is_file() or log.read_bytes().count(b"\n") < 3): time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        printed, complaint = child.communicate(timeout=60)
    assert child.returncode == 130 and complaint == "minillm train: stopped\n"
    assert "train --out-dir stopped --resume" in printed
    reached = History.of_run("stopped").steps[-1]
    assert RunFolder("stopped").latest().name == f"step-{reached}"
    assert say("train", "--out-dir", "stopped", "--resume", "--steps", str(reached + 2))[0] == 0
    assert History.of_run("stopped").steps == list(range(1, reached + 3))


# what stands over what


def test_a_flag_stands_over_the_recipe_and_the_recipe_over_the_preset():
    Path("mine.yaml").write_text("# Mine.\npreset: tiny-51m\nn_layers: 3\ndropout: 0.2\nlearning_rate: 2e-3\nepochs: 4\ndata: mine.txt\n", encoding="utf-8")
    recipe = parse_train(["--recipe", "mine.yaml", "--n-layers", "5", "--seed=7", "--out-dir", "x"])
    assert recipe.model == {"n_layers": 5, "dropout": 0.2} and (recipe.preset, recipe.data) == ("tiny-51m", "mine.txt")
    assert (recipe.train.learning_rate, recipe.train.seed, recipe.train.epochs) == (2e-3, 7, 4)
    shape = PRESETS["tiny-51m"].replace(**recipe.model)
    assert (shape.n_layers, shape.dropout, shape.d_model, shape.position) == (5, 0.2, 512, "learned")


def test_steps_stand_over_the_epochs_of_a_recipe():
    assert parse_train(["--recipe", "mini-sinusoidal", "--steps", "3"]).train.epochs is None
    assert parse_train(["--recipe", "mini-sinusoidal"]).train.epochs == 20


def test_what_follows_from_another_field_follows_its_flag():
    shape = PRESETS["tiny"].replace(**parse_train(["--preset", "tiny", "--n-heads", "2", "--d-model", "64"]).model)
    assert (shape.n_heads, shape.n_kv_heads, shape.head_dim) == (2, 2, 32)


def test_switches_are_switches():
    recipe = parse_train(["--recipe", "mini-50m", "--no-compile", "--gradient-checkpointing", "--window", "64"])
    assert not recipe.train.compile and recipe.train.gradient_checkpointing and recipe.model == {"window": 64}
    assert parse_train(["--rope-scaling", "{kind: linear, factor: 2.0}"]).model == {"rope_scaling": {"kind": "linear", "factor": 2.0}}


def test_a_run_has_a_folder_unless_it_is_not_wanted(place):
    Path("runs/mine").mkdir(parents=True)
    assert parse_train(["--data", "some/mine.txt"]).train.out_dir == "runs/mine-2"
    assert parse_train(["--data", "a:0.5,b.txt:0.5"]).train.out_dir == "runs/a-0.5-b-0.5"
    assert parse_train(["--out-dir", "None"]).train.out_dir is None


# recipes


@pytest.mark.parametrize("name, values", [
    ("mini-50m", dict(batch_size=16, sequence_length=512, accumulate=4, steps=5000, learning_rate=6e-4, min_learning_rate=6e-5, warmup_steps=200,
                      weight_decay=0.1, beta1=0.9, beta2=0.95, clip=1.0, dtype="bfloat16", compile=True)),
    ("tiny-51m", dict(steps=100_000, clip=1.0)),
    ("small-20m", dict(learning_rate=3e-4, warmup_steps=2000, batch_size=32, accumulate=8, steps=50_000, dtype="float16", gradient_checkpointing=True)),
    ("mini-sinusoidal", dict(epochs=20, batch_size=32, learning_rate=1e-3, sequence_length=128)),
    ("small-4b", dict(batch_size=4, learning_rate=3e-4, epochs=5)),
])
def test_recipes_have_the_values_they_are_known_by(name, values):
    recipe = load_recipe(name)
    assert {field: getattr(recipe.train, field) for field in values} == values
    assert recipe.preset == name and not recipe.model


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_starts_and_takes_two_steps(name, say, monkeypatch):
    "Shrunk in size, not in kind: the same family, precision, optimizer and schedule."
    recipe = load_recipe(name)
    begun = load_recipe(Path(recipe.init_from).name) if recipe.init_from else recipe
    shape = PRESETS[begun.preset].replace(**begun.model)
    assert recipe.about.endswith(".") and len(recipe.about) > 40
    flags = ["--steps", "2", "--batch-size", "2", "--evaluate-batches", "1", "--no-progress", "--device", "cpu", "--no-compile"]
    small = ["--n-layers", "2", "--d-model", "48", "--d-ff", "64",
             "--n-heads", "6", "--n-kv-heads", "6" if shape.n_kv_heads == shape.n_heads else "2", "--head-dim", "8"]
    if recipe.train.accumulate > 1: flags += ["--accumulate", "2"]
    if recipe.data.startswith("tales"): flags += ["--max-samples", "300"]
    else:
        flags += ["--data", stand_in(recipe.data), "--sequence-length", "32", "--context-length", "64"]
        if recipe.tokenizer.startswith("bpe"): flags += ["--tokenizer", "bpe:300"]
        elif recipe.tokenizer == "gpt2" and not (SHARED / "tiktoken_cache").exists(): flags += ["--tokenizer", "bpe:300:gpt2"]
    if recipe.init_from:
        assert say("train", "--recipe", Path(recipe.init_from).name, *flags, *small, "--out-dir", f"begun-{name}")[0] == 0
        small = ["--init-from", f"begun-{name}"]
    status, printed, complaint = say("train", "--recipe", name, *flags, *small, "--out-dir", f"recipe-{name}")
    assert status == 0, complaint
    assert History.of_run(f"recipe-{name}").steps == [1, 2]
    model, recorded = minillm.load(f"recipe-{name}", "cpu").model.config, json.loads(Path(f"recipe-{name}/recipe.json").read_text())
    for field in ("position", "norm", "norm_position", "activation", "bias", "qk_norm", "tie_embeddings", "dropout"):
        assert getattr(model, field) == getattr(shape, field)
    assert (recorded["optimizer"], recorded["dtype"]) == (recipe.train.optimizer, recipe.train.dtype)


def stand_in(corpus: str) -> str:
    "A local file of the same columns as a corpus that would be downloaded, or takes long to read."
    if corpus not in ("tinystories", "wikitext-103"): return "mine.txt"
    if not Path(f"{corpus}.parquet").exists():
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        texts = [tale.text for tale in TaleWorld("short", seed=3).tales(80)]
        parquet.write_table(pyarrow.table({"text": texts}), f"{corpus}.parquet")
    return f"{corpus}.parquet"
