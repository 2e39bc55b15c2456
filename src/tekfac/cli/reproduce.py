"""``tekfac reproduce``: the paper's experiments again."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tekfac.cli.configuration import TASK, ScheduleOptions, TaskOptions, overridden
from tekfac.cli.console import INTERRUPTED, console, fail, print_trial
from tekfac.cli.options import Given, command, given
from tekfac.cli.progress import Bar
from tekfac.data import augments, load
from tekfac.errors import InputError
from tekfac.paper import reports, theorem31
from tekfac.paper.costs import HOW_ESTIMATED
from tekfac.paper.experiments import table_3, table_4
from tekfac.paper.presets import Preset
from tekfac.paper.reproduction import Reproduction
from tekfac.paper.scales import SCALES, Scale
from tekfac.runs.config import Config, default_device, default_threads
from tekfac.runs.options import flag
from tekfac.runs.ranks import current, launched
from tekfac.runs.schedules import Schedule
from tekfac.searches.grids import Grid, read_grid
from tekfac.searches.plan import HELD_OUT_FRACTION


class Target(str, Enum):
    """What `reproduce` knows."""

    TABLE3 = "table3"
    FIGURE3 = "figure3"
    TABLE4 = "table4"
    FIGURE4 = "figure4"
    THEOREM31 = "theorem31"


# Defaults are the scale's, so that help has none of these.
@command(
    without=["image_size", "network", "seed", "tensorboard"],
    help={"epochs": "", "batch_size": ""},
)
def reproduce(
    *,
    context: typer.Context,
    target: Annotated[
        Target,
        typer.Argument(
            help="table3 or figure3: optimizers on tasks, each with the best settings found for "
            "it. table4 or figure4: TEKFAC with ν or lr varied. theorem31: distances to the Fisher "
            "matrix (Theorem 3.1). A table and its figure are made of the same runs, both of them "
            "whichever is asked for."
        ),
    ],
    scale: Annotated[
        str,
        typer.Option(
            help=f"How much is run: {', '.join(SCALES)}. Of tables 3 and 4, full is the paper's "
            "size, medium one for a day of two CPU cores, small one for hours, smoke a test of "
            "seconds; the options below override its numbers."
        ),
    ] = "small",
    tasks: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas. (default: the scale's)"),
    ] = None,
    optimizers: Annotated[
        str | None,
        typer.Option(help="For table3: names, separated by commas. (default: the scale's)"),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTIMIZER:SETTING=VALUE,...",
            help="Values of one setting to search (table3) or to compare (table4) in place of the "
            "scale's; may be repeated.",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="For table3: random part of the grid that each search tries."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs with the settings chosen, seeds 0, 1, ...")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE.npz",
            help="A file (x_train, y_train, x_test, y_test) in place of a data set's download; may "
            "be repeated.",
            rich_help_panel=TASK.title,
        ),
    ] = None,
    hold_out: Annotated[
        int | None,
        typer.Option(
            help="For table3: training images that searches do not train on but are decided by. "
            f"(default: {100 * HELD_OUT_FRACTION:g} %)",
            rich_help_panel=TASK.title,
        ),
    ] = None,
    task: TaskOptions,
    schedule: ScheduleOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of runs, table and picture; runs that it holds already are kept. "
            "(default: results/theorem31, or results/TABLE-SCALE)"
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask before --scale full begins.")
    ] = False,
) -> None:
    """Run one of the paper's experiments again; print its table and draw its picture.

    What is there already is kept, the rest is run. Interrupted, the same command goes on;
    started several times, it shares the work.
    """
    if scale not in SCALES:
        raise InputError(f"--scale {scale!r} is unknown; there is: {list(SCALES)}")
    names = given(context)
    if target is Target.THEOREM31:
        _refuse(names - {"target", "scale", "out", "yes"}, target)
        if current().count > 1:
            raise InputError("theorem31 has no training to share out: run it without torchrun")
        _reproduce_theorem31(scale, Path("results/theorem31") if out is None else out)
        return
    size = SCALES[scale]
    recipes = {
        name: replace(recipe, schedule=overridden(recipe.schedule, schedule))
        for name, recipe in size.recipes.items()
    }
    size = replace(size, recipes=recipes)
    sensitivity = target in (Target.TABLE4, Target.FIGURE4)
    if sensitivity:
        _refuse(names & {"optimizers", "trials", "hold_out"}, target)
    chosen = _tasks(tasks, size, sensitivity)
    files = _files(data or [], [size.protocols[each].task["data"] for each in chosen])
    protocols = {each: _overridden(size.protocols[each], task, schedule, files) for each in chosen}
    rows = list(size.optimizers) if optimizers is None else _names(optimizers)
    grids = _grids(grid or [], ["tekfac"] if sensitivity else rows)
    experiment = (
        table_4(size, protocols, grids.get("tekfac"), seeds)
        if sensitivity
        else table_3(size, protocols, rows, grids, trials, seeds, hold_out)
    )
    path = Path("results") / f"{experiment.table}-{scale}" if out is None else out
    work = Reproduction(path, experiment)
    _announce(work, ask=size.hours and not yes, hours=size.hours)
    with Bar() as bar:
        try:
            work.run(
                watch=bar.labelled,
                on_trial=print_trial,
                on_run=lambda words: console.print(words, soft_wrap=True),
                on_cell=lambda: reports.save_tables(work),
            )
        except KeyboardInterrupt:
            bar.close()
            fail("interrupted; the same command continues where it stopped", INTERRUPTED)
    reports.save_tables(work)
    reports.save_figure(work)
    console.print(reports.table(work), soft_wrap=True)
    console.print(f"table, picture and runs in {path}")
    if any(left := work.left()):
        console.print(
            f"Left to other processes, which are at work: {left[0]} trials and {left[1]} runs. "
            "The last to end has the whole table, and so has this command when run again."
        )


def _reproduce_theorem31(scale: str, path: Path) -> None:
    chosen = theorem31.SCALES[scale]
    distances = theorem31.run(chosen, load("digits"), console.print)
    title = (
        f"digits, cnn of width {chosen.width}: distance to the exact Fisher block, "
        f"{chosen.examples} examples"
    )
    theorem31.save(distances, path, title)
    console.print(theorem31.table(distances))
    for better, worse in (("TEKFAC", "TKFAC"), ("EKFAC", "KFAC")):
        ratio = theorem31.worst_ratio(distances, better, worse)
        console.print(f"{better}'s error is at most {ratio:.4f} times {worse}'s")
    console.print(f"table and picture in {path}")


def _tasks(given: str | None, scale: Scale, sensitivity: bool) -> list[str]:
    """The tasks of a table or figure: those given, or else the scale's."""
    if given is None:
        return [scale.sweep_task] if sensitivity else list(scale.protocols)
    tasks = _names(given)
    for task in tasks:
        if task not in scale.protocols:
            raise InputError(f"--tasks {task!r} is unknown; there is: {', '.join(scale.protocols)}")
    return tasks


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _files(pairs: Sequence[str], sources: Sequence[str]) -> dict[str, str]:
    """The files that stand for data sets."""
    files = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if name not in sources or not equals:
            raise InputError(
                f"--data {pair!r} must be NAME=FILE.npz with a name of "
                f"{', '.join(dict.fromkeys(sources))}"
            )
        if not Path(file).is_file():
            raise InputError(f"--data {pair!r}: there is no file {file}")
        files[name] = file
    return files


