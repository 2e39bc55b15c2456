"""With which ranks a model is trained, and whether they are at the same."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tekfac.ranks.layout import Layout, mesh_of
from tekfac.ranks.ranks import Group, Ranks
from tekfac.ranks.shards import local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Entries of an output that ranks compare at most, and a difference of angles that is rounding's.
COMPARED, ROUNDING = 2**16, 1e-3

# Integers as long as numbers are, by bytes.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# What sums may be sent as: types with the range of float32.
WIRES = (torch.bfloat16, torch.float32, torch.float64)


def ranks_for(
    model: nn.Module,
    layout: Layout | None,
    given: dist.ProcessGroup | DeviceMesh | None,
    wire: torch.dtype | None,
) -> Ranks:
    """The ranks that train a model.

    Args:
        model: the model; a `DistributedDataParallel` in it, or around it, knows its group.
        layout: how the model's parameters are divided among ranks; None if they are not.
        given: the group, or a mesh of one dimension; None for that of the
            `DistributedDataParallel` or of `fully_shard`, or else for all ranks.
        wire: type in which sums of matrices are sent; None for their own.

    Raises:
        TypeError: if ``given`` is neither.
        ValueError: for a mesh of several dimensions, a group that this process is not in, a model
            with parts in several groups, or divided among other ranks, and a type with less range
            than float32.
    """
    if wire is not None and wire not in WIRES:
        names = ", ".join(map(str, WIRES))
        raise ValueError(f"communication must be one of {names} or None, got {wire!r}")
    if not (dist.is_available() and dist.is_initialized()):
        if given is not None:
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        return Ranks()
    parallel = parallel_parts(model)
    if layout is not None and layout.sharded:
        group = _group_of_mesh(layout, given)
    elif given is None:
        groups = {id(part.process_group): part.process_group for part in parallel}
        if len(groups) > 1:
            raise ValueError(
                "parts of this model are trained by different groups of ranks: process_group says "
                "which ranks see the model's batches"
            )
        group = next(iter(groups.values()), dist.group.WORLD)
    else:
        group = _group_of(given)
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the process_group given")
    if dist.get_world_size(group) == 1:
        return Ranks()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Group(group, device, wire, averaged=bool(parallel) and layout is None)


def _group_of_mesh(layout: Layout, given: Any) -> Any:
    """The group of all ranks of the mesh that a model is divided among.

    Raises:
        ValueError: if others were given.
    """
    mesh, ranks = layout.mesh, sorted(layout.members)
    if given is not None:
        several = getattr(given, "ndim", 1) > 1
        theirs = (
            sorted(given.mesh.flatten().tolist())
            if several
            else dist.get_process_group_ranks(_group_of(given))
        )
        if sorted(theirs) != ranks:
            raise ValueError(
                f"process_group has ranks {sorted(theirs)}, but fully_shard divides the model's "
                f"parameters among {ranks}: leave process_group out"
            )
        if not several:
            return _group_of(given)
    if mesh.ndim == 1:
        return mesh.get_group()
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    # Only members take part, so that a mesh of some of the world's ranks can have one.
    return dist.new_group(ranks, use_local_synchronization=True)


def _group_of(given: object) -> Any:
    if isinstance(given, dist.ProcessGroup) or given is dist.GroupMember.NON_GROUP_MEMBER:
        return given
    if hasattr(given, "get_group") and hasattr(given, "ndim"):
        if given.ndim != 1:
            raise ValueError(
                f"process_group takes a mesh of one dimension, got one of {given.ndim}: give that "
                'part of it whose ranks see different batches, such as mesh["data"]'
            )
        return given.get_group()
    raise TypeError(
        "process_group takes a torch.distributed process group or a DeviceMesh of one dimension, "
        f"got {type(given).__name__}"
    )


def parallel_parts(model: nn.Module) -> list[DistributedDataParallel]:
    """What of a model is trained by several ranks, as far as it can be seen."""
    return [part for part in model.modules() if isinstance(part, DistributedDataParallel)]


def running_parts(parts: Sequence[DistributedDataParallel]) -> list[DistributedDataParallel]:
    """Of what a forward pass is one of several ranks: these parts, and what is around the model."""
    around = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return [*parts, *([] if around is None else [around])]


def digest(facts: Mapping[str, str]) -> int:
    """A number that tells facts from others."""
    return zlib.crc32(repr(sorted(facts.items())).encode())


def check_alike(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Raise on all ranks unless they say the same.

    Args:
        ranks: who must.
        facts: what they must agree on, by what it is.

    Raises:
        ValueError: naming what differs, on which rank and how.
    """
    number = digest(facts)
    highest, lowest = ranks.highest([number, -number])
    if highest == -lowest:
        return
    for name, text in facts.items():
        said = ranks.texts(text)
        other = next((rank for rank, theirs in enumerate(said) if theirs != said[0]), None)
        if other is not None:
            here, there = _difference(said[0], said[other])
            raise ValueError(
                f"ranks differ in {name}, and would not train one model: rank 0 has {here}, rank "
                f"{other} has {there}"
            )
    raise ValueError("ranks differ in what they train")


