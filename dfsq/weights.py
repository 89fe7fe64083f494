"""The weight quantizers: one codebook and one scale for each output channel.

Whatever the method, a quantized weight is ``scale[o] * points[o, codes[o]]``: points are integers
for uniform quantization, and members of the universal set for a subset.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .selection import select_channels
from .universal import universal_set

METHODS = ("minmax", "mse", "subset")


@dataclass(frozen=True)
class QuantizedWeight:
    """A convolution's weight as codes and levels.

    Attributes
    ----------
    codes : uint8 tensor, shape (O, I/groups, kH, kW)
    points : float64 tensor, shape (O, k)
        Sorted; a channel of fewer points ends in infinity.
    scale : float64 tensor, shape (O, 1)
    """

    codes: torch.Tensor
    points: torch.Tensor
    scale: torch.Tensor

    @property
    def levels(self):
        """What the codes stand for, float32 tensor of shape (O, k)."""
        return (self.points * self.scale).float()

    def dequantize(self):
        """The weight that the codes stand for, float32, shape of `codes`."""
        flat = self.codes.flatten(1).long()
        return self.levels.gather(1, flat).view(self.codes.shape)


def quantize_weight(weight, bits, method="subset", universal=None):
    """Quantize the weight of a convolution per output channel.

    Parameters
    ----------
    weight : float tensor, shape (O, I/groups, kH, kW)
    bits : int, 2 to 8
    method : {"minmax", "mse", "subset"}
        ``"minmax"``, as released: ``2^bits`` even levels of step ``(max - min)/(2^bits - 1)``
        with an integer zero point. ``"mse"``: the same on a range that is shrunk to the least
        squared error. ``"subset"``: the exact subset of a universal set under the scale
        ``max|w|``.
    universal : array, optional
        For ``"subset"``; the paper's set by default.

    Returns
    -------
    QuantizedWeight

    Raises
    ------
    ValueError
        For an unknown method, bits out of range, or a weight that is not finite.

    Examples
    --------
    >>> weight = torch.linspace(-1, 1, 9).reshape(1, 1, 3, 3)
    >>> quantized = quantize_weight(weight, bits=2)
    >>> quantized.levels.tolist()
    [[-0.875, -0.375, 0.125, 0.75]]
    >>> quantized.dequantize().flatten().unique().tolist() == quantized.levels[0].tolist()
    True
    """
    if method not in METHODS:
        raise ValueError(f"weight method must be one of {', '.join(METHODS)}, not {method!r}")
    if bits not in range(2, 9):
        raise ValueError(f"weight_bits must be a whole number from 2 to 8, not {bits!r}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    flat = weight.detach().flatten(1).cpu().double().numpy()
    if method == "subset":
        codes, points, scale = _subset(flat, bits, universal)
    else:
        low, high = flat.min(axis=1), flat.max(axis=1)
        if method == "mse":
            low, high = _least_error_range(flat, low, high, bits)
        codes, points, scale = _uniform(flat, low, high, bits)
    codes = torch.from_numpy(codes.astype(np.uint8)).view(weight.shape)
    return QuantizedWeight(codes, torch.from_numpy(points), torch.from_numpy(scale))


def _uniform(flat, low, high, bits):
    """Codes, points and scale of asymmetric uniform quantization with an integer zero point."""
    steps = 2**bits - 1
    step = np.maximum((high - low) / steps, 1e-8 / steps)[:, None]
    zero_point = np.round(low[:, None] / step)
    codes = np.clip(np.round(flat / step) - zero_point, 0, steps)
    return codes, np.arange(steps + 1) + zero_point, step


def _least_error_range(flat, low, high, bits):
    best = np.full(len(flat), np.inf)
    best_low, best_high = low.copy(), high.copy()
    for shrink in np.linspace(1, 0.2, 81):
        codes, points, step = _uniform(flat, low * shrink, high * shrink, bits)
        rounded = np.take_along_axis(points * step, codes.astype(int), 1)
        error = np.sum((rounded - flat) ** 2, axis=1)
        better = error < best
        best[better] = error[better]
        best_low[better], best_high[better] = low[better] * shrink, high[better] * shrink
    return best_low, best_high


def _subset(flat, bits, universal):
    universal = universal_set("dfsq") if universal is None else universal
    scale = np.abs(flat).max(axis=1, keepdims=True)
    scale[scale == 0] = 1
    z = flat / scale
    codes = np.empty(flat.shape, int)
    points = np.empty((len(flat), min(2**bits, len(universal))))
    for o, selection in enumerate(select_channels(z, bits, "exact", universal)):
        middle = (selection.points[1:] + selection.points[:-1]) / 2
        codes[o] = np.searchsorted(middle, z[o], side="right")
        points[o] = selection.points
    return codes, points, scale
