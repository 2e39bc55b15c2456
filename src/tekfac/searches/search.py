"""Searches for an optimizer's best settings over a grid, decided by held-out training images.

A search is a folder that any number of processes may work on at once, on machines that share it:
``search.json`` says what is tried, Optuna's journal file which trials there are and how they get
on, and each trial is a run in a folder of its own. A trial belongs to the process that holds the
lock on that folder. The system lifts the lock when the process ends, however it ends, and whoever
works on the search next goes on with the trial from its last epoch.

With an Optuna storage by URL in place of the journal, several folders share one search, on machines
that share nothing else. A trial then belongs to the folder in which it was begun.
"""

from __future__ import annotations

import hashlib
import json
import math
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from tekfac.data import Dataset
from tekfac.errors import Diverged, InputError
from tekfac.runs.config import Config
from tekfac.runs.files import markdown, write_csv, write_text
from tekfac.runs.folder import CONFIG, Busy, RunFolder
from tekfac.runs.metrics import EpochMetrics, History
from tekfac.runs.optimizers import SETTINGS, read_settings
from tekfac.runs.training import BatchProgress, Watcher, fit
from tekfac.searches.grids import Point
from tekfac.searches.plan import Plan
from tekfac.searches.storages import answering, open_storage
from tekfac.searches.trials import (
    DIVERGED,
    METRICS,
    Outcome,
    Result,
    as_text,
    rank,
    result_of,
    row,
)

PLAN = "search.json"
JOURNAL = "trials.journal"
OWNER = "storage.json"
TRIALS = "trials"
TABLE_MARKDOWN = "search.md"
TABLE_CSV = "search.csv"
LOCK = ".lock"

# The attribute of a trial in a storage that folders share: whose it is.
FOLDER = "folder"
# What of a run may differ between the machines that share a storage.
OWN = ("data", "data_dir", "device", "threads", "tensorboard")

# Trials that must have finished before any is given up, and the part of its epochs that a trial has
# in any case: a small learning rate starts slowly.
TRIALS_BEFORE_PRUNING = 5
UNPRUNED_FRACTION = 1 / 3

Watch = Callable[[int, int, Point], Watcher]


