"""Threads of a CPU: numba's beside PyTorch's."""

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