def check_same(lane: Ranks, output: Tensor) -> None:
    """Raise on all ranks that are to see the same batches unless their models return the same.

    Raises:
        RuntimeError: naming what may make a difference.
    """
    if lane.count == 1:
        return
    size = output.numel()
    values = output.detach().flatten()[:: size // COMPARED + 1].to(torch.float64)
    # Compared by the angle to some vector, which rounding changes little.
    some = torch.arange(1.0, len(values) + 1, dtype=torch.float64, device=values.device).cos()
    angle = float(values @ some / (values.norm() * some.norm()).clamp_min(1e-300))
    steps = round(angle / ROUNDING) if math.isfinite(angle) else sys.maxsize
    longest, shortest, highest, lowest = lane.highest([size, -size, steps, -steps])
    if longest != -shortest or highest + lowest > 1:
        raise RuntimeError(
            f"ranks {[*lane.world]} have parts of the same parameters by tensor parallelism, and "
            "their models returned different outputs. They have to see the same batches (a "
            "sampler's num_replicas and rank are those of the data-parallel mesh), draw the same "
            "dropout masks, and return whole outputs: the last layer's style takes "
            "output_layouts=Replicate(), or use_local_output=False. Expert parallelism (ranks that "
            "see batches of their own) is not supported"
        )


def _difference(one: str, other: str) -> tuple[str, str]:
    """The first lines that differ."""
    ones, others = one.splitlines(), other.splitlines()
    for a, b in zip(ones, others, strict=False):
        if a != b:
            return a, b
    longer = ones[len(others) :] or others[len(ones) :]
    return (longer[0], "nothing there") if len(ones) > len(others) else ("nothing there", longer[0])


def values_of(parameters: Mapping[str, Tensor]) -> str:
    """Parameters by name, with a number that tells their values, in lines. All ranks must ask.

    A sum of their bits, which does not depend on how it is added up; of parameters of which ranks
    have parts, that of all parts together. Other kinds of tensors are left out.
    """
    sums: dict[str, Tensor] = {}
    in_parts: dict[tuple[Any, Any], list[str]] = {}
    for (name, p), own in zip(parameters.items(), local(parameters.values()), strict=True):
        if type(own) in (Tensor, nn.Parameter) and own.element_size() in BITS and not own.is_meta:
            sums[name] = own.detach().view(BITS[own.element_size()]).sum(dtype=torch.int64)
            mesh = mesh_of(p)
            if mesh is not None:
                placements: Any = getattr(p, "placements", ())
                in_parts.setdefault((mesh, placements), []).append(name)
    for (mesh, placements), names in in_parts.items():
        totals = torch.stack([sums[name] for name in names])
        for number, placement in enumerate(placements):
            if hasattr(placement, "dim"):
                dist.all_reduce(totals, group=mesh.get_group(number))
        sums |= zip(names, totals, strict=True)
    return "\n".join(f"{name}: values of sum {int(each)}" for name, each in sums.items())


def facts_of(parameters: Mapping[str, Tensor]) -> str:
    """Parameters by name, in lines."""
    return "\n".join(
        f"{name}: {tuple(p.shape)} {p.dtype}" + ("" if p.requires_grad else " frozen")
        for name, p in parameters.items()
    )
