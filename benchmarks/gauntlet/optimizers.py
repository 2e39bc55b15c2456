"""The optimizers, and the settings that each one's search tries: the same number for all."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import tekfac
from benchmarks.gauntlet.tasks.task import Task
from tekfac.runs import optimizers
from tekfac.runs.optimizers.natural_gradient import arguments

Settings = Mapping[str, Any]

TRIALS = 6
# SOAP's and Shampoo's refreshes, as often as heavyball and SOAP's authors have them.
REFRESH_EVERY = 10
# The ratio that goes with the root of the curvature: what damping adds is under the root, too.
ROOT_DAMPING = 0.003


def _sgd(network: nn.Module, task: Task, settings: Settings) -> Optimizer:
    # Fused, as Adam below: on a CPU torch's default takes a loop over the parameters.
    return torch.optim.SGD(
        network.parameters(), momentum=0.9, nesterov=True, fused=True, **settings
    )


def _adamw(network: nn.Module, task: Task, settings: Settings) -> Optimizer:
    return torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True, **settings)


def _registered(name: str, fixed: Settings) -> Callable[[nn.Module, Task, Settings], Optimizer]:
    def build(network: nn.Module, task: Task, settings: Settings) -> Optimizer:
        complete = optimizers.resolve(name, {**fixed, **settings})
        return optimizers.build(name, network, complete, torch.Generator())

    return build


def _shampoo(network: nn.Module, task: Task, settings: Settings) -> Optimizer:
    import pytorch_optimizer
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    return pytorch_optimizer.ScalableShampoo(
        network.parameters(),
        # The length of RMSProp's step for each layer, as its authors have it, and an average of
        # gradients in place of their sum: learning rates are then of Adam's size.
        graft_type=LayerWiseGrafting.RMSPROP,
        moving_average_for_momentum=True,
        start_preconditioning_step=REFRESH_EVERY,
        preconditioning_compute_steps=REFRESH_EVERY,
        use_svd=True,  # on a CPU a third of its Schur-Newton iteration's time
        **settings,
    )


def _natural(
    method: Callable[..., Optimizer], network: nn.Module, task: Task, settings: Settings
) -> Optimizer:
    # Of settings that are not given, the method's own defaults, not those tuned for the digits.
    options = arguments(settings)
    if "ratio" in options:
        options["damping"] = tekfac.AgreementDamping(options.pop("ratio"))
    # Where the curvature itself divides, the method decides what tables divide by.
    if options.get("power") == 1.0:
        del options["power"]
    elif "power" in options:
        options.setdefault("damping", tekfac.MeanDamping(ROOT_DAMPING))
    if options.pop("damping_rule", "agreement") == "adaptive":
        options["damping"] = tekfac.AdaptiveDamping()
    return method(network, likelihood=task.likelihood, mean_over=task.mean_over, **options)


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of some settings' values."""
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Attributes:
        label: the name as the literature writes it.
        build: makes the optimizer of a network for a task, with some settings.
        grid: the settings that a search tries; where there is one only, there is no search.
        cost: of a step, in AdamW's, roughly; for estimates only.
        first_order: whether it is one of those whose final loss the others are to reach.
        fixed: what is said of settings that no search touches.
    """

    label: str
    build: Callable[[nn.Module, Task, Settings], Optimizer]
    grid: Sequence[Settings]
    cost: float = 1.0
    first_order: bool = False
    fixed: str = ""

    @property
    def tuned(self) -> bool:
        """Whether there is anything to search."""
        return len(self.grid) > 1


NATURAL = ("kfac", "ekfac", "tkfac", "tekfac")
NATURAL_GRID = grid(
    lr=(2e-3, 4e-3, 8e-3), weight_decay=(0.3, 1.0), power=(0.5,), orthogonalize=(True,)
)


def _natural_contender(method: type[tekfac.NaturalGradient], cost: float) -> Contender:
    fixed = f"AgreementDamping(0.3), with power 0.5 MeanDamping({ROOT_DAMPING:g})"
    return Contender(method.__name__, partial(_natural, method), NATURAL_GRID, cost, fixed=fixed)


CONTENDERS: dict[str, Contender] = {
    "sgd": Contender(
        "SGD",
        _sgd,
        grid(lr=(0.01, 0.03, 0.1, 0.2, 0.4, 0.8)),
        first_order=True,
        fixed="Nesterov's momentum 0.9",
    ),
    "adamw": Contender(
        "AdamW",
        _adamw,
        grid(lr=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
        first_order=True,
        fixed="betas 0.9 and 0.999, weight decay 0.01",
    ),
    "muon": Contender(
        "Muon",
        _registered("muon", {"momentum": 0.95, "weight_decay": 0.01}),
        grid(lr=(5e-3, 2e-2, 6e-2), first_order_lr=(1e-3, 4e-3)),
        cost=1.2,
        fixed="momentum 0.95, weight decay 0.01; the last layer, embeddings and vectors by AdamW",
    ),
    "soap": Contender(
        "SOAP",
        _registered("soap", {"precondition_frequency": REFRESH_EVERY}),
        grid(lr=(3e-3, 1e-2, 3e-2), weight_decay=(0.01, 0.3)),
        cost=2.0,
        fixed=f"betas 0.9 and 0.95, a refresh every {REFRESH_EVERY} steps",
    ),
    "shampoo": Contender(
        "Shampoo",
        _shampoo,
        grid(lr=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
        cost=2.0,
        fixed=f"RMSProp's step lengths, a refresh every {REFRESH_EVERY} steps",
    ),
    "kfac": _natural_contender(tekfac.KFAC, cost=1.8),
    "ekfac": _natural_contender(tekfac.EKFAC, cost=2.0),
    "tkfac": _natural_contender(tekfac.TKFAC, cost=1.8),
    "tekfac": _natural_contender(tekfac.TEKFAC, cost=2.0),
    "tekfac-defaults": Contender(
        "TEKFAC, defaults", partial(_natural, tekfac.TEKFAC), [{}], cost=2.0
    ),
}

# Where a grid does not fit: task and optimizer.
TASK_GRIDS: dict[tuple[str, str], Sequence[Settings]] = {
    # The loss is a sum over 784 pixels.
    ("autoencoder", "sgd"): grid(lr=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    # Full batches bear long steps.
    ("regression", "adamw"): grid(lr=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    # Without noise, damping is the question, and steps are to be as short as curvature says.
    **{
        ("regression", method): grid(lr=(5e-3, 1e-2, 3e-2), damping_rule=("agreement", "adaptive"))
        for method in NATURAL
    },
    # Layers are wider than batches are large: to orthogonalize them takes four times a step.
    **{
        ("autoencoder", method): grid(lr=(5e-3, 1e-2, 2e-2), power=(0.5, 1.0)) for method in NATURAL
    },
    # Steps that the pretrained weights survive.
    ("finetuning", "sgd"): grid(lr=(3e-3, 0.01, 0.03, 0.06, 0.12, 0.25)),
}


def trials(task: str, optimizer: str, count: int) -> Sequence[Settings]:
    """The settings that the optimizer's search on a task tries, ``count`` at most."""
    return TASK_GRIDS.get((task, optimizer), CONTENDERS[optimizer].grid)[:count]


def build(name: str, network: nn.Module, task: Task, settings: Settings) -> Optimizer:
    """The optimizer ``name`` of a network for a task."""
    # Several look at how a schedule changes the learning rate, and doubt it.
    warnings.filterwarnings("ignore", "Learning rate changed between steps")
    return CONTENDERS[name].build(network, task, settings)
