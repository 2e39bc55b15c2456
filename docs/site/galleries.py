"""Galleries run when the site is built, and show what they print and draw."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import matplotlib
from drawings import FAINT, INK, figure
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from snippets import FENCE, execute, snippet_of, snippets
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging

log = logging.getLogger(__name__)

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tekfac",
    "font.size": 11,
    "figure.figsize": (7.2, 3.6),
    "figure.constrained_layout.use": True,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "axes.prop_cycle": "cycler('color', ['#8a8f98', '#ca6702', '#9b5de5', '#0a9396', '#d1495b'])",
}


def run(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put what a gallery's blocks print and draw after each of them."""
    if any(snippet.shown for snippet in snippets(source[0])):
        log.info("running %s", docname)
        matplotlib.use("agg")
        with matplotlib.rc_context(STYLE):
            source[0] = with_outputs(source[0], docname)


def with_outputs(page: str, name: str) -> str:
    namespace: dict[str, object] = {"__name__": "__main__"}

    def shown(found: re.Match[str]) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            execute(snippet_of(found), name, namespace)
        parts = [found[0]]
        if said.getvalue().strip():
            parts.append(f"```text\n{said.getvalue().rstrip()}\n```")
        parts += [drawn(plt.figure(number), name) for number in plt.get_fignums()]
        plt.close("all")
        return "\n\n".join(parts)

    return FENCE.sub(shown, page)


def drawn(plot: Figure, name: str) -> str:
    """A plot as a block of HTML in Markdown."""
    if not plot.get_label():
        raise ExtensionError(f"{name}: a plot needs words for those who can't see it: num=...")
    written = io.StringIO()
    plot.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    # A block of HTML ends at an empty line.
    return re.sub(r"\n\s*\n", "\n", figure(written.getvalue(), str(plot.get_label())))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", run)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
