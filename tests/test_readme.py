"""README is true: its quick commands run as they stand, its program runs, its table and links name what is there."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SLOW = re.compile(r"#.*\b(minutes?|hours?|days?)\b")     # a command that takes longer says so in its comment


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_quick_commands_run_as_they_stand(tmp_path):
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith(("python -m minillm", "echo "))]
    quick = [line for line in commands if not SLOW.search(line)]
    assert len(quick) >= 6, "README shows the commands"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for line in quick:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_the_program_of_six_lines_runs(tmp_path, monkeypatch, capsys):
    [program] = [block for block in blocks("python") if "my_text.txt" in block]
    assert len(program.strip().splitlines()) <= 7
    text = " ".join(f"The {n} apples were sweet, and the {n + 1} pears were not." for n in range(400))
    (tmp_path / "my_text.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    exec(compile(re.sub(r"steps=\d+", "steps=20", program), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}"


def test_the_table_lists_every_lesson():
    listed = set(re.findall(r"\(notebooks/(\w+\.ipynb)\)", README))
    assert listed == {p.name for p in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.mark.parametrize("target", ["quickstart", "test", "lab"])
def test_make_knows_the_targets_of_the_readme(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
