"""How many eigenvectors the sides of a layer keep.

What is kept decides what preconditioning, new bases and state take. The measurements behind the
default are in benchmarks/README.md.
"""

from __future__ import annotations

from tekfac.layers import Layer

# See `ranks_of`.
GROUPED = 4


def ranks_of(layer: Layer, rank: int | None) -> tuple[int | None, int | None]:
    """How many eigenvectors the input side and the output side of a layer keep where they are wide.

    A channel of a grouped convolution is a layer of its own, and there may be a thousand. Whole
    bases of a depthwise 7×7 convolution would be a hundred times its weights, and take more time
    to find than those of all other layers together; so a side keeps no more than `GROUPED` times
    what the other side is wide.
    """
    if rank is None or layer.groups == 1:
        return rank, rank
    return min(rank, GROUPED * layer.d_out), min(rank, GROUPED * layer.d_in)
