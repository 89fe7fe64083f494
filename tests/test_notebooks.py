"""Execution of notebooks: parameters checked, runs all or nothing."""

import json
import os
import subprocess
import sys

import nbformat
import pytest

from dfsq.study import notebooks
from dfsq.study.notebooks import NotebookError, Parameter

DECLARATIONS = """\
bits: int = 4  # width of a code
rate: float = 0.5  # a rate
name: str = "a # b"  # a name
deep: bool = False  # whether deep
widths: list[int] = [2, 3]  # some widths
"""
GUARD = "from dfsq.study import notebooks\n\nnotebooks.guard(globals())"
SHOW = "print(repr((bits, rate, name, deep, widths)))"


@pytest.fixture
def write(tmp_path):
    """Write a notebook of a parameters cell, a guard and more code cells."""

    def write(*cells, name="study.ipynb"):
        notebook = nbformat.v4.new_notebook()
        notebook.metadata.kernelspec = {
            "name": "elsewhere",
            "display_name": "another machine's kernel",
            "language": "python",
        }
        sources = [DECLARATIONS, GUARD, *cells]
        notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook.cells[0].metadata.tags = ["parameters"]
        path = tmp_path / name
        nbformat.write(notebook, path)
        return path

    return write


def printed(path):
    """All that the cells of an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def run(path, output, values=None, **options):
    return notebooks.execute(path, output, values, progress=False, **options)


def test_parameters_are_read(write):
    declared = notebooks.parameters(write())
    assert declared[0] == Parameter("bits", "int", "4", "width of a code")
    assert declared[2] == Parameter("name", "str", "'a # b'", "a name")
    assert [p.name for p in declared] == ["bits", "rate", "name", "deep", "widths"]


def test_parameters_with_magics(write):
    path = write()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source += "\n%time 1"
    nbformat.write(notebook, path)
    with pytest.raises(NotebookError, match=r"without magics; line \d+ is not"):
        notebooks.parameters(path)


def test_a_file_that_is_no_notebook(tmp_path):
    for text in ("", "hello", "{}", "[1]", '{"cells": 3}'):
        path = tmp_path / "text.ipynb"
        path.write_text(text)
        with pytest.raises(NotebookError, match="not a Jupyter notebook"):
            notebooks.parameters(path)
    with pytest.raises(NotebookError, match=r"cannot read .*missing"):
        notebooks.parameters(tmp_path / "missing.ipynb")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("int", "3", 3),
        ("int", 3.0, 3),
        ("float", "1e-3", 1e-3),
        ("float", 2, 2.0),
        ("str", 3, "3"),
        ("bool", "no", False),
        ("bool", True, True),
        ("list[int]", "2,4", [2, 4]),
        ("list[int]", "[2, 4]", [2, 4]),
        ("list[int]", (2, 4), [2, 4]),
        ("list[int]", 2, [2]),
        ("list[str]", "exact, kmeans", ["exact", "kmeans"]),
        ("list[str]", "", []),
        ("list[int]", " ", []),
    ],
)
def test_values_are_parsed(kind, value, expected):
    parsed = Parameter("x", kind, "0", "a value").parse(value)
    assert parsed == expected
    assert type(parsed) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int", "abc"),
        ("int", 3.5),
        ("int", True),
        ("int", None),
        ("int", [3]),
        ("float", "fast"),
        ("bool", "maybe"),
        ("bool", 2),
        ("list[int]", "2,x"),
        ("list[int]", "[2,"),
        ("list[int]", "[f()]"),
    ],
)
def test_values_of_another_type_are_refused(kind, value):
    with pytest.raises(NotebookError, match="parameter x must be"):
        Parameter("x", kind, "0", "a value").parse(value)


def test_a_type_that_cannot_be_parsed_is_refused():
    with pytest.raises(NotebookError, match="declare it as one of int, float, str, bool or"):
        Parameter("x", "dict", "{}", "a value").parse("3")


def test_run_with_defaults_and_with_values(write, tmp_path):
    path, output = write(SHOW), tmp_path / "out.ipynb"
    assert run(path, output) > 0
    assert printed(output) == "(4, 0.5, 'a # b', False, [2, 3])\n"
    run(path, output, {"bits": "3", "name": "b", "deep": "yes", "widths": "5,6"})
    assert printed(output) == "(3, 0.5, 'b', True, [5, 6])\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb", "study.ipynb"]


def test_an_executed_notebook_runs_with_its_defaults_again(write, tmp_path):
    executed, output = tmp_path / "executed.ipynb", tmp_path / "out.ipynb"
    run(write(SHOW), executed, {"bits": "3"})
    run(executed, output)
    assert printed(output) == "(4, 0.5, 'a # b', False, [2, 3])\n"
    run(executed, output, {"rate": "1"})
    assert printed(output) == "(4, 1.0, 'a # b', False, [2, 3])\n"
    assert len(nbformat.read(output, as_version=4).cells) == 4


def test_the_output_is_not_the_notebook_itself(write, tmp_path):
    path = write(SHOW)
    before = path.read_bytes()
    for output in (path, tmp_path / "again.ipynb"):
        if output != path:
            output.symlink_to(path)
        with pytest.raises(NotebookError, match="it is the notebook itself; name another file"):
            run(path, output, {"bits": "3"})
    assert path.read_bytes() == before


def test_the_kernel_is_this_interpreter_and_no_path_is_kept(write, tmp_path):
    path, output = write("import sys; print(sys.prefix)"), tmp_path / "out.ipynb"
    run(path, output)
    assert printed(output).strip() == sys.prefix
    metadata = nbformat.read(output, as_version=4).metadata
    assert str(tmp_path) not in json.dumps(metadata)


def test_run_from_another_folder(write, tmp_path):
    path, folder = write("import os; print(os.getcwd())"), tmp_path / "elsewhere"
    folder.mkdir()
    run(path, tmp_path / "out.ipynb", cwd=folder)
    assert printed(tmp_path / "out.ipynb").strip() == str(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bitz": 3}, r"unknown parameter bitz \(did you mean bits\?\); known: bits, rate, name"),
        ({"colour": 3}, "unknown parameter colour; known: bits"),
        ({"bits": "abc"}, r"parameter bits must be int \(width of a code\), not 'abc'"),
    ],
)
def test_bad_parameters_are_refused_before_the_run(write, tmp_path, values, message):
    ran = tmp_path / "ran"
    path = write(f"open({str(ran)!r}, 'w').close()")
    with pytest.raises(NotebookError, match=message):
        run(path, tmp_path / "out.ipynb", values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.ipynb"]


def test_a_failed_run_leaves_what_was_there(write, tmp_path):
    path, output = write("x = 0\nbits / x"), tmp_path / "out.ipynb"
    message = r"study.ipynb failed in cell \[3\], at `bits / x`: ZeroDivisionError: division by"
    with pytest.raises(NotebookError, match=message):
        run(path, output)
    assert not output.exists()
    output.write_text("kept")
    with pytest.raises(NotebookError):
        run(path, output)
    assert output.read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb", "study.ipynb"]


def test_a_dead_kernel_is_told(write, tmp_path):
    with pytest.raises(NotebookError, match="its kernel died"):
        run(write("import os; os._exit(1)"), tmp_path / "out.ipynb")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.ipynb"]


def test_output_that_cannot_be_written_is_refused_before_the_run(write, tmp_path):
    ran = tmp_path / "ran"
    path = write(f"open({str(ran)!r}, 'w').close()")
    (tmp_path / "folder").mkdir()
    for output in (path / "out.ipynb", tmp_path / "missing" / "out.ipynb", tmp_path / "folder"):
        with pytest.raises(NotebookError, match="cannot write"):
            run(path, output)
    if os.geteuid() != 0:  # root may write anywhere
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o555)
        with pytest.raises(NotebookError, match=r"cannot write .*Permission denied"):
            run(path, folder / "out.ipynb")
    assert not ran.exists()


def papermill(path, output, *options, cwd):
    command = [sys.executable, "-m", "papermill", path, output, "-k", "python3", *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_plain_papermill_refuses_a_misspelt_name(write, tmp_path):
    path, folder = write(SHOW), tmp_path / "elsewhere"
    folder.mkdir()
    result = papermill(path, "out.ipynb", "-p", "bitz", "3", cwd=folder)
    assert result.returncode != 0
    assert "unknown parameter bitz (did you mean bits?); known: bits, rate" in result.stderr


def test_plain_papermill_gets_declared_types(write, tmp_path):
    path, folder = write(SHOW), tmp_path / "elsewhere"
    folder.mkdir()
    values = ["-p", "rate", "1", "-p", "name", "7", "-p", "widths", "5,6"]
    result = papermill(path, "out.ipynb", *values, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert printed(folder / "out.ipynb") == "(4, 1.0, '7', False, [5, 6])\n"


def session(*cells):
    """The namespace after cells ran in IPython, the last of them now running."""
    namespace = {"In": ["", *cells]}
    for source in cells[:-1]:
        exec(source, namespace)
    return namespace


@pytest.mark.parametrize(
    "cells",
    [
        [],  # no history at all
        ["guard"],  # before the parameters
        [DECLARATIONS, "guard"],  # no injected cell
        [DECLARATIONS, "bits = 3", "x: int = 2", "guard"],  # edited by hand, run again
        [DECLARATIONS, "# Parameters\nbitz = 3", DECLARATIONS, "guard"],  # put right, run again
    ],
)
def test_guard_lets_an_interactive_session_be(cells):
    notebooks.guard(session(*cells) if cells else {})


def test_guard_checks_the_last_injected_cell():
    injected = "# Parameters\nwidths = '3,4'"
    namespace = session(DECLARATIONS, "# Parameters\nbitz = 3", injected, "y = 1", "guard")
    notebooks.guard(namespace)
    assert namespace["widths"] == [3, 4]
    with pytest.raises(NotebookError, match="parameter bits must be int"):
        notebooks.guard(session(DECLARATIONS, "# Parameters\nbits = 'x'", "guard"))


def test_parameter_table(write):
    table = notebooks.parameter_table(write()).splitlines()
    assert table[2] == "| `bits` | `int` | `4` | width of a code |"
    assert len(table) == 2 + 5