def _grids(texts: Sequence[str], names: Sequence[str]) -> dict[str, Grid]:
    by_name: dict[str, list[str]] = {}
    for text in texts:
        name, colon, grid = text.partition(":")
        if name not in names or not colon:
            raise InputError(
                f"--grid {text!r} must be OPTIMIZER:SETTING=VALUE,... with an optimizer of "
                f"{', '.join(names)}"
            )
        by_name.setdefault(name, []).append(grid)
    return {name: read_grid(grids, name) for name, grids in by_name.items()}


def _overridden(
    protocol: Preset, task: Given[Config], schedule: Given[Schedule], files: Mapping[str, str]
) -> Preset:
    """A task of a scale with what is given for it on the command line."""
    source = protocol.task["data"]
    fields = {
        # A file is augmented as the data set that it stands for.
        "augment": augments(source),
        "device": default_device(),
        "threads": default_threads(source),
        **protocol.task,
        **task.values,
        "data": files.get(source, source),
    }
    if source in files:
        fields.pop("data_dir", None)
    return replace(protocol, task=fields, schedule=overridden(protocol.schedule, schedule))


def _announce(work: Reproduction, ask: bool, hours: bool) -> None:
    """Say what is left to do and, of much work, about how long it takes; ask where told to."""
    trials, runs = work.left()
    if not trials + runs:
        console.print("All is done already.")
        return
    console.print(f"To do: {trials} trials of searches and {runs} runs with settings chosen.")
    if not hours:
        return
    console.print(
        f"About {work.hours():.0f} GPU hours, or less as hopeless trials are given up. An "
        f"estimate, {HOW_ESTIMATED}.",
        soft_wrap=True,
    )
    if not ask:
        return
    if not _interactive():
        raise InputError("so much work is not begun without --yes")
    if not typer.confirm("Begin?"):
        raise typer.Exit


def _interactive() -> bool:
    return sys.stdin.isatty() and not launched()


def _refuse(options: Collection[str], target: Target) -> None:
    """Raise if there are options that do nothing."""
    if options:
        raise InputError(f"{flag(sorted(options)[0])} does nothing with {target.value}")
