"""How much of the identity is added to a curvature block before it is inverted.

A rule is a class in this file, or anywhere: a `DampingRule` with one number and a λ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tekfac.checks import check_positive


@dataclass(frozen=True)
class Measured:
    """What is known of a block that a rule may go by.

    Args:
        trace: gives the trace of the block; not every rule asks for it.
        row_norm: mean squared norm of the rows of the layer's weight, 0-dimensional.
        dim: the block's rows.
        dtype: its precision.
    """

    trace: Callable[[], Tensor]
    row_norm: Tensor
    dim: int
    dtype: torch.dtype


class DampingRule(ABC):
    """A damping λ of each layer's own: a frozen dataclass with one number as its only field.

    A state holds a rule by its class's name and that number, so that a rule of your own loads
    wherever its class has been imported.
    """

    rules: ClassVar[dict[str, type[DampingRule]]] = {}
    of_the_paper: ClassVar[bool] = False
    """Whether it is (3.5), which the paper defines for TKFAC and TEKFAC alone."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        DampingRule.rules[cls.__name__] = cls

    @abstractmethod
    def of(self, block: Measured) -> Tensor | float:
        """The damping λ of a block, a number or 0-dimensional, positive."""


@dataclass(frozen=True)
class MeanDamping(DampingRule):
    """Damping relative to each layer's own curvature.

    Layer ``l`` gets ``λ_l = ratio · tr F_l / dim F_l``, this part of its block's mean eigenvalue:
    where an eigenvalue is far above the mean, the step is natural gradient's, and where it is far
    below, as if it were the mean. It is a number without a unit, which means the same in every
    layer, under every likelihood and at every stage of training. This is `TraceDamping` without its
    ν, which has a unit: ratio 1 is the paper's (3.5) wherever a trace exceeds ν.

    KFAC and TKFAC put ``λ_l`` into their factored form, so that each factor gets ``√ratio`` of its
    own mean eigenvalue.

    Args:
        ratio: of the mean eigenvalue, positive.

    Raises:
        ValueError: if ``ratio`` is not a positive finite number.
    """

    ratio: float = 0.3

    def __post_init__(self) -> None:
        check_positive("MeanDamping's ratio", self.ratio)

    def of(self, block: Measured) -> Tensor | float:
        # Of a layer without any curvature, nothing is to be said: finite, and small.
        smallest = torch.finfo(block.dtype).eps ** 2
        return (self.ratio / block.dim * block.trace()).clamp_min(smallest)


@dataclass(frozen=True)
class TraceDamping(DampingRule):
    """Damping that follows each layer's curvature (paper, 3.5).

    Layer ``l`` gets ``λ_l = max(tr F_l, ν) / dim F_l``: the mean eigenvalue of its own block, kept
    from vanishing by ``ν`` when the trace does. The formula is our reading of the paper, whose
    text gives it in words only.

    Args:
        nu: ν, in the units of a trace of the Fisher matrix, positive. The paper's grid is 1e-4 to
            100, its best value for ResNet20 on CIFAR-100 the default 1e-2.

    Raises:
        ValueError: if ``nu`` is not a positive finite number.
    """

    of_the_paper = True
    nu: float = 1e-2

    def __post_init__(self) -> None:
        check_positive("TraceDamping's nu", self.nu)

    def of(self, block: Measured) -> Tensor | float:
        return block.trace().clamp_min(self.nu) / block.dim


