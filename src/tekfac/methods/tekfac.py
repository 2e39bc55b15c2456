"""TEKFAC, the method of the paper (section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tekfac.curvature.damping import AgreementDamping, Damping
from tekfac.curvature.factors import TraceRestrictedFactors
from tekfac.curvature.rescaling import CorrectedBlock
from tekfac.methods.ekfac import EKFAC
from tekfac.methods.tkfac import TKFAC
from tekfac.optimizer.arguments import Common

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TEKFACBlock(CorrectedBlock):
    """Basis from ``Φ`` and ``Ψ``, rescaled by second moments in it."""

    make_factors = TraceRestrictedFactors
    trace_damping = True


class TEKFAC(EKFAC, TKFAC):
    r"""Trace-restricted eigenvalue-corrected Kronecker factorization (algorithm 1).

    Per layer (shapes in `curvature.statistics`)::

        δ ← E[tr(Ω) tr(Γ)]                                         every factor_every steps
        Φ ← E[tr(Γ) Ω]/δ,  Ψ ← E[tr(Ω) Γ]/δ                        with it (2.10)
        Φ = U_Φ D_Φ U_Φᵀ,  Ψ = U_Ψ D_Ψ U_Ψᵀ                        every basis_every steps (3.1)
        Λ ← E[(U_Ψᵀ D_n U_Φ)^∘2]                                   every scale_every steps (3.2)
        λ = max(tr F, ν) / dim F,  tr F = sum(Λ)                   (3.5), or a constant (3.4)
        v ← momentum · v + U_Ψ ((U_Ψᵀ ∇h U_Φ) / (Λ + λ)^power) U_Φᵀ    (3.9)
        W ← W − lr · v

    The factors, the damping and β are TKFAC's; the rescaling, carried over when the basis is
    refreshed, is EKFAC's. Arguments and errors: see `TKFAC`, `EKFAC` and `NaturalGradient`.
    """

    make_block = TEKFACBlock
    _settings = (*EKFAC._settings, "fc_scale")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-3,
        momentum: float = 0.9,
        *,
        damping: Damping = AgreementDamping(),
        fc_scale: float | str = "auto",
        scale_every: int = 10,
        scale_decay: float = 0.95,
        scale_examples: int | None = 16,
        **common: Unpack[Common],
    ) -> None:
        # EKFAC's constructor passes what it does not know on to TKFAC's.
        super().__init__(
            model,
            lr,
            momentum,
            scale_every=scale_every,
            scale_decay=scale_decay,
            scale_examples=scale_examples,
            damping=damping,
            fc_scale=fc_scale,  # type: ignore[call-arg]
            **common,
        )
