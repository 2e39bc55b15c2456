"""Linear algebra that must not end a training run."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Of ten times more each: from rounding errors of float32 to several percent.
SHIFTS = 6


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigendecomposition of symmetric positive semi-definite matrices, retried before it gives up.

    ``torch.linalg.eigh`` fails now and then in float32 on ill-conditioned factors. The matrix is
    symmetrised and scaled to entries of order 1 first; if that fails, the same is tried in float64.

    Args:
        matrix: shape ``(..., d, d)``.

    Returns:
        Eigenvalues ``(..., d)``, ascending and not negative, and eigenvectors ``(..., d, d)`` in
        columns, in the matrix's dtype; ``None`` if every attempt failed or the matrix is not
        finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        return None
    if matrix.shape[-1] == 1:
        return matrix[..., 0].clamp_min(0), torch.ones_like(matrix)
    symmetric = (matrix + matrix.mT) / 2
    size = symmetric.abs().amax(dim=(-2, -1), keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        try:
            values, vectors = torch.linalg.eigh((symmetric / size).to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            values = (values * size.squeeze(-1)).clamp_min(0)
            return values.to(matrix.dtype), vectors.to(matrix.dtype)
    return None


def orthonormal(groups: int, width: int, rank: int, like: Tensor) -> Tensor:
    """``rank`` random orthonormal columns, ``(groups, width, rank)``, always the same."""
    return _columns(width, rank).to(like).expand(groups, -1, -1)


# Many layers of a network are equally wide, and all want theirs in the first step.
@lru_cache(maxsize=8)
def _columns(width: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    columns: Tensor = torch.linalg.qr(normal).Q
    return columns


def leading(product: Tensor, probe: Tensor) -> tuple[Tensor, Tensor] | None:
    """Leading eigenvectors of symmetric positive semi-definite ``M``, known by ``M P`` alone.

    They are those of Nyström's approximation ``(M P) (Pᵀ M P)⁻¹ (M P)ᵀ``, in the form that is
    stable in floating point (Tropp et al., 2017): exact if ``M`` has no more rank than ``P`` has
    columns, and one step of subspace iteration from ``P`` otherwise.

    Args:
        product: ``M P``, ``(G, d, k)``.
        probe: ``P``, ``(G, d, k)``, orthonormal columns.

    Returns:
        Eigenvalues ``(G, k)``, ascending and not negative, and eigenvectors ``(G, d, k)`` in
        columns; None if the computation failed.
    """
    if not bool(torch.isfinite(product).all()):
        return None
    size = product.abs().amax(dim=(-2, -1), keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    scaled = product / size
    # As little as lets the Cholesky factor exist: rounding makes small eigenvalues negative.
    eps = torch.finfo(product.dtype).eps
    shift = (eps * scaled.norm(dim=(-2, -1), keepdim=True)).clamp_min(eps)
    for _ in range(SHIFTS):
        shift = 10 * shift
        shifted = scaled + shift * probe
        core = (probe.mT @ shifted).double()
        factor, failed = torch.linalg.cholesky_ex((core + core.mT) / 2)
        if not bool(failed.any()):
            break
    else:
        return None
    root = torch.linalg.solve_triangular(factor.mT, shifted.double(), upper=True, left=False)
    # The squares of its singular values are the eigenvalues. In float64 the Gram matrix does, which
    # is far faster than a singular value decomposition.
    try:
        squares, rotation = torch.linalg.eigh(root.mT @ root)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    vectors = (root @ rotation) / squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()[:, None]
    values = (squares - shift.double().flatten(1)).clamp_min(0) * size.double().flatten(1)
    if not (bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all())):
        return None
    return values.to(product.dtype), vectors.to(product.dtype)


def completed(vectors: Tensor) -> Tensor:
    """Orthonormal columns ``(G, d, k)`` and as many more as make them a basis, ``(G, d, d)``."""
    d, k = vectors.shape[1:]
    if k == d:
        return vectors
    whole: Tensor = torch.linalg.qr(vectors, mode="complete").Q
    return torch.cat([vectors, whole[:, :, k:]], dim=2)
