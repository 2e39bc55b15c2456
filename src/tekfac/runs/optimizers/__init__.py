"""Optimizers by name: the natural-gradient methods, and what they are compared with.

A file for each kind, and a line for each optimizer in ``registry.METHODS``.
"""

from tekfac.runs.optimizers.method import Method
from tekfac.runs.optimizers.registry import (
    METHODS,
    STANDARD,
    build,
    excluded,
    has_setting,
    resolve,
)

__all__ = ["METHODS", "STANDARD", "Method", "build", "excluded", "has_setting", "resolve"]
