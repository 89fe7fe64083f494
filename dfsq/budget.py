"""Budgeted widths: how many points each channel gets, so that all together stay in a budget.

The exact selector yields a channel's least error for every number of points in one pass
(:func:`dfsq.selection.error_curves`). Counted in the units of the network's output, the errors of
all channels of all layers can be traded against each other: of all choices whose mean of
``log2(points)`` keeps to the budget, one of nearly the least total error is found by a Lagrange
multiplier.
"""

import numpy as np
import torch

from .selection import error_curves
from .universal import universal_set

#: Points beyond the budget's own that a channel may get, in bits.
MORE_BITS = 2


def allocate(errors, sizes, bits):
    """Numbers of points of nearly least total error under an average width.

    Parameters
    ----------
    errors : float array, shape (C, K)
        Error of each channel with 1, 2, ..., K points, not increasing, all in the same unit.
    sizes : float array, shape (C,)
        How many values each channel has, which its bits count for.
    bits : float
        Average of ``log2(points)`` over all values, at most.

    Returns
    -------
    int array, shape (C,)
        At least 2 each.

    Notes
    -----
    Where the budget holds the most points for all channels, all get them. Else, for a multiplier
    ``l``, each channel takes the points of least ``error + l * size * log2(k)``; the least
    multiplier that keeps to the budget is found by bisection, and what is left of the budget then
    goes, point by point, to where it takes away the most error for its bits. Choices off the convex
    hull of errors and bits are reached by that last step only.

    Raises
    ------
    ValueError
        For a budget below 1 bit, arrays that do not fit, or errors that are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from dfsq.budget import allocate
    >>> errors = np.array([[9, 4, 3, 2.5], [90, 40, 20, 10]])  # with 1, 2, 3 and 4 points
    >>> allocate(errors, np.array([1, 1]), 1.5)
    array([2, 4])
    """
    errors, sizes = np.asarray(errors, dtype=float), np.asarray(sizes, dtype=float)
    if errors.ndim != 2 or errors.shape[1] < 2 or sizes.shape != errors.shape[:1]:
        raise ValueError(f"errors and sizes do not fit: shapes {errors.shape} and {sizes.shape}")
    if not np.isfinite(errors).all():
        raise ValueError("errors must be finite; they hold NaN or infinity")
    if not bits >= 1:
        raise ValueError(f"bits must be at least 1, not {bits!r}")
    width = np.log2(np.arange(2, errors.shape[1] + 1))
    budget, rows = bits * sizes.sum() * (1 + 1e-12), np.arange(len(errors))
    if sizes.sum() * width[-1] <= budget:
        return np.full(len(errors), errors.shape[1])
    errors = errors[:, 1:]

    def chosen(multiplier):
        return (errors + multiplier * sizes[:, None] * width).argmin(axis=1)

    low, high = 0.0, 1.0
    if sizes @ width[chosen(low)] > budget:
        while sizes @ width[chosen(high)] > budget:
            low, high = high, 4 * high
        while sizes @ width[chosen(high / 4)] <= budget and high > 1e-300:
            high /= 4
        low = max(low, high / 4)
        for _ in range(60):
            middle = (low + high) / 2
            if sizes @ width[chosen(middle)] > budget:
                low = middle
            else:
                high = middle
        best = chosen(high)
    else:
        best = chosen(low)
    left = budget - sizes @ width[best]
    while True:
        can = best < len(width) - 1
        nxt = np.minimum(best + 1, len(width) - 1)
        cost = sizes * (width[nxt] - width[best])
        gain = np.where(can & (cost <= left), errors[rows, best] - errors[rows, nxt], 0.0)
        if not (gain > 0).any():
            return best + 2
        take = np.argmax(np.where(gain > 0, gain / np.where(cost > 0, cost, 1), -np.inf))
        left -= cost[take]
        best[take] += 1


