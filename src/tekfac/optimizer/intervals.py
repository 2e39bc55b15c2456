"""When statistics and bases are due, and how long averages remember.

Early in training curvature changes within a few steps, and the first basis comes from a single
batch, whose statistics do not even have full rank. So a long interval is reached by and by: the one
that begins at step ``t`` is at most ``t / STATISTICS`` for statistics and ``t / BASES`` for bases,
and averages forget what is older than about the last quarter of the steps taken, ``t / MEMORY``.
That is a few dozen measurements more in the whole of training; what both bring is in
results/README.md.
"""

from __future__ import annotations

STATISTICS, BASES, MEMORY = 8, 4, 4

# Shorter intervals are kept from the start.
LONG = 10


def last_due(step: int, every: int, divisor: int | None) -> int:
    """The last step up to this one at which something was due; arguments as for `is_due`."""
    at = 0
    if divisor is not None and every >= LONG:
        while (gap := max(1, at // divisor)) < every:
            if at + gap > step:
                return at
            at += gap
    return at + (step - at) // every * every


def is_due(step: int, every: int, divisor: int | None) -> bool:
    """Whether something is due at a step, counted from 0.

    Args:
        step: the step.
        every: the interval.
        divisor: what part of the steps taken an interval may be at most; None for the same interval
            from the start.
    """
    return last_due(step, every, divisor) == step


def decay_at(step: int, every: int, divisor: int | None, decay: float) -> float:
    """The weight of the past in an average that is due at a step; at the first there is no past.

    Args:
        step: the step.
        every: the interval.
        divisor: as for `is_due`; with None, or a short interval, always ``decay``.
        decay: the weight that is reached at last, and never exceeded.
    """
    if divisor is None or every < LONG or step == 0:
        return decay
    gap = step - last_due(step - 1, every, divisor)
    return min(decay, max(0.0, 1 - MEMORY * gap / step))


def amount_at(interval: int, amount: int | None) -> int | None:
    """How many rows or examples a measurement is to read.

    Args:
        interval: steps between measurements.
        amount: how many where these are ten or more; of shorter ones half. None for all, always.
    """
    return amount if amount is None or interval >= LONG else -(-amount // 2)
