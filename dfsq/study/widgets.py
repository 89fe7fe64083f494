"""The book's explorers with controls, by ipywidgets, for whoever has a live kernel.

Pages of the book need no kernel and hold none of these; a notebook shows them when its parameter
``interactive`` is true.
"""

import ipywidgets as ipw
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from ..selection import select
from ..sr.imaging import psnr_y
from ..universal import universal_set
from . import figures, interactive
from .distributions import NORMALIZATIONS, distances

#: Words of the universal set to choose from; three words would need cells of their own.
WORDS = {"4 words": ("dfsq", 4), "2 words": ("dfsq", 2), "1 word": ("dfsq", 1), "SQ": ("sq", None)}

#: Room for the longest name, so that controls stand in one column.
_STYLE = {"description_width": "7.5rem"}
_LAYOUT = {"width": "26rem"}


def distributions(maps, images):
    """Controls for layer, channel and normalization, and the channel's values on every image.

    Parameters
    ----------
    maps : dict of str to dfsq.study.distributions.LayerMaps
        By layer.
    images : sequence of str
        Names of the images.

    Returns
    -------
    ipywidgets.VBox
    """
    controls = _layer_and_channel({name: layer.mean.shape[1] for name, layer in maps.items()})
    before, *options = NORMALIZATIONS
    controls["normalization"] = _dropdown("normalization", options, value=options[-1])

    def draw(layer, channel, normalization):
        seen = {
            name: maps[layer].normalized(*NORMALIZATIONS[name])[:, [channel]]
            for name in (before, normalization)
        }
        apart = [distances(values)["images"] for values in seen.values()]
        _show(figures.ridges(seen, [f"ch. {channel}"], images))
        if np.isfinite(apart).all():
            return "mean distance between images, in standard deviations: " + " → ".join(
                f"{distance:.2f}" for distance in apart
            )
        return "distances are of channels with several values, on several images"

    return _explorer(controls, draw)


def selection(calibration, *, seed=0):
    """Controls for layer, channel, bits and words, and the points selected.

    Parameters
    ----------
    calibration : Calibration
        Its histograms on the dyadic grid.
    seed : int
        Of K-means.

    Returns
    -------
    ipywidgets.VBox
    """
    layers = calibration.layers
    controls = _layer_and_channel({name: seen.histogram.channels for name, seen in layers.items()})
    controls["bits"] = _slider("bits", 4, 2, 8)
    controls["words"] = _dropdown("universal set", WORDS)

    def draw(layer, channel, bits, words):
        seen = layers[layer]
        universal = universal_set(*words, signed=not seen.non_negative)
        one = seen.histogram.only([channel])
        found = {
            method: select(one, bits, method, universal, **options)
            for method, options in (("kmeans-hist", {"seed": seed}), ("exact", {}))
        }
        _show(figures.codebooks(one, 0, found, universal))
        samples = one.count.sum()
        return "<br>".join(
            f"{name}: {len(s.points)} points, mean squared error {s.sse / samples:.4g}"
            for name, s in found.items()
        )

    return _explorer(controls, draw)


def crops(results, box, border, most):
    """Controls for a result and a square, and the square beside float, with the error's map.

    Parameters
    ----------
    results : dict of str to uint8 array, shape (H, W, 3)
        By name: ``original``, ``float``, and those to choose from, the last of them shown first.
    box : (x, y, size)
        The square shown first, in pixels; moved into the image where it reaches beyond.
    border : int
        Pixels shaved off each side for PSNR; the protocol takes the scale.
    most : float
        Error in grey levels that is drawn in the darkest colour.

    Returns
    -------
    ipywidgets.VBox
    """
    original, full = results["original"], results["float"]
    height, width = original.shape[:2]
    psnr = {name: psnr_y(results[name], original, border) for name in results if name != "original"}
    largest = min(height, width)
    size = _slider("size", min(box[2], largest), min(8, largest), largest)
    x, y = _slider("x", 0, 0, 0), _slider("y", 0, 0, 0)

    def fit_place(_=None):
        x.max, y.max = width - size.value, height - size.value

    size.observe(fit_place, "value")
    fit_place()
    x.value, y.value = box[:2]
    options = [name for name in psnr if name != "float"]
    result = _dropdown("result", options, value=options[-1])
    controls = {"result": result, "x": x, "y": y, "size": size}

    def draw(result, x, y, size):
        shown = {name: results[name] for name in ("float", result)}
        titled = {f"{name}\n{psnr[name]:.2f} dB": image for name, image in shown.items()}
        _show(figures.comparison({"original\n": original} | titled, (x, y, size), most))
        error = np.abs(results[result].astype(float) - full).mean(axis=2)
        part = error[y : y + size, x : x + size]
        return (
            f"mean error against float, in grey levels: {part.mean():.2f} in the square, "
            f"{error.mean():.2f} in the whole image"
        )

    return _explorer(controls, draw)


