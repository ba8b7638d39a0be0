"""What was saved is what comes back, a kill at any moment leaves something whole, and every error names its file."""
import filecmp
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import checkpoints
from minillm.checkpoints import (
    RunFolder,
    atomic_folder,
    atomic_write,
    choose_device,
    choose_dtype,
    find_model,
    load_model,
    load_state,
    load_tensors,
    load_weights,
    mend_folders,
    named_tensors,
    random_state,
    restore_random_state,
    save_model,
    save_state,
    save_tensors,
)
from minillm.model import MiniLLM, ModelConfig
from minillm.optimizers import OPTIMIZERS, make_optimizer, restore_optimizer
from minillm.tokenizer import BPETokenizer, CharTokenizer

CONFIG = ModelConfig(vocab_size=12, context_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=32, dropout=0.1)
posix = pytest.mark.skipif(os.name != "posix", reason="kills a forked process")


@pytest.fixture
def model() -> MiniLLM: return MiniLLM(CONFIG)


@pytest.fixture
def tokenizer() -> CharTokenizer: return CharTokenizer.train(["abcdefghij"])


def weights_of(model): return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b) -> bool:
    "Equal all the way down, types included."
    if type(a) is not type(b): return False
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, np.ndarray): return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b or (a != a and b != b)


# --- state ---

tensors = st.sampled_from([torch.tensor(3.0), torch.zeros(0), torch.arange(6).reshape(2, 3), torch.tensor([True, False]),
                           torch.randn(3).bfloat16(), torch.ones(4, 5).T, np.arange(3, dtype=np.uint32)])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner)
                     | st.dictionaries(st.text(max_size=3) | st.integers() | st.sampled_from(["$tensor", "a/b", "a"]), inner, max_size=3),
                     max_leaves=8)


@settings(deadline=None)
@given(tree=st.dictionaries(st.text(max_size=3), trees, max_size=3))
def test_state_comes_back_exactly(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "state"
    save_state(path, tree)
    assert same(load_state(path), tree)


def test_names_that_meet_do_not_overwrite_each_other(tmp_path):
    tree = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}}
    save_state(tmp_path / "s", tree)
    assert same(load_state(tmp_path / "s"), tree)


def test_tensors_that_share_memory_come_back_whole(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    save_tensors(tmp_path / "t", {"whole": whole, "row": whole[1], "turned": whole.T})
    back = load_tensors(tmp_path / "t")
    assert back["row"].equal(whole[1]) and back["turned"].equal(whole.T)


@pytest.mark.parametrize("thing", [object(), {1, 2}, np.int64(3), torch.Generator()])
def test_what_cannot_be_stored_is_named(tmp_path, thing):
    with pytest.raises(ValueError, match=f"data/position is a {type(thing).__name__}"):
        save_state(tmp_path / "s", {"data": {"position": thing}})
    assert not list(tmp_path.iterdir())


def test_no_pickle_is_ever_read():
    source = Path(checkpoints.__file__).read_text(encoding="utf-8")
    assert not re.search(r"import pickle|(?<!safetensors\.)torch\.(load|save)\b", source)


def test_random_state_comes_back(tmp_path):
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())
    random.gauss(0, 1); np.random.randn()           # both now hold back the second of a pair
    save_state(tmp_path / "s", random_state())
    first = draw()
    restore_random_state(load_state(tmp_path / "s"))
    assert draw() == first


# --- atomic writing ---

