"""Interactive figures, by Plotly, which need no kernel and ask nothing of the network."""

import html

import numpy as np
import plotly.graph_objects as go
from IPython.display import display

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
    once, from the book's own files. JupyterLab takes the JSON, which Plotly's extension draws.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure
        With a height in its layout; the width is the page's.
    alt : str
        What the figure shows, for those who do not see it.
    """
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
