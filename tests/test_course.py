"""Tests of the house itself: fresh exports, imports that go down, lessons that keep their face, a wheel with nothing else in it."""
import ast
import base64
import filecmp
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from tools import lessons, shapes

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "minillm").glob("*.py") if not p.stem.startswith("__"))
NUMBER = {re.search(r"default_exp (\w+)", p.read_text(encoding="utf-8"))[1]: int(p.name[:2]) for p in NOTEBOOKS if "default_exp" in p.read_text(encoding="utf-8")}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


def imports_of(path: Path) -> set[str]:
    "The modules of the package that a module imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level == 1 and node.module: found.add(node.module)
            elif node.level == 1 or node.module == "minillm": found |= {a.name for a in node.names}
            elif (node.module or "").startswith("minillm."): found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("minillm.")}
    return found


def differences(fresh: Path, stored: Path) -> dict[str, list[str]]:
    "Modules missing, orphaned and stale in `stored`, against a fresh export."
    ours = {p.name for p in stored.glob("*.py") if not p.stem.startswith("__")}
    new = {p.name for p in fresh.glob("*.py") if not p.stem.startswith("__")}
    stale = [n for n in new & ours if not filecmp.cmp(fresh / n, stored / n, shallow=False)]
    return {kind: names for kind, names in {"missing": sorted(new - ours), "orphaned": sorted(ours - new), "stale": sorted(stale)}.items() if names}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    "All notebooks exported afresh, in a folder of the same layout."
    top = tmp_path_factory.mktemp("fresh")
    (top / "notebooks").mkdir(); (top / "minillm").mkdir()
    (top / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for path in NOTEBOOKS: (top / "notebooks" / path.name).write_bytes(path.read_bytes())
    script = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from tools.lessons import export\n" \
             "for path in sorted(Path('notebooks').glob('*.ipynb')): export(path, Path('minillm'))"
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([sys.executable, "-c", script, str(ROOT)], cwd=top, check=True, env=environment)
    return top / "minillm"


def test_modules_are_what_the_notebooks_export(fresh):
    assert not differences(fresh, ROOT / "minillm"), "run `make export`; never edit a generated module"


def test_a_hand_edit_a_missing_and_an_orphaned_module_are_noticed(fresh, tmp_path):
    for path in fresh.glob("*.py"): (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not differences(fresh, tmp_path)
    (tmp_path / "tales.py").write_text((tmp_path / "tales.py").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    (tmp_path / "model.py").unlink()
    (tmp_path / "stray.py").write_text("", encoding="utf-8")
    assert differences(fresh, tmp_path) == {"missing": ["model.py"], "orphaned": ["stray.py"], "stale": ["tales.py"]}


@each_module
def test_module_imports_alone_and_quietly(path, tmp_path):
    done = subprocess.run([sys.executable, "-c", f"import minillm.{path.stem}"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@each_module
def test_module_imports_only_lower_lessons(path):
    higher = {name for name in imports_of(path) if name != "__version__" and NUMBER.get(name, 99) >= NUMBER[path.stem]}
    assert not higher, f"lesson {NUMBER[path.stem]} imports {higher}"


def test_nobody_imports_the_roof():
    for path in MODULES:
        assert not re.search(r"from minillm import (?!__version__)|^import minillm$|__main__ import", path.read_text(encoding="utf-8"), re.M), path.name


def test_each_name_is_exported_by_one_module():
    owners = {}
    for path in MODULES:
        names = re.search(r"^__all__ = \[(.*?)\]", path.read_text(encoding="utf-8"), re.M | re.S)[1]
        for name in re.findall(r"'(\w+)'", names): owners.setdefault(name, []).append(path.stem)
    assert not {name: where for name, where in owners.items() if len(where) > 1}


def test_public_names_are_there_and_come_lazily():
    script = "import sys, minillm; assert 'torch' not in sys.modules; [getattr(minillm, n) for n in minillm.__all__]; print(len(minillm.__all__))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 12


def test_no_star_import_anywhere():
    sources = [p.read_text(encoding="utf-8") for p in [*MODULES, *(ROOT / "tests").glob("*.py"), *(ROOT / "tools").glob("*.py"), *NOTEBOOKS]]
    assert not any(re.search(r"from [\w.]+ import \*", s) for s in sources)


def test_lint_is_clean():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("line, true", [("y = x.transpose(0, 1)  # (T, B)", True), ("y = x.transpose(0, 1)  # (B, T)", False),
                                        ("return x.flatten()  # (B*T,)", True), ("return x.flatten()  # (T,)", False)])
def test_a_false_shape_comment_is_noticed(line, true):
    import torch
    space = {}
    exec(shapes.instrument(f"def f(x):\n    x = x + 1  # (B, T)\n    {line}\nfrom torch import Tensor\n", "planted"), space)
    if true: space["f"](torch.zeros(2, 3))
    else:
        with pytest.raises(AssertionError, match="planted:3 says"): space["f"](torch.zeros(2, 3))


@each_notebook
def test_lesson_keeps_its_face(path):
    cells = nbformat.read(path, as_version=4).cells
    by_id = {c.id: c for c in cells}
    assert len(by_id) == len(cells), "cell ids are unique"
    assert [c.id for c in cells[:3]] == ["title", "setup", "where"]
    assert re.match(rf"# {path.name[:2]} · .+\n\n> .+", by_id["title"].source) and lessons.badge(path.stem) in by_id["title"].source
    assert by_id["setup"].source == lessons.setup_cell(), "run `make write`: set-up cells are the same everywhere"
    where = by_id["where"].source
    assert "attachment:where.png" in where and "where.png" in by_id["where"].attachments and "After this you can" in where
    assert "| reading | trying | running | memory | downloads | needs |" in where
    assert by_id["clean-import"] is [c for c in cells if c.cell_type == "code"][-1], "the last code cell imports what the lesson exported"


@each_notebook
def test_lesson_is_stored_executed_and_small(path):
    text = path.read_text(encoding="utf-8")
    code = [c for c in nbformat.reads(text, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), "run `make store`"
    assert len(code) <= 60 and len(text) < 1_000_000
    assert "widget-state" not in text and "widget-view" not in text and "\\r" not in "".join(map(str, [c.outputs for c in code]))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error" or "raises-exception" in cell.metadata.get("tags", []), cell.id
            assert output.get("name") != "stderr", cell.id
            shown = json.dumps(output.get("text", "")) + json.dumps({k: v for k, v in output.get("data", {}).items() if "image" not in k})
            assert not re.search(r"/(home|root|work|tmp|Users)/", shown), f"{cell.id} shows a path of a machine"
            for kind, data in output.get("data", {}).items():
                if kind == "image/png": assert len(base64.b64decode(data)) < 120_000, f"{cell.id}: a picture of {len(data):,} characters"


def test_one_repository_address_everywhere():
    address = lessons.repository().removeprefix("https://github.com/")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *NOTEBOOKS]:
        for other in re.findall(r"(?:colab\.research\.google\.com/github|git\+https://github\.com)/([\w.-]+/[\w.-]+?)(?=/blob|[\"\\ )]|$)",
                                path.read_text(encoding="utf-8")):
            assert other == address, f"{path.name}: {other}"


def test_nobody_is_told_to_install_the_other_minillm():
    for path in [ROOT / "README.md", *NOTEBOOKS]:
        assert not re.search(r"pip install[^\n\"]* minillm(?![\w-])", path.read_text(encoding="utf-8")), path.name


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ["pyproject.toml", "README.md", "LICENSE"]: (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "minillm").mkdir()
    expected = set()
    for path in (ROOT / "minillm").iterdir():
        if path.is_file() and path.suffix in {".py", ".json", ".yaml", ".safetensors", ".typed"}:
            (copy / "minillm" / path.name).write_bytes(path.read_bytes())
            expected.add(f"minillm/{path.name}")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)], check=True)
    [wheel] = tmp_path.glob("minillm_course-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in names if ".dist-info/" not in n} == expected and "minillm/py.typed" in expected


def test_lines_of_the_package_are_at_most_120_characters_long():
    "But for what the lesson's title and nbdev write in one line, and for links."
    for path in (ROOT / "minillm").glob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fine = len(line) <= 120 or number == 1 or line.startswith("__all__") or "http" in line
            assert fine, f"{path.name}:{number} has {len(line)} characters"
