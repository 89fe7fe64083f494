"""What calibration remembers of a channel: count, sum and sum of squares on a fixed grid.

All points of the paper's universal set are multiples of 2^-10, so the midpoint of any two of them
is a multiple of 2^-11. A nearest-point assignment changes at midpoints only; hence three numbers
for each cell of that grid give the *exact* squared error of every subset, whatever the number of
samples. Universal sets off that grid bring the edges of their own: all midpoints of two points.
"""

from functools import lru_cache

import numpy as np
import torch
from numba import njit, prange

from .threads import parallel

#: Edges between the 4096 cells over [-1, 1]; the outer cells are open.
DYADIC_EDGES = (np.arange(1, 4096) - 2048) / 2048.0
DYADIC_EDGES.setflags(write=False)


def is_dyadic(values):
    """Whether all values are multiples of 2^-11 within [-1, 1], the default grid."""
    values = np.asarray(values, dtype=np.float64)
    return bool(np.all(np.abs(values) <= 1) and np.all(values * 2048 == np.round(values * 2048)))


@lru_cache(maxsize=16)
def _edges_of(points):
    points = np.array(points)
    midpoints = (points[:, None] + points[None, :]) / 2
    if is_dyadic(midpoints):
        return DYADIC_EDGES
    edges = np.unique(midpoints)
    edges.setflags(write=False)
    return edges


def edges_for(universal):
    """Inner edges of the cells on which every subset of `universal` is told apart exactly.

    Parameters
    ----------
    universal : array, shape (points,)

    Returns
    -------
    float64 array, sorted, shape (cells - 1,)
        :data:`DYADIC_EDGES` wherever the points lie on the dyadic grid.
    """
    return _edges_of(tuple(np.asarray(universal, dtype=np.float64).tolist()))


@njit(cache=True)
def _cell(value, edges, dyadic):
    """Cell of a value; a value on an edge belongs to the upper cell."""
    if dyadic:
        # 2048 * z is exact in floating point, and the offset is added in integers: z + 1 would
        # be rounded, which puts some values just below an edge into the wrong cell.
        scaled = min(max(np.floor(value * 2048.0), -2048.0), 2047.0)
        return int(scaled) + 2048
    return np.searchsorted(edges, value, side="right")


@njit(cache=True)
def _accumulate(values, weights, weighted, edges, dyadic, count, total, squares):
    for n in range(values.shape[0]):
        for i in range(values.shape[1]):
            x = np.float64(values[n, i])
            w = weights[i] if weighted else 1.0
            cell = _cell(x, edges, dyadic)
            count[cell] += w
            total[cell] += w * x
            squares[cell] += w * x * x


@parallel()
def _accumulate_all(values, weights, weighted, edges, dyadic, count, total, squares):
    for c in prange(values.shape[1]):
        _accumulate(values[:, c], weights, weighted, edges, dyadic, count[c], total[c], squares[c])


def checked_weights(weights, samples):
    """Weights of a number of samples as a float64 array; None for none."""
    if weights is None:
        return None
    weights = np.asarray(weights, dtype=np.float64).ravel()
    if len(weights) != samples:
        raise ValueError(f"weights must be one a sample, {samples}, not {len(weights)}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights must be finite and not negative")
    return weights


