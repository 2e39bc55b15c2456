"""How a model's parameters are divided among ranks: `fully_shard`, tensor parallelism, or both.

`fully_shard` divides them among ranks that see batches of their own. In tensor parallelism each
rank multiplies by its part, and ranks exchange what they come by: these see the same batches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tekfac.ranks.fully_sharded import meshes_of, sharded_parts
from tekfac.ranks.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Layout:
    """What a model's parameters are divided among.

    Args:
        mesh: that of `fully_shard`, and behind it the dimension of tensor parallelism, if there is;
            of tensor parallelism alone the ranks that have all parts together.
        sharded: whether `fully_shard` has a part in it.
        parallel: whether the last dimension is one of tensor parallelism.
    """

    mesh: DeviceMesh
    sharded: bool
    parallel: bool

    @property
    def members(self) -> list[int]:
        """The mesh's ranks, as torch calls them."""
        found: list[int] = self.mesh.mesh.flatten().tolist()
        return found

    def grid(self, ranks: Ranks) -> Grid:
        """Where these ranks stand.

        Raises:
            ValueError: if they are not all that have parts of the parameters.
        """
        world = ranks.world or [self.members[0]]
        if self.sharded:
            shape = tuple(self.mesh.mesh.shape)
            rows = [self.members]
        else:
            own = str(self.members)
            told = ranks.texts(own) if ranks.count > 1 else [own]
            rows = [[int(rank) for rank in text[1:-1].split(", ")] for text in sorted({*told})]
            shape = (len(rows), len(self.members))
            if sorted(chain(*rows)) != sorted(world):
                raise ValueError(
                    f"tensor parallelism divides the model's parameters among ranks {own}, and the "
                    f"ranks that train the model, {sorted(world)}, are not so many whole rows of "
                    "that kind: process_group takes the group of all ranks that train it together"
                )
        order = {rank: number for number, rank in enumerate(chain(*rows))}
        places = [_place(order[rank], shape) for rank in world]
        return Grid(shape, places, 0 if self.sharded else 1, self.parallel)


@dataclass(frozen=True)
class Grid:
    """Where ranks stand, which tells what each has of a parameter.

    Args:
        shape: the grid's.
        places: of each rank, by its number, the place along each dimension.
        first: along which dimension of the grid the first of a parameter's mesh lies.
        parallel: whether ranks along the last dimension see the same batches.
    """

    shape: tuple[int, ...]
    places: Sequence[tuple[int, ...]]
    first: int
    parallel: bool

    def count(self, p: Any) -> int:
        """How many parts there are of a parameter."""
        return math.prod(self.shape[axis] for axis in self._cuts(p))

    def parts(self, p: Any, whole: Tensor) -> list[Tensor]:
        """Views of what each rank has of a parameter, by number; some may be empty.

        Where two dimensions of the grid cut along the same one of the parameter, the last is first.
        """
        found: dict[tuple[int, ...], Tensor] = {(): whole}
        cuts = self._cuts(p)
        for axis in sorted(cuts, reverse=True):
            found = {
                (number, *place): part
                for place, each in found.items()
                for number, part in enumerate(_chunks(each, self.shape[axis], cuts[axis]))
            }
        return [found[tuple(place[axis] for axis in sorted(cuts))] for place in self.places]

    def same_copy(self, p: Any, one: int, other: int) -> bool:
        """Whether two ranks have, or need, parts of the same copy of a parameter."""
        cuts = self._cuts(p)
        pairs = zip(self.places[one], self.places[other], strict=True)
        return all(a == b or axis in cuts for axis, (a, b) in enumerate(pairs))

    def batch(self, number: int) -> tuple[int, int]:
        """Which of so many batches a rank sees."""
        shape, place = self.shape, self.places[number]
        if self.parallel:
            shape, place = shape[:-1], place[:-1]
        batch = 0
        for size, own in zip(shape, place, strict=True):
            batch = batch * size + own
        return batch, math.prod(shape)

    def lane(self, number: int) -> list[int]:
        """The ranks that see the batches of this one, by number, this one among them."""
        own = self.batch(number)
        return [other for other in range(len(self.places)) if self.batch(other) == own]

    def _cuts(self, p: Any) -> dict[int, int]:
        """Along which dimension of a parameter a dimension of the grid divides it, if it does."""
        dims = (getattr(each, "dim", None) for each in getattr(p, "placements", ()))
        return {self.first + n: dim for n, dim in enumerate(dims) if dim is not None}


