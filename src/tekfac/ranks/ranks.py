"""What ranks tell one another: one process says nothing, a group of processes what there is to say.

Everybody calls the same methods in the same order: what is said, and when, follows from what all
ranks know alike (settings, counts of steps, what earlier calls returned), never from what one of
them has seen. So there is nothing to wait for that does not come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Entries that are sent without need rather than in a collective of their own.
FEW = 2**14

# Newer versions of torch have another name for it.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


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
        batches: how many of them see a batch of their own; others see the same as one of these.
        batch: which of these batches this rank sees.
    """

    count: int = 1
    number: int = 0
    batches: int = 1
    batch: int = 0
    averaged: bool = True
    world: Sequence[int] = ()

    def part(self, numbers: Sequence[int]) -> Ranks:
        """Some of these ranks, by their numbers, this one among them; all of those must ask."""
        return self

    def share(self, amount: int | None) -> int | None:
        """This rank's part of so many things, one at least; None for all of them."""
        return None if amount is None else -(-amount // self.batches)

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
        """Let ranks draw other numbers for other batches, in each step the same in every run.

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
        self.batches, self.batch = self.count, self.number
        self.world = dist.get_process_group_ranks(group)

    def part(self, numbers: Sequence[int]) -> Ranks:
        if len(numbers) == 1:
            return Ranks()
        if len(numbers) == self.count:
            return self
        names = [self.world[number] for number in numbers]
        # Only members take part, so that a group of some of the world's ranks can have parts.
        own = dist.new_group(names, use_local_synchronization=True)
        return Group(own, self.device, self.wire, self.averaged)

    def pool(self, blocks: Sequence[Pooled], late: bool) -> None:
        own = [block.sums(late) for block in blocks]
        parts = [part for sums in own for part in sums.values()]
        totals = list(parts)
        for dtype, numbers in _by_type(map(self._sent_as, parts)).items():
            flat = [parts[number].to(self.device, dtype).flatten() for number in numbers]
            buffer = torch.cat(flat)
            dist.all_reduce(buffer, dist.ReduceOp.SUM, self.group)
            for number, place in zip(numbers, buffer.split([len(e) for e in flat]), strict=True):
                part = parts[number]
                totals[number] = place.view(part.shape).to(part.device, part.dtype)
        found = iter(totals)
        for block, sums in zip(blocks, own, strict=True):
            block.take_sums({name: next(found) for name in sums})

    def spread(self, tensors: Sequence[Tensor], sources: Sequence[int]) -> list[Tensor]:
        result = list(tensors)
        for dtype, numbers in _by_type(each.dtype for each in tensors).items():
            numbers.sort(key=sources.__getitem__)
            sizes = [0] * self.count
            for number in numbers:
                sizes[sources[number]] += tensors[number].numel()
            own = [
                tensors[n].to(self.device).flatten() for n in numbers if sources[n] == self.number
            ]
            told = torch.cat([*own, torch.empty(0, dtype=dtype, device=self.device)])
            places = self._on_all(told, sizes).split([tensors[n].numel() for n in numbers])
            for number, place in zip(numbers, places, strict=True):
                like = tensors[number]
                here = place if like.is_meta else place.to(like.device)
                # In memory of its own everywhere: how products are rounded depends on where they
                # find what they multiply, and ranks' results are to be the same to the last bit.
                result[number] = here.view(like.shape).clone()
        return result

    def _on_all(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """Vectors of these sizes, one of each rank, one after the other and on all ranks."""
        total, largest = sum(sizes), max(sizes)
        if largest == total:  # nobody else has anything
            giver = sizes.index(total)
            buffer = own if giver == self.number else own.new_empty(total)
            if total:
                dist.broadcast(buffer, self.world[giver], self.group)
            return buffer
        if self.count * largest - total <= max(total // 4, FEW):
            # All are as long as the longest.
            filled = torch.cat([own, own.new_zeros(largest - len(own))])
            parts = self._gathered(filled).split(largest)
            return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        # First into equal shares: to fill up would send the longest as often as there are ranks.
        share = -(-total // self.count)
        ends = list(accumulate(sizes))
        own_ends = range(share, share * self.count + 1, share)
        mine = [_common(ends[self.number], sizes[self.number], end, share) for end in own_ends]
        end = own_ends[self.number]
        theirs = [_common(e, size, end, share) for e, size in zip(ends, sizes, strict=True)]
        part = own.new_zeros(share)
        dist.all_to_all_single(part[: sum(theirs)], own, theirs, mine, self.group)
        return self._gathered(part)[:total]

    def _gathered(self, own: Tensor) -> Tensor:
        """Vectors of one size, one after the other."""
        buffer = own.new_empty(self.count * len(own))
        getattr(dist, GATHER)(buffer, own, self.group)
        return buffer

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
        mixed = hashlib.blake2b(f"{seed} {step} {self.batch}".encode(), digest_size=7).digest()
        generator.manual_seed(int.from_bytes(mixed, "big"))

    def __deepcopy__(self, memo: object) -> Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "an optimizer that several ranks share can't be pickled: save its state_dict()"
        )

    def _sent_as(self, part: Tensor) -> torch.dtype:
        return part.dtype if self.wire is None or part.dim() < 2 else self.wire


def _by_type(types: Iterable[torch.dtype]) -> dict[torch.dtype, list[int]]:
    """The numbers of those of each type: what is sent at once is of one."""
    found: dict[torch.dtype, list[int]] = {}
    for number, dtype in enumerate(types):
        found.setdefault(dtype, []).append(number)
    return found


def _common(end: int, size: int, other_end: int, other_size: int) -> int:
    """How many entries two intervals have in common."""
    return max(0, min(end, other_end) - max(end - size, other_end - other_size))
