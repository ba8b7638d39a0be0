"""The loop: accumulation = big batch, resumed = never stopped, evaluation by hand, and what it says when it cannot go on."""
import json
import math
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minillm import training
from minillm.checkpoints import RunFolder
from minillm.data import Batches, load_corpus, prepare, tokenize
from minillm.model import MiniLLM, ModelConfig, cross_entropy
from minillm.optimizers import OPTIMIZERS, SCHEDULES
from minillm.tales import TaleWorld
from minillm.tokenizer import BPETokenizer
from minillm.training import (
    DTYPES,
    Evaluation,
    History,
    LossScaler,
    Stream,
    TrainConfig,
    TrainingError,
    add_gradients,
    choose_precision,
    divide_gradients,
    evaluate,
    load_recipe,
    make_recipe,
    matmul_peak,
    plot_losses,
    precision_block,
    running_mean,
    seconds_a_step,
    train,
)

CPU = torch.device("cpu")


def tiny(vocab_size=24, **changes):
    torch.manual_seed(1)
    shape = dict(vocab_size=vocab_size, context_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=32)
    return MiniLLM(ModelConfig(**shape | changes))


def pairs(n=6, rows=3, length=8, vocab_size=24, masked=False):
    "Batches of a periodic text, which a model can learn; with masking, unequally many targets each."
    made, dice = [], random.Random(0)
    for _ in range(n):
        ids = torch.stack([(torch.arange(length + 1) * dice.randint(1, 3) + dice.randint(0, 9)) % vocab_size for _ in range(rows)])
        inputs, targets = ids[:, :-1], ids[:, 1:].clone()
        if masked: targets[:, dice.randint(1, length - 1):] = -100
        made.append((inputs, targets))
    return made


def quick(**changes):
    return TrainConfig(**dict(steps=8, dtype="float32", progress=False, evaluate_every=0, warmup_steps=2) | changes)


def weights(model): return [p.detach().clone() for p in model.parameters()]


def same(model, other): return all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


@pytest.fixture(scope="module")
def tales(tmp_path_factory):
    "A tokenizer and token files (training, validation) of the short world."
    texts = [t.text for t in TaleWorld("short", seed=7).tales(300)]
    tokenizer = BPETokenizer.train(texts, 400, pattern="tales")
    files = prepare("tales-short", tokenizer, tmp_path_factory.mktemp("tales"), max_samples=200, progress=False)
    return tokenizer, files


def tale_model(tokenizer, **changes): return tiny(tokenizer.vocab_size, **dict(context_length=320) | changes)


# accumulation

@pytest.mark.parametrize("masked", [False, True])
def test_accumulated_gradient_is_that_of_the_big_batch(masked):
    batches, whole, parts = pairs(masked=masked), tiny().double(), tiny().double()
    big = tuple(torch.cat(t) for t in zip(*batches))
    for model, given in ((whole, [big]), (parts, batches)):
        nats, tokens = add_gradients(model, given, cross_entropy, precision_block(CPU, "float32"))
        divide_gradients(model.parameters(), tokens)
    assert tokens == sum(int((t != -100).sum()) for _, t in batches)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True): torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-9)
    loss = nn.functional.cross_entropy(whole(big[0]).flatten(0, 1), big[1].flatten(), ignore_index=-100)     # the mean, by torch
    expected = torch.autograd.grad(loss, list(whole.parameters()))
    for a, g in zip(whole.parameters(), expected, strict=True): torch.testing.assert_close(a.grad, g, rtol=1e-5, atol=1e-8)


