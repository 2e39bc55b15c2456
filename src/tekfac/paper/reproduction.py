"""The paper's tables 3 and 4, and figures 3 and 4, run again: what is missing, and only that.

Either experiment is a grid of cells, a variant of an optimizer on a task. Of every cell the best
settings are searched for on held-out training images, unless there is only one choice, and then run
with several seeds on all training images and tested. All of it lies in one folder, on which any
number of processes may be at work: a search shares its trials out by itself, and a run with a seed
belongs to the process that holds the lock on its folder, until that process ends, however it ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from tekfac.data import Dataset
from tekfac.errors import InputError
from tekfac.paper.cells import Cell, OnRun, OnTrial, Watch
from tekfac.paper.costs import gpu_hours
from tekfac.paper.experiments import Experiment
from tekfac.runs.config import Config
from tekfac.runs.files import write_text
from tekfac.searches.plan import HELD_OUT_FRACTION

MARKER = "experiment.json"
LOCK = ".lock"


class Reproduction:
    """An experiment in its folder.

    Args:
        path: the folder, made if need be. What it holds of the same experiment is kept.
        experiment: what to run.

    Raises:
        InputError: if data cannot be had, a run cannot be built, or the folder holds something
            else. Nothing is written then.

    Attributes:
        cells: all variants on the first task, then on the second, and so on.
        lock: held while a file of the folder's own is written.
    """

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path = path
        self.experiment = experiment
        self.lock = FileLock(path / LOCK)
        self._refuse_foreign()
        loaded: dict[tuple[object, ...], tuple[Dataset, Dataset]] = {}
        self.cells = []
        for task, protocol in experiment.protocols.items():
            config = Config(**protocol.task)
            source = (config.data, config.data_dir, config.image_size, config.limit_train)
            if source not in loaded:
                data = config.load_data()
                count = experiment.hold_out
                if count is None:
                    count = max(1, round(HELD_OUT_FRACTION * len(data.y_train)))
                held_out = data.hold_out(count)
                images = experiment.trial_images
                if images is not None and images < len(held_out.y_train):
                    held_out = held_out.first(images)
                loaded[source] = data, held_out
            self.cells += [
                Cell(path, self.lock, task, variant, experiment, *loaded[source])
                for variant in experiment.variants
            ]
        for cell in self.cells:
            cell.check()
        # Whether an optimizer takes a value does not depend on the task.
        for cell in self.cells[: len(experiment.variants)]:
            cell.check_grid()

    def left(self) -> tuple[int, int]:
        """How many trials and how many runs are not done yet."""
        standings = [cell.standing() for cell in self._cells_once()]
        return sum(s.left_trials for s in standings), sum(s.left_runs for s in standings)

    def hours(self) -> float:
        """About how many hours what is left takes on a GPU."""
        total = 0.0
        for cell in self._cells_once():
            standing = cell.standing()
            count = standing.left_trials + standing.left_runs
            total += count * gpu_hours(standing.chosen or cell.base, len(cell.data.y_train))
        return total

    def run(
        self, watch: Watch, on_trial: OnTrial, on_run: OnRun, on_cell: Callable[[], None]
    ) -> None:
        """Carry out all that is left and that no other process is at.

        Args:
            watch: gives the watcher of a trial or a run, before it begins, from a label for it.
            on_trial: is told, with a label of its cell, of each trial that is done.
            on_run: is told of each run that is done, in words.
            on_cell: is called when a cell has got on, to bring tables up to date.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock:
            self._refuse_foreign()
            write_text(self.path / MARKER, json.dumps(self._marker(), indent=2) + "\n")
        # Again until nothing is left to do: what another process was at may have become free.
        worked = True
        while worked:
            worked = False
            for cell in self.cells:
                if cell.work(watch, on_trial, on_run):
                    worked = True
                    on_cell()

    def _cells_once(self) -> Iterable[Cell]:
        """The cells, but of those with the same runs one only."""
        return {
            (cell.task, cell.variant.optimizer, str(sorted(cell.variant.grid.items()))): cell
            for cell in self.cells
        }.values()

    def _marker(self) -> dict[str, str]:
        experiment = self.experiment
        return {"experiment": f"{experiment.table}, {experiment.figure}", "scale": experiment.scale}

    def _refuse_foreign(self) -> None:
        marker = self.path / MARKER
        if not marker.exists():
            for file in self.experiment.files:
                if (self.path / file).exists():
                    raise InputError(
                        f"{self.path} holds {file} but no {MARKER}, no experiment of this program: "
                        "give another --out"
                    )
            return
        try:
            there = json.loads(marker.read_text())
        except ValueError as error:
            raise InputError(f"{marker} is not valid JSON: {error}") from error
        if there != self._marker():
            raise InputError(
                f"{self.path} holds another experiment, {there} instead of {self._marker()}: "
                "give another --out"
            )
