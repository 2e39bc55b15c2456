"""How a run gets on, on the screen, and Ctrl-C."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tekfac.cli.console import console
from tekfac.runs.config import Config
from tekfac.runs.metrics import EpochMetrics, History
from tekfac.runs.optimizers import METHODS
from tekfac.runs.training import BatchProgress, Watcher

if TYPE_CHECKING:
    from typing_extensions import Self


class Interruption:
    """Holds back the first Ctrl-C until the program is ready for it; a second one acts at once.

    Python would raise KeyboardInterrupt anywhere, also within torch's C++ code, some of which turns
    it into another error or ends the process.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous = signal.signal(signal.SIGINT, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self.close()

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was a Ctrl-C."""
        if self._requested:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Let Ctrl-C act as before."""
        signal.signal(signal.SIGINT, self._previous)


class Bar(Watcher):
    """A live bar over all batches of a run: epoch, loss, accuracy, seconds.

    Ctrl-C raises KeyboardInterrupt after the batch in which it was pressed.
    """

    def __init__(self) -> None:
        self._interruption = Interruption()
        self.done = 0
        self.started = False
        self._label = ""
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen; harmless when done twice."""
        self._progress.stop()
        self._interruption.close()

    def for_run(self, config: Config) -> Self:
        """This bar, labelled for a run of a comparison."""
        return self.labelled(f"{METHODS[config.optimizer].label}, seed {config.seed}, ")

    def labelled(self, label: str) -> Self:
        """This bar, with a label in front for the next run."""
        self._label = label
        return self

    def on_start(self, config: Config, history: History, batches: int) -> None:
        self.done, self.started = len(history), True
        self._epochs = config.epochs
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(
            f"{self._label}epoch {self.done + 1}/{config.epochs}",
            total=config.epochs * batches,
            completed=self.done * batches,
            numbers="",
        )
        self._progress.start()

    def on_batch(self, progress: BatchProgress) -> None:
        self._interruption.check()
        if self._task is not None:
            self._progress.update(
                self._task,
                description=f"{self._label}epoch {progress.epoch}/{self._epochs}",
                completed=(progress.epoch - 1) * progress.batches + progress.batch,
                numbers=f"loss {progress.loss:.4f}  accuracy {100 * progress.accuracy:5.1f} %  "
                f"{progress.seconds:.1f} s",
            )

    def on_epoch(self, metrics: EpochMetrics) -> None:
        self.done = metrics.epoch


class EpochLines(Bar):
    """The bar, and above it a line for each epoch that is done."""

    def on_start(self, config: Config, history: History, batches: int) -> None:
        super().on_start(config, history, batches)
        settings = ", ".join(f"{key} {value}" for key, value in config.settings.items())
        console.print(f"{METHODS[config.optimizer].label} ({settings})")
        console.print(f"{config.data}, {config.network}, seed {config.seed}, on {config.device}")
        test_loss = f"{config.tested_on} loss"
        console.print(f"epoch   training loss  accuracy  {test_loss:>13}  accuracy    seconds")

    def on_epoch(self, metrics: EpochMetrics) -> None:
        super().on_epoch(metrics)
        console.print(
            f"{metrics.epoch:5d}"
            f"   {metrics.train_loss:13.4f}  {100 * metrics.train_accuracy:6.2f} %"
            f"  {metrics.test_loss:13.4f}  {100 * metrics.test_accuracy:6.2f} %"
            f"  {metrics.seconds:9.1f}"
        )
