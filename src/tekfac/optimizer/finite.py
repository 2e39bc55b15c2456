"""Whether gradients are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from tekfac.ranks.fully_sharded import plain_parameters
from tekfac.ranks.ranks import Ranks
from tekfac.ranks.shards import local


def all_finite(gradients: Sequence[Tensor], waits: bool, method: str) -> Tensor | None:
    """Whether all gradients are, 0-dimensional; None if there is none.

    Args:
        gradients: of this rank.
        waits: whether reading from the device makes the host wait.
        method: the optimizer's name.

    Raises:
        RuntimeError: for a sparse gradient.
    """
    # Of a small parameter that is divided a rank may have nothing.
    grads = [grad for grad in local(gradients) if grad.numel()]
    if not grads:
        return None
    if any(grad.is_sparse for grad in grads):
        raise RuntimeError(
            f"{method} does not support sparse gradients: give embeddings sparse=False"
        )
    finite = _norms_finite(grads, math.inf if waits else 2.0)
    # Of numbers near the end of their range the square is not finite, and the largest is: of
    # gradients on a processor that takes 20 times as long to find.
    return finite if waits or bool(finite) else _norms_finite(grads, math.inf)


def name_not_finite(model: nn.Module, ranks: Ranks) -> str:
    """Name of a parameter whose gradient is not finite, on whichever rank."""
    own = ""
    for name, p in plain_parameters(model).items():
        if p.grad is not None and not bool(torch.isfinite(local([p.grad])[0]).all()):
            own = repr(name)
            break
    # Of a parameter that is divided another rank's part may be it.
    said = ranks.texts(own)
    return next(filter(None, said), "a parameter outside the model")


def _norms_finite(tensors: list[Tensor], order: float) -> Tensor:
    """Whether the norms of this order of all tensors are, 0-dimensional."""
    tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    dtype = reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    norms = torch._foreach_norm(tensors, order, dtype=dtype)
    return torch.stack([n.to(tensors[0].device) for n in norms]).isfinite().all()
