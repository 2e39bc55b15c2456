"""Linear algebra that must not end a training run."""

from __future__ import annotations

import torch
from torch import Tensor


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
