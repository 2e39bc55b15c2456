"""Formulas become MathML when the site is built: no script sets them."""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def mathml(tex: str, display: str) -> str:
    """MathML, with names (tr, max) spaced as letters are and Greek capitals upright, as in TeX."""
    text = convert(tex, display=display)
    text = re.sub(r"<mo[^>]*>(\w{2,})</mo>", r"<mi>\1</mi>", text)
    return re.sub(
        r"<mi>(&#x003(?:9[1-9A-F]|A[0-9A]);|[Α-Ω])</mi>", r'<mi mathvariant="normal">\1</mi>', text
    )


def inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
