"""Notebooks as programs: their parameters read, checked and filled in, their runs all or nothing.

A notebook declares its parameters in one cell tagged ``parameters``, each with a type, a default
and a comment that says what it is::

    bits: int = 4  # width of a code
    methods: list[str] = ["exact", "kmeans"]  # selectors to compare

Types are ``int``, ``float``, ``str``, ``bool`` and lists of these. The next cell calls `guard`,
which makes plain ``papermill`` (it only warns) refuse a misspelt name or a value of another type.
"""

import ast
import difflib
import os
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .status import environment

SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
INJECTED = "# Parameters"  # how papermill begins the cell in which it sets parameters


class NotebookError(Exception):
    """A notebook that cannot be run as asked, or that failed; the message is for the user."""


@dataclass(frozen=True)
class Parameter:
    """One declared parameter of a notebook; `type` and `default` are as written there."""

    name: str
    type: str
    default: str
    help: str

    def parse(self, value):
        """The value in the declared type.

        Parameters
        ----------
        value : object
            A value of that type, or text such as a command line gives: ``"4"``, ``"no"``,
            ``"2,4,8"`` or ``"[2, 4, 8]"`` for a list.

        Raises
        ------
        NotebookError
            If the value is not of the declared type.
        """
        element = re.fullmatch(r"list\[(\w+)\]", self.type)
        kind = element[1] if element else self.type
        if kind not in SCALARS:
            raise NotebookError(
                f"parameter {self.name} is declared as {self.type or 'nothing'}: "
                f"declare it as one of {', '.join(SCALARS)} or a list of one, as in list[int]"
            )
        try:
            return _list(value, kind) if element else _scalar(value, kind)
        except (ValueError, SyntaxError):
            raise NotebookError(
                f"parameter {self.name} must be {self.type} ({self.help}), not {value!r}"
            ) from None


def _scalar(value, kind):
    """A value as an int, float, str or bool, with no loss; ValueError if it is not one."""
    if kind == "str":
        return str(value)
    if kind == "bool":
        text = str(value).lower()
        if text not in TRUTH:
            raise ValueError
        return TRUTH[text]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    if kind == "int" and isinstance(value, float) and not value.is_integer():
        raise ValueError
    return SCALARS[kind](value)


def _list(value, kind):
    """A value as a list of one kind; a lone value is a list of one."""
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return []
        value = ast.literal_eval(text) if text.startswith("[") else text.split(",")
    elif not isinstance(value, list | tuple):
        value = [value]
    return [_scalar(v.strip() if isinstance(v, str) else v, kind) for v in value]


def declarations(source):
    """Parameters that the source of a cell declares.

    Parameters
    ----------
    source : str
        Python code; only its top-level ``name: type = default  # comment`` lines count.

    Returns
    -------
    list of Parameter
    """
    lines = source.splitlines()
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            tail = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            found.append(
                Parameter(
                    ast.unparse(node.target),
                    ast.unparse(node.annotation),
                    ast.unparse(node.value),
                    tail.strip().removeprefix("#").strip(),
                )
            )
    return found


def parameters(path):
    """Parameters that a notebook declares, in order.

    Parameters
    ----------
    path : str or Path
        The notebook.

    Returns
    -------
    list of Parameter

    Raises
    ------
    NotebookError
        If the file is missing or is no notebook, or its parameters are not plain Python.
    """
    try:
        import nbformat
    except ImportError:
        raise NotebookError("notebooks need more packages: pip install 'dfsq[book]'") from None

    path = Path(path)
    try:
        notebook = nbformat.read(path, as_version=4)
    except OSError as error:
        raise NotebookError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # nbformat stumbles over other files in ways of all kinds
        raise NotebookError(f"{path} is not a Jupyter notebook") from None
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            try:
                return declarations(cell.source)
            except SyntaxError as error:
                raise NotebookError(
                    f"{path}: the cell of parameters must be plain Python, without magics; line "
                    f"{error.lineno} is not"
                ) from None
    return []


def parse(values, declared):
    """Values in their declared types, misspelt names refused.

    Parameters
    ----------
    values : dict
        Name to value or text.
    declared : list of Parameter
        What there is to set.

    Returns
    -------
    dict

    Raises
    ------
    NotebookError
        If a name is not declared, or a value is not of its type.
    """
    known = {p.name: p for p in declared}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            listing = f"known: {', '.join(known)}" if known else "the notebook has none"
            raise NotebookError(f"unknown parameter {name}{hint}; {listing}")
    return {name: known[name].parse(value) for name, value in values.items()}