def test_a_run_that_accumulates_is_the_run_with_big_batches():
    batches, small, big = pairs(8, masked=True), tiny(), tiny()
    joined = [tuple(torch.cat(t) for t in zip(*batches[i:i + 4])) for i in (0, 4)]
    one = train(small, batches, quick(steps=2, accumulate=4, optimizer="sgd", learning_rate=0.5))
    other = train(big, joined, quick(steps=2, optimizer="sgd", learning_rate=0.5))
    assert one.train_loss == pytest.approx(other.train_loss, rel=1e-6)
    assert [r["tokens"] for r in one.records] == [r["tokens"] for r in other.records]
    for a, b in zip(weights(small), weights(big), strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_batch_without_a_single_target_changes_nothing():
    model, inputs = tiny(), torch.zeros(2, 4, dtype=torch.long)
    before = weights(model)
    history = train(model, [(inputs, torch.full_like(inputs, -100))], quick(steps=1, optimizer="sgd", weight_decay=0))
    assert history.train_loss == [0] and all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


# how long, on what

def test_the_loss_falls_and_the_model_is_left_in_evaluation_mode(capfd):
    model = tiny(dropout=0.1)
    history = train(model, pairs(), quick(steps=60, learning_rate=1e-2))
    assert history.train_loss[-1] < 0.6 * history.train_loss[0] and history.steps == list(range(1, 61)) and not model.training
    assert capfd.readouterr() == ("", ""), "the library prints nothing"


@pytest.mark.parametrize("settings, steps", [({"steps": 5}, 5), ({"epochs": 2}, 12), ({"epochs": 2, "accumulate": 4}, 3), ({"epochs": 0.5}, 3)])
def test_steps_or_epochs(settings, steps):
    assert len(train(tiny(), pairs(6), quick(**settings)).steps) == steps


def test_epochs_of_token_files_and_of_batches_with_an_end(tales):
    tokenizer, (file, _) = tales
    config = quick(epochs=1, batch_size=50, batches="documents")
    history = train(tale_model(tokenizer), file, config, tokenizer=tokenizer)
    assert len(history.steps) == 4 and sum(history.series("tokens")[1]) == file.n_tokens - 1
    ending = Batches(file, tokenizer, batch_size=50, sequence_length=320, kind="documents", epochs=1)
    assert len(train(tale_model(tokenizer), ending, quick(accumulate=3)).steps) == 2


def test_data_comes_in_many_forms(tales, tmp_path, monkeypatch):
    tokenizer, files = tales
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    (tmp_path / "own.txt").write_text("\n\n".join(t.text for t in TaleWorld("short").tales(80)), encoding="utf-8")
    texts = [t.text for t in TaleWorld("short").tales(20)]
    config = quick(steps=2, batch_size=4, sequence_length=64, batches="windows", evaluate_every=1, evaluate_batches=1)
    for data, evaluated in [(files, True), (files[0], False), (texts, False), (tmp_path / "own.txt", True), (str(tmp_path / "own.txt"), True),
                            (load_corpus("tales-short", max_samples=20), False),
                            (tuple(load_corpus("tales-short", s, max_samples=20) for s in ("train", "validation")), True)]:
        history = train(tale_model(tokenizer), data, config, tokenizer=tokenizer)
        assert len(history.steps) == 2 and len(history.validation_loss) == 2 * evaluated, data
    loader = DataLoader(TensorDataset(*(torch.cat(t) for t in zip(*pairs()))), batch_size=4, shuffle=True)
    for data in (loader, iter(pairs()), (b for b in pairs()), Stream(pairs(), validation=pairs(2))):
        assert len(train(tiny(), data, quick(steps=3)).steps) == 3
    assert len(train(tiny(), Stream(pairs(), validation=pairs(2)), quick(steps=3, evaluate_every=2)).validation_loss) == 2


def test_tales_come_one_a_row_and_real_text_in_windows(tales, tmp_path):
    tokenizer, files = tales
    assert training.as_batches(files, tale_model(tokenizer), quick(), tokenizer).kind == "documents"
    plain = tokenize(["a long text " * 200], tokenizer, tmp_path / "plain.tokens", progress=False)
    batches = training.as_batches(plain, tale_model(tokenizer), quick(), tokenizer)
    assert batches.kind == "windows" and batches.sequence_length == 320, "the model's context"


@pytest.mark.parametrize("data, message", [("tales-short", "need their tokenizer"), (["a text"], "need their tokenizer"), ([], "no batches"),
                                           (iter([]), "no batches"), (iter(pairs(2)), "ended after 2 batches"), ([1, 2], "a int where a pair"),
                                           ([torch.zeros(3)], "a Tensor where a pair"), ((torch.zeros(3), torch.zeros(3)), "a Tensor where a pair")])
def test_data_that_cannot_be_trained_on_is_a_clear_error(data, message):
    with pytest.raises(ValueError, match=message): train(tiny(), data, quick())


def test_errors_at_the_border(tales, tmp_path):
    tokenizer, files = tales
    with pytest.raises(ValueError, match=f"knows {tokenizer.vocab_size} tokens, the model 24: set vocab_size={tokenizer.vocab_size}"):
        train(tiny(), files, quick(sequence_length=16, batches="windows"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="epochs needs data of a known length"): train(tiny(), iter(pairs()), quick(epochs=1))
    with pytest.raises(ValueError, match="gradient_checkpointing=True needs a model"):
        train(nn.Sequential(nn.Embedding(24, 24)), pairs(), quick(gradient_checkpointing=True))
    with pytest.raises(ValueError, match="device 'tpu'"): train(tiny(), pairs(), quick(device="tpu"))
    with pytest.raises(ValueError, match="sequence_length must be given"):
        train(nn.Embedding(tokenizer.vocab_size, tokenizer.vocab_size), files, quick(), tokenizer=tokenizer)


def test_any_module_from_ids_to_logits_can_be_trained():
    bigram = nn.Sequential(nn.Embedding(24, 24))
    history = train(bigram, pairs(), quick(steps=40, learning_rate=0.3))
    assert history.train_loss[-1] < 1.5 < history.train_loss[0]


@pytest.mark.parametrize("settings, message", [
    ({"steps": 0}, "steps must be at least 1"), ({"optimizer": "adm"}, "the nearest is 'adamw'"), ({"schedule": "cosin"}, "'cosine'"),
    ({"dtype": "bf16"}, "'bfloat16'"), ({"learning_rate": -1.0}, "learning_rate must be at least 0"), ({"log": "tensorbord"}, "'tensorboard'"),
    ({"min_learning_rate": 1.0}, "min_learning_rate 1.0 is above"), ({"resume": True}, "resume needs the out_dir"), ({"keep_last": 0}, "keep_last"),
    ({"learning_rate": math.nan}, "learning_rate must be at least 0")])
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message): TrainConfig(**settings)


def test_the_choices_are_those_that_exist():
    hints = training.get_type_hints(TrainConfig)
    assert training.get_args(hints["optimizer"]) == OPTIMIZERS and training.get_args(hints["schedule"]) == SCHEDULES
    assert set(training.get_args(hints["dtype"])) == {"auto", *DTYPES}
    assert len(hints) <= 30 and training.MAY_CHANGE < hints.keys() and training.LOWEST.keys() < hints.keys()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_at_the_scheduled_rate(optimizer):
    rate = {"lion": 2e-3, "sgd": 1.0, "momentum": 0.1}.get(optimizer, 1e-2)
    history = train(tiny(), pairs(), quick(steps=40, optimizer=optimizer, learning_rate=rate, min_learning_rate=rate / 10, warmup_steps=4))
    assert history.train_loss[-1] < history.train_loss[0] - 0.5
    assert history.learning_rate[:4] == pytest.approx([rate * n / 4 for n in (1, 2, 3, 4)])
    assert rate / 10 <= history.learning_rate[-1] < rate / 5


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    runs = [tiny(dropout=0.2) for _ in range(3)]
    for model, seed in zip(runs, (0, 0, 1)): train(model, pairs(), quick(seed=seed))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_the_loss_is_an_argument_and_targets_may_be_any_tree():
    def ranked(logits, targets):
        better, weight = targets
        return (weight * -logits.log_softmax(-1).gather(-1, better.unsqueeze(-1)).squeeze(-1)).sum(), len(better)
    data = [(inputs, (targets, torch.full(targets.shape, 0.5))) for inputs, targets in pairs()]
    history = train(tiny(), Stream(data, data), quick(steps=3, evaluate_every=3), loss=ranked)
    assert history.train_loss[0] == pytest.approx(0.5 * 8 * math.log(24), rel=0.02), "8 tokens, half weight, 3 rows to divide by"
    assert history.validation_loss[0] < history.train_loss[0]


def test_on_step_sees_each_step_and_can_stop(tmp_path):
    seen = []
    def watch(event):
        seen.append((event.step, event.loss, event.evaluation))
        return event.step == 5
    model = tiny()
    history = train(model, Stream(pairs(), pairs(2)), quick(out_dir=tmp_path / "run", evaluate_every=2, steps=100), watch)
    assert [s for s, *_ in seen] == [1, 2, 3, 4, 5] and [e is None for *_, e in seen] == [True, False] * 2 + [True]
    assert [loss for _, loss, _ in seen] == history.train_loss
    assert RunFolder(tmp_path / "run").latest().name == "step-5", "what was reached is kept"


# evaluation

def test_evaluation_is_the_sum_by_hand_without_dropout_and_restores_the_mode():
    model, data = tiny(dropout=0.5).train(), pairs(3, masked=True)
    result = evaluate(model, data)
    assert model.training
    model.eval()
    by_hand = sum(-model(x).log_softmax(-1)[b, t, y[b, t]].item() for x, y in data
                  for b in range(3) for t in range(8) if y[b, t] != -100)
    assert result.nats == pytest.approx(by_hand, rel=1e-6) and result.loss == pytest.approx(by_hand / result.tokens, rel=1e-6)
    assert (result.documents, result.floor, result.floor_loss, result.excess, result.luck) == (0, None, None, None, 1.0)
    evaluate(model, data)
    assert not model.training
    assert evaluate(model, data, max_batches=1).tokens < result.tokens
    with pytest.raises(ValueError, match="nothing to evaluate on"): evaluate(model, [])


def test_the_floor_is_what_the_tales_cost_by_their_own_probabilities(tales):
    tokenizer, (_, file) = tales
    data, world = Batches(file, tokenizer, batch_size=16, sequence_length=320, kind="documents"), TaleWorld("short")
    result = evaluate(tale_model(tokenizer), data)
    texts = list(load_corpus("tales-short", "validation", max_samples=200))
    assert result.documents == len(texts) and result.tokens == file.n_tokens - 1
    assert result.floor == pytest.approx(-sum(world.log_prob(t) for t in texts), rel=1e-9)
    assert result.excess == pytest.approx((result.nats - result.floor) / len(texts)) and result.excess > 100 and result.luck == 1
    assert evaluate(tale_model(tokenizer), data, floor=12.0).floor == 12.0


def test_luck_is_markovs_bound():
    assert Evaluation(90.0, 10, 2, 100.0).luck == pytest.approx(math.exp(-10)) and Evaluation(110.0, 10, 2, 100.0).luck == 1
    # a coin of which a model says 0.5 / 0.5 while the truth is 0.9 / 0.1: the chance to be n nats below never exceeds exp(-n)
    for n in (0.1, 0.3, 0.5):
        chance = sum(p for p, q in ((0.9, 0.5), (0.1, 0.5)) if -math.log(q) <= -math.log(p) - n)
        assert chance <= math.exp(-n)


def test_training_on_tales_records_the_floor(tales, tmp_path):
    tokenizer, files = tales
    history = train(tale_model(tokenizer), files, quick(steps=4, batch_size=8, evaluate_every=2, evaluate_batches=2, out_dir=tmp_path / "run"),
                    tokenizer=tokenizer)
    first, last = history.evaluations[2], history.evaluations[4]
    assert first.floor == last.floor > 0 and last.documents == 16 and last.excess < first.excess
    again = History.of_run(tmp_path / "run")
    assert again.records == history.records and again.plan == history.plan and again.evaluations[4] == last
    assert again.series("floor_loss")[1][0] == pytest.approx(first.floor_loss)


def test_an_impossible_loss_rings_the_alarm():
    class Known(list):
        def floor(self, inputs, targets): return self.nats, targets.numel()
    data = Known(pairs(1))
    for data.nats, rings in ((60.0, False), (200.0, True)):       # an untrained model pays 24 tokens of 3.2 nats
        with warnings.catch_warnings(record=True) as rung:
            warnings.simplefilter("always")
            train(tiny(), Stream(pairs(), data), quick(steps=1, evaluate_every=1, learning_rate=1e-6))
        assert [("nats below their floor" in str(w.message)) for w in rung] == [True] * rings


def test_watching_changes_nothing(tmp_path):
    plain, watched = tiny(dropout=0.2), tiny(dropout=0.2)
    train(plain, pairs(), quick())
    def sample(model, prompts):
        assert not model.training
        return [p + " " + str(torch.rand(1).item() + random.random()) for p in prompts]
    history = train(watched, Stream(pairs(), pairs(2)), quick(evaluate_every=3, sample_prompts=["a", "b"], out_dir=tmp_path / "run", checkpoint_every=4),
                    lambda event: None, sample=sample, describe=lambda plan: None)
    assert same(plain, watched)
    told = [r for r in history.records if "sample" in r]
    assert [(r["step"], r["prompt"]) for r in told] == [(s, p) for s in (3, 4, 6, 8) for p in "ab"]
    assert all(r["sample"].startswith(r["prompt"]) for r in told)


# precision and memory

def test_bfloat16_computes_products_in_bfloat16_and_evaluates_in_float32():
    model, seen = tiny(), {True: set(), False: set()}
    model.head.register_forward_hook(lambda m, i, out: seen[m.training].add(out.dtype))
    train(model, Stream(pairs(), pairs(1)), quick(dtype="bfloat16", evaluate_every=4))
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_scaled_loss_gives_the_same_gradient():
    plain, scaled = tiny(), tiny()
    add_gradients(plain, pairs(), cross_entropy, precision_block(CPU, "float32"))
    add_gradients(scaled, pairs(), cross_entropy, precision_block(CPU, "float32"), 1024.0)
    divide_gradients(scaled.parameters(), torch.tensor(1024.0))
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True): assert torch.equal(a.grad, b.grad), "a power of two"


