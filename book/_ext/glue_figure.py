"""Sphinx extension: a notebook's glued figure on another page, with a caption and alternative text.

MyST-NB pastes pictures across pages bare. Here::

    ```{glue-figure} fig_name
    :doc: ../notebooks/04_network.ipynb
    :alt: what the picture shows
    :name: fig-at-a-glance

    The caption.
    ```
"""

from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from myst_nb.ext.glue.utils import create_pending_glue_ref
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective


class GlueFigure(SphinxDirective):
    """A figure whose picture is filled in once all notebooks are read."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {
        "doc": directives.unchanged_required,
        "alt": directives.unchanged_required,
        "name": directives.unchanged,
    }

    def run(self):
        for option in ("doc", "alt"):
            if option not in self.options:
                raise self.error(f"glue-figure needs the option :{option}:")
        source, line = self.get_source_info()
        figure = nodes.figure(alt=self.options["alt"], align="default")
        figure += create_pending_glue_ref(
            self.state.document, source, line, self.options["doc"], self.arguments[0]
        )
        if self.content:
            caption = nodes.caption()
            text, _ = self.state.inline_text(" ".join(self.content), self.content_offset)
            figure += caption
            caption += text
        self.set_source_info(figure)
        self.add_name(figure)
        return [figure]


class AlternativeText(SphinxPostTransform):
    """Hand a figure's alternative text to its picture, which MyST-NB has put in by now."""

    default_priority = 6  # MyST-NB fills in at 5

    def run(self):
        for figure in self.document.findall(nodes.figure):
            for image in figure.findall(nodes.image):
                if alt := figure.get("alt"):
                    image["alt"] = alt


def setup(app):
    app.add_directive("glue-figure", GlueFigure)
    app.add_post_transform(AlternativeText)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
