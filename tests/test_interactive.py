"""Interactive figures carry their values, and no script nor address."""

import json
import re

import numpy as np
import pandas as pd
import pytest

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
