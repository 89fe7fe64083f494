"""Every figure of the book, in one visual language.

White background (it stays readable in dark mode), the colour-blind safe palette of Okabe and Ito,
one colour a method wherever it appears, units and the better direction on every axis.
"""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#C9B800", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#767676"

#: Colour of each method and selector.
COLORS = {
    "float": BLACK,
    "bicubic": GREY,
    "exact": BLUE,
    "kmeans": ORANGE,
    "kmeans-hist": YELLOW,
    "exhaustive": RED,
    "free": "#332288",
    "dfsq": ORANGE,
    "dfsq-points": SKY,
    "dfsq-subset": BLUE,
    "dfsq-exact": GREEN,
    "dfsq-budget": "#00573F",
    "uniform-minmax": PURPLE,
    "uniform-norm": RED,
    "uniform-mse": "#8C564B",
    "sq": YELLOW,
}
STATIC_COLOR = "#9A9A9A"
MARKERS = {
    "exact": "o", "kmeans": "s", "kmeans-hist": "D", "exhaustive": "^", "free": "v",
    "dfsq": "s", "dfsq-points": "D", "dfsq-subset": "o", "dfsq-exact": "*", "dfsq-budget": "X",
    "uniform-minmax": "v", "uniform-norm": "^", "uniform-mse": "<", "sq": "P",
}  # fmt: skip


def use_style():
    """Set Matplotlib up for the book; called once a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        rc={
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "#E4E4E4",
            "font.size": 12,
            "axes.titlesize": 13,
            "legend.frameon": False,
        },
    )


def color(method):
    """The colour of a method; all static ranges share one."""
    return COLORS.get(method, STATIC_COLOR)


def through_the_quantizer(given, normalized, points, universal, returned):
    """A channel's map on its way through the quantizer: as it is, normalized, and given back.

    Parameters
    ----------
    given, returned : array, shape (H, W)
        The map before and after.
    normalized : array, shape (H, W), values in -1..1
    points : array, shape (k,)
        The channel's points.
    universal : array, shape (points,)
        The universal set, drawn as ticks.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3), width_ratios=[1, 1.6, 1])
    span = {"vmin": given.min(), "vmax": given.max(), "cmap": "gray"}
    back = rf"given back, $\hat{{x}}$: {len(np.unique(returned))} values"
    for axis, values, title in ((left, given, "the map $x$"), (right, returned, back)):
        axis.imshow(values, **span)
        axis.set(title=title, xticks=[], yticks=[])
    share, edges = np.histogram(normalized, bins=96, range=(-1, 1))
    middle.stairs(share / share.sum(), edges, fill=True, color="#BBD7EA")
    top = 1.05 * share.max() / share.sum()
    middle.vlines(points, 0, top, color=BLUE, lw=1)
    middle.plot(universal, np.full(len(universal), -0.06 * top), "|", color=GREY, ms=7, mew=0.6)
    middle.set_title(f"normalized, $z$, and its {len(points)} points")
    middle.set_xlabel("normalized value; grey, the universal set")
    middle.set_ylabel("share of pixels")
    middle.set(xticks=np.linspace(-1, 1, 5), ylim=(-0.12 * top, top))
    return figure


def codebooks(histogram, channel, selections, universal):
    """One channel's distribution, and the points that each selector takes.

    Parameters
    ----------
    histogram : dfsq.Histogram
    channel : int
    selections : dict of str to dfsq.Selection
    universal : array
        The universal set, drawn as ticks.
    """
    height = 2.6 + 0.45 * len(selections)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, height), sharex=True, height_ratios=[2.4, 0.45 * (len(selections) + 1)]
    )
    group = 16  # cells a bar
    count = histogram.count[channel].reshape(-1, group).sum(axis=1)
    edges = np.linspace(-1, 1, len(count) + 1)
    top.stairs(count / count.sum(), edges, fill=True, color="#BBD7EA")
    top.set_ylabel("share of samples\n(a bar: 1/128)")
    names = list(selections)
    bottom.plot(universal, np.full(len(universal), len(names)), "|", color=GREY, ms=10, mew=0.7)
    for row, name in enumerate(names):
        points = selections[name].points
        y = np.full(len(points), len(names) - 1 - row)
        bottom.plot(points, y, MARKERS.get(name, "o"), color=color(name), ms=7)
        for x in points:
            top.axvline(x, color=color(name), lw=0.6, alpha=0.5) if name == "exact" else None
    bottom.set_yticks(range(len(names) + 1), [*reversed(names), "universal set"])
    bottom.set_ylim(-0.6, len(names) + 0.6)
    bottom.set_xlabel("normalized value")
    used = np.flatnonzero(count)
    bottom.set_xlim(edges[used[0]] - 0.03, edges[used[-1] + 1] + 0.03)
    return figure


