"""Tables that runs wrote are pages that others link to, with the folder's name as title."""

from __future__ import annotations

from pathlib import PurePosixPath

from sphinx.application import Sphinx


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    path = PurePosixPath(docname)
    if path.parts[0] == "results" and len(path.parts) == 3:
        title = "" if source[0].startswith("# ") else f"# {path.parent.name}\n\n"
        source[0] = f"---\norphan: true\n---\n\n{title}{source[0]}"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
