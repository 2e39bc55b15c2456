"""Protocols of published experiments by name, any part of which a user may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tekfac.errors import InputError
from tekfac.runs.schedules import Schedule


@dataclass(frozen=True)
class Preset:
    """What a protocol fixes; the rest is as without a preset.

    Attributes:
        task: fields of a run's configuration.
        schedule: the learning rate's schedule.
        settings: settings of every optimizer that has them.
    """

    task: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)
    settings: Mapping[str, Any] = field(default_factory=dict)


def _paper(data: str, step_every: int) -> Preset:
    """The protocol of the paper behind TEKFAC.

    It says how often the learning rate falls but not for how long it trains: three times that
    is our choice. Learning rate and damping it searches for each optimizer, so that none are here.
    """
    return Preset(
        task={
            "data": data,
            "network": "resnet20",
            "batch_size": 128,
            "epochs": 3 * step_every,
        },
        schedule=Schedule("step", step_every=step_every, step_factor=0.1),
        settings={"momentum": 0.9, "weight_decay": 0.0},
    )


PRESETS: dict[str, Preset] = {
    "paper-svhn": _paper("svhn", step_every=20),
    "paper-cifar10": _paper("cifar10", step_every=40),
    "paper-cifar100": _paper("cifar100", step_every=40),
}


def find(name: str | None) -> Preset:
    """The preset ``name``; None is one that fixes nothing.

    Raises:
        InputError: if there is none of that name.
    """
    if name is None:
        return Preset()
    if name not in PRESETS:
        raise InputError(f"--preset {name!r} is unknown; there is: {', '.join(PRESETS)}")
    return PRESETS[name]
