"""The models of the package reach what is written beside them, on text that they never saw. Nothing is trained here."""
from pathlib import Path

import pytest

import minillm
from minillm.checkpoints import load_model, packaged_models
from minillm.data import TALE_CORPORA
from minillm.evaluation import score_tales, text_report
from minillm.sampling import Generator
from minillm.tales import TaleWorld
from minillm.training import load_recipe
from tools import package

ROOT = Path(minillm.__file__).resolve().parent.parent
TALES = ["tales", "tales-short"]
GOALS = {"tales": (0.02, 0.60), "tales-short": (0.003, 0.95)}      # excess as a share of the floor at most, valid tales at least


def test_these_are_the_models_and_each_is_small_and_has_a_recipe_and_a_curve():
    assert packaged_models() == ["pydocs", *TALES]
    for name in packaged_models():
        model, tokenizer, about = load_model(name, "cpu", "float32")
        assert (ROOT / "minillm" / f"{name}.safetensors").stat().st_size < 8e6
        assert load_recipe(about["recipe"]).data == about["data"] and len(about["curve"]) > 5
        assert about["curve"][-1][0] == pytest.approx(about["training"]["tokens"] / 1e6, abs=0.01)
        assert minillm.load(name).generate("The", max_new_tokens=5, seed=0)


@pytest.mark.parametrize("name", TALES)
def test_a_model_of_tales_is_as_near_the_floor_as_its_record_says(name):
    model, tokenizer, about = load_model(name, "cpu", "float32")
    world = TaleWorld(TALE_CORPORA[about["data"]], seed=31_337)
    told, recipe = about["training"]["tales"][-1], load_recipe(about["recipe"])
    assert (told["version"], told["seed"], told["count"]) == (world.version, recipe.train.seed, recipe.max_samples)
    excess = score_tales(model, tokenizer, world, [tale.text for tale in world.tales(300)]).excess
    low, high = about["excess_interval"]
    assert low <= excess.high and excess.low <= high
    most, least = GOALS[name]
    assert about["loss_nats_per_token"] <= (1 + most) * about["floor_nats_per_token"]
    assert about["valid_bound"] < about["valid_share"] <= 1 and about["valid_share"] >= least
    assert about["new_share"] >= 0.99 and about["samples"] == 1000


def test_a_model_of_real_text_pays_what_its_record_says():
    model, tokenizer, about = load_model("pydocs", "cpu", "float32")
    documents = package.unseen(about["data"])
    report, _ = text_report(Generator(model, tokenizer), documents)
    near = 0.02 if package.fingerprint(documents) == about["fingerprint"] else 0.10
    assert report["loss_nats_per_token"] == pytest.approx(about["loss_nats_per_token"], rel=near)
