"""Tables of results: what is shown, what is marked, what is missing."""

import numpy as np
import pandas as pd
import pytest
import torch

from dfsq import Config, quantize
from dfsq.convert import float_digest
from dfsq.sr.datasets import BENCHMARK_SETS
from dfsq.sr.models.srresnet import SRResNet
from dfsq.sr.zoo import load_model, trained_names
from dfsq.study import tables
from dfsq.study.benchmark import (
    ABLATIONS,
    CALIBRATION,
    INGREDIENT_SETS,
    INGREDIENTS,
    KEY,
    RESULTS_FOLDER,
    Cell,
    Store,
    ingredients,
    method_version,
    standard_grid,
)


def row(method, bits, psnr, **other):
    values = dict.fromkeys(KEY, "x") | {
        "model": "net", "dataset": "Set5", "images": 5, "layers": "body", "method": method,
        "bits": bits, "seed": 0, "draw": 0, "protocol_version": 1,
        "method_version": method_version(method),
        "calibration": "" if bits == 32 else CALIBRATION, "psnr": psnr, "ssim": 0.9,
    }  # fmt: skip
    values |= other
    return values | {"id": "|".join(str(values[k]) for k in ("dataset", "method", "bits"))}


@pytest.fixture
def rows():
    found = [row("float", 32, 38.0), row("bicubic", 32, 33.0), row("free", 4, 37.95)]
    found += [row(m, 4, p) for m, p in (("dfsq", 37.8), ("dfsq-points", 37.9), ("sq", 37.0))]
    return pd.DataFrame([*found, row("dfsq", 2, 34.0), row("sq", 2, 33.5)])


@pytest.fixture
def images(rows):
    generator = np.random.default_rng(0)
    offsets = generator.normal(0, 3, 5)
    parts = []
    for r in rows.itertuples():
        psnr = r.psnr + offsets - offsets.mean()
        if r.method not in ("float", "bicubic"):
            psnr = psnr + np.array([-0.02, -0.01, 0, 0.01, 0.02])
        names = list("abcde")
        parts.append(pd.DataFrame({"id": r.id, "image": names, "psnr": psnr, "ssim": 0.9}))
    return pd.concat(parts)


def test_losses_are_paired(rows, images):
    """Images differ by decibels, their losses by hundredths: the interval knows the latter only."""
    shuffled = images.sample(frac=1, random_state=1)
    found = tables.losses(rows, shuffled).set_index(["method", "bits"])
    assert list(found.index) == [
        ("free", 4), ("dfsq", 4), ("dfsq-points", 4), ("sq", 4), ("dfsq", 2), ("sq", 2),
    ]  # fmt: skip
    assert found.loss["dfsq", 4] == pytest.approx(0.2)
    assert 0.17 < found.low["dfsq", 4] < 0.2 < found.high["dfsq", 4] < 0.23


