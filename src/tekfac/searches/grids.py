"""Grids of settings to search, the paper's and the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tekfac.errors import InputError
from tekfac.runs.optimizers import METHODS, SETTINGS, excluded, has_setting, resolve

# The paper's grids: of the learning rate, of λ, and of ν.
PAPER_GRIDS: Mapping[str, tuple[float, ...]] = {
    "lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
    "damping": (1e-8, 1e-6, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "nu": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),
}

Point = Mapping[str, Any]
Grid = Mapping[str, Sequence[Any]]


def read_grid(texts: Sequence[str], method: str) -> Grid:
    """The grid that texts of the form ``setting=value,...`` describe, values in their types.

    Raises:
        InputError: if a text has another form, or the method is unknown or has no such setting.
    """
    defaults = resolve(method, {})
    alternatives = METHODS[method].alternatives
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        key = name.strip().lstrip("-").replace("-", "_")
        if not has_setting(method, key):
            raise InputError(
                f"--grid {text!r}: {method} has no setting {key!r}; its settings are: "
                f"{', '.join(sorted({*defaults, *alternatives}))}"
            )
        if key in grid:
            raise InputError(f"--grid {text!r}: {key} is there twice; give all its values at once")
        setting = SETTINGS[key]
        try:
            read = [setting.read(value.strip()) for value in values.split(",")]
        except ValueError:
            raise InputError(
                f"--grid {text!r} must be SETTING=VALUE,... with values of type "
                f"{setting.type.__name__}"
            ) from None
        grid[key] = list(dict.fromkeys(read))
    return grid


def paper_grid(method: str, chosen: Mapping[str, object]) -> Grid:
    """The paper's grid for a method: those of its settings that are not ``chosen`` otherwise.

    A setting counts as chosen, too, if one is that takes its place. Of two settings that exclude
    each other it has the alternative: ν, the paper's damping in convolutional networks.
    """
    taken = {*chosen, *excluded(method, chosen)}
    free = [key for key in PAPER_GRIDS if has_setting(method, key) and key not in taken]
    replaced = {METHODS[method].alternatives.get(key) for key in free}
    return {key: PAPER_GRIDS[key] for key in free if key not in replaced}
