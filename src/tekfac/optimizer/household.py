"""Blocks in the hands of several ranks: which holds what, and what they do for one another.

Alone, one process holds all of them and does everything itself, by the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tekfac.curvature.blocks import STORED, Block
from tekfac.ranks.group import check_alike, digest
from tekfac.ranks.placement import divided, holders, unit_size
from tekfac.ranks.ranks import Ranks
from tekfac.ranks.shards import Divided, Undivided

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Blocks = Mapping[str, Block]


class Household:
    """The ranks that train a model, and where each block's state lies.

    Args:
        ranks: those that train it together.
        placement: as of `NaturalGradient`.
        mesh: that which the parameters are divided among; None if every rank has them whole.

    Attributes:
        ranks: those.
        unit: those of them that hold the state together.
        homes: which member of a unit holds a block, by the block's name.
    """

    def __init__(self, ranks: Ranks, placement: str | float, mesh: DeviceMesh | None) -> None:
        self.ranks, self.placement = ranks, placement
        self.shards = Undivided() if mesh is None else Divided(mesh, ranks)
        self.unit = Ranks()
        self.homes: dict[str, int] = {}
        self._alike = False

    @property
    def divided(self) -> bool:
        """Whether not every rank holds every block."""
        return self.unit.count > 1

    def place(self, blocks: Blocks) -> None:
        """Decide which rank holds which block; those that have a place keep it."""
        sizes = {name: block.state_bytes for name, block in blocks.items()}
        if not self.homes:
            size = unit_size(self.placement, self.ranks.count, sum(sizes.values()))
            self.unit = self.ranks.unit(size)
        unit = self.unit
        loads = [0] * unit.count
        for name, home in self.homes.items():
            loads[home] += sizes[name]
        new = [name for name in blocks if name not in self.homes]
        everybody = [range(unit.count)] * len(new)
        homes = divided([sizes[name] for name in new], everybody, loads)
        self.homes |= zip(new, homes, strict=True)
        for name in new:
            blocks[name].hold(self.homes[name] == unit.number)

    # -- agreement ---------------------------------------------------------------------------------

    def doubt(self) -> None:
        """Something was changed that ranks have to agree on."""
        self._alike = False

    def check_alike(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Raise on all ranks unless they train the same model in the same way."""
        if not self._alike:
            check_alike(self.ranks, facts())
            self._alike = True

    def agree(self, blocks: Blocks, facts: Callable[[], Mapping[str, str]], parallel: bool) -> None:
        """Have all ranks know the same of what was seen, and check that they are at the same.

        Args:
            blocks: all.
            facts: gives what ranks must agree on; one alone is not asked, which would take as long
                as a small step.
            parallel: whether the model was seen within a `DistributedDataParallel` here.
        """
        mark = digest(facts()) if self.ranks.count > 1 else 0
        own = [block.tell() for block in blocks.values()]
        said = [mark, -mark, -int(parallel), *(each for told in own for each in told)]
        highest, lowest, unaveraged, *heard = self.ranks.highest(said)
        if highest != -lowest:
            check_alike(self.ranks, facts())
        self.ranks.averaged |= unaveraged == -1
        for block, told in zip(blocks.values(), own, strict=True):
            block.hear(heard[: len(told)])
            heard = heard[len(told) :]

    # -- work --------------------------------------------------------------------------------------

    def refresh(self, due: Sequence[Block]) -> set[str]:
        """Make new bases, each on one of the ranks that hold its factors.

        Returns:
            The names of blocks for which none could be found.
        """
        ranks = self.ranks
        places = [holders(self.homes[b.name], ranks.count, self.unit.count) for b in due]
        makers = divided([block.refresh_cost for block in due], places, [0] * ranks.count)
        own = [
            block.eigen() if maker == ranks.number else block.eigen_shapes()
            for block, maker in zip(due, makers, strict=True)
        ]
        sources = [maker for maker, each in zip(makers, own, strict=True) for _ in each]
        found = iter(ranks.spread([tensor for each in own for tensor in each], sources))
        return {
            block.name
            for block, each in zip(due, own, strict=True)
            if not block.refresh([next(found) for _ in each])
        }

    def rotate(self, blocks: Blocks, fresh: set[str]) -> None:
        """Take what waited for a basis into the sums, one block after the other.

        Args:
            blocks: all.
            fresh: those whose new basis every rank has.
        """
        for block in blocks.values():
            if block.rescaling:
                if block.name not in fresh:
                    home = self.homes[block.name]
                    block.borrow(self.unit.spread(block.vectors(), [home, home]))
                block.rotate()
                block.release()

    def gather(
        self, values: Mapping[Tensor, Tensor], covered: Mapping[Tensor, str]
    ) -> dict[Tensor, Tensor]:
        """What ranks have for parameters, such as gradients, whole where the block is held.

        Args:
            values: for each, this rank's part.
            covered: the block of each.
        """
        return self.shards.gather(values, self._homes(covered), self.ranks, self.unit)

    def hand_out(
        self, found: Mapping[Tensor, Tensor], covered: Mapping[Tensor, str]
    ) -> dict[Tensor, Tensor]:
        """What was found for each parameter where its block is held, as far as it is needed here.

        Args:
            found: of those whose block is held here.
            covered: the block of each, the others' too.
        """
        return self.shards.hand_out(found, self._homes(covered), self.ranks, self.unit)

    def tell(self, numbers: Mapping[str, Tensor], blocks: Blocks) -> list[Tensor]:
        """A number of each of these blocks, 0-dimensional, as those say that hold them."""
        said = [
            numbers.get(name, torch.empty((), dtype=block.layer.dtype, device="meta"))
            for name, block in blocks.items()
        ]
        return self.unit.spread(said, [self.homes[name] for name in blocks])

    def learnt(self, blocks: Blocks) -> dict[str, dict[str, Tensor]]:
        """All blocks' estimates by name, also those that other ranks hold."""
        own = {name: block.state_dict() for name, block in blocks.items()}
        shared = [(name, key) for name in own for key in own[name] if key in STORED]
        values = [own[name][key] for name, key in shared]
        whole = self.unit.spread(values, [self.homes[name] for name, _ in shared])
        for (name, key), value in zip(shared, whole, strict=True):
            own[name][key] = value
        return own

    def _homes(self, covered: Mapping[Tensor, str]) -> dict[Tensor, int]:
        return {p: self.homes[name] for p, name in covered.items()}
