"""Where a step's time goes: by part of the optimizer, and by kernel."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import networks, optimizers
from benchmarks.gpu.part import Clock, Results, options_of
from benchmarks.gpu.steps import INTERVALS, kind_of
from benchmarks.step import PARTS

WORDS = (
    "One step of each kind, float32 products in TF32, the network eager. Parts are between events "
    "on the device (ms): where it waits for the host, that is in it. *Kernels* counts what the "
    "host has launched, *busy* is the sum of their times."
)


class Parts:
    """Marks around functions of the optimizer, as `benchmarks.step` has them around its own."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.spans: list[tuple[str, Any, Any, list[int]]] = []
        self._open: list[list[int]] = []

    @contextmanager
    def around(self, part: str, target: str) -> Iterator[None]:
        """While this is entered, calls of a function are marked."""
        function = pkgutil.resolve_name(target)

        def marked(*args: object, **kwargs: object) -> object:
            inner: list[int] = []
            self._open.append(inner)
            start = self.clock.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._open.pop()
                self.spans.append((part, start, self.clock.now(), inner))
                if self._open:
                    self._open[-1].append(len(self.spans) - 1)

        with mock.patch(target, marked):
            yield

    def seconds(self) -> dict[str, float]:
        """Of each part, without that of others inside; once the device has passed all marks."""
        whole = [self.clock.seconds(start, end) for _, start, end, _ in self.spans]
        found: dict[str, float] = {}
        for (part, _, _, inner), seconds in zip(self.spans, whole, strict=True):
            own = seconds - sum(whole[number] for number in inner)
            found[part] = found.get(part, 0.0) + own
        return found


def main() -> None:
    """One step of each kind, twice: with marks, and in the profiler."""
    options = options_of(__doc__, ("--network", {"choices": networks.NAMES, "required": True}))
    name, device, clock = options.network, options.device, Clock(options.device)
    results = Results(options.out, f"Where a step of {name} goes", device, WORDS)
    networks.set_precision("TF32")
    task = networks.task(name, device, options.tiny)
    optimizer: Any = optimizers.build("tekfac", task, options.tiny, **INTERVALS)

    def step() -> None:
        optimizer.zero_grad()
        task.loss(task.network, "TF32").backward()
        optimizer.step()

    seen: dict[str, int] = {}
    for _ in range(32):
        kind = kind_of(optimizer)
        seen[kind] = seen.get(kind, 0) + 1
        # The first of a kind finds everything empty.
        if seen[kind] == 2:
            _marked(step, kind, clock, results)
        elif seen[kind] == 3:
            _profiled(step, kind, device, results)
        else:
            step()


def _marked(step: Any, kind: str, clock: Clock, results: Results) -> None:
    parts = Parts(clock)
    with ExitStack() as stack:
        for part, target in PARTS.items():
            stack.enter_context(parts.around(part, target))
        clock.wait()
        start = clock.now()
        step()
        end = clock.now()
        clock.wait()
    row = {part: 1e3 * seconds for part, seconds in parts.seconds().items()}
    results.add("parts", step=kind, **{"whole step": 1e3 * clock.seconds(start, end)}, **row)


def _profiled(step: Any, kind: str, device: torch.device, results: Results) -> None:
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as found:
        step()
        if cuda:
            torch.cuda.synchronize()
    averages = found.key_averages()
    time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
    # On the device there are kernels; on the CPU operators stand for them.
    kernels = [e for e in averages if not cuda or "CUDA" in str(e.device_type)]
    busy = sum(getattr(e, time_of) for e in kernels) / 1e3
    count = sum(e.count for e in kernels)
    results.add("kernels", step=kind, kernels=count, busy=busy)
    for event in sorted(kernels, key=lambda e: -getattr(e, time_of))[:10]:
        results.add(
            f"longest, {kind}",
            step=kind,
            kernel=event.key[:90],
            calls=event.count,
            ms=getattr(event, time_of) / 1e3,
        )


if __name__ == "__main__":
    main()
