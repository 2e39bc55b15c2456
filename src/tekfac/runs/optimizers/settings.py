"""The settings that optimizers have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from tekfac.runs.options import Option, declarations


class Settings(TypedDict, total=False):
    """All settings of all optimizers; which of them one has, and their defaults, are its own."""

    lr: Annotated[float, Option("Learning rate.")]
    momentum: Annotated[float, Option()]
    nesterov: Annotated[bool, Option("Nesterov's form of the momentum.", default="no")]
    beta1: Annotated[float, Option("Decay of Adam's mean of gradients.")]
    beta2: Annotated[float, Option("Decay of SOAP's mean of squares.", hidden=True)]
    weight_decay: Annotated[float, Option()]
    damping: Annotated[float, Option("Constant damping λ.")]
    nu: Annotated[float, Option("ν of trace damping (TKFAC, TEKFAC).")]
    factored_damping: Annotated[
        float, Option("λ of KFAC's factored damping, for EKFAC and TEKFAC too.")
    ]
    relative_damping: Annotated[
        float, Option("λ of factored damping, less where a layer's weights have grown.")
    ]
    mean_damping: Annotated[
        float, Option("λ of each layer in units of its curvature's own mean (TEKFAC).")
    ]
    agreement_damping: Annotated[
        float, Option("The same, falling where steps agree with those before (TEKFAC).")
    ]
    fc_scale: Annotated[
        float | Literal["auto"],
        Option(
            "β of fully-connected layers behind convolutions (TKFAC, TEKFAC): auto, or a number; "
            "above 1 they take smaller steps.",
            default="auto",
        ),
    ]
    fisher: Annotated[str, Option("mc, exact or empirical.")]
    factor_every: Annotated[int, Option("Steps between statistics.")]
    scale_every: Annotated[int, Option("Steps between rescalings.")]
    basis_every: Annotated[int, Option("Steps between eigenbases.")]
    precondition_frequency: Annotated[int, Option("Steps between SOAP's eigenbases.", hidden=True)]
    rank: Annotated[int, Option("Eigenvectors kept of factors wider than three times that.")]
    first_order_lr: Annotated[
        float,
        Option("Adam's learning rate for parameters without curvature, e.g. of norm layers."),
    ]


# How each is declared.
SETTINGS = declarations(Settings)


def read_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, any of which may have been written as text, in their types.

    Raises:
        ValueError: if text does not stand for a value of a setting's type.
    """
    return {
        key: SETTINGS[key].read(value) if key in SETTINGS else value
        for key, value in values.items()
    }
