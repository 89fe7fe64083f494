"""Error compensation: weights that undo what quantization does to a convolution's output.

Let ``x`` be a patch of a convolution's input, ``q`` the same patch as the activation quantizer
gives it, and ``w`` the float weights of an output channel. Weights ``v`` leave the error

    E[(w x - v q)^2]  =  (v - t) H (v - t)'  +  what no weights can undo,

with ``H = E[q q']``, ``C = E[x q']`` and the least-squares weights ``t = w C H^-1``. Where the bias
may be corrected, the means are taken out of all three and put into it; it is not quantized.
The weights are then rounded to their levels one input after the other, each rounding error being
made up for by the inputs still to come (GPTQ, Frantar et al. 2023, after OBQ), and at last each
weight is moved to the level that is best given all others, until nothing moves.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from .selection import select_channels

#: Scales of the weights' universal set that are tried, as shares of the largest magnitude.
SCALES = (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1)
#: Damping of the least-squares weights, as shares of the Hessian's mean diagonal, that are tried.
RIDGES = (1e-2, 1e-3, 1e-4, 1e-5)
#: Patches of each calibration image that the statistics are taken from.
PATCHES = 8192
#: Most sweeps of the refinement; two or three are the rule.
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
        places = None
        taken = []
        for values in (x, q):
            padded = self._padded(values)
            if places is None:
                places = self._places(padded, generator)
            patches = padded[0].flatten(1).index_select(1, places.flatten())
            taken.append(patches.view(self.groups, -1, places.shape[1]))
        # Products are summed in the network's type. In float32 hence about the image's means: where
        # these are large, the rounding of their squares would be more than what the inputs vary by.
        kind = torch.promote_types(self.conv.weight.dtype, torch.float32)
        a, b = (part.to(kind) for part in taken)
        count, sums = a.shape[2], []
        for part in (a, b):
            mean = part.mean(2, keepdim=True, dtype=torch.float64).to(kind)
            part -= mean
            sums.append((mean.double(), part.sum(2, keepdim=True, dtype=torch.float64)))
        (m, s), (n, t) = sums
        for name, left, right, (m1, s1) in (("second", b, b, (n, t)), ("cross", a, b, (m, s))):
            product = (left @ right.transpose(1, 2)).double()
            product += s1 @ n.transpose(1, 2) + m1 @ (t + count * n).transpose(1, 2)
            getattr(self, name).__iadd__(product.cpu().numpy())
        self.before += (s + count * m)[..., 0].cpu().numpy()
        self.after += (t + count * n)[..., 0].cpu().numpy()
        self.count += count

    def _padded(self, x):
        conv = self.conv
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return functional.pad(x.detach().float(), conv._reversed_padding_repeated_twice, mode)

    def _places(self, padded, generator):
        """Places of random patches in a flattened padded map, shape (kH*kW, patches)."""
        conv = self.conv
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        height, width = (
            (n - r - 1) // s + 1
            for n, r, s in zip(padded.shape[2:], reach, conv.stride, strict=True)
        )
        # drawn on the CPU, whatever the default device, so that the places are the same on any
        chosen = torch.randperm(height * width, generator=generator, device="cpu")[:PATCHES]
        top, left = chosen // width * conv.stride[0], chosen % width * conv.stride[1]
        down, right = (
            d * torch.arange(k, device="cpu")
            for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        )
        rows, columns = top + down[:, None, None], left + right[:, None]
        places = rows * padded.shape[3] + columns
        return places.view(-1, len(chosen)).to(padded.device)

    def merged(self, other):
        """The statistics of both samples."""
        both = Statistics(self.conv)
        for name in ("second", "cross", "before", "after", "count"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def moments(self, group, centred):
        """``H`` and ``C``, with or without the means, and the means before and after."""
        second, cross = self.second[group] / self.count, self.cross[group] / self.count
        before, after = self.before[group] / self.count, self.after[group] / self.count
        if not centred:
            return second, cross, np.zeros_like(before), np.zeros_like(after)
        spread = second - np.outer(after, after)
        if np.trace(spread) <= 1e-12 * np.trace(second):  # constant inputs
            return 0 * second, 0 * cross, before, after
        # rounding may leave a matrix that is not positive
        lowest = np.linalg.eigvalsh(spread)[0]
        spread += max(0.0, -2 * lowest) * np.eye(len(spread))
        return spread, cross - np.outer(before, after), before, after


@dataclass
class Compensated:
    """The new weights of a convolution.

    Attributes
    ----------
    weight : float64 array, shape (O, I/groups, kH, kW)
    codes : int array of the same shape, or None
    points : float64 array, shape (O, k), or None
    scale : float64 array, shape (O, 1), or None
        So that the weight is ``scale[o] * points[o, codes[o]]``; None where weights stay in float.
        Given levels are points of scale 1.
    bias : float64 array, shape (O,), or None
    """

    weight: np.ndarray
    codes: np.ndarray | None
    points: np.ndarray | None
    scale: np.ndarray | None
    bias: np.ndarray | None

    @property
    def levels(self):
        """What the codes stand for, shape (O, k); None where weights stay in float."""
        return None if self.points is None else self.points * self.scale


def compensate(conv, fit, check, *, levels=None, points=None, universal=None, **options):
    """Quantize a convolution's weights with regard to what its input's quantizer does.

    Parameters
    ----------
    conv : nn.Conv2d
        With the float weights.
    fit, check : Statistics
        Of different calibration images. Least squares are fitted on `fit`; a fit or a scale is
        taken for an output channel only where it leaves less error on `check`. Levels and rounding
        see both.
    levels : array, shape (O, k), optional
        Fixed levels of each output channel; or else they are selected, exactly, from `universal`.
    points : int array, shape (O,), optional
        Number of levels of each output channel where they are to be selected; None leaves the
        weights in float.
    universal : array, optional
    **options
        `least_squares`, `compensation`, `scale_search`, `bias_correction`, `damping` and `order`,
        see :class:`dfsq.Config`.

    Returns
    -------
    Compensated
    """
    correct = options.pop("bias_correction") and conv.bias is not None
    weight = conv.weight.detach().double().cpu().numpy()
    flat = weight.reshape(conv.groups, len(weight) // conv.groups, -1)
    parts = []
    for group in range(conv.groups):
        rows = slice(group * flat.shape[1], (group + 1) * flat.shape[1])
        own = None if levels is None else np.asarray(levels, dtype=float)[rows]
        parts.append(
            _group(
                flat[group],
                *(part.moments(group, correct) for part in (fit, check, fit.merged(check))),
                own,
                None if points is None else np.asarray(points)[rows],
                universal,
                **options,
            )
        )
    new, codes, chosen, scale, shift = zip(*parts, strict=True)
    if chosen[0] is not None:  # the widest channel may be of another group
        width = max(part.shape[1] for part in chosen)
        pads = [((0, 0), (0, width - part.shape[1])) for part in chosen]
        chosen = np.concatenate(
            [np.pad(c, p, constant_values=np.inf) for c, p in zip(chosen, pads, strict=True)]
        )
        codes, scale = np.concatenate(codes).reshape(weight.shape), np.concatenate(scale)
    else:
        codes = chosen = scale = None
    new, shift = np.concatenate(new), np.concatenate(shift)
    bias = None
    if correct:
        bias = conv.bias.detach().double().cpu().numpy() + shift
    return Compensated(
        new.reshape(weight.shape),
        codes,
        chosen,
        scale,
        bias,
    )


def _group(
    w, fit, check, whole, levels, points, universal,
    *, least_squares, compensation, scale_search, damping, order,
):  # fmt: skip
    second, cross, _, _ = fit
    judge = _Judge(w, *check[:2])
    target, error = w, judge(w)
    for ridge in RIDGES if least_squares else ():
        # it pulls towards the float weights, not towards zero
        damped = _damped(second, ridge)
        fitted = np.linalg.solve(damped, (w @ (cross + damped - second)).T).T
        found = judge(fitted)
        target = np.where((found < error)[:, None], fitted, target)
        error = np.minimum(found, error)
    second, _, before, after = whole
    if levels is None and points is None:
        return target, None, None, None, _shift(w, target, before, after)
    damped = _damped(second, damping)
    if levels is not None:
        candidates = [(levels, np.ones((len(w), 1)))]
    else:
        importance = 1 / np.diag(np.linalg.inv(damped)) if compensation else np.diag(damped)
        scales = SCALES if scale_search else SCALES[:1]
        candidates = [_select_points(target, importance, points, universal, s) for s in scales]
    round_all = _compensated_rounding(damped, order) if compensation else _plain_rounding
    points, scale = (part.copy() for part in candidates[0])
    if len(candidates) > 1:
        error, unrounded = np.full(len(w), np.inf), judge(target)
        for own_points, own_scale in candidates:
            candidate = own_points * own_scale
            found = judge(np.take_along_axis(candidate, round_all(target, candidate), 1))
            # a scale other than the first must help by more than noise, a share of what rounding
            # costs; the errors themselves are negative
            better = found + 1e-3 * np.abs(found - unrounded) < error
            points[better], scale[better] = own_points[better], own_scale[better]
            error[better] = found[better]
    best = points * scale
    codes = round_all(target, best)
    if compensation:
        # on rare rows the nearest levels are the better start
        plain = _plain_rounding(target, best)
        worse = _error(target, best, plain, damped) < _error(target, best, codes, damped)
        codes[worse] = plain[worse]
        codes = _refined(target, best, codes, damped)
    new = np.take_along_axis(best, codes, 1)
    return new, codes, points, scale, _shift(w, new, before, after)


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
    """``H`` with a share of its mean diagonal added, and 1 where all inputs are always zero."""
    added = damping * np.diag(second).mean()
    return second + (added if added > 0 else 1) * np.eye(len(second))


def _select_points(target, importance, points, universal, share):
    """Points of each row, an exact subset of the universal set, and their scale.

    Rows of fewer points than others end in infinity, which no weight is nearest to.
    """
    scale = _rounded(share * np.abs(target).max(axis=1, keepdims=True))
    scale[scale == 0] = 1
    z = np.clip(target / scale, -1, 1)
    chosen = np.full((len(target), min(max(points), len(universal))), np.inf)
    selections = select_channels(z, k=points, universal=universal, weights=importance)
    for row, selection in zip(chosen, selections, strict=True):
        row[: len(selection.points)] = selection.points
    return chosen, scale


def _rounded(scale):
    """Scales to 16 significant bits.

    Least squares leave noise in their tenth digit that differs between machines. With it in the
    scales, the levels, which are of float32, would differ in their last bit now and then.
    """
    mantissa, exponent = np.frexp(scale)
    return np.ldexp(np.round(mantissa * 2**16), exponent - 16)


def _nearest(values, levels):
    """Code of the nearest level for each row, the upper one on a tie."""
    distance = np.abs(values[:, None] - levels[:, ::-1])
    return levels.shape[1] - 1 - distance.argmin(axis=1)


def _error(target, levels, codes, damped):
    """``(v - t) H (v - t)'`` of each row."""
    off = np.take_along_axis(levels, codes, 1) - target
    return ((off @ damped) * off).sum(1)


def _plain_rounding(target, levels):
    return np.stack([_nearest(column, levels) for column in target.T], axis=1)


def _compensated_rounding(damped, order):
    """GPTQ's rounding under one Hessian, for any targets and levels."""
    sequence = np.arange(len(damped))
    if order == "diagonal":
        # of a channel that is rarely above zero all places may see the same values: without the
        # rounding, that of their sums would choose the order
        share = np.diag(damped) / np.diag(damped).max()
        sequence = np.argsort(-share.round(10), kind="stable")
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
