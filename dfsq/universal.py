"""Universal sets: all the points that sums of a few powers of two can reach.

A universal set is given by its *words*. Each word is a short list of values, zero or a power of
two; a point is one value of each word, summed, over the number of words. Multiplying by such a
point takes shifts and additions only, which is why quantization points are taken from it.
"""

from itertools import product
from math import frexp

import numpy as np

KINDS = ("dfsq", "sq")


def universal_words(universal="dfsq", words=None):
    """The words of a universal set.

    Parameters
    ----------
    universal : {"dfsq", "sq"} or sequence of sequences of float
        ``"dfsq"`` is the set of Zhong et al. (2023): word ``i`` is
        ``{1, 2^-i, 2^-(i+4), 0}``. ``"sq"`` is the two-word set of Oh et al. (ECCV 2022):
        ``{1, 1/2, 1/8, 0}`` and ``{1, 1/4, 1/16, 0}``. Anything else is taken as the words
        themselves, each value 0 or a power of two.
    words : int, optional
        Number of words, 1 to 4, of the ``"dfsq"`` set; 4 by default.

    Returns
    -------
    tuple of tuples of float

    Raises
    ------
    ValueError
        For an unknown name, a number of words out of range, or a value that is neither 0 nor a
        power of two.

    Examples
    --------
    >>> universal_words("sq")
    ((1.0, 0.5, 0.125, 0.0), (1.0, 0.25, 0.0625, 0.0))
    >>> universal_words("dfsq", words=2)
    ((1.0, 0.5, 0.03125, 0.0), (1.0, 0.25, 0.015625, 0.0))
    """
    if isinstance(universal, str) and universal == "dfsq":
        words = 4 if words is None else words
        if not isinstance(words, int) or words not in (1, 2, 3, 4):
            raise ValueError(f"words must be 1, 2, 3 or 4, not {words!r}")
        return tuple((1.0, 2.0**-i, 2.0 ** -(i + 4), 0.0) for i in range(1, words + 1))
    if words is not None:
        raise ValueError(f"words={words!r} goes with universal='dfsq' only")
    if isinstance(universal, str):
        if universal == "sq":
            return ((1.0, 0.5, 0.125, 0.0), (1.0, 0.25, 0.0625, 0.0))
        raise ValueError(
            f"universal must be one of {', '.join(KINDS)} or a list of words, not {universal!r}"
        )
    try:
        result = tuple(tuple(float(value) for value in word) for word in universal)
    except (TypeError, ValueError):
        raise ValueError(
            f"universal must be one of {', '.join(KINDS)} or a list of words, each a list of "
            f"numbers, not {universal!r}"
        ) from None
    if not result or not all(result):
        raise ValueError("universal must hold at least one word, and each word a value")
    for value in (value for word in result for value in word):
        if not np.isfinite(value) or (value and abs(frexp(value)[0]) != 0.5):
            raise ValueError(f"a word holds {value!r}, which is neither 0 nor a power of two")
        if abs(value) > 1:
            raise ValueError(f"a word holds {value!r}; values must lie in -1..1")
    return result


def universal_set(universal="dfsq", words=None, *, signed=True):
    """All distinct points of a universal set.

    ``(p_1 + ... + p_n) / n`` over all choices of ``p_i`` from word ``i``, with both signs.

    Parameters
    ----------
    universal, words
        See :func:`dfsq.universal.universal_words`.
    signed : bool
        Whether to give both signs (the default) or the non-negative points only, as for the
        input of a layer behind a ReLU.

    Returns
    -------
    float64 array, sorted, shape (points,)

    Examples
    --------
    >>> len(universal_set("dfsq", words=4))
    377
    >>> len(universal_set("dfsq", signed=False)), len(universal_set("sq", signed=False))
    (189, 15)
    >>> universal_set([[1, 0]]).tolist()
    [-1.0, 0.0, 1.0]
    """
    choices = universal_words(universal, words)
    points = np.array([sum(combination) / len(choices) for combination in product(*choices)])
    points = np.unique(np.concatenate([points, -points])) + 0.0  # no negative zero
    return points if signed else points[points >= 0]


def shifts_and_adds(point, universal="dfsq", words=None):
    """Write a point of a universal set as its shifts and adds, with as few terms as can be.

    Parameters
    ----------
    point : float
    universal, words
        See :func:`dfsq.universal.universal_words`.

    Returns
    -------
    tuple of float
        The powers of two, largest first, that sum to ``point`` times the number of words; all of
        them negated for the negative point of a pair. Empty for 0. The number of additions that
        a multiplication takes is ``len(result) - 1``.

    Raises
    ------
    ValueError
        If the point is not in the set.

    Examples
    --------
    >>> shifts_and_adds(0.75)
    (1.0, 1.0, 1.0)
    >>> shifts_and_adds(0.7, "sq")
    Traceback (most recent call last):
    ...
    ValueError: 0.7 is not a point of this universal set; the nearest is 0.75
    """
    choices = universal_words(universal, words)
    best = None
    for combination in product(*choices):
        value = sum(combination) / len(choices)
        if abs(value) == abs(point):
            sign = 1.0 if value == point else -1.0
            terms = tuple(sorted((sign * p for p in combination if p), key=abs, reverse=True))
            if best is None or len(terms) < len(best):
                best = terms
    if best is None:
        points = universal_set(universal, words)
        nearest = points[np.argmin(np.abs(points - point))]
        raise ValueError(
            f"{point!r} is not a point of this universal set; the nearest is {float(nearest)!r}"
        )
    return best
