"""Selection of quantization points for a channel: exhaustive, K-means, exact.

All three minimise the sum of squared distances of the samples to the nearest of ``k`` points of a
universal set. `exhaustive` tries every subset; `kmeans` is the released heuristic (Lloyd's
K-means, whose centres are snapped to the set); `exact` finds the global optimum by dynamic
programming over the sorted universal set.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb
from time import perf_counter

import numpy as np
from numba import njit, prange

from .histogram import Histogram, cell_bounds, checked_weights, edges_for
from .threads import parallel
from .universal import universal_set

METHODS = ("exact", "exhaustive", "kmeans", "kmeans-hist", "symmetric", "free", "uniform-mse")

#: Shares of the range that the ends of clipped uniform levels are tried at.
UNIFORM_SHARES = np.linspace(1, 0.05, 80)

#: Subsets that the exhaustive search takes on at most: some minutes a channel.
EXHAUSTIVE_LIMIT = 50_000_000


@dataclass(frozen=True)
class Selection:
    """Points selected for one channel.

    Attributes
    ----------
    points : float64 array, sorted, distinct, shape (at most k,)
    sse : float
        Sum of squared errors of the samples against their nearest point.
    method : str
    seconds : float
        Time it took; of channels selected together, an equal share.
    duplicates : int
        Points lost because several K-means centres snapped to the same one; 0 for the others.
    samples : float
        Number (total weight) of samples it was selected on.
    thresholds : float64 array, shape (len(points) - 1,)
        From each of these values on, the next point is taken; midpoints but for ``"free"``,
        for ``"uniform-mse"`` the cells' edges that are nearest to these.
    """

    points: np.ndarray
    sse: float
    method: str
    seconds: float
    duplicates: int = 0
    samples: float = 0.0
    thresholds: np.ndarray | None = None

    def __post_init__(self):
        if self.thresholds is None:
            object.__setattr__(self, "thresholds", (self.points[1:] + self.points[:-1]) / 2)


def select(samples, bits=None, method="exact", universal=None, **options):
    """Select the quantization points of one channel.

    Parameters
    ----------
    samples : array, shape (n,), or Histogram of one channel
        Normalized values, usually within [-1, 1].
    bits : int
        Width of a code, 1 to 8; ``2**bits`` points are selected. Or give ``k``.
    method : {"exact", "exhaustive", "kmeans", "kmeans-hist", "symmetric", "free", "uniform-mse"}
        ``"exact"``: the global optimum. ``"exhaustive"``: the same, by trying all subsets.
        ``"kmeans"``: the released heuristic on the samples; ``"kmeans-hist"``: the same on the
        cells of a histogram, a cell's mean standing for its samples. ``"symmetric"``: the best
        ``k/2`` magnitudes, each with both signs, by exhaustive search, as in SQ. ``"free"``:
        levels that need not be in the universal set, of least squared error; its
        thresholds lie on the cells' edges, its levels are the means between them.
        ``"uniform-mse"``: evenly spaced levels, clipped: both ends lie within the range of the
        universal set so that the squared error is least, of 80 shares of it that both are shrunk
        by, then of as many for one end at a time, in turn until neither gets better.
    universal : array, optional
        Sorted points to select from; ``universal_set("dfsq")`` by default.
    **options
        Of :func:`select_channels`: ``k``, ``pinned``, ``weights``, ``seed``, ``restarts``,
        ``iterations``, ``tolerance``, ``pin_zero``, ``limit``.

    Returns
    -------
    Selection

    Examples
    --------
    >>> s = select([-0.9, -0.1, 0.0, 0.1, 0.5, 0.9], bits=2)
    >>> s.points.tolist()
    [-0.875, 0.0, 0.5, 0.875]
    >>> round(s.sse, 5)
    0.02125
    """
    if isinstance(samples, Histogram):
        if samples.channels != 1:
            raise ValueError(
                f"the histogram must be of one channel, not {samples.channels}; see select_channels"
            )
    else:
        samples = [samples]
    return select_channels(samples, bits, method, universal, **options)[0]


def select_channels(
    samples,
    bits=None,
    method="exact",
    universal=None,
    *,
    k=None,
    pinned=(),
    weights=None,
    seed=0,
    restarts=5,
    iterations=100,
    tolerance=1e-3,
    pin_zero=True,
    limit=EXHAUSTIVE_LIMIT,
):
    """Select the quantization points of all channels of a layer at once.

    Parameters
    ----------
    samples : Histogram, or sequence of arrays of shape (n,)
        One entry a channel; an array of shape (channels, n) will do.
    bits, method, universal
        See :func:`select`.
    k : int, or int array of shape (channels,), optional
        Number of points, instead of ``2**bits``. If it exceeds the universal set, the whole set
        is taken, but by K-means what its centres snap to.
    pinned : sequence of float
        Points that must be in the subset (``exact`` and ``exhaustive``).
    weights : array, shape (n,), optional
        Non-negative weight of each sample.
    seed, restarts, iterations, tolerance, pin_zero
        Of K-means: seed of the random draws; number of runs, of which the least error after
        snapping is kept; most iterations in a run; a run stops when no centre moves by this
        much, without that last move; whether one centre stays at 0.
    limit : int
        Most subsets that an exhaustive search takes on.

    Returns
    -------
    list of Selection, one a channel

    Raises
    ------
    ValueError
        For bad arguments, samples that are empty or not finite, or a search too large.

    Examples
    --------
    >>> layer = [[-0.9, -0.1, 0.1, 0.9], [0.0, 0.2, 0.4, 0.6]]
    >>> for selection in select_channels(layer, bits=1):
    ...     print(selection.points, round(selection.sse, 4))
    [-0.875       0.30078125] 0.5606
    [0.1015625 0.5      ] 0.04
    >>> [len(selection.points) for selection in select_channels(layer, k=3, method="kmeans")]
    [3, 3]
    """
    if np.ndim(k):
        return _with_own_k(
            samples, np.asarray(k), bits=bits, method=method, universal=universal, pinned=pinned,
            weights=weights, seed=seed, restarts=restarts, iterations=iterations,
            tolerance=tolerance, pin_zero=pin_zero, limit=limit,
        )  # fmt: skip
    universal = universal_set("dfsq") if universal is None else _checked_universal(universal)
    k = _checked_k(bits, k)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    pinned = _checked_pinned(pinned, universal, k, method)
    if not (samples.channels if isinstance(samples, Histogram) else len(samples)):
        raise ValueError("there are no channels to select points for")
    began = perf_counter()
    if method == "kmeans":
        if isinstance(samples, Histogram):
            raise ValueError(
                "method 'kmeans' needs the samples themselves; on a histogram use 'kmeans-hist'"
            )
        samples = [_checked_samples(x) for x in samples]
        found = _kmeans_channels(
            samples,
            [_checked_weights(weights, x) for x in samples],
            k, universal, seed, restarts, iterations, tolerance, pin_zero,
        )  # fmt: skip
    else:
        histogram = _as_histogram(samples, universal, weights)
        if method == "kmeans-hist":
            values, counts = _cell_means(histogram)
            released = _kmeans_channels(
                values, counts, k, universal, seed, restarts, iterations, tolerance, pin_zero
            )
            found = [(points, duplicates) for points, _, duplicates, _ in released]
        elif method == "free":
            return _free_channels(histogram, k, began)
        elif method == "uniform-mse":
            return _uniform_channels(histogram, k, universal, began)
        elif method == "exact":
            found = _exact_channels(histogram, k, universal, pinned)
        else:
            found = _exhaustive_channels(histogram, k, universal, pinned, limit, method)
        found = [
            (points, histogram.squared_error(points, c), duplicates, histogram.count[c].sum())
            for c, (points, duplicates) in enumerate(found)
        ]
    seconds = (perf_counter() - began) / len(found)
    return [
        Selection(points, float(sse), method, seconds, int(duplicates), float(size))
        for points, sse, duplicates, size in found
    ]


def _with_own_k(samples, k, **options):
    """Selections of channels that have numbers of points of their own, one search a number."""
    channels = samples.channels if isinstance(samples, Histogram) else len(samples)
    if k.shape != (channels,):
        raise ValueError(f"k must be one number, or one a channel, {channels}, not {k.shape}")
    selections = [None] * channels
    for own in np.unique(k):
        rows = np.flatnonzero(k == own)
        part = samples.only(rows) if isinstance(samples, Histogram) else [samples[c] for c in rows]
        for c, selection in zip(rows, select_channels(part, k=own, **options), strict=True):
            selections[c] = selection
    return selections


def _checked_universal(universal):
    if isinstance(universal, str):
        raise ValueError(f"universal must be points, as of universal_set(), not {universal!r}")
    universal = np.asarray(universal, dtype=np.float64)
    if universal.ndim != 1 or not len(universal) or not np.isfinite(universal).all():
        raise ValueError("universal must be a sequence of finite points, at least one")
    if np.any(np.diff(universal) <= 0):
        raise ValueError("universal must be sorted and distinct; numpy.unique makes it so")
    return universal


def _checked_k(bits, k):
    if (bits is None) == (k is None):
        raise ValueError("give either bits or k")
    if bits is not None:
        if bits not in range(1, 9):
            raise ValueError(f"bits must be a whole number from 1 to 8, not {bits!r}")
        return 2 ** int(bits)
    if not isinstance(k, (int, float, np.number)) or not np.isfinite(k) or k != int(k) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, not {k!r}")
    return int(k)


def _checked_pinned(pinned, universal, k, method):
    pinned = np.unique(np.asarray(pinned, dtype=np.float64))
    if len(pinned) and method not in ("exact", "exhaustive"):
        raise ValueError(f"pinned goes with the methods exact and exhaustive, not {method!r}")
    for point in pinned:
        if point not in universal:
            raise ValueError(f"pinned point {float(point)!r} is not in the universal set")
    if len(pinned) > k:
        raise ValueError(f"{len(pinned)} points are pinned, but only {k} can be selected")
    return np.searchsorted(universal, pinned)


def _checked_samples(samples):
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise ValueError(
            f"the samples of a channel must be of shape (n,), not {samples.shape}; select takes "
            "those of one channel, select_channels a sequence of such"
        )
    if samples.dtype != np.float32:
        samples = samples.astype(np.float64)
    if not len(samples):
        raise ValueError("there are no samples to select points for")
    if not np.isfinite(samples).all():
        raise ValueError("samples must be finite; there is NaN or infinity among them")
    return samples


def _checked_weights(weights, samples):
    weights = checked_weights(weights, len(samples))
    if weights is not None and not weights.any():
        raise ValueError("there are no samples to select points for: all weights are 0")
    return weights


def _as_histogram(samples, universal, weights):
    if isinstance(samples, Histogram):
        histogram = samples
        if weights is not None:
            raise ValueError("weights go with samples; a histogram already has its counts")
        if not np.isin(edges_for(universal), histogram.edges).all():
            raise ValueError(
                "the histogram's cells do not fit the universal set; calibrate with the same "
                "configuration, or make it with edges_for(universal)"
            )
    else:
        edges = edges_for(universal)
        histogram = Histogram(len(samples), edges)
        for c, channel in enumerate(samples):
            one = Histogram.of(_checked_samples(channel), edges, weights)
            for name in ("count", "total", "squares"):
                getattr(histogram, name)[c] = getattr(one, name)[0]
    empty = np.flatnonzero(histogram.count.sum(axis=1) <= 0)
    if len(empty):
        raise ValueError(f"there are no samples to select points for, in channel {empty[0]}")
    return histogram


def _fill(chosen, wanted, universal):
    """Add free points: 0 first, then always the one farthest from those there (lower on a tie).

    More points never raise the error, so a channel that needs fewer keeps its optimum, and
    values unseen in calibration find a point near them.
    """
    wanted = min(wanted, len(universal))
    taken = np.zeros(len(universal), bool)
    taken[chosen] = True
    zero = np.flatnonzero(universal == 0)
    if taken.sum() < wanted and len(zero):
        taken[zero[0]] = True
    if taken.sum() == wanted:
        return np.flatnonzero(taken)
    distance = np.full(len(universal), np.inf)
    for point in universal[taken]:
        distance = np.minimum(distance, np.abs(universal - point))
    for _ in range(wanted - taken.sum()):
        farthest = np.argmax(distance)
        taken[farthest] = True
        distance = np.minimum(distance, np.abs(universal - universal[farthest]))
    return np.flatnonzero(taken)


def _used(chosen, universal, histogram, channel):
    """Which of the chosen points have samples."""
    count = np.concatenate([[0.0], np.cumsum(histogram.count[channel])])
    bounds = cell_bounds(universal[chosen], histogram.edges)
    return np.diff(count[np.concatenate([[0], bounds])]) > 0


def _settle(chosen, wanted, universal, histogram, channel, pinned):
    """Replace points that no sample uses by those of the rule of :func:`_fill`."""
    used = _used(chosen, universal, histogram, channel)
    return universal[_fill(chosen[used | np.isin(chosen, pinned)], wanted, universal)]


def _each(run, channels):
    """Results of `run` for each channel, on all cores; for one no thread is started."""
    if channels == 1:
        return [run(0)]
    with ThreadPoolExecutor(min(channels, os.cpu_count())) as pool:
        return list(pool.map(run, range(channels)))


# --- exact ------------------------------------------------------------------------------------
#
# With G(q, e) the cost of giving all samples below edge e to point q, and e_ab the edge at the
# midpoint of neighbours a < b, the error of a subset q_1 < ... < q_k telescopes to
#
#     sum over neighbours of W(a, b)  +  G(q_k, end),    W(a, b) = G(a, e_ab) - G(b, e_ab)
#                                                           = (b - a) (2 S[e] - (a + b) N[e])
#
# with N and S the prefix sums of count and sum. W satisfies the quadrangle inequality
# W(a, c) + W(b, d) <= W(a, d) + W(b, c) for a < b < c < d, so the best predecessor never moves
# down as its successor moves up, nor as there are more points below it (Knuth 1971, Yao 1980). The
# search for it runs between those two, which is O(m^2) for all numbers of points together: the rows
# of many points are almost free, and 8 bits cost little more than 4.


@njit(cache=True)
def _row(previous, current, before, argument, u, edge, N, S, low, high, first, last):  # noqa: N803
    """One row of the table: for all j in low..high the best predecessor in first..last.

    `before` are the predecessors that the previous row found, or -1.
    """
    highest = last
    for j in range(high, low - 1, -1):
        best, where = np.inf, -1
        for i in range(max(first, before[j]), min(highest, j - 1) + 1):
            e = edge[i, j]
            value = previous[i] + (u[j] - u[i]) * (2 * S[e] - (u[i] + u[j]) * N[e])
            if value < best:
                best, where = value, i
        current[j] = best
        argument[j] = where
        if where >= 0:  # else no predecessor reaches j, and nothing is known about the next
            highest = where


@njit(cache=True)
def _exact(N, S, total_squares, u, edge, k, pinned):  # noqa: N803
    """Optimal subset of k points, all pinned ones among them; indices, and the error."""
    m = len(u)
    previous, current = np.full(m, np.inf), np.empty(m)
    argument = np.full((k, m), -1, np.int32)
    first_pin = pinned[0] if len(pinned) else m - 1
    last_pin = pinned[-1] if len(pinned) else 0
    previous[: first_pin + 1] = 0.0
    for row in range(1, k):
        current[:] = np.inf
        # `row` points lie below, and k - 1 - row above; between two pinned points the
        # predecessor may not lie below the lower one
        start, most = 0, m - k + row
        for s in range(len(pinned) + 1):
            stop = pinned[s] if s < len(pinned) else m - 1
            if stop > start:
                _row(
                    previous, current, argument[row - 1], argument[row], u, edge, N, S,
                    max(start + 1, row), min(stop, most),
                    max(start, row - 1), min(stop - 1, most - 1),
                )  # fmt: skip
            start = stop
        previous, current = current, previous
    best, where = np.inf, -1
    for j in range(last_pin, m):
        value = previous[j] + total_squares - 2 * u[j] * S[-1] + u[j] * u[j] * N[-1]
        if value < best:
            best, where = value, j
    chosen = np.empty(k, np.int64)
    for row in range(k - 1, -1, -1):
        chosen[row] = where
        where = argument[row, where]
    return chosen, best


@parallel()
def _exact_all(N, S, squares, u, edge, k, pinned, chosen, error):  # noqa: N803
    for c in prange(N.shape[0]):
        chosen[c], error[c] = _exact(N[c], S[c], squares[c], u, edge, k, pinned)


def _sums(histogram, universal):
    """Prefix sums of count and sum, and the cell beyond the midpoint of each pair of points."""
    zeros = np.zeros((histogram.channels, 1))
    N = np.concatenate([zeros, np.cumsum(histogram.count, axis=1)], axis=1)  # noqa: N806
    S = np.concatenate([zeros, np.cumsum(histogram.total, axis=1)], axis=1)  # noqa: N806
    return N, S, _beyond_midpoints(histogram.edges.tobytes(), universal.tobytes())


@lru_cache(maxsize=16)  # a search of scales asks for the same again and again
def _beyond_midpoints(edges, universal):
    edges, u = np.frombuffer(edges), np.frombuffer(universal)
    return (np.searchsorted(edges, (u[:, None] + u[None, :]) / 2) + 1).astype(np.int32)


def _rounding(N, universal):  # noqa: N803
    """What an error may be off by, of each channel: ten times the most that was seen."""
    return 1e-14 * N[:, -1] * np.square(universal).max()


def _exact_channels(histogram, k, universal, pinned):
    size = min(k, len(universal))
    channels = histogram.channels
    N, S, edge = _sums(histogram, universal)  # noqa: N806
    squares = histogram.squares.sum(axis=1)

    def solve(pins, rows):
        problem = universal, edge, size, np.asarray(pins, np.int64)
        if len(rows) == 1:  # to start threads costs more than one channel
            chosen, error = _exact(N[rows[0]], S[rows[0]], squares[rows[0]], *problem)
            return chosen[None], np.array([error])
        chosen, error = np.empty((len(rows), size), np.int64), np.empty(len(rows))
        _exact_all(N[rows], S[rows], squares[rows], *problem, chosen, error)
        return chosen, error

    chosen, error = solve(pinned, np.arange(channels))
    zero = np.flatnonzero(universal == 0)
    if len(zero) and zero[0] not in pinned and len(pinned) < size:
        # Of equal optima, one with 0; equal within the rounding of the sums. Where some point has
        # no samples, 0 takes its place at no cost.
        lacking = np.flatnonzero(~(chosen == zero[0]).any(axis=1))
        full = [_used(chosen[c], universal, histogram, c).all() for c in lacking]
        lacking = lacking[np.array(full, bool)]
        if len(lacking):
            with_zero, same = solve(np.union1d(pinned, zero), lacking)
            prefer = same <= error[lacking] + _rounding(N, universal)[lacking]
            chosen[lacking[prefer]] = with_zero[prefer]
    return [(_settle(chosen[c], size, universal, histogram, c, pinned), 0) for c in range(channels)]


@njit(cache=True)
def _curve(N, S, total_squares, u, edge, error):  # noqa: N803
    """Least error for 1, 2, ... points: the table of :func:`_exact`, one row after the other."""
    m = len(u)
    previous, current = np.zeros(m), np.empty(m)
    before, argument = np.full(m, -1, np.int32), np.full(m, -1, np.int32)
    for row in range(len(error)):
        if row > 0:
            current[:] = np.inf
            _row(previous, current, before, argument, u, edge, N, S, row, m - 1, row - 1, m - 2)
            previous, current = current, previous
            before, argument = argument, before
        best = np.inf
        for j in range(row, m):
            value = previous[j] + total_squares - 2 * u[j] * S[-1] + u[j] * u[j] * N[-1]
            best = min(best, value)
        error[row] = max(best, 0.0)


@parallel()
def _curves(N, S, squares, u, edge, error):  # noqa: N803
    for c in prange(N.shape[0]):
        _curve(N[c], S[c], squares[c], u, edge, error[c])


def error_curves(samples, most, universal=None, *, weights=None):
    """The least squared error of each channel for every number of points, in one pass.

    Parameters
    ----------
    samples : Histogram, or sequence of arrays of shape (n,)
    most : int
        Largest number of points; at most the size of the universal set.
    universal : array, optional
    weights : array, shape (n,), optional
        Non-negative weight of each sample.

    Returns
    -------
    float64 array, shape (channels, most)
        Entry ``[c, k - 1]`` is the ``sse`` of ``select_channels(samples, k=k)[c]``, to rounding;
        where more points take away no more than that, the entries are equal.

    Examples
    --------
    >>> error_curves([[-0.5, 0.0, 0.5]], most=3).round(3).tolist()
    [[0.5, 0.125, 0.0]]
    """
    universal = universal_set("dfsq") if universal is None else _checked_universal(universal)
    most = min(_checked_k(None, most), len(universal))
    histogram = _as_histogram(samples, universal, weights)
    N, S, edge = _sums(histogram, universal)  # noqa: N806
    error = np.empty((histogram.channels, most))
    _curves(N, S, histogram.squares.sum(axis=1), universal, edge, error)
    # What more points than are of use seem to change is rounding, which differs between machines
    # and must not decide how many are taken.
    least = error.min(axis=1, keepdims=True)
    return np.where(error <= least + _rounding(N, universal)[:, None], least, error)


# --- free codebook ----------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _free(N, S, Q, k):  # noqa: N803
    """Best partition of the cells into k runs; the cells before which runs 2..k begin, the error.

    N, S and Q are prefix sums. The error of a run is its sum of squares about its mean, which
    satisfies the quadrangle inequality too. With many cells and few runs, divide and conquer does
    better than the bounds of :func:`_row` alone, so the row's own order serves for it.
    """
    n = len(N) - 1
    previous, current = np.full(n + 1, np.inf), np.full(n + 1, np.inf)
    argument = np.zeros((k, n + 1), np.int32)
    previous[0] = 0.0
    for row in range(k):
        current[:] = np.inf
        stack = [(row + 1, n, row, n - 1)]
        while len(stack) > 0:
            a, b, p, q = stack.pop()
            if a > b:
                continue
            j = (a + b) // 2
            best, where = np.inf, p
            lowest = p if row == 0 else max(p, argument[row - 1, j])  # see _row
            for i in range(lowest, min(q, j - 1) + 1):
                s = S[j] - S[i]
                value = previous[i] + max(0.0, Q[j] - Q[i] - s * s / (N[j] - N[i]))
                if value < best:
                    best, where = value, i
            current[j] = best
            argument[row, j] = where
            stack.append((a, j - 1, p, where))
            stack.append((j + 1, b, where, q))
        previous, current = current, previous
    starts = np.empty(k, np.int64)
    end = n
    for row in range(k - 1, -1, -1):
        end = argument[row, end]
        starts[row] = end
    return starts, previous[n]


def _free_channels(histogram, k, began):
    def run(channel):
        # of samples that count so little that the sums do not change no mean can be told
        used = np.flatnonzero(np.diff(np.cumsum(histogram.count[channel]), prepend=0.0) > 0)
        N, S, Q = (  # noqa: N806
            np.append(0.0, np.cumsum(sums[channel, used]))
            for sums in (histogram.count, histogram.total, histogram.squares)
        )
        starts, error = _free(N, S, Q, min(k, len(used)))
        ends = np.append(starts[1:], len(used))
        points = (S[ends] - S[starts]) / (N[ends] - N[starts])
        return points, error, N[-1], histogram.edges[used[starts[1:]] - 1]

    found = _each(run, histogram.channels)
    seconds = (perf_counter() - began) / len(found)
    return [
        Selection(points, float(error), "free", seconds, 0, float(size), thresholds)
        for points, error, size, thresholds in found
    ]


# --- clipped uniform levels -------------------------------------------------------------------


@njit(cache=True)
def _uniform_starts(low, high, k, edges):
    """First cell of each of `k` even levels from `low` to `high`, and one more at the end."""
    starts = np.zeros(k + 1, np.int64)
    step = (high - low) / (k - 1)
    for i in range(1, k):
        middle = low + (i - 0.5) * step
        above = min(np.searchsorted(edges, middle), len(edges) - 1)
        below = max(above - 1, 0)
        starts[i] = 1 + (below if middle - edges[below] < edges[above] - middle else above)
    starts[k] = len(edges) + 1
    return starts


@njit(cache=True)
def _uniform_error(N, S, Q, low, high, k, edges):  # noqa: N803
    starts = _uniform_starts(low, high, k, edges)
    error = 0.0
    for i in range(k):
        p, a, b = low + i * (high - low) / (k - 1), starts[i], starts[i + 1]
        error += Q[b] - Q[a] - 2 * p * (S[b] - S[a]) + p * p * (N[b] - N[a])
    return error


@njit(cache=True)
def _uniform_ends(N, S, Q, low, high, k, edges, shares):  # noqa: N803
    """The ends of least error, see :func:`select`; of equal ones the first that was tried."""
    best, a, b = np.inf, low, high
    for share in shares:
        error = _uniform_error(N, S, Q, share * low, share * high, k, edges)
        if error < best:
            best, a, b = error, share * low, share * high
    improved = low < 0 < high
    while improved:
        improved = False
        for lower in (True, False):
            for share in shares:
                c, d = (share * low, b) if lower else (a, share * high)
                error = _uniform_error(N, S, Q, c, d, k, edges)
                if error < best:
                    best, a, b, improved = error, c, d, True
    return a, b


def _uniform_channels(histogram, k, universal, began):
    if k < 2:
        raise ValueError(f"method 'uniform-mse' takes at least 2 points, not {k}")
    low, high = min(universal[0], 0.0), max(universal[-1], 0.0)
    if low == high:
        raise ValueError("method 'uniform-mse' needs a universal set with a point other than 0")
    found = []
    for sums in zip(histogram.count, histogram.total, histogram.squares, strict=True):
        N, S, Q = (np.append(0.0, np.cumsum(part)) for part in sums)  # noqa: N806
        ends = _uniform_ends(N, S, Q, low, high, k, histogram.edges, UNIFORM_SHARES)
        points, starts = np.linspace(*ends, k), _uniform_starts(*ends, k, histogram.edges)
        nearest = np.repeat(points, np.diff(starts))
        error = np.sum(sums[2] - 2 * nearest * sums[1] + nearest**2 * sums[0])
        found.append(
            (points, max(float(error), 0.0), float(N[-1]), histogram.edges[starts[1:-1] - 1])
        )
    seconds = (perf_counter() - began) / len(found)
    return [
        Selection(points, error, "uniform-mse", seconds, 0, size, thresholds)
        for points, error, size, thresholds in found
    ]


# --- exhaustive -------------------------------------------------------------------------------


@njit(cache=True)
def _try_all(N, S, total_squares, u, edge, subsets):  # noqa: N803
    errors = np.empty(len(subsets))
    for s in range(len(subsets)):
        subset = subsets[s]
        error = 0.0
        for n in range(1, len(subset)):
            a, b = u[subset[n - 1]], u[subset[n]]
            e = edge[subset[n - 1], subset[n]]
            error += (b - a) * (2 * S[e] - (a + b) * N[e])
        q = u[subset[-1]]
        errors[s] = error + total_squares - 2 * q * S[-1] + q * q * N[-1]
    return errors


def _exhaustive_channels(histogram, k, universal, pinned, limit, method):
    symmetric = method == "symmetric"
    full, folded = universal, histogram
    if symmetric and universal[0] < 0:
        if not np.array_equal(universal, -universal[::-1]):
            raise ValueError("method 'symmetric' needs a universal set with both signs")
        if k % 2:
            raise ValueError(f"method 'symmetric' takes points in pairs, an even number, not {k}")
        universal, folded, k = universal[universal >= 0], histogram.fold(), k // 2
    size = min(k, len(universal))
    searched = comb(len(universal) - len(pinned), size - len(pinned))
    if searched > limit:
        searched = float(min(searched, 10**300))  # beyond that no float holds it
        seconds = searched * 3e-7 * histogram.channels  # as measured in notebook 3
        advice = "which need not be symmetric" if symmetric else "which finds the same optimum"
        raise ValueError(
            f"an exhaustive search for {size} of {len(universal)} points would try "
            f"{searched:.3g} subsets, about {_duration(seconds)}; the limit is {limit:.3g}. "
            f"Use method='exact', {advice}"
        )
    edge = np.searchsorted(folded.edges, (universal[:, None] + universal[None, :]) / 2) + 1
    free = [i for i in range(len(universal)) if i not in pinned]
    result = []

    def has_zero(subset):
        return (universal[subset] == 0).any(axis=-1)

    for c in range(histogram.channels):
        N = np.append(0.0, np.cumsum(folded.count[c]))  # noqa: N806
        S = np.append(0.0, np.cumsum(folded.total[c]))  # noqa: N806
        squares = folded.squares[c].sum()
        best, best_error = None, np.inf
        for chunk in _chunks(combinations(free, size - len(pinned)), 1 << 16):
            subsets = np.array(chunk, dtype=np.int64).reshape(len(chunk), -1)
            if len(pinned):
                pins = np.broadcast_to(pinned, (len(subsets), len(pinned)))
                subsets = np.sort(np.concatenate([subsets, pins], axis=1), axis=1)
            errors = _try_all(N, S, squares, universal, edge, subsets)
            least = errors.min()
            equal = subsets[errors <= least + 1e-15 * squares]
            # of equal optima, one with 0
            candidate = equal[np.argmax(has_zero(equal))]
            better = least < best_error - 1e-15 * squares
            level = least <= best_error + 1e-15 * squares
            if better or (level and has_zero(candidate) and not has_zero(best)):
                best, best_error = candidate, least
        points = _settle(best, size, universal, folded, c, pinned)
        if symmetric:
            points = np.unique(np.concatenate([points, -points])) if full[0] < 0 else points
        result.append((points + 0.0, 0))
    return result


def _chunks(iterator, size):
    chunk = []
    for item in iterator:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _duration(seconds):
    for unit, length in (("years", 31557600), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


# --- K-means, as released ---------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _draw(cumulative, rng):
    """Index of a random sample, with probability proportional to its weight."""
    index = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return min(index, len(cumulative) - 1)


@njit(cache=True, nogil=True)
def _lloyd(values, cumulative, sums, k, iterations, tolerance, pin_zero, rng):
    """One run; centres as the released loop leaves them, not sorted."""
    centres = np.empty(k)
    free = k - 1 if pin_zero else k
    for i in range(free):
        centres[i] = values[_draw(cumulative, rng)]
    if pin_zero:
        centres[k - 1] = 0.0
    count, total = np.empty(k), np.empty(k)
    for _ in range(iterations):
        order = np.argsort(centres, kind="mergesort")
        count[:] = 0.0
        total[:] = 0.0
        start, n = 0, 0
        while n < k:
            # a group of equal centres: all their samples go to the one that stands first
            owner, end = order[n], n
            while end + 1 < k and centres[order[end + 1]] == centres[owner]:
                end += 1
            stop = len(values)
            if end + 1 < k:
                right = order[end + 1]
                middle = (centres[owner] + centres[right]) / 2
                if owner < right:
                    stop = np.searchsorted(values, middle, side="right")
                else:
                    stop = np.searchsorted(values, middle, side="left")
            if stop > start:
                before = cumulative[start - 1] if start > 0 else 0.0
                base = sums[start - 1] if start > 0 else 0.0
                count[owner] = cumulative[stop - 1] - before
                total[owner] = sums[stop - 1] - base
                start = stop
            n = end + 1
        moved = 0.0
        updated = centres.copy()
        for i in range(free):
            if count[i] > 0:
                updated[i] = total[i] / count[i]
            else:
                updated[i] = values[_draw(cumulative, rng)]
            moved = max(moved, abs(updated[i] - centres[i]))
        if moved < tolerance:
            break  # the released loop stops before it stores this update
        centres = updated
    return centres


def _snap(centres, universal):
    """Nearest universal point of each centre, the lower one on a tie; indices."""
    upper = np.clip(np.searchsorted(universal, centres), 1, max(1, len(universal) - 1))
    upper = np.minimum(upper, len(universal) - 1)
    lower = np.maximum(upper - 1, 0)
    closer = np.abs(universal[upper] - centres) < np.abs(centres - universal[lower])
    return np.where(closer, upper, lower)


def _nearest_error(values, cumulative, sums, squares, points):
    """Sum of squared distances of sorted, weighted samples to the nearest of sorted points."""
    bounds = np.searchsorted(values, (points[1:] + points[:-1]) / 2, side="left")
    bounds = np.concatenate([[0], bounds, [len(values)]])
    n, s, q = (np.diff(np.append(0.0, c)[bounds]) for c in (cumulative, sums, squares))
    return max(0.0, float(np.sum(q - 2 * points * s + points**2 * n)))


def _sorted(values, weights):
    """Samples in order, in float64, and their weights."""
    if weights is None:
        values = np.sort(values)
        return values.astype(np.float64), np.ones(len(values))
    order = np.argsort(values, kind="stable")
    return values[order].astype(np.float64), weights[order]


def _kmeans_channels(
    values, weights, k, universal, seed, restarts, iterations, tolerance, pin_zero
):
    if restarts < 1 or iterations < 1:
        raise ValueError("restarts and iterations must be at least 1")

    def run(channel):
        x, w = _sorted(values[channel], weights[channel])
        rng = np.random.default_rng([seed, channel])
        cumulative, sums, squares = np.cumsum(w), np.cumsum(w * x), np.cumsum(w * x * x)
        best = None
        for _ in range(restarts):
            centres = _lloyd(x, cumulative, sums, k, iterations, tolerance, pin_zero, rng)
            points = universal[np.unique(_snap(centres, universal))]
            error = _nearest_error(x, cumulative, sums, squares, points)
            if best is None or error < best[1]:
                best = (points, error)
        return (*best, k - len(best[0]), cumulative[-1])

    return _each(run, len(values))


def _cell_means(histogram):
    """Sorted values (the mean of each cell with samples) and their counts, by channel."""
    values, counts = [], []
    for count, total in zip(histogram.count, histogram.total, strict=True):
        used = count > 0
        values.append(total[used] / count[used])
        counts.append(count[used])
    return values, counts
