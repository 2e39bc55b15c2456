"""Time and memory of a step: four optimizers, three precisions, eager and compiled."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu import networks, optimizers
from benchmarks.gpu.part import Clock, Results, memory_peak, memory_reset, options_of

# Of a run of these steps the first few do not count: they find everything empty.
WARMUP, STEPS = 3, 24

# Statistics in every tenth step, all bases in every ninth (below ten they are made at once): each
# kind of step is there alone.
INTERVALS = {"factor_every": 10, "scale_every": 10, "basis_every": 9}

WORDS = (
    "Milliseconds between events on the device, median of each kind of step. *Mean* is that of a "
    "long run: of SOAP over all steps, a refresh in every tenth; of TEKFAC with statistics in "
    "every tenth step and new bases in every hundredth. *Host* is what the host takes to give a "
    "step to the device. Memory is the peak beyond what there was before the network. Compiled is "
    "the network, never an optimizer."
)


@dataclass
class Measured:
    """Steps by their kind.

    Attributes:
        device: seconds on the device.
        host: seconds until the host had nothing left to do.
        peak: MiB.
    """

    device: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    host: list[float] = field(default_factory=list)
    peak: float = 0.0

    def median(self, kind: str) -> float:
        """Milliseconds."""
        return 1e3 * statistics.median(self.device[kind]) if self.device[kind] else float("nan")

    def mean(self, name: str) -> float:
        """Milliseconds of an optimizer's step in a long run."""
        plain = self.median("plain")
        if name == "tekfac":
            measured, refreshed = self.median("statistics") - plain, self.median("basis") - plain
            return plain + measured / 10 + refreshed / 100
        return 1e3 * statistics.mean(self.device["plain"]) if name == "soap" else plain


def measured(
    name: str, optimizer_name: str, precision: str, compiled: bool, options: Any
) -> Measured:
    """Steps of one optimizer on a network of its own."""
    device, clock, found = options.device, Clock(options.device), Measured()
    before = memory_reset(device)
    networks.set_precision(precision)
    task = networks.task(name, device, options.tiny)
    given = INTERVALS if optimizer_name == "tekfac" else {}
    optimizer = optimizers.build(optimizer_name, task, options.tiny, **given)
    forward: Any = task.network
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(task.network, backend="aot_eager" if options.tiny else "inductor")
    marks = []
    for step in range(WARMUP + STEPS):
        kind = kind_of(optimizer)
        if step == WARMUP:
            clock.wait()
        start, begun = clock.now(), time.perf_counter()
        optimizer.zero_grad()
        task.loss(forward, precision).backward()
        optimizer.step()
        if step >= WARMUP:
            found.host.append(time.perf_counter() - begun)
            marks.append((kind, start, clock.now()))
    clock.wait()
    for kind, start, end in marks:
        found.device[kind].append(clock.seconds(start, end))
    found.peak = memory_peak(device, before)
    if hasattr(optimizer, "close"):
        optimizer.close()
    return found


def kind_of(optimizer: Any) -> str:
    """What the coming step does beyond a step without curvature."""
    blocks = getattr(optimizer, "blocks", {}).values()
    if any(block.due.basis and not block.factors.empty for block in blocks):
        return "basis"
    return "statistics" if any(block.listening for block in blocks) else "plain"


def main() -> None:
    """Measure; what is worth most comes first, for there may not be time for everything."""
    options = options_of(__doc__, ("--network", {"choices": networks.NAMES, "required": True}))
    name = options.network
    words = networks.task(name, torch.device("cpu"), options.tiny).words
    results = Results(options.out, f"Steps of {name}, {words}", options.device, WORDS)
    bases: dict[tuple[bool, str], float] = {}
    for compiled, precision, each in order():
        row: dict[str, Any] = {
            "network": "compiled" if compiled else "eager",
            "precision": precision,
            "optimizer": each,
        }
        try:
            found = measured(name, each, precision, compiled, options)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            results.add("steps", **row, failed=failed)
            continue
        plain, mean = found.median("plain"), found.mean(each)
        if each == "sgd":
            bases[compiled, precision] = plain
        base = bases.get((compiled, precision), float("nan"))
        row |= {"plain step": plain, "mean": mean, "plain / SGD": plain / base}
        row |= {"mean / SGD": mean / base, "host": 1e3 * statistics.median(found.host)}
        row["memory (MiB)"] = found.peak
        if each == "tekfac":
            row["with statistics"] = found.median("statistics")
            row["all bases"] = found.median("basis")
        results.add("steps", **row)


def order() -> list[tuple[bool, str, str]]:
    """Whether compiled, precision and optimizer of each row."""
    eager = [(False, p, name) for p in networks.PRECISIONS for name in optimizers.NAMES]
    # Each takes a compilation.
    compiled = [(True, p, name) for p in networks.PRECISIONS[::-1] for name in ("sgd", "tekfac")]
    rest = [(True, p, name) for p in networks.PRECISIONS[::-1] for name in ("adamw", "soap")]
    return eager + compiled + rest


if __name__ == "__main__":
    main()
