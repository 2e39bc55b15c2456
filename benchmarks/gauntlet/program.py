"""What the gauntlet takes from tekfac's own program, in one place."""

from tekfac.experiments.augmentation import crop_and_flip
from tekfac.experiments.data import Dataset, canonical_source, load, source_name
from tekfac.experiments.errors import Diverged, InputError
from tekfac.experiments.files import (
    markdown,
    write_atomically,
    write_csv,
    write_figure,
    write_text,
)
from tekfac.experiments.networks import build as build_network
from tekfac.experiments.optimizers import DAMPING_RULES
from tekfac.experiments.optimizers import build as build_optimizer
from tekfac.experiments.optimizers import resolve as resolve_settings
from tekfac.experiments.schedules import Schedule

__all__ = [
    "DAMPING_RULES",
    "Dataset",
    "Diverged",
    "InputError",
    "Schedule",
    "build_network",
    "build_optimizer",
    "canonical_source",
    "crop_and_flip",
    "load",
    "markdown",
    "resolve_settings",
    "source_name",
    "write_atomically",
    "write_csv",
    "write_figure",
    "write_text",
]
