"""The paper's tables 3 and 4, and figures 3 and 4, run again: what is missing, and only that.

Either experiment is a grid of cells, a variant of an optimizer on a task. Of every cell the best
settings are searched for on held-out training images, unless there is only one choice, and then run
with several seeds on all training images and tested. All of it lies in one folder, on which any
number of processes may be at work: a search shares its trials out by itself, and a run with a seed
belongs to the process that holds the lock on its folder, until that process ends, however it ends.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from filelock import FileLock

from tekfac.experiments import searching
from tekfac.experiments.config import Config
from tekfac.experiments.data import Dataset
from tekfac.experiments.errors import Diverged, InputError
from tekfac.experiments.files import write_text
from tekfac.experiments.metrics import History
from tekfac.experiments.optimizers import METHODS, excluded, has_setting
from tekfac.experiments.presets import Preset
from tekfac.experiments.published import TABLE_3, TABLE_4, TABLE_4_CENTRE, TABLE_4_TASK, Accuracy
from tekfac.experiments.runs import CONFIG, METRICS, Busy, RunFolder, read_metrics
from tekfac.experiments.scales import OPTIMIZERS, Scale, gpu_hours
from tekfac.experiments.searching import Grid, Outcome, Plan, Point, Result, Search
from tekfac.experiments.training import Watcher, check, fit

MARKER = "experiment.json"
LOCK = ".lock"
SEARCH = "search"
DIVERGED = "diverged.txt"

# Names of table 4's settings in its rows.
SYMBOLS = {"nu": "ν", "lr": "lr"}


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        label: its title.
        optimizer: a name of ``optimizers.METHODS``.
        grid: what is searched; if each setting has one value only, that is taken without a search.
        panel: of a figure's panels the one that it is drawn in.
        paper: the paper's own numbers, by task.
    """

    label: str
    optimizer: str
    grid: Grid
    panel: str
    paper: Mapping[str, Accuracy]


@dataclass(frozen=True)
class Experiment:
    """What is run, and what its files are called.

    Attributes:
        table, figure: names of the files without suffixes.
        title: what the table shows.
        scale: the name of the scale.
        variants: the rows.
        protocols: for each task, a column, what its runs have in common.
        seeds: runs of each cell with its best settings.
        trials: how many points of a grid are tried, at most.
        hold_out: training images that decide a search; None for a tenth.
        prune: whether hopeless trials are given up.
    """

    table: str
    figure: str
    title: str
    scale: str
    variants: Sequence[Variant]
    protocols: Mapping[str, Preset]
    seeds: int
    trials: int
    hold_out: int | None
    prune: bool

    @property
    def files(self) -> tuple[str, str, str]:
        """The names of what it comes to: the table twice, and the picture."""
        return f"{self.table}.md", f"{self.table}.csv", f"{self.figure}.png"


def table_3(
    scale: Scale,
    protocols: Mapping[str, Preset],
    optimizers: Sequence[str] = OPTIMIZERS,
    grids: Mapping[str, Grid] | None = None,
    trials: int | None = None,
    seeds: int | None = None,
    hold_out: int | None = None,
) -> Experiment:
    """Optimizers on tasks, each with the best settings found for it: table 3 and figure 3.

    Args:
        scale: its numbers hold where no others are given.
        protocols: the tasks, by name, and what runs on them have in common.
        optimizers: names of ``optimizers.METHODS``.
        grids: for some of the optimizers values to be searched in place of the scale's.
        trials, seeds, hold_out: as ``Experiment`` has them.

    Raises:
        InputError: if an optimizer is unknown.
    """
    if unknown := [name for name in optimizers if name not in METHODS]:
        raise InputError(f"--optimizers {unknown[0]!r} is unknown; there is: {', '.join(METHODS)}")
    variants = [
        Variant(
            label=METHODS[name].label,
            optimizer=name,
            grid=_grid(name, scale, (grids or {}).get(name, {})),
            panel="",
            paper={task: row[name] for task, row in TABLE_3.items() if name in row},
        )
        for name in optimizers
    ]
    return Experiment(
        table="table3",
        figure="figure3",
        title="test accuracy (%) of each optimizer with the best settings found for it",
        scale=scale.name,
        variants=variants,
        protocols=protocols,
        seeds=scale.seeds if seeds is None else seeds,
        trials=scale.trials if trials is None else trials,
        hold_out=hold_out,
        prune=scale.prune,
    )


