"""Blocks of Python in Markdown: what the site runs and shows, and what the tests run.

After the word ``python`` a block's first line may say, for this package alone:

- ``run``: the page is a gallery. Its blocks run when the site is built, and show what they print
  and draw;
- ``needs=NAME``: the block needs a module that may be missing;
- ``not-run``: it is shown only, and never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FENCE = re.compile(
    r"^(?P<indent> *)```python(?P<words>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """A block of Python.

    Attributes:
        code: its text.
        line: the line of the page on which it begins, from 1.
        words: what its first line says beside ``python``.
    """

    code: str
    line: int
    words: tuple[str, ...]

    @property
    def runs(self) -> bool:
        return "not-run" not in self.words

    @property
    def shown(self) -> bool:
        """Whether the site shows what it prints and draws."""
        return "run" in self.words

    @property
    def needs(self) -> tuple[str, ...]:
        """Modules that may be missing."""
        return tuple(w.removeprefix("needs=") for w in self.words if w.startswith("needs="))


def snippets(page: str) -> list[Snippet]:
    """All blocks of Python in a page of Markdown."""
    return [snippet_of(found) for found in FENCE.finditer(page)]


def snippet_of(found: re.Match[str]) -> Snippet:
    """The block of a match of `FENCE`."""
    indent = len(found["indent"])
    code = "".join(line[indent:] or "\n" for line in found["code"].splitlines(keepends=True))
    line = found.string.count("\n", 0, found.start("code")) + 1
    return Snippet(code, line, tuple(found["words"].split()))


def execute(snippet: Snippet, page: str, namespace: dict[str, object]) -> None:
    """Run a block in the page's namespace; errors name the page and its line."""
    exec(compile("\n" * (snippet.line - 1) + snippet.code, page, "exec"), namespace)
