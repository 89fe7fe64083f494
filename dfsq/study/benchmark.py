"""The grid of networks, data sets, methods and bit-widths, and the store of its results.

A row is a network on a data set under a configuration; its key holds the digests of all that
determines the numbers, so that a row which stands never has to be computed again, and none that
is stale can stand. Rows are appended as they finish; a killed run loses the row in work.
"""

import hashlib
import os
import platform
import time
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from .. import sr
from ..calibration import Calibration, calibrate, needs_inputs
from ..config import Config
from ..convert import float_digest, quantize
from ..histogram import edges_for
from ..sr.datasets import pixel_digest
from ..sr.imaging import psnr_y, ssim_y
from ..sr.upscaling import Bicubic, upscale
from ..universal import universal_set

#: Raised when the output of a method changes, so that older rows no longer stand.
METHOD_VERSION = 1
#: Raised when the measurement changes.
PROTOCOL_VERSION = 1

RESULTS_FOLDER = Path(__file__).resolve().parents[2] / "data" / "results"

KEY = [
    "model",
    "dataset",
    "method",
    "bits",
    "seed",
    "images",
    "weights_digest",
    "pixel_digest",
    "calibration_digest",
    "config_digest",
    "method_version",
    "protocol_version",
]

#: Columns to be read as text, even where a digest or a name is all digits.
TEXT = ["id", "image", "model", "dataset", "method", *(k for k in KEY if k.endswith("_digest"))]


@dataclass(frozen=True)
class Cell:
    """One cell of the grid.

    Attributes
    ----------
    model, dataset : str
        As :func:`dfsq.sr.zoo.load_model` and :func:`dfsq.sr.datasets.load_dataset` take them.
    method : str
        A preset, see :meth:`dfsq.Config.preset`; ``"bicubic"`` for plain upscaling.
    bits : int
    seed : int
        Of the calibration draw and of K-means.
    limit : int, optional
        Number of images of the data set, from its first.
    """

    model: str
    dataset: str = "photographs"
    method: str = "dfsq-subset"
    bits: int = 4
    seed: int = 0
    limit: int | None = None


def evaluate(model, pairs, *, progress=False):
    """PSNR and SSIM of a network on each image of a data set, by the standard protocol.

    Whole images, one at a time; the output is clipped and rounded to 8 bits; luma of BT.601;
    ``scale`` pixels shaved off each side.

    Parameters
    ----------
    model : nn.Module
        RGB 0..1 in and out, with an attribute ``scale``.
    pairs : list of dfsq.sr.datasets.ImagePair

    Returns
    -------
    pandas.DataFrame
        A row an image: ``image``, ``psnr`` in dB, ``ssim``.
    """
    rows = []
    for pair in tqdm(pairs, "evaluating", disable=not progress, unit="image"):
        result = upscale(model, pair.lr)
        rows.append(
            {
                "image": pair.name,
                "psnr": psnr_y(result, pair.hr, model.scale),
                "ssim": ssim_y(result, pair.hr, model.scale),
            }
        )
    return pd.DataFrame(rows)


def grid(models, datasets, methods, bits, seeds=(0,), limit=None):
    """All cells of a grid; float and bicubic once, not for each bit-width."""
    cells = []
    for model, dataset, method, width, seed in product(models, datasets, methods, bits, seeds):
        if method in ("float", "bicubic"):
            width, seed = 32, 0
        elif method.startswith("sq") and width > 4:
            continue  # its universal set has 15 magnitudes
        cell = Cell(model, dataset, method, width, seed, limit)
        if cell not in cells:
            cells.append(cell)
    return cells


