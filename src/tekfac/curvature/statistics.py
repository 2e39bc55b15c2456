"""Sums over a batch from which every approximation is built.

Notation of the paper, with a leading dimension of groups ``G`` (1 but for grouped convolutions,
whose groups are layers of their own): inputs ``a`` of shape ``(G, N, T, d_in)`` and output
gradients ``g`` of shape ``(G, N, T, d_out)`` for ``N`` examples at ``T`` positions. Per example
``n``:

    Ω_n = Σ_t a_nt a_ntᵀ        Γ_n = (1/T) Σ_t g_nt g_ntᵀ        D_n = Σ_t g_nt a_ntᵀ

Inputs and gradients in bfloat16 are multiplied as they are, on the fast units made for it; what a
product comes to is added up in float32, like everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tekfac.numerics import wide

# Entries of the per-example gradients held at once (4 MiB in float32).
GRADIENT_ENTRIES = 2**20

# Narrower blocks of columns make slower products.
TRIANGLE_COLUMNS = 96


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
    weighted = rows * _for_rows(weights, rows)
    left, right = weighted.flatten(1, 2).mT, rows.flatten(1, 2)
    d = right.shape[2]
    if total is None:
        total = right.new_zeros(right.shape[0], d, d, dtype=wide(right.dtype))
    # Units for bfloat16 are faster with the whole product than with narrow parts of it.
    width = d if right.dtype == torch.bfloat16 else max(TRIANGLE_COLUMNS, -(-d // 8))
    for first in range(0, d, width):
        last = min(first + width, d)
        added(total[:, :last, first:last], left[:, :last], right[:, :, first:last])
    return total


def _for_rows(weights: Tensor | float, rows: Tensor) -> Tensor | float:
    return weights[:, :, None, None].to(rows.dtype) if isinstance(weights, Tensor) else weights


def sketched(
    rows: Tensor, weights: Tensor | float, probe: Tensor, total: Tensor | None = None
) -> Tensor:
    """``(Σ_n w_n Σ_t x_nt x_ntᵀ) P``, without the matrix in between.

    Args:
        rows: ``(G, N, T, d)``.
        weights: one per example, ``(G, N)``, or one for all.
        probe: ``P``, ``(G, d, k)``.
        total: what to add the sum to, in place.

    Returns:
        Shape ``(G, d, k)``.
    """
    seen = rotated(rows, probe)
    seen.mul_(_for_rows(weights, rows))
    return added(total, rows.flatten(1, 2).mT, seen.flatten(1, 2))


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrices ``(..., d, d)`` with this upper triangle, in place."""
    upper.triu_()
    return upper.add_(upper.triu(1).mT)


