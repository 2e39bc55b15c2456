"""About how long runs take on a GPU."""

from __future__ import annotations

import math

from tekfac.runs.config import Config

# Of the networks at this width: multiply-adds of an image's forward pass, and the cubes of the
# sizes of all layers' factors, summed, to which the work of eigendecompositions is in proportion.
WIDTH = 64
FORWARD = {"resnet20": 0.65e9, "vgg16": 0.31e9}
CUBES = {"resnet20": 7.2e10, "vgg16": 5.3e11}
# Operations a second that a card like NVIDIA's A100 is taken to sustain in convolutions (TF32) and
# in eigendecompositions, of which one takes about nine operations per cube. Assumed, not measured.
CONVOLUTION_RATE = 20e12
DECOMPOSITION_RATE = 1e12
HOW_ESTIMATED = (
    "from operation counts, at 20 and, in eigendecompositions, 1 teraflop a second, as an A100 or "
    "H100 is taken to do; not measured"
)


def gpu_hours(config: Config, images: int) -> float:
    """About how long a run takes on a GPU, from operation counts.

    Forward and backward pass are three forward passes; on a step with statistics there is one more
    backward pass, and their products cost as much again.

    Args:
        config: a run on a network of the paper.
        images: training images.
    """
    steps = math.ceil(images / config.batch_size) * config.epochs
    wider = (config.width or WIDTH) / WIDTH
    forward, cubes = FORWARD[config.network] * wider**2, CUBES[config.network] * wider**3
    seconds = 6 * forward * images * config.epochs / CONVOLUTION_RATE
    if "factor_every" in config.settings:
        seconds *= 1 + 2 / config.settings["factor_every"]
        refreshes = steps / config.settings["basis_every"]
        seconds += refreshes * 9 * cubes / DECOMPOSITION_RATE
    return seconds / 3600