class Store:
    """Rows of results in a folder: ``results.csv``, ``images.csv`` and ``provenance.csv``.

    Parameters
    ----------
    folder : path
        Where rows are read and written; the project's own by default.
    standing : path, optional
        A folder whose rows stand too, but which is never written to.
    """

    TABLES = {"images": ["id", "image"], "provenance": ["id"], "results": KEY}  # noqa: RUF012

    def __init__(self, folder=RESULTS_FOLDER, standing=None):
        self.folder = Path(folder)
        for name, by in self.TABLES.items():
            table = pd.DataFrame()
            for source in filter(None, (standing, folder)):
                path = Path(source) / f"{name}.csv"
                if path.exists():
                    rows = pd.read_csv(path, keep_default_na=False, dtype=dict.fromkeys(TEXT, str))
                    table = _joined(table, rows, by)
            setattr(self, name, table)

    def find(self, identifier):
        """The row of an identifier, a Series, or None."""
        if self.results.empty:
            return None
        found = self.results[self.results["id"] == identifier]
        return None if found.empty else found.iloc[0]

    def add(self, key, per_image, seconds, device="cpu"):
        """Add a finished row; files are replaced whole, so a kill leaves the old ones."""
        identifier = row_id(key)
        row = {
            "id": identifier,
            **key,
            "psnr": per_image.psnr.mean(),
            "ssim": per_image.ssim.mean(),
        }
        provenance = {
            "id": identifier,
            "seconds": round(seconds, 1),
            "date": date.today().isoformat(),
            "device": device,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        images = per_image.assign(id=identifier)[["id", "image", "psnr", "ssim"]]
        new = {"images": images, "provenance": [provenance], "results": [row]}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, by in self.TABLES.items():  # results last: what is there has all the rest
            table = _joined(getattr(self, name), pd.DataFrame(new[name]), by)
            setattr(self, name, table)
            path = self.folder / f"{name}.csv"
            temporary = path.with_suffix(".part")
            table.to_csv(temporary, index=False, float_format="%.6f")
            os.replace(temporary, path)


def _joined(old, new, by):
    """Rows in order; those of the new identifiers that a killed run left behind are replaced."""
    if not old.empty:
        new = pd.concat([old[~old["id"].isin(new["id"])], new], ignore_index=True)
    return new.sort_values(by, kind="stable", ignore_index=True)


def row_id(key):
    """Short name of a key, for joining the files of the store."""
    text = "|".join(f"{name}={key[name]}" for name in KEY)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Bench:
    """Computes cells, sharing networks, data sets and calibrations between them."""

    def __init__(self, store=None, calibration="photographs", crops=32, crop_size=None):
        self.store = Store() if store is None else store
        self.calibration = calibration
        self.crops = crops
        self.crop_size = crop_size
        self.keep_inputs = False  # whether every calibration spills its inputs, see `run`
        self._models, self._datasets, self._crops, self._calibrations = {}, {}, {}, {}

    def model(self, name):
        """The float network of a name, loaded once."""
        if name not in self._models:
            self._models[name] = sr.load_model(name)
        return self._models[name]

    def dataset(self, name, scale, limit=None):
        """The image pairs of a data set, loaded once."""
        key = (name, scale, limit)
        if key not in self._datasets:
            self._datasets[key] = sr.load_dataset(name, scale, limit)
        return self._datasets[key]

    def crop_images(self, scale, seed):
        """The calibration crops of a draw, made once."""
        key = (scale, seed)
        if key not in self._crops:
            self._crops[key] = sr.calibration_crops(
                self.calibration, scale, self.crops, self.crop_size, seed
            )
        return self._crops[key]

    def calibrated(self, name, config, seed):
        """The calibration of a network, shared by all configurations of one grid of cells."""
        model = self.model(name)
        edges = edges_for(universal_set(config.universal, config.words))
        key = (name, seed, edges.tobytes())
        keep_inputs = self.keep_inputs or needs_inputs(config)
        have = self._calibrations.get(key)
        if have is None or (keep_inputs and not have.keeps_inputs):
            self._calibrations = {}  # of spilled inputs there is room for one
            images = self.crop_images(model.scale, seed)
            have = calibrate(model, images, config, keep_inputs=keep_inputs, progress=False)
            self._calibrations[key] = have
        return have

    def config(self, cell):
        """The configuration of a cell, with the network's layers, which its rows are keyed by."""
        layers = getattr(self.model(cell.model), "body_layers", None)
        return Config.preset(cell.method, cell.bits, seed=cell.seed, layers=layers)

    def quantized(self, cell):
        """The quantized network of a cell; the float one for ``float``."""
        model, config = self.model(cell.model), self.config(cell)
        if config.weight_bits == config.act_bits == 32:
            return model
        if config.act_bits == 32:
            calibration = Calibration({}, 0, "", None)
        else:
            calibration = self.calibrated(cell.model, config, cell.seed)
        return quantize(model, calibration, config, progress=False)

    def key(self, cell):
        """All that determines the numbers of a cell."""
        model = self.model(cell.model)
        pairs = self.dataset(cell.dataset, model.scale, cell.limit)
        plain = cell.method in ("float", "bicubic")
        crops = [] if plain else self.crop_images(model.scale, cell.seed)
        calibration = hashlib.sha256(b"".join(crop.tobytes() for crop in crops)).hexdigest()
        config = "" if plain else self.config(cell).to_json()
        return {
            "model": cell.model,
            "dataset": cell.dataset,
            "method": cell.method,
            "bits": cell.bits,
            "seed": cell.seed,
            "images": len(pairs),
            "weights_digest": float_digest(model)[:16],
            "pixel_digest": pixel_digest(pairs)[:16],
            "calibration_digest": "" if plain else calibration[:16],
            "config_digest": hashlib.sha256(config.encode()).hexdigest()[:16],
            "method_version": METHOD_VERSION,
            "protocol_version": PROTOCOL_VERSION,
        }

    def compute(self, cell):
        """Per-image PSNR and SSIM of a cell, computed now; see :func:`evaluate`."""
        model = self.model(cell.model)
        pairs = self.dataset(cell.dataset, model.scale, cell.limit)
        network = Bicubic(model.scale) if cell.method == "bicubic" else self.quantized(cell)
        return evaluate(network, pairs)

    def missing(self, cells):
        """The cells that the store does not hold yet."""
        cells = dict.fromkeys(cells)  # each once
        return [cell for cell in cells if self.store.find(row_id(self.key(cell))) is None]

    def run(self, cells, *, progress=True):
        """Compute the cells that the store does not hold yet, each stored as it is finished.

        Returns
        -------
        pandas.DataFrame
            The rows of all `cells`, in their order.
        """
        missing = self.missing(cells)
        self.keep_inputs = any(
            needs_inputs(self.config(c)) for c in missing if c.method not in ("float", "bicubic")
        )
        with tqdm(missing, "benchmark", disable=not progress, unit="row") as bar:
            for cell in bar:
                bar.set_postfix_str(f"{cell.model} {cell.dataset} {cell.method} {cell.bits} bits")
                began = time.perf_counter()
                per_image = self.compute(cell)
                self.store.add(self.key(cell), per_image, time.perf_counter() - began)
        identifiers = [row_id(self.key(cell)) for cell in cells]
        return self.store.results.set_index("id").loc[identifiers].reset_index()
