"""Files that are not part of the project: found in a folder, in the cache, or downloaded.

`data/registry.csv` names each file with its address and its SHA-256. A file is looked for in the
folder named by ``$DFSQ_DATA``, then in the cache, then at its address. Nothing is ever substituted.
"""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pooch
from PIL import Image

REGISTRY = Path(__file__).resolve().parents[2] / "data" / "registry.csv"


@lru_cache(maxsize=1)
def registry():
    """All files that can be fetched.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``file`` (``Set5/img_001_SRF_2_HR.png``), with ``url``, ``sha256``, ``bytes``,
        ``licence`` and, for images that may be held in another lossless form (Urban100),
        ``pixels``: the SHA-256 of the decoded RGB values.
    """
    return pd.read_csv(REGISTRY, keep_default_na=False).set_index("file")


def groups():
    """Names of what can be fetched: folders of images, and single files of weights.

    Examples
    --------
    >>> from dfsq.sr.fetch import groups
    >>> {"Set5", "Set14", "B100", "Urban100"} <= set(groups())
    True
    """
    names = (f if f.startswith("weights/") else f.rsplit("/", 1)[0] for f in registry().index)
    return tuple(dict.fromkeys(names))


def files_of(group):
    """The registered files of a group, in order of their names."""
    found = [f for f in registry().index if f == group or f.rsplit("/", 1)[0] == group]
    if not found:
        raise ValueError(f"nothing is registered as {group!r}; there are {', '.join(groups())}")
    return found


def cache():
    """Folder of downloaded files: ``$DFSQ_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("DFSQ_CACHE") or pooch.os_cache("dfsq")) / "data"


def local(file):
    """Where a registered file lies on this machine, or None.

    ``$DFSQ_DATA`` first, then the cache. An image may lie there as WebP or BMP too, which
    :func:`verify` takes where its pixels are registered (Urban100).

    Raises
    ------
    ValueError
        If ``$DFSQ_DATA`` is set and names no folder.
    """
    roots = [Path(os.environ["DFSQ_DATA"])] if os.environ.get("DFSQ_DATA") else []
    if roots and not roots[0].is_dir():
        raise ValueError(f"DFSQ_DATA names no folder: {roots[0]}; mend it, or unset it")
    for root in (*roots, cache()):
        path = root / file
        for candidate in (path, *(path.with_suffix(s) for s in (".webp", ".bmp"))):
            if candidate.is_file():
                return candidate
    return None


def verify(file, path):
    """Check a file against the registry.

    By its bytes or, for an image whose pixels are registered as well, by its pixels: then any
    lossless form of it will do.

    Raises
    ------
    ValueError
        If it is not what is registered: cut short, altered, or another file; or if it is in another
        form and no pixels are registered to check it by.
    """
    row = registry().loc[file]
    if hashlib.sha256(path.read_bytes()).hexdigest() == row.sha256:
        return
    if row.pixels and pixels_digest(path) == row.pixels:
        return
    own, group = Path(file).suffix, file.rsplit("/", 1)[0]
    if not row.pixels and path.suffix != own:
        raise ValueError(
            f"{path} cannot be checked: {file} is registered by its bytes alone, as {own}; put "
            f"that in its place, or remove it and run `dfsq fetch {group}`"
        )
    raise ValueError(
        f"{path} is not the registered {file}: cut short, altered or another file; "
        f"remove it and run `dfsq fetch {group}`"
    )


def pixels_digest(path):
    """SHA-256 of an image's size and decoded RGB values; None of what cannot be decoded."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def fetch(file, *, progress=True):
    """Path of a registered file, downloaded if it is not on this machine.

    Raises
    ------
    FileNotFoundError
        If it is not here and cannot be downloaded; the message says how to get it.
    ValueError
        If what is here is not what is registered.
    """
    path = local(file)
    if path is not None:
        verify(file, path)
        return path
    row = registry().loc[file]
    target = cache() / file
    try:
        pooch.retrieve(
            row.url,
            f"sha256:{row.sha256}",
            target.name,
            target.parent,
            progressbar=progress,
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{file} is not on this machine and could not be downloaded from {row.url} "
            f"({type(error).__name__}); put it into a folder, as FOLDER/{file}, and name FOLDER in "
            "DFSQ_DATA"
        ) from None
    return target
