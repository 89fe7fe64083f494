"""Memory: how much is taken at a time, and how freed memory is treated."""

import ctypes
import sys
from contextlib import contextmanager

#: Memory, in bytes, for the statistics of layers that are gathered in one pass over the images.
LIMIT = 2 * 2**30


def in_groups(sizes):
    """Names in groups that fit the memory limit together; one that does not is by itself.

    Parameters
    ----------
    sizes : dict of str to int
        Bytes of each name.

    Returns
    -------
    list of list of str

    Examples
    --------
    >>> in_groups({"a": 2**30, "b": 2**30, "c": 2**31, "d": 1})
    [['a', 'b'], ['c'], ['d']]
    """
    groups, room = [], 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = LIMIT
        groups[-1].append(name)
        room -= size
    return groups


@contextmanager
def freed_memory_kept():
    """Within this, glibc does not hand large blocks back to the system after each use.

    Every feature map would otherwise be mapped and zeroed anew by the kernel, which takes as long
    as the convolutions themselves. At the end all that is free is handed back.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # other systems and libraries have no such setting
        yield
        return
    trim_threshold, mmap_max = -1, -4  # as in malloc.h
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(mmap_max, 0)
    try:
        yield
    finally:
        libc.mallopt(trim_threshold, 128 * 1024)  # glibc's defaults
        libc.mallopt(mmap_max, 65536)
        libc.malloc_trim(0)
