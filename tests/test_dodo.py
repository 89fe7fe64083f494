"""What `make book` adds to the book on its way: buttons, a cell for Colab, the status page."""

import ast
import runpy
from pathlib import Path

import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from pybtex.database import parse_string

import dodo

ADDRESS = "https://github.com/someone/study"


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({}, None),
        ({"DFSQ_REPOSITORY": ""}, None),
        ({"DFSQ_REPOSITORY": ADDRESS}, ADDRESS),
        ({"DFSQ_REPOSITORY": f"{ADDRESS}.git"}, ADDRESS),
        ({"GITHUB_REPOSITORY": "someone/study"}, ADDRESS),
        (
            {"GITHUB_REPOSITORY": "a/b", "GITHUB_SERVER_URL": "https://git.example.org"},
            "https://git.example.org/a/b",
        ),
        ({"DFSQ_REPOSITORY": ADDRESS, "GITHUB_REPOSITORY": "other/fork"}, ADDRESS),
    ],
)
def test_the_address_comes_from_the_environment(environ, address):
    assert dodo.repository(environ) == address


@pytest.mark.parametrize(
    "address",
    ["http://github.com/a/b", "github.com/a/b", "https://github.com/a", f"{ADDRESS}/x", "a b"],
)
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(SystemExit, match="https://HOST/OWNER/NAME, not"):
        dodo.repository({"DFSQ_REPOSITORY": address})


@pytest.fixture
def config(repository):
    return yaml.safe_load((repository / "_config.yml").read_text())


def test_without_an_address_there_are_no_buttons(config):
    assert not {"repository", "launch_buttons"} & set(config)
    assert "use_repository_button" not in config["html"]


def test_with_an_address_there_are_buttons_and_all_else_stays(config):
    made = dodo.with_buttons(config, ADDRESS)
    assert made["repository"]["url"] == ADDRESS
    assert {"binderhub_url", "colab_url"} < set(made["launch_buttons"])
    # Jupyter Book builds the theme's options from these; given by hand they would replace its own.
    assert "html_theme_options" not in made["sphinx"]["config"]
    for key, value in config.items():
        assert made[key] == value or key == "html"
    assert config["html"].items() < made["html"].items()


def test_colab_reads_from_github_alone(config):
    made = dodo.with_buttons(config, "https://git.example.org/a/b")
    assert "colab_url" not in made["launch_buttons"]
    assert "binderhub_url" in made["launch_buttons"]


@pytest.mark.parametrize("address", [None, ADDRESS])
def test_the_citation_is_read_back(repository, address):
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    entry = parse_string(dodo.bibtex(citation, address), "bibtex").entries["dfsq-study"]
    assert str(entry.persons["author"][0]) == "{" + citation["authors"][0]["name"] + "}"
    assert entry.fields["title"].strip("{}") == citation["title"]
    assert entry.fields["version"] == citation["version"]
    assert entry.fields.get("url") == address


def test_the_cell_for_colab_runs_nowhere_else(monkeypatch):
    source = TransformerManager().transform_cell(dodo.colab_cell(ADDRESS))
    assert ADDRESS in source
    calls = []

    class Shell:
        def system(self, command):
            calls.append(command)

        def run_line_magic(self, name, line):
            calls.append(f"{name} {line}")

    code = compile(ast.parse(source), "cell", "exec")
    exec(code, {"get_ipython": Shell})
    assert not calls
    monkeypatch.setitem(dodo.sys.modules, "google.colab", dodo)
    monkeypatch.setattr("sys.path", list(dodo.sys.path))
    exec(code, {"get_ipython": Shell})
    clone, install = calls
    assert clone.startswith("git clone")
    assert install.startswith("pip install")
    assert dodo.sys.path[0] in clone


def test_what_a_running_benchmark_writes_is_not_of_the_book(tmp_path, monkeypatch):
    names = ("results.csv", "results.csv.4711.part", ".lock")
    (tmp_path / "data" / "results").mkdir(parents=True)
    for name in names:
        (tmp_path / "data" / "results" / name).touch()
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(dodo.__file__)["DATA"] == [Path("data/results/results.csv")]
