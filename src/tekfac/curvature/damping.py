"""How much of the identity is added to a curvature block before it is inverted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import get_args

import torch
from torch import Tensor

from tekfac.checks import check_positive


@dataclass(frozen=True)
class MeanDamping:
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


@dataclass(frozen=True)
class TraceDamping:
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

    nu: float = 1e-2

    def __post_init__(self) -> None:
        check_positive("TraceDamping's nu", self.nu)


@dataclass(frozen=True)
class FactoredDamping:
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


Rule = MeanDamping | TraceDamping | FactoredDamping | RelativeDamping
Damping = float | Rule

RULES: dict[str, type[Rule]] = {rule.__name__: rule for rule in get_args(Rule)}


def damping_of(
    rule: Damping,
    block_trace: Callable[[], Tensor],
    row_norm: Tensor,
    dim: int,
    dtype: torch.dtype,
) -> Tensor | float:
    """The damping λ of a block, a number or 0-dimensional.

    Args:
        rule: what the user gave.
        block_trace: gives the block's trace; not every rule asks for it.
        row_norm: mean squared norm of the rows of the layer's weight, 0-dimensional.
        dim: the block's rows.
        dtype: the block's precision.
    """
    if isinstance(rule, TraceDamping):
        return block_trace().clamp_min(rule.nu) / dim
    if isinstance(rule, MeanDamping):
        # Of a layer without any curvature, nothing is to be said: finite, and small.
        return (rule.ratio / dim * block_trace()).clamp_min(torch.finfo(dtype).eps ** 2)
    # A number too small for the block's precision must not become a division by 0.
    tiny = torch.finfo(dtype).tiny
    if isinstance(rule, RelativeDamping):
        return (rule.damping / row_norm.clamp_min(1)).clamp_min(tiny)
    return max(rule.damping if isinstance(rule, FactoredDamping) else rule, tiny)


def packed_damping(rule: Damping) -> float | dict[str, float]:
    """The rule as a ``state_dict`` holds it: a number, by its rule's name if it has one."""
    if isinstance(rule, Rule):
        return {type(rule).__name__: next(iter(asdict(rule).values()))}
    return rule


def unpacked_damping(state: float | dict[str, float]) -> Damping:
    """The rule that `packed_damping` gave this."""
    if not isinstance(state, dict):
        return state
    [(name, number)] = state.items()
    return RULES[name](number)


def check_damping(rule: object, *, trace_damping: bool, method: str) -> None:
    """Raise if ``rule`` is no damping that ``method`` can use.

    Raises:
        TypeError: if it is neither a number nor one of the rules above.
        ValueError: if it is not positive and finite, or trace damping where the method has none.
    """
    if isinstance(rule, TraceDamping):
        if not trace_damping:
            raise ValueError(
                f"{method} has no trace damping (the paper defines it for TKFAC and TEKFAC): "
                "give damping as a positive float, e.g. damping=1e-3"
            )
        return
    if isinstance(rule, (MeanDamping, FactoredDamping)):
        return
    if isinstance(rule, bool) or not isinstance(rule, (int, float)):
        kinds = "a positive float, tekfac.MeanDamping, "
        kinds += "tekfac.TraceDamping, " if trace_damping else ""
        kinds += "tekfac.FactoredDamping or tekfac.RelativeDamping"
        raise TypeError(f"damping must be {kinds}, got {type(rule).__name__}: {rule!r}")
    check_positive("damping", rule)
