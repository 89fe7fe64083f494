"""A cache on disk, by content: selections are made once for the same data and parameters."""

import hashlib
import os
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import pooch
from joblib import Memory

from . import histogram, selection
from .histogram import Histogram


def cache_folder():
    """``$DFSQ_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("DFSQ_CACHE") or pooch.os_cache("dfsq"))


@lru_cache(maxsize=1)
def _code_version():
    sources = (Path(module.__file__).read_bytes() for module in (histogram, selection))
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _select(version, data, edges, k, method, universal, seed):
    if edges is not None:
        cells, data = data, Histogram(len(data[0]), edges)
        data.count, data.total, data.squares = cells
    return selection.select_channels(data, k=k, method=method, universal=universal, seed=seed)


def select_channels(data, *, k, method, universal, seed=0):
    """:func:`dfsq.selection.select_channels`, remembered on disk.

    The key is the data, the parameters and the code of the selectors. A folder that cannot be
    written to means no cache, nothing else.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        location = folder if os.access(folder, os.W_OK) else None
    except OSError:
        location = None
    edges = None
    if isinstance(data, Histogram):
        data, edges = (data.count, data.total, data.squares), np.asarray(data.edges)
    remembered = Memory(location, verbose=0).cache(_select)
    with warnings.catch_warnings():  # on a busy machine, of the time that hashing takes
        warnings.filterwarnings("ignore", "Persisting input arguments")
        return remembered(_code_version(), data, edges, k, method, universal, seed)
