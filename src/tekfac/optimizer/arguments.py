"""The arguments that all four methods share, and what they may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from tekfac.capture.likelihoods import Likelihood
from tekfac.checks import check_count, check_decay, check_positive
from tekfac.optimizer.first_order import Adam

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Common(TypedDict, total=False):
    """Keyword arguments of `NaturalGradient` that a method passes on."""

    nesterov: bool
    weight_decay: float
    power: float | None
    rms_clip: float | None
    orthogonalize: bool | None
    fisher: str
    likelihood: str | Likelihood | Sequence[str | Likelihood]
    mc_samples: int
    generator: torch.Generator | None
    loss_reduction: str
    mean_over: str
    batch_dim: int | None
    output: Callable[[Any], Any] | None
    kl_clip: float | None
    factor_every: int
    basis_every: int
    interval_warmup: bool
    factor_decay: float
    factor_rows: int | None
    weight_sharing: str
    rank: int | None
    storage: torch.dtype | None
    exclude: Sequence[str | type[nn.Module]]
    first_order: Adam
    params: Iterable[dict[str, Any]] | None
    process_group: ProcessGroup | DeviceMesh | None
    placement: str | float
    communication: torch.dtype | None


def check_arguments(
    *,
    loss_reduction: object,
    mean_over: object,
    batch_dim: object,
    mc_samples: int,
    kl_clip: float | None,
    factor_every: int,
    basis_every: int,
    factor_decay: float,
    factor_rows: int | None,
    weight_sharing: str,
    rank: int | None,
    storage: object,
    first_order: object,
) -> None:
    """Raise for an argument of `NaturalGradient` that is none of what it says.

    Raises:
        TypeError: for a first-order rule that is none.
        ValueError: for any other, with its value.
    """
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}')
    if mean_over not in ("terms", "examples"):
        raise ValueError(f'mean_over must be "terms" or "examples", got {mean_over!r}')
    if batch_dim not in (None, 0, 1) or isinstance(batch_dim, bool):
        raise ValueError(f"batch_dim must be 0, 1 or None, got {batch_dim!r}")
    check_count("factor_every", factor_every)
    check_count("basis_every", basis_every)
    check_count("mc_samples", mc_samples)
    check_decay("factor_decay", factor_decay)
    if factor_rows is not None:
        check_count("factor_rows", factor_rows)
    if weight_sharing not in ("expand", "reduce"):
        raise ValueError(f"weight_sharing must be 'expand' or 'reduce', got {weight_sharing!r}")
    if rank is not None:
        check_count("rank", rank)
    if storage is not None and not (isinstance(storage, torch.dtype) and storage.is_floating_point):
        raise ValueError(f"storage must be a floating-point torch.dtype, got {storage!r}")
    if kl_clip is not None:
        check_positive("kl_clip", kl_clip)
    if not isinstance(first_order, Adam):
        raise TypeError(f"first_order must be a tekfac.Adam, got {first_order!r}")