class Search:
    """A search's folder.

    Args:
        path: the folder, made if need be. If it holds a search already, that is continued.
        plan: what to try.
        data: the data set that the plan's base names.
        trials: the size of the random part of the grid that is tried; None for the whole grid. May
            differ from one session to the next: the parts contain one another.
        storage: the URL of an Optuna storage that folders share; None for the folder's journal.

    Raises:
        InputError: if the folder holds another search, or files of a search's names that are none,
            or the storage does not answer.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        data: Dataset,
        trials: int | None = None,
        storage: str | None = None,
    ) -> None:
        self._path = path
        self._plan = plan
        self._data = data
        self._digest = data.digest()
        self._order = plan.points()
        self._points = self._order[:trials]
        self._url = storage
        _refuse_foreign(path)
        shared = None if storage is None else open_storage(storage)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / LOCK)
        with self._lock:
            _refuse_foreign(path)
            _refuse_other_storage(path, storage)
            self._keep_plan()
            self._owner = None if shared is None else self._keep_owner()
            self._study = self._open_study(shared)

    def run(self, watch: Watch, report: Callable[[Result], None]) -> None:
        """Carry out, or carry on, all trials that are left and that no other process is at.

        Args:
            watch: gives a trial's watcher, before it begins, from its number, counted from 1, the
                number of trials in all, and its settings.
            report: is told of each trial that is done.

        Raises:
            InputError: if a trial cannot be continued, or the storage does not answer.
        """
        with answering(self._url):
            while (claim := self._claim()) is not None:
                trial, folder = claim
                with folder:
                    point = read_settings(trial.params)
                    watcher = watch(self._order.index(point) + 1, len(self._points), point)
                    self._carry_out(trial, folder, watcher)
                    folder.drop_checkpoint()
                report(result_of(self._study.trials[trial.number]))
                self.save_table()

    def results(self) -> list[Result]:
        """All trials begun so far, best first.

        Those that finished come before those that did not. Equal accuracies go by the loss.
        """
        with answering(self._url):
            return sorted((result_of(trial) for trial in self._begun()), key=rank)

    def elsewhere(self) -> Counter[str]:
        """How many trials are at work in other folders that share the storage, for each folder."""
        with answering(self._url):
            running = self._study.get_trials(False, [TrialState.RUNNING])
        owners = Counter(str(trial.user_attrs.get(FOLDER)) for trial in running)
        del owners[str(self._owner)]
        return owners

    @property
    def complete(self) -> bool:
        """Whether every trial is done, be it by another process."""
        done = [TrialState.COMPLETE, TrialState.PRUNED]
        with answering(self._url):
            return len(self._study.get_trials(False, done)) >= len(self._points)

    def best(self) -> Config:
        """The run with the best settings on the whole training set, tested on the test images.

        Raises:
            InputError: if no trial has finished.
        """
        results = self.results()
        counts = Counter(result.outcome.value for result in results)
        if Outcome.FINISHED.value not in counts:
            raise InputError(
                f"no trial of the search in {self._path} has finished, so that there is no best: "
                + ", ".join(f"{count} {word}" for word, count in counts.items())
                + ". Begin another with a smaller lr, or larger damping or nu, in its --grid"
            )
        return replace(self._plan.config(results[0].settings), hold_out=None)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """A header and one row per trial, as text, best first.

        Accuracy and loss are those on held-out images after the trial's last epoch.
        """
        header = [
            *self._plan.grid,
            "held-out (%)",
            "loss",
            "epochs",
            "seconds",
            "outcome",
        ]
        return header, [row(result) for result in self.results()]

    def save_table(self) -> None:
        """Write the table, as Markdown and as CSV, into the folder."""
        with self._lock:
            header, rows = self.table()
            write_text(self._path / TABLE_MARKDOWN, markdown(header, rows))
            write_csv(self._path / TABLE_CSV, header, rows)

    def _keep_plan(self) -> None:
        wanted = {**self._plan.to_dict(), "data_digest": self._digest}
        if (self._path / PLAN).exists():
            _refuse_other(self._path, wanted)
        else:
            write_text(self._path / PLAN, json.dumps(wanted, indent=2) + "\n")

    def _keep_owner(self) -> str:
        """The name under which the folder is known in a storage that it shares with others."""
        path = self._path / OWNER
        if not path.exists():
            name = f"{socket.gethostname()}:{self._path.resolve()} ({uuid.uuid4().hex[:8]})"
            write_text(path, json.dumps({FOLDER: name}) + "\n")
        return str(json.loads(path.read_text())[FOLDER])

    def _study_name(self) -> str:
        """A name in a storage that other searches may be in too: for one plan the same."""
        plan = self._plan.to_dict()
        plan["config"] = {key: each for key, each in plan["config"].items() if key not in OWN}
        text = json.dumps([plan, self._digest], sort_keys=True)
        mark = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        return f"tekfac-{self._plan.base.network}-{self._plan.base.optimizer}-{mark}"

    def _open_study(self, shared: BaseStorage | None) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file = self._path / JOURNAL
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=TRIALS_BEFORE_PRUNING,
            n_warmup_steps=math.ceil(UNPRUNED_FRACTION * self._plan.base.epochs),
        )

        def opened(storage: BaseStorage, name: str) -> optuna.Study:
            return optuna.create_study(
                storage=storage,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),
                pruner=pruner if self._plan.prune else optuna.pruners.NopPruner(),
            )

        if shared is not None:
            with answering(self._url):
                return opened(shared, self._study_name())
        try:
            lock = _JournalLock(self._lock, file)
            return opened(JournalStorage(JournalFileBackend(str(file), lock)), PLAN)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{file} cannot be read, it is damaged ({error}): begin a new search, with "
                "another --out"
            ) from error

    def _begun(self) -> list[FrozenTrial]:
        """All trials but those that are void: another had the point before, or it was given up."""
        void = (TrialState.WAITING, TrialState.FAIL)
        return [trial for trial in self._study.get_trials(False) if trial.state not in void]

    def _claim(self) -> tuple[optuna.Trial, RunFolder] | None:
        """A trial that is this process' now, and its locked folder; None if there is none left."""
        with self._lock:
            while True:
                begun = self._begun()
                points = [read_settings(trial.params) for trial in begun]
                for place, (trial, point) in enumerate(zip(begun, points, strict=True)):
                    mine = trial.user_attrs.get(FOLDER) == self._owner
                    if trial.state != TrialState.RUNNING or not mine:
                        continue
                    claimed = optuna.Trial(self._study, trial._trial_id)
                    # Trials have numbers in the order in which all folders see them begun.
                    if points.index(point) != place:
                        self._study.tell(claimed, state=TrialState.FAIL)
                        continue
                    try:
                        return claimed, self._folder(point)
                    except Busy:
                        continue
                left = next((each for each in self._points if each not in points), None)
                if left is None:
                    return None
                # Looked at once more, as others share the storage but not the lock.
                self._study.add_trial(
                    optuna.trial.create_trial(
                        state=TrialState.RUNNING,
                        params=dict(left),
                        distributions={
                            key: CategoricalDistribution(values)
                            for key, values in self._plan.grid.items()
                        },
                        user_attrs={} if self._owner is None else {FOLDER: self._owner},
                    )
                )

    def _folder(self, point: Point) -> RunFolder:
        name = ",".join(f"{key}={as_text(value)}" for key, value in point.items())
        path = self._path / TRIALS / name
        if (path / CONFIG).exists():
            return RunFolder.open(path)
        return RunFolder.create(path, self._plan.config(point))

    def _carry_out(self, trial: optuna.Trial, folder: RunFolder, watcher: Watcher) -> None:
        reported = len(self._study.trials[trial.number].intermediate_values)
        reporter = _Reporter(trial, reported, watcher)
        try:
            history = fit(folder, self._data, reporter)
        except _Hopeless:
            self._study.tell(trial, state=TrialState.PRUNED)
        except Diverged as error:
            trial.set_user_attr(DIVERGED, str(error))
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            # Of a run that was at its end already the reporter has seen nothing.
            reporter.report(history)
            self._study.tell(trial, history[-1].test_accuracy)


