"""What ``state_dict`` holds beyond torch's: blocks' estimates, damping rules, and what must fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tekfac.checks import first_few
from tekfac.curvature.blocks import Block
from tekfac.curvature.damping import packed_damping, unpacked_damping
from tekfac.layers import as_used

PREFIX = "block."

Groups = list[dict[str, Any]]
Blocks = Mapping[str, Block]


def index_of(groups: Groups) -> dict[Tensor, int]:
    """The number under which a state knows each parameter."""
    return {p: i for i, p in enumerate(p for group in groups for p in group["params"])}


def layout_of(groups: Groups, blocks: Blocks) -> dict[str, dict[str, Any]]:
    """The shape of each block, which way round its matrix is, and the numbers of its parameters."""
    index = index_of(groups)
    return {
        name: {
            "shape": list(block.shape),
            "looked_up": block.layer.looked_up,
            "convolved": block.layer.form.convolved,
            "stacked": block.layer.form.stacked,
            "order": block.layer.form.order,
            "transposed": getattr(block.layer, "transposed", False),
            "parameters": [index[p] for p in block.layer.parameters],
        }
        for name, block in blocks.items()
    }


def rename(own: dict[str, Any], names: Mapping[str, str]) -> None:
    """Replace names of layers in the package's own entry of a state."""
    own["blocks"] = {names.get(name, name): each for name, each in own["blocks"].items()}
    if own.get("schedule") is not None:  # not there in older states
        for key in ("refreshed", "work"):
            each = own["schedule"][key]
            own["schedule"][key] = {names.get(name, name): value for name, value in each.items()}


