"""Steps that measure are run without a compiler, so that there is a graph to be seen.

A compiled network is one node in the autograd graph, whatever it multiplies. So from the end of one
step to the end of the next, as long as that is to measure, ``torch.compile`` stands aside
(``torch.compiler.set_stance``, which holds for the whole process). On all other steps a compiled
network runs as it was compiled, without a hook of ours in it.

What is evaluated before a step that measures is not compiled either: whether training goes on with
the next call is not to be seen, and once a compiled network runs nothing of ours does.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

# Who wants it, and torch's own handle while somebody does.
_holders: weakref.WeakSet[Any] = weakref.WeakSet()
_stance: Any = None


def stand_aside(holder: object, wanted: bool) -> None:
    """Have compilers stand aside for as long as this holder wants it, and lives."""
    if wanted and holder not in _holders:
        weakref.finalize(holder, _update)
        _holders.add(holder)
    elif not wanted:
        _holders.discard(holder)
    _update()


def _update() -> None:
    global _stance
    try:
        if _holders and _stance is None:
            _stance = torch.compiler.set_stance("force_eager")
        elif not _holders and _stance is not None:
            _stance.__exit__(None, None, None)
            _stance = None
    except RuntimeError:
        # Inside of what is compiled, there is nothing to be decided any more.
        return
