"""Laws that were planted are found again; the sweep's branches are runs; killed, it goes on; its results are what the lesson says."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import scaling
from minillm.__main__ import main
from minillm.budget import count_parameters, flops_per_token
from minillm.checkpoints import RunFolder, load_model
from minillm.data import Corpus, tokenize_once
from minillm.model import MiniLLM
from minillm.scaling import Law, Points, as_points, bootstrap, compute_optimal, fit_law, forecast, interval, profile
from minillm.tokenizer import BPETokenizer
from minillm.training import TrainConfig, train

def grid(widths=scaling.WIDTHS, steps=scaling.STEPS):
    "Parameters and tokens (P, 2) of a whole sweep."
    n = [scaling.family_sizes(w)["multiplied"] for w in widths]
    return np.stack(np.meshgrid(n, 1000.0 * np.array(steps), indexing="ij"), -1).reshape(-1, 2)


def planted(exponents=(0.6, 0.7), at_middle=(3.0, 5.0), floor=36.0, sizes=None):
    "A law whose terms are `at_middle` in the middle of the sizes, and its losses."
    sizes = grid() if sizes is None else sizes
    middle = np.log(sizes).mean(0)
    law = Law(np.log(at_middle) + np.array(exponents) * middle, np.array(exponents), np.array(floor))
    return law, sizes, law.loss(sizes)


# ---- laws ----------------------------------------------------------------------------------------------------------


def test_a_law_by_hand():
    law = Law(np.log([8.0]), np.array([0.5]), np.array(1.0))
    assert np.allclose(law.loss(np.array([[1], [4], [16], [64]])), [9, 5, 3, 2])


def test_many_laws_at_once_are_the_single_ones():
    laws = Law(np.log([[8.0, 2.0], [1.0, 3.0]]), np.array([[0.5, 1.0], [0.2, 0.3]]), np.array([1.0, 0.0]))
    sizes = np.array([[1.0, 2.0], [4.0, 4.0], [10.0, 1.0]])
    assert laws.loss(sizes).shape == (2, 3)
    assert np.allclose(laws.loss(sizes), [laws[0].loss(sizes), laws[1].loss(sizes)])


@settings(max_examples=25, deadline=None)
@given(st.floats(0.2, 1.2), st.floats(0.2, 1.2), st.floats(0.5, 20), st.floats(0.5, 20), st.floats(1, 100))
def test_a_planted_law_is_found_with_the_floor_known(alpha, beta, a, b, floor):
    law, sizes, losses = planted((alpha, beta), (a, b), floor)
    found = fit_law(sizes, losses, floor)
    assert np.allclose(found.exponent, (alpha, beta), atol=1e-4) and np.allclose(found.loss(sizes), losses, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.3, 1.2), st.floats(0.3, 1.2), st.floats(1, 20), st.floats(1, 20))
def test_without_noise_the_blind_fit_finds_the_floor_too(alpha, beta, a, b):
    law, sizes, losses = planted((alpha, beta), (a, b), 36.0)
    found = fit_law(sizes, losses)
    assert np.allclose(found.loss(sizes), losses, rtol=1e-3) and abs(found.floor - 36) < 1


def test_one_size_alone_and_two_points():
    found = fit_law([1, 4], [9, 5], 1.0)
    assert np.allclose(found.exponent, 0.5) and np.allclose(found.loss([[16], [64]]), [3, 2])


def test_three_points_fix_a_floor_by_hand():
    found = fit_law([1, 4, 16], [9, 5, 3])
    assert np.allclose([found.floor, *found.exponent], [1, 0.5], atol=1e-3)


def test_slopes_are_the_derivatives_of_the_residuals():
    rng = np.random.default_rng(0)
    x, y, theta = rng.normal(size=(6, 2)), rng.normal(size=6), rng.normal(size=(1, 5))
    residuals, slopes = scaling.log_residuals(theta, x, y)
    by_hand = np.log(np.exp(theta[0, 0] - theta[0, 2] * x[:, 0]) + np.exp(theta[0, 1] - theta[0, 3] * x[:, 1]) + np.exp(theta[0, 4])) - y
    assert np.allclose(residuals[0], by_hand)
    for k in range(5):
        moved = theta.copy(); moved[0, k] += 1e-6
        assert np.allclose((scaling.log_residuals(moved, x, y)[0] - residuals)[0] / 1e-6, slopes[0, :, k], atol=1e-5)


def test_descent_ends_where_torch_lbfgs_ends():
    "Hoffmann et al. used L-BFGS; ours must not stop earlier."
    _, sizes, losses = planted()
    losses = losses * np.exp(0.05 * np.random.default_rng(1).normal(size=len(losses)))
    law = fit_law(sizes, losses, delta=0.03)
    x, y = torch.tensor(np.log(sizes)), torch.tensor(np.log(losses))
    def cost(law_scale, law_exponent, log_floor):
        parts = torch.cat([law_scale - law_exponent * (x - x.mean(0)), log_floor.expand(len(x), 1)], 1)
        return torch.nn.functional.huber_loss(torch.logsumexp(parts, 1), y, reduction="sum", delta=0.03)
    middle = np.log(sizes).mean(0)
    ours = [torch.tensor(law.log_scale - law.exponent * middle), torch.tensor(law.exponent), torch.tensor([np.log(law.floor)])]
    theirs = [t.clone().requires_grad_() for t in ours]
    lbfgs = torch.optim.LBFGS(theirs, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    def closure():
        lbfgs.zero_grad(); loss = cost(*theirs); loss.backward()
        return loss
    lbfgs.step(closure)
    assert cost(*ours).item() <= cost(*theirs).item() * (1 + 1e-5)


def test_a_wild_point_bends_squares_and_not_huber():
    law, sizes, losses = planted()
    losses = losses * np.exp(0.01 * np.random.default_rng(0).normal(size=len(losses)))
    wild = losses.copy(); wild[-1] *= 1.5
    robust, squares = fit_law(sizes, wild, 36.0, delta=0.03), fit_law(sizes, wild, 36.0, delta=100.0)
    assert abs(robust.exponent - law.exponent).max() < 0.25 * abs(squares.exponent - law.exponent).max()


def test_intervals_cover_what_was_planted_about_as_often_as_they_say():
    law, sizes, losses = planted()
    rng, hits = np.random.default_rng(0), np.zeros(3)
    for seed in range(30):
        noisy = 36 + (losses - 36) * np.exp(0.05 * rng.normal(size=len(losses)))
        blind, known = (bootstrap(sizes, noisy, floor, samples=60, seed=seed) for floor in (None, 36.0))
        for k, (values, truth) in enumerate([(blind.floor, 36.0), (blind.exponent[:, 1], 0.7), (known.exponent[:, 1], 0.7)]):
            low, high = interval(values)
            hits[k] += low <= truth <= high
    assert (hits >= 17).all() and hits.sum() < 88, hits       # 24 of 30 each, if 80 % is 80 %


def test_groups_are_drawn_together():
    law, sizes, losses = planted()
    labels = np.repeat(np.arange(len(scaling.WIDTHS)), len(scaling.STEPS))
    luck = np.exp(0.2 * np.random.default_rng(0).normal(size=len(scaling.WIDTHS)))[labels]      # of each trunk
    noisy = 36 + (losses - 36) * luck
    def spread(laws): return np.subtract(*interval(laws.exponent[:, 0])[::-1])
    assert spread(bootstrap(sizes, noisy, 36.0, groups=labels)) > 1.3 * spread(bootstrap(sizes, noisy, 36.0))


def test_a_blind_bootstrap_from_a_floor_of_zero_finds_what_refits_find():
    "All points are fitted best with no floor; a third of the draws are not, and must not stay where that fit stands."
    sizes = np.stack(np.meshgrid(np.geomspace(2e4, 1e6, 4), np.geomspace(1e5, 8e5, 4), indexing="ij"), -1).reshape(-1, 2)
    _, _, losses = planted((0.3, 0.5), (20.0, 40.0), 5.0, sizes)
    losses = losses * np.exp(0.05 * np.random.default_rng(8).normal(size=16))
    assert fit_law(sizes, losses).floor < 1e-9
    drawn = np.random.default_rng(0).multinomial(16, np.full(16, 1 / 16), 20)
    refits = [fit_law(sizes[again], losses[again]).floor for again in (np.repeat(np.arange(16), counts) for counts in drawn)]
    assert sum(floor > 1 for floor in refits) == 6
    assert np.allclose(bootstrap(sizes, losses, samples=20).floor, refits, atol=0.1)


def test_what_cannot_be_fitted_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="2 points cannot fix 3 numbers"): fit_law([1, 2], [3, 2])
    with pytest.raises(ValueError, match="not above the floor 2"): fit_law([1, 2, 3], [3, 2, 1], 2.0)


def test_the_profile_is_lowest_where_the_blind_fit_ends():
    _, sizes, losses = planted()
    losses = 36 + (losses - 36) * np.exp(0.05 * np.random.default_rng(2).normal(size=len(losses)))
    blind = fit_law(sizes, losses)
    floors = [float(blind.floor) + shift for shift in (-0.5, 0, 0.5)]
    laws, misfit = profile(sizes, losses, floors)
    assert misfit[1] < min(misfit[0], misfit[2]) and np.allclose(laws.floor, floors)
    assert np.allclose(laws.exponent[1], blind.exponent, rtol=0.01)
    assert laws.exponent[0].sum() < laws.exponent[2].sum(), "a lower floor has flatter laws"


def test_the_best_size_in_closed_form_is_the_best_of_a_thousand():
    law, _, _ = planted()
    for budget in (1e12, 1e15):
        best = compute_optimal(law, budget)
        assert np.isclose(6 * best.prod(), budget)
        n = best[0] * np.geomspace(0.1, 10, 1001)
        assert law.loss(np.stack([n, budget / 6 / n], 1)).argmin() == 500


def test_along_a_budget_every_width_spends_it():
    law, _, _ = planted()
    widths, losses = scaling.along_budget(law, 1e13, 128.0)
    width = int(widths[40])
    tokens = 1e13 / flops_per_token(scaling.family_config(width), 128, training=True)
    assert np.isclose(losses[40], law.loss([[scaling.family_sizes(width)["multiplied"], tokens]])[0])
    assert 0 < losses.argmin() < len(losses) - 1, "too small and too large are both worse"


def test_a_trunk_is_read_off_between_its_points():
    points = Points(np.array([16, 16, 32, 32]), np.array([100.0, 400.0, 100.0, 400.0]), np.array([8.0, 2.0, 9.0, 3.0]), None, 128.0)
    widths, losses = scaling.measured_along(points, float(points.flops()[0]) * 2)
    assert widths.tolist() == [16] and np.isclose(losses[0], 4.0), "half way in logs; 32 never had so small a budget"


def test_a_valley_by_hand():
    assert np.isclose(scaling.valley([1, 10, 100], [2, 1, 2]), 10)
    assert scaling.valley([1, 10, 100], [3, 2, 1]) is None and scaling.valley([1, 10], [2, 1]) is None


# ---- sizes and budgets ---------------------------------------------------------------------------------------------


def test_sizes_of_the_family_are_those_of_the_models():
    for width in (16, 48, 128):
        model, sizes = MiniLLM(scaling.family_config(width)), scaling.family_sizes(width)
        assert sizes["all"] == model.num_parameters()
        matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        assert sizes["multiplied"] == matrices and sizes["body"] == matrices - model.head.weight.numel()


def test_the_family_spans_what_the_course_promises():
    sizes = [scaling.family_sizes(w)["body"] for w in scaling.WIDTHS]
    assert len(sizes) >= 8 and sizes[0] < 1e4 and sizes[-1] > 0.9e6
    assert 3.5 < scaling.family_sizes(scaling.CHECK_WIDTH)["multiplied"] / scaling.family_sizes(scaling.WIDTHS[-1])["multiplied"] < 4.5


# ---- the sweep -----------------------------------------------------------------------------------------------------


TODO = [("tales-short", width, steps) for steps in (10, 20) for width in (8, 16)]

@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    "The folder of a sweep with its data and nothing else: enough for 60 steps."
    folder = tmp_path_factory.mktemp("sweep")
    scaling.sweep_data("tales-short", folder, steps=60)
    return folder / "data"


@pytest.fixture
def small(monkeypatch, tokens, tmp_path):
    "A sweep of seconds: two widths, two branches, on data that is there; measured on a few tales."
    shutil.copytree(tokens, tmp_path / "data")
    data, measure = scaling.sweep_data("tales-short", tmp_path, steps=60), scaling.measure
    monkeypatch.setattr(scaling, "STEPS", (10, 20))
    monkeypatch.setattr(scaling, "sweep_data", lambda corpus, folder: data)
    monkeypatch.setattr(scaling, "measure", lambda run, data, max_batches: measure(run, data, 4))
    return TODO


def test_a_branch_is_the_run_that_never_branched(small, tmp_path):
    "Bit for bit: the trunk to 80 % of 20 steps by way of a branch at 10, then cooled down, is one run of 20 steps."
    scaling.run_sweep(tmp_path, todo=[("tales-short", 8, 10)])
    data, run = scaling.sweep_data("tales-short", tmp_path), tmp_path / "tales-short-8"
    scaling.advance(run, 8, data, 20, 16)
    scaling.advance(run, 8, data, 20, 20)
    torch.manual_seed(0)
    straight = MiniLLM(scaling.family_config(8))
    train(straight, data.batches(data.train), TrainConfig(
        steps=20, batch_size=scaling.BATCH_SIZE, optimizer="muon", learning_rate=scaling.learning_rate(8), schedule="wsd",
        cooldown_share=scaling.COOLDOWN, warmup_steps=20, dtype="float32", device="cpu", evaluate_every=0, progress=False))
    branched = load_model(run, "cpu", "float32")[0].state_dict()
    assert all(torch.equal(weight, branched[name]) for name, weight in straight.state_dict().items())


def test_a_batch_of_other_text_is_of_many_documents(tmp_path):
    "Laid end to end, one long source file fills many batches, and a short run ends with what it read last."
    documents = [letter * 6000 for letter in "abcdefgh"]
    tokenizer = BPETokenizer.train(["abcdefgh"], 258)
    tokens = tokenize_once(Corpus("letters", "train", lambda: iter(documents), "letters"), tokenizer, tmp_path, progress=False)
    batches = iter(scaling.SweepData("letters", tokenizer, tokens, tokens).batches(tokens))
    assert all(len(set(inputs[:, 0].tolist())) > 2 for inputs, _ in (next(batches) for _ in range(5)))


def test_a_sweep_goes_on_and_does_nothing_twice(small, tmp_path):
    seen = []
    first = scaling.run_sweep(tmp_path, seen.extend, todo=small[:3])
    again = scaling.run_sweep(tmp_path, seen.extend, todo=small)
    assert again[:len(first)] == first and len(again) == 8 and seen == again
    assert [r["steps"] for r in again if r["cooled"]] == [10, 10, 20, 20]
    assert [r["steps"] for r in again if not r["cooled"]] == [8, 8, 16, 16]
    assert not list(tmp_path.glob("*-*-*-*")) and not scaling.missing_jobs(again, small)
    assert scaling.run_sweep(tmp_path, seen.extend, todo=small) == again and len(seen) == 8
    assert RunFolder(tmp_path / "tales-short-8").latest().name == "step-16"


def test_no_point_is_begun_after_the_time_is_up(small, tmp_path):
    assert scaling.run_sweep(tmp_path, todo=small, max_seconds=-1) == []


def test_the_command_says_what_there_is_and_what_is_missing(tmp_path, capsys):
    assert main(["scaling", "--out-dir", str(tmp_path), "--max-minutes", "-1"]) == 0
    assert capsys.readouterr().out.startswith(f"0 points in {tmp_path / 'scaling.json'}; {len(list(scaling.jobs()))} branches to go")
    assert scaling.load_results(tmp_path / "scaling.json") == ([], None)


def test_a_killed_sweep_ends_as_one_that_was_not(small, tmp_path):
    script = """
