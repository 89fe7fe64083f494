"""Calibration: what a network's layers see on a few images.

One pass of the float network over the images; every layer's input is normalized and remembered as
histograms of fixed size, beside its extremes. The released K-means and the static ranges by
percentile or squared error need the inputs themselves: those are spilled to disk, layer by layer.
"""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .activations import center_max
from .config import Config, body_layers
from .histogram import Histogram, edges_for
from .memory import freed_memory_kept
from .universal import universal_set

#: Multiples of the golden ratio, less their whole parts, are spread evenly, however many.
GOLDEN = (5**0.5 - 1) / 2


class _Spill:
    """A temporary folder, which goes when the last object that refers to it does."""

    def __init__(self):
        self.path = Path(tempfile.mkdtemp(prefix="dfsq-"))
        self.numbers = count()  # of files, as a layer's name may be none
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass
class LayerCalibration:
    """What calibration remembers of one layer's input.

    Attributes
    ----------
    non_negative : bool
        Stated, or found: no value below zero in all of the images.
    histogram : Histogram
        Of the normalized input, by channel.
    inputs : list of paths
        The inputs themselves, one .npy file of shape (C, H, W) a call; empty if not kept.
    values_seen : int
        Number of values of a channel, whatever their weights in the histogram.
    low, high : float32 arrays, shape (C,)
        Least and largest of all values of each channel.
    """

    non_negative: bool
    histogram: Histogram
    inputs: list
    values_seen: int
    _spill: _Spill | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    def samples(self):
        """Normalized samples as the released code gathers them, shape (C, n), float32."""
        parts = []
        for path in self.inputs:
            x = torch.from_numpy(np.load(path))[None]
            parts.append(center_max(x, self.non_negative)[0][0].flatten(1).numpy())
        return np.concatenate(parts, axis=1)

    def values(self, most=500_000):
        """Inputs without normalization, shape (C, n), thinned evenly to about `most` values.

        Their extremes may be missing: those are in `low` and `high`.
        """
        parts = [np.load(path, mmap_mode="r") for path in self.inputs]
        step = max(1, -(-sum(part.size for part in parts) // most))
        return np.concatenate([_thinned(part, step) for part in parts], axis=1)


def _thinned(x, step):
    """One of every so many values of each channel of a map, shape (C, n).

    Where in its stretch each is taken from goes round by the golden ratio: at even distances they
    would be of a few columns only, or of the border alone, where a step fits the maps' width.
    """
    x = x.reshape(len(x), -1)
    starts = np.arange(0, x.shape[1], step)
    places = starts + np.floor(step * (np.arange(len(starts)) * GOLDEN % 1)).astype(int)
    return x[:, places.clip(max=x.shape[1] - 1)]


class Calibration:
    """The result of :func:`calibrate`.

    Attributes
    ----------
    layers : dict of str to LayerCalibration
    images : int
    digest : str
        SHA-256 of the calibration images.
    keeps_inputs : bool
        Whether the layers' inputs were spilled to disk.
    edges : array
        Cells of the histograms, see :func:`dfsq.histogram.edges_for`.
    error_units : str
        How the histograms' samples are weighted, see :class:`dfsq.Config`.
    batches : list of tensors
        The images themselves, for a pass over the quantized network.
    float_digest : str or None
        SHA-256 of the network's parameters and buffers, see :func:`float_digest`.
    moments : (tuple, dict of str to (Statistics, Statistics)), or (None, None)
        What :func:`dfsq.quantize` took last of the layers' inputs, see :mod:`dfsq.compensation`,
        and before it what network that was; the next configuration may need the same. At most
        ``dfsq.memory.LIMIT`` bytes, or one layer's.
    """

    def __init__(
        self,
        layers,
        batches,
        edges,
        keeps_inputs=False,
        error_units="normalized",
        float_digest=None,
    ):
        self.layers = layers
        self.batches = batches
        self.images = len(batches)
        self.digest = digest_of(batches)
        self.edges = edges
        self.keeps_inputs = keeps_inputs
        self.error_units = error_units
        self.float_digest = float_digest
        self.moments = (None, None)


class _Observer:
    """A forward pre-hook that remembers a layer's input."""

    def __init__(self, name, non_negative, edges, spill, error_units):
        self.name = name
        self.error_units = error_units
        self.stated = non_negative is not None
        self.non_negative = non_negative
        self.violated = False
        self.edges = edges
        self.spill = spill
        self.histogram = None
        self.low, self.high = np.inf, -np.inf
        self.values_seen = 0
        self.inputs = []

    def __call__(self, module, arguments):
        if not arguments or arguments[0].ndim == 3:
            raise ValueError(
                f"layer {self.name!r} must be called with one map of shape (N, C, H, W), as "
                "conv(x), not with a keyword or an image of shape (C, H, W)"
            )
        if self.violated or arguments[0].shape[1] != module.in_channels:
            return  # the latter the convolution itself refuses
        x = arguments[0].detach().float()
        if not torch.isfinite(x).all():
            raise ValueError(
                f"layer {self.name!r}: its input holds NaN or infinity on the calibration images"
            )
        negative = bool((x < 0).any())
        if self.non_negative is None:
            self.non_negative = not negative
        elif self.non_negative and negative and not self.stated:
            self.violated = True
            return
        if self.histogram is None:
            self.histogram = Histogram(x.shape[1], self.edges)
        self.values_seen += x[:, 0].numel()
        self.low = np.minimum(self.low, x.amin((0, 2, 3)).cpu().numpy())
        self.high = np.maximum(self.high, x.amax((0, 2, 3)).cpu().numpy())
        add_normalized({1.0: self.histogram}, x, self.non_negative, self.error_units)
        if self.spill is not None:
            for image in x.cpu().contiguous().numpy():
                path = self.spill.path / f"{next(self.spill.numbers)}.npy"
                np.save(path, image)
                self.inputs.append(path)


def add_normalized(histograms, x, non_negative, error_units):
    """Add a layer's input, normalized, to histograms of it.

    Parameters
    ----------
    histograms : dict of float to Histogram
        By the share of a map's largest magnitude that 1 stands for, see :mod:`dfsq.ranges`.
    x : float tensor, shape (N, C, H, W)
    non_negative : bool
    error_units : str
        See :class:`dfsq.Config`; in those of the output, a map counts with its squared scale.
    """
    for part in x.split(1) if error_units == "output" else (x,):
        z, _, scale = center_max(part, non_negative)
        for share, histogram in histograms.items():
            shared = z if share == 1 else z / share
            if error_units == "normalized":
                histogram.add(shared)
                continue
            own = Histogram(x.shape[1], histogram.edges)
            own.add(shared)
            histogram.merge(own, scale.flatten().double().cpu().numpy() ** 2)


def is_held_out(i, count):
    """Whether the choices made on `count` images are judged on image `i`: on each fourth."""
    return i % 4 == 3 or i == count - 1


def as_batches(images):
    """Images of any accepted form as a list of float tensors of shape (1, C, H, W) in 0..1.

    Parameters
    ----------
    images : sequence
        uint8 arrays of shape (H, W, C) or (H, W), or float tensors of shape (C, H, W) or
        (N, C, H, W); a single float tensor of shape (N, C, H, W) will do.

    Raises
    ------
    ValueError
        For one image that is in no list, for other types and shapes, for NaN, or if there is none.

    Examples
    --------
    >>> import numpy as np
    >>> from dfsq.calibration import as_batches
    >>> images = [np.zeros((8, 6, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]
    >>> [tuple(batch.shape) for batch in as_batches(images)]
    [(1, 3, 8, 6), (1, 3, 4, 4)]
    """
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim < 4:
        raise ValueError(
            f"images must be several, not one of shape {tuple(images.shape)}; put it into a list"
        )
    if not isinstance(images, Iterable):
        raise ValueError(f"images must be a sequence of calibration images, not {images!r}")
    batches = []
    for i, image in enumerate(images):
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            if image.ndim not in (2, 3):
                raise ValueError(
                    f"calibration image {i}: a uint8 array must have shape (H, W, C) or (H, W), "
                    f"not {image.shape}"
                )
            image = image[..., None] if image.ndim == 2 else image
            image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            kind = getattr(image, "dtype", type(image).__name__)
            raise ValueError(
                f"calibration image {i}: uint8 arrays of shape (H, W, C) or float tensors of "
                f"shape (C, H, W) are taken, not {kind}"
            )
        image = image[None] if image.ndim == 3 else image
        if image.ndim != 4 or not image.numel():
            raise ValueError(
                f"calibration image {i}: its shape must be (C, H, W) or (N, C, H, W), none of "
                f"them 0, not {tuple(image.shape)}"
            )
        if not torch.isfinite(image).all():
            raise ValueError(f"calibration image {i} holds NaN or infinity")
        batches += list(image.split(1))
    if not batches:
        raise ValueError("there are no calibration images; give at least one")
    return batches


def digest_of(tensors):
    """SHA-256 over shapes and values of tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        # as bytes, since NumPy has no bfloat16; a lone value may have a stride that refuses that
        flat = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def float_digest(model):
    """SHA-256 of a network's parameters and buffers."""
    state = model.state_dict().values()
    return digest_of(value for value in state if isinstance(value, torch.Tensor))


def stated_sign(config, name):
    """Whether a layer's input is stated to be non-negative; None where nothing is stated."""
    if config.non_negative is None:
        return None
    return any(fnmatchcase(name, pattern) for pattern in config.non_negative)


def find_layers(model, config):
    """Names and modules of the convolutions that a configuration's patterns choose.

    Raises
    ------
    ValueError
        If there is none, or a pattern matches none; the error lists the convolutions. For what is
        no network, or one that is compiled.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            "the network must be an nn.Module, such as dfsq.sr.load_model('edsr-x2'), not "
            f"{model!r:.80}"
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "the network is compiled; give the one that torch.compile was given, and compile what "
            "is made of it"
        )
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise ValueError("the network has no nn.Conv2d to quantize")
    if "" in convolutions:
        raise ValueError("the network is a convolution itself; put it into an nn.Sequential")
    layers = config.layers or body_layers(model, ("*",))
    fields = {
        "layers": layers,
        "exclude": config.exclude,
        "non_negative": config.non_negative or (),
        "overrides": [pattern for pattern, _ in config.overrides],
    }
    for field, patterns in fields.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in convolutions):
                names = list(convolutions)
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise ValueError(
                    f"{field}: {pattern!r} matches no convolution of the network; it has {shown}"
                )
    chosen = {
        name: module
        for name, module in convolutions.items()
        if any(fnmatchcase(name, p) for p in layers)
        and not any(fnmatchcase(name, p) for p in config.exclude)
    }
    if not chosen:
        raise ValueError("exclude leaves no convolution to quantize")
    return chosen


@torch.no_grad()
def calibrate(model, images, config=None, *, keep_inputs=None, progress=True):
    """Run a float network over calibration images and remember what its layers see.

    Parameters
    ----------
    model : nn.Module
        Not changed; run as it is, in eval mode.
    images : sequence
        See :func:`dfsq.calibration.as_batches`.
    config : Config, optional
        Says which layers, and which universal set the histograms must tell apart; ``Config()`` by
        default.
    keep_inputs : bool, optional
        Whether to spill the layers' inputs to disk as well (4 bytes a value), which the
        selector ``kmeans`` and static ranges other than ``minmax`` need; by default, if `config`
        needs them.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Calibration

    Notes
    -----
    The histograms of all chosen layers are held in memory together: 96 KiB an input channel,
    0.2 GB for EDSR-baseline's body and 4.6 GB for RDN's. A universal set off the dyadic grid has
    cells of its own, 24 bytes each: up to one for each two of its points, which may be many times
    as much. Fewer `layers` at a time take less.

    Examples
    --------
    >>> import dfsq
    >>> network = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(3, 8, 3))
    >>> images = torch.rand(2, 3, 32, 32)
    >>> calibration = calibrate(network, images, dfsq.Config(), progress=False)
    >>> layer = calibration.layers["1"]
    >>> layer.non_negative, layer.values_seen
    (True, 2048)
    """
    config = Config() if config is None else config
    modules = find_layers(model, config)
    batches = as_batches(images)
    first = next(model.parameters())
    for name, module in modules.items():
        if not torch.isfinite(module.weight).all():
            raise ValueError(f"layer {name!r}: its weight holds NaN or infinity")
    edges = edges_for(universal_set(config.universal, config.words))
    if keep_inputs is None:
        keep_inputs = any(needs_inputs(config.for_layer(name)) for name in modules)
    spill = _Spill() if keep_inputs else None

    training = [module for module in model.modules() if module.training]
    model.eval()
    flags, result = {name: stated_sign(config, name) for name in modules}, {}
    try:
        while flags:
            observers = {
                name: _Observer(name, flag, edges, spill, config.error_units)
                for name, flag in flags.items()
            }
            hooks = [modules[n].register_forward_pre_hook(o) for n, o in observers.items()]
            try:
                bar = tqdm(batches, "calibrating", disable=not progress, unit="image")
                with freed_memory_kept():
                    for batch in bar:
                        _forward(model, batch.to(first.device, first.dtype))
            finally:
                for hook in hooks:
                    hook.remove()
            # a layer that only began non-negative is seen again, as a signed one
            flags = {name: False for name, o in observers.items() if o.violated}
            for name, o in observers.items():
                if o.histogram is None and not o.violated:
                    raise ValueError(
                        f"layer {name!r} was not run on the calibration images; exclude it"
                    )
                result[name] = LayerCalibration(
                    o.non_negative, o.histogram, o.inputs, o.values_seen, spill, o.low, o.high
                )
    except BaseException:
        if spill is not None:
            spill.remove()
        raise
    finally:
        for module in training:
            module.training = True
    return Calibration(result, batches, edges, keep_inputs, config.error_units, float_digest(model))


def _forward(model, batch):
    try:
        model(batch)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"the network does not take an image of shape {tuple(batch.shape)}: {reason}"
        ) from error


def needs_inputs(config):
    """Whether a layer's configuration needs its inputs rather than histograms of them."""
    if config.act_bits == 32:
        return False
    if config.normalization == "center-max":
        return config.selector == "kmeans"
    return config.normalization.startswith("static") and config.static_range != "minmax"
