"""Tables of results as a reader wants them: losses with intervals, the best of a group marked."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from ..convert import float_digest
from ..sr.datasets import BENCHMARK_SETS
from ..sr.fetch import files_of, registry
from ..sr.zoo import ENTRIES, WEIGHTS_FOLDER, load_model, trained_names
from .benchmark import CALIBRATION, PROTOCOL_VERSION, method_version, standard_grid

PAPER_FILE = Path(__file__).resolve().parents[2] / "data" / "paper.csv"

#: Upper ends, in dB, of the ranges of loss by which rounding is told.
LOSS_RANGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, np.inf)


def published():
    """Published values, each with its protocol and source; none of them measured here.

    Returns
    -------
    pandas.DataFrame
        A row a method, network and source; a column a data set with the PSNR-Y in dB.
    """
    table = pd.read_csv(PAPER_FILE, keep_default_na=False)
    by = [c for c in table.columns if c not in ("dataset", "psnr")]
    wide = table.pivot(index=by, columns="dataset", values="psnr")[list(BENCHMARK_SETS)]
    order = table[by].drop_duplicates()
    return wide.loc[pd.MultiIndex.from_frame(order)].reset_index().rename_axis(columns=None)


def networks(names):
    """What the networks of the tables are, and whose weights they have.

    Parameters
    ----------
    names : iterable of str
        Of :func:`dfsq.sr.zoo.model_names`.

    Returns
    -------
    pandas.DataFrame
        Indexed by name: ``network`` (its architecture), ``trained by``, ``began as`` (whose weights
        the training of one of ours began with, else empty) and ``from`` (the repository of
        published weights, else empty).
    """
    found = {}
    for name in names:
        entry, began, address = ENTRIES[name], "", ""
        if entry.embedded:
            run = json.loads((WEIGHTS_FOLDER / f"{name}.json").read_text())
            while (run := run["initial"]) and run["name"] == name:  # an earlier run of its own
                pass
            began = run["name"] if run else ""
        else:
            raw = r"https://raw\.githubusercontent\.com/([^/]+/[^/]+)/"
            url = registry().url[entry.file]
            match = re.match(raw, url)
            address = f"https://github.com/{match[1]}" if match else url.rsplit("/", 1)[0]
        found[name] = (entry.network, entry.trained_by, began, address)
    columns = ["network", "trained by", "began as", "from"]
    return pd.DataFrame.from_dict(found, "index", columns=columns)


def current(results):
    """Rows of the current versions and, for the project's own networks, of the weights they have.

    Parameters
    ----------
    results : pandas.DataFrame
        Of a :class:`dfsq.study.benchmark.Store`.

    Returns
    -------
    pandas.DataFrame
        Those of `results` that stand.
    """
    digests = {
        name: float_digest(load_model(name))[:16] for name in {*results.model} & {*trained_names()}
    }
    pairs = zip(results.model, results.weights_digest, strict=True)
    stale = [digests.get(name, digest) != digest for name, digest in pairs]
    return results[
        ~np.array(stale, dtype=bool)
        & (results.method_version == results.method.map(method_version))
        & (results.protocol_version == PROTOCOL_VERSION)
    ]


def whole_sets(results):
    """Rows of :func:`current` on whole benchmark sets, with default seed and calibration.

    Parameters
    ----------
    results : pandas.DataFrame
        Of a :class:`dfsq.study.benchmark.Store`.

    Raises
    ------
    ValueError
        If two rows of a cell stand, of other weights or images: one of them is stale.
    """
    sizes = {name: len(files_of(name)) for name in BENCHMARK_SETS}
    rows = current(results)
    rows = rows[
        (rows.images == rows.dataset.map(sizes))
        & (rows.seed == 0)
        & (rows.draw == 0)
        & rows.calibration.isin(["", CALIBRATION])
    ]
    cell = ["model", "dataset", "layers", "method", "bits"]
    twice = rows[rows.duplicated(cell, keep=False)]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(
            f"two rows of {row.model}, {row.dataset}, {row.method}, {row.bits} bits stand; "
            "remove the one of older weights or images"
        )
    return rows


def absent(results):
    """What of the standard grid the results do not hold yet, by name.

    Returns
    -------
    pandas.DataFrame
        Columns ``model``, ``layers``, ``bits``, ``dataset`` and ``method``; rows that differ in
        one of the last three only are listed as one.
    """
    sizes = {name: len(files_of(name)) for name in BENCHMARK_SETS}
    names = ["model", "layers", "method", "bits", "seed", "draw", "dataset"]
    held = current(results)[[*names, "calibration", "images"]]
    held = set(held.itertuples(index=False, name=None))
    missing = [
        cell
        for cell in standard_grid()
        if (
            *(getattr(cell, n) for n in names),
            cell.calibrated_on,
            cell.limit or sizes[cell.dataset],
        )
        not in held
    ]
    table = pd.DataFrame([{n: getattr(c, n) for n in names} for c in missing], columns=names)
    other = [c.seed > 0 or c.draw > 0 or c.calibrated_on not in ("", CALIBRATION) for c in missing]
    table.loc[other, "method"] += " (other seeds or crops)"

    def listed(values):
        return ", ".join(map(str, dict.fromkeys(values)))

    for columns, column in (
        (["model", "layers", "method", "bits"], "dataset"),
        (["model", "layers", "method", "dataset"], "bits"),
        (["model", "layers", "bits", "dataset"], "method"),
    ):
        table = table.groupby(columns, sort=False)[column].agg(listed).reset_index()
    return table


def by_image(images):
    """PSNR-Y of each row, image by image.

    Parameters
    ----------
    images : pandas.DataFrame
        The per-image values of a :class:`dfsq.study.benchmark.Store`.

    Returns
    -------
    dict of str to pandas.Series
        By ``id`` of the row, in dB, indexed by the image's name: differences of two are paired.
    """
    return {name: part.set_index("image").psnr for name, part in images.groupby("id")}


def losses(rows, images):
    """Loss against float of each row, in dB, with a paired interval over images.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of results; the ``float`` row of each network and data set must be among them.
    images : pandas.DataFrame
        The per-image values of the store.

    Returns
    -------
    pandas.DataFrame
        `rows` but for float and bicubic, with columns ``loss``, ``low`` and ``high``: the
        :func:`estimate` of the images' differences, network and method being compared on the same
        images.
    """
    psnr = by_image(images)
    full = rows[rows.method == "float"].set_index(["model", "dataset"]).id
    found = []
    for row in rows[~rows.method.isin(["float", "bicubic"])].to_dict("records"):
        loss = estimate(psnr[full[row["model"], row["dataset"]]] - psnr[row["id"]])
        found.append(row | {"loss": loss.mean, "low": loss.low, "high": loss.high})
    return pd.DataFrame(found, columns=[*rows.columns, "loss", "low", "high"])


def repeated(rows, images, repeats):
    """Losses of rows that were computed with another rounding of sums as well.

    Parameters
    ----------
    rows, images : pandas.DataFrame
        See :func:`losses`.
    repeats : pandas.DataFrame
        Of the store.

    Returns
    -------
    pandas.DataFrame
        As of :func:`losses`, a row a repeat, with a column ``change``: the standing row's PSNR less
        that of the repeat, in dB.
    """
    found = losses(rows, images)
    if repeats.empty:
        return found.iloc[:0].assign(change=0.0)
    found = found.merge(repeats[["id", "psnr"]], on="id", suffixes=("", "_before"))
    return found.assign(change=found.psnr - found.pop("psnr_before"))


def rounding(rows, images, repeats):
    """The most that another rounding of sums changed the PSNR of a row, by how much it loses.

    Parameters
    ----------
    rows, images, repeats : pandas.DataFrame
        See :func:`repeated`.

    Returns
    -------
    pandas.Series
        In dB, of the rows on Set5 that lose no more than its index, the ends of ``LOSS_RANGES``;
        not a number where there are none. A smaller difference between two rows in single
        precision is not decided by its interval, which knows of the images only.
    """
    twice = repeated(rows[rows.dataset == "Set5"], images, repeats)
    ends = pd.cut(twice.loss, [-np.inf, *LOSS_RANGES])
    most = twice.change.abs().groupby(ends, observed=False).max()
    return most.cummax().ffill().set_axis(LOSS_RANGES)


def beyond_rounding(change, loss, most):
    """Whether a change of PSNR is larger than rounding was seen to make.

    Parameters
    ----------
    change : float or float array
        In dB.
    loss : float or float array
        Of the worse of the two rows, in dB.
    most : pandas.Series
        Of :func:`rounding`.

    Returns
    -------
    bool or bool array
    """
    return np.abs(change) > most.to_numpy()[most.index.searchsorted(loss)]


class Estimate(NamedTuple):
    """A mean and its confidence interval; as text both, in the format given: ``f"{change:+.3f}"``.

    Attributes
    ----------
    mean, low, high : float
    """

    mean: float
    low: float
    high: float

    def __format__(self, form):
        return "{0:{3}} [{1:{3}}, {2:{3}}]".format(*self, form)


def estimate(values, level=0.95):
    """Mean of values with its confidence interval, by Student's t distribution.

    Of samples as small as the five images of Set5 a bootstrap percentile interval would be too
    narrow, and hold the mean less often than it says.

    Parameters
    ----------
    values : float array, shape (n,)
        For a change from one row to another, its PSNR image by image less that of the other.
    level : float
        Share of the samples whose interval holds the mean, if values are drawn independently from
        a normal distribution.

    Returns
    -------
    Estimate
        The interval is infinite for a single value, which says nothing of how others differ from
        it.

    Raises
    ------
    ValueError
        If there are no values, or one is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from dfsq.study.tables import estimate
    >>> f"{estimate(np.array([0.10, 0.12, 0.11, 0.30])):.3f}"
    '0.158 [0.006, 0.309]'
    """
    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("an interval needs values, all of them finite")
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, -np.inf, np.inf)
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean)
    found = ttest_1samp(values, 0).confidence_interval(level)
    return Estimate(mean, float(found.low), float(found.high))


def by_dataset(rows, value, form, methods):
    """A table with a row a width and method, a column a data set, the best of each marked.

    Parameters
    ----------
    rows : pandas.DataFrame
        With columns ``dataset``, ``method``, ``bits`` and those that `form` names.
    value : str
        Column that ranks: the highest ``psnr`` is best, the lowest of any other.
    form : str
        Format of a cell, such as ``"{psnr:.2f} / {ssim:.4f}"``.
    methods : sequence of str
        In the order in which they are shown; ``float``, ``bicubic`` and ``free`` take no part in
        the ranking.

    Returns
    -------
    pandas.io.formats.style.Styler
        The best of each width and data set is bold, the second best underlined.
    """
    order = {method: i for i, method in enumerate(methods)}
    shown = rows[rows.method.isin(order)].copy()
    shown["text"] = [form.format(**row) for row in shown.to_dict("records")]
    shown["rank"] = (
        shown.where(~shown.method.isin(["float", "bicubic", "free"]))
        .groupby(["dataset", "bits"])[value]
        .rank(ascending=value != "psnr", method="min")
    )
    datasets = [name for name in BENCHMARK_SETS if name in set(shown.dataset)]
    datasets += sorted(set(shown.dataset) - set(datasets))
    tables = {
        name: shown.pivot(index=["bits", "method"], columns="dataset", values=name)
        .reindex(columns=datasets)
        .sort_index(key=lambda level: -level if level.name == "bits" else level.map(order))
        for name in ("text", "rank")
    }
    text, rank = tables["text"], tables["rank"]
    rivals = shown[shown["rank"].notna()].groupby("bits").method.nunique()
    few = [bits for bits, _ in rank.index if rivals.get(bits, 0) < 3]
    rank = rank.drop(index=few, level="bits").reindex(rank.index)  # of two, nothing is marked
    styles = {1: "font-weight: bold", 2: "text-decoration: underline"}
    marks = rank.apply(lambda column: column.map(lambda place: styles.get(place, "")))
    text.columns.name = marks.columns.name = None
    return text.style.format(na_rep="–").apply(lambda _: marks, axis=None)