def test_the_scale_halves_on_overflow_and_doubles_after_patience():
    scaler = LossScaler(scale=8.0, patience=3)
    assert [scaler.accepts(ok) for ok in (True, True, False)] == [True, True, False] and scaler.factor == 4
    for _ in range(3): assert scaler.accepts(True)
    assert scaler.factor == 8 and LossScaler(False).factor == 1
    other = LossScaler()
    other.load_state_dict(scaler.state_dict())
    assert (other.scale, other.good_steps) == (8, 3)


@pytest.mark.parametrize("optimizer, rate", [("adamw", 1e-2), ("muon", 1e-2), ("lion", 2e-3)])
def test_float16_trains_as_float32_does(optimizer, rate):
    half, full = tiny(), tiny()
    settings = dict(steps=40, optimizer=optimizer, learning_rate=rate)
    one, other = train(half, pairs(), quick(dtype="float16", **settings)), train(full, pairs(), quick(**settings))
    assert one.train_loss[-1] < one.train_loss[0] - 0.4
    assert one.train_loss[:5] == pytest.approx(other.train_loss[:5], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_an_overflow_skips_the_update_and_halves_the_scale(optimizer):
    model, seen = tiny(), []
    def overflowing(logits, targets):
        nats, tokens = cross_entropy(logits, targets)
        if len(seen) == 3: logits.register_hook(lambda g: g * math.inf)
        return nats, tokens
    def watch(event): seen.append((weights(model), event.gradient_norm))
    history = train(model, pairs(), quick(steps=6, dtype="float16", optimizer=optimizer), watch, loss=overflowing)
    moved = [not all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)) for before, after in zip(seen, seen[1:])]
    assert moved == [True, True, False, True, True] and not math.isfinite(seen[3][1]) and math.isfinite(history.train_loss[3])


