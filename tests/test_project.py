"""The project's own files agree with each other, and the notebooks keep their conventions."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import papermill
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dodo
from dfsq.study import notebooks

NAMES_IN_CONDA = {"pytorch-cpu": "torch"}

# In parts, so that this file does not hold what it looks for.
HOSTS = [
    ".".join(parts)
    for parts in (
        ("jsdelivr", "net"),
        ("unpkg", "com"),
        ("cdnjs", "cloudflare", "com"),
        ("cdn", "plot", "ly"),
        ("cdn", "mathjax", "org"),
        ("polyfill", "io"),
        ("googleapis", "com"),
        ("gstatic", "com"),
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("pytorch", "org"),
        ("anaconda", "org"),
        ("anaconda", "com"),
        ("npmjs", "org"),
    )
]


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(repository):
    """Name to version, of constraints.txt."""
    lines = (repository / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def specifiers(requirements):
    """Canonical name to the set of version specifiers."""
    return {
        canonicalize_name(r.name): {str(s) for s in r.specifier}
        for r in map(Requirement, requirements)
    }


def test_names_of_the_readme_come_with_the_package(repository):
    """As a user finds them who has imported nothing else."""
    names = re.findall(r"\bdfsq\.([\w.]*\w)", (repository / "README.md").read_text())
    assert {"integer", "quantize", "sr.load_model"} <= set(names)
    code = "import sys, dfsq, operator; [operator.attrgetter(n)(dfsq) for n in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", code, *names], check=True)


def test_environment_agrees_with_pyproject(repository, project):
    environment = yaml.safe_load((repository / "environment.yml").read_text())
    *conda, last = environment["dependencies"]
    python, pip, *conda = conda
    assert f"python {project['requires-python']}".endswith(python.removeprefix("python="))
    assert (pip, last["pip"].pop()) == ("pip", "--editable .")
    there = specifiers([*conda, *last["pip"]])
    there = {NAMES_IN_CONDA.get(name, name): pins for name, pins in there.items()}
    extras = project["optional-dependencies"]
    book = [name for name in extras["book"] if name != "dfsq[onnx]"] + extras["onnx"]
    assert there == specifiers(project["dependencies"] + book)


def test_constraints_satisfy_pyproject(project, pins):
    for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in map(Requirement, requirements):
            if requirement.name == "dfsq":  # an extra that another one takes in
                continue
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin, prereleases=True), requirement


def test_versions_agree(repository, project):
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    newest = re.search(r"^## \[?(\d[\w.]*)", (repository / "CHANGELOG.md").read_text(), re.M)
    assert str(citation["version"]) == newest[1] == project["version"]


def test_help_lists_every_target(repository):
    text = (repository / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())
    assert set(re.findall(r"^([a-z][\w-]*):", text, re.M)) == targets
    shown = subprocess.run(["make"], cwd=repository, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make ([\w-]+) +\w", shown.stdout, re.M)) == targets


def workflows(repository):
    paths = sorted((repository / ".github" / "workflows").glob("*.yml"))
    assert paths
    return {path.name: yaml.safe_load(path.read_text()) for path in paths}


def test_workflows_run_targets_that_there_are(repository):
    targets = set(
        re.search(r"^\.PHONY: (.*)$", (repository / "Makefile").read_text(), re.M)[1].split()
    )
    called = set()
    for name, workflow in workflows(repository).items():
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                called |= set(re.findall(r"^make ([\w-]+)", step.get("run", ""), re.M))
                if action := step.get("uses"):
                    assert re.fullmatch(r"[\w.-]+/[\w./-]+@v\d+", action), f"{name}: {action}"
    assert called == {"test", "lint", "test-book", "links"}
    assert called <= targets


def test_the_launch_buttons_lead_to_the_branch_that_is_pushed(repository):
    steps = workflows(repository)["book.yml"]["jobs"]["launch"]["steps"]
    assert f"origin HEAD:refs/heads/{dodo.LAUNCH_BRANCH}\n" in steps[-1]["run"]


def test_nothing_heavy_is_imported_to_see_what_changed(repository):
    code = "import sys, dodo; sys.exit(bool({'torch', 'numpy', 'nbformat'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0


def test_no_file_names_a_network_of_scripts_or_packages(repository):
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=repository, capture_output=True, text=True, check=True)
    found = [
        f"{host} in {name}"
        for name in listed.stdout.splitlines()
        if (repository / name).is_file()
        for text in [(repository / name).read_bytes().decode(errors="ignore").lower()]
        for host in HOSTS
        if host in text
    ]
    assert not found


def test_the_table_of_contents_is_complete(repository):
    contents = yaml.safe_load((repository / "_toc.yml").read_text())
    pages = [contents["root"]] + [c["file"] for p in contents["parts"] for c in p["chapters"]]
    for page in pages:
        assert any((repository / f"{page}{suffix}").is_file() for suffix in (".md", ".ipynb")), page
    sources = [*repository.glob("book/*.md"), *repository.glob("notebooks/*.ipynb")]
    assert {str(p.relative_to(repository).with_suffix("")) for p in sources} == set(pages)


def test_references_have_links(repository):
    entries = re.split(r"^@", (repository / "book" / "references.bib").read_text(), flags=re.M)[1:]
    assert len(entries) > 10
    for entry in entries:
        assert re.search(r"^  (doi = \{10\.|url = \{https://)", entry, re.M), entry


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def each_notebook(repository):
    paths = sorted(repository.glob("notebooks/*.ipynb"))
    assert paths
    return paths


def test_notebooks_are_committed_clean(repository):
    for path in each_notebook(repository):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3", path.name
        assert notebook.metadata.kernelspec.language == "python", path.name
        assert not {"papermill", "widgets"} & set(notebook.metadata), path.name
        for cell in code_cells(path):
            assert not cell.outputs, f"{path.name} holds outputs: make strip"
            assert cell.execution_count is None, f"{path.name} was run: make strip"


def test_notebooks_declare_their_parameters(repository):
    for path in each_notebook(repository):
        declared = notebooks.parameters(path)
        assert declared, path.name
        for parameter in declared:
            assert parameter.help, f"{path.name}: {parameter.name} has no comment"
            parameter.parse(eval(parameter.default, {}))  # of the declared type
        # Papermill reads declarations line by line, with a pattern: it must find the same.
        read = papermill.inspect_notebook(path)
        assert [(p["name"], p["inferred_type_name"], p["help"]) for p in read.values()] == [
            (p.name, p.type, p.help) for p in declared
        ], f"{path.name}: keep = and # out of comments and defaults"


def test_notebooks_guard_their_parameters(repository):
    for path in each_notebook(repository):
        cells = code_cells(path)
        tags = ["parameters" in c.metadata.get("tags", []) for c in cells]
        assert tags.count(True) == 1, path.name
        guard = cells[tags.index(True) + 1].source
        assert "guard(globals())" in guard, f"{path.name}: guard the cell after the parameters"


def test_no_import_hides_a_parameter(repository):
    for path in each_notebook(repository):
        names = {p.name for p in notebooks.parameters(path)}
        for cell in code_cells(path):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    hidden = names & {alias.asname or alias.name for alias in node.names}
                    assert not hidden, f"{path.name}: {cell.source}"


def test_notebooks_with_controls_say_so_alike(repository):
    asked = "interactive: bool = False  # show controls (needs a live kernel)"
    for path in each_notebook(repository):
        sources = [c.source for c in nbformat.read(path, as_version=4).cells]
        shown = [source.startswith("if interactive:\n") for source in sources]
        said = [source.startswith("## Try it\n") for source in sources]
        declared = any(asked in source.splitlines() for source in sources)
        assert shown[1:] == said[:-1], path.name
        assert shown.count(True) == declared, path.name
