"""With which ranks a model is trained, and whether they are at the same."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tekfac.ranks.ranks import Group, Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What sums may be sent as: types with the range of float32.
WIRES = (torch.bfloat16, torch.float32, torch.float64)


def ranks_for(
    model: nn.Module, given: dist.ProcessGroup | DeviceMesh | None, wire: torch.dtype | None
) -> Ranks:
    """The ranks that train a model.

    Args:
        model: the model; a `DistributedDataParallel` in it, or around it, knows its group.
        given: the group, or a mesh of one dimension; None for that of the
            `DistributedDataParallel`, or else for all ranks.
        wire: type in which sums of matrices are sent; None for their own.

    Raises:
        TypeError: if ``given`` is neither.
        ValueError: for a mesh of several dimensions, a group that this process is not in, a model
            with parts in several groups, and a type with less range than float32.
        NotImplementedError: for a model whose parameters are themselves divided among ranks.
    """
    if wire is not None and wire not in WIRES:
        names = ", ".join(map(str, WIRES))
        raise ValueError(f"communication must be one of {names} or None, got {wire!r}")
    _check_whole(model)
    if not (dist.is_available() and dist.is_initialized()):
        if given is not None:
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        return Ranks()
    parallel = parallel_parts(model)
    if given is None:
        groups = {id(part.process_group): part.process_group for part in parallel}
        if len(groups) > 1:
            raise ValueError(
                "parts of this model are trained by different groups of ranks: process_group says "
                "which ranks see the model's batches"
            )
        group: Any = next(iter(groups.values()), dist.group.WORLD)
    else:
        group = _group_of(given)
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the process_group given")
    if dist.get_world_size(group) == 1:
        return Ranks()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Group(group, device, wire, averaged=bool(parallel))


def _group_of(given: object) -> object:
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


def _check_whole(model: nn.Module) -> None:
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    if module is None:
        return
    for name, p in model.named_parameters():
        if isinstance(p, module.DTensor):
            raise NotImplementedError(
                f"parameter {name!r} is a DTensor: models whose parameters are divided among ranks "
                "(fully_shard, tensor parallelism) are not supported yet. Use "
                "DistributedDataParallel; where memory is short, placement='sharded' divides the "
                "curvature state"
            )


def parallel_parts(model: nn.Module) -> list[DistributedDataParallel]:
    """What of a model is trained by several ranks, as far as it can be seen."""
    return [part for part in model.modules() if isinstance(part, DistributedDataParallel)]


def is_parallel(parts: Sequence[DistributedDataParallel]) -> bool:
    """Whether a forward pass is one of several ranks, that of these parts or around the model.

    Raises:
        NotImplementedError: if ranks may have different numbers of batches there.
    """
    around = getattr(DistributedDataParallel, "_active_ddp_module", None)
    there = [*parts, *([] if around is None else [around])]
    if any(part._join_config.enable for part in there):
        raise NotImplementedError(
            "ranks that run out of batches before the others do (join) are not supported: those "
            "that go on would wait for their statistics. Give all ranks as many batches, some of "
            "them without terms if need be"
        )
    return bool(there)


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


def _difference(one: str, other: str) -> tuple[str, str]:
    """The first lines that differ."""
    ones, others = one.splitlines(), other.splitlines()
    for a, b in zip(ones, others, strict=False):
        if a != b:
            return a, b
    longer = ones[len(others) :] or others[len(ones) :]
    return (longer[0], "nothing there") if len(ones) > len(others) else ("nothing there", longer[0])


def facts_of(parameters: Mapping[str, Tensor]) -> str:
    """Parameters by name, in lines."""
    return "\n".join(
        f"{name}: {tuple(p.shape)} {p.dtype}" + ("" if p.requires_grad else " frozen")
        for name, p in parameters.items()
    )
