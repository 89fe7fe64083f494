"""How freed memory is treated while many large feature maps come and go."""

import ctypes
import sys
from contextlib import contextmanager


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
