"""What a search is to try."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

from tekfac.data import Dataset
from tekfac.errors import InputError
from tekfac.runs.config import Config
from tekfac.runs.training import check
from tekfac.searches.grids import Grid, Point

HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class Plan:
    """What a search is to try.

    Attributes:
        base: the run that every trial is, but for the settings in the grid. It holds images out.
        grid: for each setting searched its values.
        prune: whether a trial is given up when its held-out accuracy, the best so far, is below
            the median of the finished trials' after as many epochs.

    Raises:
        InputError: if there is nothing to try, or a value cannot be used.
    """

    base: Config
    grid: Grid
    prune: bool = True

    def __post_init__(self) -> None:
        if not self.grid:
            raise InputError("nothing to search: all settings are given; leave one out or --grid")
        if self.base.hold_out is None:
            raise InputError("a search needs held-out images to decide: give --hold-out")
        for point in self.points():
            self.config(point)

    def points(self) -> list[Point]:
        """All points of the grid in an order drawn by the base's seed, so that the first ones are a
        random part of it."""
        values = itertools.product(*self.grid.values())
        points: list[Point] = [dict(zip(self.grid, each, strict=True)) for each in values]
        random.Random(self.base.seed).shuffle(points)
        return points

    def config(self, point: Point) -> Config:
        """The run that tries a point."""
        return replace(self.base, settings={**self.base.settings, **point})

    def check(self, data: Dataset) -> None:
        """Raise what building a trial would raise, once for each value in the grid.

        Raises:
            InputError: if a network or an optimizer cannot be built so.
        """
        for key, values in self.grid.items():
            for value in values:
                check(self.config({key: value}), data)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it, without values in the base that the grid replaces."""
        config = self.base.to_dict()
        for key in self.grid:
            config["settings"].pop(key, None)
        grid = {key: list(values) for key, values in self.grid.items()}
        return {"config": config, "grid": grid, "prune": self.prune}
