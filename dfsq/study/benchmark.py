"""The grid of networks, data sets, methods and bit-widths, and the store of its results.

A row is a network on a data set under a configuration; its key holds the digests of all that
determines the numbers, so that a row which stands never has to be computed again, and none that
is stale can stand. Rows are appended as they finish; a killed run loses the row in work.
"""

import copy
import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from tqdm import tqdm

from .. import sr
from ..calibration import Calibration, calibrate, find_layers, needs_inputs
from ..config import PRESETS, Config, with_all_layers
from ..convert import float_digest, quantize
from ..files import writable_folder, write_whole
from ..histogram import edges_for
from ..memory import freed_memory_kept
from ..sr.datasets import BENCHMARK_SETS, pixel_digest
from ..sr.imaging import psnr_y, ssim_y
from ..sr.upscaling import Bicubic, running_on, upscale
from ..sr.userfiles import is_user_function, user_function, user_sources
from ..sr.zoo import trained_names
from ..universal import universal_set
from .devices import choose_device
from .double import convolving_in_strips

#: Raised when the output of all methods changes, so that older rows no longer stand.
METHOD_VERSION = 1
#: The same of static ranges alone: extremes are those of all values, not of a sample, samples are
#: of all columns of the maps, and the least squared error is searched with each end by itself.
STATIC_RANGE_VERSION = 2
#: Raised when the measurement changes.
PROTOCOL_VERSION = 1

RESULTS_FOLDER = Path(__file__).resolve().parents[2] / "data" / "results"

#: Where the images stand that a network is calibrated on for the benchmark sets.
CALIBRATION = "BSDS500/train"

LAYERS = ("body", "all")

KEY = [
    "model",
    "dataset",
    "images",
    "layers",
    "method",
    "bits",
    "seed",
    "calibration",
    "draw",
    "weights_digest",
    "pixel_digest",
    "calibration_digest",
    "config_digest",
    "method_version",
    "protocol_version",
]

#: Columns to be read as text, even where a digest or a name is all digits.
TEXT = ["id", "image", "model", "dataset", "layers", "method", "calibration", "precision"]
TEXT += [name for name in KEY if name.endswith("_digest")]


@dataclass(frozen=True)
class Cell:
    """One cell of the grid.

    Attributes
    ----------
    model, dataset : str
        As :func:`dfsq.sr.zoo.load_model` and :func:`dfsq.sr.datasets.load_dataset` take them.
    method : str
        A preset, see :meth:`dfsq.Config.preset`, also with fields that differ, as in
        ``dfsq-exact:least_squares=false,damping=0.1``; ``"bicubic"`` for plain upscaling; or a
        function of the user's, ``FILE.py:NAME``, see :func:`dfsq.sr.userfiles.user_function`,
        which is called with the float network, the calibration crops, the bit-width and the seed,
        and returns the quantized network.
    bits : int
    seed : int
        Of K-means.
    limit : int, optional
        Number of images of the data set, from its first.
    layers : {"body", "all"}
        Only the network's body, as in the paper; or head, tail and upsampler as well, at 8 bits,
        the image evenly.
    calibration : str or path, optional
        As :func:`dfsq.sr.datasets.calibration_crops` takes it; by default ``CALIBRATION`` for a
        benchmark set, and the embedded photographs for all else.
    draw : int
        Seed of the draw of calibration crops.
    crops : int
        Number of calibration crops.
    crop_size : int, optional
        Their side in LR pixels; 192 HR pixels by default.
    """

    model: str
    dataset: str = "photographs"
    method: str = "dfsq-exact"
    bits: int = 4
    seed: int = 0
    limit: int | None = None
    layers: str = "body"
    calibration: str | None = None
    draw: int = 0
    crops: int = 32
    crop_size: int | None = None

    def __post_init__(self):
        if self.layers not in LAYERS:
            raise ValueError(f"layers must be one of {', '.join(LAYERS)}, not {self.layers!r}")
        if self.calibration is None:
            default = CALIBRATION if self.dataset in BENCHMARK_SETS else "photographs"
            object.__setattr__(self, "calibration", default)
        if self.draw < 0:
            raise ValueError(f"draw must be at least 0, not {self.draw!r}")

    @property
    def plain(self):
        """Whether nothing is quantized."""
        return self.method in ("float", "bicubic")

    @property
    def calibrated_on(self):
        """What rows say of the calibration: its source, and the crops if not the default ones."""
        if self.plain:
            return ""
        size = self.crop_size or "default"
        is_default = self.crops == 32 and self.crop_size is None
        return self.calibration if is_default else f"{self.calibration}, {self.crops} of {size}"


