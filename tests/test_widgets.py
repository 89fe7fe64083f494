"""Widgets draw anew when a control moves, and cope with as little as there can be to show."""

import matplotlib.figure
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import nn

import dfsq
from dfsq.study import distributions, interactive, widgets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shown(monkeypatch):
    """The figures shown, in order."""
    figures = []
    monkeypatch.setattr(widgets, "display", figures.append)
    monkeypatch.setattr(interactive, "show", lambda figure, alt: figures.append(figure))
    return figures


@pytest.fixture(scope="module")
def network():
    """Two layers, of one channel and of five."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 1, 12, 14, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def maps(network, images):
    return distributions.gather_maps(network, list(images), samples=32)


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(0)
    names = ("original", "bicubic", "float", "4 bits", "2 bits")
    return {name: rng.integers(0, 256, (20, 30, 3), np.uint8) for name in names}


def rows(*cells):
    return pd.DataFrame(cells, columns=["model", "dataset", "method", "bits", "psnr"])


def plain(model, dataset):
    return [(model, dataset, "float", 32, 34.0), (model, dataset, "bicubic", 32, 31.0)]


def named(widget):
    """A widget's controls, by what they are called."""
    controls = []
    for child in widget.children[:-2]:  # then comes what is said, and what is drawn
        controls += getattr(child, "children", [child])
    return {control.description: control for control in controls}


def said(widget):
    return widget.children[-2].value


# --- distributions --------------------------------------------------------------------------------


def outlines(figure):
    """For each panel its title, and the shares of each image."""
    return {
        axis.get_title(): [patch.get_data().values for patch in axis.patches[::2]]
        for axis in figure.axes
    }


def test_a_channel_is_drawn_on_every_image(shown, maps):
    widget = widgets.distributions(maps, ["a", "b", "c"])
    controls = named(widget)
    assert list(controls) == ["layer", "channel", "normalization"]
    assert controls["channel"].max == 0
    controls["layer"].value = "2"
    assert controls["channel"].max == 4
    channel = int(maps["2"].ranges.min(axis=0).argmax())  # one that is nowhere silent
    controls["channel"].value = channel
    controls["normalization"].value = "per image"
    drawn = outlines(shown[-1])
    assert list(drawn) == ["none", "per image"]
    for name, own in (("none", (False, False)), ("per image", (True, False))):
        values = maps["2"].normalized(*own)[:, channel]
        expected = [np.histogram(v, np.linspace(0, 1, 65))[0] / 32 for v in values]
        np.testing.assert_allclose(drawn[name], expected)
    assert [text.get_text() for text in shown[-1].legends[0].get_texts()] == ["a", "b", "c"]
    distances = [
        distributions.distances(maps["2"].normalized(*own)[:, [channel]])["images"]
        for own in ((False, False), (True, False))
    ]
    assert "{:.2f} → {:.2f}".format(*distances) in said(widget)


def test_every_one_of_many_images_is_drawn(shown, network):
    many = distributions.gather_maps(network, list(torch.rand(11, 1, 8, 8)), samples=16)
    widgets.distributions(many, [str(i) for i in range(11)])
    assert [len(panel) for panel in outlines(shown[-1]).values()] == [11, 11]


def test_one_layer_one_channel_one_image(shown):
    one = np.zeros((1, 1))
    layer = distributions.LayerMaps(
        True, one, one + 2, one + 1, one + 3, np.linspace(0, 2, 9, dtype=np.float32)[None, None]
    )
    widget = widgets.distributions({"only": layer}, ["a"])
    assert list(outlines(shown[-1])) == ["none", "both (DFSQ)"]
    assert "on several images" in said(widget)


def test_a_silent_channel_is_drawn(shown):
    flat = np.zeros((2, 1))
    layer = distributions.LayerMaps(
        True, flat, flat, flat, flat + np.nan, np.zeros((2, 1, 9), np.float32)
    )
    widget = widgets.distributions({"only": layer}, ["a", "b"])
    assert len(shown) == 1
    assert "nan" not in said(widget)


# --- selection ------------------------------------------------------------------------------------


