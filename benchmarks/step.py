"""Time per step against SGD with momentum, interleaved in one process.

    python -m benchmarks.step --model resnet20 --width 16 --intervals 10/10/100
    python -m benchmarks.step --model vgg16 --optimizers tekfac --intervals 10/10/200 --profile

Blocks of steps of each optimizer follow one another, so that a machine whose speed drifts slows all
of them alike; what counts is the ratio of neighbouring blocks. ``--profile`` takes one step of each
kind apart instead.
"""

from __future__ import annotations

import argparse
import pkgutil
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

import tekfac
from tekfac.experiments import networks

METHODS = {m.__name__.lower(): m for m in (tekfac.KFAC, tekfac.EKFAC, tekfac.TKFAC, tekfac.TEKFAC)}
RESCALED = ("ekfac", "tekfac")


class Contender:
    """A network with its optimizer, on one fixed batch."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(options.batch_size, 3, 32, 32, device=options.device)
        self.y = torch.randint(10, (options.batch_size,), device=options.device)
        self.network = networks.build(options.model, (3, 32, 32), 10, options.width)
        self.network.to(options.device)
        self.fraction = options.fraction
        self.optimizer = self._make(name, options.intervals)
        self.times: list[list[float]] = []

    def _make(self, name: str, intervals: str) -> torch.optim.Optimizer:
        parameters = self.network.parameters()
        if name == "sgd":
            return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
        if name == "adam":
            return torch.optim.Adam(parameters, lr=1e-4)
        factor, scale, basis = map(int, intervals.split("/"))
        every: dict[str, Any] = {"factor_every": factor, "basis_every": basis}
        every["curvature_fraction"] = self.fraction
        if name in RESCALED:
            every["scale_every"] = scale
        return METHODS[name](self.network, lr=1e-5, **every)

    def step(self) -> float:
        """One training step; its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(self.x), self.y).backward()
        self.optimizer.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def block(self, steps: int) -> None:
        """Time some steps."""
        self.times.append([self.step() for _ in range(steps)])


def race(options: argparse.Namespace) -> None:
    """Print a table of medians and of ratios to SGD."""
    names = ["sgd", *options.optimizers.split(",")]
    contenders = {name: Contender(name, options) for name in names}
    for contender in contenders.values():
        for _ in range(2):  # the first step refreshes bases; caches and allocators warm up
            contender.step()
    for _ in range(options.blocks):
        for contender in contenders.values():
            contender.block(options.steps)
    base = [statistics.mean(block) for block in contenders["sgd"].times]
    print("| optimizer | ms per step | ratio to SGD (median of blocks) | slowest step / median |")
    print("| --- | --- | --- | --- |")
    for name, contender in contenders.items():
        means = [statistics.mean(block) for block in contender.times]
        ratio = statistics.median(own / sgd for own, sgd in zip(means, base, strict=True))
        steps = sorted(t for block in contender.times for t in block)
        print(
            f"| {name} | {1e3 * statistics.median(means):.1f} | {ratio:.2f} | "
            f"{steps[-1] / statistics.median(steps):.1f} |"
        )


PARTS = {
    "backward pass for output gradients": "tekfac.capture._gradients",
    "inputs and gradients as matrices": "tekfac.layers.Layer._rows",
    "factors": "tekfac.factors.second_moment",
    "rescaling": "tekfac.blocks.squared_gradients",
    "basis": "tekfac.blocks.eigh",
    "preconditioning": "tekfac.blocks.Block.precondition",
}


@contextmanager
def clocked(target: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time spent in a function."""
    function = pkgutil.resolve_name(target)

    def timed(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[target] = seconds.get(target, 0.0) + time.perf_counter() - start

    with mock.patch(target, timed):
        yield


def profile(options: argparse.Namespace) -> None:
    """Print, for each kind of step, where its time goes: the best of several."""
    sgd = Contender("sgd", options)
    plain = min(sgd.step() for _ in range(options.blocks + 1))
    print(f"sgd: {1e3 * plain:.0f} ms per step")
    for name in options.optimizers.split(","):
        for kind, intervals in (
            ("without statistics", "1000000/1000000/1000000"),
            ("with statistics", "1/1/1000000"),
            ("with statistics and a new basis", "1/1/1"),
        ):
            contender = Contender(
                name, argparse.Namespace(**{**vars(options), "intervals": intervals})
            )
            contender.step()
            best, parts = float("inf"), {}
            for _ in range(options.blocks):
                seconds: dict[str, float] = {}
                with ExitStack() as stack:
                    for target in PARTS.values():
                        stack.enter_context(clocked(target, seconds))
                    total = contender.step()
                if total < best:
                    best, parts = total, seconds
            print(f"{name}, {kind}: {1e3 * best:.0f} ms")
            for part, target in PARTS.items():
                if target in parts:
                    print(f"    {part}: {1e3 * parts[target]:.0f} ms")


def main() -> None:
    """Race or profile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20", choices=sorted(networks.NETWORKS))
    parser.add_argument("--width", type=int, help="default: the network's own")
    parser.add_argument("--optimizers", default="adam,tekfac", help="names, besides sgd")
    parser.add_argument("--intervals", default="10/10/100", help="factors/rescaling/basis")
    parser.add_argument("--fraction", type=float, default=1.0, help="curvature_fraction")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="per block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (profile if options.profile else race)(options)


if __name__ == "__main__":
    main()
