"""How much of the identity is added to a curvature block before it is inverted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tekfac.checks import check_positive


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


Damping = float | TraceDamping


def damping_of(rule: Damping, trace: Tensor, dim: int) -> Tensor:
    """The damping λ (0-dimensional) of a block with this trace and ``dim`` rows."""
    if isinstance(rule, TraceDamping):
        return trace.clamp_min(rule.nu) / dim
    # A number too small for the block's precision must not become a division by 0.
    return trace.new_full((), rule).clamp_min(torch.finfo(trace.dtype).tiny)


def check_damping(rule: object, *, trace_damping: bool, method: str) -> None:
    """Raise if ``rule`` is no damping that ``method`` can use.

    Raises:
        TypeError: if it is neither a number nor a ``TraceDamping``.
        ValueError: if it is not positive and finite, or trace damping where the method has none.
    """
    if isinstance(rule, TraceDamping):
        if not trace_damping:
            raise ValueError(
                f"{method} has no trace damping (the paper defines it for TKFAC and TEKFAC): "
                "give damping as a positive float, e.g. damping=1e-3"
            )
        return
    if isinstance(rule, bool) or not isinstance(rule, (int, float)):
        kinds = "a positive float or tekfac.TraceDamping" if trace_damping else "a positive float"
        raise TypeError(f"damping must be {kinds}, got {type(rule).__name__}: {rule!r}")
    check_positive("damping", rule)