def evaluate(model, pairs, on_image=None):
    """PSNR and SSIM of a network on each image of a data set, by the standard protocol.

    Whole images, one at a time; the output is clipped and rounded to 8 bits; luma of BT.601;
    ``scale`` pixels shaved off each side.

    Parameters
    ----------
    model : nn.Module
        RGB 0..1 in and out, with an attribute ``scale``.
    pairs : list of dfsq.sr.datasets.ImagePair
    on_image : callable, optional
        Called with each pair that is done.

    Returns
    -------
    pandas.DataFrame
        A row an image: ``image``, ``psnr`` in dB, ``ssim``.
    """
    rows = []
    with freed_memory_kept():
        for pair in pairs:
            with running_on(pair.name, *pair.lr.shape[1::-1]):
                result = upscale(model, pair.lr)
            if result.shape != pair.hr.shape:
                raise ValueError(
                    f"the network makes an image of shape {result.shape} of {pair.name}; with "
                    f"scale {model.scale} it must be {pair.hr.shape}"
                )
            rows.append(
                {
                    "image": pair.name,
                    "psnr": psnr_y(result, pair.hr, model.scale),
                    "ssim": ssim_y(result, pair.hr, model.scale),
                }
            )
            if on_image is not None:
                on_image(pair)
    return pd.DataFrame(rows)


def grid(models, datasets, methods, bits, seeds=(0,), limit=None, **others):
    """All cells of a grid; float and bicubic once, and methods without K-means for one seed.

    Data sets change fastest, so that a quantized network is made once for all of them.

    Parameters
    ----------
    models, datasets, methods, bits, seeds : sequences
        Of the attributes of :class:`Cell`.
    limit, **others
        The same for all cells.

    Examples
    --------
    >>> from dfsq.study.benchmark import grid
    >>> cells = grid(["edsr-x2"], ["Set5", "Set14"], ["float", "dfsq", "dfsq-exact"], [4, 3])
    >>> len(cells)
    10
    """
    cells = []
    for model, method, width, seed, dataset in product(models, methods, bits, seeds, datasets):
        cell = Cell(model, dataset, method, width, seed, limit, **others)
        if cell.plain:
            cell = replace(cell, bits=32, seed=0, draw=0, layers="body", crops=32, crop_size=None)
        elif _preset(method) in ("sq", "sq-a") and (width > 4 or cell.layers == "all"):
            continue  # its universal set has 15 magnitudes
        elif not _is_seeded(method):
            cell = replace(cell, seed=0)
        if cell not in cells:
            cells.append(cell)
    return cells


