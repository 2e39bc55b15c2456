"""Steps that change a layer's outputs equally much in every direction.

The momentum ``v = U S Vᵀ`` of a layer's natural gradients has a few singular values far above all
others, of directions that many batches agree in or that one batch is loud in. A step of a given
size goes there nearly alone. Its polar factor ``U Vᵀ`` is the step that gains most of all whose
largest singular value is bounded (Muon: Jordan et al., 2024; Bernstein and Newhouse, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tekfac.curvature.sampling import multiplies_bfloat16

# Muon's: five times ``a s + b s³ + c s⁵`` takes singular values from a hundredth of the largest on
# to between 0.68 and 1.14. That they are not all 1 is of no account; more steps cost more.
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# How much longer a step is made where nothing is said. Its largest singular value is far below that
# of a step of its length with few large ones, so that it bears more; three times gained more under
# a learning rate that falls to zero, and lost some transformers at a constant one
# (benchmarks/README.md).
LONGER = 2.0


def orthogonalized(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The polar factors ``U Vᵀ`` of layers' matrices, times what makes their root mean square 1.

    Args:
        matrices: ``(G, d_out, d_in)`` of each layer, in float32 or wider.

    Returns:
        The same shapes and types, by the same names; zeros of zeros. Those of one shape are made
        together.
    """
    alike: dict[object, list[str]] = {}
    for name, matrix in matrices.items():
        alike.setdefault((matrix.shape[1:], matrix.dtype, matrix.device), []).append(name)
    result: dict[str, Tensor] = {}
    for names in alike.values():
        found = _polar(torch.cat([matrices[name] for name in names]))
        result |= zip(names, found.split([len(matrices[name]) for name in names]), strict=True)
    return result


def length_of(matrix: Tensor, group: Mapping[str, Any]) -> Tensor | float:
    """The root mean square of the step that takes the place of ``matrix``.

    Args:
        matrix: what the layer would step along.
        group: its settings. Where ``orthogonalize`` is True, ``rms_clip``, or 1 without. Where it
            is None, at most that, and at most `LONGER` times the matrix's own.
    """
    longest = group["rms_clip"] or 1.0
    if group["orthogonalize"]:
        return float(longest)
    own: Tensor = torch.linalg.vector_norm(matrix) / math.sqrt(matrix.numel())
    return (LONGER * own).clamp_max(longest)


def _polar(matrices: Tensor) -> Tensor:
    """Of ``(n, d_out, d_in)``, by Newton and Schulz's iteration."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = _normalised(matrices if wide else matrices.mT)
    if x.shape[1] > 1:
        if x.dtype == torch.float32 and multiplies_bfloat16(x.device):
            x = x.bfloat16()
        a, b, c = COEFFICIENTS
        for step in range(STEPS):
            gram = x @ x.mT
            if step == 0:
                # A closer bound on the largest singular value than the root of all squares' sum.
                size = _norms(gram).clamp_min(torch.finfo(gram.dtype).tiny)
                x, gram = x / size.sqrt(), gram / size
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = _normalised(x.to(matrices.dtype))
    x = x * math.sqrt(x.shape[1] * x.shape[2])
    return x if wide else x.mT


def _norms(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    return norms


def _normalised(matrices: Tensor) -> Tensor:
    return matrices / _norms(matrices).clamp_min(torch.finfo(matrices.dtype).tiny)
