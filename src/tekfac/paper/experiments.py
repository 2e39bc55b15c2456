"""What of the paper's tables 3 and 4, and figures 3 and 4, is run: variants on tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tekfac.errors import InputError
from tekfac.paper.presets import Preset
from tekfac.paper.published import TABLE_3, TABLE_4, TABLE_4_CENTRE, TABLE_4_TASK, Accuracy
from tekfac.paper.scales import Scale
from tekfac.runs.optimizers import METHODS, excluded
from tekfac.searches.grids import Grid, paper_grid
from tekfac.searches.trials import as_text

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
        recipe: schedule and settings in place of the protocols'; None for theirs.
    """

    label: str
    optimizer: str
    grid: Grid
    panel: str
    paper: Mapping[str, Accuracy]
    recipe: Preset | None = None


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
        trial_images, trial_epochs: how many of them a search's trial has, at most; None for all.
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
    trial_images: int | None = None
    trial_epochs: int | None = None

    @property
    def files(self) -> tuple[str, str, str]:
        """The names of what it comes to: the table twice, and the picture."""
        return f"{self.table}.md", f"{self.table}.csv", f"{self.figure}.png"


def table_3(
    scale: Scale,
    protocols: Mapping[str, Preset],
    optimizers: Sequence[str] | None = None,
    grids: Mapping[str, Grid] | None = None,
    trials: int | None = None,
    seeds: int | None = None,
    hold_out: int | None = None,
) -> Experiment:
    """Optimizers on tasks, each with the best settings found for it: table 3 and figure 3.

    Args:
        scale: its numbers hold where no others are given.
        protocols: the tasks, by name, and what runs on them have in common.
        optimizers: names of ``optimizers.METHODS``; None for the scale's.
        grids: for some of the optimizers values to be searched in place of the scale's.
        trials, seeds, hold_out: as ``Experiment`` has them.

    Raises:
        InputError: if an optimizer is unknown.
    """
    optimizers = scale.optimizers if optimizers is None else optimizers
    if unknown := [name for name in optimizers if name not in METHODS]:
        raise InputError(f"--optimizers {unknown[0]!r} is unknown; there is: {', '.join(METHODS)}")
    variants = [
        Variant(
            label=METHODS[name].label,
            optimizer=name,
            grid=_grid(name, scale, (grids or {}).get(name, {})),
            panel="",
            paper={task: row[name] for task, row in TABLE_3.items() if name in row},
            recipe=scale.recipes.get(name),
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
        trial_images=scale.trial_images,
        trial_epochs=scale.trial_epochs,
    )


def _grid(optimizer: str, scale: Scale, given: Grid) -> Grid:
    """The scale's grid, or the paper's, with values given in place of some."""
    base = scale.grids.get(optimizer) or paper_grid(optimizer, given)
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


def size(grid: Grid) -> int:
    """How many points a grid has."""
    return math.prod(len(values) for values in grid.values())
