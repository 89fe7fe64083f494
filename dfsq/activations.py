"""Normalization, and the activation quantizers.

All quantizers are emulations: they take and give floating-point maps of shape (N, C, H, W), the
input of a convolution before zero padding, and put each value onto one of ``2^bits`` levels.
"""

import warnings

import numpy as np
import torch
from numba import prange
from torch import Tensor, nn

from .histogram import DYADIC_EDGES, is_dyadic
from .threads import parallel

#: Added to the largest magnitude before the division, as in the released code.
EPSILON = 1e-8


def center_max(x, non_negative=False):
    """DFSQ's normalization: per image and channel, by the mean and the largest magnitude.

    ``z = (x - mean) / (max|x - mean| + 1e-8)``; behind a ReLU ``z = x / (max|x| + 1e-8)``.

    Parameters
    ----------
    x : float tensor, shape (N, C, H, W)
    non_negative : bool
        Whether the layer's input is non-negative, which leaves the mean out.

    Returns
    -------
    z : tensor, shape (N, C, H, W), within [-1, 1]
    offset, scale : tensors, shape (N, C, 1, 1)
        So that ``x`` is ``z * scale + offset``. The mean is summed in float64 and rounded once.

    Examples
    --------
    >>> x = torch.tensor([0.0, 1.0, 2.0, 5.0]).reshape(1, 1, 2, 2)
    >>> z, offset, scale = center_max(x)
    >>> z.flatten().tolist(), offset.item(), scale.item()
    ([-0.6666666865348816, -0.3333333432674408, 0.0, 1.0], 2.0, 3.0)
    """
    _, _, offset, scale = center_max_statistics(x, non_negative)
    return (x - offset) / scale, offset, scale


def center_max_statistics(x, non_negative=False):
    """Least and largest value, offset and scale of each map, see :func:`center_max`.

    Returns
    -------
    low, high, offset, scale : tensors, shape (N, C, 1, 1)
        NaN in `scale` where a map holds NaN or infinity.
    """
    if _on_cpu(x):
        low, high, mean = _extremes_and_mean(x)
    else:
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        # torch's exporter drops the type of a sum, not that of a map
        summed = x.double() if torch.compiler.is_exporting() else x
        mean = summed.mean((2, 3), keepdim=True, dtype=torch.float64).to(x.dtype)
    limits = torch.finfo(x.dtype)
    epsilon = max(EPSILON, limits.tiny * limits.eps)  # the least number of float16 is larger
    if non_negative:
        return low, high, torch.zeros_like(low), torch.maximum(high, -low) + epsilon
    # rounding is monotonic, so this is max|x - mean| to the last bit, without another map
    return low, high, mean, torch.maximum(high - mean, mean - low) + epsilon


# On a CPU, few passes over memory: three for the statistics, faster than one whose comparisons the
# compiler does not vectorize, and one that normalizes, looks up and undoes the normalization. They
# are operators of torch, so that a compiled network keeps them whole. Other runtimes do not have
# them: an exported network is made of tensor operations.


def _on_cpu(x):
    """Whether the operators for a CPU take a map."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_exporting()


# Sums in any order: one after the other each would wait for the one before.
@parallel(fastmath={"reassoc"})
def _sum(x, total):
    channels, pixels = x.shape[1], x.shape[2]
    for plane in prange(x.shape[0] * channels):
        n, c = plane // channels, plane % channels
        added = 0.0
        for i in range(pixels):
            added += x[n, c, i]
        total[n, c] = added


@parallel()
def _look_up(x, offset, scale, table, levels, out):
    channels, pixels = x.shape[1], x.shape[2]
    low, high = np.float32(-2048), np.float32(2047)
    for plane in prange(x.shape[0] * channels):
        n, c = plane // channels, plane % channels
        o, s = offset[n, c], scale[n, c]
        # what each cell becomes, once for all pixels where there are more of these than cells
        whole = pixels > 4096
        values = np.empty(4096 if whole else 0, np.float32)
        for cell in range(len(values)):
            values[cell] = levels[c, table[c, cell]] * s + o
        for i in range(pixels):
            z = (x[n, c, i] - o) / s
            cell = min(max(np.floor(z * np.float32(2048.0)), low), high)
            cell = max(np.int32(cell) + np.int32(2048), np.int32(0))  # NaN has no place else
            out[n, c, i] = values[cell] if whole else levels[c, table[c, cell]] * s + o


def _planes(x):
    """A tensor as an array of shape (N, C, H*W)."""
    return x.detach().contiguous().flatten(2).numpy()


@torch.library.custom_op("dfsq::extremes_and_mean", mutates_args=(), device_types="cpu")
def _extremes_and_mean(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least, largest and mean value of each map, shape (N, C, 1, 1); NaN if one is not finite."""
    total = x.new_empty(x.shape[:2], dtype=torch.float64)
    _sum(_planes(x), total.numpy())
    total = total[..., None, None]
    found = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    found = (*found, (total / x.shape[2:].numel()).to(x.dtype))
    return tuple(part.masked_fill(~torch.isfinite(total), torch.nan) for part in found)


