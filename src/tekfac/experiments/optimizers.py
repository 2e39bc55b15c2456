"""Optimizers by name, each with the settings it has and their tuned defaults."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import tekfac
from tekfac.checks import check_count, check_decay, check_not_negative
from tekfac.experiments.errors import InputError

Settings = Mapping[str, Any]


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
    defaults: Settings
    build: Callable[[nn.Module, Settings, torch.Generator], Optimizer]
    alternatives: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None


def _sgd(network: nn.Module, settings: Settings, generator: torch.Generator) -> Optimizer:
    return torch.optim.SGD(network.parameters(), **settings)


def _adam(network: nn.Module, settings: Settings, generator: torch.Generator) -> Optimizer:
    # AdamW is Adam with decoupled weight decay, as the natural-gradient optimizers have it.
    options = dict(settings)
    betas = (options.pop("beta1"), 0.999)
    return torch.optim.AdamW(network.parameters(), betas=betas, **options)


def _soap(network: nn.Module, settings: Settings, generator: torch.Generator) -> Optimizer:
    import heavyball

    _check(settings)  # it checks nothing by itself
    # Its kernels would be compiled in the first steps, for a minute or more, and are a seventh
    # faster then: a few percent of a step, which short runs never earn back.
    heavyball.utils.compile_mode = None
    # It notices a schedule and doubts it, but does as the schedule says.
    warnings.filterwarnings("ignore", "Learning rate changed between steps")
    options = dict(settings)
    betas = (options.pop("beta1"), options.pop("beta2"))
    optimizer: Optimizer = heavyball.SOAP(network.parameters(), betas=betas, **options)
    return optimizer


def _muon(network: nn.Module, settings: Settings, generator: torch.Generator) -> Optimizer:
    import pytorch_optimizer

    _check(settings)  # its own errors are of no common type
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


def _check(settings: Settings) -> None:
    """Raise ValueError for a value out of the range that settings of its name have."""
    for key, value in settings.items():
        if key in ("momentum", "beta1", "beta2"):
            check_decay(key, value)
        elif key == "precondition_frequency":
            check_count(key, value)
        else:
            check_not_negative(key, value)


# Settings that take the place of `damping`, the constant.
DAMPING_RULES = {
    "nu": tekfac.TraceDamping,
    "factored_damping": tekfac.FactoredDamping,
    "relative_damping": tekfac.RelativeDamping,
}


def _natural_gradient(
    optimizer: Callable[..., Optimizer],
) -> Callable[[nn.Module, Settings, torch.Generator], Optimizer]:
    def build(network: nn.Module, settings: Settings, generator: torch.Generator) -> Optimizer:
        options = dict(settings)
        options["first_order"] = tekfac.Adam(lr=options.pop("first_order_lr"))
        for setting, rule in DAMPING_RULES.items():
            if setting in options:
                options["damping"] = rule(options.pop(setting))
        if "fc_scale" in options:
            # "auto" stays what it is, and whatever else is no number is the optimizer's to refuse.
            with contextlib.suppress(ValueError):
                options["fc_scale"] = float(options["fc_scale"])
        if options["fisher"] == "mc":
            options["generator"] = generator
        return optimizer(network, **options)

    return build


def _replacing_damping(*settings: str) -> dict[str, str]:
    return dict.fromkeys(settings, "damping")


# `first_order_lr` is that of all parameters without a curvature block, e.g. of norm layers. In the
# digits' networks there are none, so that it is the optimizers' own default, not a tuned one.
NATURAL_GRADIENT: Settings = {
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 0.0,
    "fisher": "mc",
    "factor_every": 10,
    "basis_every": 20,
    "rank": 512,
    "first_order_lr": 1e-3,
}

# The defaults are tuned for the digits (network cnn, batches of 64, constant schedule). The test
# images had no part in it: of the training images 300 were held out. Each method took the values
# that reached 97 % on those in the fewest epochs, mean over three seeds; KFAC, EKFAC, TKFAC and
# TEKFAC only among those that ended within half a point of their best accuracy after eight epochs,
# for the fastest are near divergence. KFAC's first choice, damping 1e-4, and EKFAC's, lr and
# damping 3e-4, diverged with other seeds: KFAC has its second, EKFAC the best of its slower lr.
# Tried were, for SGD 36 pairs of lr (0.01 to 0.3) and momentum (0 to 0.95), for Adam 11 values of
# lr (5e-4 to 3e-2) with torch's betas and 40 triples of lr (2e-3 to 1.5e-2), beta1 (0.7 to 0.95)
# and beta2 (0.99, 0.999), for the others 10 pairs each of lr (1e-4, 3e-4, 1e-3) and damping (1e-4
# to 3e-3), around the best of 32 pairs with an earlier rule for the averages.
METHODS: dict[str, Method] = {
    "sgd": Method(
        "SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": False, "weight_decay": 0.0}, _sgd
    ),
    "adam": Method("Adam", {"lr": 1.5e-2, "beta1": 0.8, "weight_decay": 0.0}, _adam),
    "kfac": Method(
        "KFAC",
        {"lr": 3e-4, "damping": 3e-4, **NATURAL_GRADIENT},
        _natural_gradient(tekfac.KFAC),
        _replacing_damping("relative_damping"),
    ),
    "ekfac": Method(
        "EKFAC",
        {"lr": 1e-4, "damping": 1e-4, **NATURAL_GRADIENT, "scale_every": 10},
        _natural_gradient(tekfac.EKFAC),
        _replacing_damping("factored_damping", "relative_damping"),
    ),
    "tkfac": Method(
        "TKFAC",
        {"lr": 3e-4, "damping": 3e-4, **NATURAL_GRADIENT, "fc_scale": "auto"},
        _natural_gradient(tekfac.TKFAC),
        _replacing_damping("nu", "relative_damping"),
    ),
    "tekfac": Method(
        "TEKFAC",
        {
            "lr": 1e-4,
            "damping": 1e-4,
            **NATURAL_GRADIENT,
            "scale_every": 10,
            "fc_scale": "auto",
        },
        _natural_gradient(tekfac.TEKFAC),
        _replacing_damping(*DAMPING_RULES),
    ),
    # Their packages' or authors' defaults, not tuned for the digits.
    "soap": Method(
        "SOAP",
        {
            "lr": 3e-3,
            "beta1": 0.9,
            "beta2": 0.95,
            "weight_decay": 0.0,
            "precondition_frequency": 10,
        },
        _soap,
        package="heavyball",
    ),
    "muon": Method(
        "Muon",
        {"lr": 2e-2, "momentum": 0.95, "weight_decay": 0.0, "first_order_lr": 1e-3},
        _muon,
        package="pytorch_optimizer",
    ),
}

# The methods that need no optional package: those of a comparison, unless it names others.
STANDARD = tuple(name for name, method in METHODS.items() if method.package is None)


def has_setting(name: str, key: str) -> bool:
    """Whether the method ``name`` is known and has a setting ``key``."""
    return name in METHODS and key in {*METHODS[name].defaults, *METHODS[name].alternatives}


def excluded(name: str, given: Collection[str]) -> set[str]:
    """Settings of the method ``name`` that cannot stand beside those given, for they replace one
    another."""
    alternatives = METHODS[name].alternatives
    found: set[str] = set()
    for key in given:
        replaced = alternatives.get(key, key)
        same = {replaced, *(new for new, old in alternatives.items() if old == replaced)}
        found |= same - {key}
    return found


def resolve(name: str, given: Settings) -> dict[str, Any]:
    """Complete settings of the method ``name``: those given, and defaults for the others.

    Raises:
        InputError: if the method is unknown, not installed or has no such setting.
    """
    if name not in METHODS:
        raise InputError(f"--optimizer {name!r} is unknown; there is: {', '.join(METHODS)}")
    method = METHODS[name]
    if method.package is not None and importlib.util.find_spec(method.package) is None:
        raise InputError(
            f"--optimizer {name}: the package {method.package} is not installed: "
            "pip install 'tekfac[baselines]'"
        )
    settings = dict(method.defaults)
    for key, value in given.items():
        if not has_setting(name, key):
            known = sorted({*method.defaults, *method.alternatives})
            raise InputError(
                f"{_option(key)} does nothing with --optimizer {name}, whose settings are: "
                f"{', '.join(_option(each) for each in known)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{_option(key)} must be finite, got {value}")
        replaced = method.alternatives.get(key)
        if replaced is not None:
            for other in sorted(excluded(name, [key]) & given.keys()):
                raise InputError(f"{_option(key)} takes the place of {_option(other)}: give one")
            settings.pop(replaced, None)
        settings[key] = value
    return settings


def build(
    name: str, network: nn.Module, settings: Settings, generator: torch.Generator
) -> Optimizer:
    """The optimizer ``name`` with complete settings.

    Raises:
        InputError: if the optimizer refuses a value.
    """
    try:
        return METHODS[name].build(network, settings, generator)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {error}") from error


def _option(key: str) -> str:
    return "--" + key.replace("_", "-")
