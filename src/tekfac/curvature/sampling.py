"""How much of a batch statistics are taken from.

Exact statistics of a whole batch can cost several times the step that they are to help: the
input-side factor of a 3×3 convolution alone nine times its forward pass. They are estimates in any
case, of an expectation, from one batch's examples; neighbouring positions of an image say nearly
the same, and the running average sees many batches. So where there is much work, factors read
evenly spread positions of every example, as many as their size needs (the traces that weigh the
examples are those of all positions), and the rescaling, which needs whole per-example gradients,
the first examples of the batch. Both remain unbiased. Where they are measured more often than
every ten steps, half as much of each batch serves an average as well. And float32 is rounded to
bfloat16 there before it is multiplied, on processors with units for that. Layers with little work
are measured whole and as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from tekfac.curvature.statistics import rotation_costs
from tekfac.layers import Layer, Sample

# Multiplications (about 3 ms of a CPU core) below which nothing is worth saving.
SMALL = 2**28

# What it takes to copy an entry of the inputs, in multiplications.
COPY = 64


@dataclass(frozen=True)
class Reading:
    """What is read of a sample.

    Attributes:
        examples: how many, the first ones.
        stride: every how many positions the inputs are read.
        dtype: what is multiplied; None for what the sample is in.
    """

    examples: int
    stride: int = 1
    dtype: torch.dtype | None = None


def factor_reading(layer: Layer, sample: Sample, rows: float | None) -> Reading:
    """What the factors are to read.

    Args:
        layer: the layer.
        sample: what it saw.
        rows: inputs to read, in all examples together, for each column of the input-side factor;
            None for all.
    """
    positions = layer.positions(sample)
    there, width = sample.examples * positions, layer.product_width
    work = layer.groups * there * width * (width + COPY)
    if rows is None or work <= SMALL:
        return Reading(sample.examples)
    stride = min(positions, max(1, round(there / (rows * layer.d_in))))
    return Reading(sample.examples, stride, _fast_dtype(layer, sample))


def scale_reading(layer: Layer, sample: Sample, examples: int | None) -> Reading:
    """What the rescaling is to read.

    Args:
        layer: the layer.
        sample: what it saw.
        examples: the examples to read where there is much work; None for all.
    """
    positions, d_in, d_out = layer.positions(sample), layer.product_width, layer.d_out
    work = positions * d_in * (d_out + COPY) + min(rotation_costs(positions, d_in, d_out))
    if examples is None or layer.groups * sample.examples * work <= SMALL:
        return Reading(sample.examples)
    return Reading(min(sample.examples, examples), dtype=_fast_dtype(layer, sample))


def _fast_dtype(layer: Layer, sample: Sample) -> torch.dtype | None:
    if layer.dtype == torch.float32 and multiplies_bfloat16(sample.gradients[0].device):
        return torch.bfloat16
    return None


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are several times as fast as in float32 there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
