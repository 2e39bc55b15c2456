"""How many eigenvectors the sides of a layer keep.

What is kept decides what preconditioning, new bases and state take. It is worth much where nothing
else holds a network's curvature together: with 64 of the eigenvectors of its 1000-wide layers an
autoencoder without norm layers diverges that trains with 250 or all (benchmarks/README.md). In
convolutional networks, and where a layer sees many positions of each example, 16 to 128 did as well
as all.
"""

from __future__ import annotations

from typing import Literal

from tekfac.layers import Layer

Rank = int | Literal["auto"] | None

# Eigenvectors kept of sides wider than three times that, by "auto".
FEW, MANY = 64, 512

# See `ranks_of`.
GROUPED = 4


def ranks_of(layer: Layer, rank: Rank, positions: int) -> tuple[int | None, int | None]:
    """How many eigenvectors the input side and the output side of a layer keep where they are wide.

    A channel of a grouped convolution is a layer of its own, and there may be a thousand. Whole
    bases of a depthwise 7×7 convolution would be a hundred times its weights, and take more time
    to find than those of all other layers together; so a side keeps no more than `GROUPED` times
    what the other side is wide.

    Args:
        layer: the layer.
        rank: "auto" for `MANY` with one position, `FEW` with more; None for all eigenvectors.
        positions: what the layer sees of an example.
    """
    if rank == "auto":
        rank = MANY if positions == 1 else FEW
    if rank is None or layer.groups == 1:
        return rank, rank
    return min(rank, GROUPED * layer.d_out), min(rank, GROUPED * layer.d_in)