def test_a_written_file_replaces_the_old_one_and_an_error_leaves_it(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_write(path) as temporary: temporary.write_text("new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_written_folder_replaces_the_old_one_and_an_error_leaves_it(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "d") as temporary: (temporary / "f").write_text(text)
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "d") as temporary: raise RuntimeError
    assert (tmp_path / "d" / "f").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["d"]


def forked(work, *arguments, kill_after: float | None = None) -> int:
    "Runs `work` in a process of its own, killed after some seconds; its exit code, -9 for a kill."
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join()
    return process.exitcode


def write_forever(path):
    for count in range(10 ** 9):
        with atomic_write(path) as temporary: temporary.write_text(str(count % 10) * 200_000)


@posix
def test_a_kill_at_random_moments_never_leaves_half_a_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("x" * 200_000)
    seen = set()
    for _ in range(25):
        assert forked(write_forever, path, kill_after=random.uniform(0.01, 0.06)) == -signal.SIGKILL
        content = path.read_text()
        assert len(content) == 200_000 and len(set(content)) == 1
        seen.add(content[0])
    assert len(seen) > 1                              # the kills fell among real writes


def killed_at(call: int, work, *arguments) -> int:
    "Runs `work`, killed by SIGKILL just before its `call`-th touch of the file system; 0 when it needed fewer."
    def body():
        count = 0

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count == call: os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapper
        for name in ("replace", "fsync", "open", "mkdir", "unlink", "rmdir", "scandir"): setattr(os, name, counted(getattr(os, name)))
        safetensors.torch.save_file = counted(safetensors.torch.save_file)
        work(*arguments)
    return forked(body)


def save_and_prune(path, model, step):
    run = RunFolder(path)
    run.log({"step": step})
    run.save_step(step, model, {"number": step}, best=step % 2 == 1)
    run.prune(1)


@posix
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that stands already"])
def test_a_run_killed_at_every_call_leaves_the_old_checkpoint_or_the_new(tmp_path, model, again):
    old, new = (1, 1) if again else (1, 2)
    finished, outcomes = False, set()
    for call in range(1, 200):
        path = tmp_path / str(call)
        run = RunFolder(path)
        run.start(model)
        with torch.no_grad(): model.embedding.weight.fill_(1.0)
        save_and_prune(path, model, old)
        with torch.no_grad(): model.embedding.weight.fill_(2.0)
        finished = killed_at(call, save_and_prune, path, model, new) == 0

        resumed, fresh = RunFolder(path), MiniLLM(CONFIG)
        at = resumed.start(fresh, resume=True)
        state = resumed.load_step(fresh)
        value = fresh.embedding.weight[0, 0].item()
        assert (state["number"], at.name) in {(old, f"step-{old}"), (new, f"step-{new}")}
        assert again or value == state["number"]       # weights and state are of one step
        assert resumed.best() is not None and (resumed.best() / "state.json").is_file()
        assert all(record["step"] <= state["step"] for record in resumed.metrics())
        assert not [p.name for p in path.iterdir() if p.name.startswith(".")]      # and nothing is left lying about
        outcomes.add(value)
        if finished: break
    assert finished and outcomes == {1.0, 2.0} and call > 25
# --- a model's file ---

@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"position": "learned", "norm": "layernorm", "bias": True},
                                     {"n_experts": 3, "n_active_experts": 2, "qk_norm": True}, {"position": "alibi", "activation": "gelu"}],
                         ids=str)
def test_a_model_comes_back(tmp_path, tokenizer, flat, changes):
    model = MiniLLM(CONFIG.replace(**changes)).eval()
    save_model(tmp_path / "m", model, tokenizer, info={"loss": 1.5}, flat=flat)
    back, tokens, info = load_model(tmp_path / "m", device="cpu")
    assert not back.training and back.config == model.config and tokens.fingerprint == tokenizer.fingerprint and info["loss"] == 1.5
    ids = torch.randint(12, (2, 9))
    assert torch.equal(model(ids), back(ids))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == (["m.json", "m.safetensors"] if flat else
                                                                          ["config.json", "model.safetensors", "tokenizer.json"])


