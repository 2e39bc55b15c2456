"""What all parts have in common: options, results that are kept as they come, clocks."""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report


def options_of(words: str | None, *arguments: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """A part's options from the command line."""
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true")
    for name, given in arguments:
        parser.add_argument(name, **given)
    options = parser.parse_args()
    if options.device.type == "cuda":
        # Before the clock of anything starts.
        torch.ones(1, device=options.device)
    return options


class Results:
    """Tables of a part, on disk after each row.

    Args:
        file: where.
        title: of the part.
        device: what it is about.
        words: what the reader has to know.
    """

    def __init__(self, file: Path, title: str, device: torch.device, words: str = "") -> None:
        self._file = file
        self._found: dict[str, Any] = {
            "title": title, "words": words, "machine": machine(device), "tables": {},
        }  # fmt: skip

    def add(self, table: str, **row: Any) -> None:
        """Add a row, and keep it."""
        self.put(table, [*self._found["tables"].get(table, []), row])
        print(table, row, flush=True)

    def put(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Keep these rows in place of those that there were."""
        self._found["tables"][table] = rows
        report.save(self._file, self._found)


def machine(device: torch.device) -> str:
    """The device and versions, in words."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type != "cuda":
        return f"{device.type}, {versions}"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB), {versions}"


class Clock:
    """Time on the device, without making it wait for the host while it runs."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        """A mark in the device's work."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks that the device has passed."""
        return float(start.elapsed_time(end)) / 1e3 if self._cuda else float(end - start)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self._cuda:
            torch.cuda.synchronize()


def timed(device: torch.device, function: Callable[[], object], repeats: int) -> float:
    """Seconds of a call: the best of several, after one that does not count."""
    clock = Clock(device)
    function()
    best = float("inf")
    for _ in range(repeats):
        clock.wait()
        start = clock.now()
        function()
        end = clock.now()
        clock.wait()
        best = min(best, clock.seconds(start, end))
    return best


def memory_reset(device: torch.device) -> int:
    """Forget peaks; bytes in use now."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def memory_peak(device: torch.device, before: int) -> float:
    """MiB at the peak, beyond what there was before; 0 on the CPU, which keeps no account."""
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else 0.0
