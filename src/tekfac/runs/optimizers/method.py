"""What an optimizer must say of itself for a run to name it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tekfac.checks import check_count, check_decay, check_not_negative

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """An optimizer that a run can name.

    Attributes:
        label: the name as the literature writes it.
        defaults: every setting the method has, with its default; a setting not listed here is
            refused, for it would do nothing.
        alternatives: settings that may be given in place of a listed one, which they replace.
        package: the optional package that the optimizer comes from; None for torch and tekfac.
        build: makes the optimizer from the network, complete settings, and the generator that
            draws the labels of ``fisher="mc"``.
    """

    label: str
    defaults: Values
    build: Callable[[nn.Module, Values, torch.Generator], Optimizer]
    alternatives: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None


def check_settings(settings: Values) -> None:
    """Raise ValueError for a value out of the range that settings of its name have."""
    for key, value in settings.items():
        if key in ("momentum", "beta1", "beta2"):
            check_decay(key, value)
        elif key == "precondition_frequency":
            check_count(key, value)
        else:
            check_not_negative(key, value)
