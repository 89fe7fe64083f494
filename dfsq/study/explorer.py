"""What the book's selection explorer shows: a network's channels, as samples few enough to ship.

The page computes by itself (``book/_static/selection.js``), from a script that holds histograms of
some channels. With a live kernel, :func:`dfsq.study.widgets.selection` is the same.
"""

import json
from pathlib import Path

import numpy as np

from ..calibration import calibrate
from ..config import Config
from ..sr import calibration_crops, load_model

#: Steps of the grid that shipped samples lie on, in 1: each of 2048 cells holds 32 of them. Sums of
#: such values, and of their squares, are exact in float64 for up to 2^21 samples a channel.
STEPS = 2**16
_CELL = STEPS // 2048

LAYERS = tuple(f"body.{block}.body.{part}" for block in (0, 7, 15) for part in (0, 2))


def condensed(histogram, channel):
    """A channel's samples, those of a cell put together at their mean.

    Parameters
    ----------
    histogram : Histogram
        On the dyadic grid, its samples not weighted.
    channel : int

    Returns
    -------
    steps, counts : int arrays, shape (used cells,)
        Values in units of ``1 / STEPS``, increasing, and how many samples stand there. A value
        stays in its cell, so no subset of the universal set tells it from the samples it stands
        for; it is off their mean by ``1 / STEPS`` at most.

    Raises
    ------
    ValueError
        For another grid, or weighted samples.
    """
    cells = np.flatnonzero(histogram.count[channel])
    counts = histogram.count[channel, cells]
    if not histogram.dyadic or np.any(counts != np.round(counts)):
        raise ValueError("the histogram must be dyadic, and its samples not weighted")
    mean = histogram.total[channel, cells] / counts
    lowest = (cells - 2048) * _CELL
    steps = np.clip(np.round(mean * STEPS), lowest, lowest + _CELL - 1)
    return steps.astype(int), counts.astype(int)


def channels_of(histogram, most):
    """Some of a layer's channels, from the one with the fewest used cells to that with the most.

    Parameters
    ----------
    histogram : Histogram
    most : int
        How many channels at most.

    Returns
    -------
    list of int, increasing
    """
    order = np.argsort((histogram.count > 0).sum(axis=1), kind="stable")
    chosen = np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)
    return sorted(order[chosen].tolist())


def histograms(model="edsr-x2", layers=LAYERS, channels=8, crops=8, seed=0):
    """Samples of some channels of a network, as plain lists and numbers.

    Parameters
    ----------
    model : str
        Name of a network.
    layers : sequence of str
    channels : int
        How many of each layer, see :func:`dfsq.study.explorer.channels_of`.
    crops, seed : int
        Of the calibration draw.

    Returns
    -------
    dict
        ``name``, ``steps`` (in 1) and ``layers``, each with ``name``, ``nonNegative`` and
        ``channels``, each with ``index``, ``values`` (the first, then differences, in steps) and
        ``counts``.
    """
    network = load_model(model)
    images = calibration_crops("photographs", network.scale, count=crops, seed=seed)
    config = Config(layers=tuple(layers), error_units="normalized")
    calibration = calibrate(network, images, config, progress=False)
    found = []
    for name in layers:
        layer, shown = calibration.layers[name], []
        for channel in channels_of(layer.histogram, channels):
            steps, counts = condensed(layer.histogram, channel)
            values = np.diff(steps, prepend=0).tolist()
            shown.append({"index": channel, "values": values, "counts": counts.tolist()})
        found.append({"name": name, "nonNegative": layer.non_negative, "channels": shown})
    return {"name": model, "steps": STEPS, "layers": found}


def write(path, networks=None):
    """Write the script that hands histograms to the page, which may be opened from a folder.

    Parameters
    ----------
    path : str or Path
    networks : list of dict, optional
        As of :func:`dfsq.study.explorer.histograms`; by default those of ``edsr-x2``.
    """
    networks = [histograms()] if networks is None else networks
    text = json.dumps(networks, separators=(",", ":"))
    Path(path).write_text(f"globalThis.dfsqHistograms = {text};\n", encoding="utf-8")
