"""Sums over a batch from which every approximation is built.

Notation of the paper, with a leading dimension of groups ``G`` (1 but for grouped convolutions,
whose groups are layers of their own): inputs ``a`` of shape ``(G, N, T, d_in)`` and output
gradients ``g`` of shape ``(G, N, T, d_out)`` for ``N`` examples at ``T`` positions. Per example
``n``:

    Ω_n = Σ_t a_nt a_ntᵀ        Γ_n = (1/T) Σ_t g_nt g_ntᵀ        D_n = Σ_t g_nt a_ntᵀ
"""

from __future__ import annotations

from torch import Tensor

# Entries of the per-example gradients held at once (4 MiB in float32).
GRADIENT_ENTRIES = 2**20

# Narrower blocks of columns make slower products.
TRIANGLE_COLUMNS = 96


def square_norms(rows: Tensor) -> Tensor:
    """``Σ_t ‖x_nt‖²``: traces of ``Σ_t x xᵀ``. ``(G, N, T, d)`` to ``(G, N)``."""
    return rows.square().sum(dim=(2, 3))


def second_moment(rows: Tensor, weights: Tensor | float, total: Tensor | None = None) -> Tensor:
    """The upper triangle of ``Σ_n w_n Σ_t x_nt x_ntᵀ``; `symmetric` makes it whole.

    Computed in blocks of columns, none further down than the diagonal: near half the work of the
    whole product for wide layers. What is below the diagonal is arbitrary.

    Args:
        rows: ``(G, N, T, d)``.
        weights: one per example, ``(G, N)``, or one for all.
        total: what to add the sum to, in place.

    Returns:
        Shape ``(G, d, d)``.
    """
    weighted = rows * (weights[:, :, None, None] if isinstance(weights, Tensor) else weights)
    left, right = weighted.flatten(1, 2).mT, rows.flatten(1, 2)
    d = right.shape[2]
    if total is None:
        total = right.new_zeros(right.shape[0], d, d)
    width = max(TRIANGLE_COLUMNS, -(-d // 8))
    for first in range(0, d, width):
        last = min(first + width, d)
        total[:, :last, first:last].baddbmm_(left[:, :last], right[:, :, first:last])
    return total


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrices ``(..., d, d)`` with this upper triangle, in place."""
    upper.triu_()
    return upper.add_(upper.triu(1).mT)


def added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right`` in place, or the product alone; batches of matrices."""
    return left @ right if total is None else total.baddbmm_(left, right)


def squared_gradients(
    a: Tensor, g: Tensor, basis_in: Tensor, basis_out: Tensor, total: Tensor | None = None
) -> Tensor:
    """``Σ_n (U_outᵀ D_n U_in)^∘2``, the entries of E[...^∘2] in (2.7) and (3.2) before the mean.

    The rotation is done before or after the sum over positions, whichever takes fewer operations;
    with one position no per-example matrix is formed at all.

    Args:
        basis_in: ``(G, d_in, d_in)``, eigenvectors in columns.
        basis_out: ``(G, d_out, d_out)``.
        total: what to add the sum to, in place.

    Returns:
        Shape ``(G, d_out, d_in)``.
    """
    positions, d_in, d_out = a.shape[2], a.shape[3], g.shape[3]
    before, after = rotation_costs(positions, d_in, d_out)
    rotate_first = before < after
    if positions == 1 or rotate_first:
        a, g = rotated(a, basis_in), rotated(g, basis_out)
    if positions == 1:
        return added(total, g.square().flatten(1, 2).mT, a.square().flatten(1, 2))
    step = max(1, GRADIENT_ENTRIES // (a.shape[0] * d_in * d_out))
    for few_a, few_g in zip(a.split(step, dim=1), g.split(step, dim=1), strict=True):
        gradients = few_g.mT @ few_a
        if not rotate_first:
            gradients = basis_out.mT[:, None] @ rotated(gradients, basis_in)
        squares = gradients.square_().sum(dim=1)
        total = squares if total is None else total.add_(squares)
    assert total is not None
    return total


def rotation_costs(positions: int, d_in: int, d_out: int) -> tuple[int, int]:
    """Multiplications of rotating one example's ``a`` and ``g``, and of rotating its ``D_n``."""
    return positions * (d_in**2 + d_out**2), d_in * d_out * (d_in + d_out)


def rotated(rows: Tensor, basis: Tensor) -> Tensor:
    """``rows @ basis`` for ``(G, N, T, d)`` and ``(G, d, d)``, as one product per group."""
    return (rows.flatten(1, 2) @ basis).view(rows.shape)


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
    """Exponential moving average (3.6 to 3.8) in place of ``new``; the first is taken whole."""
    return new if old is None else new.lerp_(old, decay)
