"""How a statistics step's time and memory grow with one layer's sizes.

    python -m benchmarks.scaling --out benchmarks

One convolution and one linear layer; batch, positions, input width and output width are doubled in
turn while the others stay. Statistics are of the whole batch and in whole bases, what sampling and
truncation save from. Time is processor time of the block alone (`observe` and `update`, no new
basis), the best of several; memory is the most that torch's allocator held during it, beyond
the sample itself. Slopes are fitted to the last three points, on logarithmic axes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tekfac.curvature.blocks import Due
from tekfac.layers import ConvLayer, Layer, LinearLayer, Sample
from tekfac.methods.tekfac import TEKFACBlock

Sizes = Mapping[str, int]
CONV: Sizes = {"batch": 32, "positions": 256, "input width": 32, "output width": 32}
LINEAR: Sizes = {"batch": 512, "input width": 256, "output width": 256}
DOUBLINGS = 4


def conv(sizes: Sizes) -> tuple[Layer, Sample]:
    """A 3×3 convolution and what it may have seen."""
    side = math.isqrt(sizes["positions"])
    rows = sizes["positions"] // side
    module = nn.Conv2d(sizes["input width"], sizes["output width"], 3, padding=1)
    x = torch.randn(sizes["batch"], sizes["input width"], rows, side)
    g = torch.randn(sizes["batch"], sizes["output width"], rows, side)
    layer = ConvLayer("conv", module, module.get_parameter("weight"), module.get_parameter("bias"))
    return layer, Sample([x], [g], examples=len(x))


def linear(sizes: Sizes) -> tuple[Layer, Sample]:
    """A linear layer and what it may have seen."""
    module = nn.Linear(sizes["input width"], sizes["output width"])
    x = torch.randn(sizes["batch"], sizes["input width"])
    g = torch.randn(sizes["batch"], sizes["output width"])
    layer = LinearLayer(
        "linear", module, module.get_parameter("weight"), module.get_parameter("bias")
    )
    return layer, Sample([x], [g], examples=len(x))


@torch.no_grad()
def measure(make: Callable[[Sizes], tuple[Layer, Sample]], sizes: Sizes) -> tuple[float, float]:
    """Seconds and bytes of one statistics step."""
    torch.manual_seed(0)
    layer, sample = make(sizes)
    block = TEKFACBlock(layer, {"damping": 1e-2})

    def step() -> None:
        block.observe(sample)
        block.learn(0.95)
        if block.refreshing:
            block.refresh(block.eigen())
        block.rotate()
        block.finish_update(0.95)

    step()
    block.due = Due(basis=False, late=False)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return min(seconds), peak


def slope(sizes: list[int], values: list[float]) -> float:
    """Of the last three points, by least squares on logarithmic axes."""
    x = [math.log(size) for size in sizes[-3:]]
    y = [math.log(value) for value in values[-3:]]
    mean_x, mean_y = sum(x) / 3, sum(y) / 3
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    """Measure, draw and print the slopes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for scaling.png")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figure = Figure(figsize=(10, 7), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    print("| layer | grows | slope of time | slope of memory |")
    print("| --- | --- | --- | --- |")
    for column, (name, make, base) in enumerate(
        (("3×3 convolution", conv, CONV), ("linear layer", linear, LINEAR))
    ):
        for key in base:
            factors = [2**power for power in range(DOUBLINGS + 1)]
            pairs = [measure(make, {**base, key: base[key] * factor}) for factor in factors]
            slopes = []
            for row, unit in enumerate((1e3, 2**-20)):
                values = [unit * pair[row] for pair in pairs]
                slopes.append(slope(factors, values))
                label = f"{key}: {slopes[-1]:.2f}"
                axes[row, column].plot(factors, values, marker="o", label=label)
            print(f"| {name} | {key} | {slopes[0]:.2f} | {slopes[1]:.2f} |", flush=True)
        sizes = ", ".join(f"{key} {value}" for key, value in base.items())
        axes[0, column].set_title(f"{name}\n{sizes}", fontsize=10)
        axes[1, column].set_xlabel("times the size above")
    axes[0, 0].set_ylabel("time of a statistics step (ms)")
    axes[1, 0].set_ylabel("memory beyond the sample (MiB)")
    for each in axes.flat:
        each.set_xscale("log", base=2)
        each.set_yscale("log")
        each.grid(alpha=0.3)
        each.legend(title="slope of the last three points", fontsize=8, title_fontsize=8)
    figure.savefig(options.out / "scaling.png")


if __name__ == "__main__":
    main()
