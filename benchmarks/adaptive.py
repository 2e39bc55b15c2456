"""What damping that follows the run gains: two of the gauntlet's tasks, with it and without.

    python -m benchmarks.adaptive --mnist mnist.npz

trains on full batches (``regression``) and large ones (``autoencoder``) with ``MeanDamping``,
``AgreementDamping`` and ``AdaptiveDamping``: with the defaults and the gauntlet's schedule, and
with steps as Levenberg and Marquardt have them, without momentum, bound and schedule. It prints
held-out losses at quarters of the run, processor seconds, and the ratio at the end, a seed a line.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

import tekfac
from benchmarks.gauntlet.runner import SCHEDULE, evaluate
from benchmarks.gauntlet.sources import Sources
from benchmarks.gauntlet.tasks import TASKS
from benchmarks.gauntlet.tasks.task import Task

PLAIN = {"momentum": 0.0, "rms_clip": None}
RULES = {
    "mean": tekfac.MeanDamping,
    "agreement": tekfac.AgreementDamping,
    "adaptive": tekfac.AdaptiveDamping,
}
DAMPINGS = "mean:0.3,mean:0.01,mean:0.001,agreement:0.3,adaptive:0.3"


def run(task: Task, seed: int, steps: int, scheduled: bool, settings: Mapping[str, Any]) -> str:
    """One run, as cells of a table."""
    torch.manual_seed(seed)
    network = task.network()
    optimizer = tekfac.TEKFAC(
        network, likelihood=task.likelihood, mean_over=task.mean_over, **settings
    )
    factor = partial(SCHEDULE.factor, steps_per_epoch=steps, epochs=1)
    scheduler = LambdaLR(optimizer, factor if scheduled else lambda _: 1.0)
    batches = task.batches(torch.Generator().manual_seed(seed))
    held_out = task.held_out("final")
    cells, seconds = [], 0.0
    for step in range(1, steps + 1):
        start = time.process_time()
        inputs, targets = next(batches)

        def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            optimizer.zero_grad()
            loss = task.loss(network(inputs), targets)
            loss.backward()
            return loss

        value = optimizer.step(closure).item()
        scheduler.step()
        seconds += time.process_time() - start
        if not math.isfinite(value):
            cells.append(f"diverged in step {step}")
            break
        if 4 * step // steps > 4 * (step - 1) // steps:
            cells.append(f"{evaluate(network, task, held_out)[0]:.3g}")
    rule = optimizer.param_groups[0]["damping"]
    return " | ".join([", ".join(cells), f"{seconds:.0f}", f"{rule.ratio:.2g}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", help="a file; without it scikit-learn's digits, enlarged")
    parser.add_argument("--tasks", default="regression,autoencoder")
    parser.add_argument(
        "--steps-of", default="default,lr:0.01,plain:0.1,plain:0.3", help="lengths of steps"
    )
    parser.add_argument("--dampings", default=DAMPINGS, help="rules and their (first) ratios")
    parser.add_argument("--steps", type=int, help="in place of the task's own")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=1.0, help="shrinks batches and widths")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # of steps skipped on the way to divergence
    sources = Sources({"mnist": options.mnist} if options.mnist else {}, Path("runs/gauntlet"))
    print("| task | steps | lr | damping | held-out loss | seconds | ratio at the end |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.tasks.split(","):
        task = TASKS[name](sources, options.fraction)
        steps = options.steps or task.steps
        for length, damping, seed in product(
            options.steps_of.split(","), options.dampings.split(","), range(options.seeds)
        ):
            kind, _, lr = length.partition(":")
            rule, ratio = damping.split(":")
            settings: dict[str, Any] = dict(PLAIN) if kind == "plain" else {}
            settings |= {"lr": float(lr)} if lr else {}
            settings["damping"] = RULES[rule](float(ratio))
            cells = run(task, seed, steps, kind != "plain", settings)
            print(f"| {name} | {steps} | {length} | {rule} {ratio} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
