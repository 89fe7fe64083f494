"""A network and its quantized version side by side on photographs: numbers, and what to look at."""

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..files import write_whole
from ..sr.datasets import check_images
from ..sr.imaging import psnr_y, ssim_y
from ..sr.upscaling import Bicubic, running_on, upscale
from . import figures

#: Side of the enlarged crop in LR pixels.
CROP = 32


def compare(float_model, quantized_model, pairs, folder, *, label="quantized", progress=True):
    """Compare a network with its quantized version, image by image.

    By the protocol of :func:`dfsq.study.benchmark.evaluate`. For each image a strip
    ``NAME.png`` is written: the whole photograph, and the crop in which the two networks differ
    most as HR, by bicubic, by both networks, and their difference. The table is written as
    ``comparison.csv`` when all are done.

    Parameters
    ----------
    float_model, quantized_model : nn.Module
        RGB 0..1 in and out; the float one with an attribute ``scale``.
    pairs : list of dfsq.sr.datasets.ImagePair
    folder : path
        Made if it is not there; files of the same names are replaced.
    label : str
        Title of the quantized network's crop.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    pandas.DataFrame
        A row an image: ``image``; ``psnr_bicubic``, ``psnr_float``, ``psnr_quantized`` and
        ``loss``, which is float's less quantized's, in dB; ``ssim_bicubic``, ``ssim_float``,
        ``ssim_quantized``.

    Raises
    ------
    ValueError
        See :func:`check_pairs`.
    OSError
        If `folder` cannot be written to.
    """
    scale = float_model.scale
    check_pairs(pairs, scale)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    models = {"bicubic": Bicubic(scale), "float": float_model, "quantized": quantized_model}
    rows = []
    for pair in tqdm(pairs, "comparing", disable=not progress, unit="image"):
        with running_on(pair.name, *pair.lr.shape[1::-1]):
            results = {name: upscale(model, pair.lr) for name, model in models.items()}
        psnr = {name: psnr_y(result, pair.hr, scale) for name, result in results.items()}
        ssim = {name: ssim_y(result, pair.hr, scale) for name, result in results.items()}
        # both may be infinite, on an image of one colour
        loss = 0.0 if psnr["float"] == psnr["quantized"] else psnr["float"] - psnr["quantized"]
        figure = figures.comparison(
            {"HR": pair.hr}
            | {
                f"{label if name == 'quantized' else name}\n{psnr[name]:.2f} dB": result
                for name, result in results.items()
            },
            most_different(results["float"], results["quantized"], CROP * scale),
        )
        write_whole(
            folder / f"{pair.name}.png",
            lambda path, f=figure: f.savefig(path, format="png", bbox_inches="tight"),
        )
        rows.append(
            {"image": pair.name}
            | {f"psnr_{name}": value for name, value in psnr.items()}
            | {"loss": loss}
            | {f"ssim_{name}": value for name, value in ssim.items()}
        )
    table = pd.DataFrame(rows)
    write_whole(
        folder / "comparison.csv",
        lambda path: table.to_csv(path, index=False, float_format="%.6f"),
    )
    return table


def check_pairs(pairs, scale):
    """Refuse images that are too small to be measured, and two of one name, as data sets do.

    Parameters
    ----------
    pairs : list of dfsq.sr.datasets.ImagePair
    scale : int

    Raises
    ------
    ValueError
        Names the image.
    """
    check_images([(pair.name, pair.hr) for pair in pairs], scale)


def most_different(a, b, size):
    """The square in which two images differ most, by their squared difference.

    Parameters
    ----------
    a, b : uint8 array, shape (H, W, 3)
    size : int
        Side of the square in pixels; less in a smaller image.

    Returns
    -------
    x, y, size : int
    """
    size = min(size, *a.shape[:2])
    error = ((a.astype(np.int64) - b) ** 2).sum(axis=2)
    sums = np.pad(error, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    y, x = np.unravel_index(inside.argmax(), inside.shape)
    return int(x), int(y), size


def with_mean(table):
    """A table of :func:`compare` for reading: images as index, measures above, the mean below.

    An image with an infinite PSNR, as one of a single colour has, is left out of the mean.
    """
    table = table.set_index("image").rename(columns={"loss": "psnr_loss"})
    finite = table[np.isfinite(table).all(axis=1)]
    label = "mean" if len(finite) == len(table) else f"mean of {len(finite)}"
    table = pd.concat([table, finite.mean().to_frame(label).T])  # an image may be called mean
    names = {"psnr": "PSNR-Y, dB", "ssim": "SSIM-Y"}
    split = [column.split("_") for column in table.columns]
    table.columns = pd.MultiIndex.from_tuples([(names[kind], of) for kind, of in split])
    return table.rename_axis(None)
