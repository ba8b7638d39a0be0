"""The notebooks behind make: text to edit, export to the package, execute and store, figures.

    python tools/lessons.py write 01     .build/01_*.py -> notebooks/01_*.ipynb (ids, tags and outputs of unchanged cells stay)
    python tools/lessons.py text 01      notebooks/01_*.ipynb -> .build/01_*.py
    python tools/lessons.py export 01    notebooks/01_*.ipynb -> minillm/*.py
    python tools/lessons.py store 01     execute in place from a clean kernel, then clean what is stored
    python tools/lessons.py figures      every stored picture to .build/figures; those tagged figure:NAME that README.md shows to plots/NAME.png
    python tools/lessons.py address URL  one repository address everywhere

Several lessons may be named; none means all. A store is byte-identical from run to run (same pinned matplotlib), timings aside.
"""
import argparse
import base64
import io
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, PACKAGE, BUILD, PLOTS = ROOT / "notebooks", ROOT / "minillm", ROOT / ".build", ROOT / "plots"
STAGES = [("tales", 1), ("tokenizer", 2), ("data", 3), ("n-grams", 4), ("attention", 5), ("positions", 6), ("blocks", 7),
          ("model", 8), ("optimizers", 9), ("checkpoints", 10), ("training", 11), ("sampling", 12), ("evaluation", 13),
          ("budget", 14), ("scaling", 15), ("interop", 16), ("interpre-\ntability", 21)]


def repository() -> str:
    "The one repository address, as pyproject.toml has it."
    return re.search(r'^Repository = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]


def setup_cell() -> str:
    "The source of every lesson's set-up cell: installs the course's package in Colab, and checks everywhere that `minillm` is ours."
    return f'''# Set-up: Colab installs the course's package here; elsewhere this only checks that it is there.
import importlib.metadata, sys
if "google.colab" in sys.modules:
    %pip install -q "minillm-course @ git+{repository()}"
try:
    importlib.metadata.version("minillm-course")
except importlib.metadata.PackageNotFoundError:
    raise ImportError("The course's package is not installed here: run `make lab`, or `pip install -e .` in the course's folder.") from None'''


def badge(name: str) -> str:
    "The Colab badge of lesson `name`, a file name without ending."
    target = repository().replace("https://github.com", "https://colab.research.google.com/github")
    return (f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target}/blob/main/notebooks/{name}.ipynb)")


def lessons(wanted: list[str], folder: Path = NOTEBOOKS, ending: str = ".ipynb") -> list[Path]:
    "Files of the lessons whose names begin with one of `wanted`; all of them where nothing is wanted."
    found = [p for p in sorted(folder.glob(f"[0-9][0-9]_*{ending}")) if not wanted or any(p.stem.startswith(w) for w in wanted)]
    if not found: sys.exit(f"no lesson {' '.join(wanted) or 'at all'} in {folder.name}/")
    return found


def to_text(path: Path) -> None:
    "A notebook as percent text to edit, under .build/. The set-up cell is left to `write`."
    import jupytext
    notebook = jupytext.read(path)
    for cell in notebook.cells:
        cell.metadata["id"] = cell.id
        if cell.id == "setup": cell.source = "# set-up"
        cell.pop("attachments", None)
    notebook.metadata = {"jupytext": {"notebook_metadata_filter": "-all", "cell_metadata_filter": "id,tags"}}
    BUILD.mkdir(exist_ok=True)
    jupytext.write(notebook, BUILD / f"{path.stem}.py", fmt="py:percent")


def to_notebook(path: Path) -> None:
    "Percent text into its notebook; a cell whose id and source are unchanged keeps its outputs."
    import jupytext
    notebook, target = jupytext.read(path, fmt="py:percent"), NOTEBOOKS / f"{path.stem}.ipynb"
    old = {c.id: c for c in nbformat.read(target, as_version=4).cells} if target.exists() else {}
    taken = set()
    for number, cell in enumerate(notebook.cells):
        cell.id = cell.metadata.pop("id", None) or f"cell-{number}"
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
        if cell.id in taken: sys.exit(f"{path.name}: two cells have the id {cell.id!r}")
        taken.add(cell.id)
        if cell.id == "setup": cell.source, cell.metadata["tags"] = setup_cell(), ["setup"]
        if cell.id == "title": cell.source = re.sub(r"^\[!\[Open in Colab\].*$", badge(path.stem), cell.source, flags=re.M)
        if cell.id == "where": cell.attachments = {"where.png": {"image/png": where_picture(path.stem)}}
        before = old.get(cell.id)
        if before and before.cell_type == cell.cell_type == "code" and before.source == cell.source:
            cell.outputs, cell.execution_count = before.outputs, before.execution_count
    notebook.metadata = metadata()
    write(notebook, target)