@dataclass(frozen=True)
class FactoredDamping(DampingRule):
    """The damping that KFAC and TKFAC have, for EKFAC and TEKFAC too.

    KFAC's ``(A + π√λ I) ⊗ (G + √λ/π I)`` adds ``π√λ I ⊗ G + √λ/π A ⊗ I + λ I`` to its block, and
    TKFAC's form of it likewise. That is diagonal in their eigenbasis, so that EKFAC and TEKFAC,
    which share it, can add the same to their own rescaling: a direction with much curvature on one
    side alone is damped by more than λ. The paper adds λ alone (3.4); that this serves TEKFAC
    better is our finding (results/README.md).

    For KFAC and TKFAC it is the same as the number.

    Args:
        damping: λ, positive.

    Raises:
        ValueError: if ``damping`` is not a positive finite number.
    """

    damping: float

    def __post_init__(self) -> None:
        check_positive(f"{type(self).__name__}'s damping", self.damping)

    def of(self, block: Measured) -> Tensor | float:
        return max(self.damping, torch.finfo(block.dtype).tiny)


@dataclass(frozen=True)
class RelativeDamping(FactoredDamping):
    """Factored damping that falls as a layer's weights grow.

    Layer ``l`` gets ``λ_l = λ / max(1, w_l)``, with ``w_l = ‖W_l‖² / d_out`` the mean squared norm
    of its weight's rows, 2 in a freshly He-initialised layer. In front of a norm layer only the
    direction of ``W_l`` matters: with weights ``c`` times as large gradients are ``1/c`` and
    curvature ``1/c²`` times as large, so that a constant λ, as the weights grow, comes to outweigh
    all curvature, and relative steps shrink with ``1/c²``. With this λ they stay the same. That
    it serves convolutional networks with batch normalisation better is our finding
    (results/README.md).

    Weights with rows shorter than 1 are damped by λ itself, so that layers that start from zero can
    leave it. ``w_l`` is measured along with the layer's statistics.

    Args:
        damping: λ, positive.

    Raises:
        ValueError: if ``damping`` is not a positive finite number.
    """

    def of(self, block: Measured) -> Tensor | float:
        smallest = torch.finfo(block.dtype).tiny
        return (self.damping / block.row_norm.clamp_min(1)).clamp_min(smallest)


Damping = float | DampingRule


def damping_of(damping: Damping, block: Measured) -> Tensor | float:
    """The damping λ of a block, a number or 0-dimensional.

    A number too small for the block's precision must not become a division by 0.
    """
    if isinstance(damping, DampingRule):
        return damping.of(block)
    return max(damping, torch.finfo(block.dtype).tiny)


def packed_damping(rule: Damping) -> float | dict[str, float]:
    """The rule as a ``state_dict`` holds it: a number, by its rule's name if it has one."""
    if isinstance(rule, DampingRule):
        return {type(rule).__name__: next(iter(asdict(rule).values()))}  # type: ignore[call-overload]
    return rule


def unpacked_damping(state: float | dict[str, float]) -> Damping:
    """The rule that `packed_damping` gave this.

    Raises:
        ValueError: for a rule whose class has not been imported.
    """
    if not isinstance(state, dict):
        return state
    [(name, number)] = state.items()
    if name not in DampingRule.rules:
        raise ValueError(
            f"this state has a damping rule {name!r}, which is not known here: import the module "
            "that defines it before loading"
        )
    return DampingRule.rules[name](number)  # type: ignore[call-arg]


def check_damping(rule: object, *, trace_damping: bool, method: str) -> None:
    """Raise if ``rule`` is no damping that ``method`` can use.

    Raises:
        TypeError: if it is neither a number nor a `DampingRule`.
        ValueError: if it is not positive and finite, or trace damping where the method has none.
    """
    if isinstance(rule, DampingRule):
        if rule.of_the_paper and not trace_damping:
            raise ValueError(
                f"{method} has no trace damping (the paper defines it for TKFAC and TEKFAC): "
                "give damping as a positive float, e.g. damping=1e-3"
            )
        return
    if isinstance(rule, bool) or not isinstance(rule, (int, float)):
        kinds = "a positive float, tekfac.MeanDamping, "
        kinds += "tekfac.TraceDamping, " if trace_damping else ""
        kinds += "tekfac.FactoredDamping or tekfac.RelativeDamping"
        raise TypeError(f"damping must be {kinds}, got {type(rule).__name__}: {rule!r}")
    check_positive("damping", rule)
