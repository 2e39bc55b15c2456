"""When statistics and bases are due.

Early in training curvature changes within a few steps, and the first basis comes from a single
batch, whose statistics do not even have full rank. So a long interval is reached by and by: the one
that begins at step ``t`` is at most ``t / STATISTICS`` for statistics and ``t / BASES`` for bases.
That is a few dozen measurements more in the whole of training; what they bring is in
results/README.md.
"""

from __future__ import annotations

STATISTICS, BASES = 8, 4

# Shorter intervals are kept from the start.
LONG = 10


def is_due(step: int, every: int, divisor: int | None) -> bool:
    """Whether something is due at a step, counted from 0.

    Args:
        step: the step.
        every: the interval.
        divisor: what part of the steps taken an interval may be at most; None for the same interval
            from the start.
    """
    at = 0
    if divisor is not None and every >= LONG:
        while at < step and at // divisor < every:
            at += max(1, at // divisor)
    return at <= step and (step - at) % every == 0
