"""Interactive figures carry their values, and no script nor address."""

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dfsq.study import interactive


@pytest.fixture
def table():
    values = [[0.5, -1.25, np.nan], [2, 0, 1 / 3]]
    frame = pd.DataFrame(values, index=["a", "b"], columns=[0, 1, 2])
    return frame.rename_axis(index="layer", columns="channel")


def test_a_heat_map_holds_the_table(table):
    figure = interactive.heat_map(
        table, "unit", text="%{y} %{z} %{customdata[1]}", details=[table + 1, 10 * table]
    )
    trace = figure.data[0]
    assert trace.z == ([0.5, -1.25, None], [2, 0, 0.3333])
    assert (list(trace.y), list(trace.x)) == (["a", "b"], [0, 1, 2])
    assert [list(cell) for cell in trace.customdata[1]] == [[3, 20], [1, 0], [1.333, 3.333]]
    assert (trace.zmin, trace.zmax) == (-2, 2)
    assert figure.layout.xaxis.title.text == "channel"
    assert interactive.heat_map(table, "unit", text="%{z}").data[0].customdata is None


def test_what_is_shown_needs_no_network(table, monkeypatch):
    shown = []
    monkeypatch.setattr(interactive, "display", lambda forms, raw: shown.append((forms, raw)))
    interactive.show(interactive.heat_map(table, "unit", text="%{z}"), 'a "map" of <values>')
    ((forms, raw),) = shown
    assert raw
    page = forms["text/html"]
    assert 'class="plotly-graph-div"' in page  # by which the book knows that it must load Plotly
    assert 'aria-label="a &quot;map&quot; of &lt;values&gt;"' in page
    assert not re.search(r"<script[^>]+src|<link|https?://(?!plot\.ly\")", page)
    drawn = json.loads(json.dumps(forms["application/vnd.plotly.v1+json"]))
    assert drawn["data"][0]["z"] == [[0.5, -1.25, None], [2, 0, 0.3333]]
    assert drawn["config"]["responsive"]


def test_on_colab_plotly_shows_the_figure_itself(table, monkeypatch):
    shown = []
    monkeypatch.setattr(interactive.pio.renderers, "default", "colab")
    monkeypatch.setattr(interactive, "display", lambda *_, **__: pytest.fail("drawn by no one"))
    monkeypatch.setattr(
        interactive.go.Figure, "show", lambda figure, **options: shown.append((figure, options))
    )
    figure = interactive.heat_map(table, "unit", text="%{z}")
    interactive.show(figure, "a map of values")
    assert shown == [(figure, {"config": interactive.CONFIG})]


def test_a_step_of_the_slider_shows_one_crop_and_its_error():
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (20, 30, 3), np.uint8) for name in ("float", "4", "2")}
    figure = interactive.flip(images, (5, 3, 8), "float", 24)
    crop = {name: image[3:11, 5:13] for name, image in images.items()}
    for i, name in enumerate(images):
        picture, error = figure.data[2 * i : 2 * i + 2]
        drawn = Image.open(io.BytesIO(base64.b64decode(picture.source.split(",")[1])))
        np.testing.assert_array_equal(np.asarray(drawn), crop[name])
        expected = np.abs(crop[name].astype(float) - crop["float"]).mean(axis=2)
        np.testing.assert_allclose(error.z, expected, atol=0.051)
        assert picture.visible == error.visible == (i == 0)
        step = figure.layout.sliders[0].steps[i]
        assert step.label == name
        assert list(np.flatnonzero(step.args[1])) == [2 * i, 2 * i + 1]


def test_lines_of_methods_are_the_table():
    table = pd.DataFrame(
        [("dfsq", 4, 33.1), ("static-tensor-minmax", 4, 30.0), ("dfsq", 2, 31.5)],
        columns=["method", "bits", "psnr"],
    )
    figure = interactive.psnr_by_bits(table, {"float": 34.0, "bicubic": 31.0})
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}
    assert lines == {"dfsq": ([2, 4], [31.5, 33.1]), "static-tensor-minmax": ([4], [30.0])}
    low, high = figure.layout.yaxis.range
    assert low < 31.0 < 34.0 < high
    assert [shape.y0 for shape in figure.layout.shapes] == [34.0, 31.0]