def _log_axis(axis, which):
    """Logarithmic in x or y, with plain numbers at 1, 2 and 5 of each decade."""
    axis.set(**{f"{which}scale": "log"})
    ticks = getattr(axis, f"{which}axis")
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_locator(NullLocator())


def _bits_axis(axis, bits):
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(bits))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("bits")


def error_ratios(table):
    """Squared error over the exact optimum's, channel by channel, against bits.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``layer``, ``bits``, ``method``, ``ratio``; a row a channel.
    """
    layers = list(table.layer.unique())
    figure, axes = plt.subplots(1, len(layers), figsize=(5 * len(layers), 4), sharey=True)
    for axis, layer in zip(np.atleast_1d(axes), layers, strict=True):
        part = table[table.layer == layer]
        methods = list(part.method.unique())
        sns.boxplot(
            part, x="bits", y="ratio", hue="method", ax=axis, fliersize=2, linewidth=1,
            palette={m: color(m) for m in methods}, hue_order=methods,
        )  # fmt: skip
        axis.axhline(1, color=BLUE, lw=1.5)
        _log_axis(axis, "y")
        axis.set_title(layer)
        axis.set_xlabel("bits")
        axis.set_ylabel("squared error / exact optimum\n(lower is better)")
        axis.legend(title=None)
    return figure