def test_intervals():
    mean, low, high = tables.estimate(np.arange(101.0))
    assert 43 < low < 45 < mean == 50 < 55 < high < 57
    assert tables.estimate([2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert tables.estimate([2.0]) == (2.0, -np.inf, np.inf)
    half = 12.7062 * 1.0  # the 97.5% quantile with one degree of freedom, and the standard error
    assert tables.estimate([1.0, 3.0]) == pytest.approx((2, 2 - half, 2 + half), abs=1e-4)
    assert tables.estimate([1.0, 3.0], 0.5) == pytest.approx((2, 1, 3))
    assert f"{tables.Estimate(-0.25, -0.5, 0.125):+.2f}" == "-0.25 [-0.50, +0.12]"
    for bad in ([], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="finite"):
            tables.estimate(bad)


@pytest.mark.parametrize("count", [5, 8, 14])
def test_intervals_of_few_values_hold_the_mean_as_often_as_they_say(count):
    samples = np.random.default_rng(0).normal(size=(2000, count))
    held = np.mean([low < 0 < high for _, low, high in map(tables.estimate, samples)])
    assert 0.94 < held < 0.96


def test_best_and_second_best_are_marked(rows):
    styled = tables.by_dataset(
        rows, "psnr", "{psnr:.1f}", ["float", "bicubic", "free", "dfsq", "dfsq-points", "sq"]
    )
    html = styled.to_html()
    table = styled.data
    assert list(table.index) == [
        (32, "float"), (32, "bicubic"), (4, "free"), (4, "dfsq"), (4, "dfsq-points"), (4, "sq"),
        (2, "dfsq"), (2, "sq"),
    ]  # fmt: skip
    assert table.loc[(4, "dfsq-points"), "Set5"] == "37.9"
    marks = {place: dict(style) for place, style in styled._compute().ctx.items() if style}
    assert marks == {(4, 0): {"font-weight": "bold"}, (3, 0): {"text-decoration": "underline"}}
    assert "bold" in html


def test_least_loss_is_best(rows, images):
    lost = tables.losses(rows, images)
    styled = tables.by_dataset(lost, "loss", "{loss:.2f}", ["dfsq", "dfsq-points", "sq"])
    marks = {place: dict(style) for place, style in styled._compute().ctx.items() if style}
    assert styled.data.index[1] == (4, "dfsq-points")
    assert marks[1, 0] == {"font-weight": "bold"}


def test_only_whole_sets_of_this_version(rows):
    other = [
        row("dfsq", 3, 1.0, images=4),
        row("dfsq", 3, 1.0, method_version=method_version("dfsq") + 1),
        row("static-tensor-minmax", 3, 1.0, method_version=1),
        row("dfsq", 3, 1.0, model="edsr-x2", weights_digest="of other weights"),
        row("dfsq", 3, 1.0, seed=1),
        row("dfsq", 3, 1.0, draw=1),
        row("dfsq", 3, 1.0, calibration=f"{CALIBRATION}, 8 of 96"),
        row("dfsq", 3, 1.0, dataset="photographs"),
    ]
    found = tables.whole_sets(pd.concat([rows, pd.DataFrame(other)]))
    assert found.id.tolist() == rows.id.tolist()


def test_a_stale_row_is_refused(rows):
    stale = pd.DataFrame([row("dfsq", 4, 37.7, weights_digest="y")])
    with pytest.raises(ValueError, match="two rows of net, Set5, dfsq, 4 bits stand"):
        tables.whole_sets(pd.concat([rows, stale]))


def test_what_is_absent():
    grid = standard_grid()
    sizes = {"Set5": 5, "Set14": 14, "B100": 100, "Urban100": 100}
    held = pd.DataFrame(
        [
            row(c.method, c.bits, 30.0, model=c.model, dataset=c.dataset, layers=c.layers,
                seed=c.seed, draw=c.draw, calibration=c.calibrated_on,
                images=c.limit or sizes[c.dataset])
            for c in grid
        ]
    )  # fmt: skip
    for name in trained_names():
        held.loc[held.model == name, "weights_digest"] = float_digest(load_model(name))[:16]
    assert tables.absent(held).empty
    retrained = held.assign(weights_digest="of other weights")
    assert set(tables.absent(retrained).model) == {*trained_names()}
    others = held[~held.calibration.str.contains("of 160")]
    assert tables.absent(others).method.tolist() == [
        "dfsq-points (other seeds or crops), dfsq-exact (other seeds or crops)"
    ]
    gone = held[(held.method != "sq") & ~((held.model == "imdn-x2") & (held.bits == 8))]
    found = tables.absent(gone)
    assert found[["model", "bits", "dataset", "method"]].values.tolist() == [
        ["edsr-8-x2", "4", "Set5, Set14, B100, Urban100", "sq"],
        [
            "imdn-x2",
            "8",
            "Set5, Set14, B100, Urban100",
            "dfsq, dfsq-points, uniform-minmax, dfsq-exact, dfsq-budget",
        ],
    ]


def test_a_new_store_lacks_everything(tmp_path):
    store = Store(tmp_path)
    assert tables.current(store.results).empty
    assert tables.losses(tables.whole_sets(store.results), store.images).empty
    assert not tables.absent(store.results).empty
    assert store.find("0123") is None


def test_ingredients_change_something(monkeypatch):
    assert ingredients("edsr-x2") == INGREDIENTS
    network = SRResNet(2, blocks=1, features=4, signed_output=False)
    monkeypatch.setattr("dfsq.sr.load_model", lambda name: network)
    left = {*INGREDIENTS} - {*ingredients("srresnet")}
    assert left == {"dfsq-exact:bias_correction=false"}
    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))]
    made = [
        quantize(network, images, Config(bias_correction=flag), progress=False)
        for flag in (True, False)
    ]
    states = [network.state_dict() for network in made]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_the_standard_grid_has_what_the_tables_promise():
    cells = set(standard_grid())
    for name in BENCHMARK_SETS:
        for method in ("dfsq", "dfsq-points", "uniform-minmax", "dfsq-exact", "dfsq-budget"):
            assert {Cell("edsr-8-x2", name, method, bits) for bits in (8, 6, 4, 3, 2)} <= cells
            for model in ("srresnet-8-x4", "imdn-x2", "imdn-x4"):
                assert {Cell(model, name, method, bits) for bits in (8, 6, 4, 3)} <= cells
            for model in trained_names():
                assert {Cell(model, name, method, bits) for bits in (8, 6, 4, 3, 2)} <= cells
        assert Cell("edsr-8-x2", name, "free-a", 4) in cells
        for method in ("uniform-mse", "dfsq-exact:selector=uniform-mse"):
            assert {Cell("edsr-8-x2", name, method, bits) for bits in (4, 3, 2)} <= cells
    for model in (*trained_names(), "srresnet-8-x4", "imdn-x2", "imdn-x4"):
        assert {Cell(model, name, "uniform-mse", 4) for name in ("Set14", "Urban100")} <= cells
    assert "edsr-x2" in trained_names()
    assert {*INGREDIENTS} <= {*ABLATIONS}
    for model in trained_names():
        changed = {c.method for c in cells if c.model == model} & {*INGREDIENTS}
        assert changed == {*ingredients(model)}
        for name in INGREDIENT_SETS:
            assert {Cell(model, name, method) for method in changed} <= cells
    assert {Cell("edsr-8-x2", "Set5", "dfsq", 4, seed) for seed in range(5)} <= cells
    assert {
        Cell("rdn-small-x4", "Urban100", "dfsq", 4, seed, limit=20) for seed in range(5)
    } <= cells
    for name in ("Set5", "Urban100"):
        for method in ("dfsq-w", "dfsq-a", "dfsq-points-a"):
            assert Cell("imdn-x4", name, method, 3) in cells
    assert Cell("edsr-8-x2", "Set5", "dfsq-exact", 4, crops=32, crop_size=160) in cells
    assert {
        Cell("edsr-8-x2", "Urban100", "dfsq-points", 4, limit=20, draw=d) for d in range(5)
    } <= cells
    assert {Cell("edsr-8-x2", "Urban100", "dfsq-exact", 4, draw=d) for d in range(5)} <= cells
    assert Cell("edsr-8-x2", "Urban100", "dfsq-exact", 4, crops=100) in cells


