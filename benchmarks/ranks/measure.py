"""Processor seconds that curvature takes of one process, and of each of two with half the batch.

Statistics, new bases and preconditioning are clocked where they are called, in their thread's own
processor time: what waits for the other process, or for a busy machine, does not count. Two
processes are there all the time, and one of them works alone in its turn, so that a machine whose
speed drifts slows all ways alike.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pkgutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import tekfac

PARTS = {
    "statistics": (
        "tekfac.capture.graph.go_through",
        "tekfac.curvature.rescaling.CorrectedBlock.observe",
        "tekfac.curvature.rescaling.CorrectedBlock.rotate",
    ),
    "bases": ("tekfac.curvature.blocks.Block.eigen",),
    "preconditioning": ("tekfac.optimizer.update.Preconditioner.natural_gradients",),
}
# Ten steps have one measurement, and all bases twice; how often these come in an interval of 100.
STEPS, EVERY = 10, {"factor_every": 10, "scale_every": 10, "basis_every": 5}
SHARES = {"statistics": 1 / 10, "bases": 1 / 2 / 100, "preconditioning": 1 / STEPS}
EXAMPLES, WIDTHS = 256, (*(384,) * 9, 10)
ALONE, KINDS = "one process", {"by default": 32, "with whole bases (`rank=None`)": None}

Seconds = dict[str, float]


def network() -> nn.Sequential:
    """Wide layers, so that products are what takes the time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@contextmanager
def clocked(part: str, target: str, seconds: Seconds) -> Iterator[None]:
    """Add up a function's processor seconds, without those of other clocked ones inside of it."""
    real = pkgutil.resolve_name(target)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start, others = time.thread_time(), sum(seconds.values())
        try:
            return real(*args, **kwargs)
        finally:
            within = sum(seconds.values()) - others
            seconds[part] = seconds.get(part, 0.0) + time.thread_time() - start - within

    with mock.patch(target, timed):
        yield


def curvature_seconds(alone: bool, **options: Any) -> Seconds:
    """Of a step at intervals of 10/10/100, on average, by part.

    Args:
        alone: whether this process takes the whole batch, and nobody else is there.
        options: of the optimizer.
    """
    model = network()
    called = model if alone else DistributedDataParallel(model)
    count, number = (1, 0) if alone else (dist.get_world_size(), dist.get_rank())
    given = {**EVERY, **options}
    optimizer = tekfac.TEKFAC(called, lr=1e-4, interval_warmup=False, **given)
    torch.manual_seed(1)
    x = torch.randn(EXAMPLES, WIDTHS[0]).chunk(count)[number]
    y = torch.randint(WIDTHS[-1], (EXAMPLES,)).chunk(count)[number]
    seconds: Seconds = dict.fromkeys(PARTS, 0.0)
    for step in range(1 + STEPS):
        with ExitStack() as stack:
            for part, targets in PARTS.items() if step else ():
                for target in targets:
                    stack.enter_context(clocked(part, target, seconds))
            optimizer.zero_grad()
            F.cross_entropy(called(x), y).backward()
            optimizer.step()
    return {part: share * seconds[part] for part, share in SHARES.items()}


def rounds(repeats: int, rank: int | None) -> list[dict[str, Seconds]]:
    """Each round's seconds of this rank, by the way of working."""
    # Without a group given, a process takes itself for one of all ranks.
    own, _ = dist.new_subgroups(1)
    found = []
    for _ in range(repeats):
        each = {}
        if dist.get_rank() == 0:
            each[ALONE] = curvature_seconds(True, rank=rank, process_group=own)
        for placement in ("replicated", "sharded"):
            dist.barrier()
            given = {"rank": rank, "placement": placement}
            each[f"two, {placement}"] = curvature_seconds(False, **given)
        found.append(each)
        dist.barrier()
    return found


def _serve(number: int, store: str, told: Any, *args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = {"init_method": f"file://{store}", "rank": number, "world_size": 2}
    dist.init_process_group("gloo", timeout=timedelta(minutes=10), **where)
    told.put((number, rounds(*args)))
    dist.barrier()
    dist.destroy_process_group()


def on_two(repeats: int, rank: int | None) -> list[list[dict[str, Seconds]]]:
    """`rounds` of two processes."""
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        processes = [
            context.Process(target=_serve, args=(n, store, told, repeats, rank), daemon=True)
            for n in range(2)
        ]
        for process in processes:
            process.start()
        found = dict(told.get(timeout=1800) for _ in processes)
        for process in processes:
            process.join()
    return [found[number] for number in sorted(found)]


def table(ranks: Sequence[Sequence[dict[str, Seconds]]]) -> str:
    """Medians over rounds of the busier process, in Markdown."""
    lines = [
        "| | " + " | ".join(PARTS) + " | together | of one process's |",
        "| --- | " + " | ".join(["---"] * len(PARTS)) + " | --- | --- |",
    ]
    alone = [sum(each[ALONE].values()) for each in ranks[0]]
    for way in ranks[0][0]:
        busier = [
            max((own[way] for own in each if way in own), key=lambda own: sum(own.values()))
            for each in zip(*ranks, strict=True)
        ]
        sums = [sum(own.values()) for own in busier]
        ratios = [own / whole for own, whole in zip(sums, alone, strict=True)]
        cells = [f"{1e3 * median(own[part] for own in busier):.2f}" for part in PARTS]
        spread = "" if way == ALONE else f" ({min(ratios):.2f} to {max(ratios):.2f})"
        cells += [f"{1e3 * median(sums):.2f}", f"{median(ratios):.2f}{spread}"]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(repeats: int = 5) -> str:
    """A table for each kind of basis, in Markdown."""
    parts = ["# Curvature on two processes", WORDS.format(repeats=repeats)]
    for name, rank in KINDS.items():
        parts += [f"## TEKFAC {name}", table(on_two(repeats, rank))]
    return "\n\n".join(parts) + "\n"


WORDS = f"""\
Written by `python -m benchmarks.ranks --measure`. Processor milliseconds of a step at intervals of
10/10/100, on average, for a perceptron of {len(WIDTHS) - 2} layers {WIDTHS[0]} wide on {EXAMPLES}
examples: of one process with all of them, and of the busier of two with half of them each,
connected by gloo, a thread each. Medians of {{repeats}} rounds; in brackets least and most."""
