"""Sphinx extension: a notebook's glued figure on another page, with a caption and alternative text.

MyST-NB pastes pictures across pages bare. Here::

    ```{glue-figure} fig_name
    :doc: ../notebooks/04_network.ipynb
    :alt: what the picture shows
    :name: fig-at-a-glance

    The caption.
    ```
"""

import os
from binascii import a2b_base64
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from myst_nb.ext.glue.crossref import read_glue_cache
from myst_nb.ext.glue.utils import PendingGlueReference, create_pending_glue_ref
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


class Pictures(SphinxPostTransform):
    """Put in the pictures of figures, with their alternative text.

    MyST-NB by itself would only point to a file, which is there where the notebook's own page shows
    the same picture to the last byte.
    """

    default_priority = 4  # MyST-NB fills in what is pending, and names what is missing, at 5

    def run(self):
        builder = self.env.app.builder
        for figure in self.document.findall(nodes.figure):
            for pending in list(figure.findall(PendingGlueReference)):
                cache = read_glue_cache(self.env.mystnb_config.output_folder, pending.refdoc)
                data = cache.get(pending.key, {}).get("data", {}).get("image/png")
                if data is None:
                    continue
                picture = a2b_base64(data)
                file = f"{sha256(picture).hexdigest()}.png"
                folder = Path(builder.outdir) / builder.imagedir
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(picture)
                uri = os.path.relpath(
                    folder / file, (Path(builder.outdir) / self.env.docname).parent
                )
                pending.replace_self(nodes.image(uri=uri, candidates={"*": uri}, alt=figure["alt"]))


def setup(app):
    app.add_directive("glue-figure", GlueFigure)
    app.add_post_transform(Pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