def test_auto_takes_bfloat16_only_where_it_is_native_and_faster(monkeypatch):
    model, [batch] = tiny(), pairs(1)
    for native, seconds, expected in [(False, {}, "float32"), (True, {"float32": 2.0, "bfloat16": 1.0}, "bfloat16"),
                                      (True, {"float32": 1.0, "bfloat16": 1.0}, "float32")]:
        monkeypatch.setattr(training, "native_bfloat16", lambda device, n=native: n)
        monkeypatch.setattr(training, "seconds_a_step", lambda m, b, lo, dtype, s=seconds: s[dtype])
        dtype, reason = choose_precision("auto", model, batch, cross_entropy)
        assert dtype == expected and ("no bfloat16" in reason) != native
    assert choose_precision("float16", model, batch, cross_entropy)[0] == "float16"


def test_timed_steps_leave_no_trace():
    model, [batch] = tiny(dropout=0.3).train(), pairs(1)
    before, dice = weights(model), torch.get_rng_state()
    assert seconds_a_step(model, batch, cross_entropy, "bfloat16") > 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert torch.equal(dice, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_no_gradient_and_saves_memory(dtype):
    results = []
    for switch in (False, True):
        model, kept = tiny(dropout=0.2, n_layers=4).train(), []
        model.gradient_checkpointing = switch
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            with precision_block(CPU, dtype): nats, _ = cross_entropy(model(pairs()[0][0]), pairs()[0][1])
        size = sum(kept)
        nats.backward()
        results.append((size, [p.grad for p in model.parameters()]))
    (size, gradients), (less, again) = results
    assert less < size / 3 and all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_gradient_checkpointing_is_set_for_the_run():
    runs = [tiny(dropout=0.2) for _ in range(2)]
    for model, switch in zip(runs, (False, True)): train(model, pairs(), quick(gradient_checkpointing=switch))
    assert same(*runs) and runs[1].gradient_checkpointing and not runs[0].gradient_checkpointing


def test_compile_wraps_the_forward_pass_only(monkeypatch, tmp_path):
    compiled, calls = [], []
    def spy(model):
        compiled.append(model)
        return lambda inputs: calls.append(1) or model(inputs)
    monkeypatch.setattr(torch, "compile", spy)
    model = tiny()
    train(model, Stream(pairs(), pairs(1)), quick(compile=True, out_dir=tmp_path / "run", evaluate_every=4))
    assert compiled == [model] and len(calls) == 8
    assert "blocks.0.attention.query.weight" in RunFolder(tmp_path / "run").load_step()["optimizer"]["param_groups"][0]["param_names"]


def test_the_plan_is_known_before_the_first_step():
    plans, model = [], tiny()
    history = train(model, pairs(), quick(accumulate=2), describe=plans.append)
    [plan] = plans
    assert asdict(plan) == history.plan and plan.parameters == model.num_parameters()
    assert (plan.device, plan.dtype, plan.steps, plan.tokens_per_step) == ("cpu", "float32", 8, 48)
    assert plan.seconds == 8 * plan.seconds_per_step > 0
    assert train(tiny(), pairs(), quick()).plan["seconds_per_step"] is None, "nobody asked"


def test_the_measured_peak_is_a_speed():
    assert 1e8 < matmul_peak(CPU, torch.float32, 256) < 1e14


# keeping and going on

def stopped_and_resumed(make_model, make_data, config, at, **options):
    "The models and histories of a run that was never stopped, and of one that was, after `at` steps, and went on."
    whole, first, second = make_model(), make_model(), make_model()
    steps, folder = config.pop("steps", 8), config.pop("out_dir")
    unbroken = train(whole, make_data(), quick(steps=steps, out_dir=folder / "whole", **config), **options)
    train(first, make_data(), quick(steps=steps, out_dir=folder / "run", **config), lambda event: event.step == at, **options)
    torch.manual_seed(99), random.seed(99)
    for p in second.parameters(): nn.init.normal_(p)
    resumed = train(second, make_data(), quick(steps=steps, out_dir=folder / "run", resume=True, **config), **options)
    return whole, second, unbroken, resumed


def without_clock(history): return [{k: v for k, v in r.items() if k != "seconds"} for r in history.records]


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}, {"optimizer": "lion", "accumulate": 2}, {"dtype": "float16"}, {"dtype": "bfloat16"},
                                      {"schedule": "wsd", "gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("at", [3, 6])
def test_a_resumed_run_ends_bit_for_bit_like_one_never_stopped(settings, at, tmp_path):
    def data(): return DataLoader(TensorDataset(*(torch.cat(t) for t in zip(*pairs()))), batch_size=4, shuffle=True)
    whole, second, unbroken, resumed = stopped_and_resumed(lambda: tiny(dropout=0.2), lambda: Stream(data(), pairs(2)),
                                                           dict(settings, out_dir=tmp_path, evaluate_every=4), at)
    assert same(whole, second) and without_clock(unbroken) == without_clock(resumed)


@pytest.mark.parametrize("kind", ["windows", "packed", "documents"])
def test_a_resumed_run_finds_its_place_in_a_token_file(kind, tales, tmp_path):
    tokenizer, files = tales
    config = dict(out_dir=tmp_path, batches=kind, batch_size=12, steps=7, evaluate_every=5, evaluate_batches=1)
    whole, second, unbroken, resumed = stopped_and_resumed(lambda: tale_model(tokenizer, d_model=8), lambda: files, config, 5, tokenizer=tokenizer)
    assert same(whole, second) and without_clock(unbroken) == without_clock(resumed)


def test_a_dataloader_with_its_own_generator_resumes_in_a_later_epoch(tmp_path):
    def data():
        generator = torch.Generator().manual_seed(5)
        return DataLoader(TensorDataset(*(torch.cat(t) for t in zip(*pairs()))), batch_size=9, shuffle=True, generator=generator)
    whole, second, *_ = stopped_and_resumed(tiny, data, dict(out_dir=tmp_path), 5)
    assert same(whole, second)


RUN = """
import sys, torch
sys.path.insert(0, "tests")
from test_training import Stream, pairs, quick, tiny, train
from torch.utils.data import DataLoader, TensorDataset
torch.set_num_threads(1)
data = DataLoader(TensorDataset(*(torch.cat(t) for t in zip(*pairs()))), batch_size=4, shuffle=True)
train(tiny(dropout=0.2), Stream(data, pairs(2)),
      quick(steps=int(sys.argv[2]), out_dir=sys.argv[1], checkpoint_every=9, evaluate_every=20, keep_last=1, resume=True))
"""


def test_a_run_killed_at_any_moment_resumes_bit_for_bit(tmp_path):
    steps, dice, kills = 200, random.Random(3), 0
    def start(folder): return subprocess.Popen([sys.executable, "-c", RUN, str(folder), str(steps)], cwd=ROOT)
    assert start(tmp_path / "whole").wait() == 0
    log, last = tmp_path / "run" / "metrics.jsonl", steps
    while kills < 3:                                                   # kill -9, at steps that nobody chose
        process, until = start(tmp_path / "run"), dice.randint(20, 55) * (kills + 1)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < until): time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0: break
        kills += 1
    assert kills >= 2, "the run was too fast to be killed"
    assert start(tmp_path / "run").wait() == 0
    files = [tmp_path / name / f"step-{last}" / "model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    states = [RunFolder(tmp_path / name).load_step() for name in ("whole", "run")]
    for state in states: state["random"] = state["random"]["torch"]     # nobody uses, and nobody seeded, the others
    assert repr(states[0]) == repr(states[1]) and states[0]["step"] == steps
    assert without_clock(History.of_run(tmp_path / "whole")) == without_clock(History.of_run(tmp_path / "run"))
    assert RunFolder(tmp_path / "whole").best().name == RunFolder(tmp_path / "run").best().name
    assert not list((tmp_path / "run").glob(".*")), "nothing half-written is left"


def test_ctrl_c_ends_the_step_leaves_a_checkpoint_and_the_run_resumes(tmp_path):
    whole, broken, resumed = (tiny(dropout=0.2) for _ in range(3))
    train(whole, pairs(), quick())
    def press(event):
        if event.step == 3: signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): train(broken, pairs(), quick(out_dir=tmp_path / "run"), press)
    assert signal.getsignal(signal.SIGINT) is before and RunFolder(tmp_path / "run").latest().name == "step-3"
    train(resumed, pairs(), quick(out_dir=tmp_path / "run", resume=True))
    assert same(whole, resumed)


