"""Sphinx extension: a book that asks nothing of the network.

The scripts come from the wheels that carry them. MathJax's SVG output with every TeX extension is
one file without fonts, so that formulas show in a book opened from a folder as in one that is
served. Plotly's is loaded by the pages that have such a figure, one file for all of them.
"""

import importlib.util
from pathlib import Path

from sphinx.util.fileutil import copy_asset

MATHJAX = Path("mathjax/tex-svg-full.js")
PLOTLY = Path("plotly.min.js")


def packaged(package, *parts):
    """Path of a file that a package carries."""
    return Path(importlib.util.find_spec(package).origin).parent.joinpath(*parts)


def copy_mathjax(app, exception):
    """Put MathJax among the book's static files."""
    if exception is None and app.builder.format == "html":
        static = Path(app.outdir) / "_static"
        copy_asset(packaged("sphinx-mathjax-offline", "static", MATHJAX), static / MATHJAX.parent)


def load_plotly(app, pagename, templatename, context, doctree):
    """Load Plotly in the head of a page that draws with it."""
    if "plotly-graph-div" in context.get("body", ""):
        copy_asset(packaged("plotly", "package_data", PLOTLY), Path(app.outdir) / "_static")
        # Before the figures' own inline scripts, hence neither deferred nor asynchronous.
        app.add_js_file(str(PLOTLY), priority=100)


def setup(app):
    app.config.mathjax_path = str(MATHJAX)
    app.connect("html-page-context", load_plotly)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