def standard_grid():
    """The cells of the project's tables on the benchmark sets, the most wanted first.

    Returns
    -------
    list of Cell
    """
    sets, main, own = BENCHMARK_SETS, "edsr-8-x2", trained_names()
    published = ["srresnet-8-x4", "imdn-x4", "imdn-x2"]
    core = ["dfsq", "dfsq-points", "uniform-minmax", "dfsq-exact", "dfsq-budget"]
    plain = ["float", "bicubic"]
    presets = [name for name in PRESETS if name != "float"]
    one_sided = [f"{name}-w" for name in ("dfsq", "dfsq-subset", "dfsq-exact")]
    one_sided += [f"{name}-a" for name in ("dfsq", "dfsq-points", "dfsq-exact")]
    one_sided += ["uniform-minmax-a", "free-a"]
    cells = grid([main], sets, plain + core, [4, 3, 2])
    cells += grid([main], sets, presets + one_sided, [4])
    # statistics of calibration alone, the range whole or clipped, under weights of either kind; and
    # is it the subset that activations and weights gain by, or that their range may be clipped?
    controls = ["static-channel-minmax", "static-channel-mse", "dfsq-points:weights=mse"]
    controls += ["dfsq-subset", "dfsq-exact:weights=mse"]
    controls += ["dfsq-exact:normalization=static-channel,static_range=mse"]
    no_subset = "dfsq-exact:selector=uniform-mse,weights=mse"
    controls += ["uniform-mse", "dfsq-exact:selector=uniform-mse", no_subset]
    cells += grid([main], sets, controls, [4, 3, 2])
    cells += grid(own, sets, plain + core, [4])
    for bits in (4, 3, 6, 8):
        cells += grid(published, sets, plain + core, [bits])
    cells += grid([*own, *published], ["Set14", "Urban100"], ["uniform-mse"], [4])
    cells += grid([*own, *published], ["Urban100"], [no_subset], [4])
    cells += grid([main], sets, core, [6, 8])
    # exact points lose more than K-means there: by the points, or by the weights?
    cells += grid(["imdn-x4"], ["Set5", "Urban100"], ["dfsq-w", "dfsq-a", "dfsq-points-a"], [3])
    for name, limit in (("Set5", None), ("Set14", None), ("Urban100", 20)):
        cells += grid([main], [name], ["float"], [32], limit=limit)
        cells += grid([main], [name], ["dfsq"], [4], range(5), limit)
        for draw in range(5):
            cells += grid(
                [main], [name], ["dfsq-points", "dfsq-exact"], [4], limit=limit, draw=draw
            )
    # how far K-means is from uniform levels, seed by seed, on a network of another kind
    cells += grid(["rdn-small-x4"], ["Urban100"], ["dfsq"], [4], range(5), limit=20)
    # whether the own method loses a tenth of a decibel is closer than draws of the crops differ by
    for options in [*({"draw": draw} for draw in range(5)), {"crops": 100}]:
        cells += grid([main], ["Urban100"], ["dfsq-exact"], [4], **options)
    cells += grid([main], sets, core, [4], layers="all")
    cells += ablation_grid()
    for name in own:
        cells += grid([name], INGREDIENT_SETS, ingredients(name), [4])
    # first what decides whether 6 bits are comparable to float, then what is soon done
    cells += grid(own, ["Urban100"], core, [6])
    cells += grid(own, INGREDIENT_SETS, core, [6, 8, 3])
    cells += grid(own, sets, core, [3, 2, 6, 8])
    return list(dict.fromkeys(cells))


#: One ingredient of the default method less, one more than the released method, and variations;
#: controls have its weights with uniform activations.
ABLATIONS = (
    "uniform-minmax",
    "dfsq",
    "dfsq:bias_correction=true",
    "dfsq-points",
    "dfsq-points:error_units=output",
    "dfsq-points:weights=mse",
    "dfsq-points:weights=subset",
    "dfsq-points:compensation=true",
    "dfsq-points:least_squares=true,compensation=true",
    "dfsq-exact",
    "dfsq-exact:normalization=minmax",
    "dfsq-exact:normalization=static-channel,static_range=minmax",
    "dfsq-exact:normalization=static-channel,static_range=mse",
    "dfsq-exact:selector=kmeans-hist",
    "dfsq-exact:selector=uniform-mse",
    "dfsq-exact:error_units=normalized",
    "dfsq-exact:weights=minmax",
    "dfsq-exact:weights=mse",
    "dfsq-exact:least_squares=false",
    "dfsq-exact:compensation=false",
    "dfsq-exact:scale_search=false",
    "dfsq-exact:range_search=true",
    "dfsq-exact:bias_correction=false",
    "dfsq-exact:damping=0.001",
    "dfsq-exact:damping=0.1",
    "dfsq-exact:order=given",
    "dfsq-exact:sequential=true",
    "dfsq-exact:words=2",
    "dfsq-exact:selector=free",
    "dfsq-budget",
)


