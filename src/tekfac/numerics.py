"""Squares and sums in a precision that holds them."""

from __future__ import annotations

import torch
from torch import Tensor


def square_norms(rows: Tensor) -> Tensor:
    """``Σ_t ‖x_nt‖²``: traces of ``Σ_t x xᵀ``. ``(G, N, T, d)`` to ``(G, N)``."""
    if rows.dtype == torch.bfloat16:
        return squares(rows).sum(dim=(2, 3), dtype=wide(rows.dtype))
    norms: Tensor = torch.linalg.vector_norm(rows, dim=(2, 3), dtype=wide(rows.dtype))
    return norms.square_()


def squares(values: Tensor) -> Tensor:
    """Squares, in a type that holds them: that of bfloat16 does, and sums even its rounding out."""
    wider = values if values.dtype == torch.bfloat16 else values.to(wide(values.dtype))
    return wider.square()


def undivided(tensor: Tensor) -> Tensor:
    """All of a `DTensor`, for which all ranks that have parts of it ask; others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of such numbers are kept in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
