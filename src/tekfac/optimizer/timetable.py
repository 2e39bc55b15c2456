"""What is due in a step: which statistics, and which layers' bases."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tekfac.curvature.blocks import Block, Due
from tekfac.optimizer.intervals import (
    BASES,
    LONG,
    STATISTICS,
    amount_at,
    decay_at,
    is_due,
    last_due,
)
from tekfac.optimizer.schedule import Job, Schedule
from tekfac.ranks.ranks import Ranks

Blocks = Collection[Block]


@dataclass(frozen=True)
class Statistic:
    """Something that is measured again and again, and averaged.

    Attributes:
        every: steps between measurements.
        decay: the weight of the past in the average.
        amount: how much of a batch is read; None for all of it.
    """

    every: int
    decay: float
    amount: int | None


@dataclass(frozen=True)
class Intervals:
    """How often what is due.

    Attributes:
        factors: of them; ``amount`` counts inputs for each column.
        basis_every: steps between two bases of a layer.
        warmup: whether long intervals are shorter early in training.
        reduce: whether factors take an example's positions for one.
        scale: of the rescaling; ``amount`` counts examples. None where it is not measured.
    """

    factors: Statistic
    basis_every: int
    warmup: bool
    reduce: bool
    scale: Statistic | None = None

    def decay(self, step: int, statistic: Statistic | None) -> float:
        """The weight of the past in an average that is due at a step; 0 of none."""
        if statistic is None:
            return 0.0
        return decay_at(step, statistic.every, self._divisor, statistic.decay)

    def due(self, step: int, ranks: Ranks) -> Due:
        """What is measured in a step, counted from 0, and how much of it on each rank."""
        rows = amount_at(self.factors.every, self.factors.amount)
        due = Due(
            factors=is_due(step, self.factors.every, self._divisor),
            scale=False,
            basis=False,
            factor_rows=None if rows is None else rows / ranks.batches,
            reduce=self.reduce,
        )
        if self.scale is None:
            return due
        return replace(
            due,
            scale=is_due(step, self.scale.every, self._divisor),
            scale_examples=ranks.share(amount_at(self.scale.every, self.scale.amount)),
        )

    def last_turn(self, step: int) -> int:
        """The last step, up to this one, in which all bases were due."""
        return last_due(step, self.basis_every, BASES if self.warmup else None)

    @property
    def _divisor(self) -> int | None:
        return STATISTICS if self.warmup else None


class Timetable:
    """Tells blocks what they are to do in each step, and knows whose basis is how old.

    Attributes:
        step: the number of the coming step.
        schedule: what bases may take.
        turns: the bases to be made in the coming step, or in this one.
    """

    def __init__(self) -> None:
        self.step = 0
        self.schedule = Schedule()
        self.turns: list[Job] = []

    def announce(
        self, blocks: Blocks, intervals: Intervals, ranks: Ranks, again: bool, divided: bool
    ) -> None:
        """Tell blocks what is due in the coming step.

        Args:
            blocks: all.
            intervals: how often what is due.
            ranks: those that measure together.
            again: whether to measure once more what the last step was to.
            divided: whether not every rank has every basis when it measures.
        """
        usual = intervals.due(self.step, ranks)
        if again:
            missed = [block.due for block in blocks if not block.factors.empty]
            usual = replace(
                usual,
                factors=usual.factors or any(due.factors for due in missed),
                scale=usual.scale or any(due.scale for due in missed),
            )
        self.turns = self._choose(blocks, intervals)
        turns = {job.name for job in self.turns}

        @cache
        def due(factors: bool, scale: bool, basis: bool, late: bool) -> Due:
            return replace(usual, factors=factors, scale=scale, basis=basis, late=late)

        for block in blocks:
            basis = block.name in turns
            if block.factors.empty:
                # Measured as soon as it can be, but a layer that no gradient reaches must not cost
                # an extra backward pass in every step.
                now = usual.factors or not block.silent
                block.due = due(now, now, now, True)
            else:
                # A first basis has its rescaling with the next measurement: one for it alone would
                # cost a backward pass in every turn.
                scale = usual.scale and (basis or block.basis is not None)
                block.due = due(usual.factors, scale, basis, basis or divided)

    def welcome(self, blocks: Blocks, intervals: Intervals) -> None:
        """Choose again if blocks were measured for the first time: now what they take is known."""
        if any(block.factors.empty and block.pending for block in blocks):
            self.turns = self._choose(blocks, intervals)
            turns = {job.name for job in self.turns}
            for block in blocks:
                block.due = replace(block.due, basis=block.name in turns)

    def advance(self, blocks: Blocks) -> None:
        """A step was taken, with the bases whose turn it was."""
        known = {block.name for block in blocks if not block.factors.empty}
        done = [job for job in self.turns if job.name in known]
        self.schedule.charge(done, _step_cost(blocks) if done else 0, self.step)
        self.step += 1

    def state_dict(self, blocks: Blocks) -> dict[str, Any]:
        """What a resumed run needs to refresh the same bases in the same steps."""
        return {
            "credit": self.schedule.credit,
            "refreshed": dict(self.schedule.refreshed),
            "work": {block.name: block.work for block in blocks},
        }

    def load(
        self, step: int, state: dict[str, Any] | None, blocks: Blocks, intervals: Intervals
    ) -> None:
        """Go on at a step from `state_dict`; older states had none, and all turns at once."""
        self.step = step
        if state is None:
            last = intervals.last_turn(step - 1)
            self.schedule = Schedule(refreshed={b.name: last for b in blocks if b.basis})
            return
        for block in blocks:
            block.work = state["work"].get(block.name, block.work)
        self.schedule = Schedule(state["credit"], dict(state["refreshed"]))

    def _choose(self, blocks: Blocks, intervals: Intervals) -> list[Job]:
        """The blocks whose turn it is to get a new basis in the coming step, or in this one."""
        last, since = intervals.last_turn(self.step), self.schedule.refreshed
        jobs = [
            Job(block.name, since.get(block.name, -1), block.refresh_cost)
            for block in blocks
            if (block.basis is None or since.get(block.name, -1) < last)
            and (block.pending or not block.factors.empty)
        ]
        if intervals.basis_every < LONG or not jobs:
            return jobs
        return self.schedule.choose(jobs, _step_cost(blocks))


def _step_cost(blocks: Blocks) -> int:
    return sum(block.step_cost for block in blocks)
