"""Runs' configurations from options, and options from configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tekfac.cli.options import Given, Panel
from tekfac.networks import NETWORKS
from tekfac.paper import presets
from tekfac.paper.presets import PRESETS
from tekfac.runs.config import Config, default_device, default_threads
from tekfac.runs.optimizers import METHODS, Settings, has_setting
from tekfac.runs.options import declarations, flag
from tekfac.runs.schedules import Schedule

# Where commands put what they are given no folder for.
RUNS = Path("runs")

TASK = Panel("Task")
METHOD = Panel("Optimizer (where the method has the setting)")

TaskOptions = Annotated[Given[Config], TASK]
ScheduleOptions = Annotated[Given[Schedule], TASK]
SettingOptions = Annotated[Given[Settings], METHOD]

OptimizerName = Annotated[
    str | None, typer.Option(help=f"{', '.join(METHODS)}. (default: {Config.optimizer})")
]
PresetName = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(PRESETS)}: the paper's protocol. Batches of 128, momentum 0.9, no weight "
        "decay, lr × 0.1 every 20 (SVHN) or 40 epochs, 60 or 120 epochs in all (our choice: the "
        "paper does not say), resnet20 (or give --network vgg16). Learning rate and damping, which "
        "the paper searches, are not part of it. All other options take precedence.",
        rich_help_panel=TASK.title,
    ),
]


def configuration(
    optimizer: str,
    settings: Mapping[str, Any],
    task: Given[Config],
    schedule: Given[Schedule],
    preset: str | None,
) -> Config:
    """The run that is asked for.

    Args:
        optimizer: its name.
        settings: those of it that take precedence over a preset's.
        task, schedule: what takes precedence over a preset and over defaults.
        preset: the name of one, or None.

    Raises:
        InputError: if a value cannot be used.
    """
    base = presets.find(preset)
    fields = {**base.task, **task.values}
    fields.setdefault("device", default_device())
    fields.setdefault("threads", default_threads(fields.get("data", Config.data)))
    fixed = {key: value for key, value in base.settings.items() if has_setting(optimizer, key)}
    return Config(
        optimizer=optimizer,
        settings={**fixed, **settings},
        schedule=overridden(base.schedule, schedule),
        **fields,
    )


def overridden(base: Schedule, given: Given[Schedule]) -> Schedule:
    """A schedule with what is given in place of its own; of another kind, none of its own.

    Raises:
        InputError: if a value cannot be used.
    """
    name = given.values.get("name", base.name)
    return replace(base if name == base.name else Schedule(name), **given.values)


def arguments(config: Config) -> list[str]:
    """The options of ``train`` for a configuration, without those that have their default."""
    defaults: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for part in (config, config.schedule):
        for name, declared in declarations(type(part)).items():
            defaults[name], values[name] = declared.default, getattr(part, declared.field)
    # Defaults that the machine or other options decide.
    defaults.update(device=None, threads=None, augment=None, width=NETWORKS[config.network].width)
    defaults.update(METHODS[config.optimizer].defaults)
    values.update(config.settings)
    result = ["--optimizer", config.optimizer]
    for name, value in values.items():
        if value is None or value == defaults.get(name):
            continue
        if isinstance(value, bool):
            result.append(flag(name) if value else flag(f"no_{name}"))
        else:
            result += [flag(name), str(value)]
    return result