def growth(table, x, label, fits):
    """Time of selectors against a size, with fitted growth.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns `x`, ``method``, ``seconds`` (a channel).
    x : str
        Column with the size.
    label : str
        Label of that axis.
    fits : dict of str to (array, array, str)
        For each method the fitted curve and its formula.
    """
    figure, axis = plt.subplots(figsize=(7, 4.4))
    for method in table.method.unique():
        part = table[table.method == method]
        marker = MARKERS.get(method, "o")
        axis.plot(part[x], part.seconds * 1000, marker, color=color(method), ms=7)
        sizes, seconds, formula = fits[method]
        axis.plot(
            sizes, np.asarray(seconds) * 1000, "-", color=color(method), lw=1.4,
            label=f"{method}: {formula}",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # decades alone may be one tick
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    ticks = sorted(table[x].unique())
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlabel(label)
    axis.set_ylabel("milliseconds a channel\n(lower is better)")
    figure.legend(loc="outside upper left", fontsize=10)  # lines may rise into any corner
    return figure


def lost_points(table):
    """Share of the points to be had that are lost in snapping, against bits.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``layer``, ``bits``, ``method``, ``lost`` (0..1).
    """
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for (layer, method), part in table.groupby(["layer", "method"], sort=False):
        style = "-" if layer == table.layer.iloc[0] else "--"
        axis.plot(
            part.bits, 100 * part.lost, style, marker=MARKERS.get(method, "o"),
            color=color(method), label=f"{method}, {layer}",
        )  # fmt: skip
    _bits_axis(axis, table.bits)
    axis.set_ylabel("points lost, %\n(lower is better)")
    axis.legend(fontsize=10)
    return figure


def strip(images, box, *, reference=None, amplify=None):
    """A photograph with a box, and the box's content in several images, in a grid.

    Parameters
    ----------
    images : dict of str to uint8 array, shape (H, W, 3)
        Titles and images; the first is shown whole, with the box.
    box : (x, y, size)
        In pixels.
    reference : str, optional
        Title of the image against which error maps are drawn in a second row.
    amplify : float, optional
        Error in grey levels that is drawn in the darkest colour.
    """
    x, y, size = box
    names = list(images)
    rows = 1 if reference is None else 2
    columns = len(names)
    figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns, 2.75 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for column, name in enumerate(names):
        axis, image = axes[0, column], images[name]
        crop = image[y : y + size, x : x + size]
        axis.imshow(crop, interpolation="nearest")
        axis.set_title(name, fontsize=11)
        if reference is not None and name != reference:
            target = images[reference][y : y + size, x : x + size]
            error = np.abs(crop.astype(float) - target).mean(axis=2)
            shown = axes[1, column].imshow(error, cmap="magma_r", vmin=0, vmax=amplify)
    if reference is not None:
        axes[1, names.index(reference)].text(
            0.5, 0.5, f"mean error\nagainst\n{reference}", ha="center", va="center", fontsize=11
        )
        figure.colorbar(shown, ax=list(axes[1]), label="grey levels", shrink=0.8, pad=0.01)
    return figure


def located(image, box):
    """A photograph with the box that other figures enlarge."""
    x, y, size = box
    height, width = image.shape[:2]
    figure, axis = plt.subplots(figsize=(7, 7 * height / width))
    axis.imshow(image)
    axis.add_patch(Rectangle((x, y), size, size, fill=False, ec="white", lw=3))
    axis.add_patch(Rectangle((x, y), size, size, fill=False, ec=RED, lw=1.6))
    axis.set_axis_off()
    return figure


def layer_deviations(table):
    """Deviation from float when one layer alone is quantized, in the order of the layers.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``layer``, ``deviation`` (grey levels), ``kind``.
    """
    figure, axis = plt.subplots(figsize=(10, 4))
    kinds = list(table.kind.unique())
    palette = dict(zip(kinds, (BLUE, ORANGE, GREEN), strict=False))
    axis.bar(range(len(table)), table.deviation, color=[palette[k] for k in table.kind])
    for kind in kinds:
        axis.bar(0, 0, color=palette[kind], label=kind)
    axis.set_xticks(range(len(table)), table.layer, rotation=90, fontsize=9)
    axis.set_xlim(-0.7, len(table) - 0.3)
    axis.set_ylabel("deviation from float, grey levels\n(lower is better)")
    axis.legend()
    axis.grid(axis="x", visible=False)
    return figure


def psnr_by_bits(table, float_psnr, bicubic_psnr=None):
    """PSNR against bits, a line a method.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``method``, ``bits``, ``psnr``.
    float_psnr, bicubic_psnr : float
        Drawn as levels, in dB.
    """
    figure, axis = plt.subplots(figsize=(8.5, 5))
    levels = [("float", float_psnr)]
    if bicubic_psnr is not None:
        levels.append(("bicubic", bicubic_psnr))
    for name, level in levels:
        axis.axhline(level, color=color(name), lw=1.3, ls=":")
        axis.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), va="bottom", ha="right",
            color=color(name),
        )  # fmt: skip
    for method in table.method.unique():
        part = table[table.method == method].sort_values("bits")
        static = method.startswith("static")
        axis.plot(
            part.bits, part.psnr, marker=None if static else MARKERS.get(method, "o"),
            ls="--" if static else "-", color=color(method), lw=1.2 if static else 1.8,
            label=None if static else method, zorder=1 if static else 3,
        )  # fmt: skip
    if table.method.str.startswith("static").any():
        axis.plot([], [], "--", color=STATIC_COLOR, label="static ranges")
    _bits_axis(axis, table.bits)
    axis.set_ylabel("PSNR-Y, dB (higher is better)")
    if bicubic_psnr is not None:  # what is far below bicubic would hide all else
        span = float_psnr - bicubic_psnr
        axis.set_ylim(max(axis.get_ylim()[0], bicubic_psnr - 0.6 * span), float_psnr + 0.08 * span)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10)
    return figure


def errors_by_bits(table):
    """Relative squared error of selection against bits, a panel a layer, a line a universal set.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``layer``, ``set``, ``bits``, ``error``; DFSQ's set is called ``"DFSQ"`` or
        ``"4 words"``, a codebook without a set ``"free"``.
    """
    layers, sets = list(table.layer.unique()), list(table.set.unique())
    figure, axes = plt.subplots(1, len(layers), figsize=(5 * len(layers), 4.2), sharey=True)
    palette = {"DFSQ": BLUE, "4 words": BLUE, "free": COLORS["free"]}
    others = [name for name in sets if name not in palette]
    palette |= dict(zip(others, (YELLOW, ORANGE, RED, PURPLE, GREEN, BLACK), strict=False))
    for axis, layer in zip(np.atleast_1d(axes), layers, strict=True):
        for name in sets:
            part = table[(table.layer == layer) & (table.set == name)].sort_values("bits")
            style = "--" if name == "free" else "-"
            above = 3 if palette[name] == BLUE else 2  # DFSQ's is what the others are compared with
            axis.plot(
                part.bits, part.error, style, marker="o", color=palette[name], label=name,
                zorder=above,
            )  # fmt: skip
        axis.set_yscale("log")
        axis.set_title(layer)
        _bits_axis(axis, table.bits)
    np.atleast_1d(axes)[0].set_ylabel("relative squared error\n(lower is better)")
    np.atleast_1d(axes)[0].legend(fontsize=10)
    return figure


