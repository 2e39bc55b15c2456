"""Docstrings name pages by their files; here they link to them."""

from __future__ import annotations

import re

from sphinx.application import Sphinx


def link(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"\b((?:docs|results|benchmarks)/\w+)\.md\b", r":doc:`/\1`", line)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
