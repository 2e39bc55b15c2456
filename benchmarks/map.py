"""How far from its defaults TEKFAC may be set: short runs over learning rate × damping.

    python -m benchmarks.map --data mnist=mnist.npz cifar10=cifar10.npz --fraction 0.5

trains the gauntlet's tasks a third as long as it does, with its schedule, over a tenth, a third,
one, three and ten times the default learning rate and damping ratio, with powers 1 and 1/2, and
beside them AdamW over the same multiples of its own learning rate. It prints held-out losses at the
end, which runs diverged, what share of an optimizer's cells ends within a tenth of its best one's
loss, and what share of TEKFAC's below AdamW's best. Each run is one file in ``--out``: interrupted,
the same command goes on; started twice at the same time, both processes share the work.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import tekfac
from benchmarks.gauntlet.__main__ import add_task_arguments, tasks_and_runs, tell
from benchmarks.gauntlet.optimizers import Settings
from benchmarks.gauntlet.runner import Job, Runs
from benchmarks.gauntlet.search import SEARCH_LENGTH, SEARCH_SEED, work
from benchmarks.gauntlet.tasks.task import Task, shrunk
from tekfac.errors import InputError

FACTORS = {"÷ 10": 0.1, "÷ 3": 1 / 3, "1": 1.0, "× 3": 3.0, "× 10": 10.0}
NEAR = 1.1
POWERS = (1.0, 0.5)


def _default(optimizer: type[torch.optim.Optimizer], name: str) -> float:
    return float(inspect.signature(optimizer).parameters[name].default)


LR = _default(tekfac.TEKFAC, "lr")
ADAMW_LR = _default(torch.optim.AdamW, "lr")
RATIO = tekfac.AgreementDamping().ratio


@dataclass(frozen=True)
class Map:
    """The settings that one optimizer is tried with.

    Attributes:
        label: what it is called in the tables.
        optimizer: the gauntlet's name.
        columns: what is multiplied along a row.
        rows: by the words in front of each.
    """

    label: str
    optimizer: str
    columns: str
    rows: Mapping[str, Sequence[Settings]]

    def jobs(self, task: Task) -> list[list[Job]]:
        """The runs on a task, in rows."""
        steps = shrunk(task.steps, SEARCH_LENGTH)
        return [
            [
                Job(task.name, self.optimizer, "search", settings, SEARCH_SEED, steps)
                for settings in row
            ]
            for row in self.rows.values()
        ]


MAPS = [
    Map("AdamW", "adamw", "lr", {"": [{"lr": ADAMW_LR * factor} for factor in FACTORS.values()]}),
    *(
        Map(
            f"TEKFAC, power {power:g}",
            "tekfac",
            "damping",
            {
                f"lr {words}": [
                    {"lr": LR * factor, "ratio": RATIO * other, "power": power}
                    for other in FACTORS.values()
                ]
                for words, factor in FACTORS.items()
            },
        )
        for power in POWERS
    ),
]


def losses(tried: Map, task: Task, runs: Runs) -> list[list[float]]:
    """Final losses, infinite where a run diverged."""
    results = [[runs.result(job) for job in row] for row in tried.jobs(task)]
    return [[result.loss for result in row if result is not None] for row in results]


def table(task: Task, runs: Runs) -> str:
    """A task's losses in Markdown, a row for each optimizer and learning rate."""
    lines = [f"| {task.name} | | {' | '.join(FACTORS)} |", "| --- |" + " --- |" * 6]
    for tried in MAPS:
        for words, row in zip(tried.rows, losses(tried, task, runs), strict=True):
            cells = ["diverged" if loss == math.inf else f"{loss:.4g}" for loss in row]
            name = ", ".join(filter(None, (tried.label, words)))
            lines.append(f"| {name} | {tried.columns} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(tasks: Iterable[Task], runs: Runs) -> str:
    """How many cells of each optimizer are near its best one, and below the first one's best."""
    lines = [
        f"| task | {' | '.join(tried.label for tried in MAPS)} | diverged |",
        "| --- |" + " --- |" * (len(MAPS) + 1),
    ]
    for task in tasks:
        cells, diverged, baseline = [], 0, math.inf
        for tried in MAPS:
            ends = list(itertools.chain(*losses(tried, task, runs)))
            near = sum(end <= NEAR * min(ends) for end in ends)
            cell = f"{near / len(ends):.0%} of {len(ends)}, best {min(ends):.4g}"
            if tried is MAPS[0]:
                baseline = min(ends)
            else:
                ahead = sum(end < baseline for end in ends)
                cell += f", {ahead / len(ends):.0%} below that of {MAPS[0].label}"
            cells.append(cell)
            diverged += ends.count(math.inf)
        lines.append(f"| {task.name} | {' | '.join(cells)} | {diverged} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is left, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.map",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_task_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/map"), help="runs")
    options = parser.parse_args(arguments)
    try:
        tasks, runs = tasks_and_runs(options)
    except InputError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # of steps on the way to divergence

    def open_jobs() -> list[Job]:
        return [
            job
            for task in tasks.values()
            for tried in MAPS
            for job in itertools.chain(*tried.jobs(task))
            if runs.result(job) is None
        ]

    work(open_jobs, tasks, runs, tell)
    for task in tasks.values():
        print(f"\n{table(task, runs)}")
    print(f"\n{summary(tasks.values(), runs)}")


if __name__ == "__main__":
    main()
