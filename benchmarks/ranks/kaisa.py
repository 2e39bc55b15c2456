"""What KAISA (Pauloski et al., 2021, arXiv 2107.01739) would send and hold, by its own rules.

From its code, github.com/gpauloski/kfac-pytorch (``kfac/assignment.py``, ``kfac/layers/eigen.py``):
ranks are a grid, whose columns are groups of *gradient workers* and whose rows of *receivers*. Each
layer belongs to the column with the least work. Factors are summed over all ranks, as whole
matrices, and kept by all; one worker decomposes them, and tells eigenvectors and eigenvalues to its
column; every step, what a worker makes of the gradient goes to its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.ranks.counted import Message
from tekfac.ranks.placement import divided

FLOAT = 4


@dataclass(frozen=True)
class Rules:
    """Messages by the kind of step, and the fullest rank's bytes of state."""

    said: Mapping[str, list[Message]]
    state: int


def rules(sizes: Mapping[str, tuple[int, int]], ranks: int, workers: int) -> Rules:
    """What layers of these ``(d_in, d_out)`` lead to.

    Args:
        sizes: of each layer's matrix.
        ranks: how many there are.
        workers: gradient workers of each layer, a divisor of their number: all is its COMM-OPT, one
            its MEM-OPT.
    """
    columns = ranks // workers
    factors = {name: d_in**2 + d_out**2 for name, (d_in, d_out) in sizes.items()}
    bases = {name: factors[name] + sum(sizes[name]) for name in sizes}
    work = [d_in**3 + d_out**3 for d_in, d_out in sizes.values()]
    taken = divided(work, [range(columns)] * len(sizes), [0] * columns)
    here = [0] * columns
    for name, column in zip(sizes, taken, strict=True):
        here[column] += bases[name]
    fullest = max(here)
    told = [Message("broadcast", workers, FLOAT * fullest, 0)] if workers > 1 else []
    sums = [Message("allreduce", ranks, FLOAT * size) for size in factors.values()]
    directions = [
        Message("broadcast", columns, FLOAT * d_in * d_out, 0) for d_in, d_out in sizes.values()
    ]
    quiet = directions if columns > 1 else []
    return Rules(
        {"quiet": quiet, "statistics": quiet + (sums if ranks > 1 else []), "bases": quiet + told},
        FLOAT * (sum(factors.values()) + fullest),
    )
