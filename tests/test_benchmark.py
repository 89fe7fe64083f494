"""The store of results never loses, repeats or mixes up a row."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import skimage.data
import torch
from PIL import Image

from dfsq import Config, sr
from dfsq.activations import CodebookQuantizer, DynamicUniformQuantizer
from dfsq.sr.datasets import ImagePair
from dfsq.sr.imaging import imresize, psnr_y, ssim_y, to_image, to_tensor
from dfsq.sr.models.edsr import EDSR
from dfsq.sr.upscaling import Bicubic
from dfsq.study import benchmark
from dfsq.study.benchmark import (
    KEY,
    Bench,
    Cell,
    Store,
    config_digest,
    evaluate,
    grid,
    row_id,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_model(seed):
    torch.manual_seed(seed)
    return EDSR(blocks=2, features=4).eval()


@pytest.fixture
def weights(monkeypatch):
    """Networks are tiny ones, drawn from a seed that a test may change."""
    chosen = {"seed": 0}
    monkeypatch.setattr(sr, "load_model", lambda name: tiny_model(chosen["seed"]))
    return chosen


@pytest.fixture
def photos(tmp_path):
    """Three images called by numbers, of 12x12 LR pixels."""
    folder = tmp_path / "001"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(3):
        image = imresize(generator.integers(0, 256, (6, 6, 3), np.uint8), 4)
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture
def bench(weights, photos, tmp_path):
    """A function that gives a fresh bench on the same store, as a new process would."""

    def make(**options):
        store = Store(tmp_path / "results")
        return Bench(store, **({"device": "cpu"} | options))

    return make


@pytest.fixture
def cell(photos):
    return Cell(
        "tiny", str(photos), "dfsq-points", 4, calibration=str(photos), crops=2, crop_size=9
    )


@pytest.fixture
def computed(monkeypatch):
    """The cells that were computed."""
    cells, original = [], Bench.compute

    def counted(self, cell, *rest):
        cells.append(cell)
        return original(self, cell, *rest)

    monkeypatch.setattr(Bench, "compute", counted)
    return cells


def run(bench, *cells):
    return bench.run(cells, progress=False)


# --- measuring ---


def test_evaluation_by_hand():
    model, generator = tiny_model(1), np.random.default_rng(1)
    pairs = []
    for name in ("b", "a"):
        hr = generator.integers(0, 256, (20, 24, 3), np.uint8)
        pairs.append(ImagePair(name, imresize(hr, 1 / 2), hr))
    rows = evaluate(model, pairs)
    assert list(rows.columns) == ["image", "psnr", "ssim"]
    assert rows.image.tolist() == ["b", "a"]
    for row, pair in zip(rows.itertuples(), pairs, strict=True):
        with torch.no_grad():
            result = to_image(model(to_tensor(pair.lr)))
        assert row.psnr == psnr_y(result, pair.hr, 2)
        assert row.ssim == ssim_y(result, pair.hr, 2)


def test_a_network_without_parameters():
    model = torch.nn.Upsample(scale_factor=2, mode="nearest")
    model.scale = 2
    hr = np.full((20, 24, 3), 7, np.uint8)
    (row,) = evaluate(model, [ImagePair("a", hr[::2, ::2], hr)]).itertuples()
    assert np.isinf(row.psnr)


def test_bicubic_row_is_plain_upscaling(bench, cell):
    row = run(bench(), replace(cell, method="bicubic", bits=32)).iloc[0]
    pairs = sr.load_dataset(cell.dataset, 2)
    psnr = [psnr_y(imresize(p.lr, 2), p.hr, 2) for p in pairs]
    assert row.psnr == pytest.approx(np.mean(psnr), abs=1e-6)


def test_float_row_is_the_network_itself(bench, cell):
    row = run(bench(), replace(cell, method="float", bits=32)).iloc[0]
    rows = evaluate(tiny_model(0), sr.load_dataset(cell.dataset, 2))
    assert (row.psnr, row.ssim) == pytest.approx((rows.psnr.mean(), rows.ssim.mean()), abs=1e-6)


def test_quantized_row_is_dfsq_quantize(bench, cell):
    made = bench()
    row = run(made, cell).iloc[0]
    again = bench().compute(cell)  # without a run before
    assert row.psnr == pytest.approx(again.psnr.mean(), abs=1e-6)
    assert row.ssim == pytest.approx(again.ssim.mean(), abs=1e-6)
    assert made.quantized(cell).quantization.config == made.config(cell)


@pytest.mark.parametrize(
    "method", ["dfsq", "dfsq-w", "dfsq-subset-a", "sq", "static-channel-minmax", "uniform-minmax"]
)
def test_methods_run(bench, cell, method):
    row = run(bench(), replace(cell, method=method)).iloc[0]
    assert np.isfinite(row.psnr)
    assert (row.method, row.bits, row.images) == (method, 4, 3)


def test_all_layers(bench, cell):
    """The body at its width, all others at 8 bits, the image uniform; a row of its own."""
    made = bench()
    everywhere = replace(cell, layers="all", bits=3)
    rows = run(made, replace(cell, bits=3), everywhere)
    assert rows.layers.tolist() == ["body", "all"]
    assert rows.psnr.nunique() == rows.id.nunique() == 2
    quantized = made.quantized(everywhere)
    widths = {
        layer.layer: (layer.weight_bits, layer.act_bits) for layer in quantized.quantization.layers
    }
    body = {f"body.{i}.body.{j}" for i in (0, 1) for j in (0, 2)}
    outer = {"head.0", "body.2", "tail.0.0", "tail.1"}
    assert widths == dict.fromkeys(body, (3, 3)) | dict.fromkeys(outer, (8, 8))
    kinds = {name: type(quantized.get_submodule(name).activation) for name in widths}
    assert kinds.pop("head.0") is DynamicUniformQuantizer
    assert set(kinds.values()) == {CodebookQuantizer}


def test_cells_of_benchmark_sets_are_calibrated_on_their_own_images():
    assert Cell("m", "Set5").calibration == "BSDS500/train"
    assert Cell("m", "photographs").calibration == Cell("m", "some/folder").calibration
    assert Cell("m", "photographs").calibration == "photographs"
    assert Cell("m", "Set5", calibration="mine").calibration == "mine"
    assert Cell("m", "Set5").calibrated_on == "BSDS500/train"
    assert Cell("m", "Set5", "float", 32).calibrated_on == ""
    assert Cell("m", "Set5", crops=8).calibrated_on == "BSDS500/train, 8 of default"
    assert Cell("m", "Set5", crop_size=48).calibrated_on == "BSDS500/train, 32 of 48"
    with pytest.raises(ValueError, match="layers must be one of body, all, not 'tail'"):
        Cell("m", layers="tail")


def test_a_network_is_quantized_once_for_all_data_sets(bench, cell, tmp_path, monkeypatch):
    calls, original = [], benchmark.quantize
    monkeypatch.setattr(benchmark, "quantize", lambda *a, **k: calls.append(a) or original(*a, **k))
    cells = [cell, replace(cell, limit=2), replace(cell, bits=2), replace(cell, bits=2, limit=2)]
    run(bench(), *cells)
    assert len(calls) == 2


def test_grid():
    cells = grid(["m"], ["d"], ["bicubic", "float", "dfsq", "sq"], [8, 4, 2], seeds=(0, 1))
    assert cells == [
        Cell("m", "d", "bicubic", 32, 0),
        Cell("m", "d", "float", 32, 0),
        *(Cell("m", "d", "dfsq", bits, seed) for bits in (8, 4, 2) for seed in (0, 1)),
        *(Cell("m", "d", "sq", bits) for bits in (4, 2)),  # no K-means, no seed
    ]
    assert {c.limit for c in grid("m", "d", ["dfsq"], [4], limit=3)} == {3}
    everywhere = grid("m", ["d", "e"], ["float", "dfsq", "sq"], [4], layers="all", draw=2)
    assert everywhere == [
        Cell("m", "d", "float", 32),  # there is one float network, whatever is not quantized
        Cell("m", "e", "float", 32),
        Cell("m", "d", "dfsq", 4, layers="all", draw=2),
        Cell("m", "e", "dfsq", 4, layers="all", draw=2),  # SQ's set is too small for 8 bits
    ]


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("dfsq", 3),
        ("dfsq-a", 3),
        ("dfsq-exact:selector=kmeans-hist", 3),
        ("own.py:method", 3),
        ('dfsq-points:overrides={"head":{"selector":"kmeans"}}', 3),
        ("dfsq-exact", 1),
        ("dfsq:selector=exact", 1),
        ("static-tensor-mse", 1),
        ("uniform-minmax-a", 1),
    ],
)
def test_seeds_are_those_of_kmeans(method, count):
    cells = grid(["m"], ["d"], [method], [4], seeds=(0, 1, 2))
    assert [cell.seed for cell in cells] == [*range(count)]


# --- the store ---


def test_what_is_stored(bench, cell, tmp_path):
    cells = [cell, replace(cell, bits=2), replace(cell, method="bicubic", bits=32)]
    rows = run(bench(), *cells)
    assert rows[["method", "bits"]].values.tolist() == [[c.method, c.bits] for c in cells]
    store = Store(tmp_path / "results")
    assert sorted(p.name for p in store.folder.iterdir()) == [
        ".lock",
        "images.csv",
        "provenance.csv",
        "results.csv",
    ]
    assert list(store.results.columns) == ["id", *KEY, "precision", "psnr", "ssim"]
    assert store.results.equals(store.results.sort_values(KEY, ignore_index=True))
    assert set(store.results.id) == set(store.provenance.id) == set(store.images.id)
    assert len(store.images) == 3 * 3
    for row in store.results.itertuples():
        own = store.images[store.images.id == row.id]
        assert own.image.tolist() == ["000", "001", "002"]
        assert own.psnr.mean() == pytest.approx(row.psnr, abs=1e-6)
        assert own.ssim.mean() == pytest.approx(row.ssim, abs=1e-6)
    assert store.provenance.device.tolist() == ["cpu"] * 3
    assert (store.provenance.seconds >= 0).all()
    # nothing that differs from run to run is in the results
    assert not {"seconds", "date"} & set(store.results.columns)


def test_rows_that_stand_are_not_computed_again(bench, cell, computed, tmp_path):
    first = run(bench(), cell, replace(cell, bits=2))
    assert len(computed) == 2
    before = {p.name: p.read_bytes() for p in (tmp_path / "results").iterdir()}
    again = run(bench(), replace(cell, bits=2), cell, cell)
    assert len(computed) == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "results").iterdir()} == before
    assert again.id.tolist() == [first.id[1], first.id[0], first.id[0]]


def test_a_run_appends(bench, cell, computed):
    cells = [replace(cell, bits=bits) for bits in (2, 3, 4)]
    run(bench(), *cells[:2])
    rows = run(bench(), *cells)
    assert computed == cells
    assert rows.bits.tolist() == [2, 3, 4]


def test_a_cell_given_twice_is_computed_once(bench, cell, computed):
    assert len(run(bench(), cell, cell)) == 2
    assert computed == [cell]


def test_a_killed_run_loses_the_cell_in_work(bench, cell, monkeypatch, tmp_path):
    cells = [replace(cell, bits=bits) for bits in (2, 3, 4)]
    original = Bench.compute

    def killed(self, cell, *rest):
        if cell.bits == 4:
            raise KeyboardInterrupt
        return original(self, cell, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "compute", killed)
        with pytest.raises(KeyboardInterrupt):
            run(bench(), *cells)
    assert Store(tmp_path / "results").results.bits.tolist() == [2, 3]
    assert bench().missing(cells) == cells[2:]
    assert run(bench(), *cells).bits.tolist() == [2, 3, 4]


@pytest.mark.parametrize("at", ["images", "provenance", "results"])
def test_killed_between_the_files_of_a_row(bench, cell, monkeypatch, tmp_path, at):
    """The row is computed anew, and no half of it is left."""
    run(bench(), cell)
    second, original = replace(cell, bits=2), benchmark.os.replace

    def killed(source, target):
        if target.name == f"{at}.csv":
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(bench(), second)
    assert Store(tmp_path / "results").results.bits.tolist() == [4]
    run(bench(), second)
    store = Store(tmp_path / "results")
    assert sorted(store.results.bits) == [2, 4]
    assert sorted(store.provenance.id) == sorted(store.results.id)
    assert len(store.images) == 2 * 3
    assert not store.images.duplicated(["id", "image"]).any()


@pytest.mark.parametrize("at", ["repeats", "images", "provenance", "results"])
def test_killed_while_a_row_is_replaced(tmp_path, monkeypatch, at):
    """Never the mean of one run with the images of another; what it was before is not lost."""
    key, original = {name: 0 for name in KEY}, benchmark.os.replace
    frame = pd.DataFrame({"image": ["a"], "psnr": [30.0], "ssim": [0.9]})
    Store(tmp_path).add(key, frame, 1.0)

    def killed(source, target):
        if target.name == f"{at}.csv":
            raise KeyboardInterrupt
        original(source, target)

    def replaced():
        Store(tmp_path).add(key, frame.assign(psnr=31.0), 1.0, precision="double")

    with monkeypatch.context() as patch:
        patch.setattr(benchmark.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            replaced()
    left = Store(tmp_path)
    for row in left.results.itertuples():
        assert left.images[left.images["id"] == row.id].psnr.tolist() == [row.psnr]
    replaced()
    store = Store(tmp_path)
    assert (store.results.psnr.tolist(), store.images.psnr.tolist()) == ([31.0], [31.0])
    assert store.repeats.psnr.tolist() == [30.0]


def test_a_row_that_is_finished_while_the_tables_are_read(tmp_path, monkeypatch):
    frame = pd.DataFrame({"image": ["a"], "psnr": [30.0], "ssim": [0.9]})
    keys = [{name: number for name in KEY} for number in (0, 1)]
    Store(tmp_path).add(keys[0], frame, 1.0)
    reader, original, reads = Store(tmp_path), Store._read, []

    def read(self, name, *folders):
        reads.append(name)
        if self is reader and len(reads) == 3:
            Store(tmp_path).add(keys[1], frame, 1.0)
        return original(self, name, *folders)

    monkeypatch.setattr(Store, "_read", read)
    reader.reload()
    assert set(reader.results["id"]) <= set(reader.images["id"])


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "\x00\xff"])
def test_a_table_of_something_else(tmp_path, text):
    (tmp_path / "results.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"results\.csv is no table of results"):
        Store(tmp_path)


def test_static_ranges_have_a_version_of_their_own():
    """Whatever the name that asks for them; other methods' rows stand."""
    static = ["static-tensor-minmax", "static-tensor-minmax-a", "static-channel-mse"]
    static += ["dfsq:normalization=static-channel", "static-tensor-percentile"]
    static += ["dfsq-exact:normalization=static-channel,static_range=mse"]
    assert {benchmark.method_version(method) for method in static} == {2}
    others = ("dfsq", "dfsq:static_range=mse", "own.py:f", "float", "bicubic")
    assert {benchmark.method_version(method) for method in others} == {1}


