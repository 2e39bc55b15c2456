"""``tekfac search``: an optimizer's best settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tekfac.cli.configuration import (
    RUNS,
    OptimizerName,
    PresetName,
    ScheduleOptions,
    SettingOptions,
    TaskOptions,
    arguments,
    configuration,
)
from tekfac.cli.console import INTERRUPTED, console, fail, print_table, print_trial
from tekfac.cli.options import command
from tekfac.cli.progress import Bar
from tekfac.data import Dataset
from tekfac.errors import InputError
from tekfac.runs.config import Config
from tekfac.runs.options import flag
from tekfac.searches.grids import Grid, paper_grid, read_grid
from tekfac.searches.plan import HELD_OUT_FRACTION, Plan
from tekfac.searches.search import Search


@command(
    help={
        "hold_out": "Training images that trials do not train on but are judged by. (default: "
        f"{100 * HELD_OUT_FRACTION:g} %)",
        "seed": "Fixes the part of the grid and its order, and of each trial initial weights, data "
        "order, augmentation and sampled labels. (default: 0)",
    }
)
def search(
    *,
    optimizer: OptimizerName = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING=VALUE,...",
            help="Values to try of one setting; may be repeated. (default: the paper's grids of "
            "lr and of nu or damping, where they are not given as options)",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="Try a random part of the grid, of this size. (default: all of it)"
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            help="Give a trial up when, after a third of its epochs or later, its best accuracy is "
            "below the median of the finished trials' after as many epochs."
        ),
    ] = True,
    preset: PresetName = None,
    task: TaskOptions,
    schedule: ScheduleOptions,
    settings: SettingOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the search; one that it holds already is continued. (default: "
            "runs/search-DATA-NETWORK-OPTIMIZER)"
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An Optuna storage by which several machines share the trials, each with a folder "
            "of its own: sqlite:///FILE, postgresql://..., mysql://..., grpc://HOST:PORT. "
            "(default: a journal in the folder)",
        ),
    ] = None,
) -> None:
    """Search for an optimizer's best settings, judged by training images held out.

    Interrupted, the same command goes on; started several times, it shares the work.
    At the end it prints all trials, and the command to train with the best settings.
    """
    name = Config.optimizer if optimizer is None else optimizer
    searched = _searched(grid or [], name, settings.values)
    first = {key: values[0] for key, values in searched.items()}
    base = configuration(name, {**settings.values, **first}, task, schedule, preset)
    base, dataset = _held_out(base)
    plan = Plan(base, searched, prune)
    plan.check(dataset)
    path = out or RUNS / f"search-{dataset.name}-{base.network}-{base.optimizer}"
    with Bar() as bar:
        try:
            work = Search(path, plan, dataset, trials, storage)
            work.run(
                lambda number, total, point: bar.labelled(f"trial {number}/{total}, "),
                lambda result: print_trial("", result),
            )
        except KeyboardInterrupt:
            bar.close()
            fail("interrupted; the same command continues where it stopped", INTERRUPTED)
    work.save_table()
    print_table(*work.table())
    console.print(f"table and trials in {path}")
    if not work.complete:
        console.print(
            "Other processes are at work on the last trials; the last to end them has"
            " the whole table."
        )
        for folder, count in work.elsewhere().items():
            console.print(f"  {count} in {folder}", soft_wrap=True)
        return
    best = shlex.join(["tekfac", "train", *arguments(work.best())])
    console.print(f"The best settings, on all training images:\n  {best}", soft_wrap=True)


def _searched(texts: Sequence[str], optimizer: str, fixed: Mapping[str, Any]) -> Grid:
    """The grid: the user's, and the paper's of settings of which the user says nothing."""
    grid = read_grid(texts, optimizer)
    if both := sorted(fixed.keys() & grid.keys()):
        raise InputError(f"{flag(both[0])} is in the --grid too: give one")
    return {**paper_grid(optimizer, {**fixed, **grid}), **grid}


def _held_out(base: Config) -> tuple[Config, Dataset]:
    """The run with images held out, a part of them if it does not say how many, and its data."""
    dataset = base.load_data()
    if base.hold_out is not None:
        return base, dataset
    count = max(1, round(HELD_OUT_FRACTION * len(dataset.y_train)))
    return replace(base, hold_out=count), dataset.hold_out(count)
