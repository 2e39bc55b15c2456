"""KFAC, EKFAC, TKFAC and TEKFAC."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import tekfac
from tekfac.runs.optimizers.method import Method, Values

# Values that take the place of `damping`, the constant.
DAMPING_RULES = {
    "nu": tekfac.TraceDamping,
    "factored_damping": tekfac.FactoredDamping,
    "relative_damping": tekfac.RelativeDamping,
    "mean_damping": tekfac.MeanDamping,
    "agreement_damping": tekfac.AgreementDamping,
}

# `first_order_lr` is that of all parameters without a curvature block, e.g. of norm layers. In the
# digits' networks there are none, so that it is the optimizers' own default, not a tuned one.
NATURAL_GRADIENT: Values = {
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 0.0,
    "fisher": "mc",
    "factor_every": 10,
    "basis_every": 20,
    "rank": 512,
    "first_order_lr": 1e-3,
}


# In place of the optimizers' own defaults, which are not the paper's.
PAPER: Values = {"power": 1.0, "rms_clip": None}


def arguments(settings: Values) -> dict[str, Any]:
    """A run's settings, as arguments of the package's optimizers."""
    options = dict(settings)
    if "first_order_lr" in options:
        options["first_order"] = tekfac.Adam(lr=options.pop("first_order_lr"))
    for setting, rule in DAMPING_RULES.items():
        if setting in options:
            options["damping"] = rule(options.pop(setting))
    return options


def _natural_gradient(
    optimizer: Callable[..., Optimizer], fixed: Values = PAPER
) -> Callable[[nn.Module, Values, torch.Generator], Optimizer]:
    def build(network: nn.Module, settings: Values, generator: torch.Generator) -> Optimizer:
        options = arguments(settings)
        if options["fisher"] == "mc":
            options["generator"] = generator
        return optimizer(network, **fixed, **options)

    return build


def _replacing_damping(*settings: str) -> dict[str, str]:
    return dict.fromkeys(settings, "damping")


KFAC = Method(
    "KFAC",
    {"lr": 3e-4, "damping": 3e-4, **NATURAL_GRADIENT},
    _natural_gradient(tekfac.KFAC),
    _replacing_damping("relative_damping"),
)
EKFAC = Method(
    "EKFAC",
    {"lr": 1e-4, "damping": 1e-4, **NATURAL_GRADIENT, "scale_every": 10},
    _natural_gradient(tekfac.EKFAC),
    _replacing_damping("factored_damping", "relative_damping"),
)
TKFAC = Method(
    "TKFAC",
    {"lr": 3e-4, "damping": 3e-4, **NATURAL_GRADIENT, "fc_scale": "auto"},
    _natural_gradient(tekfac.TKFAC),
    _replacing_damping("nu", "relative_damping"),
)
TEKFAC = Method(
    "TEKFAC",
    {"lr": 1e-4, "damping": 1e-4, **NATURAL_GRADIENT, "scale_every": 10, "fc_scale": "auto"},
    _natural_gradient(tekfac.TEKFAC),
    _replacing_damping(*DAMPING_RULES),
)


def _of_the_package() -> Values:
    """The settings of `tekfac.TEKFAC`, as far as a run has them, and its own defaults."""
    parameters = {
        **inspect.signature(tekfac.NaturalGradient).parameters,
        **inspect.signature(tekfac.TEKFAC).parameters,
    }
    own = {key: parameters[key].default for key in TEKFAC.defaults if key in parameters}
    own["agreement_damping"] = own.pop("damping").ratio
    return {**own, "first_order_lr": parameters["first_order"].default.lr}


# What `tekfac.TEKFAC(network)` is, whose steps are bounded, beside the paper's method.
TEKFAC_DEFAULTS = Method(
    "TEKFAC, defaults",
    _of_the_package(),
    _natural_gradient(tekfac.TEKFAC, fixed={}),
)
