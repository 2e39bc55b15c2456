"""What nodes of the autograd graph have saved, of lookups above all, as it is meant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tekfac.numerics import wide

# As autograd numbers what becomes of a bag.
SUM, MEAN = 0, 1


def axis_of(saved: int) -> int:
    """An axis; autograd keeps one that is counted from the end as an unsigned number."""
    return saved - 2**64 if saved >= 2**63 else saved


def sizes_of(node: Any) -> tuple[int, ...]:
    """The shape of what a view is of."""
    return tuple(node._saved_self_sym_sizes)


def adds_up(node: Any) -> bool:
    """Whether a bag is a sum of its entries that gives the table a gradient of the loss."""
    return node._saved_mode in (SUM, MEAN) and not node._saved_scale_grad_by_freq


def entries(node: Any) -> Tensor:
    """The numbers of the entries that were looked up, -1 for padding, ``(R,)``."""
    indices: Tensor = node._saved_indices.flatten().long()
    return indices.where(indices != axis_of(node._saved_padding_idx), -1)


def bags(node: Any) -> Tensor:
    """The numbers of the entries in each bag, ``(R, L)``, filled up with -1."""
    return _by_bag(node, entries(node), -1)


def bag_weights(node: Any) -> Tensor:
    """What each entry of a bag is multiplied with, ``(R, L)``."""
    weights = node._saved_per_sample_weights
    if weights is not None:
        return _by_bag(node, weights.detach().flatten(), 0)
    inside = (bags(node) >= 0).to(wide(node._input_metadata[0].dtype))
    if node._saved_mode == MEAN:
        inside /= inside.sum(1, keepdim=True).clamp_min(1)
    return inside


def _by_bag(node: Any, values: Tensor, filling: int) -> Tensor:
    """Values of the entries ``(E,)`` that lie bag by bag, as ``(R, L)``."""
    count = node._input_metadata[0].shape[0]
    # There may be one more, where the last ends.
    starts = node._saved_offsets[:count].long()
    numbers = torch.arange(len(values), device=values.device)
    bag = torch.searchsorted(starts, numbers, right=True) - 1
    within = numbers - starts[bag]
    length = int(within.max()) + 1 if len(values) else 1
    return values.new_full((count, length), filling).index_put_((bag, within), values)


def indexed(node: Any) -> Tensor:
    """The numbers of the entries that one tensor of indices, or a mask of entries, took."""
    index: Tensor = node._saved_indices[0].flatten()
    if index.dtype in (torch.bool, torch.uint8):
        return index.nonzero().flatten()
    return index.long() % sizes_of(node)[0]


def indexes_rows(node: Any) -> bool:
    """Whether whole rows are taken, by one tensor of indices."""
    # As they were saved: activation checkpointing would run again to give the tensors.
    return len(node._raw_saved_indices) == 1 and len(node._input_metadata[0].shape) > 1