def test_a_bpe_tokenizer_travels_inside_the_package_form(tmp_path):
    tokenizer = BPETokenizer.train(["the cat sat on the mat, the café"] * 5, vocab_size=270)
    model = MiniLLM(CONFIG.replace(vocab_size=tokenizer.vocab_size))
    save_model(tmp_path / "m", model, tokenizer, flat=True)
    assert load_model(tmp_path / "m.safetensors", "cpu")[1].encode("the café") == tokenizer.encode("the café")


def test_a_model_without_tokenizer_comes_back_without(tmp_path, model):
    for flat in (False, True):
        save_model(tmp_path / f"m{flat}", model, flat=flat)
        assert load_model(tmp_path / f"m{flat}", "cpu")[1] is None


def test_tied_weights_stand_once_and_come_back_tied(tmp_path, model):
    save_model(tmp_path / "m", model)
    stored = load_tensors(tmp_path / "m" / "model.safetensors")
    assert "embedding.weight" in stored and "head.weight" not in stored
    back = load_model(tmp_path / "m", "cpu")[0]
    assert back.head.weight is back.embedding.weight
    save_tensors(tmp_path / "m" / "model.safetensors", {**stored, "head.weight": stored["embedding.weight"]})
    assert load_model(tmp_path / "m", "cpu")[0].head.weight.equal(model.head.weight)        # other people's files name both


def test_bfloat16_halves_the_file_and_loads_as_float32_on_a_cpu(tmp_path, model):
    save_model(tmp_path / "whole", model)
    save_model(tmp_path / "half", model, dtype=torch.bfloat16)
    size = lambda name: sum(t.nbytes for t in load_tensors(tmp_path / name / "model.safetensors").values())
    assert size("half") * 2 == size("whole")
    back = load_model(tmp_path / "half", "cpu")[0]
    assert all(a.dtype == torch.float32 and a.equal(b.bfloat16().float()) for a, b in zip(back.parameters(), model.parameters()))
    assert load_model(tmp_path / "half", "cpu", "bfloat16")[0].embedding.weight.dtype == torch.bfloat16


def test_loading_leaves_the_callers_random_state_alone(tmp_path, model):
    save_model(tmp_path / "m", model)
    before = torch.get_rng_state()
    load_model(tmp_path / "m")
    assert before.equal(torch.get_rng_state())


def test_a_compiled_model_is_stored_as_itself(tmp_path, model):
    compiled = torch.compile(model)
    save_model(tmp_path / "m", compiled)
    load_weights(compiled, tmp_path / "m" / "model.safetensors")
    assert set(named_tensors(compiled)) == set(named_tensors(model))


def test_a_saved_model_is_what_other_readers_of_safetensors_expect(tmp_path, model):
    save_model(tmp_path / "m", model)
    with safetensors.safe_open(tmp_path / "m" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"} and file.get_slice("embedding.weight").get_shape() == [12, 16]


# --- errors: file and tensor are named, nothing is half loaded ---

def broken(tmp_path, model, tokenizer, change):
    "A saved model with its tensors changed."
    save_model(tmp_path / "m", model, tokenizer)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_tensors(file)
    change(tensors)
    save_tensors(file, tensors)
    return file


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("blocks.1.mlp.up.weight"), "lacks 1 of the model's .* 'blocks.1.mlp.up.weight'"),
    (lambda t: t.update(stray=torch.zeros(2)), "does not know, the first is 'stray'"),
    (lambda t: t.update({"embedding.weight": torch.zeros(12, 8)}), r"'embedding.weight' with shape \(12, 8\).*\(12, 16\)")])
def test_wrong_tensors_are_named_and_the_model_stays_as_it_was(tmp_path, model, tokenizer, change, words):
    file = broken(tmp_path, model, tokenizer, change)
    other = MiniLLM(CONFIG)
    before = weights_of(other)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(file))}.*{words}"): load_weights(other, file)
    with pytest.raises(ValueError, match=words): load_model(tmp_path / "m")
    assert same(before, weights_of(other))


