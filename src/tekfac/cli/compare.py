"""``tekfac compare``: several optimizers on one task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tekfac.cli.configuration import (
    METHOD,
    RUNS,
    PresetName,
    ScheduleOptions,
    SettingOptions,
    TaskOptions,
    configuration,
)
from tekfac.cli.console import INTERRUPTED, console, fail, print_table
from tekfac.cli.options import command
from tekfac.cli.progress import Bar
from tekfac.errors import InputError
from tekfac.runs import comparison
from tekfac.runs.optimizers import STANDARD, has_setting
from tekfac.runs.options import flag
from tekfac.runs.training import check


@command(without=["seed"])
def compare(
    *,
    optimizers: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(
        STANDARD
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each optimizer, seeds 0, 1, ...")] = 3,
    target: Annotated[
        float, typer.Option(min=0, max=1, help="Test accuracy to count epochs to.")
    ] = 0.97,
    preset: PresetName = None,
    task: TaskOptions,
    schedule: ScheduleOptions,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Learning rate of one optimizer; may be repeated.",
            rich_help_panel=METHOD.title,
        ),
    ] = None,
    settings: SettingOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for runs, picture and table; runs that it holds already are reused.  "
            "(default: runs/compare-DATA-NETWORK)"
        ),
    ] = None,
) -> None:
    """Run several optimizers on one task; draw their curves and print a table.

    Runs of one seed share initial weights and data order. Interrupted, the same command goes on.
    """
    names = list(dict.fromkeys(name.strip() for name in optimizers.split(",")))
    rates = _learning_rates(lr or [], names)
    configs = {}
    for name in names:
        own = {key: value for key, value in settings.values.items() if has_setting(name, key)}
        configs[name] = configuration(name, {**own, **rates.get(name, {})}, task, schedule, preset)
    for key in settings.values:
        if not any(has_setting(name, key) for name in names):
            raise InputError(f"{flag(key)} does nothing with {', '.join(names)}")
    first = configs[names[0]]
    dataset = first.load_data()
    for config in configs.values():
        check(config, dataset)
    path = RUNS / f"compare-{dataset.name}-{first.network}" if out is None else out
    with Bar() as bar:
        try:
            outcomes = comparison.compare(configs, seeds, path, dataset, bar.for_run)
        except KeyboardInterrupt:
            bar.close()
            fail("interrupted; the same command continues where it stopped", INTERRUPTED)
    title = f"{dataset.name}, {first.network}"
    if seeds > 1:
        title += f": mean and range of {seeds} seeds"
    comparison.save(outcomes, path, title, target)
    print_table(*comparison.table(outcomes, target))
    console.print(f"picture, table and runs in {path}")


def _learning_rates(pairs: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
    rates = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if name not in names or not equals:
            raise InputError(f"--lr {pair!r} must be NAME=VALUE with a name of {', '.join(names)}")
        try:
            rates[name] = {"lr": float(value)}
        except ValueError:
            raise InputError(f"--lr {pair!r}: {value!r} is not a number") from None
    return rates
