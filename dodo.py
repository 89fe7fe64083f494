"""What `make book` does, by doit: run the notebooks that changed, then build the book over them.

What changed is told by content. A notebook runs again if it, the package, a weight or a table of
data is another than at its last run; the book is built again if a page, a notebook's result or
the package is. Nothing heavy is imported here, so that a second `make book` is quick.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from doit.tools import config_changed

BUILD = Path("_build")
EXECUTED = BUILD / "executed"  # executed notebooks, at their paths in the repository
STAGE = BUILD / "stage"  # what the book is built from: pages and executed notebooks
HTML = BUILD / "html"  # the book
EXPLORER = BUILD / "explorer-data.js"  # what the selection explorer shows

# Where the launch buttons open notebooks: as staged, that is executed, with a cell for Colab.
LAUNCH_BRANCH = "launch"

NOTEBOOKS = sorted(Path("notebooks").glob("*.ipynb"))
PACKAGE = sorted(Path("dfsq").rglob("*.py"))
# The command line and the training change no notebook's result.
TRAINING = ("recipes.py", "leaks.py", "patches.py", "training.py", "publishing.py")
CODE = [p for p in PACKAGE if p.name not in ("cli.py", *TRAINING)]
RESULTS = [EXPLORER, *(EXECUTED / path for path in NOTEBOOKS)]
# Not what a benchmark that is running has there for a while.
PASSING = ("*.part", ".lock")
DATA = sorted(p for p in Path("data").rglob("*") if p.is_file() and not any(map(p.match, PASSING)))
PAGES = sorted(p for p in Path("book").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
SETTINGS = [Path(p) for p in ("_config.yml", "_toc.yml", "constraints.txt", "CITATION.cff")]

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
        "uptodate": [config_changed(str(repository(os.environ)))],
        "targets": [HTML / "index.html"],
    }


def repository(environ):
    """Public address of the repository, or None: ``DFSQ_REPOSITORY``, or what a hosted CI tells."""
    address = environ.get("DFSQ_REPOSITORY")
    if not address and environ.get("GITHUB_REPOSITORY"):
        server = environ.get("GITHUB_SERVER_URL", "https://github.com")
        address = f"{server}/{environ['GITHUB_REPOSITORY']}"
    if not address:
        return None
    if not re.fullmatch(r"https://[\w.-]+(:\d+)?/[\w.-]+/[\w.-]+", address):
        sys.exit(f"DFSQ_REPOSITORY must be of the form https://HOST/OWNER/NAME, not {address!r}")
    return address.removesuffix(".git")


def with_buttons(config, address):
    """The book's settings with buttons that lead to the repository, Binder and Colab."""
    buttons = {"binderhub_url": "https://mybinder.org", "notebook_interface": "jupyterlab"}
    if address.startswith("https://github.com/"):  # Colab reads from no other host
        buttons["colab_url"] = "https://colab.research.google.com"
    return config | {
        "repository": {"url": address, "branch": LAUNCH_BRANCH},
        "launch_buttons": buttons,
        "html": config["html"] | {"use_repository_button": True},
    }


def colab_cell(address):
    """The source of a cell that installs the package, with its data, on Colab and nowhere else."""
    return f"""\
import sys

if "google.colab" in sys.modules:
    !git clone --quiet --depth 1 {address} /content/study
    %pip install --quiet --editable '/content/study[onnx]' myst-nb
    sys.path.insert(0, "/content/study")"""


def bibtex(citation, address):
    """A BibTeX entry of what CITATION.cff says."""
    fields = {
        "author": " and ".join(f"{{{author['name']}}}" for author in citation["authors"]),
        "title": f"{{{citation['title']}}}",
        "version": citation["version"],
        "year": citation["date-released"].year,
        "license": citation["license"],
    }
    if address:
        fields["url"] = address
    lines = [f"  {key} = {{{value}}}" for key, value in fields.items()]
    return ",\n".join(["@software{dfsq-study", *lines]) + "\n}"


def stage():
    """Lay out pages, executed notebooks and tables as in the repository, so that links hold.

    With a public address, pages get buttons to launch a notebook, and notebooks a cell for Colab,
    which the pages do not show.
    """
    import nbformat
    import yaml

    from dfsq.study import notebooks, publishing, status

    address = repository(os.environ)
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree("book", STAGE / "book", ignore=shutil.ignore_patterns("__pycache__"))
    # Not the weights, nor the model cards, which become sections of a page below.
    shutil.copytree(
        "data", STAGE / "data", ignore=shutil.ignore_patterns("*.safetensors", "*.md", *PASSING)
    )
    shutil.copy(EXPLORER, STAGE / "book" / "_static")
    for path in SETTINGS:
        shutil.copy(path, STAGE)
    (STAGE / "notebooks").mkdir()
    tables = []
    for path in NOTEBOOKS:
        notebook = nbformat.read(EXECUTED / path, as_version=4)
        if address:
            cell = nbformat.v4.new_code_cell(colab_cell(address), id="colab")
            cell.metadata["tags"] = ["remove-cell"]
            notebook.cells.insert(1, cell)
        nbformat.write(notebook, STAGE / path)
        tables.append(f"**{{doc}}`/notebooks/{path.stem}`**\n\n{notebooks.parameter_table(path)}\n")
    (STAGE / "book" / "_parameters.md").write_text("\n".join(tables))
    (STAGE / "book" / "_networks.md").write_text(publishing.page())
    citation = yaml.safe_load(Path("CITATION.cff").read_text())
    (STAGE / "book" / "_citation.md").write_text(f"```bibtex\n{bibtex(citation, address)}\n```\n")
    executed = [EXECUTED / path for path in NOTEBOOKS]
    (STAGE / "book" / "_status.md").write_text(status.page(executed, DATA))
    if address:
        config = with_buttons(yaml.safe_load(Path("_config.yml").read_text()), address)
        (STAGE / "_config.yml").write_text(yaml.safe_dump(config))


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
