"""Optimizers by name: the natural-gradient methods, and what they are compared with.

A file for each kind, a line for each optimizer in ``registry.METHODS``, and for a setting that none
has had yet one in ``settings``.
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
from tekfac.runs.optimizers.settings import SETTINGS, Settings, read_settings

__all__ = [
    "METHODS",
    "SETTINGS",
    "STANDARD",
    "Method",
    "Settings",
    "build",
    "excluded",
    "has_setting",
    "read_settings",
    "resolve",
]