@torch.library.custom_op("dfsq::look_up", mutates_args=(), device_types="cpu")
def _looked_up(
    x: Tensor, offset: Tensor, scale: Tensor, table: Tensor, levels: Tensor, layer: str
) -> Tensor:
    """The same values as :meth:`CodebookQuantizer.reference`, bit for bit."""
    _check_finite(scale, layer)
    out = x.new_empty(x.shape)
    statistics = (_planes(part)[..., 0] for part in (offset, scale))
    _look_up(_planes(x), *statistics, table.numpy(), levels.numpy(), _planes(out))
    return out


@_extremes_and_mean.register_fake
def _(x):
    return tuple(x.new_empty(*x.shape[:2], 1, 1) for _ in range(3))


@_looked_up.register_fake
def _(x, offset, scale, table, levels, layer):
    return x.new_empty(x.shape)


def _check_finite(scale, layer):
    if torch.compiler.is_exporting():  # a graph raises nothing
        return
    if not torch.isfinite(scale).all():
        raise ValueError(f"layer {layer!r}: its input holds NaN or infinity")


def _of_channel(rows, index):
    """``rows[c, index[n, c, y, x]]`` at every place of an index of shape (N, C, H, W)."""
    first = torch.arange(len(rows), device=rows.device) * rows.shape[1]
    return rows.take(index + first[:, None, None])


def _bisect(thresholds, z):
    """The number of thresholds up to each value, as ``torch.searchsorted`` counts them.

    Parameters
    ----------
    thresholds : tensor, shape (C, t)
        Sorted in each row.
    z : tensor, shape (N, C, H, W)

    Returns
    -------
    int64 tensor, shape (N, C, H, W)
    """
    steps = thresholds.shape[1].bit_length()
    padded = nn.functional.pad(thresholds, (0, 2**steps - 1 - thresholds.shape[1]), value=torch.inf)
    found = torch.zeros_like(z, dtype=torch.int64)
    for step in reversed(range(steps)):
        found = found + 2**step * (z >= _of_channel(padded, found + (2**step - 1)))
    return found


class BuffersKeepType(nn.Module):
    """A module whose buffers follow it to a device, but keep their type when it is cast.

    Codebooks and scales are exact in the type that they were made in, and in no narrower one.
    """

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class ActivationQuantizer(BuffersKeepType):
    """Base of the activation quantizers: `forward` maps x to its quantized value.

    Attributes
    ----------
    non_negative : bool
        Whether the layer's input was found, or stated, to be non-negative.
    layer : str
        Name of the layer, for messages.
    """

    def __init__(self, non_negative=False, layer=""):
        super().__init__()
        self.non_negative = non_negative
        self.layer = layer
        self._warned = set()

    def _check_sign(self, low):
        """Warn once where a non-negative layer meets a negative value."""
        if torch.compiler.is_compiling():  # a warning that depends on values ends a graph
            return
        if self.non_negative and bool((low < 0).any()):
            self._warn(
                "negative",
                "was calibrated on non-negative inputs and meets a negative one; "
                "such values go to the smallest point",
            )

    def _warn(self, kind, text):
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"layer {self.layer!r} {text}", stacklevel=3)


def _table(thresholds):
    """Code of each cell of the dyadic grid; None if a threshold is off it.

    Parameters
    ----------
    thresholds : tensor, shape (C, t)
        Sorted in each row, which ends in infinity where a channel has fewer.

    Returns
    -------
    uint8 tensor, shape (C, 4096), or None
    """
    rows = thresholds.double().cpu().numpy()
    inner = rows[rows < np.inf]
    if not is_dyadic(inner) or (np.abs(inner) >= 1).any():  # the outermost cells are open
        return None
    cells = np.concatenate([[-1.0], DYADIC_EDGES])  # a cell's lowest value
    codes = np.stack([np.searchsorted(row, cells, side="right") for row in rows])
    return torch.from_numpy(codes.astype(np.uint8)).to(thresholds.device)