class _Hopeless(Exception):
    """The pruner gives a trial up."""


class _Reporter(Watcher):
    """Tells Optuna how a trial gets on, beside the user's own watcher."""

    def __init__(self, trial: optuna.Trial, reported: int, watcher: Watcher) -> None:
        self._trial = trial
        self._reported = reported
        self._watcher = watcher

    def report(self, history: History) -> None:
        """Record those epochs that were not recorded before a process was killed."""
        for metrics in history[self._reported :]:
            self._trial.set_user_attr(METRICS, asdict(metrics))
            self._trial.report(metrics.test_accuracy, metrics.epoch)
            self._reported += 1

    def on_start(self, config: Config, history: History, batches: int) -> None:
        self.report(history)
        self._history, self._epochs = history, config.epochs
        self._watcher.on_start(config, history, batches)

    def on_batch(self, progress: BatchProgress) -> None:
        self._watcher.on_batch(progress)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        self.report(self._history)
        self._watcher.on_epoch(metrics)
        if metrics.epoch < self._epochs and self._trial.should_prune():
            raise _Hopeless


class _JournalLock(JournalFileOpenLock):
    """The search's own lock in place of Optuna's, which outlives a process that is killed.

    Whoever gets it first cuts off a line that a crash of the machine left half written: or else
    the next one would be added to it, and the journal be unreadable.
    """

    def __init__(self, lock: FileLock, journal: Path) -> None:
        self._lock = lock
        self._journal = journal

    def acquire(self) -> bool:
        self._lock.acquire()
        with open(self._journal, "r+b") as file:
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()


def _refuse_foreign(path: Path) -> None:
    if (path / PLAN).exists():
        return
    for name in (JOURNAL, TRIALS, TABLE_MARKDOWN, TABLE_CSV):
        if (path / name).exists():
            raise InputError(f"{path} holds {name} but no {PLAN}, no search: give another --out")


def _refuse_other_storage(path: Path, storage: str | None) -> None:
    """Raise if trials are kept elsewhere: they would all be tried again."""
    if storage is None and (path / OWNER).exists():
        raise InputError(f"the search in {path} was begun with a --storage: give it again")
    if storage is not None and (path / JOURNAL).exists():
        raise InputError(
            f"the search in {path} was begun without --storage: leave it out, or give another --out"
        )


def _refuse_other(path: Path, wanted: Mapping[str, Any]) -> None:
    """Raise if the folder's plan is not the one wanted, and say what differs first."""
    try:
        leaves = _leaves(json.loads((path / PLAN).read_text()))
        there = {name: _in_its_type(name, value) for name, value in leaves.items()}
    except ValueError as error:
        raise InputError(f"{path / PLAN} is not valid JSON: {error}") from error
    # Read back, for lists and tuples are one in JSON.
    here = _leaves(json.loads(json.dumps(wanted)))
    for key in {**here, **there}:
        if here.get(key) != there.get(key):
            raise InputError(
                f"{path} holds another search, {key} {there.get(key)} instead of {here.get(key)}: "
                "continue it with the options that it was begun with, or give another --out"
            )


def _in_its_type(name: str, value: object) -> object:
    """A value of a plan, of which settings may have been kept as text once."""
    setting = SETTINGS.get(name.rpartition(".")[2])
    if setting is None:
        return value
    return (
        [setting.read(each) for each in value] if isinstance(value, list) else setting.read(value)
    )


def _leaves(value: object, name: str = "") -> dict[str, object]:
    """All values of nested objects, under their keys joined by dots."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        leaf: each
        for key, inner in value.items()
        for leaf, each in _leaves(inner, f"{name}.{key}" if name else key).items()
    }
