"""Interactive figures, by Plotly, which need no kernel and ask nothing of the network."""

import base64
import html
import io

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import display
from PIL import Image
from plotly.subplots import make_subplots

from .figures import GREY, color

#: What every figure has in common; the height of each is its own.
LAYOUT = {
    "template": "plotly_white",
    "font": {"size": 13, "color": "black"},
    "margin": {"l": 10, "r": 10, "t": 20, "b": 10},
    "hoverlabel": {"font_size": 13},
}
CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False, "scrollZoom": False}


def show(figure, alt):
    """Show a Plotly figure, as the value of a notebook's cell.

    Two forms are put out, and whoever shows the notebook takes the one that it knows. A page of
    the book takes the HTML, which holds the figure and not Plotly's script: the page loads that
    once, from the book's own files. JupyterLab and VS Code take the JSON, which Plotly's extension
    draws. Colab knows neither, so there Plotly shows the figure in its own way.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure
        With a height in its layout; the width is the page's.
    alt : str
        What the figure shows, for those who do not see it.
    """
    if pio.renderers.default == "colab":  # Plotly has looked where it is
        figure.show(config=CONFIG)
        return
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config=CONFIG,
        default_height=f"{figure.layout.height}px",
    )
    forms = {
        "text/html": f'<div role="group" aria-label="{html.escape(alt)}">{drawn}</div>',
        "application/vnd.plotly.v1+json": figure.to_plotly_json() | {"config": CONFIG},
        "text/plain": alt,
    }
    display(forms, raw=True)


def heat_map(table, label, *, text, details=()):
    """A table in colours around 0, with the values where the pointer is.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows are drawn from top to bottom, columns from left to right, each with its name; where
        there is no value, nothing is drawn. The indices' names are the axes' labels.
    label : str
        Of the colours, with the unit.
    text : str
        What the pointer shows, in Plotly's notation: ``%{y}`` and ``%{x}`` are the names of row and
        column, ``%{z}`` is the value, ``%{customdata[0]}`` that of the first of the details.
    details : sequence of pandas.DataFrame
        Further values, of the same rows and columns.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    most = float(np.nanmax(np.abs(table.to_numpy(dtype=float))))
    figure = go.Figure(
        go.Heatmap(
            z=_rows(table),
            x=list(table.columns),
            y=list(table.index),
            customdata=[
                list(zip(*rows, strict=True)) for rows in zip(*map(_rows, details), strict=True)
            ]
            or None,
            colorscale="RdBu_r",
            zmin=-most,
            zmax=most,
            colorbar={"title": {"text": label, "side": "right"}, "thickness": 12},
            hovertemplate=f"{text}<extra></extra>",
            hoverongaps=False,
        )
    )
    figure.update_layout(
        **LAYOUT,
        height=120 + 18 * len(table),
        plot_bgcolor="#DDDDDD",
        xaxis={"title": {"text": table.columns.name}, "showgrid": False},
        yaxis={
            "title": {"text": table.index.name},
            "autorange": "reversed",
            "automargin": True,
            "dtick": 1,
            "showgrid": False,
            "tickfont": {"size": 10},
        },
    )
    return figure


def _rows(table):
    """Values of a table as JSON takes them: numbers of four digits, none for a gap."""
    return [
        [float(f"{value:.4g}") if np.isfinite(value) else None for value in row]
        for row in table.to_numpy(dtype=float)
    ]


def flip(images, box, reference, most):
    """Crops under a slider, each beside the map of its error.

    Parameters
    ----------
    images : dict of str to uint8 array, shape (H, W, 3)
        Steps of the slider, in order, the reference among them.
    box : (x, y, size)
        In pixels.
    reference : str
        Name of the image that errors are measured against.
    most : float
        Error in grey levels that is drawn in the darkest colour.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    x, y, size = box
    crops = {name: image[y : y + size, x : x + size] for name, image in images.items()}
    figure = make_subplots(1, 2, horizontal_spacing=0.03)
    # Lying, so that a phone's width is left to the pictures.
    bar = {"orientation": "h", "thickness": 10, "len": 0.47, "x": 0.76, "y": 1, "yanchor": "bottom"}
    bar["title"] = {"text": "grey levels", "side": "top"}
    for i, (name, crop) in enumerate(crops.items()):
        error = np.abs(crop.astype(float) - crops[reference]).mean(axis=2).round(1)
        figure.add_trace(
            go.Image(source=_data_uri(crop), hoverinfo="skip", visible=i == 0, name=name), 1, 1
        )
        figure.add_trace(
            go.Heatmap(
                z=error.tolist(),
                zmin=0,
                zmax=most,
                colorscale="magma_r",
                colorbar=bar,
                hovertemplate="%{z} grey levels<extra></extra>",
                visible=i == 0,
                name=name,
            ),
            1,
            2,
        )
    axis = {"visible": False, "constrain": "domain", "range": [-0.5, size - 0.5]}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis | {"range": [size - 0.5, -0.5]}, scaleratio=1)
    figure.update_yaxes(scaleanchor="x", col=1)
    figure.update_yaxes(scaleanchor="x2", col=2)
    steps = [
        {
            "label": name,
            "method": "restyle",
            "args": ["visible", [j // 2 == i for j in range(2 * len(crops))]],
        }
        for i, name in enumerate(crops)
    ]
    # Short of the edges, so that half of the first and of the last label have room there.
    slider = {"steps": steps, "pad": {"t": 20}, "x": 0.03, "len": 0.94}
    figure.update_layout(**LAYOUT, height=480, sliders=[slider])
    return figure


def _data_uri(image):
    """A uint8 image (H, W, 3) as a PNG within an address."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def psnr_by_bits(table, levels):
    """PSNR against bits, a line a method, which a click on its name hides and shows.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``method``, ``bits``, ``psnr``.
    levels : dict of str to float
        Drawn across, in dB; the frame holds what lies between them, and can be zoomed out.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    figure = go.Figure()
    for method, part in table.sort_values("bits").groupby("method", sort=False):
        static = method.startswith("static")
        figure.add_scatter(
            x=part.bits.tolist(),
            y=part.psnr.round(3).tolist(),
            name=method,
            mode="lines+markers",
            line={"color": color(method), "dash": "dash" if static else "solid"},
            hovertemplate="%{y:.3f} dB at %{x} bits",
        )
    for name, level in levels.items():
        figure.add_hline(
            level, line={"dash": "dot", "color": GREY, "width": 1}, annotation_text=name
        )
    low, high = min(levels.values()), max(levels.values())
    margin = 0.08 * (high - low)
    figure.update_layout(
        **LAYOUT,
        height=560,
        xaxis={"title": {"text": "bits"}, "tickvals": sorted(set(table.bits.tolist()))},
        yaxis={
            "title": {"text": "PSNR-Y, dB (higher is better)"},
            "range": [low - margin, high + margin],
        },
        legend={"orientation": "h", "y": -0.22},
    )
    return figure