def psnr_by_bits(rows):
    """Controls for network, data set and methods, and their PSNR against bits.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of results: columns ``model``, ``dataset``, ``method``, ``bits``, ``psnr``. Networks
        and data sets are offered where float, bicubic and some method stand.

    Returns
    -------
    ipywidgets.VBox

    Raises
    ------
    ValueError
        If there is nothing to offer.
    """
    offered = {}
    for names, part in [] if rows.empty else rows.groupby(["model", "dataset"], sort=False):
        plain = part.method.isin(["float", "bicubic"])
        levels = part[plain].set_index("method").psnr
        if len(levels) == 2 and not plain.all():
            offered[", ".join(names)] = part[~plain], levels.to_dict()
    if not offered:
        raise ValueError(
            "no network and data set has rows of float, bicubic and a method; `dfsq bench` "
            "computes them"
        )
    which = _dropdown("network, data set", list(offered))
    methods = dict.fromkeys(name for table, _ in offered.values() for name in table.method)
    toggles = {
        name: ipw.Checkbox(True, description=name, indent=False, layout={"width": "13rem"})
        for name in methods
    }

    def fit_toggles(_=None):
        there = set(offered[which.value][0].method)
        for name, toggle in toggles.items():
            toggle.disabled = name not in there

    which.observe(fit_toggles, "value")
    fit_toggles()

    def draw(which, **chosen):
        table, levels = offered[which]
        lines = interactive.psnr_by_bits(table[table.method.map(chosen)], levels)
        interactive.show(lines, f"PSNR against bits of {which}, a line for each method")
        return "Boxes and names below the lines switch methods; boxes hold for every data set."

    rows_of_toggles = ipw.Box(list(toggles.values()), layout={"flex_flow": "row wrap"})
    return _explorer({"which": which} | toggles, draw, [which, rows_of_toggles])


def _explorer(controls, draw, arranged=None):
    """Controls, what is said about their choice, and what is drawn of it.

    `draw` takes the controls' values by name, shows a figure and returns what is said.
    """
    said = ipw.HTML()

    def update(**values):
        said.value = draw(**values)

    drawn = ipw.interactive_output(update, controls)
    return ipw.VBox([*(arranged or controls.values()), said, drawn])


def _layer_and_channel(channels):
    """Controls for a layer and one of its channels, whose number is given by layer."""
    layer, channel = _dropdown("layer", list(channels)), _slider("channel", 0, 0, 0)

    def fit_channels(_=None):
        channel.max = channels[layer.value] - 1

    layer.observe(fit_channels, "value")
    fit_channels()
    return {"layer": layer, "channel": channel}


def _dropdown(name, options, **settings):
    return ipw.Dropdown(options=options, description=name, style=_STYLE, layout=_LAYOUT, **settings)


def _slider(name, value, low, high):
    # A figure takes a moment: it is drawn where the slider comes to rest.
    return ipw.IntSlider(
        value, low, high, description=name, continuous_update=False, style=_STYLE, layout=_LAYOUT
    )


def _show(figure):
    display(figure)
    plt.close(figure)
