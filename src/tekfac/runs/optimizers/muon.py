"""Muon, of the package pytorch_optimizer; its author's defaults, not tuned for the digits."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from tekfac.runs.optimizers.method import Method, Values, check_settings


def _muon(network: nn.Module, settings: Values, generator: torch.Generator) -> Optimizer:
    import pytorch_optimizer

    check_settings(settings)  # its own errors are of no common type
    # As its author has it: hidden weights, kernels as matrices (d_out, all else), by Muon; the
    # layer that gives the classes and all vectors by AdamW.
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hidden = [*(m for m in network.modules() if isinstance(m, convolutions)), *linear[:-1]]
    matrices = {id(module.weight) for module in hidden}
    groups = [
        {
            "params": [p for p in network.parameters() if (id(p) in matrices) is use_muon],
            "use_muon": use_muon,
        }
        for use_muon in (True, False)
    ]
    options = dict(settings)
    optimizer: Optimizer = pytorch_optimizer.Muon(
        groups,
        adamw_lr=options.pop("first_order_lr"),
        adamw_wd=options["weight_decay"],
        **options,
    )
    return optimizer


MUON = Method(
    "Muon",
    {"lr": 2e-2, "momentum": 0.95, "weight_decay": 0.0, "first_order_lr": 1e-3},
    _muon,
    package="pytorch_optimizer",
)
