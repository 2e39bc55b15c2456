"""Blocks in the hands of several ranks: which holds what, and what they do for one another.

Alone, one process holds all of them and does everything itself, by the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tekfac.curvature.blocks import STORED, Block, is_whole
from tekfac.ranks.group import check_alike, digest
from tekfac.ranks.layout import Layout
from tekfac.ranks.placement import divided, holders, members, unit_size
from tekfac.ranks.ranks import Ranks
from tekfac.ranks.shards import Divided, Undivided

T = TypeVar("T")
Blocks = Mapping[str, Block]

# Of eigenvectors, in bytes, that a rank has at once of blocks that it does not hold.
LENT = 2**25


class Household:
    """The ranks that train a model, and where each block's state lies.

    Args:
        ranks: those that train it together.
        placement: as of `NaturalGradient`.
        layout: how the parameters are divided among ranks; None if every rank has them whole.

    Attributes:
        ranks: those.
        lane: those of them that see this rank's batches.
        unit: those of them that hold the state together.
        homes: which member of a unit holds a block, by the block's name.
    """

    def __init__(self, ranks: Ranks, placement: str | float, layout: Layout | None) -> None:
        self.ranks, self.placement = ranks, placement
        self.shards, self.lane = Undivided(), Ranks()
        if layout is not None:
            grid = layout.grid(ranks)
            self.shards = Divided(grid, ranks)
            ranks.batch, ranks.batches = grid.batch(ranks.number)
            self.lane = ranks.part(grid.lane(ranks.number))
        self.unit = self._copies = Ranks()
        self.homes: dict[str, int] = {}
        self._alike = self._compared = self._met = False
        self._common: Any = None

    @property
    def divided(self) -> bool:
        """Whether not every rank holds every block."""
        return self.unit.count > 1

    def place(self, blocks: Blocks) -> None:
        """Decide which rank holds which block; those that have a place keep it."""
        sizes = {name: block.state_bytes for name, block in blocks.items()}
        if not self.homes:
            size = unit_size(self.placement, self.ranks.count, sum(sizes.values()))
            number, count = self.ranks.number, self.ranks.count
            self.unit = self.ranks.part(members(number, size))
            self._copies = self.ranks.part(holders(number % size, count, size))
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
        # Of ranks that see the same, each takes the statistics of some layers.
        count = self.lane.count
        takers = divided([*sizes.values()], [range(count)] * len(sizes), [0] * count)
        for name, taker in zip(sizes, takers, strict=True):
            blocks[name].observed = taker == self.lane.number
            blocks[name].batches = self.ranks.batches

    # -- agreement ---------------------------------------------------------------------------------

    def doubt(self) -> None:
        """Something was changed that ranks have to agree on."""
        self._alike = False

    def check_alike(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Raise on all ranks unless they train the same model in the same way."""
        if not self._alike:
            check_alike(self.ranks, facts())
            self._alike = True

    def common(self, own: T) -> T:
        """Of settings that decide what ranks tell one another, those that all are known to have.

        What one has changed since they last compared theirs, another may not have: all go on as
        they were until they compare them next, and those of all ranks are in use then.
        """
        if self._compared or not self._alike or self.ranks.count == 1:
            self._common = own
        self._compared = False
        found: T = self._common
        return found

    def agree(
        self,
        blocks: Blocks,
        facts: Callable[[], Mapping[str, str]],
        values: Callable[[], str],
        parallel: bool,
    ) -> None:
        """Have all ranks know the same of what was seen, and check that they are at the same.

        Args:
            blocks: all.
            facts: gives what ranks must agree on; one alone is not asked, which would take as long
                as a small step.
            values: gives that of parameters' values, for the first time that ranks are asked:
                whoever makes them the same does so before the first step.
            parallel: whether the model was seen within a `DistributedDataParallel` here.
        """
        known = {} if self.ranks.count == 1 else {**facts()}
        if known and not self._met:
            known["the values of their parameters"] = values()
        self._met = True
        mark = digest(known)
        own = [block.tell() for block in blocks.values()]
        said = [mark, -mark, -int(parallel), *(each for told in own for each in told)]
        highest, lowest, unaveraged, *heard = self.ranks.highest(said)
        if highest != -lowest:
            check_alike(self.ranks, known)
        self._compared = True
        self.ranks.averaged |= unaveraged == -1
        for block, told in zip(blocks.values(), own, strict=True):
            block.hear(heard[: len(told)])
            heard = heard[len(told) :]

    # -- work --------------------------------------------------------------------------------------

    def refresh(self, due: Sequence[Block]) -> set[str]:
        """Make new bases, each on one of the ranks that hold its factors.

        All ranks are told of them, but whole ones only those that hold the block, unless statistics
        are rotated in this step.

        Returns:
            The names of blocks for which none could be found.
        """
        ranks, unit = self.ranks, self.unit
        places = [holders(self.homes[b.name], ranks.count, unit.count) for b in due]
        makers = divided([block.refresh_cost for block in due], places, [0] * ranks.count)
        found = [
            block.eigen() if maker == ranks.number else block.eigen_shapes()
            for block, maker in zip(due, makers, strict=True)
        ]
        told = _Parcel(), _Parcel()
        for block, maker, each in zip(due, makers, found, strict=True):
            for place, tensor in enumerate(each):
                if unit.count == 1 or block.rotating or not is_whole(tensor):
                    told[0].add(each, place, maker)
                elif block.held:
                    # Laid out as what is told: products are rounded by it, and a state is so.
                    each[place] = tensor.contiguous()
                    told[1].add(each, place, maker // unit.count)
                else:
                    each[place] = tensor.to("meta")
        told[0].send(ranks)
        told[1].send(self._copies)
        return {
            block.name for block, each in zip(due, found, strict=True) if not block.refresh(each)
        }

    def rotate(self, blocks: Blocks, fresh: set[str]) -> None:
        """Take what waited for a basis into the sums, of as many blocks at once as may be lent.

        Args:
            blocks: all.
            fresh: those whose new basis every rank has.
        """
        for some in _portions([block for block in blocks.values() if block.rescaling]):
            lent = [block for block in some if block.name not in fresh]
            vectors = [block.vectors() for block in lent]
            parcel = _Parcel()
            for block, each in zip(lent, vectors, strict=True):
                for place in range(len(each)):
                    parcel.add(each, place, self.homes[block.name])
            parcel.send(self.unit)
            for block, each in zip(lent, vectors, strict=True):
                block.borrow(each)
            for block in some:
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


class _Parcel:
    """What is told at once: tensors in lists, which are replaced there by what their source has."""

    def __init__(self) -> None:
        self._places: list[tuple[list[Tensor], int]] = []
        self._sources: list[int] = []

    def add(self, tensors: list[Tensor], place: int, source: int) -> None:
        """Take a tensor along, as it is at this member of those who will be told."""
        self._places.append((tensors, place))
        self._sources.append(source)

    def send(self, ranks: Ranks) -> None:
        """Tell."""
        told = ranks.spread([tensors[place] for tensors, place in self._places], self._sources)
        for (tensors, place), found in zip(self._places, told, strict=True):
            tensors[place] = found


def _portions(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """These blocks, as many at once as have `LENT` bytes of eigenvectors together, or one."""
    some: list[Block] = []
    size = 0
    for block in blocks:
        own = sum(each.numel() * each.element_size() for each in block.vectors())
        if some and size + own > LENT:
            yield some
            some, size = [], 0
        some.append(block)
        size += own
    if some:
        yield some