def test_a_second_ctrl_c_is_at_once():
    def press(event):
        for _ in range(2): signal.raise_signal(signal.SIGINT)
        raise AssertionError("never reached")
    with pytest.raises(KeyboardInterrupt): train(tiny(), pairs(), quick(), press)


def test_the_precision_that_was_measured_is_recorded_and_a_resumed_run_takes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "native_bfloat16", lambda device: True)
    monkeypatch.setattr(training, "seconds_a_step", lambda m, b, lo, dtype: {"float32": 2.0, "bfloat16": 1.0}[dtype])
    config = dict(dtype="auto", out_dir=tmp_path / "run")
    train(tiny(), pairs(), quick(**config), lambda event: event.step == 3)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert stored["dtype"] == "auto" and stored["plan"]["dtype"] == "bfloat16" and "2.00 times" in stored["plan"]["dtype_reason"]
    monkeypatch.setattr(training, "seconds_a_step", lambda m, b, lo, dtype: {"float32": 1.0, "bfloat16": 9.0}[dtype])
    assert train(tiny(), pairs(), quick(**config, resume=True)).plan["dtype"] == "bfloat16"


def test_a_folder_with_a_run_is_not_overwritten_and_another_recipe_is_not_resumed(tmp_path):
    train(tiny(), pairs(), quick(out_dir=tmp_path / "run"))
    with pytest.raises(ValueError, match="already holds a run"): train(tiny(), pairs(), quick(out_dir=tmp_path / "run"))
    with pytest.raises(ValueError, match="has learning_rate=0.001, now it is 0.1"):
        train(tiny(), pairs(), quick(out_dir=tmp_path / "run", resume=True, learning_rate=0.1))
    with pytest.raises(ValueError, match="d_model"): train(tiny(d_model=8), pairs(), quick(out_dir=tmp_path / "run", resume=True))
    longer = train(tiny(), pairs(), quick(out_dir=tmp_path / "run", resume=True, steps=12))
    assert longer.steps == list(range(1, 13)), "a run may be made longer"


