"""Who does what: functions of counts alone, so that all ranks come to the same answer.

Ranks are divided into *units* of consecutive ones. Each unit holds the whole curvature state, every
block at one of its members, so that a unit of one rank holds all blocks. What a block makes of a
gradient is computed where it is held and told to the others of the unit.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of curvature state, in bytes: with less than this on every rank, memory is not worth a broadcast
# in every step.
LITTLE = 2**30


def divided(
    costs: Sequence[int], allowed: Sequence[Sequence[int]], loads: Sequence[int]
) -> list[int]:
    """Who does each of several jobs: the costliest first, whoever has the least to do by then.

    Args:
        costs: of each job.
        allowed: for each job, who may do it.
        loads: what everybody has to do already.

    Returns:
        For each job, who does it; of equals the first.
    """
    busy = list(loads)
    takers = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        takers[job] = min(allowed[job], key=lambda taker: (busy[taker], taker))
        busy[takers[job]] += costs[job]
    return takers


def unit_size(placement: str | float, ranks: int, state_bytes: int) -> int:
    """How many ranks hold the curvature state together; a divisor of their number.

    Args:
        placement: "replicated", "sharded", the part of the state that a rank is to hold, or "auto"
            for no more than `LITTLE` of it.
        ranks: how many there are.
        state_bytes: all blocks' state.
    """
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    if placement == "replicated":
        return 1
    if placement == "sharded":
        return ranks
    if placement == "auto":
        return next((size for size in sizes if state_bytes <= size * LITTLE), ranks)
    assert isinstance(placement, float | int)
    return max(size for size in sizes if size * placement <= 1)


def members(rank: int, size: int) -> range:
    """The ranks of the unit that a rank is in."""
    first = rank // size * size
    return range(first, first + size)


def holders(home: int, ranks: int, size: int) -> range:
    """The ranks, one in each unit, that hold a block of this place in a unit."""
    return range(home, ranks, size)


def check_placement(placement: object) -> None:
    """Raise for what is no placement.

    Raises:
        ValueError: naming what may be given.
    """
    number = isinstance(placement, float | int) and not isinstance(placement, bool)
    if number and 0 < float(placement) <= 1:  # type: ignore[arg-type]
        return
    if placement not in ("auto", "replicated", "sharded"):
        raise ValueError(
            'placement must be "auto", "replicated", "sharded" or the part of the curvature state '
            f"that a rank is to hold, above 0 and at most 1, got {placement!r}"
        )
