"""Runs: one JSON file each, made by any number of processes that share a folder."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.gauntlet.optimizers import Settings, build
from benchmarks.gauntlet.tasks.task import Batch, Part, Task
from tekfac.errors import Diverged, InputError
from tekfac.runs.files import write_text
from tekfac.runs.schedules import Schedule

# The same for every optimizer and task.
SCHEDULE = Schedule("cosine", warmup=0.05)
EVALUATIONS = 20
EVALUATION_BATCH = 250

Status = Literal["done", "diverged"]


def shown(value: Any) -> str:
    """A setting's value as a table or a file's name shows it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def words(settings: Settings) -> str:
    """Settings likewise."""
    return " ".join(f"{name}={shown(value)}" for name, value in settings.items())


@dataclass(frozen=True)
class Job:
    """A run to be done.

    Attributes:
        task, optimizer: names.
        part: by which of the held-out examples it is judged.
        settings: of the optimizer; its own defaults for all others.
        seed: of weights, batches and sampled labels.
        steps: optimizer steps, over which the schedule stretches.
    """

    task: str
    optimizer: str
    part: Part
    settings: Settings
    seed: int
    steps: int

    @property
    def file(self) -> Path:
        """Where its result belongs, relative to the folder of all runs."""
        name = f"{self.part} {words(self.settings)} seed {self.seed} steps {self.steps}"
        return Path(self.task) / self.optimizer / f"{'-'.join(name.split())}.json"


@dataclass(frozen=True)
class Point:
    """An evaluation on the held-out examples.

    Attributes:
        step: optimizer steps taken.
        loss, score: means over the examples.
        seconds: of training so far, without evaluation.
        processor_seconds: the same by the processor's clock, which stands still while others have
            the core.
    """

    step: int
    loss: float
    score: float
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        status: a run has diverged when a batch's loss, or the held-out loss, is not finite.
        message: of divergence: when, and how it showed.
        points: evaluations, the first before the first step.
        elapsed: seconds of the whole run, evaluation included.
    """

    status: Status
    message: str
    points: list[Point]
    elapsed: float

    @property
    def loss(self) -> float:
        """The final held-out loss, infinite of a diverged run."""
        return self.points[-1].loss if self.status == "done" else math.inf


def trained(task: Task, job: Job) -> Result:
    """Do a run."""
    begun = time.perf_counter()
    torch.manual_seed(job.seed)
    network = task.network()
    optimizer = build(job.optimizer, network, task, job.settings)
    factor = partial(SCHEDULE.factor, steps_per_epoch=job.steps, epochs=1)
    scheduler = LambdaLR(optimizer, factor)
    batches = task.batches(torch.Generator().manual_seed(job.seed))
    held_out = task.held_out(job.part)
    # A search needs the end only.
    evaluations = EVALUATIONS if job.part == "final" else 1
    due = {round(job.steps * number / evaluations) for number in range(evaluations + 1)}
    points = [Point(0, *evaluate(network, task, held_out), 0.0, 0.0)]
    message = ""
    seconds = processor_seconds = 0.0
    try:
        for step in range(1, job.steps + 1):
            start, processor_start = time.perf_counter(), time.process_time()
            _take_step(network, optimizer, task, next(batches), step)
            scheduler.step()
            seconds += time.perf_counter() - start
            processor_seconds += time.process_time() - processor_start
            if step in due:
                loss, score = evaluate(network, task, held_out)
                if not math.isfinite(loss):
                    raise Diverged(f"the held-out loss was {loss} after step {step}")
                points.append(Point(step, loss, score, seconds, processor_seconds))
    except Diverged as error:
        message = str(error)
    status: Status = "diverged" if message else "done"
    return Result(status, message, points, time.perf_counter() - begun)


def _take_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, task: Task, batch: Batch, step: int
) -> None:
    inputs, targets = batch

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(network(inputs), targets)
        if torch.is_grad_enabled() and not math.isfinite(loss.item()):
            raise Diverged(f"the loss was {loss.item()} in step {step}")
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except torch.linalg.LinAlgError as error:
        raise Diverged(f"no decomposition in step {step}: {error}") from error


@torch.no_grad()
def evaluate(network: nn.Module, task: Task, examples: Batch) -> tuple[float, float]:
    """Loss and score, means over all examples."""
    network.eval()
    loss = score = 0.0
    inputs, targets = (part.split(EVALUATION_BATCH) for part in examples)
    for some, wanted in zip(inputs, targets, strict=True):
        output = network(some)
        weight = len(some) / len(examples[0])
        loss += weight * task.loss(output, wanted).item()
        score += weight * task.score(output, wanted).item()
    network.train()
    return loss, score


class Runs:
    """A folder of runs.

    Args:
        folder: made if need be.
        identity: what all runs in it have in common; another one is refused.

    Raises:
        InputError: if the folder is of another identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "gauntlet.json"
        with self.alone():
            if not path.exists():
                write_text(path, json.dumps(identity, indent=2) + "\n")
        if (found := json.loads(path.read_text())) != identity:
            raise InputError(
                f"{folder} holds runs of {found}, not of {identity}: give another --out"
            )
        self.identity = identity
        self._read: dict[Path, Result] = {}

    def alone(self) -> FileLock:
        """A lock that one process has at a time, for what isn't a run."""
        return FileLock(self.folder / ".lock")

    def result(self, job: Job) -> Result | None:
        """A run's result, None if it is not there yet."""
        if job.file not in self._read:
            path = self.folder / job.file
            if not path.exists():
                return None
            values = json.loads(path.read_text())
            points = [Point(**point) for point in values["points"]]
            result = Result(values["status"], values["message"], points, values["elapsed"])
            self._read[job.file] = result
        return self._read[job.file]

    def save(self, job: Job, result: Result) -> None:
        """Write a run's result, whole or not at all."""
        self._write(job, {**asdict(job), **asdict(result), "torch": torch.__version__})

    def pack(self, jobs: Iterable[Job]) -> str:
        """Those of ``jobs`` that are done, a line of JSON each, after one of the identity."""
        done = [self.folder / job.file for job in jobs if self.result(job) is not None]
        entries = [self.identity, *(json.loads(path.read_text()) for path in done)]
        return "".join(f"{json.dumps(entry)}\n" for entry in entries)

    def adopt(self, packed: str, optimizers: Collection[str]) -> None:
        """Take over runs of ``optimizers`` from `pack`'s lines, unless they are there already.

        Raises:
            InputError: if they are of another identity.
            ValueError, TypeError, KeyError: if they are no such lines.
        """
        identity, *entries = map(json.loads, packed.splitlines())
        if identity != self.identity:
            raise InputError(f"the kept runs are of {identity}, not of {self.identity}")
        for values in entries:
            job = Job(**{field.name: values[field.name] for field in fields(Job)})
            if job.optimizer in optimizers:
                with self.claim(job) as mine:
                    if mine:
                        self._write(job, values)

    def _write(self, job: Job, values: dict[str, Any]) -> None:
        write_text(self.folder / job.file, json.dumps(values, indent=1) + "\n")

    @contextlib.contextmanager
    def claim(self, job: Job) -> Iterator[bool]:
        """Whether the run is this process's to do: it isn't done, and no other is at it.

        The claim ends with the process, whatever ends that.
        """
        path = self.folder / job.file
        path.parent.mkdir(parents=True, exist_ok=True)
        # Locks stay: to delete one would give it to two processes that wait for it.
        lock = FileLock(path.with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield not path.exists()
        finally:
            lock.release()
