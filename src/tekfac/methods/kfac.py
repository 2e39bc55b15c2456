"""KFAC (Martens and Grosse, 2015; paper, 2.2)."""

from __future__ import annotations

from tekfac.curvature.factors import KroneckerFactors
from tekfac.curvature.rescaling import FactoredBlock
from tekfac.optimizer.natural_gradient import NaturalGradient


class KFACBlock(FactoredBlock):
    """Basis from ``A`` and ``G``, rescaled by their eigenvalues."""

    make_factors = KroneckerFactors
    trace_damping = False


class KFAC(NaturalGradient):
    r"""Kronecker-factored approximate curvature.

    Per layer, with inputs ``a`` and output gradients ``g`` (shapes in `curvature.statistics`)::

        A ← E[Ω],  G ← E[Γ]                                        every factor_every steps (2.4)
        A = U_A D_A U_Aᵀ,  G = U_G D_G U_Gᵀ                        every basis_every steps (2.6)
        F̂ + λ I is taken as (A + π√λ I) ⊗ (G + √λ/π I),  π² = (tr A/d_in) / (tr G/d_out)
        v ← momentum · v + U_G ((U_Gᵀ ∇h U_A) / (damped eigenvalues)^power) U_Aᵀ
        W ← W − lr · v

    Arguments and errors: see `NaturalGradient`.
    """

    make_block = KFACBlock
