"""``tekfac train``: one run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tekfac.cli.configuration import (
    RUNS,
    OptimizerName,
    PresetName,
    ScheduleOptions,
    SettingOptions,
    TaskOptions,
    configuration,
)
from tekfac.cli.console import FAILURE, INTERRUPTED, console, fail
from tekfac.cli.options import command, given
from tekfac.cli.progress import EpochLines
from tekfac.data import Dataset
from tekfac.errors import Diverged, InputError
from tekfac.runs.config import Config
from tekfac.runs.folder import RunFolder
from tekfac.runs.options import flag
from tekfac.runs.ranks import launched
from tekfac.runs.training import check, fit


@command()
def train(
    *,
    context: typer.Context,
    optimizer: OptimizerName = None,
    preset: PresetName = None,
    task: TaskOptions,
    schedule: ScheduleOptions,
    settings: SettingOptions,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder. (default: runs/DATA-NETWORK-OPTIMIZER-seedSEED)"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue the run in this folder; of all options only --epochs goes along."
        ),
    ] = None,
) -> None:
    """Train a network. Without options: handwritten digits, a small convolutional net, TEKFAC.

    Options left out take values tuned for the digits; config.json in the run folder records all.
    Started by torchrun, its processes share every batch, and the same command continues its run.
    """
    if resume is not None:
        if others := sorted(given(context) - {"resume", "epochs"}):
            raise InputError(
                f"{flag(others[0])} cannot be changed when a run is resumed, only --epochs can"
            )
        with RunFolder.open(resume) as folder:
            _train(folder, folder.config.load_data(), task.values.get("epochs"))
        return
    name = Config.optimizer if optimizer is None else optimizer
    config = configuration(name, settings.values, task, schedule, preset)
    dataset = config.load_data()
    check(config, dataset)
    if launched():
        with RunFolder.begun(out or RUNS / config.name, config) as folder:
            _train(folder, dataset, config.epochs)
        return
    with (
        RunFolder.create_numbered(RUNS / config.name, config)
        if out is None
        else RunFolder.create(out, config)
    ) as folder:
        _train(folder, dataset, None)


def _train(folder: RunFolder, dataset: Dataset, epochs: int | None) -> None:
    with EpochLines() as watcher:
        try:
            history = fit(folder, dataset, watcher, epochs)
        except KeyboardInterrupt:
            if not watcher.started:
                raise
            watcher.close()
            fail(
                f"interrupted; the checkpoint holds {watcher.done} of {folder.config.epochs} "
                f"epochs. Continue with:\n  tekfac train --resume {shlex.quote(str(folder.path))}",
                INTERRUPTED,
            )
        except Diverged as error:
            watcher.close()
            fail(
                f"{error}. A smaller --lr or more damping may help. Finished epochs kept in "
                f"{folder.path}: {watcher.done}",
                FAILURE,
            )
    accuracy = f"{folder.config.tested_on} accuracy {100 * history[-1].test_accuracy:.2f} %"
    if watcher.started:
        console.print(f"{accuracy} after {len(history)} epochs; run in {folder.path}")
    else:
        console.print(
            f"{folder.path} is finished: {len(history)} of {folder.config.epochs} epochs, "
            f"{accuracy}. Nothing changed."
        )
