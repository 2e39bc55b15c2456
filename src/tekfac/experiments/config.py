"""What a run is to do, complete and fixed: the content of a run folder's ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tekfac.experiments import data, networks, optimizers
from tekfac.experiments.errors import InputError
from tekfac.experiments.schedules import Schedule


@dataclass(frozen=True)
class Config:
    """A run's configuration. Two runs of one configuration give the same numbers.

    Attributes:
        data: a registered data set's name, or the path of an ``.npz`` file or image folder
            (recorded as an absolute path, so that a run can be resumed from anywhere).
        image_size: height and width for the pictures of an image folder; None for other data.
        network: a name of ``networks.NETWORKS``.
        optimizer: a name of ``optimizers.METHODS``.
        settings: the optimizer's settings; those left out take the method's defaults, and are
            recorded with the values that they took.
        epochs, batch_size: 1 or more. The last batch of an epoch may be smaller.
        schedule: the learning rate's schedule.
        seed: fixes initial weights, data order and sampled labels.
        device: where torch is to compute, e.g. ``"cpu"`` or ``"cuda"``.
        threads: CPU threads for torch. Sums come out differently in their last bits with another
            number, so that it is part of what makes a run repeatable.

    Raises:
        InputError: if a value cannot be used, before anything is loaded or written.
    """

    data: str = "digits"
    image_size: int | None = None
    network: str = "cnn"
    optimizer: str = "tekfac"
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 12
    batch_size: int = 64
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "image_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        if self.network not in networks.NETWORKS:
            known = ", ".join(networks.NETWORKS)
            raise InputError(f"--network {self.network!r} is unknown; there is: {known}")
        _check_device(self.device)
        # Frozen as the instance is, these are its first values, not changes.
        object.__setattr__(self, "data", data.canonical_source(self.data))
        object.__setattr__(self, "settings", optimizers.resolve(self.optimizer, self.settings))

    @property
    def name(self) -> str:
        """A short name, fit for a folder."""
        source = data.source_name(self.data)
        return f"{source}-{self.network}-{self.optimizer}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The configuration that ``to_dict`` gave.

        Raises:
            InputError: if a name is unknown or a value cannot be used.
        """
        try:
            return cls(**{**values, "schedule": Schedule(**values["schedule"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"not a run's configuration: {error}") from error


def default_device() -> str:
    """``"cuda"`` where there is one, or else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_threads(source: str) -> int:
    """Torch's own choice, but one for the embedded data sets.

    On images so small a step takes milliseconds, and threads spend more on waiting for one another
    than they save; on a machine busy with other work ten times as much.
    """
    return 1 if source in data.EMBEDDED else torch.get_num_threads()


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"--device {device!r} is no device of torch, e.g. cpu, cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch finds no CUDA device on this machine; use cpu")
