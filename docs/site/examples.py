"""The programs of `examples/` follow the recipes for frameworks, each as it is."""

from __future__ import annotations

import ast
from pathlib import Path

from sphinx.application import Sphinx

PAGE = "docs/recipes/frameworks"


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    found = sorted(Path(app.srcdir, "examples").glob("*.py")) if docname == PAGE else []
    if found:
        source[0] += "\n## Whole programs\n\nThey lie in `examples/`.\n"
    for path in found:
        words = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
        source[0] += f"\n### {path.name}\n\n{words}\n\n"
        source[0] += f"```{{literalinclude}} ../../examples/{path.name}\n:language: python\n```\n"
        app.env.note_dependency(str(path))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
