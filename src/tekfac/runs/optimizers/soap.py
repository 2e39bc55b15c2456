"""SOAP, of the package heavyball; its defaults are the package's, not tuned for the digits."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.optim import Optimizer

from tekfac.runs.optimizers.method import Method, Values, check_settings


def _soap(network: nn.Module, settings: Values, generator: torch.Generator) -> Optimizer:
    import heavyball

    check_settings(settings)  # it checks nothing by itself
    # Its kernels would be compiled in the first steps, for a minute or more, and are a seventh
    # faster then: a few percent of a step, which short runs never earn back.
    heavyball.utils.compile_mode = None
    # It notices a schedule and doubts it, but does as the schedule says.
    warnings.filterwarnings("ignore", "Learning rate changed between steps")
    options = dict(settings)
    betas = (options.pop("beta1"), options.pop("beta2"))
    optimizer: Optimizer = heavyball.SOAP(network.parameters(), betas=betas, **options)
    return optimizer


SOAP = Method(
    "SOAP",
    {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0, "precondition_frequency": 10},
    _soap,
    package="heavyball",
)
