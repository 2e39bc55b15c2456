"""What is to be run: short searches first, then what they chose, at length."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gauntlet.optimizers import CONTENDERS, Settings, trials
from benchmarks.gauntlet.runner import Job, Result, Runs, trained
from benchmarks.gauntlet.tasks.task import Task, shrunk

SEARCH_LENGTH = 1 / 3
# None of the final runs' own.
SEARCH_SEED = 1000
# Seconds until runs that other processes are at are looked at again.
PATIENCE = 2.0


Tell = Callable[[Job, Result], None]


def work(
    open_jobs: Callable[[], Sequence[Job]], tasks: Mapping[str, Task], runs: Runs, tell: Tell
) -> None:
    """Do jobs until none is open, beside other processes that do the same.

    Args:
        open_jobs: those that are left, in the order in which they are to be done.
        tasks: by name.
        runs: the folder.
        tell: is told of each run that this process has done.
    """
    while jobs := open_jobs():
        for job in jobs:
            with runs.claim(job) as mine:
                if mine:
                    result = trained(tasks[job.task], job)
                    runs.save(job, result)
                    tell(job, result)
                    break
        else:
            time.sleep(PATIENCE)


@dataclass(frozen=True)
class Choice:
    """A search's outcome.

    Attributes:
        settings: the best.
        at_edge: settings whose best value is the smallest or largest of three or more.
    """

    settings: Settings
    at_edge: Sequence[str]


@dataclass(frozen=True)
class Plan:
    """All runs of some tasks and optimizers.

    Attributes:
        tasks: by name.
        optimizers: names.
        trials: settings that each search tries.
        seeds: of each final setting.
        runs: the folder.
    """

    tasks: dict[str, Task]
    optimizers: Sequence[str]
    trials: int
    seeds: int
    runs: Runs

    def searched(self, task: str, optimizer: str) -> list[Job]:
        """The runs of a search; none where there is nothing to choose."""
        candidates = trials(task, optimizer, self.trials)
        if not CONTENDERS[optimizer].tuned:
            return []
        steps = shrunk(self.tasks[task].steps, SEARCH_LENGTH)
        return [
            Job(task, optimizer, "search", settings, SEARCH_SEED, steps) for settings in candidates
        ]

    def choice(self, task: str, optimizer: str) -> Choice | None:
        """What the search chose; None if it isn't done, or all its runs diverged."""
        jobs = self.searched(task, optimizer)
        if not jobs:
            return Choice(trials(task, optimizer, 1)[0], [])
        results = [self.runs.result(job) for job in jobs]
        losses = [result.loss for result in results if result is not None]
        if len(losses) < len(jobs) or min(losses) == math.inf:
            return None
        best = jobs[losses.index(min(losses))].settings
        at_edge = []
        for key, value in best.items():
            values = sorted({job.settings[key] for job in jobs})
            if len(values) > 2 and value in (values[0], values[-1]):
                at_edge.append(key)
        return Choice(best, at_edge)

    def finals(self, task: str, optimizer: str) -> list[Job]:
        """The final runs, as far as their settings are known."""
        choice = self.choice(task, optimizer)
        if choice is None:
            return []
        steps = self.tasks[task].steps
        return [
            Job(task, optimizer, "final", choice.settings, seed, steps)
            for seed in range(self.seeds)
        ]

    def jobs(self) -> list[Job]:
        """All that are known of, in order."""
        return [
            job
            for task in self.tasks
            for optimizer in self.optimizers
            for job in (*self.searched(task, optimizer), *self.finals(task, optimizer))
        ]

    def open_jobs(self) -> list[Job]:
        """Those that are left."""
        return [job for job in self.jobs() if self.runs.result(job) is None]

    def work(self, tell: Tell) -> None:
        """Do what is left, beside other processes that do the same.

        Args:
            tell: is told of each run that this process has done.
        """
        work(self.open_jobs, self.tasks, self.runs, tell)

    def seconds_left(self) -> float:
        """An estimate, for one process: as long as runs of the kind took, where there are some."""
        return sum(
            self._seconds_left(task, optimizer)
            for task in self.tasks
            for optimizer in self.optimizers
        )

    def _seconds_left(self, task: str, optimizer: str) -> float:
        known = self.tasks[task]
        searched = self.searched(task, optimizer)
        finals = self.finals(task, optimizer)
        todo = [job.steps for job in (*searched, *finals) if self.runs.result(job) is None]
        if not finals and len(todo) > 0:
            todo += [known.steps] * self.seeds
        done = [(job, self.runs.result(job)) for job in (*searched, *finals)]
        rates = [result.elapsed / job.steps for job, result in done if result is not None]
        if not rates:
            rates = [known.seconds * CONTENDERS[optimizer].cost / known.steps]
        return sum(todo) * sum(rates) / len(rates)