def test_published_values_have_a_protocol_and_a_source():
    table = tables.published()
    assert len(table) >= 8
    for column in ("method", "network", "layers", "activations", "tuning", "source"):
        assert (table[column].str.len() > 0).all(), column
    assert table[list(BENCHMARK_SETS)].notna().all(axis=None)
    assert not table.method.str.contains("DFSQ").any()  # its tables could not be read


def test_networks_say_whose_weights_they_have():
    table = tables.networks(["edsr-8-x2", "edsr-baseline-x2", *trained_names()])
    of_others = table[table["trained by"] != "this project"]
    assert of_others.index.tolist() == ["edsr-8-x2", "edsr-baseline-x2"]
    assert of_others["from"].str.startswith("https://").all()
    assert of_others["began as"].tolist() == ["", ""]
    assert "raw" not in table["from"]["edsr-8-x2"]  # the repository, not the file
    began = table["began as"][list(trained_names())]
    assert began["edsr-long-x2"] == began["edsr-x4"] == "edsr-x2"  # the latter by way of itself
    assert began["srresnet-x4"] == "srresnet-x2"
    assert began["rdn-small-x4"] == "rdn-small-x2"
    assert began["edsr-x2"] == began["srresnet-x2"] == began["rdn-small-x2"] == ""


# --- the committed tables ---

