"""What ranks tell one another: one process says nothing, a group of processes what there is to say.

Everybody calls the same methods in the same order: what is said, and when, follows from what all
ranks know alike (settings, counts of steps, what earlier calls returned), never from what one of
them has seen. So there is nothing to wait for that does not come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Pooled(Protocol):
    """Somebody with sums over a batch of which every rank has seen a part."""

    def sums(self, late: bool) -> dict[str, Tensor]:
        """This rank's, zeros where it has seen nothing."""

    def take_sums(self, sums: dict[str, Tensor]) -> None:
        """Go on with those of all ranks together."""


class Ranks:
    """One process alone: what it knows, all know.

    Attributes:
        count: how many there are.
        number: which of them this is.
        averaged: whether gradients are known to be the same on all ranks.
        world: by their numbers, what torch calls them; empty for one alone.
    """

    count: int = 1
    number: int = 0
    averaged: bool = True
    world: Sequence[int] = ()

    def unit(self, size: int) -> Ranks:
        """The ``size`` consecutive ranks that this one is among; all must ask."""
        return self

    def share(self, amount: int | None) -> int | None:
        """This rank's part of so many things, one at least; None for all of them."""
        return None if amount is None else -(-amount // self.count)

    def pool(self, blocks: Sequence[Pooled], late: bool) -> None:
        """Add up all ranks' sums of each of these."""

    def spread(self, tensors: Sequence[Tensor], sources: Sequence[int]) -> list[Tensor]:
        """Tensors as each is at its source; elsewhere they tell a shape and a type only."""
        return list(tensors)

    def exchange(self, sent: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """What each rank has for this one.

        Args:
            sent: by rank, what this one has for it: a vector, all of one type.
            sizes: by rank, how many entries come from it.
        """
        return list(sent)

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """The highest that any rank says, number by number."""
        return list(numbers)

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """The mean of what all ranks say, number by number."""
        return list(numbers)

    def everywhere(self, flag: Tensor | None) -> Tensor | None:
        """Whether a flag about gradients is set on all ranks; None counts as set."""
        return flag

    def repeats(self, missed: bool) -> bool:
        """Whether to measure once more what this rank missed to measure.

        Not where others were there: what one of them missed was a part of it.
        """
        return missed

    def texts(self, text: str) -> list[str]:
        """What each rank says, by number."""
        return [text]

    def reseed(self, generator: torch.Generator, seed: int, step: int) -> None:
        """Let a rank draw other numbers than the others do, in each step the same in every run.

        One process has nobody to differ from.
        """


class Group(Ranks):
    """The processes of a process group.

    Args:
        group: torch's.
        device: where what is sent lies.
        wire: type in which sums of matrices are sent; None for their own.
        averaged: as in `Ranks`.
    """

    def __init__(
        self, group: Any, device: torch.device, wire: torch.dtype | None, averaged: bool
    ) -> None:
        self.group, self.device, self.wire, self.averaged = group, device, wire, averaged
        self.count, self.number = dist.get_world_size(group), dist.get_rank(group)
        self.world = dist.get_process_group_ranks(group)

    def unit(self, size: int) -> Ranks:
        if size == 1:
            return Ranks()
        if size == self.count:
            return self
        first = self.number // size * size
        names = self.world[first : first + size]
        # Only members take part, so that a group of some of the world's ranks can have units.
        own = dist.new_group(names, use_local_synchronization=True)
        return Group(own, self.device, self.wire, self.averaged)

    def pool(self, blocks: Sequence[Pooled], late: bool) -> None:
        own = [block.sums(late) for block in blocks]
        parts = [part for sums in own for part in sums.values()]
        totals = iter(self._fused(parts, self._sent_as, self._added))
        for block, sums in zip(blocks, own, strict=True):
            block.take_sums({name: next(totals) for name in sums})

    def spread(self, tensors: Sequence[Tensor], sources: Sequence[int]) -> list[Tensor]:
        result = list(tensors)
        running = []
        for source in sorted(set(sources)):
            numbers = [number for number, other in enumerate(sources) if other == source]
            some = [tensors[number] for number in numbers]

            def told(buffer: Tensor, source: int = source) -> None:
                work = dist.broadcast(buffer, self.world[source], self.group, async_op=True)
                running.append(work)

            here = some if source == self.number else [self._room(each) for each in some]
            found = self._fused(here, lambda each: each.dtype, told)
            if source != self.number:
                for number, each in zip(numbers, found, strict=True):
                    result[number] = each
        for work in running:
            assert work is not None
            work.wait()
        # In memory of its own everywhere: how products are rounded depends on where they find what
        # they multiply, and ranks' results are to be the same to the last bit.
        return [
            (each if like.is_meta else each.to(like.device)).clone(
                memory_format=torch.contiguous_format
            )
            for each, like in zip(result, tensors, strict=True)
        ]

    def exchange(self, sent: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        buffer = sent[0].new_empty(sum(sizes))
        own = [len(each) for each in sent]
        dist.all_to_all_single(buffer, torch.cat([*sent]), [*sizes], own, self.group)
        return list(buffer.split([*sizes]))

    def highest(self, numbers: Sequence[int]) -> list[int]:
        said = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MAX, self.group)
        return [int(number) for number in said.tolist()]

    def mean(self, numbers: Sequence[float]) -> list[float]:
        said = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(said, dist.ReduceOp.SUM, self.group)
        return [number / self.count for number in said.tolist()]

    def everywhere(self, flag: Tensor | None) -> Tensor | None:
        if self.averaged:
            return flag
        own = torch.ones((), dtype=torch.bool) if flag is None else flag
        said = own.to(self.device, torch.int32)
        dist.all_reduce(said, dist.ReduceOp.MIN, self.group)
        return said.bool()

    def repeats(self, missed: bool) -> bool:
        return False

    def texts(self, text: str) -> list[str]:
        own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = max(1, self.highest([len(own)])[0])
        # The last byte of a text is no zero: what it is filled up with can be told from it.
        padded = torch.cat([own, own.new_zeros(length - len(own))])
        said = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(said, padded, self.group)
        return [bytes(each.tolist()).rstrip(b"\0").decode() for each in said]

    def reseed(self, generator: torch.Generator, seed: int, step: int) -> None:
        mixed = hashlib.blake2b(f"{seed} {step} {self.number}".encode(), digest_size=7).digest()
        generator.manual_seed(int.from_bytes(mixed, "big"))

    def __deepcopy__(self, memo: object) -> Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "an optimizer that several ranks share can't be pickled: save its state_dict()"
        )

    def _sent_as(self, part: Tensor) -> torch.dtype:
        return part.dtype if self.wire is None or part.dim() < 2 else self.wire

    def _added(self, buffer: Tensor) -> None:
        dist.all_reduce(buffer, dist.ReduceOp.SUM, self.group)

    def _room(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=self.device)

    def _fused(
        self,
        parts: Sequence[Tensor],
        sent_as: Callable[[Tensor], torch.dtype],
        told: Callable[[Tensor], None],
    ) -> list[Tensor]:
        """The parts, each in the place that it has in what is told: one buffer for each type."""
        by_type: dict[torch.dtype, list[int]] = {}
        for number, part in enumerate(parts):
            by_type.setdefault(sent_as(part), []).append(number)
        result = list(parts)
        for dtype, numbers in by_type.items():
            some = [parts[number] for number in numbers]
            buffer = torch.cat([each.to(self.device, dtype).flatten() for each in some])
            told(buffer)
            places = buffer.split([each.numel() for each in some])
            for number, each, place in zip(numbers, some, places, strict=True):
                result[number] = place.view(each.shape).to(each.device, each.dtype)
        return result
