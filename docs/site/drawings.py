"""Drawings stand in the page itself, where they take on the colours of its scheme."""

from __future__ import annotations

import html
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

# In a drawing these stand for the page's own colours.
INK, FAINT = "#010203", "#040506"


def figure(svg: str, words: str) -> str:
    """HTML of a drawing; the words are for those who can't see it."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(words)}"', 1)
    return f'<figure class="drawing">{svg}</figure>'


def put_in(app: Sphinx, doctree: nodes.document) -> None:
    """Replace images of our own SVG files."""
    for image in list(doctree.findall(nodes.image)):
        if image["uri"].endswith(".svg"):
            path = Path(app.srcdir, image["uri"])
            # The file's own colours are for readers of the repository.
            svg = re.sub(r"<style>.*?</style>", "", path.read_text("utf-8"), flags=re.DOTALL)
            image.replace_self(nodes.raw("", figure(svg, image["alt"]), format="html"))
            app.env.note_dependency(str(path))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", put_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
