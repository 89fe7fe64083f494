"""Threads of a CPU: numba's beside PyTorch's."""

import os
import sys
from contextlib import suppress
from functools import cache, wraps

import numba
import torch


@cache
def start_threads():
    """Start numba's threads, and leave PyTorch's number of threads as it is.

    When they start they set OpenMP's number, which is PyTorch's too, to all cores. They cannot be
    started once and for all on import: a process that has them may not fork one that uses them.
    """
    count = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(count)


_unusable = False


def _after_fork():
    """Note that GNU's OpenMP has run in the parent, and would end this process."""
    global _unusable
    with suppress(ValueError):  # where no threads have been started
        _unusable = numba.threading_layer() == "omp"


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_after_fork)


def parallel(**options):
    """Decorate a kernel for numba, to run on all of its threads.

    Parameters
    ----------
    **options
        Of ``numba.njit``.
    """

    def decorate(function):
        kernel = numba.njit(parallel=True, cache=True, **options)(function)

        @wraps(function)
        def called(*arguments):
            if _unusable:
                raise RuntimeError(
                    "this process was forked from one that has run dfsq, whose threads it cannot "
                    "use; start it by multiprocessing's method 'spawn', not 'fork'"
                )
            start_threads()
            return kernel(*arguments)

        return called

    return decorate