#: Those that the project's own networks have too, each the default method with one thing changed,
#: and the sets that they are measured on.
INGREDIENTS = (
    "dfsq-exact:normalization=minmax",
    "dfsq-exact:selector=kmeans-hist",
    "dfsq-exact:weights=minmax",
    "dfsq-exact:least_squares=false",
    "dfsq-exact:compensation=false",
    "dfsq-exact:scale_search=false",
    "dfsq-exact:bias_correction=false",
)
INGREDIENT_SETS = ("Set5", "Set14")


def ingredients(name):
    """Those of ``INGREDIENTS`` that a network can be without.

    Bias correction does nothing where the quantized convolutions have no bias, as in SRResNet,
    where batch normalization follows them.

    Parameters
    ----------
    name : str
        As :func:`dfsq.sr.zoo.load_model` takes it.

    Returns
    -------
    tuple of str
    """
    layers = find_layers(sr.load_model(name), Config())
    if any(layer.bias is not None for layer in layers.values()):
        return INGREDIENTS
    return tuple(method for method in INGREDIENTS if "bias_correction" not in method)


#: Calibration crops, number and side in LR pixels, that are compared with the default 32 of 96;
#: the side of 160 is that of BSDS500's images.
CROPS = ((1, 96), (8, 96), (100, 96), (32, 48), (32, 160))


def ablation_grid(bits=(4,)):
    """The cells of the ablations: EDSR-8 on Set5 and the first 8 images of Urban100."""
    varied = [(method, {}) for method in ("float", *ABLATIONS)]
    varied += [
        (method, {"crops": crops, "crop_size": size})
        for method in ("dfsq-points", "dfsq-exact")
        for crops, size in CROPS
    ]
    return [
        cell
        for method, options in varied
        for name, limit in (("Set5", None), ("Urban100", 8))
        for cell in grid(["edsr-8-x2"], [name], [method], bits, limit=limit, **options)
    ]


