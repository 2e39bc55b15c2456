"""EKFAC (George et al., 2018; paper, 2.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from tekfac.checks import check_count, check_decay
from tekfac.curvature.blocks import Block
from tekfac.curvature.damping import AgreementDamping, Damping
from tekfac.curvature.factors import KroneckerFactors
from tekfac.curvature.rescaling import CorrectedBlock
from tekfac.optimizer.arguments import Common
from tekfac.optimizer.natural_gradient import NaturalGradient
from tekfac.optimizer.timetable import Intervals, Statistic

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EKFACBlock(CorrectedBlock):
    """Basis from ``A`` and ``G``, rescaled by second moments in it."""

    make_factors = KroneckerFactors
    trace_damping = False


class EKFAC(NaturalGradient):
    r"""Eigenvalue-corrected Kronecker factorization.

    Per layer (shapes in `curvature.statistics`)::

        A ← E[Ω],  G ← E[Γ]                                        every factor_every steps (2.4)
        A = U_A D_A U_Aᵀ,  G = U_G D_G U_Gᵀ                        every basis_every steps (2.6)
        S ← E[(U_Gᵀ D_n U_A)^∘2]                                   every scale_every steps (2.7)
        v ← momentum · v + U_G ((U_Gᵀ ∇h U_A) / (S + λ)^power) U_Aᵀ
        W ← W − lr · v

    A refresh of the basis carries ``S`` over to the new one.

    Args:
        scale_every: steps between measurements of the rescaling.
        scale_decay: ε1 of (3.8), in [0, 1): the weight of the past.
        scale_examples: where it takes much work, examples of each batch, the first ones, that the
            rescaling is measured on, in bfloat16 if that is faster (`curvature.sampling`). Half as
            many if ``scale_every`` is below 10. None for all, as they are.

    All other arguments and errors: see `NaturalGradient`.

    Raises:
        ValueError: for an argument out of its range.
    """

    make_block: ClassVar[type[Block]] = EKFACBlock
    _settings = (*NaturalGradient._settings, "scale_every", "scale_decay", "scale_examples")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-3,
        momentum: float = 0.9,
        *,
        damping: Damping = AgreementDamping(),
        scale_every: int = 10,
        scale_decay: float = 0.95,
        scale_examples: int | None = 16,
        **common: Unpack[Common],
    ) -> None:
        check_count("scale_every", scale_every)
        check_decay("scale_decay", scale_decay)
        if scale_examples is not None:
            check_count("scale_examples", scale_examples)
        self.scale_every, self.scale_decay = scale_every, scale_decay
        self.scale_examples = scale_examples
        super().__init__(model, lr, momentum, damping=damping, **common)

    def _intervals(self) -> Intervals:
        scale = Statistic(self.scale_every, self.scale_decay, self.scale_examples)
        return replace(super()._intervals(), scale=scale)
