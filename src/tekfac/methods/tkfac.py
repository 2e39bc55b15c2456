"""TKFAC (Gao et al., 2020; paper, 2.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from tekfac.checks import check_positive
from tekfac.curvature.blocks import Block
from tekfac.curvature.damping import AgreementDamping, Damping
from tekfac.curvature.factors import TraceRestrictedFactors
from tekfac.curvature.rescaling import FactoredBlock
from tekfac.layers import ConvLayer
from tekfac.optimizer.arguments import Common
from tekfac.optimizer.natural_gradient import NaturalGradient

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TKFACBlock(FactoredBlock):
    """Basis from ``Φ`` and ``Ψ``, rescaled by their eigenvalues times ``δ``."""

    make_factors = TraceRestrictedFactors
    trace_damping = True


class TKFAC(NaturalGradient):
    r"""Trace-restricted Kronecker factorization.

    Per layer (shapes in `curvature.statistics`)::

        δ ← E[tr(Ω) tr(Γ)]                                         every factor_every steps
        Φ ← E[tr(Γ) Ω]/δ,  Ψ ← E[tr(Ω) Γ]/δ                        with it (2.10)
        Φ = U_Φ D_Φ U_Φᵀ,  Ψ = U_Ψ D_Ψ U_Ψᵀ                        every basis_every steps (3.1)
        λ = max(tr F, ν) / dim F,  tr F = δ                        (3.5), or a constant
        F̂ + λ I is taken as (√δ Φ + π√λ I) ⊗ (√δ Ψ + √λ/π I),  π² = (tr Φ/d_in) / (tr Ψ/d_out)
        v ← momentum · v + U_Ψ ((U_Ψᵀ ∇h U_Φ) / (damped eigenvalues)^power) U_Φᵀ
        W ← W − lr · v

    In a convolutional network (one with more convolutions than layers of tokens), the blocks of its
    fully-connected layers (not those of tokens) are multiplied by β, to keep pace with the
    convolutions. The paper's text has no formula for it; **our reading** is ``β = max(1, mean over
    convolutions of tr F_l / tr F_fc)`` for each of them, and damping is that of the multiplied
    block.

    Args:
        damping: as in `NaturalGradient`, or a `TraceDamping`, which follows the trace of each
            layer's block (3.5): the paper's choice for convolutional networks with batch
            normalisation.
        fc_scale: "auto" for that β, or a positive number in its place; 1 switches it off.

    All other arguments and errors: see `NaturalGradient`.

    Raises:
        ValueError: if ``fc_scale`` is neither "auto" nor positive.
    """

    make_block: ClassVar[type[Block]] = TKFACBlock
    _settings = (*NaturalGradient._settings, "fc_scale")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-3,
        momentum: float = 0.9,
        *,
        damping: Damping = AgreementDamping(),
        fc_scale: float | str = "auto",
        **common: Unpack[Common],
    ) -> None:
        if isinstance(fc_scale, str):
            if fc_scale != "auto":
                raise ValueError(f'fc_scale must be "auto" or a positive number, got {fc_scale!r}')
        else:
            check_positive("fc_scale", fc_scale)
        self.fc_scale = fc_scale
        super().__init__(model, lr, momentum, damping=damping, **common)

    def _update_fc_scale(self) -> None:
        convolutions: list[Block] = []
        others: list[Block] = []
        for block in self.blocks.values():
            (convolutions if isinstance(block.layer, ConvLayer) else others).append(block)
        traces = [block.fisher_trace() for block in convolutions if not block.empty]
        if not traces:
            return
        mean = torch.stack([trace.to(traces[0]) for trace in traces]).mean()
        # What carries a vision transformer are its tokens' layers, not its one convolution.
        carried = len(convolutions) > sum(block.positions > 1 for block in others)
        for block in others:
            if not isinstance(self.fc_scale, str):
                block.fc_scale = self.fc_scale
            elif not block.empty and carried and block.positions == 1:
                own = block.fisher_trace()
                ratio = mean.to(own) / torch.where(own > 0, own, 1)
                block.fc_scale = torch.where(own > 0, ratio.clamp_min(1), 1)
