"""What `make book` does, by doit: run the notebooks that changed, then build the book over them.

What changed is told by content. A notebook runs again if it, the package, a weight or a table of
data is another than at its last run; the book is built again if a page, a notebook's result or
the package is. Nothing heavy is imported here, so that a second `make book` is quick.
"""

import shutil
import subprocess
import sys
from pathlib import Path

BUILD = Path("_build")
EXECUTED = BUILD / "executed"  # executed notebooks, at their paths in the repository
STAGE = BUILD / "stage"  # what the book is built from: pages and executed notebooks
HTML = BUILD / "html"  # the book
EXPLORER = BUILD / "explorer-data.js"  # what the selection explorer shows

NOTEBOOKS = sorted(Path("notebooks").glob("*.ipynb"))
PACKAGE = sorted(Path("dfsq").rglob("*.py"))
# The command line and the training change no notebook's result.
CODE = [p for p in PACKAGE if p.name not in ("cli.py", "training.py")]
RESULTS = [EXPLORER, *(EXECUTED / path for path in NOTEBOOKS)]
DATA = sorted(p for p in Path("data").rglob("*") if p.is_file() and p.name != ".lock")
PAGES = sorted(p for p in Path("book").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
SETTINGS = [Path("_config.yml"), Path("_toc.yml"), Path("constraints.txt")]

BUILD.mkdir(exist_ok=True)
DOIT_CONFIG = {
    "backend": "json",
    "default_tasks": ["notebook", "explorer", "book"],  # notebooks in the order of their names
    "dep_file": str(BUILD / "doit.json"),
    "verbosity": 2,
}


def task_notebook():
    """Run one notebook, with its default parameters."""
    for path in NOTEBOOKS:
        yield {
            "name": path.stem,
            "actions": [(run_notebook, [path])],
            "file_dep": [path, *CODE, *DATA, Path("constraints.txt")],
            "targets": [EXECUTED / path],
        }


def run_notebook(path):
    from dfsq.study import notebooks

    output = EXECUTED / path
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        seconds = notebooks.execute(path, output, cwd=path.parent)
    except notebooks.NotebookError as error:
        print(error, file=sys.stderr)
        return False
    print(f"{path}: {seconds:.0f} s")


def task_explorer():
    """Write the samples that the selection explorer shows."""
    return {
        "actions": [write_explorer],
        "file_dep": [*CODE, *DATA, Path("constraints.txt")],
        "targets": [EXPLORER],
    }


def write_explorer():
    from dfsq.study import explorer

    explorer.write(EXPLORER)


def task_book():
    """Build the book; the one that stands is replaced only by one without a warning."""
    return {
        "actions": [stage, build],
        "file_dep": [*PAGES, *SETTINGS, *PACKAGE, *DATA, *RESULTS],
        "targets": [HTML / "index.html"],
    }


def stage():
    """Lay out pages, executed notebooks and tables as in the repository, so that links hold."""
    from dfsq.study import notebooks

    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree("book", STAGE / "book", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree("data", STAGE / "data", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(EXPLORER, STAGE / "book" / "_static")
    for path in SETTINGS:
        shutil.copy(path, STAGE)
    (STAGE / "notebooks").mkdir()
    tables = []
    for path in NOTEBOOKS:
        shutil.copy(EXECUTED / path, STAGE / path)
        tables.append(f"**{{doc}}`/notebooks/{path.stem}`**\n\n{notebooks.parameter_table(path)}\n")
    (STAGE / "book" / "_parameters.md").write_text("\n".join(tables))


def build():
    """Build the staged book beside the one that stands, and put it in its place."""
    fresh = BUILD / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", STAGE, "--path-output", fresh, "-W", "-n", "--keep-going"]
    # Warnings and errors go to stderr; the rest names the folder that is moved away below.
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        print("the book was not built: see the warnings above", file=sys.stderr)
        return False
    shutil.rmtree(HTML, ignore_errors=True)
    (fresh / "_build" / "html").rename(HTML)
    shutil.rmtree(fresh)