def _loss_axis(axis, which, table):
    """Logarithmic, if all losses are above 0.01 dB; else linear up to there, and so below 0 too.

    Returns the axis' label, which says so.
    """
    label = "loss against float, dB\n(lower is better"
    if table.low.min() >= 0.01:
        _log_axis(axis, which)
        return f"{label})"
    ticks = [-0.1, -0.03, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]
    ticks = [tick for tick in ticks if table.low.min() <= tick <= table.high.max()]
    getattr(axis, f"set_{which}scale")("symlog", linthresh=0.01, linscale=0.4)
    along = getattr(axis, f"{which}axis")
    along.set_major_locator(FixedLocator(ticks))
    along.set_minor_locator(NullLocator())
    along.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return f"{label};\nlinear within ±0.01 dB)"


def losses_by_bits(table, panels="dataset"):
    """Loss against float by bits, a line a method, with intervals.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``method``, ``bits``, ``loss``, ``low`` and ``high`` in dB, and that of `panels`;
        panels and lines in the order of the rows.
    panels : str
        Column with a panel for each of its values, such as ``"dataset"`` or ``"model"``.
    """
    titles, methods = list(table[panels].unique()), list(table.method.unique())
    columns = min(3 if len(titles) > 4 else 2, len(titles))
    rows = -(-len(titles) // columns)
    width, height = (5, 3.8) if columns < 3 else (3.5, 2.8)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, sharex=True,
        sharey=True,
    )  # fmt: skip
    for place, (axis, title) in enumerate(zip(axes.flat, titles, strict=False)):
        for method in methods:
            part = table[(table[panels] == title) & (table.method == method)].sort_values("bits")
            axis.fill_between(part.bits, part.low, part.high, color=color(method), alpha=0.15, lw=0)
            axis.plot(
                part.bits, part.loss, marker=MARKERS.get(method, "o"), color=color(method),
                label=method,
            )  # fmt: skip
        label = _loss_axis(axis, "y", table)
        axis.set_title(title)
        _bits_axis(axis, table.bits)
        axis.label_outer()
        if place + columns >= len(titles):  # no panel below, in the last row or above its gap
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("bits")
    for axis in axes.flat[len(titles) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    spare = axes.flat[len(titles) % axes.size]  # the first without a panel, or the first of all
    spare.legend(*axes.flat[0].get_legend_handles_labels(), fontsize=10)
    return figure


def losses_by_method(table):
    """Loss against float of several methods, a panel a data set, with intervals.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``dataset``, ``method``, ``loss``, ``low`` and ``high`` in dB, drawn from top to
        bottom in the order of the rows.
    """
    datasets, methods = list(table.dataset.unique()), list(table.method.unique())
    columns = min(2, len(datasets))
    rows = -(-len(datasets) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, (1 + 0.3 * len(methods)) * rows),
        squeeze=False, sharey=True, sharex=True,
    )  # fmt: skip
    for axis, dataset in zip(axes.flat, datasets, strict=False):
        part = table[table.dataset == dataset].set_index("method")
        for place, method in enumerate(reversed(methods)):
            if method in part.index:
                row = part.loc[method]
                shade = color(method.removesuffix("-w").removesuffix("-a"))
                axis.plot([row.low, row.high], [place, place], color=shade, lw=2, alpha=0.5)
                axis.plot(row.loss, place, MARKERS.get(method, "o"), color=shade, ms=7)
        label = _loss_axis(axis, "x", table)
        axis.set_yticks(range(len(methods)), list(reversed(methods)))
        axis.set_ylim(-0.6, len(methods) - 0.4)
        axis.set_title(dataset)
    for axis in axes.flat[len(datasets) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel(label)
    return figure


def training_curve(log):
    """Loss and validation PSNR of a training log.

    Only the highest decibel of the PSNR is drawn: averaged weights can start so far below that what
    training gains later would be a flat line.

    Parameters
    ----------
    log : pandas.DataFrame
        A row a checkpoint, columns ``step``, ``loss`` and ``validation_psnr`` in dB, as
        `dfsq.study.training` writes them.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    left.plot(log.step, log.loss, color=BLUE)
    left.set_ylabel("L1 loss (lower is better)")
    right.plot(log.step, log.validation_psnr, "o-", color=BLUE, ms=4)
    right.set_ylabel("validation PSNR-Y, dB (higher is better)")
    best = log.validation_psnr.max()
    if log.validation_psnr.min() < best - 1:
        right.set_ylim(best - 1, best + 0.05)
        right.set_title("the highest decibel; earlier steps lie below", fontsize="medium")
    for axis in (left, right):
        axis.set_xlabel("step")
    return figure


def comparison(images, box, most=None):
    """A photograph with a box, the box's content in several images, and how the last two differ.

    Parameters
    ----------
    images : dict of str to uint8 array, shape (H, W, 3)
        Titles, with PSNR of the whole image, and images; the first is shown whole, with the box.
    box : (x, y, size)
        In pixels.
    most : float, optional
        Difference in grey levels that is drawn in the darkest colour; by default the largest.
    """
    x, y, size = box
    whole, *_, a, b = images.values()
    height, width = whole.shape[:2]
    side, aspect = 2.3, min(max(width / height, 0.6), 2.2)  # inches a crop; a panorama is shrunk
    ratios = [aspect] + [1] * (len(images) + 1)
    # Not by pyplot: no window, and nothing to close after hundreds of them.
    size_in_inches = side * sum(ratios) + 1, side + 0.65
    figure = Figure(figsize=size_in_inches, dpi=150, layout="constrained")
    axes = figure.subplots(1, len(ratios), width_ratios=ratios)
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(whole)
    axes[0].set_title(f"{width}×{height} pixels\n(dB: of the whole)", fontsize=11)
    for edge, line in (("white", 3), (RED, 1.6)):
        corner = x - 0.5, y - 0.5  # pixels are drawn around their coordinates
        axes[0].add_patch(Rectangle(corner, size, size, fill=False, ec=edge, lw=line))
    inside = slice(y, y + size), slice(x, x + size)
    for axis, (title, image) in zip(axes[1:-1], images.items(), strict=True):
        axis.imshow(image[inside], interpolation="nearest")
        axis.set_title(title, fontsize=11)
    difference = np.abs(a[inside].astype(float) - b[inside]).mean(axis=2)
    most = most or max(difference.max(), 1)
    shown = axes[-1].imshow(difference, cmap="magma_r", vmin=0, vmax=most)
    axes[-1].set_title("difference of\nthe last two", fontsize=11)
    figure.colorbar(shown, cax=axes[-1].inset_axes([1.04, 0, 0.06, 1]), label="grey levels")
    return figure


# --- activations across images and channels ---------------------------------------------------

#: Colour of each part of a variance, and of each normalization.
PART_COLORS = {"channels": BLUE, "images": ORANGE, "residual": "#BBBBBB"}
NORMALIZATION_COLORS = {
    "none": BLACK,
    "per image": ORANGE,
    "per channel": BLUE,
    "both (DFSQ)": GREEN,
    "both, one codebook": RED,
}


def ranges_and_errors(table, margin):
    """Where the ranges' variance comes from, and the error without one statistic or the other.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``layer``, ``kind``; ``channels``, ``images``, ``residual``: variances of the
        ranges' binary logarithms; ``none``, ``per image``, ``per channel`` and ``both, one
        codebook``: errors over DFSQ's.
    margin : float
        Drawn above 1 as a level.
    """
    kinds = list(table.kind.unique())
    figure, axes = plt.subplots(
        len(kinds), 2, figsize=(11, 0.6 + 3.3 * len(kinds)), sharey="col", squeeze=False
    )
    for (left, right), kind in zip(axes, kinds, strict=True):
        part = table[table.kind == kind]
        bottom, places = 0, range(len(part))
        for name, shade in PART_COLORS.items():
            left.bar(places, part[name], bottom=bottom, color=shade, label=name)
            bottom = bottom + part[name].to_numpy()
        markers = {"none": "x", "per image": "s", "per channel": "o", "both, one codebook": "^"}
        for name, marker in markers.items():
            right.plot(places, part[name], marker, color=NORMALIZATION_COLORS[name], label=name)
        right.axhline(1, color=NORMALIZATION_COLORS["both (DFSQ)"], lw=1.6, label="both (DFSQ)")
        right.axhline(1 + margin, color=GREY, lw=1, ls="--")
        for axis in (left, right):
            axis.set_title(kind)
            axis.set_xticks(places, part.layer, rotation=90, fontsize=8)
            axis.grid(axis="x", visible=False)
        left.set_ylabel("variance of log2 of the range\n(1: a factor of two)")
        right.set_ylabel("squared error / DFSQ's\n(lower is better)")
    axes[0, 0].legend(fontsize=10, title="between")
    axes[0, 1].legend(fontsize=10, title="statistics")
    return figure


def ridges(values, channels, images):
    """Distributions of some channels under several normalizations, an outline an image.

    Parameters
    ----------
    values : dict of str to array, shape (images, channels, samples)
        By normalization; within [-1, 1], or [0, 1] behind a ReLU.
    channels, images : sequences of str
        Their names. The colours of more than eight images repeat.
    """
    figure, axes = plt.subplots(
        len(channels), len(values), figsize=(11, max(4.2, 1.4 + 1.1 * len(channels))),
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    shades = BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK
    signed = min(float(v.min()) for v in values.values()) < 0
    edges = np.linspace(-1 if signed else 0, 1, 65)
    for column, (name, maps) in zip(axes.T, values.items(), strict=True):
        column[0].set_title(name)
        for axis, channel in zip(column, range(len(channels)), strict=True):
            for image, shade in zip(range(len(images)), cycle(shades), strict=False):
                share = np.histogram(maps[image, channel], edges)[0] / maps.shape[2]
                axis.stairs(share, edges, color=shade, lw=1.3, label=images[image])
                axis.stairs(share, edges, color=shade, alpha=0.45 / len(images), fill=True)
            axis.set_yscale("log")
            axis.set_ylim(0.5 / maps.shape[2], 1.5)
            axis.yaxis.set_minor_locator(NullLocator())
    for axis, channel in zip(axes[:, 0], channels, strict=True):
        axis.set_ylabel(channel)
    figure.supxlabel("value, in units of the normalization", fontsize=12)
    figure.supylabel("share of values (a bin: 1/64 of the axis)", fontsize=12)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(images))
    return figure


def heat_map(tables, label):
    """Layer by channel, one panel a kind of layer, in a scale centred at 0.

    Parameters
    ----------
    tables : dict of str to pandas.DataFrame
        Titles, and values with the layers as rows and the channels as columns.
    label : str
        Of the colours.
    """
    rows = [len(table) for table in tables.values()]
    figure, axes = plt.subplots(
        len(tables), 1, figsize=(10, 1.2 + 0.23 * sum(rows) + 0.6 * len(tables)),
        height_ratios=rows, sharex=True, squeeze=False,
    )  # fmt: skip
    finite = np.concatenate([t.to_numpy().ravel() for t in tables.values()])
    most = float(np.nanmax(np.abs(finite[np.isfinite(finite)])))
    for axis, (title, table) in zip(axes[:, 0], tables.items(), strict=True):
        shown = axis.imshow(
            table, cmap="vlag", vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
        )
        axis.set_title(title)
        axis.set_yticks(range(len(table)), table.index, fontsize=9)
        axis.grid(visible=False)
        axis.set_facecolor("#DDDDDD")  # where a channel is silent
    axes[-1, 0].set_xlabel("channel")
    figure.colorbar(shown, ax=list(axes[:, 0]), label=label, shrink=0.7, pad=0.01)
    return figure


# --- universal sets ---------------------------------------------------------------------------


def point_sets(sets):
    """The non-negative points of universal sets, a row a set.

    Parameters
    ----------
    sets : dict of str to array
        Names and points.
    """
    figure, axis = plt.subplots(figsize=(10, 0.9 + 0.42 * len(sets)))
    for row, (name, points) in enumerate(sets.items()):
        shade = BLUE if name.startswith("found") else BLACK
        axis.plot(points, np.full(len(points), row), "|", color=shade, ms=13, mew=0.9)
    axis.set_yticks(range(len(sets)), [f"{n} ({len(p)} points)" for n, p in sets.items()])
    axis.set_ylim(len(sets) - 0.5, -0.5)
    axis.set_xticks(np.linspace(0, 1, 5))
    axis.set_xlabel("point")
    axis.grid(axis="y", visible=False)
    return figure


def point_frequency(table):
    """How often channels choose each point, a panel a kind of layer.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``kind``, ``point``, ``share`` (0..1) of the channels.
    """
    kinds = list(table.kind.unique())
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(10, 0.8 + 2.3 * len(kinds)), sharex=True, squeeze=False
    )
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        part = table[table.kind == kind]
        axis.vlines(part.point, 0, 100 * part.share, color=BLUE, lw=1.6)
        axis.plot(part.point, np.zeros(len(part)), "|", color=GREY, ms=5, mew=0.6)
        axis.set_title(kind)
        axis.set_ylabel("channels that\nchoose it, %")
        axis.set_ylim(bottom=0)
    axes[-1, 0].set_xlabel("point of the universal set")
    return figure


def pareto(table, named):
    """Error against operations of word sets, and which of them no other beats.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``panel``, ``operations`` (a multiplication), ``error`` (over that of a
        reference set), ``front`` (bool).
    named : pandas.DataFrame
        Columns ``panel``, ``name``, ``operations``, ``error``, drawn on top.
    """
    panels, names = list(table.panel.unique()), list(named.name.unique())
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.6), squeeze=False)
    palette = dict(zip(names, (BLACK, ORANGE, RED, BLUE, GREEN, PURPLE), strict=False))
    markers = dict(zip(names, "sPDo*^", strict=False))
    for axis, panel in zip(axes[0], panels, strict=True):
        part = table[table.panel == panel]
        front = part[part.front].sort_values("operations")
        axis.plot(part.operations, part.error, ".", color="#B0B0B0", ms=6, label="tried")
        axis.step(front.operations, front.error, where="post", color=SKY, lw=1.4, label="front")
        for row in named[named.panel == panel].itertuples():
            axis.plot(
                row.operations, row.error, markers[row.name], color=palette[row.name],
                ms=14 if markers[row.name] == "*" else 10, mec="white", label=row.name,
            )  # fmt: skip
        _log_axis(axis, "y")
        axis.set_title(panel)
        axis.set_xlabel("shifts and additions a multiplication\n(fewer is better)")
    axes[0, 0].set_ylabel("squared error / that of DFSQ's set\n(lower is better)")
    axes[0, 0].legend(fontsize=10)
    return figure


# --- costs ------------------------------------------------------------------------------------

#: Colour of each part of a cost.
COST_COLORS = {
    "multiplications": BLUE, "accumulation": SKY, "scaling of partial sums": RED,
    "scaling of outputs": GREEN, "scaling of weights": PURPLE, "statistics, look-up": ORANGE,
    "maps": BLUE, "skip connections": SKY, "weights": RED,
    "codes": BLUE, "codebooks": ORANGE, "scales": RED, "inputs": GREEN, "bias": GREY,
}  # fmt: skip


def cost_ranges(table):
    """Several costs of several schemes as shares of the float network's, with their bounds.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``cost``, ``scheme``, ``least`` and ``most`` (1: as the float network), drawn from
        top to bottom in the order of the rows.
    """
    costs, schemes = list(table.cost.unique()), list(table.scheme.unique())
    palette = dict(zip(schemes, (GREY, BLACK, RED, PURPLE, ORANGE), strict=False))
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.85 * len(costs)))
    for i, scheme in enumerate(schemes):
        part = table[table.scheme == scheme]
        y = [costs.index(c) + 0.17 * (i - (len(schemes) - 1) / 2) for c in part.cost]
        axis.hlines(y, 100 * part["least"], 100 * part["most"], color=palette[scheme], lw=3)
        middle = 100 * np.sqrt(part["least"] * part["most"])
        axis.plot(middle, y, "so^vD"[i % 5], color=palette[scheme], ms=7, label=scheme)
    axis.axvline(100, color=BLACK, lw=1.3, ls=":")
    _log_axis(axis, "x")
    axis.set_xlabel("% of the float network's (lower is better)")
    axis.set_yticks(range(len(costs)), costs)
    axis.set_ylim(len(costs) - 0.5, -0.5)
    figure.legend(loc="outside upper center", ncols=2, fontsize=11)
    return figure


def stored_bits(table):
    """Bits stored for each weight by what they are for, a panel a width, a bar a method.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``bits``, ``method``, and bits a weight: ``codes``, ``codebooks``, ``scales``,
        ``inputs``, ``bias``.
    """
    widths, methods = list(table.bits.unique()), list(table.method.unique())
    names = {
        "codes": "codes of weights",
        "codebooks": "their codebooks",
        "scales": "their scales",
        "inputs": "codebooks of activations",
        "bias": "biases",
    }
    columns = min(2, len(widths))
    rows = -(-len(widths) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 1 + (0.7 + 0.36 * len(methods)) * rows),
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axis in axes.flat[len(widths) :]:
        axis.set_axis_off()
    for axis, width in zip(axes.flat, widths, strict=False):
        part = table[table.bits == width].set_index("method").reindex(methods)
        left = np.zeros(len(methods))
        for name, label in names.items():
            axis.barh(methods, part[name], left=left, color=COST_COLORS[name], label=label)
            left = left + part[name].to_numpy()
        axis.axvline(width, color=BLACK, lw=1)
        axis.set_title(f"{width} bits")
        axis.grid(axis="y", visible=False)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("bits stored a weight (lower is better)", fontsize=12)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def shifts_by_layer(table):
    """Shifts and additions of a multiplication, and multiplications by 0, by layer.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``layer``, ``kind``, ``shifts``, ``adds``, ``zeros`` (0..1) and
        ``shifts of points``, the codebooks' own mean.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for kind, shade, marker in zip(table.kind.unique(), (BLUE, ORANGE), "os", strict=False):
        part = table[table.kind == kind]
        x = part.index
        left.plot(x, part.shifts, "-", marker=marker, color=shade, label=f"shifts, {kind}")
        left.plot(x, part.adds, ":", marker=marker, ms=4, color=shade, label=f"additions, {kind}")
        left.plot(x, part["shifts of points"], "--", color=shade, alpha=0.6, lw=1.2)
        right.plot(x, 100 * part.zeros, "-", marker=marker, color=shade, label=kind, clip_on=False)
    left.plot([], [], "--", color=GREY, lw=1.2, label="shifts, mean of the points")
    left.set_ylabel("a multiplication (lower is better)")
    right.set_ylabel("multiplications by 0, %")
    for axis in (left, right):
        axis.set_xlabel("layer, in order")
        axis.set_ylim(bottom=0)
    left.set_ylim(top=1.45 * max(table.shifts.max(), table["shifts of points"].max()))
    left.legend(fontsize=9, ncols=2, loc="upper center")
    right.legend(fontsize=10)
    return figure


def energy_bars(table):
    """Energy of several schemes by part, a panel a group, least above most.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``scheme``, ``group``, ``part``, ``least`` and ``most`` in joules. Schemes that
        begin with ``float`` may run out of the panel; their energy is then written there.
    """
    groups, schemes = list(table.group.unique()), list(table.scheme.unique())
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, len(groups) * (1.6 + 0.42 * len(schemes)))
    )
    for axis, group in zip(np.atleast_1d(axes), groups, strict=True):
        part = table[table.group == group]
        totals = part.groupby("scheme")[["least", "most"]].sum()
        inside = [s for s in schemes if not s.startswith("float")]
        end = 1000 * 1.15 * totals.loc[inside, "most"].max()
        for row, scheme in enumerate(schemes):
            own = part[part.scheme == scheme].groupby("part", sort=False)[["least", "most"]].sum()
            for side, place in (("least", row - 0.19), ("most", row + 0.19)):
                left = 0.0
                for name, joules in own[side].items():
                    axis.barh(
                        place, 1000 * joules, 0.36, left=left, color=COST_COLORS[name],
                        alpha=1 if side == "most" else 0.6, lw=0,
                    )  # fmt: skip
                    left += 1000 * joules
                if left > end:
                    axis.text(
                        0.985 * end, place, f"{left:.0f} mJ →", va="center", ha="right",
                        color="white", fontsize=10, fontweight="bold",
                    )  # fmt: skip
        for name in part.part.unique():
            axis.barh(0, 0, color=COST_COLORS[name], label=name)
        axis.set_xlim(0, end)
        axis.set_yticks(range(len(schemes)), schemes)
        axis.set_ylim(len(schemes) - 0.45, -0.55)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("millijoules an image (lower is better)")
        axis.set_title(group, loc="left", pad=52)
        axis.legend(fontsize=10, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return figure


def psnr_by_storage(table, levels, depth=5):
    """PSNR against bits stored for each weight, a panel a data set, a line a method.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``dataset``, ``method``, ``bits``, ``stored``, ``psnr``.
    levels : dict of str to float
        PSNR of the float network on each data set.
    depth : float
        Loss in dB down to which panels reach.
    """
    datasets = list(table.dataset.unique())
    figure, axes = plt.subplots(1, len(datasets), figsize=(5.3 * len(datasets), 4.4), squeeze=False)
    for axis, dataset in zip(axes[0], datasets, strict=True):
        axis.axhline(levels[dataset], color=color("float"), lw=1.3, ls=":", label="float")
        for method in table.method.unique():
            part = table[(table.dataset == dataset) & (table.method == method)]
            part = part.sort_values("bits")
            axis.plot(
                part.stored, part.psnr, marker=MARKERS.get(method, "o"), color=color(method),
                label=method,
            )  # fmt: skip
        axis.set_ylim(max(axis.get_ylim()[0], levels[dataset] - depth), levels[dataset] + 0.3)
        axis.set_title(dataset)
        axis.set_xlabel("bits stored a weight (lower is better)")
    axes[0, 0].set_ylabel("PSNR-Y, dB (higher is better)")
    axes[0, 0].legend(loc="lower right", fontsize=10)
    return figure
