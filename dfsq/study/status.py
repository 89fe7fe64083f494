"""What the book was built from, and on: seconds of each notebook, machine, versions, digests."""

import hashlib
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

#: Packages whose versions a run's numbers may depend on.
PACKAGES = (
    "dfsq", "torch", "numpy", "scipy", "numba", "scikit-image", "scikit-learn", "pandas",
    "matplotlib", "pillow", "papermill", "jupyter-book",
)  # fmt: skip


def environment():
    """The machine and the versions that a run depends on.

    Returns
    -------
    dict of str to str
        Processor, cores, memory, system, Python and the versions of `PACKAGES`.
    """
    import psutil

    return {
        "Processor": _processor(),
        "Logical cores": str(os.cpu_count()),
        "Memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "System": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "Versions": ", ".join(_versions()),
    }


def _versions():
    """Names and versions of `PACKAGES`, as far as they are installed."""
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"


def _processor():
    """The processor's name; Linux keeps it in a file."""
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def page(notebooks, files):
    """The status of the book, in Markdown.

    Parameters
    ----------
    notebooks : list of Path
        Executed by :func:`dfsq.study.notebooks.execute`, which records duration and environment.
    files : list of Path
        Data and weights, whose SHA-256 is told.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If a notebook holds no record of its run.
    """
    import nbformat

    runs, machines = [], {}
    for path in notebooks:
        run = nbformat.read(path, as_version=4).metadata.get("papermill", {})
        if "environment" not in run:
            raise ValueError(f"{path} does not say where it ran: run it again with `make book`")
        ended = run["end_time"][:16].replace("T", " ")
        runs.append(f"| {{doc}}`/notebooks/{path.stem}` | {run['duration']:.0f} | {ended} |")
        machines.setdefault(tuple(run["environment"].items()), []).append(path.stem)
    lines = ["| notebook | seconds | ended (UTC) |", "|---|---|---|", *runs]
    for machine, names in machines.items():
        listed = ", ".join(f"`{name}`" for name in names)
        lines += ["", f"The machine that ran {listed}:", ""]
        lines += [f"- {key}: {value}" for key, value in machine]
    lines += ["", "## Data and weights", "", "Size in bytes, and SHA-256, of each file.", ""]
    for path in files:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        lines += [f"`{path.as_posix()}`, {len(content):,}", f": `{digest}`", ""]
    return "\n".join(lines) + "\n"