import sys; from pathlib import Path; from minillm import scaling
data, measure = scaling.sweep_data("tales-short", Path(sys.argv[1]), steps=60), scaling.measure
scaling.sweep_data = lambda corpus, folder: data
scaling.measure = lambda run, data, max_batches: measure(run, data, 4)
scaling.run_sweep(sys.argv[1], lambda points: print(points, flush=True), todo=[("tales-short", 8, s) for s in (20, 40, 60)])
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL); process.wait()
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    whole = scaling.run_sweep(tmp_path / "other", todo=[("tales-short", 8, s) for s in (20, 40, 60)])
    def result(folder): return [{k: v for k, v in json.loads(line).items() if k != "train_seconds"}
                                for line in (folder / "points.jsonl").read_text().splitlines()]
    assert result(tmp_path) == result(tmp_path / "other") and len(whole) == 6 and killed.stdout


def test_results_come_back_as_they_were_saved(small, tmp_path):
    rows = scaling.run_sweep(tmp_path, todo=small)
    scaling.save_results(tmp_path, tmp_path / "results.json")
    assert scaling.load_results(tmp_path / "results.json") == (rows, None)
    points = as_points(rows, "tales-short")
    assert len(points) == 4 and (points.loss > points.floor).all()
    assert (points.flops() == points.tokens * [flops_per_token(scaling.family_config(w), round(points.length), True) for w in points.width.tolist()]).all()
    with pytest.raises(ValueError, match="no cooled points of 'pycode'"): as_points(rows, "pycode")


