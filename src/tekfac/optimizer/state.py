"""What ``state_dict`` holds beyond torch's: blocks' estimates, damping rules, and what must fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tekfac.curvature.blocks import Block
from tekfac.curvature.damping import packed_damping, unpacked_damping

PREFIX = "block."

Groups = list[dict[str, Any]]
Blocks = Mapping[str, Block]


def index_of(groups: Groups) -> dict[Tensor, int]:
    """The number under which a state knows each parameter."""
    return {p: i for i, p in enumerate(p for group in groups for p in group["params"])}


def layout_of(groups: Groups, blocks: Blocks) -> dict[str, dict[str, list[int]]]:
    """The shape of each block, and the numbers of the parameters that it covers."""
    index = index_of(groups)
    return {
        name: {
            "shape": list(block.shape),
            "parameters": [index[p] for p in block.layer.parameters],
        }
        for name, block in blocks.items()
    }


def add_blocks(packed: dict[str, Any], groups: Groups, blocks: Blocks) -> None:
    """Put the blocks' estimates into torch's form of the state, and damping rules in plain form.

    A block's tensors go to the state of the layer's first parameter, under names of their own.
    """
    index = index_of(groups)
    for block in blocks.values():
        key = index[block.layer.parameters[0]]
        own = {PREFIX + name: value for name, value in block.state_dict().items()}
        packed["state"][key] = {**packed["state"].get(key, {}), **own}
    for group in packed["param_groups"]:
        group["damping"] = packed_damping(group["damping"])


def take_blocks(packed: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    """Undo `add_blocks`; the blocks' estimates by the number of the layer's first parameter."""
    learnt: dict[int, dict[str, Tensor]] = {}
    for key, values in packed["state"].items():
        learnt[key] = {
            name.removeprefix(PREFIX): values.pop(name)
            for name in list(values)
            if name.startswith(PREFIX)
        }
    for group in packed["param_groups"]:
        group["damping"] = unpacked_damping(group["damping"])
    packed["state"] = {key: values for key, values in packed["state"].items() if values}
    return learnt


def check_fits(state_dict: dict[str, Any], method: str, groups: Groups, blocks: Blocks) -> None:
    """Raise unless a state is one of this method, these parameter groups and these blocks.

    Raises:
        ValueError: naming what differs.
    """
    own = state_dict.get("tekfac")
    if own is None:
        raise ValueError(
            "this state dict was not made by a tekfac optimizer: it has no entry 'tekfac', "
            f"only {sorted(state_dict)}"
        )
    if own["method"] != method:
        raise ValueError(f"this is a state of {own['method']}, not of {method}")
    layout = layout_of(groups, blocks)
    theirs, ours = (
        {name: tuple(each["shape"]) for name, each in layouts.items()}
        for layouts in (own["blocks"], layout)
    )
    if theirs != ours:
        name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
        raise ValueError(
            f"this state is of another architecture: layer {name!r} has a block of shape "
            f"{theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
        )
    sizes = [
        [len(group["params"]) for group in each] for each in (state_dict["param_groups"], groups)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"this state has parameter groups of {sizes[0]} parameters, this optimizer of "
            f"{sizes[1]}"
        )
    for name, here in layout.items():
        if own["blocks"][name] != here:
            raise ValueError(
                f"this state has its parameters in another order: those of layer {name!r} are "
                f"numbers {own['blocks'][name]['parameters']} there, {here['parameters']} "
                "here; make the parameter groups in the same way"
            )
    parameters = {i: p for p, i in index_of(groups).items()}
    for key, values in state_dict["state"].items():
        for name in ("momentum_buffer", "exp_avg"):
            if name in values and values[name].shape != parameters[key].shape:
                raise ValueError(
                    f"this state is of another architecture: parameter {key} has shape "
                    f"{tuple(values[name].shape)} there, {tuple(parameters[key].shape)} here"
                )