def _place(number: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Where the rank of this number stands, rows being counted through."""
    place: list[int] = []
    for size in reversed(shape):
        number, own = divmod(number, size)
        place.insert(0, own)
    return tuple(place)


def _chunks(whole: Tensor, count: int, dim: int) -> list[Tensor]:
    """So many parts of about one size; the last may be empty."""
    found = list(whole.chunk(count, dim))
    return found + [whole.narrow(dim, 0, 0)] * (count - len(found))


def layout_of(model: nn.Module) -> Layout | None:
    """How a model's parameters are divided among ranks; None if they are not.

    Raises:
        NotImplementedError: for a model that is divided in another way, or in part.
    """
    kind = divided_kind()
    if kind is None:
        return None
    for module in model.modules():
        if _puts_parts_in(module):
            raise NotImplementedError(
                "DistributedDataParallel with a device_mesh around tensor parallelism takes the "
                "divided parameters out of the model: after its first pass torch itself finds none "
                "of them to train or to save. Have copies of the model by fully_shard(model, "
                "mesh=...) on the data-parallel dimension, or by torch's replicate(model, mesh=...)"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NotImplementedError(
                "FullyShardedDataParallel has layers multiply by parts of one flat parameter, in "
                "which they can't be told: divide the model by fully_shard, which took its place"
            )
    parts = sharded_parts(model)
    for part in parts:
        part.reshard()  # a root's parameters stay whole after a forward pass
    data = meshes_of(parts)
    meshes: list[Any] = [p.device_mesh for p in data if isinstance(p, kind)]
    if not parts:
        meshes = [p.device_mesh for p in model.parameters() if isinstance(p, kind)]
    if not meshes:
        return None
    widest = max(meshes, key=lambda mesh: mesh.ndim)
    own = next(iter(data.values()), None)
    for name, p in model.named_parameters():
        if isinstance(p, kind):
            why = _unknown(p, data.get(p), own, widest)
            if why:
                raise NotImplementedError(
                    f"parameter {name!r} is a DTensor {why}: of models whose parameters are "
                    "divided among ranks, those of fully_shard on one mesh are supported, whose "
                    "ranks see batches of their own, those of parallelize_module on one mesh of "
                    "one dimension, whose ranks see the same, and the first around the second. Use "
                    "these, or DistributedDataParallel; where memory is short, placement='sharded' "
                    "divides the curvature state"
                )
        elif parts and p.requires_grad:
            raise NotImplementedError(
                f"parameter {name!r} is whole on every rank, while fully_shard divides others: "
                "call fully_shard(model) last, which takes all that its parts have not"
            )
    return Layout(widest, bool(parts), own is None or widest.ndim > own.ndim)


def _puts_parts_in(module: nn.Module) -> bool:
    """Whether a module has divided tensors in the place of parameters while it runs."""
    hooks = module._forward_pre_hooks.values()
    return any(getattr(hook, "__name__", "") == "_reconstruct_dtensor" for hook in hooks)


def _unknown(p: Any, data: DeviceMesh | None, others: DeviceMesh | None, widest: DeviceMesh) -> str:
    """What about a divided parameter is not supported; nothing of most.

    Args:
        p: the parameter.
        data: the mesh that `fully_shard` divides it among, None if it does not.
        others: that of others.
        widest: the mesh with most dimensions that a parameter is on.
    """
    kinds = [type(placement).__name__.removeprefix("_Strided") for placement in p.placements]
    if data is None and others is not None:
        return f"that fully_shard has not made ({p.placements}), beside others that it has"
    behind = 0 if data is None else data.ndim
    around = ["Shard"], ["Replicate"], ["Replicate", "Shard"]
    if data is not None and kinds[:behind] not in around:
        return f"with placements {p.placements}, beside fully_shard divided in another way"
    if len(kinds) > behind + 1 or not {*kinds[behind:]} <= {"Shard", "Replicate"}:
        return f"with placements {p.placements}"
    if data != others or (p.device_mesh != widest and p.device_mesh != data):
        return f"on {p.device_mesh}, where others are on {widest}"
    if p.device.type != p.device_mesh.device_type:
        why = "make the optimizer after to_empty()" if p.is_meta else "CPUOffloadPolicy"
        return f"kept on {p.device.type}, not {p.device_mesh.device_type} ({why})"
    return ""


def on_mesh(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A tensor that all ranks of a mesh have, as a `DTensor`; as it is without a mesh."""
    if mesh is None:
        return tensor
    from torch.distributed.tensor import Replicate  # there is a mesh, so it has been loaded

    made: Tensor = divided_kind().from_local(
        tensor, mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return made


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The mesh that a tensor is divided among, None if it is not."""
    kind = divided_kind()
    return tensor.device_mesh if kind is not None and isinstance(tensor, kind) else None


def divided_kind() -> Any:
    """The class of divided tensors; None where it has not been loaded, so that there are none."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