def _grid(optimizer: str, scale: Scale, given: Grid) -> Grid:
    """The scale's grid, or the paper's, with values given in place of some."""
    base = scale.grids.get(optimizer) or searching.paper_grid(optimizer, given)
    replaced = excluded(optimizer, given)
    return {**{key: values for key, values in base.items() if key not in replaced}, **given}


def table_4(
    scale: Scale,
    protocols: Mapping[str, Preset],
    sweeps: Grid | None = None,
    seeds: int | None = None,
) -> Experiment:
    """TEKFAC with one setting varied at a time: table 4 and figure 4.

    The paper's figure shows ν alone; here the learning rate stands beside it, of the same runs as
    the table.

    Args:
        scale: its numbers hold where no others are given.
        protocols: the tasks, by name, and what runs on them have in common.
        sweeps: for some settings values in place of the scale's.
        seeds: as ``Experiment`` has it.
    """
    variants = []
    for setting, values in {**scale.sweeps, **(sweeps or {})}.items():
        others = {key: value for key, value in scale.centre.items() if key != setting}
        name = SYMBOLS.get(setting, setting)
        fixed = ", ".join(
            f"{SYMBOLS.get(key, key)} = {as_text(value)}" for key, value in others.items()
        )
        # The paper's numbers are of its own centre.
        published = TABLE_4.get(setting, {}) if scale.centre == TABLE_4_CENTRE else {}
        variants += [
            Variant(
                label=f"{name} = {as_text(value)}",
                optimizer="tekfac",
                grid={key: (each,) for key, each in {**scale.centre, setting: value}.items()},
                panel=f"{name} varied, {fixed}",
                paper={TABLE_4_TASK: published[value]} if value in published else {},
            )
            for value in values
        ]
    return Experiment(
        table="table4",
        figure="figure4",
        title="test accuracy (%) of TEKFAC with one setting varied at a time",
        scale=scale.name,
        variants=variants,
        protocols=protocols,
        seeds=scale.seeds if seeds is None else seeds,
        trials=1,
        hold_out=None,
        prune=False,
    )


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


def size(grid: Grid) -> int:
    """How many points a grid has."""
    return math.prod(len(values) for values in grid.values())


def as_text(value: object) -> str:
    """A setting's value, in short."""
    return f"{value:g}" if isinstance(value, float) else str(value)


OnTrial = Callable[[str, Result], None]
OnRun = Callable[[str], None]
Watch = Callable[[str], Watcher]


class Cell:
    """A variant on a task, in its part of the experiment's folder.

    Args:
        path: the experiment's folder.
        lock: held while a run in it is begun.
        task: the task's name.
        variant: the row.
        experiment: what the cell is part of.
        data: the task's images, as many as are wanted.
        held_out: the same, a part of the training images in place of the test images.
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
        first: Point = {key: values[0] for key, values in variant.grid.items()}
        fixed = {
            key: value
            for key, value in protocol.settings.items()
            if has_setting(variant.optimizer, key)
        }
        self.base = Config(
            optimizer=variant.optimizer,
            settings={**fixed, **first},
            schedule=protocol.schedule,
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
            chosen = self._search.best()
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
    def _plan(self) -> Plan:
        base = replace(self.base, hold_out=len(self._held_out.y_test))
        return Plan(base, self.variant.grid, self._experiment.prune)

    @cached_property
    def _search(self) -> Search:
        return Search(self._path / SEARCH, self._plan, self._held_out, self._trials)

    def _results(self) -> Sequence[Result]:
        begun = self.searched and (self._path / SEARCH / searching.PLAN).exists()
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
                    count = max(1, round(searching.HELD_OUT_FRACTION * len(data.y_train)))
                loaded[source] = data, data.hold_out(count)
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
