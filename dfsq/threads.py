"""Threads of a CPU: numba's beside PyTorch's."""

from contextlib import contextmanager
from functools import cache, wraps

import numba
import torch
from threadpoolctl import threadpool_limits


@cache
def start_threads():
    """Start numba's threads, and leave PyTorch's number of threads as it is.

    When they start they set OpenMP's number, which is PyTorch's too, to all cores. They cannot be
    started once and for all on import: a process that has them may not fork one that uses them.
    """
    count = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(count)


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
            start_threads()
            return kernel(*arguments)

        return called

    return decorate


@contextmanager
def threads_limited(count):
    """Within this, PyTorch, NumPy and numba compute with a number of threads, or with fewer.

    Parameters
    ----------
    count : int
        At least 1.

    Examples
    --------
    >>> import torch
    >>> from dfsq.threads import threads_limited
    >>> with threads_limited(1):
    ...     torch.get_num_threads()
    1
    """
    start_threads()
    before = numba.get_num_threads()
    numba.set_num_threads(min(count, before))
    try:
        with threadpool_limits(count):
            yield
    finally:
        numba.set_num_threads(before)
