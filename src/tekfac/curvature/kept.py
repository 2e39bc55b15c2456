"""How many eigenvectors the sides of a layer keep.

What is kept decides what preconditioning, new bases and state take. The measurements behind the
default are in benchmarks/README.md.
"""

from __future__ import annotations

import torch

from tekfac.curvature.moments import DiagonalMoment, Moment
from tekfac.layers import Layer

# See `ranks_of`.
GROUPED = 4


def moments_of(
    layer: Layer, rank: int | None, storage: torch.dtype | None
) -> tuple[Moment, Moment]:
    """What a layer's input side and its output side are known by.

    Args:
        layer: the layer.
        rank: eigenvectors that wide factors keep; None for all.
        storage: what estimates are kept in; None for what they are computed in.
    """
    ranks = ranks_of(layer, rank)
    output = Moment(ranks[1], storage)
    if layer.looked_up:
        return DiagonalMoment(layer.d_in, layer.dtype, storage), output
    return Moment(ranks[0], storage), output


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
