"""Gradients to where blocks are held, and what is made of them to whoever steps along it.

Where every rank has all of each parameter, the first is done before the optimizer sees a gradient.
Where ranks have parts of them (`layout`), those of a gradient are gathered at the ranks that hold
its block, and nowhere else; of the result every rank gets the part that it has of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tekfac.ranks.layout import Grid, divided_kind
from tekfac.ranks.ranks import Ranks

Homes = Mapping[Tensor, int]


class Undivided:
    """Parameters that every rank has whole."""

    def count(self, p: Tensor) -> int:
        """How many parts there are of a parameter."""
        return 1

    def settle(self, parameters: Iterable[Any]) -> None:
        """Have gradients divided as their parameters are."""

    def gather(
        self, values: Mapping[Tensor, Tensor], homes: Homes, ranks: Ranks, unit: Ranks
    ) -> dict[Tensor, Tensor]:
        """What there is for the parameters whose home this rank is, whole.

        Args:
            values: for each parameter, what this rank has of it.
            homes: for each parameter, which member of a unit holds its block.
            ranks: all.
            unit: those of them that hold all blocks together.
        """
        return {p: values[p] for p, home in homes.items() if home == unit.number}

    def hand_out(
        self, found: Mapping[Tensor, Tensor], homes: Homes, ranks: Ranks, unit: Ranks
    ) -> dict[Tensor, Tensor]:
        """Of what is found for each parameter, by its home, what this rank has of the parameter."""
        known = [
            found[p] if p in found else torch.empty(p.shape, dtype=p.dtype, device="meta")
            for p in homes
        ]
        return dict(zip(homes, unit.spread(known, [*homes.values()]), strict=True))

    def adopt(self, p: Any, value: Tensor) -> Tensor:
        """What is kept here of a tensor that a state has for a parameter, whole or as it is here.

        Raises:
            ValueError: if it is divided in another way than the parameter.
        """
        kind = divided_kind()
        if kind is not None and isinstance(value, kind) and not _same_layout(value, p):
            raise ValueError(
                "this state is divided among ranks in another way than the model: save it with "
                "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer,"
                " options=StateDictOptions(full_state_dict=True)), which fits any number of ranks"
            )
        return value


class Divided(Undivided):
    """Parameters of which some ranks have a part each, and some have the same.

    Args:
        grid: where ranks stand.
        ranks: these ranks.
    """

    def __init__(self, grid: Grid, ranks: Ranks) -> None:
        self._grid, self._own = grid, ranks.number

    def count(self, p: Tensor) -> int:
        return self._grid.count(p)

    def settle(self, parameters: Iterable[Any]) -> None:
        kind = divided_kind()
        for p in parameters:
            if isinstance(p.grad, kind) and p.grad.placements != p.placements:
                # Parts of a sum, such as those of a norm that sees a part of each sequence.
                p.grad = p.grad.redistribute(p.device_mesh, p.placements)

    def gather(
        self, values: Mapping[Tensor, Tensor], homes: Homes, ranks: Ranks, unit: Ranks
    ) -> dict[Tensor, Tensor]:
        result: dict[Tensor, Tensor] = {}
        same_copy = self._grid.same_copy
        for some in _alike(homes):
            own = {p: _local(values[p]).flatten() for p in some}
            sent = [
                _joined(
                    [
                        own[p]
                        for p in some
                        if homes[p] == number % unit.count and same_copy(p, ranks.number, number)
                    ],
                    like=own[some[0]],
                )
                for number in range(ranks.count)
            ]
            held = [p for p in some if homes[p] == unit.number]
            whole = {p: own[p].new_empty(p.shape) for p in held}
            parts = {p: self._grid.parts(p, each) for p, each in whole.items()}
            rooms = [
                [parts[p][number] for p in held if same_copy(p, ranks.number, number)]
                for number in range(ranks.count)
            ]
            sizes = [sum(room.numel() for room in each) for each in rooms]
            for each, got in zip(rooms, ranks.exchange(sent, sizes), strict=True):
                _fill(each, got)
            result |= whole
        return result

    def hand_out(
        self, found: Mapping[Tensor, Tensor], homes: Homes, ranks: Ranks, unit: Ranks
    ) -> dict[Tensor, Tensor]:
        result: dict[Tensor, Tensor] = {}
        first = ranks.number - unit.number
        for some in _alike(homes):
            held = [p for p in some if homes[p] == unit.number]
            parts = {p: self._grid.parts(p, found[p]) for p in held}
            like = _local(some[0])
            sent = [
                _joined([parts[p][first + member].flatten() for p in held], like)
                for member in range(unit.count)
            ]
            own = {p: torch.empty_like(_local(p)) for p in some}
            rooms = [[own[p] for p in some if homes[p] == home] for home in range(unit.count)]
            sizes = [sum(room.numel() for room in each) for each in rooms]
            for each, got in zip(rooms, unit.exchange(sent, sizes), strict=True):
                _fill(each, got)
            result |= own
        return result

    def adopt(self, p: Any, value: Tensor) -> Tensor:
        value, kind = super().adopt(p, value), divided_kind()
        if isinstance(value, kind) or not isinstance(p, kind) or value.shape != p.shape:
            return value
        own = self._grid.parts(p, value)[self._own]
        made: Tensor = kind.from_local(
            own.to(p.device).contiguous(),
            p.device_mesh,
            p.placements,
            run_check=False,
            shape=p.shape,
            stride=p.stride(),
        )
        return made


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of tensors that ranks have parts of, this rank's; others as they are."""
    kind = divided_kind()
    if kind is None:
        return list(tensors)
    return [tensor.to_local() if isinstance(tensor, kind) else tensor for tensor in tensors]


def _local(tensor: Tensor) -> Tensor:
    return local([tensor])[0]


def _same_layout(one: Any, other: Any) -> bool:
    return all(
        getattr(one, name, None) == getattr(other, name, None)
        for name in ("device_mesh", "placements")
    )


def _alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """These tensors by type: what is sent at once is of one."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like.new_empty(0)


def _fill(rooms: list[Tensor], got: Tensor) -> None:
    """Put what was sent at once where it belongs."""
    for room, part in zip(rooms, got.split([room.numel() for room in rooms]), strict=True):
        room.copy_(part.view(room.shape))
