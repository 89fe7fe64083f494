"""The status page tells what executed notebooks record."""

import hashlib
import re
from importlib.metadata import version

import nbformat
import pytest

from dfsq.study import status


def executed(path, **papermill):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["papermill"] = papermill
    nbformat.write(notebook, path)
    return path


def test_the_environment_names_machine_and_versions():
    told = status.environment()
    assert all(told.values())
    assert f"torch {version('torch')}" in told["Versions"]
    assert re.fullmatch(r"\d+ GiB", told["Memory"])


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(status, "PACKAGES", ("torch", "not-of-this-world"))
    assert status.environment()["Versions"] == f"torch {version('torch')}"


def test_the_page_is_made_of_what_was_recorded(tmp_path):
    runs = [
        executed(
            tmp_path / f"{name}.ipynb",
            duration=seconds,
            end_time="2026-01-02T03:04:05+00:00",
            environment={"Processor": processor},
        )
        for name, seconds, processor in (("a", 61.4, "one"), ("b", 7.6, "two"), ("c", 1, "one"))
    ]
    data = tmp_path / "data.csv"
    data.write_text("x" * 1234)
    page = status.page(runs, [data])
    assert "| {doc}`/notebooks/a` | 61 | 2026-01-02 03:04 |" in page
    assert "| {doc}`/notebooks/b` | 8 |" in page
    assert "ran `a`, `c`:\n\n- Processor: one\n" in page
    assert "ran `b`:\n\n- Processor: two\n" in page
    assert f", 1,234\n: `{hashlib.sha256(data.read_bytes()).hexdigest()}`\n" in page


def test_a_notebook_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"old\.ipynb does not say where it ran"):
        status.page([executed(tmp_path / "old.ipynb", duration=1)], [])