# --- keys ---


def invert_a_pixel(photos):
    path = photos / "001.png"
    image = np.array(Image.open(path))
    image[3, 3] ^= 255
    Image.fromarray(image).save(path)


CHANGES = {
    "weights": lambda weights, photos, patch: weights.update(seed=1),
    "pixels": lambda weights, photos, patch: invert_a_pixel(photos),
    "image": lambda weights, photos, patch: (photos / "002.png").unlink(),
    "method": lambda weights, photos, patch: patch.setattr(benchmark, "METHOD_VERSION", 99),
    "protocol": lambda weights, photos, patch: patch.setattr(benchmark, "PROTOCOL_VERSION", 99),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_are_keyed_by_what_determines_them(
    bench, cell, weights, photos, computed, monkeypatch, change
):
    old = run(bench(), cell).id[0]
    CHANGES[change](weights, photos, monkeypatch)
    assert run(bench(), cell).id[0] != old
    assert len(computed) == 2
    assert len(bench().store.results) == 2  # the old row stays


@pytest.mark.parametrize("options", [{"crops": 3}, {"crop_size": 10}])
def test_the_calibration_draw_is_part_of_the_key(bench, cell, computed, options):
    run(bench(), cell)
    run(bench(), replace(cell, **options))
    run(bench(), replace(cell, draw=1))
    assert len(computed) == 3
    assert len(bench().store.results.calibration_digest.unique()) == 3


OTHERS = {
    "draw": {"draw": 1},
    "crops": {"crops": 3},
    "crop_size": {"crop_size": 6},
    "calibration": {"calibration": "photographs"},
    "limit": {"limit": 2},
    "bits": {"bits": 3},
    "layers": {"layers": "all"},
    "seed": {"method": "dfsq", "seed": 1},
    "edges": {"method": "dfsq-points:words=3"},  # off the dyadic grid
    "error_units": {"method": "dfsq-points:error_units=output"},
    "non_negative": {"method": 'dfsq-points:non_negative=["body.0.body.2"]'},
    "scale": {"model": "x3"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_cell_behind_another_is_as_by_itself(bench, cell, monkeypatch, other):
    """What a bench shares between cells is kept under all that it depends on."""
    monkeypatch.setattr(sr, "load_model", lambda name: EDSR(3 if name == "x3" else 2, 2, 4).eval())
    first = replace(cell, crop_size=5, method="dfsq" if other == "seed" else cell.method)
    second = replace(first, **OTHERS[other])

    def found(made, cell):
        torch.manual_seed(0)  # of the network's weights
        return made.key(cell), made.compute(cell).values.tolist()

    made = bench()
    before, behind = found(made, first), found(made, second)
    assert behind == found(bench(), second)
    assert behind[0] != before[0]
    assert behind[1] != before[1]  # or it would show nothing


def test_float_rows_do_not_depend_on_the_calibration(bench, cell, computed):
    plain = [replace(cell, method=m, bits=32) for m in ("float", "bicubic")]
    run(bench(), *plain)
    run(bench(), *(replace(one, crops=3) for one in plain))
    assert len(computed) == 2


def test_every_part_of_the_key_counts():
    key = dict.fromkeys(KEY, "x")
    others = [key | {name: "y"} for name in KEY]
    assert len({row_id(k) for k in [key, *others]}) == len(KEY) + 1


def test_digests_and_names_of_digits_stay_text(tmp_path):
    store = Store(tmp_path)
    key = dict.fromkeys(KEY, 1) | {
        "model": "007",
        "dataset": "14",
        "layers": "body",
        "method": "float",
        "calibration": "",
        "weights_digest": "0012345678901234",
        "pixel_digest": "12345678e1234567",
        "calibration_digest": "",
        "config_digest": "0000000000000000",
    }
    image = pd.DataFrame({"image": ["0801"], "psnr": [np.inf], "ssim": [1.0]})
    store.add(key, image, 1.0)
    read = Store(tmp_path)
    assert {name: read.results[name][0] for name in KEY} == key
    assert read.images.image[0] == "0801"
    assert read.images.psnr[0] == read.results.psnr[0] == np.inf
    assert read.find(row_id(key)) is not None
    assert read.find("other") is None
    read.add(key | {"seed": 0}, image, 1.0)
    assert Store(tmp_path).results.seed.tolist() == [0, 1]


def test_a_field_added_later_leaves_rows_standing(monkeypatch):
    """Fields that do as the released method does are no part of the digest."""
    released, exact = Config.preset("dfsq"), Config.preset("dfsq-points")
    before = config_digest(released), config_digest(exact)
    assert before[0] != before[1]
    original = benchmark.asdict
    monkeypatch.setattr(benchmark, "asdict", lambda config: original(config) | {"later": None})
    assert (config_digest(released), config_digest(exact)) == before
    for change in ({"seed": 1}, {"layers": "body.*"}, {"act_bits": 8}, {"weights": "mse"}):
        assert config_digest(replace(released, **change)) not in before


def test_two_processes_on_one_store(tmp_path):
    """Neither loses the rows of the other."""
    script = (
        "import sys, time, pandas as pd\n"
        "from pathlib import Path\n"
        "from dfsq.study import benchmark\n"
        "folder, first = Path(sys.argv[1]), int(sys.argv[2])\n"
        "store = benchmark.Store(folder / 'results')\n"
        "key = dict.fromkeys(benchmark.KEY, 1) | dict.fromkeys(benchmark.TEXT[2:], 'x')\n"
        "image = pd.DataFrame({'image': ['a'], 'psnr': [30.0], 'ssim': [0.9]})\n"
        "(folder / f'ready{first}').touch()\n"
        "while len(list(folder.glob('ready*'))) < 2:\n"
        "    time.sleep(0.001)\n"
        "for seed in range(first, 40, 2):\n"
        "    store.add(key | {'seed': seed}, image, 1.0)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(first)])
        for first in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    store = Store(tmp_path / "results")
    assert store.results.seed.tolist() == list(range(40))
    assert len(store.images) == len(store.provenance) == 40


def test_a_row_that_another_process_adds_meanwhile_is_not_computed_again(
    bench, cell, computed, monkeypatch
):
    """Two runs share a grid: each takes what the other has not finished."""
    mine, other = bench(), bench()
    original = mine.compute

    def compute(*arguments):
        if not computed:
            run(other, replace(cell, bits=3))
        return original(*arguments)

    monkeypatch.setattr(mine, "compute", compute)
    rows = run(mine, cell, replace(cell, bits=3))
    assert rows.bits.tolist() == [4, 3]
    assert [c.bits for c in computed] == [3, 4]


@pytest.mark.parametrize("double_first", [True, False])
def test_a_row_in_double_precision_that_came_meanwhile_stands(
    bench, cell, monkeypatch, double_first
):
    late, early = bench(double=not double_first), bench(double=double_first)
    original = late.compute

    def compute(*arguments):
        result = original(*arguments)
        run(early, cell)
        return result

    monkeypatch.setattr(late, "compute", compute)
    (row,) = run(late, cell).itertuples()
    assert row.precision == bench().store.precision(row.id) == "double"
    expected = [] if double_first else [row.id]  # a single row that it replaced is kept
    assert bench().store.repeats.get("id", pd.Series()).tolist() == expected


def test_a_method_that_changes_its_network_spoils_no_other_row(bench, cell, tmp_path):
    method = tmp_path / "method.py"
    method.write_text(
        "import torch\n\n"
        "def quantize(model, images, bits, seed):\n"
        "    with torch.no_grad():\n"
        "        for p in model.parameters():\n"
        "            p.mul_(0.5)\n"
        "    return model\n"
    )
    others = [cell, replace(cell, method="float", bits=32)]
    before = run(bench(), *others)
    later = bench()
    later.store = Store(tmp_path / "later")
    after = run(later, replace(cell, method=f"{method}:quantize"), *others)
    assert after.psnr[0] != before.psnr[1]
    assert after.psnr[1:].tolist() == before.psnr.tolist()


def test_a_method_of_ones_own_may_begin_with_sq():
    assert len(grid(["net"], ["x"], ["squeeze.py:quantize", "sq", "sq-w"], [8, 4])) == 5


def test_a_run_without_a_cell_is_refused(bench):
    with pytest.raises(ValueError, match=r"no cell to compute; .* layers='body'"):
        bench().run(grid(["net"], ["x"], ["sq"], [4], layers="all"))


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(weights, cell, tmp_path):
    (tmp_path / "file").touch()
    bench = Bench(Store(tmp_path / "file" / "results"))
    bench.compute = None  # nothing is computed
    with pytest.raises(OSError, match=r"cannot write to .*results: .*; name another folder"):
        run(bench, replace(cell, method="bicubic", bits=32))


def test_a_draw_below_zero_is_refused():
    with pytest.raises(ValueError, match="draw must be at least 0, not -1"):
        Cell("net", draw=-1)


def test_the_bar_says_what_is_done_before_the_first_image(bench, cell, capfd):
    bench().run([cell, replace(cell, limit=1), replace(cell, method="bicubic")])
    shown = capfd.readouterr().err
    quantized, rest = shown.split("row 2 of 3", 1)
    assert f"{cell.method} {cell.bits} bits, calibrating or quantizing" in quantized
    assert "row 3 of 3" in rest
    assert "quantizing" not in rest  # the same network on other images, and none


def test_an_empty_store(tmp_path):
    store = Store(tmp_path / "none")
    assert store.find("x") is None
    assert not store.folder.exists()


def test_standing_rows_are_read_and_never_written(bench, cell, computed, tmp_path):
    standing = tmp_path / "results"
    run(bench(), cell)
    before = {p.name: p.read_bytes() for p in standing.iterdir()}
    other = bench()
    other.store = Store(tmp_path / "mine", standing=standing)
    rows = run(other, cell, replace(cell, bits=3))
    assert [c.bits for c in computed] == [4, 3]
    assert rows.bits.tolist() == [4, 3]
    assert {p.name: p.read_bytes() for p in standing.iterdir()} == before
    assert len(Store(tmp_path / "mine", standing=standing).results) == 2


def test_killed_at_a_random_moment(photos, tmp_path):
    """Killed without warning again and again, the results are the same files byte for byte."""
    network = tmp_path / "network.py"
    network.write_text(
        "import torch\nfrom dfsq.sr.upscaling import Bicubic\n\n"
        "class Blend(torch.nn.Module):\n"
        "    scale = 2\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.bicubic = Bicubic(2)\n"
        "        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)\n"
        "    def forward(self, x):\n"
        "        up = self.bicubic(x)\n"
        "        soft = torch.nn.functional.avg_pool2d(up, 3, 1, 1, count_include_pad=False)\n"
        "        return up + 0.3 * (up - soft) + 0 * self.bicubic(self.conv(x).clamp(0, 1))\n"
    )
    arguments = ["--models", f"{network}:Blend", "--datasets", str(photos), "--calibration"]
    arguments += [str(photos), "--methods", "float", "uniform-minmax", "uniform-norm"]
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from dfsq import cli, sr\n"
        "crops = sr.calibration_crops\n"
        "sr.calibration_crops = lambda source, scale, n, size, draw: crops(source, 2, 2, 9, draw)\n"
        "sys.exit(cli.main(['bench', '--out', sys.argv[1], *sys.argv[2:]]))\n"
    )

    def start(folder):
        command = [sys.executable, "-c", script, str(folder), *arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    rows, generator = 0, np.random.default_rng()
    for kill in (1, 2, 3):
        process, wanted = start(tmp_path / "killed"), min(4 * kill, 10)
        results = tmp_path / "killed" / "results.csv"
        while process.poll() is None:
            if results.exists() and len(results.read_text().splitlines()) > wanted:
                time.sleep(generator.uniform(0, 0.05))
                process.kill()
                break
            time.sleep(0.001)
        process.wait()
        found = len(Store(tmp_path / "killed").results)
        assert found >= max(rows, wanted)
        rows = found
    assert start(tmp_path / "killed").wait() == 0
    for name in ("results.csv", "images.csv"):
        paths = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert len({path.read_bytes() for path in paths}) == 1
    provenance = Store(tmp_path / "killed").provenance
    assert provenance.id.is_unique
    assert len(provenance) == 11


# --- precision ---


def test_rows_in_single_precision_do_not_stand_where_double_is_asked_for(bench, cell, computed):
    """What they were is kept, and a row in double precision stands for both."""
    other = replace(cell, bits=3)
    (single,) = run(bench(), cell).itertuples()
    assert single.precision == "single"
    assert bench().store.repeats.empty
    computed.clear()
    double = run(bench(double=True), cell, other)
    assert len(computed) == 2
    assert double.precision.tolist() == ["double"] * 2
    assert double.id[0] == single.id  # the same crops, pixels and weights
    assert bench().store.repeats.values.tolist() == [[single.id, pytest.approx(single.psnr)]]
    assert bench().store.precision(single.id) == "double"
    assert bench().store.precision("none") is None
    run(bench(), cell, other)
    run(bench(double=True), cell, other)
    assert len(computed) == 2
    assert len(bench().store.results) == len(bench().store.provenance) == 2


def test_repeats_are_kept(bench, cell, photos):
    """Those of earlier precision stay, and one that a killed run left behind comes once."""
    store, frame = bench().store, pd.DataFrame({"image": ["a"], "ssim": [0.5]})
    key = bench().key(cell)
    for psnr, precision in ((30, "single"), (31, "double"), (32, "single"), (33, "double")):
        store.add(key, frame.assign(psnr=float(psnr)), 1.0, precision=precision)
    assert sorted(bench().store.repeats.psnr) == [30, 31, 32]
    store.add(key, frame.assign(psnr=32.0), 1.0, precision="single")
    store.add(key, frame.assign(psnr=33.0), 1.0, precision="double")
    assert sorted(bench().store.repeats.psnr) == [30, 31, 32, 33]


def test_double_precision_is_that_of_the_network(bench, cell, computed, monkeypatch):
    kinds, original = set(), benchmark.upscale

    def seen(model, lr):
        kinds.update(p.dtype for p in model.parameters())
        return original(model, lr)

    monkeypatch.setattr(benchmark, "upscale", seen)
    run(bench(double=True), cell, replace(cell, method="float"))
    assert kinds == {torch.float64}


def test_a_method_that_cannot_do_double_precision_is_named(bench, cell, tmp_path):
    method = tmp_path / "method.py"
    method.write_text(
        "import torch\n"
        "class Single(torch.nn.Module):\n"
        "    def __init__(self, net):\n"
        "        super().__init__()\n"
        "        self.net = net.float()\n"
        "    def forward(self, x):\n"
        "        return self.net(x.double())\n"
        "def single(model, images, bits, seed):\n"
        "    return Single(model)\n"
    )
    own = replace(cell, method=f"{method}:single")
    with pytest.raises(ValueError, match=r"method.py:single fails in double precision, .*--double"):
        run(bench(double=True), own)
    assert bench().store.results.empty


IN_BOTH = """
import sys, torch
from dfsq import sr
from dfsq.sr.models.edsr import EDSR
from dfsq.study.benchmark import Bench, Cell

def load_model(name):
    torch.manual_seed(0)
    return EDSR(2, 4, 16)

sr.load_model = load_model
torch.set_num_threads(int(sys.argv[1]))
cell = Cell("net", sys.argv[2], "dfsq-exact", 3, crops=8, crop_size=48)
for double in (False, True):
    print(Bench(device="cpu", double=double).compute(cell).psnr.tolist())
"""


@pytest.mark.slow
def test_in_double_precision_rows_do_not_depend_on_how_sums_are_rounded(photos):
    """By one thread or two, with the processor's instructions or older ones, to the last bit."""
    for i, photo in enumerate(skimage.data.astronaut().reshape(2, 256, 512, 3)):
        Image.fromarray(photo).save(photos / f"{i}.png")
    older = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
    older["OPENBLAS_CORETYPE"] = "Haswell"
    said = [
        subprocess.run(
            [sys.executable, "-c", IN_BOTH, threads, photos],
            env=os.environ | environment, check=True, capture_output=True, text=True,
        ).stdout.splitlines()
        for threads, environment in (("1", {}), ("2", older))
    ]  # fmt: skip
    single, double = zip(*said, strict=True)
    assert double[0] == double[1]
    assert single[0] != single[1]  # or it would show nothing


def test_a_method_that_fails_is_named(bench, cell, tmp_path):
    method = tmp_path / "method.py"
    method.write_text("def broken(model, images, bits, seed):\n    raise KeyError('no')\n")
    with pytest.raises(ValueError, match=r"method.py:broken failed: KeyError: 'no'"):
        run(bench(), replace(cell, method=f"{method}:broken"))
    assert bench().store.results.empty


def test_rows_of_a_users_network_are_keyed_by_its_file(bench, cell, tmp_path, computed):
    """An edit of its forward is another network, though the weights are the same."""
    network = tmp_path / "network.py"
    network.write_text("# a network")
    of_file = replace(cell, model=f"{network}:build")
    first = run(bench(), of_file).id[0]
    assert run(bench(), of_file).id[0] == first
    network.write_text("# another")
    assert run(bench(), of_file).id[0] != first
    assert len(computed) == 2
    network.write_text("# a network")
    assert run(bench(), of_file).id[0] == first


@pytest.mark.parametrize("field", ["model", "method"])
def test_rows_of_a_users_file_are_keyed_by_what_it_imports(bench, cell, tmp_path, computed, field):
    own, neighbour = tmp_path / "own.py", tmp_path / "neighbour_of_own.py"
    own.write_text("from neighbour_of_own import made")
    ids = []
    for text in ("made = 1", "made = 2", "made = 1"):
        neighbour.write_text(text)
        (tmp_path / "other.py").write_text(text)  # which is not imported
        ids.append(bench().key(replace(cell, **{field: f"{own}:made"})))
    assert ids[0] == ids[2] != ids[1]


CHANGED = "def quantize(model, crops, bits, seed):\n    return model\n"


def test_a_method_that_is_edited_while_it_runs(bench, cell, tmp_path, monkeypatch):
    """No row of the old text stands under the new one's digest."""
    own = tmp_path / "own.py"
    own.write_text(CHANGED)
    of_file = replace(cell, method=f"{own}:quantize")
    original = benchmark.evaluate

    def evaluate(*arguments):
        own.write_text(f"{CHANGED}# edited\n")
        return original(*arguments)

    monkeypatch.setattr(benchmark, "evaluate", evaluate)
    with pytest.raises(ValueError, match=r"own\.py:quantize was changed while a row of it was"):
        run(bench(), of_file)
    assert bench().store.results.empty


def test_a_method_that_is_edited_is_run_again(bench, cell, tmp_path):
    own, made = tmp_path / "own.py", bench()
    own.write_text(CHANGED)
    of_file = replace(cell, method=f"{own}:quantize")
    float_psnr = made.compute(of_file).psnr
    own.write_text(CHANGED.replace("    return", "    model.tail[1].weight.data *= 2\n    return"))
    assert (made.compute(of_file).psnr != float_psnr).all()


def test_a_method_that_changes_the_crops(bench, cell, tmp_path):
    own, made = tmp_path / "own.py", bench()
    own.write_text(CHANGED.replace("return", "crops.reverse(); crops[0][:] = 0; return"))
    before = [crop.copy() for crop in made.crop_images(cell)]
    made.quantized(replace(cell, method=f"{own}:quantize"))
    for crop, expected in zip(made.crop_images(cell), before, strict=True):
        assert np.array_equal(crop, expected)


def test_two_methods_with_neighbours_of_one_name(bench, cell, tmp_path, own_modules):
    psnr = {}
    for version, text in (("v1", "1"), ("v2", "2")):
        (tmp_path / version).mkdir()
        own = tmp_path / version / "own.py"
        own.write_text(
            "from factor_of_own import FACTOR\n"
            "def quantize(model, crops, bits, seed):\n"
            "    model.tail[1].weight.data *= FACTOR\n"
            "    return model\n"
        )
        own.with_name("factor_of_own.py").write_text(f"FACTOR = {text}\n")
        psnr[version] = bench().compute(replace(cell, method=f"{own}:quantize")).psnr
    assert (psnr["v1"] != psnr["v2"]).all()
    assert (bench().compute(replace(cell, method="float", bits=32)).psnr == psnr["v1"]).all()


def test_overrides_in_a_methods_name(bench, cell):
    """With commas of their own, and of layers that need their inputs to be kept."""
    made = bench()
    method = 'dfsq-points:overrides={"body.0.*":{"selector":"kmeans","act_bits":3}},damping=0.1'
    config = made.config(replace(cell, method=method))
    assert config.damping == 0.1
    assert config.for_layer("body.0.body.0").selector == "kmeans"
    assert config.for_layer("body.1.body.0").selector == "exact"
    assert run(made, replace(cell, method=method)).method.tolist() == [method]
    layers = made.config(replace(cell, method='dfsq-points:layers=["body.0.*","head.*"],words=3'))
    assert (layers.layers, layers.words) == (("body.0.*", "head.*"), 3)


def test_static_ranges_of_single_layers_have_their_version():
    method = 'dfsq-points:overrides={"body.0.*":{"normalization":"static-channel"}}'
    static = benchmark.method_version("static-channel-mse")
    assert benchmark.method_version(method) == static != benchmark.method_version("dfsq-points")


def test_methods_with_fields_that_differ(bench, cell):
    made = bench()
    method = "dfsq-exact:least_squares=false,damping=0.1,order=given,words=2,seed=3"
    config = made.config(replace(cell, method=method))
    plain = made.config(replace(cell, method="dfsq-exact"))
    assert config == replace(
        plain, least_squares=False, damping=0.1, order="given", words=2, seed=3
    )
    keys = [made.key(replace(cell, method=m)) for m in (method, "dfsq-exact")]
    assert keys[0]["config_digest"] != keys[1]["config_digest"]
    row = run(made, replace(cell, method="dfsq-points:weights=mse")).iloc[0]
    assert row.method == "dfsq-points:weights=mse"
    with pytest.raises(ValueError, match=r"'bicubi'; there are bicubic, float, .* FILE\.py:FUNC"):
        made.config(replace(cell, method="bicubi"))
    for bad in ("dfsq-exact:dampings=1", "dfsq-exact:damping"):
        with pytest.raises(ValueError, match=r"must be FIELD=VALUE with a field of dfsq.Config"):
            made.config(replace(cell, method=bad))
    with pytest.raises(ValueError, match="damping must be between 0 and 1"):
        made.config(replace(cell, method="dfsq-exact:damping=2.0"))


def test_every_ablation_is_a_configuration(bench, cell):
    made = bench()
    configs = [made.config(replace(cell, method=method)) for method in benchmark.ABLATIONS]
    assert len(set(configs)) == len(configs)


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"device must be cpu.* not 'abacus'"):
        Bench(Store(tmp_path), device="abacus")


def test_a_calibration_serves_only_cells_of_the_same_layers(bench, cell):
    """A method may choose other layers, or state which inputs are non-negative."""
    made = bench()
    first = made.quantized(replace(cell, method='dfsq-points:exclude=["body.0.*"]'))
    assert len(first.quantization.layers) == 2
    again = made.quantized(cell)  # needs layers that the calibration before has not
    assert len(again.quantization.layers) == 4


def test_a_network_that_makes_another_size():
    model = Bicubic(4)
    pairs = sr.load_dataset("photographs", 4, limit=1)
    model.scale = 2
    message = r"the network makes an image of shape \(256, 256, 3\) of astronaut; with scale 2"
    with pytest.raises(ValueError, match=message):
        evaluate(model, pairs)