def test_latest_best_and_the_last_are_kept(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 5.0])
    def loss(logits, targets):
        nats, tokens = cross_entropy(logits, targets)
        return (nats, tokens) if logits.requires_grad else (torch.tensor(next(losses)), torch.tensor(1))
    train(tiny(), Stream(pairs(), pairs(1)), quick(out_dir=tmp_path, checkpoint_every=2, evaluate_every=2, keep_last=1), loss=loss)
    run = RunFolder(tmp_path)
    assert (run.best().name, run.latest().name) == ("step-4", "step-8") and [p.name for p in run.steps()] == ["step-4", "step-8"]


# what goes wrong

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_step_rate_and_checkpoint(bad, tmp_path):
    model, seen = tiny(), []
    def breaking(logits, targets):
        nats, tokens = cross_entropy(logits, targets)
        return (nats * bad if len(seen) == 5 else nats), tokens
    with pytest.raises(TrainingError, match=r"at step 6 .* learning rate 0\.000\d+; the last good checkpoint is .*step-4"):
        train(model, pairs(), quick(out_dir=tmp_path / "run", checkpoint_every=2), lambda event: seen.append(1), loss=breaking)
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_infinite_gradient_stops_before_it_reaches_the_weights():
    model = tiny()
    def loss(logits, targets):
        logits.register_hook(lambda g: g * math.inf)
        return cross_entropy(logits, targets)
    with pytest.raises(TrainingError, match="gradient's norm nan.*there is no checkpoint yet"): train(model, pairs(), quick(), loss=loss)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fill", [lambda: torch.empty(2**52), lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
                                  lambda: (_ for _ in ()).throw(MemoryError())])