#: Full precision by the published protocol.
PUBLISHED = {
    ("edsr-8-x2", "Set5"): 37.801,
    ("edsr-8-x2", "Set14"): 33.373,
    ("edsr-8-x2", "B100"): 32.046,
    ("edsr-8-x2", "Urban100"): 31.516,
    ("srresnet-8-x4", "Set5"): 31.882,
    ("srresnet-8-x4", "Set14"): 28.429,
    ("imdn-x2", "Set5"): 37.996,
    ("imdn-x2", "Set14"): 33.627,
    ("imdn-x4", "Set5"): 32.209,
    ("imdn-x4", "Set14"): 28.582,
}


def test_standing_float_rows_agree_with_the_published_ones():
    rows = tables.whole_sets(Store(RESULTS_FOLDER).results)
    full = rows[rows.method == "float"].set_index(["model", "dataset"]).psnr
    found = [key for key in PUBLISHED if key in full.index]
    assert ("edsr-8-x2", "Urban100") in found
    for key in found:
        assert full[key] == pytest.approx(PUBLISHED[key], abs=0.01), key


def test_standing_rows_are_whole():
    """Each has its images, whose mean it is, and its provenance."""
    store = Store(RESULTS_FOLDER)
    assert store.results.id.is_unique
    assert set(store.results.id) == set(store.provenance.id) == set(store.images.id)
    means = store.images.groupby("id")[["psnr", "ssim"]].mean()
    counts = store.images.groupby("id").size()
    rows = store.results.set_index("id")
    np.testing.assert_allclose(rows.psnr, means.psnr[rows.index], atol=2e-6)
    np.testing.assert_allclose(rows.ssim, means.ssim[rows.index], atol=2e-6)
    assert (rows.images == counts[rows.index]).all()


@pytest.mark.parametrize("preset", ["dfsq-exact", "dfsq-budget"])
def test_our_presets_never_lose_more_than_the_released_method(preset):
    """Of the standing rows, whichever layers they quantize."""
    rows = tables.whole_sets(Store(RESULTS_FOLDER).results)
    psnr = rows.set_index(["model", "layers", "dataset", "bits", "method"]).psnr
    ours = psnr.xs(preset, level="method")
    released = psnr.xs("dfsq", level="method")
    common = ours.index.intersection(released.index)
    assert {"edsr-8-x2", "edsr-x2", "srresnet-8-x4", "imdn-x4"} <= {*common.unique("model")}
    assert (ours[common] >= released[common] - 0.01).all(), (ours - released)[common]


def test_repeats_of_rows():
    """What was seen of other roundings, beside the standing rows."""
    store = Store(RESULTS_FOLDER)
    assert set(store.repeats.id) <= set(store.results.id)
    rows = tables.whole_sets(store.results)
    found = tables.repeated(rows, store.images, store.repeats)
    psnr = store.results.set_index("id").psnr
    expected = [
        (row.id, psnr[row.id] - row.psnr)
        for row in store.repeats.itertuples()
        if row.id in set(found.id)
    ]
    assert len(found) > 50
    assert sorted(zip(found.id, found.change, strict=True)) == sorted(expected)
    assert tables.repeated(rows, store.images, store.repeats.iloc[:0]).empty
    most = tables.rounding(rows, store.images, store.repeats)
    on_set5 = found[found.dataset == "Set5"]
    for end in tables.LOSS_RANGES:
        assert most[end] == on_set5.change[on_set5.loss <= end].abs().max()
    assert 0 < most[0.1] < 0.1 < most[np.inf]
    assert tables.beyond_rounding(-1.01 * most[0.1], 0.1, most)
    assert not tables.beyond_rounding(-1.01 * most[0.1], 0.11, most)
    assert tables.rounding(rows, store.images, store.repeats.iloc[:0]).isna().all()


def test_differences_beyond_rounding_are_told_by_the_worse_row():
    most = pd.Series([0.01, 0.02, 0.02, 0.3, 0.3, 0.5, np.nan], tables.LOSS_RANGES)
    change = np.array([0.015, -0.015, 0.015, 0.25, -0.35, 0.4, 0.4, 9])
    larger = tables.beyond_rounding(change, np.array([0.03, -1, 0.1, 1, 0.31, 3, 3.1, 11]), most)
    assert larger.tolist() == [True, True, False, False, True, True, False, False]
    assert not tables.beyond_rounding(0.01, 0.0, most)