def test_points_are_selected_again(shown, network, images):
    calibration = dfsq.calibrate(network, images, dfsq.Config(), progress=False)
    widget = widgets.selection(calibration)
    controls = named(widget)
    assert list(controls) == ["layer", "channel", "bits", "universal set"]
    seen = {said(widget)}
    moves = {"bits": 2, "universal set": widgets.WORDS["SQ"], "layer": "2", "channel": 4}
    for name, value in moves.items():
        controls[name].value = value
        assert said(widget) not in seen, name
        seen.add(said(widget))
    controls["layer"].value = "0"  # of one channel
    assert controls["channel"].value == controls["channel"].max == 0
    signed = not calibration.layers["0"].non_negative
    best = dfsq.select(
        calibration.layers["0"].histogram,
        2,
        universal=dfsq.universal_set("sq", signed=signed),
    )
    assert f"exact: 4 points, mean squared error {best.sse / best.samples:.4g}" in said(widget)
    assert isinstance(shown[-1], matplotlib.figure.Figure)


# --- crops ----------------------------------------------------------------------------------------


def test_a_square_is_moved_and_stays_inside(shown, results):
    widget = widgets.crops(results, (28, 3, 8), 2, 24)
    controls = named(widget)
    assert list(controls) == ["result", "x", "y", "size"]
    assert controls["result"].options == ("bicubic", "4 bits", "2 bits")
    assert [(controls[name].value, controls[name].max) for name in "xy"] == [(22, 22), (3, 12)]
    controls["result"].value = "2 bits"
    for x, y, size in ((0, 12, 8), (4, 2, 10), (22, 12, 16)):
        controls["size"].value = size
        controls["x"].value, controls["y"].value = x, y
        x, y = min(x, 30 - size), min(y, 20 - size)
        assert (controls["x"].value, controls["y"].value) == (x, y)
        inside = np.s_[y : y + size, x : x + size]
        drawn = [axis.images[0].get_array() for axis in shown[-1].axes if axis.images]
        for image, name in zip(drawn[1:4], ("original", "float", "2 bits"), strict=True):
            np.testing.assert_array_equal(image, results[name][inside])
        error = np.abs(results["2 bits"][inside].astype(float) - results["float"][inside])
        assert f"{error.mean():.2f} in the square" in said(widget)
        assert shown[-1].axes[4].images[0].get_clim() == (0, 24)


def test_an_image_smaller_than_the_square(shown, results):
    small = {name: image[:5, :7] for name, image in results.items()}
    controls = named(widgets.crops(small, (0, 0, 72), 1, 24))
    assert [(controls[n].value, controls[n].max) for n in ("x", "y", "size")] == [
        (0, 2), (0, 0), (5, 5),
    ]  # fmt: skip
    assert len(shown) == 1


# --- PSNR by bits ---------------------------------------------------------------------------------


def lines(figure):
    assert isinstance(figure, go.Figure)
    return {trace.name: list(trace.y) for trace in figure.data}


def test_methods_are_switched_for_every_data_set(shown):
    table = rows(
        *plain("n", "a"), ("n", "a", "dfsq", 4, 33.0), ("n", "a", "sq", 4, 32.0),
        *plain("n", "b"), ("n", "b", "dfsq", 4, 33.5), ("n", "b", "dfsq", 2, 32.5),
        *plain("m", "no method"), ("m", "no float", "dfsq", 4, 30.0),
    )  # fmt: skip
    controls = named(widgets.psnr_by_bits(table))
    assert list(controls) == ["network, data set", "dfsq", "sq"]
    assert controls["network, data set"].options == ("n, a", "n, b")
    assert lines(shown[-1]) == {"dfsq": [33.0], "sq": [32.0]}
    assert [shape.y0 for shape in shown[-1].layout.shapes] == [34.0, 31.0]
    controls["dfsq"].value = False
    assert lines(shown[-1]) == {"sq": [32.0]}
    controls["network, data set"].value = "n, b"
    assert lines(shown[-1]) == {}
    assert controls["sq"].disabled
    assert not controls["dfsq"].disabled
    controls["dfsq"].value = True
    assert lines(shown[-1]) == {"dfsq": [32.5, 33.5]}


@pytest.mark.parametrize(
    "table", [pd.DataFrame(), rows(), rows(*plain("n", "a")), rows(("n", "a", "dfsq", 4, 30.0))]
)
def test_a_store_without_rows_is_told(shown, table):
    with pytest.raises(ValueError, match="`dfsq bench` computes them"):
        widgets.psnr_by_bits(table)
    assert not shown