def metadata() -> dict:
    return {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}


def write(notebook, path: Path) -> None:
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def export(path: Path, package: Path = PACKAGE) -> None:
    "The exporting cells of a notebook as a module of the package."
    from nbdev.export import nb_export
    nb_export(path, lib_path=package)


def store(path: Path, timeout: int = 900) -> None:
    "Execute a notebook in place from a clean kernel, then keep only what a reader should see."
    from nbclient import NotebookClient
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False, extra_arguments=["--log-level=40"],
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata = metadata()
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" or (k == "jupyter" and v.get("source_hidden"))}
        if cell.cell_type == "code": cell.outputs = clean(cell.outputs)
    write(notebook, path)


def clean(outputs: list) -> list:
    "Outputs without stderr, progress bars, widgets and addresses; neighbouring streams merged."
    kept = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr": continue
            output.text = "".join(line for line in output.text.splitlines(True) if "\r" not in line)
            if not output.text: continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        if "data" in output:
            widget = output.data.pop("application/vnd.jupyter.widget-view+json", None)
            if widget and not set(output.data) - {"text/plain"}: continue
            if "image/png" in output.data: output.data["image/png"] = fewer_colours(output.data["image/png"])
            if "text/plain" in output.data: output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", output.data["text/plain"])
            output.metadata = {}
        kept.append(output)
    return kept


def fewer_colours(png: str) -> str:
    "A picture (base64) with a palette of 128 colours: a third of the bytes, and no eye sees it."
    from PIL import Image
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def where_picture(stem: str) -> str:
    "The course as a row of boxes with the one of lesson `stem` lit, a PNG in base64."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch
    here = int(stem[:2])
    figure = plt.figure(figsize=(11, 0.66))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.55, len(STAGES) - 0.45), ylim=(-1, 1))
    axes.axis("off")
    for place, (name, number) in enumerate(STAGES):
        lit = here in (0, number)
        axes.add_patch(FancyBboxPatch((place - 0.42, -0.6), 0.84, 1.2, boxstyle="round,pad=0,rounding_size=0.08", mutation_aspect=2,
                                      fc="#1f5fa8" if lit else "#eef1f5", ec="#1f5fa8" if lit else "#c3cad3"))
        axes.text(place, 0, f"{number:02}\n{name}", ha="center", va="center", fontsize=6.5 if "\n" not in name else 5.6, linespacing=1.25,
                  color="white" if lit else "0.3")
        if place: axes.annotate("", (place - 0.41, 0), (place - 0.59, 0), arrowprops={"arrowstyle": "->", "color": "0.5", "lw": 0.8})
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def figures(path: Path) -> None:
    "Every stored picture of a notebook to .build/figures; those tagged figure:NAME that README.md shows to plots/."
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    (BUILD / "figures").mkdir(parents=True, exist_ok=True)
    PLOTS.mkdir(exist_ok=True)
    for cell in nbformat.read(path, as_version=4).cells:
        pictures = [o.data["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        for number, picture in enumerate(pictures):
            (BUILD / "figures" / f"{path.stem}-{cell.id}-{number}.png").write_bytes(base64.b64decode(picture))
        for tag in cell.metadata.get("tags", []):
            if tag.startswith("figure:"):
                if not pictures: sys.exit(f"{path.name}: cell {cell.id} is tagged {tag} and stores no picture")
                name = f"{tag.removeprefix('figure:')}.png"
                if f"plots/{name}" in shown: (PLOTS / name).write_bytes(base64.b64decode(pictures[-1]))


def address(url: str) -> None:
    "Set the repository address in pyproject.toml, and everywhere it stands."
    old = repository()
    targets = [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "CONTRIBUTING.md", *lessons([])]
    for path in targets:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(old, url).replace(old.replace("https://github.com/", "/github/"), url.replace("https://github.com/", "/github/")),
                        encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["write", "text", "export", "store", "figures", "address"])
    parser.add_argument("names", nargs="*", help="lesson numbers; the URL for `address`")
    arguments = parser.parse_args()
    if arguments.verb == "address": return address(arguments.names[0])
    if arguments.verb == "write":
        for path in lessons(arguments.names, BUILD, ".py"): to_notebook(path)
        return None
    action = {"text": to_text, "export": export, "store": store, "figures": figures}[arguments.verb]
    for path in lessons(arguments.names): action(path)


if __name__ == "__main__": main()
