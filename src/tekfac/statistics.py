"""Sums over a batch from which every approximation is built.

Notation of the paper, with a leading dimension of groups ``G`` (1 but for grouped convolutions,
whose groups are layers of their own): inputs ``a`` of shape ``(G, N, T, d_in)`` and output
gradients ``g`` of shape ``(G, N, T, d_out)`` for ``N`` examples at ``T`` positions. Per example
``n``:

    Ω_n = Σ_t a_nt a_ntᵀ        Γ_n = (1/T) Σ_t g_nt g_ntᵀ        D_n = Σ_t g_nt a_ntᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor


def square_norms(rows: Tensor) -> Tensor:
    """``Σ_t ‖x_nt‖²``: traces of ``Σ_t x xᵀ``. ``(G, N, T, d)`` to ``(G, N)``."""
    return rows.square().sum(dim=(2, 3))


def second_moment(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """``Σ_n w_n Σ_t x_nt x_ntᵀ``. ``(G, N, T, d)`` and ``(G, N)`` to ``(G, d, d)``.

    Args:
        weights: one per example, not negative; all 1 if None.
    """
    if weights is not None:
        rows = rows * weights.sqrt()[:, :, None, None]
    flat = rows.flatten(1, 2)
    return flat.mT @ flat


def squared_gradients(a: Tensor, g: Tensor, basis_in: Tensor, basis_out: Tensor) -> Tensor:
    """``Σ_n (U_outᵀ D_n U_in)^∘2``, the entries of E[...^∘2] in (2.7) and (3.2) before the mean.

    The rotation is done before or after the sum over positions, whichever takes fewer operations;
    with one position no per-example matrix is formed at all.

    Args:
        basis_in: ``(G, d_in, d_in)``, eigenvectors in columns.
        basis_out: ``(G, d_out, d_out)``.

    Returns:
        Shape ``(G, d_out, d_in)``.
    """
    positions, d_in, d_out = a.shape[2], a.shape[3], g.shape[3]
    if positions == 1:
        rotated_a = (a.flatten(1, 2) @ basis_in).square()
        rotated_g = (g.flatten(1, 2) @ basis_out).square()
        return rotated_g.mT @ rotated_a
    if positions * (d_in**2 + d_out**2) < d_in * d_out * (d_in + d_out):
        gradients = (g @ basis_out[:, None]).mT @ (a @ basis_in[:, None])
    else:
        gradients = basis_out.mT[:, None] @ (g.mT @ a) @ basis_in[:, None]
    return gradients.square().sum(dim=1)


def carried_over(scale: Tensor, rotation_in: Tensor, rotation_out: Tensor) -> Tensor:
    """A rescaling, known in one basis, in another: ``(R_out∘R_out)ᵀ Λ (R_in∘R_in)``.

    It is the diagonal, in the new basis, of the very matrix that the old basis and rescaling stood
    for; it keeps the trace and does not care about the order or sign of eigenvectors.

    Args:
        scale: ``Λ`` in the old basis, ``(G, d_out, d_in)``.
        rotation_in: ``R_in = U_inᵀ U'_in``, ``(G, d_in, d_in)``.
        rotation_out: ``R_out = U_outᵀ U'_out``, ``(G, d_out, d_out)``.
    """
    return rotation_out.square().mT @ scale @ rotation_in.square()


def averaged(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """Exponential moving average (paper, 3.6 to 3.8); the first value is taken whole."""
    return new if old is None else torch.lerp(new, old, decay)
