"""Run folders: configuration, metrics, curves and checkpoint of one run on disk.

The checkpoint is the run: it holds the metrics of all epochs too, and is replaced in one move.
``metrics.csv``, ``curves.png`` and TensorBoard's event files are made from it, so that they can
always be brought up to date after a crash between two writes.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from tekfac.errors import InputError
from tekfac.runs import plots
from tekfac.runs.config import Config
from tekfac.runs.files import write_atomically, write_csv, write_figure, write_text
from tekfac.runs.metrics import EpochMetrics, History

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG = "config.json"
METRICS = "metrics.csv"
CURVES = "curves.png"
CHECKPOINT = "checkpoint.pt"
EVENTS = "tensorboard"
LOCK = ".lock"


class Busy(InputError):
    """Another process is at work in a run's folder."""


class RunFolder:
    """The folder of one run, locked against other processes until it is closed.

    Made by ``create``, ``create_numbered``, ``begun`` or ``open``; a context manager that closes
    itself.

    Attributes:
        path: the folder.
        config: the run's configuration.
    """

    def __init__(self, path: Path, config: Config, lock: FileLock) -> None:
        self.path = path
        self.config = config
        self._lock = lock
        self._events: SummaryWriter | None = None
        self._epochs_in_events = 0

    @classmethod
    def create(cls, path: Path, config: Config) -> RunFolder:
        """Begin a run in ``path``, which is made if need be and must not hold a run.

        Raises:
            InputError: if it holds a run.
            Busy: if another process is at work in it.
        """
        _refuse_taken(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            _refuse_taken(path)
            folder = cls(path, config, lock)
            folder._save_config()
        except BaseException:
            lock.release()
            raise
        return folder

    @classmethod
    def create_numbered(cls, path: Path, config: Config) -> RunFolder:
        """Begin a run in ``path`` or, if that exists, in the first free of ``path-2``, ..."""
        number = 1
        while True:
            candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                candidate.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return cls.create(candidate, config)

    @classmethod
    def begun(cls, path: Path, config: Config) -> RunFolder:
        """Begin a run in ``path``, or go on with it if it is there, be it of other epochs.

        Raises:
            InputError: if the run there is another one, or its configuration cannot be read.
            Busy: if another process is at work in it.
        """
        if not (path / CONFIG).exists():
            return cls.create(path, config)
        folder = cls.open(path)
        there = dataclasses.replace(folder.config, epochs=config.epochs).to_dict()
        wanted = config.to_dict()
        if there != wanted:
            folder.close()
            key = next(key for key in wanted if there.get(key) != wanted[key])
            raise InputError(
                f"{path} holds a run of another configuration, {key} {there[key]} instead of "
                f"{wanted[key]}: give another --out"
            )
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the run in ``path`` to look at it or continue it.

        Raises:
            InputError: if there is no run, or its configuration cannot be read.
            Busy: if another process is at work in it.
        """
        if not (path / CONFIG).is_file():
            raise InputError(f"{path} holds no run: there is no {CONFIG} in it")
        lock = _lock(path)
        try:
            return cls(path, _read_config(path / CONFIG), lock)
        except BaseException:
            lock.release()
            raise

    def close(self) -> None:
        """Let other processes have the folder."""
        try:
            if self._events is not None:
                self._events.close()
        finally:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def set_epochs(self, epochs: int, done: int) -> None:
        """Change the number of epochs of a run that has ``done`` some.

        Raises:
            InputError: if more are done already, or the schedule depends on the number.
        """
        if epochs == self.config.epochs:
            return
        if epochs < done:
            raise InputError(f"{self.path} has done {done} epochs already, more than {epochs}")
        if self.config.schedule.knows_the_end:
            raise InputError(
                f"{self.path} was begun with a {self.config.schedule.name} schedule over "
                f"{self.config.epochs} epochs, which cannot become {epochs}: begin a new run"
            )
        self.config = dataclasses.replace(self.config, epochs=epochs)
        self._save_config()

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        write_atomically(self.path / CHECKPOINT, lambda file: torch.save(dict(state), file))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, its tensors on the CPU, or None if the run has not got so far.

        Raises:
            InputError: if the file is damaged, or is missing from a run that had one.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            if (self.path / METRICS).exists():
                raise InputError(f"{self.path} has {METRICS} but no {CHECKPOINT} to continue from")
            return None
        with open(path, "rb") as file:
            try:
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            # Seeking in a file cut short is an OSError, where opening it was none.
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise InputError(f"{path} cannot be read, it is damaged: {reason}") from error
        if not isinstance(state, dict) or not {"history", "data_digest"} <= state.keys():
            raise InputError(f"{path} is not a run's checkpoint")
        return state

    def drop_checkpoint(self) -> None:
        """Free the space of a run that will never be continued; its metrics stay."""
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    def save_metrics(self, history: History) -> None:
        """Bring ``metrics.csv`` up to date with the checkpoint."""
        if not self._is_stale(METRICS):
            return
        fields = [field.name for field in dataclasses.fields(EpochMetrics)]
        write_csv(self.path / METRICS, fields, map(dataclasses.astuple, history))

    def save_events(self, history: History) -> None:
        """Bring TensorBoard's event files up to date with the checkpoint, if the run has any."""
        if not self.config.tensorboard or not self._is_stale(EVENTS):
            return
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            # In place of the epochs from 1 on in older files, which may not be all that were done.
            self._events = SummaryWriter(self.path / EVENTS, purge_step=1)
        for metrics in history[self._epochs_in_events :]:
            for tag, value in _scalars(metrics).items():
                self._events.add_scalar(tag, value, metrics.epoch)
        self._epochs_in_events = len(history)
        self._events.flush()

    def save_curves(self, history: History) -> None:
        """Bring ``curves.png`` up to date with the checkpoint; of no epochs there is none."""
        if not history or not self._is_stale(CURVES):
            return
        figure = plots.run_figure(history, self.config.name)
        write_figure(self.path / CURVES, figure)

    def _is_stale(self, name: str) -> bool:
        path = self.path / name
        files = path.iterdir() if path.is_dir() else [path] if path.exists() else []
        made = max((file.stat().st_mtime_ns for file in files), default=0)
        return made < (self.path / CHECKPOINT).stat().st_mtime_ns

    def _save_config(self) -> None:
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        write_text(self.path / CONFIG, text)


def read_metrics(path: Path) -> History:
    """What `RunFolder.save_metrics` wrote, of a run that another process may be at.

    Raises:
        ValueError, TypeError, KeyError: if the file holds something else.
    """
    with open(path, newline="") as file:
        return [
            EpochMetrics(int(row.pop("epoch")), **{key: float(text) for key, text in row.items()})
            for row in csv.DictReader(file)
        ]


def _scalars(metrics: EpochMetrics) -> dict[str, float]:
    """An epoch's numbers by TensorBoard's tags."""
    return {
        "loss/train": metrics.train_loss,
        "loss/test": metrics.test_loss,
        "accuracy/train": metrics.train_accuracy,
        "accuracy/test": metrics.test_accuracy,
        "learning rate": metrics.lr,
        "seconds": metrics.seconds,
    }


def _refuse_taken(path: Path) -> None:
    for name in (CONFIG, METRICS, CURVES, CHECKPOINT, EVENTS):
        if (path / name).exists():
            raise InputError(
                f"{path} already holds a run ({name}), which is never overwritten: give another "
                f"--out, or continue that run with --resume {path}"
            )


def _lock(path: Path) -> FileLock:
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise Busy(f"another process is at work in {path}; wait for it to end") from error
    return lock


def _read_config(path: Path) -> Config:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a run's configuration: it holds no object")
    try:
        return Config.from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