def add_blocks(
    packed: dict[str, Any],
    groups: Groups,
    blocks: Blocks,
    learnt: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Put the blocks' estimates into torch's form of the state, and damping rules in plain form.

    A block's tensors go to the state of the layer's first parameter, under names of their own.

    Args:
        packed: torch's form, which is added to.
        groups: the optimizer's parameter groups.
        blocks: the optimizer's blocks, by name.
        learnt: their estimates, by name.
    """
    index = index_of(groups)
    for block in blocks.values():
        key = index[block.layer.parameters[0]]
        own = {PREFIX + name: value for name, value in learnt[block.name].items()}
        packed["state"][key] = {**packed["state"].get(key, {}), **own}
    for group in packed["param_groups"]:
        group["damping"] = packed_damping(group["damping"])


def take_blocks(
    packed: dict[str, Any], layout: Mapping[str, Mapping[str, Any] | None]
) -> dict[int, dict[str, Tensor]]:
    """Undo `add_blocks`; the blocks' estimates by the number of the layer's first parameter.

    Args:
        packed: torch's form, which they are taken out of.
        layout: as of `layout_of`, and which estimates a block had.

    Raises:
        ValueError: if some were lost on the way.
    """
    learnt: dict[int, dict[str, Tensor]] = {}
    for key, values in packed["state"].items():
        learnt[key] = {
            name.removeprefix(PREFIX): values.pop(name)
            for name in list(values)
            if name.startswith(PREFIX)
        }
    for name, each in layout.items():
        if each is None or "estimates" not in each:  # not there in older states
            continue
        key = each["parameters"][0]
        lost = [part for part in each["estimates"] if part not in learnt.get(key, {})]
        if lost:
            raise ValueError(
                f"this state has lost what layer {name!r} had learnt ({first_few(lost)}): where "
                "torch.distributed.checkpoint loads into the state of another optimizer, take that "
                "from get_optimizer_state_dict(model, optimizer), of one that has not trained yet"
            )
        learnt[key] = {part: learnt[key][part] for part in each["estimates"]}
    for group in packed["param_groups"]:
        group["damping"] = unpacked_damping(group["damping"])
    packed["state"] = {key: values for key, values in packed["state"].items() if values}
    return learnt


def normal_form(state_dict: dict[str, Any], groups: Groups, blocks: Blocks) -> dict[str, Any]:
    """A copy of a state with parameters by number and the package's own entry at its top.

    A state may come with parameters by name, from torch.distributed.checkpoint, or from versions in
    which layers' parameters and all others had groups of their own.

    Raises:
        ValueError: if it is no state of this package.
    """
    packed = copy.deepcopy(state_dict)
    inner = [group.pop("tekfac") for group in packed["param_groups"] if "tekfac" in group]
    own = packed.get("tekfac", inner[0] if inner else None)
    if isinstance(own, str):  # a dict in older states
        own = json.loads(own)
    if own is None:
        raise ValueError(
            "this state dict was not made by a tekfac optimizer: it has no entry 'tekfac', "
            f"only {sorted(state_dict)}"
        )
    packed["tekfac"] = own
    for name, block in blocks.items():
        if block.layer.looked_up:  # no layer in older states
            own["blocks"].setdefault(name, None)
    if any(isinstance(group.get("first_order"), bool) for group in packed["param_groups"]):
        _join_groups(packed, groups, blocks)
    keys = [key for group in packed["param_groups"] for key in group["params"]]
    if any(isinstance(key, str) for key in keys):
        number = {key: i for i, key in enumerate(keys)}
        packed["state"] = {number[key]: values for key, values in packed["state"].items()}
        for group in packed["param_groups"]:
            group["params"] = [number[key] for key in group["params"]]
    return packed


def _join_groups(packed: dict[str, Any], groups: Groups, blocks: Blocks) -> None:
    """Make one group of the two that versions before 0.1 made of a group with both kinds."""
    theirs = list(packed["param_groups"])
    layout = packed["tekfac"]["blocks"]
    # What a number meant: known for layers by the layer's name, and for the rest by their order.
    known = {
        number: p
        for name, each in layout.items()
        if name in blocks
        for number, p in zip(each["parameters"], blocks[name].layer.parameters, strict=False)
    }
    joined, places = [], {}
    index = index_of(groups)
    for group in groups:
        parts = [theirs.pop(0)] if theirs else []
        if theirs and sum(len(p["params"]) for p in [*parts, theirs[0]]) <= len(group["params"]):
            parts.append(theirs.pop(0))
        covered = {known[n] for part in parts for n in part["params"] if n in known}
        rest = iter([p for p in group["params"] if p not in covered])
        for part in parts:
            for number in part["params"]:
                p = known[number] if number in known else next(rest, None)
                if p is not None:
                    places[number] = index[p]
        whole = dict(parts[0]) if parts else {}
        rule = next((part for part in parts if part["first_order"]), None)
        whole["first_order"] = dict(group["first_order"])
        if rule is not None:
            whole["first_order"] |= {k: rule[k] for k in group["first_order"] if k in rule}
        for key in ("betas", "eps"):
            whole.pop(key, None)
        whole["base_lr"] = whole.get("initial_lr", whole.get("lr"))
        whole["params"] = [index[p] for p in group["params"]]
        joined.append({**{k: v for k, v in group.items() if k not in whole}, **whole})
    packed["param_groups"] = joined
    packed["state"] = {places[n]: v for n, v in packed["state"].items() if n in places}
    for each in layout.values():
        each["parameters"] = [places[n] for n in each["parameters"] if n in places]
    # Layers that were not known to those versions have nothing to load.
    for name in blocks:
        layout.setdefault(name, None)


def check_fits(
    packed: dict[str, Any], own: dict[str, Any], method: str, groups: Groups, blocks: Blocks
) -> None:
    """Raise unless a state is one of this method, these parameter groups and these blocks.

    Layers that have not been used yet are made to fit how they were used there.

    Args:
        packed: the state as of `normal_form`.
        own: the package's own entry of it.
        method: the method's name.
        groups: the optimizer's parameter groups.
        blocks: the optimizer's blocks, by name.

    Raises:
        ValueError: naming what differs.
    """
    if own["method"] != method:
        raise ValueError(f"this is a state of {own['method']}, not of {method}")
    saved = {name: each for name, each in own["blocks"].items() if each is not None}
    for name, each in saved.items():
        if name in blocks and blocks[name].empty:
            layer, form = blocks[name].layer, blocks[name].layer.form
            # Older states have no tables that are only looked up, and no kernels without a module.
            form = form._replace(
                looked_up=each.get("looked_up", False),
                convolved=each.get("convolved", form.convolved),
                stacked=each.get("stacked", form.stacked),
                order=each.get("order", 0),
            )
            layer = as_used(layer, form)
            # Which way round a square matrix is was not kept in older states.
            layer.resemble(tuple(each["shape"]), len(each["parameters"]), each.get("transposed"))
            blocks[name].take(layer)
    layout = {
        name: each
        for name, each in layout_of(groups, blocks).items()
        if own["blocks"].get(name, each) is not None
    }
    theirs, ours = (
        {name: tuple(each["shape"]) for name, each in layouts.items()}
        for layouts in (saved, layout)
    )
    if theirs != ours:
        name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
        raise ValueError(
            f"this state is of another architecture: layer {name!r} has a block of shape "
            f"{theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
        )
    sizes = [[len(group["params"]) for group in each] for each in (packed["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"this state has parameter groups of {sizes[0]} parameters, this optimizer of "
            f"{sizes[1]}"
        )
    for name, here in layout.items():
        if saved[name]["parameters"] != here["parameters"]:
            raise ValueError(
                f"this state has its parameters in another order: those of layer {name!r} are "
                f"numbers {saved[name]['parameters']} there, {here['parameters']} "
                "here; make the parameter groups in the same way"
            )
    parameters = {i: p for p, i in index_of(groups).items()}
    for key, values in packed["state"].items():
        for name in ("momentum_buffer", "exp_avg"):
            if name in values and values[name].shape != parameters[key].shape:
                raise ValueError(
                    f"this state is of another architecture: parameter {key} has shape "
                    f"{tuple(values[name].shape)} there, {tuple(parameters[key].shape)} here"
                )
