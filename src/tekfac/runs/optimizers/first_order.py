"""SGD and Adam, of torch."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from tekfac.runs.optimizers.method import Method, Values


def _sgd(network: nn.Module, settings: Values, generator: torch.Generator) -> Optimizer:
    return torch.optim.SGD(network.parameters(), **settings)


def _adam(network: nn.Module, settings: Values, generator: torch.Generator) -> Optimizer:
    # AdamW is Adam with decoupled weight decay, as the natural-gradient optimizers have it.
    options = dict(settings)
    betas = (options.pop("beta1"), 0.999)
    return torch.optim.AdamW(network.parameters(), betas=betas, **options)


SGD = Method("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": False, "weight_decay": 0.0}, _sgd)
ADAM = Method("Adam", {"lr": 1.5e-2, "beta1": 0.8, "weight_decay": 0.0}, _adam)