@torch.no_grad()
def sensitivities(model, names, batches, images=4):
    """How much noise at a layer's output reaches the network's.

    Parameters
    ----------
    model : nn.Module
        The float network, in eval mode.
    names : sequence of str
        Its layers.
    batches : list of float tensors, shape (1, C, H, W)
    images : int
        How many of the batches are used.

    Returns
    -------
    dict of str to float
        Squared deviation at the network's output over the squared noise at the layer's, a
        hundredth of the layer's own output; times the share that the layer's pixels are of those
        of the largest layer, so that an error a pixel counts as often as there are pixels.

    Raises
    ------
    ValueError
        For a network that returns something else than one tensor.
    """
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    added = dict.fromkeys(names, 0.0)
    moved = dict.fromkeys(names, 0.0)
    pixels = dict.fromkeys(names, 0)
    for batch in batches[:images]:
        batch = batch.to(first.device, first.dtype)
        clean = model(batch)
        if not isinstance(clean, torch.Tensor):
            raise ValueError(
                "budget=True is for a network that returns one tensor, whose error is weighed, "
                f"not a {type(clean).__name__}"
            )
        for name in names:

            def disturb(module, arguments, result, name=name):
                noise = torch.randn(result.shape, generator=generator, device="cpu").to(result)
                spread, most = result.std() if result.numel() > 1 else 0, result.abs().max()
                noise *= 0.01 * (spread if spread > 1e-6 * most else most)  # that of a constant
                pixels[name] += result[:, 0].numel()
                added[name] += float(noise.double().square().sum())
                return result + noise

            hook = model.get_submodule(name).register_forward_hook(disturb)
            try:
                moved[name] += float((model(batch) - clean).double().square().sum())
            finally:
                hook.remove()
    largest = max(pixels.values())
    return {
        name: moved[name] / added[name] * (pixels[name] / largest) if added[name] else 0.0
        for name in names
    }


def plan(model, configs, calibration):
    """The numbers of points of all layers' input channels and output channels under a budget.

    Parameters
    ----------
    model : nn.Module
        The float network.
    configs : dict of str to Config
        The layers' configurations; ``act_bits`` and ``weight_bits`` are the averages.
    calibration : Calibration
        With ``error_units="output"``.

    Returns
    -------
    dict of str to (int array or None, int array or None)
        For each layer the points of its input channels and those of its output channels' weights;
        None where these stay in float or have no points.
    """
    gains = sensitivities(model, configs, calibration.batches)
    inputs, outputs = [], []
    for name, config in configs.items():
        conv, layer = model.get_submodule(name), calibration.layers[name]
        weight = conv.weight.detach().double().cpu().numpy()
        groups = weight.reshape(conv.groups, len(weight) // conv.groups, *weight.shape[1:])
        if config.act_bits < 32 and config.normalization == "center-max":
            # squared norm of all weights that meet an input channel
            norms = np.square(groups).sum(axis=(1, 3, 4)).ravel()
            universal = universal_set(config.universal, config.words, signed=not layer.non_negative)
            most = _most(config.act_bits, universal)
            curve = error_curves(layer.histogram, most, universal) / layer.values_seen
            size = np.full(len(curve), layer.values_seen)
            inputs.append((name, config.act_bits, gains[name] * norms[:, None] * curve, size))
        if config.weight_bits < 32:
            universal = universal_set(config.universal, config.words)
            most = _most(config.weight_bits, universal)
            power = (layer.histogram.squares.sum(axis=1) / layer.values_seen).reshape(
                conv.groups, -1
            )
            curves = []
            for group, moments in zip(groups, power, strict=True):
                flat = group.reshape(len(group), -1)
                scale = np.abs(flat).max(axis=1, keepdims=True)
                scale[scale == 0] = 1
                importance, unit = np.repeat(moments, flat.shape[1] // len(moments)), 1
                if not moments.any():  # dead or constant inputs count like average ones
                    importance, unit = None, power.mean()
                curve = error_curves(flat / scale, most, universal, weights=importance)
                curves.append(curve * scale**2 * unit)
            curve = np.concatenate(curves)
            size = np.full(len(curve), weight[0].size)
            outputs.append((name, config.weight_bits, gains[name] * curve, size))
    found = {name: [None, None] for name in configs}
    for side, parts in enumerate((inputs, outputs)):
        for bits in sorted({part[1] for part in parts}):
            own = [part for part in parts if part[1] == bits]
            most = max(part[2].shape[1] for part in own)
            # a smaller set's curve goes on as it ends
            curves = [np.pad(p[2], ((0, 0), (0, most - p[2].shape[1])), "edge") for p in own]
            points = allocate(np.concatenate(curves), np.concatenate([p[3] for p in own]), bits)
            splits = np.cumsum([len(curve) for curve in curves])[:-1]
            for part, chosen in zip(own, np.split(points, splits), strict=True):
                found[part[0]][side] = np.minimum(chosen, part[2].shape[1])
    return {name: tuple(sides) for name, sides in found.items()}


def _most(bits, universal):
    return min(2 ** min(bits + MORE_BITS, 8), len(universal))
