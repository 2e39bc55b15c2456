"""A cell of a table: a variant of an optimizer on a task, its search and its runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from filelock import FileLock

from tekfac.data import Dataset
from tekfac.errors import Diverged, InputError
from tekfac.paper.experiments import Experiment, Variant, size
from tekfac.runs.config import Config
from tekfac.runs.files import write_text
from tekfac.runs.folder import CONFIG, METRICS, Busy, RunFolder, read_metrics
from tekfac.runs.metrics import History
from tekfac.runs.optimizers import has_setting, read_settings
from tekfac.runs.training import Watcher, check, fit
from tekfac.searches.grids import Point
from tekfac.searches.plan import Plan
from tekfac.searches.search import PLAN, Search
from tekfac.searches.trials import Outcome, Result, as_text

SEARCH = "search"
DIVERGED = "diverged.txt"

OnTrial = Callable[[str, Result], None]
OnRun = Callable[[str], None]
Watch = Callable[[str], Watcher]


@dataclass(frozen=True)
class Standing:
    """How far a cell is, and what it has come to.

    Attributes:
        trials: of its search, by outcome; none if there was nothing to search.
        best_accuracy: the best trial's, on held-out images; None before one has finished.
        chosen: the settings decided for; None if the search is not complete, or none finished.
        hopeless: whether a complete search had no trial that finished.
        histories: of the finished runs, one for each seed.
        diverged: the number of seeds whose run diverged.
        left_trials, left_runs: how many are not done, be it that another process is at them.
    """

    trials: Counter[Outcome]
    best_accuracy: float | None
    chosen: Config | None
    hopeless: bool
    histories: Sequence[History]
    diverged: int
    left_trials: int
    left_runs: int


class Cell:
    """A variant on a task, in its part of the experiment's folder.

    Args:
        path: the experiment's folder.
        lock: held while a run in it is begun.
        task: the task's name.
        variant: the row.
        experiment: what the cell is part of.
        data: the task's images, as many as are wanted.
        held_out: what trials see: a part of the training images in place of the test images, and
            all others or the first of them.
    """

    def __init__(
        self,
        path: Path,
        lock: FileLock,
        task: str,
        variant: Variant,
        experiment: Experiment,
        data: Dataset,
        held_out: Dataset,
    ) -> None:
        self.task = task
        self.variant = variant
        self.data = data
        self._experiment = experiment
        self._held_out = held_out
        self._lock = lock
        self._path = path / task / variant.optimizer
        protocol = experiment.protocols[task]
        recipe = variant.recipe or protocol
        first: Point = {key: values[0] for key, values in variant.grid.items()}
        fixed = {
            key: value
            for key, value in recipe.settings.items()
            if has_setting(variant.optimizer, key)
        }
        self.base = Config(
            optimizer=variant.optimizer,
            settings={**fixed, **first},
            schedule=recipe.schedule,
            **protocol.task,
        )
        self._trials = min(experiment.trials, self.grid_size)

    @property
    def searched(self) -> bool:
        """Whether there is anything to choose from."""
        return self.grid_size > 1

    @property
    def grid_size(self) -> int:
        """How many points there are to choose from."""
        return size(self.variant.grid)

    def check(self) -> None:
        """Raise what running the cell would raise, before anything of it is written.

        Raises:
            InputError: if a run cannot be built, or its folder holds runs of something else.
        """
        standing = self.standing()
        if standing.left_trials + standing.left_runs:
            check(self.base, self.data.first(1))

    def check_grid(self) -> None:
        """Raise what building a trial would raise, for each value in the grid.

        Raises:
            InputError: if an optimizer refuses a value.
        """
        if self.standing().left_trials:
            self._plan.check(self.data.first(1))

    def standing(self) -> Standing:
        """How far it is; reads files, and makes none.

        Raises:
            InputError: if the cell's folder holds something else, or files that cannot be read.
        """
        results = self._results()
        trials = Counter(result.outcome for result in results)
        finished = trials[Outcome.FINISHED] > 0
        best = results[0].metrics if results else None
        left_trials = 0
        if self.searched:
            left_trials = max(0, self._trials - trials.total() + trials[Outcome.RUNNING])
        chosen = None
        if not self.searched:
            chosen = self.base
        elif finished and not left_trials:
            chosen = replace(self.base, settings=self._search.best().settings)
        histories, diverged = [], 0
        for config in [] if chosen is None else self._runs(chosen):
            history = _finished(self._folder(config), config)
            if history is not None:
                histories.append(history)
            elif (self._folder(config) / DIVERGED).exists():
                diverged += 1
        hopeless = self.searched and not left_trials and not finished
        runs = 0 if hopeless else self._experiment.seeds - len(histories) - diverged
        return Standing(
            trials=trials,
            best_accuracy=best.test_accuracy if finished and best else None,
            chosen=chosen,
            hopeless=hopeless,
            histories=histories,
            diverged=diverged,
            left_trials=left_trials,
            left_runs=runs,
        )

    @cached_property
    def trial(self) -> Config:
        """What every trial of its search is, but for the settings searched."""
        base, epochs = self.base, self._experiment.trial_epochs
        if epochs is not None and epochs < base.epochs:
            schedule = base.schedule.shortened(epochs / base.epochs)
            base = replace(base, epochs=epochs, schedule=schedule)
        if len(self._held_out.y_train) + len(self._held_out.y_test) < len(self.data.y_train):
            base = replace(base, limit_train=len(self._held_out.y_train))
        return replace(base, hold_out=len(self._held_out.y_test))

    @cached_property
    def _plan(self) -> Plan:
        return Plan(self.trial, self.variant.grid, self._experiment.prune)

    @cached_property
    def _search(self) -> Search:
        return Search(self._path / SEARCH, self._plan, self._held_out, self._trials)

    def _results(self) -> Sequence[Result]:
        begun = self.searched and (self._path / SEARCH / PLAN).exists()
        return self._search.results() if begun else []

    def work(self, watch: Watch, on_trial: OnTrial, on_run: OnRun) -> bool:
        """Carry out what is left and no other process is at; whether there was any."""
        name = f"{self.task}, {self.variant.label}"
        worked = False

        def done(result: Result) -> None:
            nonlocal worked
            worked = True
            on_trial(f"{name}, ", result)

        if self.searched:
            self._search.run(
                lambda number, total, point: watch(f"{name}, trial {number}/{total}, "), done
            )
        chosen = self.standing().chosen
        if chosen is None:
            return worked
        for config in self._runs(chosen):
            folder = self._claim(config)
            if folder is None:
                continue
            worked, label = True, f"{name}, seed {config.seed}"
            with folder:
                try:
                    history = fit(folder, self.data, watch(f"{label}, "))
                except Diverged as error:
                    write_text(folder.path / DIVERGED, f"{error}\n")
                    on_run(f"{label}: diverged, {error}")
                else:
                    accuracy = f"{100 * history[-1].test_accuracy:.2f} %"
                    on_run(f"{label}: test accuracy {accuracy} after epoch {len(history)}")
                folder.drop_checkpoint()
        return worked

    def _runs(self, chosen: Config) -> Iterator[Config]:
        for seed in range(self._experiment.seeds):
            yield replace(chosen, seed=seed)

    def _folder(self, config: Config) -> Path:
        point = ",".join(
            f"{key}={as_text(config.settings[key])}" for key in sorted(self.variant.grid)
        )
        return self._path / point / f"seed{config.seed}"

    def _claim(self, config: Config) -> RunFolder | None:
        """A run's locked folder; None if the run is done, or another process is at it."""
        path = self._folder(config)
        # A run is begun by one process alone, and seen by others only when it has.
        with self._lock:
            if _finished(path, config) is not None or (path / DIVERGED).exists():
                return None
            try:
                if (path / CONFIG).exists():
                    return RunFolder.open(path)
                return RunFolder.create(path, config)
            except Busy:
                return None


def _finished(path: Path, wanted: Config) -> History | None:
    """The metrics of a run that is at its end, None of one that is not or has not begun.

    Raises:
        InputError: if the folder holds another run, or files that cannot be read.
    """
    if not (path / CONFIG).exists():
        return None
    try:
        there = json.loads((path / CONFIG).read_text())
        there = {**there, "settings": read_settings(there.get("settings", {}))}
        here = json.loads(json.dumps(wanted.to_dict()))
        for key in here:
            if there.get(key) != here[key]:
                raise InputError(
                    f"{path} holds another run, {key} {there.get(key)} instead of {here[key]}: "
                    "continue with the options that it was begun with, or give another --out"
                )
        if not (path / METRICS).exists():
            return None
        history = read_metrics(path / METRICS)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} holds no run that can be read: {error}") from error
    return history if len(history) >= wanted.epochs else None