class Store:
    """Rows of results in a folder: ``results.csv``, ``images.csv`` and ``provenance.csv``.

    What a row was in other runs, in single precision, is in ``repeats.csv``.

    Parameters
    ----------
    folder : path
        Where rows are read and written; the project's own by default.
    standing : path, optional
        A folder whose rows stand too, but which is never written to.
    """

    #: In the order in which they are written: what is in the last one has all the rest. So they are
    #: read in the opposite order.
    TABLES = {  # noqa: RUF012
        "repeats": ["id", "psnr"],
        "images": ["id", "image"],
        "provenance": ["id"],
        "results": KEY,
    }

    def __init__(self, folder=RESULTS_FOLDER, standing=None):
        self.folder, self.standing = Path(folder), standing
        self.reload()

    def reload(self):
        """Read the files again, with what other processes have added since."""
        for name in reversed(self.TABLES):
            setattr(self, name, self._read(name, *filter(None, (self.standing, self.folder))))

    def _read(self, name, *folders):
        table = pd.DataFrame(columns=list(dict.fromkeys(["id", *self.TABLES[name]])))
        for folder in folders:
            path = Path(folder) / f"{name}.csv"
            if path.exists():
                try:
                    rows = pd.read_csv(path, keep_default_na=False, dtype=dict.fromkeys(TEXT, str))
                except ValueError as error:  # of which pandas has its own
                    raise ValueError(f"{path} is no table of results: {error}") from None
                lacking = {"id", *self.TABLES[name]} - set(rows.columns)
                if lacking:
                    raise ValueError(
                        f"{path} is no table of results: it has no column "
                        f"{', '.join(sorted(lacking))}"
                    )
                table = _joined(table, rows, self.TABLES[name])
        return table

    def find(self, identifier):
        """The row of an identifier, a Series, or None."""
        found = self.results[self.results["id"] == identifier]
        return None if found.empty else found.iloc[0]

    def precision(self, identifier):
        """``"single"`` or ``"double"``, in which a row was computed; None without a row."""
        row = self.find(identifier)
        return None if row is None else row.precision

    def add(self, key, per_image, seconds, device="cpu", precision="single"):
        """Add a finished row; files are replaced whole, so a kill leaves no half of a row.

        Rows that another process has added since are kept, and of the row itself, if it was
        computed in another precision before, its PSNR.
        """
        identifier = row_id(key)
        row = {
            "id": identifier,
            **key,
            "precision": precision,
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
        with FileLock(self.folder / ".lock"):
            before = Store(self.folder)
            new["repeats"] = before._repeats(identifier, precision)
            for name, by in self.TABLES.items():
                rows = pd.DataFrame(new[name])
                if rows.empty:
                    continue
                if name == "images" and before.find(identifier) is not None:
                    # killed from here on, the old row would stand with the new one's images
                    self._write("results", before.results[before.results["id"] != identifier])
                self._write(name, _joined(self._read(name, self.folder), rows, by))
                setattr(self, name, _joined(getattr(self, name), rows, by))

    def _write(self, name, table):
        write = partial(table.to_csv, index=False, float_format="%.6f")
        write_whole(self.folder / f"{name}.csv", write)

    def _repeats(self, identifier, precision):
        """What a row was in another precision than that which it is to be replaced with."""
        if self.precision(identifier) in (None, precision):
            return []
        rows = [{"id": identifier, "psnr": self.find(identifier).psnr}]
        if not self.repeats.empty:  # a killed run may have left the same there
            rows += self.repeats[self.repeats["id"] == identifier].to_dict("records")
        return pd.DataFrame(rows).drop_duplicates().to_dict("records")


def _joined(old, new, by):
    """Rows in order; those of the new identifiers that a killed run left behind are replaced."""
    if not old.empty:
        new = pd.concat([old[~old["id"].isin(new["id"])], new], ignore_index=True)
    return new.sort_values(by, kind="stable", ignore_index=True)


def row_id(key):
    """Short name of a key, for joining the files of the store."""
    text = "|".join(f"{name}={key[name]}" for name in KEY)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_digest(config):
    """Digest of what a configuration does other than the released method.

    So a field that is added to :class:`dfsq.Config` later leaves the rows without it standing.
    """
    released = asdict(Config.preset("dfsq"))
    others = {name: v for name, v in asdict(config).items() if v != released[name]}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _preset(method):
    """The name of a method's preset."""
    return method.partition(":")[0]


def _is_seeded(method):
    """Whether what a method does depends on the seed, as far as its name tells."""
    if is_user_function(method):
        return True
    named = _named_fields(method)
    return str(named.get("selector")).startswith("kmeans") or "overrides" in named


def method_version(method):
    """The version, an int, that a row of a method must have to stand."""
    named = {} if is_user_function(method) else _named_fields(method)
    of_layers = named.get("overrides")
    of_layers = of_layers.values() if isinstance(of_layers, dict) else ()
    for fields_of in (named, *of_layers):
        if isinstance(fields_of, dict) and str(fields_of.get("normalization")).startswith("static"):
            return STATIC_RANGE_VERSION
    return METHOD_VERSION


def _named_fields(method):
    """What a method's name says of the fields of its configuration."""
    preset, changes = _parsed(method)
    return PRESETS.get(preset.removesuffix("-w").removesuffix("-a"), {}) | changes


def _parsed(method):
    """A preset's name, and the fields that differ."""
    name, text = _preset(method), method.partition(":")[2]
    changes = {}
    while text:
        field, equals, rest = text.partition("=")
        if not equals or field not in {f.name for f in fields(Config)}:
            part = text.partition(",")[0]
            raise ValueError(f"{method}: {part!r} must be FIELD=VALUE with a field of dfsq.Config")
        try:  # a value in JSON may have commas of its own
            value, end = json.JSONDecoder().raw_decode(rest)
        except json.JSONDecodeError:
            end = None
        if end is None or rest[end : end + 1] not in ("", ","):
            value, end = (part := rest.partition(",")[0]), len(part)
        changes[field], text = value, rest[end + 1 :]
    return name, changes


def _weights_digest(name, model):
    """Digest of a network's weights, and of a user's file, in which its forward is."""
    if is_user_function(name):
        return float_digest(model)[:8] + _file_digest(name)[:8]
    return float_digest(model)


def _file_digest(function):
    """Digest of the file of a user's function, and of the neighbours that it imports."""
    sources = user_sources(function).values()
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _on_any_images(cell):
    """What a cell's quantized network depends on."""
    files = _file_digest(cell.method) if is_user_function(cell.method) else ""
    return replace(cell, dataset="", limit=None), files


class Bench:
    """Computes cells, sharing networks, data sets and calibrations between them.

    Parameters
    ----------
    store : Store, optional
        The project's own by default.
    device : str, optional
        ``"cpu"`` or ``"cuda"``; a GPU by default, if there is one.
    double : bool
        Whether rows are computed in double precision, see :mod:`dfsq.study.double`. One that was
        computed in single precision does not stand then.

    Raises
    ------
    ValueError
        For a device that is not there.
    """

    def __init__(self, store=None, device=None, double=False):
        self.store = Store() if store is None else store
        self.device = choose_device(device)
        self.double = double
        self.keep_inputs = False  # whether every calibration spills its inputs, see `run`
        self._models, self._datasets, self._crops, self._digests = {}, {}, {}, {}
        self._calibration = self._quantized = (None, None)  # the last one, with its key

    def model(self, name):
        """The float network of a name, loaded once."""
        if name not in self._models:
            model = sr.load_model(name).to(self.device)
            self._digests["w", name] = _weights_digest(name, model)
            self._models[name] = model.double() if self.double else model
        return self._models[name]

    def dataset(self, name, scale, limit=None):
        """The image pairs of a data set, loaded once."""
        key = (name, scale, limit)
        if key not in self._datasets:
            self._datasets[key] = sr.load_dataset(name, scale, limit)
        return self._datasets[key]

    def crop_images(self, cell):
        """The calibration crops of a cell, made once."""
        scale = self.model(cell.model).scale
        key = (cell.calibration, scale, cell.crops, cell.crop_size, cell.draw)
        if key not in self._crops:
            self._crops[key] = sr.calibration_crops(*key)
        return self._crops[key]

    def calibrated(self, cell, config):
        """The calibration of a network, shared by successive cells that can."""
        edges = edges_for(universal_set(config.universal, config.words))
        key = (cell.model, cell.calibration, cell.crops, cell.crop_size, cell.draw)
        key += (edges.tobytes(), config.error_units)
        key += (config.layers, config.exclude, config.non_negative)
        keep_inputs = self.keep_inputs or self._needs_inputs(cell)
        have_key, have = self._calibration
        if have_key != key or (keep_inputs and not have.keeps_inputs):
            self._calibration = (None, None)  # of spilled inputs there is room for one
            have = calibrate(
                self.model(cell.model),
                self.crop_images(cell),
                config,
                keep_inputs=keep_inputs,
                progress=False,
            )
            self._calibration = (key, have)
        return have

    def config(self, cell):
        """The configuration of a cell, with the network's layers, which its rows are keyed by."""
        model = self.model(cell.model)
        layers = getattr(model, "body_layers", None)
        name, changes = _parsed(cell.method)
        if name.removesuffix("-w").removesuffix("-a") not in PRESETS:
            raise ValueError(
                f"unknown method {name!r}; there are bicubic, {', '.join(PRESETS)}, each of these "
                "also with -w (weights only) or -a (activations only) and with fields that differ "
                "(dfsq-exact:damping=0.1), and functions in files, FILE.py:FUNCTION"
            )
        config = Config.preset(name, cell.bits, **({"seed": cell.seed, "layers": layers} | changes))
        return with_all_layers(config, model) if cell.layers == "all" else config

    def _needs_inputs(self, cell):
        """Whether a layer of a cell, by its overrides even, needs its inputs to be kept."""
        config = self.config(cell)
        layers = find_layers(self.model(cell.model), config)
        return any(needs_inputs(config.for_layer(name)) for name in layers)

    def quantized(self, cell):
        """The quantized network of a cell; the float one for ``float``."""
        model = self.model(cell.model)
        if cell.plain:
            return Bicubic(model.scale) if cell.method == "bicubic" else model
        if not self._is_quantized(cell):
            self._quantized = (_on_any_images(cell), self._quantize(cell, model))
        return self._quantized[1]

    def _is_quantized(self, cell):
        """Whether the network of a cell stands quantized, from a cell of other images."""
        return self._quantized[0] == _on_any_images(cell)

    def _quantize(self, cell, model):
        if is_user_function(cell.method):
            # other rows need network and crops as they are, should the function change its own
            own = copy.deepcopy(model), [crop.copy() for crop in self.crop_images(cell)]
            try:
                made = user_function(cell.method)(*own, cell.bits, cell.seed)
            except Exception as error:
                message = f"{cell.method} failed: {type(error).__name__}: {error}"
                raise ValueError(message) from error
            if not isinstance(made, torch.nn.Module):
                kind = type(made).__name__
                raise ValueError(f"{cell.method} must return a network (nn.Module), not {kind}")
            made.scale = model.scale
            return made.eval()
        config = self.config(cell)
        if config.act_bits == 32 and not config.needs_statistics:
            calibration = Calibration({}, [], None)
        else:
            calibration = self.calibrated(cell, config)
        return quantize(model, calibration, config, progress=False)

    def key(self, cell):
        """All that determines the numbers of a cell."""
        model = self.model(cell.model)
        pairs = self.dataset(cell.dataset, model.scale, cell.limit)

        calibration = config = ""
        if not cell.plain:
            crops = self._digest(
                ("crops", cell.calibration, model.scale, cell.crops, cell.crop_size, cell.draw),
                lambda: hashlib.sha256(b"".join(crop.tobytes() for crop in self.crop_images(cell))),
            )
            calibration = crops[:16]
            if is_user_function(cell.method):
                config = _file_digest(cell.method)[:16]
            else:
                config = config_digest(self.config(cell))[:16]
        return {
            "model": cell.model,
            "dataset": cell.dataset,
            "images": len(pairs),
            "layers": cell.layers,
            "method": cell.method,
            "bits": cell.bits,
            "seed": cell.seed,
            "calibration": cell.calibrated_on,
            "draw": cell.draw,
            "weights_digest": self._digests["w", cell.model][:16],
            "pixel_digest": self._digest(
                ("pixels", cell.dataset, model.scale, cell.limit), lambda: pixel_digest(pairs)
            )[:16],
            "calibration_digest": calibration,
            "config_digest": config,
            "method_version": method_version(cell.method),
            "protocol_version": PROTOCOL_VERSION,
        }

    def _digest(self, key, compute):
        """A digest, computed once."""
        if key not in self._digests:
            made = compute()
            self._digests[key] = made if isinstance(made, str) else made.hexdigest()
        return self._digests[key]

    def compute(self, cell, on_image=None):
        """Per-image PSNR and SSIM of a cell, computed now; see :func:`evaluate`."""
        pairs = self.dataset(cell.dataset, self.model(cell.model).scale, cell.limit)
        try:
            with convolving_in_strips():
                return evaluate(self.quantized(cell), pairs, on_image)
        except RuntimeError as error:
            users = list(filter(is_user_function, (cell.model, cell.method)))
            if not (self.double and users):
                raise
            raise ValueError(
                f"{' with '.join(users)} fails in double precision, {error}; it must compute in "
                "the type of its input and its parameters, or go without --double (double=True)"
            ) from error

    def missing(self, cells, *, progress=False):
        """The cells that the store does not hold yet, or not in the precision that is needed."""
        precisions = [None, *(["single"] if self.double else [])]

        def stands(cell):
            return self.store.precision(row_id(self.key(cell))) not in precisions

        once = dict.fromkeys(cells)
        with tqdm(once, "looking up rows", disable=not progress, leave=False, unit="row") as bar:
            return [cell for cell in bar if not stands(cell)]

    def rows(self, cells):
        """The rows of cells that the store holds, in their order.

        Returns
        -------
        pandas.DataFrame
        """
        identifiers = [row_id(self.key(cell)) for cell in cells]
        return self.store.results.set_index("id").loc[identifiers].reset_index()

    def run(self, cells, *, progress=True):
        """Compute the cells that the store does not hold yet, each stored as it is finished.

        A row that another process has added meanwhile is not computed again.

        Returns
        -------
        pandas.DataFrame
            The rows of all `cells`, in their order.

        Raises
        ------
        ValueError
            Without a cell.
        OSError
            If the store's folder cannot be written to, before any row is computed.
        """
        if not cells:
            raise ValueError(
                "no cell to compute; activations by SQ's set go with 2 to 4 bits and layers='body'"
            )
        missing = self.missing(cells, progress=progress)
        if missing:
            instead = "name another folder for the store, or for the cache in DFSQ_CACHE"
            writable_folder(self.store.folder, instead)
        self.keep_inputs = any(
            self._needs_inputs(cell)
            for cell in missing
            if not cell.plain and not is_user_function(cell.method)
        )

        def work(cell, pair):
            """Roughly proportional to the time an image takes."""
            if cell.method == "bicubic":
                return 0
            weights = sum(p.numel() for p in self.model(cell.model).parameters())
            return weights * pair.lr[..., 0].size / 1e9

        total = sum(
            work(cell, pair)
            for cell in missing
            for pair in self.dataset(cell.dataset, self.model(cell.model).scale, cell.limit)
        )
        with tqdm(
            total=total,
            disable=not (progress and missing),
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left, {desc}",
        ) as bar:
            for i, cell in enumerate(missing):
                name = f"{cell.model} {cell.dataset} {cell.method} {cell.bits} bits"
                row = f"row {i + 1} of {len(missing)}: {name}"
                # minutes can pass before the first image, in which the bar stands
                stands = cell.plain or self._is_quantized(cell)
                bar.set_description_str(row if stands else f"{row}, calibrating or quantizing")
                self.store.reload()
                if not self.missing([cell]):
                    continue
                began, key = time.perf_counter(), self.key(cell)

                def on_image(pair, row=row, cell=cell):
                    bar.set_description_str(row, refresh=False)
                    bar.update(work(cell, pair))

                per_image = self.compute(cell, on_image)
                seconds = time.perf_counter() - began
                precision = "double" if self.double else "single"
                if self.key(cell) != key:
                    raise ValueError(
                        f"{cell.method} was changed while a row of it was computed; run it again"
                    )
                self.store.reload()
                if not self.missing([cell]):  # double precision came meanwhile, and stands for both
                    continue
                self.store.add(key, per_image, seconds, self.device, precision)
        return self.rows(cells)