def guard(namespace):
    """Check the parameters that papermill has set, and give them their declared types.

    The first cell after the parameters calls ``guard(globals())``. IPython keeps the source of the
    cells that ran, so the declaring cell and the injected one are both there to compare. With no
    injected cell, as in an interactive session, there is nothing to check.

    Parameters
    ----------
    namespace : dict
        The notebook's ``globals()``; values given as text are replaced by parsed ones.

    Raises
    ------
    NotebookError
        If a name that was set is not declared, or a value is not of its type.
    """
    injected = None
    for source in reversed(namespace.get("In", [])[:-1]):
        if injected is None and source.startswith(INJECTED):
            injected = [
                target.id
                for node in ast.parse(source).body
                if isinstance(node, ast.Assign)
                for target in node.targets
            ]
        elif declared := _declared(source):
            # A declaring cell that ran after the injected one has set the defaults again.
            if injected is not None:
                namespace.update(parse({name: namespace[name] for name in injected}, declared))
            return


def _declared(source):
    """`declarations` of a cell from IPython's history, where failed cells stand too."""
    try:
        return declarations(source)
    except SyntaxError:
        return []


def execute(path, output, values=None, *, cwd=None, progress=True):
    """Run a notebook with papermill; the output appears only if every cell succeeds.

    Parameters
    ----------
    path : str or Path
        The notebook.
    output : str or Path
        Where the executed notebook goes; a file there is replaced on success and kept on failure.
        Not the notebook itself.
    values : dict, optional
        Parameters by name, each of its declared type or as text.
    cwd : str or Path, optional
        Working directory of the run; by default that of the caller.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    float
        Seconds taken.

    Raises
    ------
    NotebookError
        If a parameter is unknown or has a wrong type (nothing is run), if the output cannot be
        written or is the notebook itself (nothing is run), or if a cell fails.

    Notes
    -----
    Of a notebook that has been executed before, parameters given then are forgotten.
    """
    path, output = Path(path), Path(output)
    values = parse(values or {}, parameters(path))
    start = time.perf_counter()
    partial = output.with_name(f".{output.stem}.{os.getpid()}.ipynb")
    if output.is_dir():
        raise NotebookError(f"cannot write {output}: it is a folder; name a file in it")
    if output.exists() and output.samefile(path):
        raise NotebookError(f"cannot write {output}: it is the notebook itself; name another file")
    with _writing(output):
        partial.touch()  # a folder that cannot be written to is found out now, not after the run
    try:
        executed = _run(path, output.name, values, cwd, progress)
        with _writing(output):
            partial.write_text(executed, encoding="utf-8")
            os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return time.perf_counter() - start


@contextmanager
def _writing(output):
    """Turn what keeps a file from being written into a `NotebookError`."""
    try:
        yield
    except OSError as error:
        raise NotebookError(f"cannot write {output}: {error.strerror}") from None


def _run(path, output_name, values, cwd, progress):
    """The executed notebook as text; `NotebookError` if a cell fails."""
    import nbformat

    try:
        import papermill
    except ImportError:
        raise NotebookError("notebooks need more packages: pip install 'dfsq[book]'") from None
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    given = nbformat.read(path, as_version=4)
    given.cells = [
        cell
        for cell in given.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])  # of a run before this one
    ]
    try:
        # The kernel is this interpreter's own, whatever kernel the notebook was last saved with.
        notebook = papermill.execute_notebook(
            given,
            None,
            values,
            kernel_name="python3",
            language="python",
            cwd=cwd,
            progress_bar=progress,
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
            iopub_timeout=120,  # seconds; a busy machine takes more than the 4 of the default
        )
    except papermill.PapermillExecutionError as error:
        raise NotebookError(f"{path.name} failed in {_where(error)}") from None
    except DeadKernelError:
        raise NotebookError(f"{path.name} failed: its kernel died, perhaps of memory") from None
    # Papermill notes absolute paths, which would travel into a published book.
    notebook.metadata.papermill.update(
        input_path=path.name, output_path=output_name, environment=environment()
    )
    return nbformat.writes(notebook) + "\n"


def _where(error):
    """Cell, line and message of a papermill error, in short."""
    cell = f"cell [{error.exec_count}]"
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    line = re.search(r"^-+> *\d+ (.*)$", text, re.MULTILINE)
    if line:
        cell += f", at `{line[1].strip()}`"
    return f"{cell}: {error.ename}: {error.evalue}".rstrip(": ")


def parameter_table(path):
    """The parameters of a notebook as a Markdown table, for the book."""
    rows = [
        f"| `{p.name}` | `{p.type}` | `{p.default}` | {p.help} |".replace("\n", " ")
        for p in parameters(path)
    ]
    return "\n".join(["| parameter | type | default | what it is |", "|---|---|---|---|", *rows])