def test_a_file_cut_off_anywhere_is_named(tmp_path, model, tokenizer):
    save_model(tmp_path / "m", model, tokenizer)
    file = tmp_path / "m" / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{re.escape(str(file))} is not a whole safetensors file"): load_model(tmp_path / "m")


@pytest.mark.parametrize("change, words", [
    (lambda c: c["model"].update(n_layer=2), "'n_layer' is no field.*nearest is 'n_layers'"),
    (lambda c: c["model"].update(n_heads=3), "n_heads"),
    (lambda c: c["model"].pop("d_model"), "d_model"),
    (lambda c: c.pop("model"), "model"),
    (lambda c: c.update(format="minillm 9"), "format 'minillm 9'"),
    (lambda c: c.pop("format"), "format None")])
def test_a_wrong_config_is_named(tmp_path, model, change, words):
    save_model(tmp_path / "m", model)
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(file))}.*{words}"): load_model(tmp_path / "m")


def test_missing_and_damaged_parts_are_named(tmp_path, model, tokenizer):
    save_model(tmp_path / "m", model, tokenizer)
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text()[:40])
    with pytest.raises(ValueError, match=f"{re.escape(str(config))} is not whole JSON"): load_model(tmp_path / "m")
    config.unlink()
    with pytest.raises(FileNotFoundError, match="config.json"): load_model(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a packaged model"): load_model("no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="without a finished checkpoint"): load_model(tmp_path / "empty")


def test_state_files_that_do_not_belong_together_are_an_error(tmp_path):
    save_state(tmp_path / "s", {"a": torch.zeros(1), "b": torch.ones(1)})
    save_tensors(tmp_path / "s.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"s\.safetensors lacks the tensor 'b'"): load_state(tmp_path / "s")


def test_devices_and_dtypes():
    assert choose_device("cpu").type == "cpu" and choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="device 'tpu' is not available here"): choose_device("tpu")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_dtype("auto", torch.bfloat16, cpu) == torch.float32 and choose_dtype("auto", torch.bfloat16, cuda) == torch.bfloat16
    assert choose_dtype("float16", torch.float32, cuda) == torch.float16
    with pytest.raises(ValueError, match="dtype 'fp16' is unknown"): choose_dtype("fp16", torch.float32, cpu)


# --- a run ---

def go(folder, tokenizer, name="adamw", steps=12, until=12, resume=False):
    "A run with dropout, random batches and a checkpoint every 4 steps, which stops as if killed after `until` steps."
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    model = MiniLLM(CONFIG)
    optimizer, run, first = make_optimizer(model, name), RunFolder(folder), 0
    if run.start(model, tokenizer, {"optimizer": name}, resume=resume):
        state = run.load_step(model)
        restore_optimizer(optimizer, state["optimizer"])
        restore_random_state(state["random"])
        first = state["step"]
    for step in range(first + 1, until + 1):
        ids = torch.randint(12, (4, 9)) if random.random() < 0.5 else torch.from_numpy(np.random.randint(12, size=(4, 9)))
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        run.log({"step": step, "loss": loss.item()})
        if step % 4 == 0: run.save_step(step, model, {"optimizer": optimizer.state_dict()}, best=step == 4)
    return run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_killed_run_ends_byte_for_byte_where_the_other_did(tmp_path, tokenizer, name):
    straight = go(tmp_path / "a", tokenizer, name)
    go(tmp_path / "b", tokenizer, name, until=7)
    (tmp_path / "b" / "metrics.jsonl").open("a").write('{"step": 8, "lo')        # killed in the middle of a line
    resumed = go(tmp_path / "b", tokenizer, name, resume=True)
    for file in ("step-12/model.safetensors", "step-12/state.safetensors", "step-12/state.json", "metrics.jsonl", "config.json"):
        assert filecmp.cmp(straight.path / file, resumed.path / file, shallow=False), file
    assert [r["step"] for r in resumed.metrics()] == list(range(1, 13))


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path, tokenizer, model):
    go(tmp_path / "r", tokenizer)
    before = sorted((p, p.read_bytes()) for p in (tmp_path / "r").rglob("*") if p.is_file())
    with pytest.raises(ValueError, match="already holds a run.*resume"): RunFolder(tmp_path / "r").start(model, tokenizer)
    wide = MiniLLM(CONFIG.replace(d_ff=64))
    with pytest.raises(ValueError, match="holds a run with d_ff=32, the model now has 64"):
        RunFolder(tmp_path / "r").start(wide, tokenizer, resume=True)
    with pytest.raises(ValueError, match="another tokenizer"):
        RunFolder(tmp_path / "r").start(model, CharTokenizer.train(["xyz"]), resume=True)
    assert before == sorted((p, p.read_bytes()) for p in (tmp_path / "r").rglob("*") if p.is_file())


