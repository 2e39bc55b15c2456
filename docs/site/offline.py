"""The site is whole in its folder: nothing that a page loads comes from anywhere else."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)

ELSEWHERE = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"'
    r'|<link\b[^>]*\bhref="(?:https?:)?//[^"]*"'
    r'|url\(["\']?(?:https?:)?//[^)]*\)'
    r'|@import\s+["\'](?:https?:)?//[^"\']*'
)
ENTRANCE = """\
<!doctype html>
<meta charset="utf-8">
<title>tekfac</title>
<meta http-equiv="refresh" content="0; url={page}">
<a href="{page}">tekfac</a>
"""


def finish(app: Sphinx, error: Exception | None) -> None:
    """Make the entrance, and look for what is loaded from elsewhere."""
    folder = Path(app.outdir)
    if error is None and app.builder.format == "html":
        page = app.builder.get_target_uri(app.config.root_doc)
        (folder / "index.html").write_text(ENTRANCE.format(page=page), "utf-8")
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".html", ".css"):
                for found in ELSEWHERE.finditer(path.read_text("utf-8")):
                    log.warning("%s loads from elsewhere: %s", path.name, found[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
