"""Argument checks with the value in the message, and what else messages are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is finite and not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is finite and positive."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


def check_decay(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def first_few(words: Sequence[str]) -> str:
    """Three of a list that may be long, for a message."""
    return ", ".join(words[:3]) + " and others" * (len(words) > 3)