def test_a_sweep_continues_from_its_results_alone(small, tmp_path):
    rows = scaling.run_sweep(tmp_path, todo=small[:2])
    scaling.save_results(tmp_path, tmp_path / "results.json")
    scaling.continue_from(tmp_path / "results.json", tmp_path / "new")
    assert scaling.run_sweep(tmp_path / "new", todo=small[:2]) == rows, "nothing is trained again"
    assert not (tmp_path / "new" / "tales-short-8").exists()
    more = scaling.run_sweep(tmp_path / "new", todo=small[:3])
    same = scaling.run_sweep(tmp_path, todo=small[:3])
    assert [r["nats"] for r in more] == [r["nats"] for r in same], "a trunk that is gone is trained again, to the same weights"
    scaling.continue_from(tmp_path / "other.json", tmp_path / "new")
    assert scaling.run_sweep(tmp_path / "new", todo=small[:3]) == more, "a sweep with points of its own keeps them"


def test_the_forecast_is_made_before_the_large_model_and_never_again(small, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "CHECK_WIDTH", 32)
    law, sizes, losses = planted(sizes=grid((8, 16, 24, 32), (10, 20)))
    rows = scaling.run_sweep(tmp_path, todo=[*small, ("tales-short", 16, 30)])
    scaling.run_sweep(tmp_path, todo=[("tales-short", 32, 10)])
    promised = (tmp_path / "forecast.json").read_bytes()
    assert json.loads(promised)["points"] == len([r for r in rows if r["cooled"]]) == 5 and "known" in json.loads(promised)
    scaling.run_sweep(tmp_path, todo=[("tales-short", 32, 20)])
    assert (tmp_path / "forecast.json").read_bytes() == promised


