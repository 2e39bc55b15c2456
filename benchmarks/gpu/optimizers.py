"""The optimizers that are compared."""

from __future__ import annotations

from typing import Any

import torch

import tekfac
from benchmarks.gpu.networks import Task

NAMES = ("sgd", "adamw", "soap", "tekfac")

# Small: the same batch over and over, and only time counts.
LR = 1e-5


def build(name: str, task: Task, tiny: bool, **options: Any) -> torch.optim.Optimizer:
    """An optimizer with its own defaults, but for a learning rate that changes little."""
    parameters = list(task.network.parameters())
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=LR, momentum=0.9)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=LR, fused=True)
    if name == "soap":
        import heavyball

        # Compiled, its first steps would take longer than all that is measured here.
        heavyball.utils.compile_mode = None
        return heavyball.SOAP(parameters, lr=LR, precondition_frequency=10)
    given: dict[str, Any] = {"interval_warmup": False, "likelihood": task.likelihood}
    if tiny:
        given["rank"] = 4
    return tekfac.TEKFAC(task.network, lr=LR, **{**given, **options})