class Histogram:
    """Count, sum and sum of squares of samples, by channel and cell.

    Parameters
    ----------
    channels : int
    edges : float64 array, optional
        Inner edges of the cells; the dyadic grid by default.

    Attributes
    ----------
    count, total, squares : float64 arrays, shape (channels, cells)
        96 KiB a channel on the dyadic grid.

    Examples
    --------
    >>> histogram = Histogram(1)
    >>> histogram.add(np.reshape([-0.5, 0.25, 0.25, 1.0], (1, 1, 4)))
    >>> float(histogram.count.sum()), float(histogram.total.sum())
    (4.0, 1.0)
    """

    def __init__(self, channels, edges=DYADIC_EDGES):
        self.edges = edges
        shape = (channels, len(edges) + 1)
        self.count, self.total, self.squares = (np.zeros(shape) for _ in range(3))

    @classmethod
    def of(cls, samples, edges=DYADIC_EDGES, weights=None):
        """Histogram of one channel from samples of shape (n,), optionally weighted."""
        samples = np.asarray(samples, dtype=np.float64).ravel()
        histogram = cls(1, edges)
        histogram.add(samples[None, None], weights)
        return histogram

    @property
    def channels(self):
        return len(self.count)

    @property
    def nbytes(self):
        return self.count.nbytes + self.total.nbytes + self.squares.nbytes

    @property
    def dyadic(self):
        return self.edges is DYADIC_EDGES or np.array_equal(self.edges, DYADIC_EDGES)

    def add(self, values, weights=None):
        """Add samples.

        Parameters
        ----------
        values : array or tensor, shape (N, channels, samples) or (N, channels, H, W)
        weights : array, shape (samples,), optional
            Non-negative weight of each sample.

        Raises
        ------
        ValueError
            For another number of channels, or values or weights that are not finite (nothing is
            added then).
        """
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            # NumPy has no bfloat16
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        values = np.ascontiguousarray(values)
        if values.dtype == np.float16:  # Numba has none
            values = values.astype(np.float32)
        if values.ndim not in (3, 4) or values.shape[1] != self.channels:
            raise ValueError(
                f"values must have shape (N, {self.channels}, ...), not {values.shape}"
            )
        values = values.reshape(*values.shape[:2], -1)
        if not np.isfinite(values).all():
            raise ValueError("samples must be finite; there is NaN or infinity among them")
        weights = checked_weights(weights, values.shape[2])
        weighted, weights = weights is not None, np.empty(0) if weights is None else weights
        how = (weights, weighted, self.edges, self.dyadic)
        if self.channels == 1:  # to start threads costs more than one small channel
            _accumulate(values[:, 0], *how, self.count[0], self.total[0], self.squares[0])
        else:
            _accumulate_all(values, *how, self.count, self.total, self.squares)

    def merge(self, other, weights=None):
        """Add another histogram's samples to this one.

        Parameters
        ----------
        other : Histogram
        weights : array, shape (channels,), optional
            Weight of all of a channel's samples; 1 by default.
        """
        if self.count.shape != other.count.shape or not np.array_equal(self.edges, other.edges):
            raise ValueError("only histograms of the same channels and cells can be merged")
        weights = np.ones(self.channels) if weights is None else np.asarray(weights, float)
        for name in ("count", "total", "squares"):
            getattr(self, name).__iadd__(weights[:, None] * getattr(other, name))

    def only(self, channels):
        """Histogram of some of the channels."""
        part = Histogram(len(channels), self.edges)
        for name in ("count", "total", "squares"):
            setattr(part, name, getattr(self, name)[channels])
        return part

    def fold(self):
        """Histogram of the samples' magnitudes, for sign-symmetric subsets; dyadic grid only."""
        if not self.dyadic:
            raise ValueError("only a histogram on the dyadic grid can be folded")
        folded, half = Histogram(self.channels, self.edges), len(self.edges) // 2 + 1
        for name, sign in (("count", 1), ("total", -1), ("squares", 1)):
            source = getattr(self, name)
            getattr(folded, name)[:, half:] = source[:, half:] + sign * source[:, half - 1 :: -1]
        return folded

    def squared_error(self, points, channel=0):
        """Sum of squared distances of one channel's samples to their nearest points.

        Exact for subsets of the universal set that the edges belong to (for any others a
        ValueError is raised).

        Parameters
        ----------
        points : array, shape (k,)
        channel : int

        Returns
        -------
        float
        """
        points = np.unique(np.asarray(points, dtype=np.float64))
        bounds = cell_bounds(points, self.edges)
        nearest = np.repeat(points, np.diff(bounds, prepend=0))
        # by cell, then summed: cancellation stays within a cell
        error = np.sum(
            self.squares[channel]
            - 2 * nearest * self.total[channel]
            + nearest**2 * self.count[channel]
        )
        return max(float(error), 0.0)


def cell_bounds(points, edges):
    """First cell beyond each point's own cells, for sorted distinct points.

    A sample on the midpoint of two points belongs to the upper one.

    Returns
    -------
    int array, shape (k,); the last is the number of cells

    Raises
    ------
    ValueError
        If a midpoint of two neighbours is not an edge.
    """
    middle = (points[1:] + points[:-1]) / 2
    index = np.searchsorted(edges, middle)
    if len(middle) and (index[-1] >= len(edges) or np.any(edges[index] != middle)):
        raise ValueError(
            "the points' midpoints are not edges of this histogram; "
            "make it with edges_for(universal)"
        )
    return np.append(index + 1, len(edges) + 1)
