"""Small blocks of one shape, preconditioned together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from tekfac.curvature.basis import Basis
from tekfac.curvature.blocks import Block


class Stack:
    """Blocks whose bases have the same shapes, preconditioned in one batch of products.

    Each block's basis becomes a part of the joined one, so that nothing is held twice.

    Args:
        blocks: blocks with the same `stacking`, which have a basis.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self._bases: list[Basis | None] = []

    def precondition(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """What `Block.precondition` of each block makes of its gradient."""
        if any(old is not block.basis for old, block in zip_longest(self._bases, self.blocks)):
            self._join()
        values = torch.cat([block.multipliers() for block in self.blocks])
        natural = self._joined.apply(values, torch.cat(list(matrices)))
        return list(natural.split_with_sizes([len(matrix) for matrix in matrices]))

    def _join(self) -> None:
        own = [vars(block._require_basis()).values() for block in self.blocks]
        joined = [torch.cat(tensors) for tensors in zip(*own, strict=True)]
        self._joined = Basis(*joined)
        groups = [block.groups for block in self.blocks]
        parts = zip(*(tensor.split(groups) for tensor in joined), strict=True)
        for block, part in zip(self.blocks, parts, strict=True):
            block.basis = Basis(*part)
        self._bases = [block.basis for block in self.blocks]
