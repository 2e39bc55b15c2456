"""Gradients to where blocks are held, and what is made of them to whoever steps along it.

Where every rank has all of each parameter, the first is done before the optimizer sees a gradient.
Where ranks have parts of them (`fully_shard`), those of a gradient are gathered at the ranks that
hold its block, and nowhere else; of the result every rank gets the part that it has of the
parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tekfac.ranks.fully_sharded import sharded_parameters, sharded_parts
from tekfac.ranks.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Homes = Mapping[Tensor, int]


class Undivided:
    """Parameters that every rank has whole.

    Attributes:
        parts: how many parts there are of each parameter.
    """

    parts: int = 1

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
        kind = _kind()
        if kind is not None and isinstance(value, kind) and not _same_layout(value, p):
            raise ValueError(
                "this state is divided among ranks in another way than the model: save it with "
                "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer,"
                " options=StateDictOptions(full_state_dict=True)), which fits any number of ranks"
            )
        return value


class Divided(Undivided):
    """Parameters of which every rank has a part, as `fully_shard` divides them.

    Args:
        mesh: of one dimension, or of two: the ranks of a row have all parts together, and each row
            has the same.
        ranks: these ranks, in whatever order.
    """

    def __init__(self, mesh: DeviceMesh, ranks: Ranks) -> None:
        self.parts = mesh.size(mesh.ndim - 1)
        order = mesh.mesh.flatten().tolist()
        places = {rank: divmod(i, self.parts) for i, rank in enumerate(order)}
        self._places = [places[rank] for rank in ranks.world] or [(0, 0)]
        """The row and the part of each rank, by its number."""

    def gather(
        self, values: Mapping[Tensor, Tensor], homes: Homes, ranks: Ranks, unit: Ranks
    ) -> dict[Tensor, Tensor]:
        result: dict[Tensor, Tensor] = {}
        row = self._places[ranks.number][0]
        for some in _alike(homes):
            own = {p: _local(values[p]).flatten() for p in some}
            sent = [
                _joined(
                    [own[p] for p in some if homes[p] == number % unit.count and own_row == row],
                    like=own[some[0]],
                )
                for number, (own_row, _) in enumerate(self._places)
            ]
            held = [p for p in some if homes[p] == unit.number]
            whole = {p: own[p].new_empty(p.shape) for p in held}
            parts = {p: self._cut(p, each) for p, each in whole.items()}
            rooms = [
                [parts[p][part] for p in held] if own_row == row else []
                for own_row, part in self._places
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
            parts = {p: self._cut(p, found[p]) for p in held}
            like = _local(some[0])
            sent = [
                _joined([parts[p][self._places[first + member][1]].flatten() for p in held], like)
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
        value, kind = super().adopt(p, value), _kind()
        if isinstance(value, kind) or value.shape != p.shape:
            return value
        own = self._cut(p, value)[p.device_mesh.get_local_rank(p.device_mesh.ndim - 1)]
        made: Tensor = kind.from_local(
            own.to(p.device).contiguous(),
            p.device_mesh,
            p.placements,
            run_check=False,
            shape=p.shape,
            stride=p.stride(),
        )
        return made

    def _cut(self, p: Any, whole: Tensor) -> list[Tensor]:
        """Views of the parts that ranks of a row have of it; the last may be empty."""
        dim = p.placements[-1].dim
        found = list(whole.chunk(self.parts, dim))
        return found + [whole.narrow(dim, 0, 0)] * (self.parts - len(found))


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of tensors that ranks have parts of, this rank's; others as they are."""
    kind = _kind()
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


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The mesh of ranks that `fully_shard` divides a model's parameters among; None of none.

    Raises:
        NotImplementedError: for a model that is divided in another way, or in part.
    """
    kind = _kind()
    if kind is None:
        return None
    parts = sharded_parts(model)
    for part in parts:
        part.reshard()  # a root's parameters stay whole after a forward pass
    known = sharded_parameters(parts)
    meshes = [p.device_mesh for p in known if isinstance(p, kind)]
    for name, p in model.named_parameters():
        if isinstance(p, kind):
            why = _unknown(p, p in known, meshes)
            if why:
                raise NotImplementedError(
                    f"parameter {name!r} is a DTensor {why}: of models whose parameters are "
                    "divided among ranks, those of fully_shard on one mesh are supported, whose "
                    "ranks see batches of their own. Use that, or DistributedDataParallel; where "
                    "memory is short, placement='sharded' divides the curvature state"
                )
        elif known and p.requires_grad:
            raise NotImplementedError(
                f"parameter {name!r} is whole on every rank, while fully_shard divides others: "
                "call fully_shard(model) last, which takes all that its parts have not"
            )
    return meshes[0] if meshes else None


def _unknown(p: Any, known: bool, meshes: Sequence[DeviceMesh]) -> str:
    """What about a divided parameter is not supported; nothing of most."""
    kinds = [type(placement).__name__ for placement in p.placements]
    if not known:
        return f"that fully_shard has not made ({p.placements}, tensor parallelism perhaps)"
    if kinds not in (["Shard"], ["Replicate", "Shard"]):
        return f"with placements {p.placements}, beside fully_shard divided in another way"
    if p.device_mesh != meshes[0]:
        return f"on {p.device_mesh}, where others are on {meshes[0]}"
    if p.device.type != p.device_mesh.device_type:
        return f"kept on {p.device.type}, not {p.device_mesh.device_type} (CPUOffloadPolicy)"
    return ""


def _kind() -> Any:
    """The class of divided tensors; None where it has not been loaded, so that there are none."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
