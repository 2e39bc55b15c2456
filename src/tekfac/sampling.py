"""How much of a batch statistics are taken from.

Exact statistics of a whole batch can cost several times the step that they are to help: the
input-side factor of a 3×3 convolution alone nine times its forward pass. They are estimates in any
case, of an expectation, from one batch's examples; neighbouring positions of an image say nearly
the same, and the running average sees many batches. So where there is much work, factors read
evenly spread positions of every example, as many as their size needs, and the rescaling, which
needs whole per-example gradients, the first examples of the batch. Both remain unbiased. Layers
with little work are measured whole.
"""

from __future__ import annotations

from tekfac.layers import Layer, Sample
from tekfac.statistics import rotation_costs

# Multiplications (about 3 ms of a CPU core) below which nothing is worth saving.
SMALL = 2**28


def factor_stride(layer: Layer, sample: Sample, rows: int | None) -> int:
    """Every how many positions the input-side factor is to read.

    Args:
        layer: the layer.
        sample: what it saw.
        rows: inputs to read, in all examples together, for each column of the factor; None for all.
    """
    positions = layer.positions(sample)
    there = sample.examples * positions
    if rows is None or layer.groups * there * layer.d_in**2 <= SMALL:
        return 1
    return min(positions, max(1, round(there / (rows * layer.d_in))))


def examples_read(layer: Layer, sample: Sample, examples: int | None) -> int:
    """How many examples the rescaling is to be measured on.

    Args:
        layer: the layer.
        sample: what it saw.
        examples: the examples to read where there is much work; None for all.
    """
    positions, d_in, d_out = layer.positions(sample), layer.d_in, layer.d_out
    work = positions * d_in * d_out + min(rotation_costs(positions, d_in, d_out))
    if examples is None or layer.groups * sample.examples * work <= SMALL:
        return sample.examples
    return min(sample.examples, examples)