class CodebookQuantizer(ActivationQuantizer):
    """DFSQ's normalization, and a static codebook for each channel.

    ``z`` goes to the nearest of the channel's points, the upper one on an exact tie, and back
    through the normalization.

    Parameters
    ----------
    points : sequence of arrays, shape (k_c,)
        Sorted distinct levels of each channel; numbers may differ between channels.
    thresholds : sequence of arrays, shape (k_c - 1,), optional
        Values from which on the next level is taken; the midpoints by default.
    non_negative, layer
        See :class:`ActivationQuantizer`.
    shares : array, shape (C,), optional
        Share of a map's largest magnitude that 1 stands for in each channel, see
        :mod:`dfsq.ranges`; values beyond it go to the outermost points.

    Notes
    -----
    If all thresholds lie on the 2^-11 grid, as for every subset of a dyadic universal set, the
    code is read from a table by ``clamp(floor(2048 z) + 2048, 0, 4095)``, which is exact.
    Otherwise the thresholds, rounded to float32, are searched.

    Examples
    --------
    >>> import torch
    >>> from dfsq.activations import CodebookQuantizer
    >>> quantizer = CodebookQuantizer([[-1.0, 0.0, 0.5]])
    >>> x = torch.linspace(-3, 1, 64).reshape(1, 1, 8, 8)  # its mean is -1, its largest distance 2
    >>> quantizer(x).unique()
    tensor([-3., -1.,  0.])
    """

    def __init__(self, points, thresholds=None, non_negative=False, layer="", shares=None):
        super().__init__(non_negative, layer)
        points = [np.asarray(p, dtype=np.float64) for p in points]
        for c, p in enumerate(points):
            if p.ndim != 1 or not len(p) or not np.isfinite(p).all() or np.any(np.diff(p) <= 0):
                raise ValueError(
                    f"channel {c}: points must be finite, sorted and distinct, at least one"
                )
        if thresholds is None:
            thresholds = [(p[1:] + p[:-1]) / 2 for p in points]
        thresholds = [np.asarray(t, dtype=np.float64) for t in thresholds]
        width = max(len(p) for p in points)
        if width > 256:
            raise ValueError(f"a codebook has at most 256 points, not {width}")
        # whatever the defaults are; a quantizer is moved once it is complete
        kind = {"dtype": torch.float32, "device": "cpu"}
        levels = torch.zeros(len(points), width, **kind)
        padded = torch.full((len(points), width - 1), float("inf"), **kind)
        for c, (p, t) in enumerate(zip(points, thresholds, strict=True)):
            if len(t) != len(p) - 1 or np.any(np.diff(t) < 0):
                raise ValueError(f"channel {c}: thresholds must be sorted, one fewer than points")
            levels[c, : len(p)] = torch.from_numpy(p)
            levels[c, len(p) :] = p[-1]
            padded[c, : len(t)] = torch.from_numpy(t)
        count = torch.from_numpy(np.array([len(p) for p in points], np.int16))
        if shares is not None:
            shares = torch.from_numpy(np.array(shares, np.float32))
            if shares.shape != (len(points),) or not ((shares > 0) & (shares < torch.inf)).all():
                raise ValueError(
                    f"shares must be {len(points)} positive numbers, one a channel, not "
                    f"{shares.tolist()}"
                )
            shares = shares[:, None, None]
        self.register_buffer("shares", shares)
        self.register_buffer("count", count)
        self.register_buffer("levels", levels)
        self.register_buffer("thresholds", padded)
        self.register_buffer("table", _table(padded), persistent=False)

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self.table = _table(self.thresholds)  # which is not in the state

    @property
    def points(self):
        """Sorted distinct levels of each channel, a list of float64 arrays."""
        return [
            row[:n].double().numpy()
            for row, n in zip(self.levels.cpu(), self.count.tolist(), strict=True)
        ]

    def codes(self, z):
        """Code of each normalized value, 0 for the lowest level; int64, shape of `z`."""
        if self.table is not None:
            # within the range before it is an integer, which huge values overflow, and after, as
            # an exported network meets NaN
            cell = (z * 2048).floor_().clamp_(-2048, 2047).to(torch.int32)
            cell = cell.add_(2048).clamp_(0, 4095)
            return _of_channel(self.table, cell.long()).long()
        if torch.compiler.is_exporting():  # ONNX has no such search
            return _bisect(self.thresholds, z)
        by_channel = z.transpose(0, 1).flatten(1)
        codes = torch.searchsorted(self.thresholds, by_channel.contiguous(), right=True)
        return codes.view(z.shape[1], z.shape[0], *z.shape[2:]).transpose(0, 1)

    def forward(self, x):
        return self.quantized(x, *self.statistics(x))

    def statistics(self, x):
        """Offset and scale of each map, shape (N, C, 1, 1), see :func:`center_max`.

        The scale is what the level 1 stands for, with the channel's share of the range in it.
        """
        if x.shape[1] != len(self.levels):
            raise ValueError(
                f"layer {self.layer!r} takes {len(self.levels)} channels, not {x.shape[1]}"
            )
        if not torch.compiler.is_exporting() and x.shape[2] * x.shape[3] < 64:
            self._warn("small", "meets a map of under 64 pixels, whose statistics say little")
        low, _, offset, scale = center_max_statistics(x, self.non_negative)
        self._check_sign(low)
        return offset, scale if self.shares is None else scale * self.shares

    def quantized(self, x, offset, scale):
        """Quantize under given statistics, of the whole map where `x` is a part of one."""
        if self.table is not None and _on_cpu(x):
            return _looked_up(x, offset, scale, self.table, self.levels, self.layer)
        _check_finite(scale, self.layer)
        return self.reference(x, offset, scale)

    def reference(self, x, offset, scale):
        """Quantize under given statistics with tensor operations; the specification."""
        return _of_channel(self.levels, self.codes((x - offset) / scale)) * scale + offset


