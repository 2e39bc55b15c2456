"""Models that `fully_shard` divides among ranks, while a backward pass is in them.

Of each parameter a rank has a part, a `DTensor`: it is what the optimizer is given. While a layer
runs, torch has another tensor in its place, the whole one, which is the leaf of the graph. It is
gathered and let go again by hooks on what modules take and return. These would run in our own
backward passes, too, and gather whatever these come by: but ranks need not make as many of those.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Leaves:
    """What the graph of a divided model has in the place of its parameters.

    Attributes:
        parameters: for each leaf, what the optimizer has for it.
        waiting: those of these parameters whose gradients have not been exchanged yet.
    """

    parameters: Mapping[Tensor, nn.Parameter] = field(default_factory=dict)
    waiting: Set[nn.Parameter] = frozenset()

    def standing_for(self, known: Mapping[nn.Parameter, T]) -> Mapping[Any, T]:
        """What is known of parameters, by what stands in their place."""
        if not self.parameters:
            return known
        return {leaf: known[p] for leaf, p in self.parameters.items() if p in known}


UNDIVIDED = Leaves(MappingProxyType({}))


def sharded_parts(model: nn.Module) -> list[Any]:
    """The modules of a model that `fully_shard` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it there are none
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [part for part in model.modules() if isinstance(part, kind)]


def meshes_of(parts: Sequence[Any]) -> dict[nn.Parameter, Any]:
    """What the optimizer has for the parameters that are divided, and among which mesh each is."""
    return {
        each.sharded_param: each.mesh_info.mesh
        for group in _groups(parts)
        for each in group.fsdp_params
    }


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by name, as the optimizer has them, whatever stands in their place."""
    parameters = leaves_of(sharded_parts(model)).parameters
    return {name: parameters.get(p, p) for name, p in model.named_parameters()}


def leaves_of(parts: Sequence[Any]) -> Leaves:
    """What stands in the place of parameters, as far as they were whole at some time."""
    if not parts:
        return UNDIVIDED
    parameters: dict[Tensor, nn.Parameter] = {}
    waiting = set()
    for group in _groups(parts):
        for each in group.fsdp_params:
            leaf = getattr(each, "_unsharded_param", None)  # not there before the first pass
            if leaf is None:
                continue
            parameters[leaf] = each.sharded_param
            # Accumulated, in a type of its own where gradients are reduced in one.
            if leaf.grad is not None or each.unsharded_accumulated_grad is not None:
                waiting.add(each.sharded_param)
    return Leaves(parameters, waiting)


@contextmanager
def whole(parts: Sequence[Any]) -> Iterator[Leaves]:
    """Have all parameters whole, and keep torch's hooks from doing anything about it.

    All ranks enter alike; what they do inside is a matter of their own. To be used in a backward
    pass, which goes on afterwards as if nothing had been.

    Args:
        parts: as of `sharded_parts`; with none of them nothing is done.
    """
    with ExitStack() as after:
        groups = _groups(parts)
        for group in groups:
            if not group.is_unsharded:
                after.callback(group.reshard)
        for part in parts:
            part.unshard()
        states = _states(parts)
        for each in (*states, *groups):
            after.callback(setattr, each, "_training_state", each._training_state)
        for each, names in (
            *((group, ("pre_backward", "post_backward")) for group in groups),
            *((state, ("_register_root_post_backward_final_callback",)) for state in states),
        ):
            for name in names:
                setattr(each, name, _nothing)
                after.callback(delattr, each, name)
        yield leaves_of(parts)


def _states(parts: Sequence[Any]) -> list[Any]:
    """What torch knows of these modules; several may share it."""
    states = (part._get_fsdp_state() for part in parts)
    return list({id(state): state for state in states}.values())


def _groups(parts: Sequence[Any]) -> list[Any]:
    """What torch gathers together."""
    found: list[Any] = []
    for state in _states(parts):
        # Older versions have one group, or none.
        groups = getattr(state, "_fsdp_param_groups", None)
        found += [state._fsdp_param_group] if groups is None else groups
    return [group for group in found if group is not None]


def _nothing(*_: object) -> None:
    pass