def test_out_of_memory_names_the_three_settings(fill):
    def loss(logits, targets): return fill(), 1
    with pytest.raises(TrainingError) as error: train(tiny(), pairs(), quick(batch_size=8), loss=loss)
    for name in ("batch_size (now 8", "sequence_length", "gradient_checkpointing=True", "accumulate=2"): assert name in str(error.value)
    def other(logits, targets): raise RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"): train(tiny(), pairs(), quick(), loss=other)


# logs and pictures

def test_a_missing_logger_is_a_clear_error(monkeypatch):
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"pip install {name}"): train(tiny(), pairs(), quick(log=name))


def test_the_loggers_get_the_numbers(monkeypatch, tmp_path):
    from types import ModuleType, SimpleNamespace
    got, closed = [], []
    class SummaryWriter:
        def __init__(self, folder, purge_step): got.append((folder, purge_step))
        def add_scalar(self, name, value, step): got.append((name, value, step))
        def close(self): closed.append("tensorboard")
    board, weights_and_biases = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter = SummaryWriter
    weights_and_biases.init = lambda **k: SimpleNamespace(log=lambda d, step: got.append((d, step)), finish=lambda: closed.append("wandb"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", weights_and_biases)
    history = train(tiny(), pairs(), quick(steps=2, log="tensorboard"))
    assert got[0] == ("runs", 1) and ("loss", history.train_loss[1], 2) in got
    history = train(tiny(), pairs(), quick(steps=2, log="wandb"))
    assert got[-1][0]["loss"] == history.train_loss[1] and got[-1][1] == 2 and closed == ["tensorboard", "wandb"]


def test_the_bar_shows_loss_speed_and_mfu(capfd):
    train(tiny(), pairs(), quick(progress=True))
    bar = capfd.readouterr()
    assert bar.out == "" and all(word in bar.err for word in ("loss", "tokens/s", "MFU", "8/8"))


def test_curves_are_drawn_with_their_lines(tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    history = train(tiny(), Stream(pairs(), pairs(1)), quick(evaluate_every=2))
    for record in history.records:
        if "validation_loss" in record: record["floor_loss"] = 0.5
    axes = history.plot(tmp_path / "curve.png", lines={"ln V": math.log(24)})
    assert (tmp_path / "curve.png").stat().st_size > 5000 and [t.get_text() for t in axes.texts] == ["ln V", "floor"]
    axes = plot_losses({"one": history, "two": history})
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["one training", "one validation", "two training", "two validation"]
    with pytest.raises(FileNotFoundError, match="holds no run"): History.of_run(tmp_path)
    assert running_mean([1, 2, 3, 4], 0.5) == [1, 1.5, 2.5, 3.5]


def test_the_live_plot_redraws_in_one_place(monkeypatch):
    import IPython.display
    import matplotlib
    matplotlib.use("Agg")
    shown, updated = [], []
    class Place:
        def update(self, figure): updated.append(figure)
    monkeypatch.setattr(IPython.display, "display", lambda figure, display_id: shown.append(figure) or Place())
    train(tiny(), pairs(), quick(), training.LivePlot(every=3))
    assert len(shown) == 1 and len(updated) == 2, "at steps 3, 6 and 8"


# recipes

def test_every_recipe_of_the_package_loads_and_says_what_it_is_for():
    names = sorted(p.stem for p in (ROOT / "minillm").glob("*.yaml"))
    assert {"mini-50m", "tiny-51m", "small-20m", "mini-sinusoidal", "small-4b"} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        assert len(recipe.about) > 30 and recipe.train.steps > 0, name
    recipe = load_recipe("mini-50m", steps=2, dropout=0.1, data="tales")
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.model, recipe.data) == (2, 6e-4, {"dropout": 0.1}, "tales")
    assert (recipe.train.batch_size, recipe.train.sequence_length, recipe.train.accumulate, recipe.train.warmup_steps) == (16, 512, 4, 200)


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# Mine: to see.\nlearning_rate: 1e-3\nclip: null\nsteps: 5\nn_layers: 2\n", encoding="utf-8")
    recipe = load_recipe(path)
    assert (recipe.about, recipe.train.learning_rate, recipe.train.clip, recipe.train.steps, recipe.model) == ("Mine: to see.", 1e-3, None, 5, {"n_layers": 2})


@pytest.mark.parametrize("text, error", [("learnin_rate: 1", "the nearest is 'learning_rate'"), ("learning_rate: fast", "learning_rate must be a number"),
                                         ("just words", "name: value"), ("a: [", "is not YAML"), ("steps: 0", "steps must be at least 1")])
def test_a_faulty_recipe_is_a_clear_error(text, error, tmp_path):
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=error): load_recipe(tmp_path / "bad.yaml")


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="nearest is 'mini-50m'"): load_recipe("mini-50")
    with pytest.raises(FileNotFoundError): load_recipe("nowhere/mine.yaml")
    with pytest.raises(ValueError, match="no setting of a recipe"): make_recipe({"stepss": 3})