class DynamicUniformQuantizer(ActivationQuantizer):
    """Uniform over [min, max] of each image and channel ([0, max] behind a ReLU).

    A control: dynamic like DFSQ, but between the extremes of the map, and with no codebook.
    """

    def __init__(self, bits, non_negative=False, layer=""):
        super().__init__(non_negative, layer)
        self.bits = bits

    def forward(self, x):
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        _check_finite(high - low, self.layer)
        self._check_sign(low)
        if self.non_negative:
            low = torch.zeros_like(low)
        step = (high - low) / (2**self.bits - 1)
        code = ((x - low) / torch.where(step > 0, step, 1)).round_()
        return code.clamp_(0, 2**self.bits - 1) * step + low


class StaticUniformQuantizer(ActivationQuantizer):
    """Uniform over a fixed range, per tensor or per channel, found in calibration.

    Parameters
    ----------
    low, high : arrays, shape (1,) or (C,)
        Range of values that the ``2^bits`` levels span; values outside are clipped.
    """

    def __init__(self, bits, low, high, non_negative=False, layer=""):
        super().__init__(non_negative, layer)
        self.bits = bits
        low, high = (torch.from_numpy(np.array(v, dtype=np.float32)) for v in (low, high))
        if low.shape != high.shape or bool((high < low).any()):
            raise ValueError(f"layer {layer!r}: a static range must have low <= high")
        self.register_buffer("low", low.view(1, -1, 1, 1))
        self.register_buffer("high", high.view(1, -1, 1, 1))

    def forward(self, x):
        low, high = x.amin((2, 3)), x.amax((2, 3))
        _check_finite(high - low, self.layer)
        self._check_sign(low)
        step = (self.high - self.low) / (2**self.bits - 1)
        code = ((x - self.low) / torch.where(step > 0, step, 1)).round_()
        return code.clamp_(0, 2**self.bits - 1) * step + self.low


def static_range(values, bits, method, percentile=99.9):
    """Range of a static uniform quantizer, from a sample of a layer's or channel's values.

    Parameters
    ----------
    values : float array, shape (n,)
        From calibration about 500,000 a layer, thinned evenly; for ``"minmax"`` the extremes of
        all of its values will do.
    bits : int
    method : {"minmax", "percentile", "mse"}
        All of it; from the ``100 - percentile`` quantile, or the least value where none is
        negative, to the ``percentile`` quantile; or the range of least squared error, of 80 that
        are shrunk evenly from the whole, then, where it holds both signs, with one end at a time
        shrunk to the best of 80 shares of the whole's, in turn until neither gets better.

    Returns
    -------
    low, high : float

    Examples
    --------
    >>> import numpy as np
    >>> from dfsq.activations import static_range
    >>> static_range(np.array([-0.5, 0.25, 1.0, 8.0]), 4, "minmax")
    (-0.5, 8.0)
    """
    values = np.asarray(values, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    if method == "percentile":
        # nothing is cut from the lower end of a non-negative layer
        lower = low if low >= 0 else float(np.percentile(values, 100 - percentile))
        return lower, float(np.percentile(values, percentile))
    if method == "minmax" or low == high:
        return low, high
    if method != "mse":
        raise ValueError(f"static range must be minmax, percentile or mse, not {method!r}")
    tensor, shares = torch.from_numpy(values), np.linspace(1, 0.05, 80)

    def with_error(a, b):
        step = (b - a) / (2**bits - 1)
        code = ((tensor - a) / step).round_().clamp_(0, 2**bits - 1)
        error = code.mul_(step).add_(a).sub_(tensor).square_().sum(dtype=torch.float64)
        return float(error), a, b

    best, before = min(with_error(low * s, high * s) for s in shares), None
    while low < 0 < high and best != before:
        before = best
        best = min(best, *(with_error(low * s, best[2]) for s in shares))
        best = min(best, *(with_error(best[1], high * s) for s in shares))
    return best[1:]
