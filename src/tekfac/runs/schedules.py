"""Learning-rate schedules: the factor on every group's learning rate as a function of time.

A factor depends on the step alone, never on the run so far, so that a resumed run needs to know
nothing but its step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

from tekfac.errors import InputError
from tekfac.runs.options import Option

SCHEDULES = ("constant", "cosine", "step")
STEP_EVERY = 20
STEP_FACTOR = 0.1


@dataclass(frozen=True)
class Schedule:
    """A schedule's name and settings; times are in epochs.

    Attributes:
        name: ``"constant"``; ``"cosine"``, half a cosine from 1 down to 0 at the last epoch; or
            ``"step"``, times ``step_factor`` every ``step_every`` epochs (the paper: times 0.1
            every 20 epochs for SVHN, every 40 for CIFAR).
        warmup: epochs over which the factor rises linearly to 1, on top of the schedule proper.
        step_every, step_factor: for ``"step"`` only; None means 20 and 0.1.

    Raises:
        InputError: if a value is out of range, or a setting does nothing for this schedule.
    """

    name: Annotated[
        str, Option(f"Learning rate over time: {', '.join(SCHEDULES)}.", name="schedule")
    ] = "constant"
    warmup: Annotated[float, Option("Epochs of linear warm-up.")] = 0.0
    step_every: Annotated[
        int | None, Option("Epochs between steps of --schedule step.", default=f"{STEP_EVERY}")
    ] = None
    step_factor: Annotated[
        float | None, Option("Factor of each such step.", default=f"{STEP_FACTOR}")
    ] = None

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise InputError(
                f"--schedule {self.name!r} is unknown; there is: {', '.join(SCHEDULES)}"
            )
        if not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise InputError(f"--warmup must be 0 or more epochs, got {self.warmup}")
        if self.name != "step" and (self.step_every, self.step_factor) != (None, None):
            raise InputError(
                f"--step-every and --step-factor do nothing with --schedule {self.name}; "
                "they are for --schedule step"
            )
        if self.step_every is not None and self.step_every < 1:
            raise InputError(f"--step-every must be 1 epoch or more, got {self.step_every}")
        if self.step_factor is not None and not 0 < self.step_factor <= 1:
            raise InputError(f"--step-factor must be above 0 and at most 1, got {self.step_factor}")

    @property
    def knows_the_end(self) -> bool:
        """Whether the factor depends on the number of epochs, which then cannot be changed."""
        return self.name == "cosine"

    def shortened(self, by: float) -> Schedule:
        """The same shape over ``by`` times as many epochs."""
        every = self.step_every
        if self.name == "step":
            every = max(1, round((STEP_EVERY if every is None else every) * by))
        return replace(self, warmup=self.warmup * by, step_every=every)

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The factor for optimizer step ``step``, counted from 0, of a run of ``epochs``."""
        # The ramp counts from 1, or else the first step would move nothing.
        ramp_steps = self.warmup * steps_per_epoch
        ramp = min(1.0, (step + 1) / ramp_steps) if ramp_steps > 0 else 1.0
        return ramp * self._shape(step, steps_per_epoch, epochs)

    def _shape(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        if self.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / (steps_per_epoch * epochs)))
        if self.name == "step":
            every = STEP_EVERY if self.step_every is None else self.step_every
            by = STEP_FACTOR if self.step_factor is None else self.step_factor
            return float(by ** (step // (every * steps_per_epoch)))
        return 1.0
