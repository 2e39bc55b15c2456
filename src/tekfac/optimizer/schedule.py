"""Which layers get a new basis in a step: as many as leave it a step like the others.

When all layers are due at once (`tekfac.optimizer.intervals`), their eigenvectors may take many
times what a step takes, where layers are wide and batches small. So each layer has its turn in a
step of its own: new bases take at most the part `SHARE` of the time in the long run, and what was
not used lets later steps take up to `BURST` steps' time more. Whose basis is the oldest comes
first, of those of one age the least work. Time is counted in multiplications
(`tekfac.curvature.costs`) and not measured, so that a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# The bases of the first hundred steps take at most ten steps' time then. In the long run intervals
# of 100 steps need one or two (benchmarks/README.md).
SHARE = 0.1
BURST = 0.5

# Multiplications in a step that nobody notices (5 ms): small networks need no schedule.
FREE = 2**28


@dataclass(frozen=True)
class Job:
    """A basis that is due.

    Attributes:
        name: of the block.
        since: the step of its last refresh, -1 without any.
        cost: of a refresh, in multiplications.
    """

    name: str
    since: int
    cost: int


@dataclass
class Schedule:
    """What new bases may take.

    Attributes:
        credit: what they may take in the next step, in steps' time; below 0 after a basis that
            alone takes more than `BURST`.
        refreshed: the step of each block's last refresh.
    """

    credit: float = BURST
    refreshed: dict[str, int] = field(default_factory=dict)

    def choose(self, jobs: Sequence[Job], step_cost: int) -> list[Job]:
        """Those whose turn it is, in a step that takes so many multiplications without them."""
        left = max(self.credit * step_cost, FREE)
        chosen: list[Job] = []
        for job in sorted(jobs, key=lambda job: (job.since, job.cost)):
            # What does not fit holds up all that come after it, or its turn would never come. One
            # that never fits has its turn when there is as much credit as there can be.
            if job.cost > left and (chosen or self.credit < BURST):
                break
            chosen.append(job)
            left -= job.cost
        return chosen

    def charge(self, chosen: Sequence[Job], step_cost: int, step: int) -> None:
        """Count a step in which these had their turn."""
        for job in chosen:
            self.refreshed[job.name] = step
        spent = max(0, sum(job.cost for job in chosen) - FREE)
        self.credit = min(BURST, self.credit + SHARE - spent / max(1, step_cost))
