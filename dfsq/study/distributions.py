"""How the inputs of a network's layers differ between images and between channels.

A *map* is one channel of one image, as it enters a convolution. Of every map its range, its moments
and a fixed number of its values are kept, so that each image counts the same whatever its size, and
any normalization can be looked at afterwards.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..activations import EPSILON
from ..calibration import as_batches, find_layers
from ..config import Config
from ..histogram import Histogram
from ..memory import freed_memory_kept
from ..selection import select_channels
from ..universal import universal_set

#: Normalizations by name: whether an image, and whether a channel, has statistics of its own.
NORMALIZATIONS = {
    "none": (False, False),
    "per image": (True, False),
    "per channel": (False, True),
    "both (DFSQ)": (True, True),
}


@dataclass(frozen=True)
class LayerMaps:
    """What is kept of the maps that enter one layer.

    Attributes
    ----------
    non_negative : bool
        No value below zero in all of the images.
    low, high, mean, kurtosis : float64 arrays, shape (images, channels)
        Of whole maps. The kurtosis is 3 for a Gaussian, and NaN for a map of one value.
    values : float32 array, shape (images, channels, samples)
        Values at random places of each map, sorted.
    """

    non_negative: bool
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    kurtosis: np.ndarray
    values: np.ndarray

    def statistics(self, per_image=True, per_channel=True, images=slice(None)):
        """Offset and scale under a normalization.

        The offset is the mean of the maps that share it, 0 behind a ReLU, and the scale the largest
        distance from it; with both, it is DFSQ's, see :func:`dfsq.activations.center_max`.

        Parameters
        ----------
        per_image, per_channel : bool
            Whether each image, and each channel, has its own.
        images : slice
            The images that statistics not per image are taken from.

        Returns
        -------
        offset, scale : float64 arrays, shape (images or 1, channels or 1)
        """
        axes = tuple(i for i, own in enumerate((per_image, per_channel)) if not own)
        part = slice(None) if per_image else images
        low, high = (
            self.low[part].min(axes, keepdims=True),
            self.high[part].max(axes, keepdims=True),
        )
        offset = self.mean[part].mean(axes, keepdims=True) * (not self.non_negative)
        return offset, np.maximum(high - offset, offset - low) + EPSILON

    def normalized(self, per_image=True, per_channel=True, images=slice(None)):
        """The values kept, under a normalization, float32; arguments as for :meth:`statistics`."""
        offset, scale = self.statistics(per_image, per_channel, images)
        offset, scale = (v[..., None].astype(np.float32) for v in (offset, scale))
        return (self.values - offset) / scale

    @property
    def ranges(self):
        """Largest distance of each map from its offset, shape (images, channels)."""
        return self.statistics()[1] - EPSILON


@torch.no_grad()
def gather_maps(network, images, layers=(), samples=4096, seed=0, progress=False):
    """Run a network over images and keep what enters its layers.

    Parameters
    ----------
    network : nn.Module
    images : sequence
        See :func:`dfsq.calibration.as_batches`; two at least.
    layers : sequence of str
        Name patterns; by default those layers that the paper quantizes.
    samples : int
        Number of values kept of each map; of a smaller one, values are kept several times.
    seed : int
        Of the places at which they are kept.

    Returns
    -------
    dict of str to LayerMaps
    """
    modules = find_layers(network, Config(layers=tuple(layers) or None))
    batches = as_batches(images)
    if len(batches) < 2:
        raise ValueError("to compare images takes two at least")
    found = {name: [] for name in modules}
    generator = np.random.default_rng(seed)
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: found[name].append(_map_statistics(inputs[0][0], places))
        )
        for name, module in modules.items()
    ]
    first = next(network.parameters())
    try:
        with freed_memory_kept():
            for batch in tqdm(batches, "gathering", disable=not progress, unit="image"):
                places = generator.random(samples)
                network(batch.to(first.device, first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    maps = {}
    for name, parts in found.items():
        if not parts:
            raise ValueError(f"layer {name!r} was not run on the images; leave it out")
        low, high, mean, kurtosis, values = (np.stack(part) for part in zip(*parts, strict=True))
        maps[name] = LayerMaps(bool((low >= 0).all()), low, high, mean, kurtosis, values)
    return maps


def _map_statistics(x, places):
    """Low, high, mean, kurtosis, and values at `places` (0..1), of each channel of (C, H, W)."""
    x = x.float().flatten(1)
    mean = x.mean(1, keepdim=True, dtype=torch.float64)
    squares = (x - mean.to(x.dtype)).square_()
    variance = squares.mean(1, dtype=torch.float64)
    fourth = squares.square_().mean(1, dtype=torch.float64)
    index = torch.from_numpy((places * x.shape[1]).astype(np.int64))
    kurtosis = torch.where(variance > 0, fourth / variance**2, torch.nan)
    statistics = x.amin(1).double(), x.amax(1).double(), mean[:, 0], kurtosis
    return *(s.cpu().numpy() for s in statistics), x[:, index.to(x.device)].sort(1)[0].cpu().numpy()


def variance_shares(table):
    """Two-way decomposition of the variance of a table without gaps.

    Parameters
    ----------
    table : float array, shape (images, channels)

    Returns
    -------
    dict of str to float
        ``"channels"``: variance of the channels' means; ``"images"``: of the images' means;
        ``"residual"``: of what their sum leaves. They add up to the variance of the table.
    """
    table = np.asarray(table, dtype=float)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError("a decomposition needs a table of finite values")
    by_image = table.mean(1, keepdims=True) - table.mean()
    by_channel = table.mean(0, keepdims=True) - table.mean()
    residual = table - table.mean() - by_image - by_channel
    return {
        "channels": float(by_channel.var()),
        "images": float(by_image.var()),
        "residual": float(residual.var()),
    }


def range_shares(maps):
    """Variance of the ranges' binary logarithms between channels, between images, and the rest.

    A standard deviation of 1 is a factor of two. Channels that are constant in some image, whose
    range has no logarithm, are left out.

    Parameters
    ----------
    maps : LayerMaps

    Returns
    -------
    dict of str to float
        As of :func:`variance_shares`, and ``"left out"``, the number of channels left out.
    """
    alive = (maps.ranges > 0).all(axis=0)
    if not alive.any():
        raise ValueError("every channel is constant in some image")
    return variance_shares(np.log2(maps.ranges[:, alive])) | {"left out": int((~alive).sum())}


def distances(values, levels=256):
    """Mean Wasserstein-1 distances between maps, over the standard deviation of all values.

    The distance of two distributions is the area between their quantile functions. Over the
    standard deviation it does not depend on units: two Gaussians one deviation apart, with as many
    values each, are at 0.89.

    Parameters
    ----------
    values : float array, shape (images, channels, samples)
        Sorted along the last axis.
    levels : int
        Number of quantiles of each map, evenly spaced.

    Returns
    -------
    dict of str to float
        ``"channels"``: mean over pairs of channels of the same image; ``"images"``: over pairs of
        images of the same channel. NaN where all values are one.
    """
    places = ((np.arange(levels) + 0.5) / levels * values.shape[2]).astype(int)
    quantiles = values[:, :, places]
    if (np.diff(quantiles) < 0).any():
        raise ValueError("the values of each map must be sorted")
    deviation = float(values.std(dtype=np.float64))
    if not deviation:
        return {"channels": np.nan, "images": np.nan}
    return {
        name: _mean_difference(quantiles, axis) / deviation
        for name, axis in (("channels", 1), ("images", 0))
    }


def _mean_difference(values, axis):
    """Mean absolute difference over all pairs along an axis, then over the other axes."""
    n = values.shape[axis]
    if n < 2:
        return float("nan")
    ordered = np.moveaxis(np.sort(values, axis=axis), axis, -1)
    # the i-th smallest is the larger one of i pairs, and the smaller one of n - 1 - i
    weights = (2 * np.arange(n) - n + 1) / (n * (n - 1) / 2)
    return float((ordered @ weights).mean())


def kurtosis(values):
    """Fourth moment about the mean over the squared variance, of all values; 3 for a Gaussian."""
    squares = np.square(values - values.mean(dtype=np.float64))
    return float(np.square(squares).mean() / squares.mean() ** 2)


def unseen_error(maps, bits, per_image, per_channel, images, *, shared=False):
    """Relative squared error of exact points under a normalization, on images not selected on.

    Points and fixed ranges come from some of the images and are tested on the others; statistics
    per image are each image's own, as at run time. A codebook for each channel goes with statistics
    per channel, unless it is `shared`, else there is one for the layer. Errors count in the layer's
    own units, over the power of the test images' values about the means of their maps.

    Parameters
    ----------
    maps : LayerMaps
    bits : int
    per_image, per_channel : bool
    images : slice
        To select on.
    shared : bool
        Whether statistics per channel go with one codebook for the layer.

    Returns
    -------
    float
    """
    z = maps.normalized(per_image, per_channel, images)
    scale = maps.statistics(per_image, per_channel, images)[1]
    chosen = np.zeros(len(z), bool)
    chosen[images] = True
    if chosen.all() or not chosen.any():
        raise ValueError("some images must be there to select on, and others to test on")
    own = maps.values[~chosen]
    power = np.square(own - own.mean(axis=2, keepdims=True), dtype=np.float64).sum()
    scale = np.broadcast_to(scale, (len(z), scale.shape[1]))
    if shared:  # each map is one more image of a layer with one channel
        chosen, scale = np.repeat(chosen, z.shape[1]), np.broadcast_to(scale, z.shape[:2])
        z, scale = z.reshape(-1, 1, z.shape[2]), scale.reshape(-1, 1)
    codebooks = z.shape[1] if per_channel else 1
    fit, test = (_weighted(z[part], scale[part], codebooks) for part in (chosen, ~chosen))
    universal = universal_set("dfsq", signed=not maps.non_negative)
    found = select_channels(fit, bits, universal=universal)
    error = sum(test.squared_error(selection.points, c) for c, selection in enumerate(found))
    return error / float(power)


def _weighted(z, scale, channels):
    """Histogram of normalized values for so many codebooks, each weighted by its squared scale."""
    histogram = Histogram(channels)
    for image, factor in zip(z, scale, strict=True):
        own = Histogram(channels)
        own.add(image.reshape(1, channels, -1))
        histogram.merge(own, factor[:channels] ** 2)
    return histogram
