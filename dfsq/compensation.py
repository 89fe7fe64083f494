"""Error compensation: weights that undo what quantization does to a convolution's output.

Let ``x`` be a patch of a convolution's input, ``q`` the same patch as the activation quantizer
gives it, and ``w`` the float weights of an output channel. Weights ``v`` leave the error

    E[(w x - v q)^2]  =  (v - t) H (v - t)'  +  what no weights can undo,

with ``H = E[q q']``, ``C = E[x q']`` and the least-squares weights ``t = w C H^-1``. A layer with a
bias takes the means out of all three and puts them into the bias, which is not quantized. The
weights are then rounded to their levels one input after the other, each rounding error being made
up for by the inputs still to come (GPTQ, Frantar et al. 2023, after OBQ), and at last each weight is
moved to the level that is best given all others, until nothing moves.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from .selection import select_channels

#: Scales of the weights' universal set that are tried, as shares of the largest magnitude.
SCALES = (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1)
#: Patches of each calibration image that the statistics are taken from.
PATCHES = 2048
SWEEPS = 4


class Statistics:
    """Second moments of a convolution's patches, before and after the activation quantizer.

    Parameters
    ----------
    conv : nn.Conv2d
        Of any stride, padding, dilation and number of groups.
    """

    def __init__(self, conv):
        self.conv = conv
        self.groups = conv.groups
        size = conv.weight[0].numel()
        self.second, self.cross = (np.zeros((self.groups, size, size)) for _ in range(2))
        self.before, self.after = (np.zeros((self.groups, size)) for _ in range(2))
        self.count = 0

    @staticmethod
    def bytes(conv):
        """Memory that the statistics of a convolution take."""
        return 16 * conv.groups * conv.weight[0].numel() ** 2

    def add(self, x, q, generator):
        """Add the patches of one image at random places.

        Parameters
        ----------
        x, q : float tensors, shape (1, C, H, W)
            The input before and after the activation quantizer.
        generator : torch.Generator
        """
        patches = None
        taken = []
        for values in (x, q):
            found = self._patches(values)
            if patches is None:
                count = found.shape[2]
                patches = torch.randperm(count, generator=generator)[:PATCHES].to(found.device)
            taken.append(found[:, :, patches])
        a, b = taken
        self.second += (b @ b.transpose(1, 2)).double().cpu().numpy()
        self.cross += (a @ b.transpose(1, 2)).double().cpu().numpy()
        self.before += a.double().sum(2).cpu().numpy()
        self.after += b.double().sum(2).cpu().numpy()
        self.count += a.shape[2]

    def _patches(self, x):
        """Patches of each group, shape (groups, patch size, places)."""
        conv = self.conv
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = functional.pad(x.detach().float(), conv._reversed_padding_repeated_twice, mode)
        found = functional.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
        return found.view(self.groups, -1, found.shape[2])

    def merged(self, other):
        """The statistics of both samples."""
        both = Statistics(self.conv)
        for name in ("second", "cross", "before", "after", "count"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def moments(self, group):
        """``H``, ``C`` and the means before and after, the latter zero without a bias."""
        second, cross = self.second[group] / self.count, self.cross[group] / self.count
        before, after = self.before[group] / self.count, self.after[group] / self.count
        if self.conv.bias is None:
            return second, cross, np.zeros_like(before), np.zeros_like(after)
        return second - np.outer(after, after), cross - np.outer(before, after), before, after


@dataclass
class Compensated:
    """The new weights of a convolution.

    Attributes
    ----------
    weight : float64 array, shape (O, I/groups, kH, kW)
    codes : int array of the same shape, or None
    levels : float64 array, shape (O, k), or None
        So that the weight is ``levels[o, codes[o]]``; None where weights stay in float.
    bias : float64 array, shape (O,), or None
    """

    weight: np.ndarray
    codes: np.ndarray | None
    levels: np.ndarray | None
    bias: np.ndarray | None


def compensate(conv, fit, check, *, levels=None, bits=None, universal=None, **options):
    """Quantize a convolution's weights with regard to what its input's quantizer does.

    Parameters
    ----------
    conv : nn.Conv2d
        With the float weights.
    fit, check : Statistics
        Of different calibration images: a choice is made on `fit`, and kept for an output channel
        only where it leaves less error on `check`.
    levels : array, shape (O, k), optional
        Fixed levels of each output channel; or else they are selected, exactly, from `universal`.
    bits : int, optional
        Width of the weights where levels are to be selected; None leaves the weights in float.
    universal : array, optional
    **options
        `least_squares`, `compensation`, `scale_search` (bool), `damping` (float) and `order`, see
        :class:`dfsq.Config`.

    Returns
    -------
    Compensated
    """
    weight = conv.weight.detach().double().cpu().numpy()
    flat = weight.reshape(conv.groups, len(weight) // conv.groups, -1)
    parts = []
    for group in range(conv.groups):
        rows = slice(group * flat.shape[1], (group + 1) * flat.shape[1])
        own = None if levels is None else np.asarray(levels, dtype=float)[rows]
        parts.append(_group(flat[group], fit, check, group, own, bits, universal, **options))
    new, codes, chosen, shift = (
        None if part[0] is None else np.concatenate(part) for part in zip(*parts, strict=True)
    )
    bias = None
    if conv.bias is not None:
        bias = conv.bias.detach().double().cpu().numpy() + shift
    return Compensated(
        new.reshape(weight.shape),
        None if codes is None else codes.reshape(weight.shape),
        chosen,
        bias,
    )


def _group(
    w, fit, check, group, levels, bits, universal,
    *, least_squares, compensation, scale_search, damping, order,
):  # fmt: skip
    second, cross, _, _ = fit.moments(group)
    judge = _Judge(w, *check.moments(group)[:2])
    damped = _damped(second, damping)
    target = w
    if least_squares:
        # the damping pulls towards the float weights, not towards zero
        fitted = np.linalg.solve(damped, (w @ (cross + damped - second)).T).T
        better = judge(fitted) < judge(w)
        target = np.where(better[:, None], fitted, w)
    whole = fit.merged(check)
    second, _, before, after = whole.moments(group)
    if levels is None and bits is None:
        return target, None, None, _shift(w, target, before, after)
    damped = _damped(second, damping)
    if levels is not None:
        candidates = [levels]
    else:
        importance = 1 / np.diag(np.linalg.inv(damped)) if compensation else np.diag(damped)
        scales = SCALES if scale_search else SCALES[:1]
        candidates = [_select_levels(target, importance, bits, universal, s) for s in scales]
    round_all = _compensated_rounding(damped, order) if compensation else _plain_rounding
    best, error = candidates[0].copy(), np.full(len(w), np.inf)
    if len(candidates) > 1:
        for candidate in candidates:
            found = judge(np.take_along_axis(candidate, round_all(target, candidate), 1))
            # a scale other than the first must help by more than rounding noise
            better = found < error * (1 - 1e-3)
            best[better], error[better] = candidate[better], found[better]
    codes = round_all(target, best)
    if compensation:
        codes = _refined(target, best, codes, damped)
    new = np.take_along_axis(best, codes, 1)
    return new, codes, best, _shift(w, new, before, after)


class _Judge:
    """The output error of new weights on held-out statistics, up to a constant, by row."""

    def __init__(self, w, second, cross):
        self.second = second
        self.linear = w @ cross

    def __call__(self, v):
        return ((v @ self.second) * v).sum(1) - 2 * (v * self.linear).sum(1)


def _shift(w, v, before, after):
    """What the bias must make up for."""
    return w @ before - v @ after


def _damped(second, damping):
    """``H`` with a share of its mean diagonal added, and 1 for inputs that are always zero."""
    diagonal = np.diag(second).copy()
    added = np.full(len(second), damping * diagonal.mean())
    added[diagonal <= 0] = 1
    return second + np.diag(added)


def _select_levels(target, importance, bits, universal, share):
    """Levels of each row: the exact subset of the universal set under a scale."""
    scale = share * np.abs(target).max(axis=1, keepdims=True)
    scale[scale == 0] = 1
    z = np.clip(target / scale, -1, 1)
    selections = select_channels(z, bits, "exact", universal, weights=importance)
    return np.stack([s.points for s in selections]) * scale


def _nearest(values, levels):
    """Code of the nearest level for each row, the upper one on a tie."""
    distance = np.abs(values[:, None] - levels[:, ::-1])
    return levels.shape[1] - 1 - distance.argmin(axis=1)


def _plain_rounding(target, levels):
    return np.stack([_nearest(column, levels) for column in target.T], axis=1)


def _compensated_rounding(damped, order):
    """GPTQ's rounding under one Hessian, for any targets and levels."""
    sequence = np.arange(len(damped))
    if order == "diagonal":
        sequence = np.argsort(-np.diag(damped), kind="stable")
    inverse = np.linalg.inv(damped[np.ix_(sequence, sequence)])
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T  # upper

    def rounded(target, levels):
        rest = target[:, sequence].copy()
        codes = np.empty(target.shape, dtype=int)
        rows = np.arange(len(target))
        for i, column in enumerate(sequence):
            code = _nearest(rest[:, i], levels)
            error = (rest[:, i] - levels[rows, code]) / factor[i, i]
            rest[:, i + 1 :] -= np.outer(error, factor[i, i + 1 :])
            codes[:, column] = code
        return codes

    return rounded


def _refined(target, levels, codes, damped):
    """Move each weight to the level that is best given all others, until nothing moves."""
    codes, rows = codes.copy(), np.arange(len(target))
    gradient = (np.take_along_axis(levels, codes, 1) - target) @ damped
    for _ in range(SWEEPS):
        moved = False
        for i in range(target.shape[1]):
            now = levels[rows, codes[:, i]]
            code = _nearest(now - gradient[:, i] / damped[i, i], levels)
            change = levels[rows, code] - now
            if change.any():
                gradient += np.outer(change, damped[i])
                codes[:, i], moved = code, True
        if not moved:
            break
    return codes