def folded(upper: Tensor) -> Tensor:
    """An upper triangle ``(G, d, d)`` without what is below it, ``(G, ⌈d/2⌉, d + 1)``.

    Row ``i`` is as long as row ``d - 1 - i`` leaves room for: that lies before it, backwards.
    """
    groups, d, half = upper.shape[0], upper.shape[1], -(-upper.shape[1] // 2)
    packed = upper.new_zeros(groups, half, d + 1)
    packed[:, :, 1:] = upper[:, :half].triu()
    packed[:, :, :d] += upper[:, d - half :].flip(1, 2).tril()
    return packed


def unfolded(packed: Tensor) -> Tensor:
    """The inverse of `folded`, with zeros below the diagonal."""
    groups, half, d = packed.shape[0], packed.shape[1], packed.shape[2] - 1
    upper = packed.new_zeros(groups, d, d)
    upper[:, :half] = packed[:, :, 1:].triu()
    upper[:, d - half :] = packed[:, :, :d].tril().flip(1, 2)
    return upper


def added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right`` in place, or the product alone; batches of matrices."""
    if total is None:
        return (left @ right).to(wide(left.dtype))
    return total.baddbmm_(left, right) if left.dtype == total.dtype else total.add_(left @ right)


def rotates_rows(positions: int, basis_in: Tensor, basis_out: Tensor) -> bool:
    """Whether `squared_rows` is to be used, and not `squared_gradients`.

    That is where it takes fewer multiplications, and for bases of leading eigenvectors.
    """
    (d_in, k_in), (d_out, k_out) = basis_in.shape[1:], basis_out.shape[1:]
    before, after = rotation_costs(positions, d_in, d_out)
    return positions == 1 or k_in < d_in or k_out < d_out or before < after


def squared_rows(
    a: Tensor, g: Tensor, basis_in: Tensor, basis_out: Tensor, total: Tensor | None = None
) -> Tensor:
    """``Σ_n (U_outᵀ D_n U_in)^∘2``, the entries of E[...^∘2] in (2.7) and (3.2) before the mean.

    Rows are rotated before they are summed up over positions; with one position no per-example
    matrix is formed at all.

    A side of which a basis has only the leading eigenvectors gets one more row (or column) for all
    others together: the sum of all entries is ``Σ_n ‖D_n‖²`` in any case.

    Args:
        basis_in: ``(G, d_in, k_in)``, eigenvectors in columns.
        basis_out: ``(G, d_out, k_out)``.
        total: what to add the sum to, in place.

    Returns:
        Shape ``(G, d_out, d_in)``, or ``k + 1`` in place of ``d`` where ``k < d``.
    """
    d_in, d_out = a.shape[3], g.shape[3]
    if a.shape[2] == 1:
        return added(
            total,
            _with_rest(rotated(g, basis_out).square_(), g).flatten(1, 2).mT,
            _with_rest(rotated(a, basis_in).square_(), a).flatten(1, 2),
        )
    truncated = basis_in.shape[2] < d_in or basis_out.shape[2] < d_out
    held = d_in * d_out
    if truncated and _by_positions(a.shape[2], d_out, d_in):
        held = max(d_in, d_out) * max(a.shape[2], basis_in.shape[2], basis_out.shape[2])
    step = max(1, GRADIENT_ENTRIES // (a.shape[0] * held))
    for few_a, few_g in zip(a.split(step, dim=1), g.split(step, dim=1), strict=True):
        if truncated:
            squares = _truncated_squares(few_a, few_g, basis_in, basis_out)
        else:
            gradients = rotated(few_g, basis_out).mT @ rotated(few_a, basis_in)
            squares = _sum_of_squares(gradients, 1)
        total = squares if total is None else total.add_(squares)
    assert total is not None
    return total


def counted(entries: Tensor, weights: Tensor | float, total: Tensor) -> Tensor:
    """The diagonal of ``Σ_n w_n Σ_t x_nt x_ntᵀ`` for one-hot rows ``x``, added to ``total``.

    Args:
        entries: where each row has its 1, ``(1, N, T)``, -1 for a row of zeros.
        weights: one per example, ``(1, N)``, or one for all.
        total: what to add to, in place, ``(1, d)``.
    """
    each = (entries >= 0).to(total.dtype)
    each *= weights[:, :, None] if isinstance(weights, Tensor) else weights
    return total.index_add_(1, entries.flatten().clamp_min(0), each.view(1, -1))


def squared_lookups(entries: Tensor, g: Tensor, basis_out: Tensor, total: Tensor) -> Tensor:
    """`squared_rows` of one-hot rows, in a basis whose input side is the entries themselves.

    A column of ``D_n`` is the sum of the example's rows that looked the same entry up, and most
    columns are zero: neither they nor one-hot rows are made.

    Args:
        entries: where each row has its 1, ``(1, N, T)``, -1 for a row of zeros.
        g: ``(1, N, T, d_out)``.
        basis_out: ``(1, d_out, k_out)``.
        total: what to add the sum to, in place, ``(1, d_in, d_out)``, or ``k_out + 1`` in place of
            ``d_out``: turned, so that what belongs to an entry lies together.
    """
    looked_up, rows = entries[0], g[0].flatten(0, 1)
    first = total.shape[1] * torch.arange(len(looked_up), device=g.device)[:, None]
    # Rows of one example and entry side by side; each such run has a number, those of zeros one.
    keys, order = torch.where(looked_up < 0, -1, first + looked_up).flatten().sort()
    runs = torch.cat([keys.new_zeros(1), keys.diff().ne(0).cumsum(0)])
    # Room for as many as there are rows: the host need not wait to learn how many runs there are.
    columns = torch.zeros_like(rows).index_add_(0, runs, rows[order])
    entry = torch.zeros_like(runs).scatter_(0, runs, looked_up.flatten()[order])
    columns = torch.where(entry[:, None] < 0, 0, columns)[None, :, None]
    squares = _with_rest(rotated(columns, basis_out).square_(), columns)[0, :, 0]
    total[0].index_add_(0, entry.clamp_min(0), squares.to(total.dtype))
    return total


def squared_gradients(
    gradients: Tensor, basis_in: Tensor, basis_out: Tensor, total: Tensor | None = None
) -> Tensor:
    """The same from the per-example gradients themselves, in whole bases.

    Args:
        gradients: ``D_n``, ``(G, d_out, n, d_in)``.
        basis_in: ``(G, d_in, d_in)``.
        basis_out: ``(G, d_out, d_out)``.
        total: what to add the sum to, in place.
    """
    rows = (basis_out.mT @ gradients.flatten(2)).view(gradients.shape)
    squares = _sum_of_squares(rotated(rows, basis_in), 2)
    return squares if total is None else total.add_(squares)


def _with_rest(squares: Tensor, rows: Tensor) -> Tensor:
    """Squares of rotated rows, and what they lack of ``‖x‖²`` if the basis is not whole."""
    if squares.shape[-1] == rows.shape[-1]:
        return squares
    dtype = wide(rows.dtype)
    whole = rows.square().sum(-1, keepdim=True, dtype=dtype)
    rest = (whole - squares.sum(-1, keepdim=True, dtype=dtype)).clamp_min_(0)
    return torch.cat([squares, rest.to(squares.dtype)], dim=-1)


def _sum_of_squares(values: Tensor, *dims: int) -> Tensor:
    return values.square_().sum(dim=dims, dtype=wide(values.dtype))


def _truncated_squares(a: Tensor, g: Tensor, basis_in: Tensor, basis_out: Tensor) -> Tensor:
    """`squared_rows` of a few examples, in bases of leading eigenvectors."""
    inputs, outputs = rotated(a, basis_in), rotated(g, basis_out)
    squares = _sum_of_squares(outputs.mT @ inputs, 1)
    if basis_in.shape[2] < a.shape[3]:
        whole = _row_norms(outputs, a)
        squares = torch.cat([squares, (whole - squares.sum(-1))[..., None]], dim=2)
    if basis_out.shape[2] < g.shape[3]:
        whole = _row_norms(inputs, g)
        if basis_in.shape[2] < a.shape[3]:
            everything = _row_norms(g, a).sum(1)
            whole = torch.cat([whole, (everything - whole.sum(-1))[:, None]], dim=1)
        squares = torch.cat([squares, (whole - squares.sum(-2))[:, None]], dim=1)
    return squares.clamp_min_(0)


def _row_norms(left: Tensor, right: Tensor) -> Tensor:
    """``Σ_n ‖e_iᵀ L_nᵀ R_n‖²`` for ``(G, n, T, k)`` and ``(G, n, T, d)``, ``(G, k)``.

    Of few positions the products among them, ``R_n R_nᵀ``, are less than the ``(k, d)`` matrix.
    """
    if not _by_positions(left.shape[2], left.shape[3], right.shape[3]):
        return _sum_of_squares(left.mT @ right, 1, 3)
    left, right = left.to(wide(left.dtype)), right.to(wide(right.dtype))
    return ((right @ right.mT @ left) * left).sum(dim=(1, 2))


def _by_positions(positions: int, k: int, d: int) -> bool:
    return positions * (k + d) < k * d


def rotation_costs(positions: int, d_in: int, d_out: int) -> tuple[int, int]:
    """Multiplications of rotating one example's ``a`` and ``g``, and of rotating its ``D_n``."""
    return positions * (d_in**2 + d_out**2), d_in * d_out * (d_in + d_out)


def rotated(rows: Tensor, basis: Tensor) -> Tensor:
    """``rows @ basis`` for ``(G, N, T, d)`` and ``(G, d, d)``, as one product per group."""
    return (rows.flatten(1, 2) @ basis).view(*rows.shape[:3], -1)


def carried_over(scale: Tensor, overlap_in: Tensor, overlap_out: Tensor) -> Tensor:
    """A rescaling, known in one basis, in another: ``(R_out∘R_out)ᵀ Λ (R_in∘R_in)``.

    It is the diagonal, in the new basis, of the very matrix that the old basis and rescaling stood
    for; it keeps the trace and does not care about the order or sign of eigenvectors.

    Args:
        scale: ``Λ`` in the old basis, ``(G, d_out, d_in)``.
        overlap_in: ``R_in∘R_in`` by `overlap`, ``(G, d_in, d_in)``.
        overlap_out: ``R_out∘R_out``, ``(G, d_out, d_out)``.
    """
    return overlap_out.mT @ scale @ overlap_in


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """``R∘R`` for ``R = Uᵀ U'``: how much of each new eigenvector each old one is.

    Where a basis has only the leading eigenvectors, all others count as one more. That is of
    several directions: as a new one it holds their mean.

    Args:
        old: ``U``, ``(G, d, k)``.
        new: ``U'``, ``(G, d, k')``.

    Returns:
        Shape ``(G, k, k')``, or one more where ``k < d``.
    """
    d, kept, kept_new = old.shape[1], old.shape[2], new.shape[2]
    squares = (old.mT @ new).square_()
    if kept < d:
        squares = torch.cat([squares, (1 - squares.sum(1, keepdim=True)).clamp_min_(0)], dim=1)
    if kept_new < d:
        there = squares.new_ones(squares.shape[1], 1)
        if kept < d:
            there[-1] = d - kept
        rest = (there - squares.sum(2, keepdim=True)).clamp_min_(0) / (d - kept_new)
        squares = torch.cat([squares, rest], dim=2)
    return squares


def averaged(old: Tensor | None, new: Tensor, decay: Tensor | float) -> Tensor:
    """Exponential moving average (3.6 to 3.8) in place of ``new``; the first is taken whole."""
    return new if old is None else new.lerp_(old, decay)
