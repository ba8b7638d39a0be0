"""Lesson 00 and the command `quickstart` are one and the same run."""
import re
from functools import partial

import nbformat
import pytest
from conftest import ROOT

from minillm.training import load_recipe

SHORT = {"steps": 3, "max_samples": 200, "evaluate_every": 0, "progress": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))


def test_the_recipe_compares_with_the_floor_and_repeats():
    recipe = load_recipe("quickstart")
    assert recipe.data == "tales-short" and recipe.train.batches in ("auto", "documents")   # whole tales: a known floor
    assert recipe.train.dtype == "float32" and recipe.train.evaluate_every > 0


def test_the_lesson_trains_exactly_as_the_command_does():
    from minillm.__main__ import run_recipe
    cells = nbformat.read(ROOT / "notebooks" / "00_quickstart.ipynb", as_version=4).cells
    code = [c for c in cells if c.cell_type == "code" and c.id != "setup"]
    space = {}
    for cell in code:
        exec(cell.source, space)
        space["load_recipe"] = partial(load_recipe, **SHORT)
        if cell.id == "imports": space["LivePlot"] = lambda **options: lambda event: None
        if cell.id == "train": break
    _, history = run_recipe(load_recipe("quickstart", **SHORT))
    assert len(history.train_loss) == 3 and history.train_loss == space["history"].train_loss


def test_the_lessons_table_names_every_lesson_and_links_to_it():
    table = next(c.source for c in nbformat.read(ROOT / "notebooks" / "00_quickstart.ipynb", as_version=4).cells if c.id == "next")
    linked = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", table)
    there = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} - {"00_quickstart.ipynb"}
    assert set(linked) >= there