def test_a_forecast_of_a_planted_law_holds_the_truth():
    law, sizes, losses = planted()
    noisy = 36 + (losses - 36) * np.exp(0.03 * np.random.default_rng(0).normal(size=len(losses)))
    width = np.repeat(scaling.WIDTHS, len(scaling.STEPS))
    points = Points(width, sizes[:, 1], noisy, 36.0, 128.0)
    beyond = [[4 * sizes[:, 0].max(), sizes[:, 1].max()]]
    found, truth = forecast(points, beyond, samples=200), law.loss(beyond)[0]
    for name in ("known", "blind"): assert abs(found[name]["loss"][0] / truth - 1) < 0.02
    low, high = found["known"]["interval"][0]
    assert low - 0.1 < truth < high + 0.1


def test_the_packaged_results_are_whole():
    rows, promised = scaling.load_results()
    for row in rows:
        assert row["nats"] > (row["floor"] or 0) and row["tokens"] > 0
        assert row["steps"] == row["branch"] if row["cooled"] else row["steps"] == row["branch"] - round(0.2 * row["branch"])
    known = {(r["corpus"], r["width"], r["branch"], r["cooled"]) for r in rows}
    assert len(known) == len(rows) and {(*job, cooled) for job in scaling.jobs() for cooled in (True, False)} == known
    assert not scaling.missing_jobs(rows)
    assert promised["points"] == 32, "made from the family's branches of up to 800 steps"


def test_what_the_lesson_says_of_the_checks_is_so():
    rows, promised = scaling.load_results()
    points, tokens = as_points(rows, check=True), np.log(np.array(promised["sizes"])[:, 1])
    assert sorted(r["branch"] for r in rows if r["width"] == scaling.CHECK_WIDTH and r["cooled"]) == [200, 400, 800, 1600]
    def at(name, column):
        law = promised[name]
        return np.interp(np.log(points.tokens), tokens, np.column_stack([law["loss"], law["interval"]])[:, column])
    assert (points.loss < at("known", 1)).all(), "too gloomy, each time"
    assert ((at("blind", 1) <= points.loss) & (points.loss <= at("blind", 2))).tolist() == [True, True, True, False]
    nearer = abs(at("known", 0) - points.loss) < abs(at("blind", 0) - points.loss)
    assert nearer.tolist() == [False, True, True, True] and at("blind", 0)[-1] < points.floor


def test_the_count_of_budget_and_ours_agree():
    config = scaling.family_config(64)
    assert scaling.family_sizes(64)["all"] == sum(count_parameters(config).values())
    assert (ROOT / "minillm" / "scaling.json").stat().st_size < 100_000
