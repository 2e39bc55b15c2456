"""Who wants to know what a layer saw, as capture knows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from tekfac.layers import Layer, Sample
from tekfac.ranks.fully_sharded import Leaves
from tekfac.ranks.layout import mesh_of


class Observer(Protocol):
    """Who wants to know what a layer saw: a curvature block."""

    @property
    def layer(self) -> Layer:
        """The layer."""

    observed: bool
    """Whether samples are taken here, and not by another rank that sees the same batches."""

    @property
    def listening(self) -> bool:
        """Whether the coming step needs samples."""

    @property
    def empty(self) -> bool:
        """Whether nothing is known yet."""

    @property
    def pending(self) -> bool:
        """Whether it has been given samples since the last step."""

    def take(self, layer: Layer) -> None:
        """Go on with the same layer as of another kind, before anything is known."""

    def observe(self, sample: Sample) -> None:
        """Take one backward pass."""

    def discard(self) -> None:
        """Forget what was given since the last step."""


def cleared(layers: Sequence[Sequence[nn.Parameter]], leaves: Leaves) -> list[bool]:
    """Of which layers the gradients that were there are gone, by whoever cleared them.

    Of a divided parameter that is told by whether there is one: where a rank's part of it is zero,
    another's need not be.
    """
    if leaves.parameters or any(mesh_of(p) is not None for each in layers for p in each):
        return [all(p.grad is None and p not in leaves.waiting for p in each) for each in layers]
    left: dict[int, Tensor] = {}
    for number, parameters in enumerate(layers):
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            left[number] = torch.stack([grad.any().to(grads[0].device) for grad in grads]).any()
    if not left:
        return [True] * len(layers)
    # One look at the device for all of them.
    first = next(iter(left.values()))
    kept = torch.stack([each.to(first.device) for each in left.values()]).cpu().tolist()
    there = dict(zip(left, kept, strict=True))
    return [not there.get(number, False) for number in range(len(layers))]