def test_a_run_without_checkpoint_yet_may_start_again(tmp_path, tokenizer, model):
    run = RunFolder(tmp_path / "r")
    assert run.start(model, tokenizer) is None and run.start(model, tokenizer) is None      # nothing was done in it
    run.log({"step": 1})
    with pytest.raises(ValueError, match="already holds a run"): run.start(model, tokenizer)
    assert run.start(model, tokenizer, resume=True) is None and run.metrics() == []         # from the beginning
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"): run.load_step(model)


def test_pruning_keeps_the_newest_the_latest_and_the_best(tmp_path, model):
    run = RunFolder(tmp_path)
    run.start(model)
    for step in (5, 10, 15, 20, 100): run.save_step(step, model, {}, best=step == 5)
    run.prune(2)
    assert [p.name for p in run.steps()] == ["step-5", "step-20", "step-100"]
    (tmp_path / "latest").write_text("step-20\n")
    run.prune(1)
    assert [p.name for p in run.steps()] == ["step-5", "step-20", "step-100"]
    with pytest.raises(ValueError, match="keep_last is 0"): run.prune(0)


def test_a_model_is_found_in_a_run_in_a_step_and_in_a_folder(tmp_path, tokenizer):
    run = go(tmp_path / "r", tokenizer)
    assert load_model(run.path, "cpu")[2]["step"] == 4                                # the best
    model, tokens, info = load_model(run.latest(), "cpu")
    assert info["step"] == 12 and tokens.fingerprint == tokenizer.fingerprint
    (run.path / "best").unlink()
    assert find_model(run.path)[0] == run.latest() / "model.safetensors"


def test_a_pointer_to_nothing_is_an_error_that_lists_the_steps(tmp_path, tokenizer):
    run = go(tmp_path / "r", tokenizer)
    shutil.rmtree(run.latest())
    with pytest.raises(ValueError, match="latest names 'step-12', which is not there; steps here: step-4, step-8"): run.latest()
    (run.path / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match="is not there"): run.latest()


def test_damaged_state_leaves_the_model_untouched(tmp_path, tokenizer):
    run = go(tmp_path / "r", tokenizer)
    file = run.latest() / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    other = MiniLLM(CONFIG)
    before = weights_of(other)
    with pytest.raises(ValueError, match="state.safetensors is not a whole"): run.load_step(other)
    assert same(before, weights_of(other))


def test_another_number_of_threads_is_told(tmp_path, tokenizer, monkeypatch):
    run = go(tmp_path / "r", tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.load_step()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.warns(UserWarning, match="threads=1, now it is 7"): run.load_step()


def test_what_a_kill_left_is_mended(tmp_path):
    for name in (".step-1.old", ".step-2.old", "step-2", ".step-3.99.tmp"): (tmp_path / name).mkdir()
    (tmp_path / ".latest.99.tmp").write_text("half")
    mend_folders(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]


@posix
def test_a_file_of_tensors_may_be_read_by_whoever_may_read_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    save_tensors(tmp_path / "w.safetensors", {"w": torch.ones(2)})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
