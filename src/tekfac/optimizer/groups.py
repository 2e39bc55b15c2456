"""Parameter groups: those of layers with a curvature block, and those of the first-order rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from tekfac.checks import check_decay, check_fraction, check_not_negative, check_positive
from tekfac.curvature.blocks import Block
from tekfac.curvature.damping import check_damping
from tekfac.layers import Assignment
from tekfac.optimizer.first_order import Adam


def check_group(group: Mapping[str, Any], trace_damping: bool, method: str) -> None:
    """Raise for a setting out of its range.

    Args:
        group: the settings, all of them.
        trace_damping: whether the method knows the paper's damping (3.5).
        method: its name.

    Raises:
        TypeError: for a damping that is no rule.
        ValueError: for any other setting.
    """
    check_not_negative("lr", group["lr"])
    check_not_negative("weight_decay", group["weight_decay"])
    check_decay("momentum", group["momentum"])
    check_fraction("power", group["power"])
    if group["rms_clip"] is not None:
        check_positive("rms_clip", group["rms_clip"])
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov needs a momentum above 0")
    check_damping(group["damping"], trace_damping=trace_damping, method=method)


def members_of(param_group: object) -> tuple[list[Any], dict[str, Any]]:
    """A group's parameters, and its settings.

    Raises:
        TypeError: if it is no dict with "params".
    """
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise TypeError(f"a parameter group is a dict with 'params', got {param_group!r}")
    settings = dict(param_group)
    members = settings.pop("params")
    return [members] if isinstance(members, Tensor) else list(members), settings


def divided(
    members: list[Any],
    settings: Mapping[str, Any],
    assignment: Assignment,
    blocks: Mapping[str, Block],
    first_order: Adam,
) -> list[dict[str, Any]]:
    """A user's group as one or two: layers' parameters, and all others with the first-order rule.

    Args:
        members: what is to be trained.
        settings: what was given for it.
        assignment: whose parameter is whose.
        blocks: those that there are already, by the layer's name.
        first_order: the rule where ``settings`` says nothing else.

    Raises:
        ValueError: for a parameter of a layer whose block covers only its other parameter.
    """
    layers, others = [], []
    for p in members:
        if not (isinstance(p, nn.Parameter) and p in assignment.owner and p.requires_grad):
            others.append(p)
            continue
        name = assignment.owner[p]
        if name in blocks and not any(p is own for own in blocks[name].layer.parameters):
            raise ValueError(
                f"layer {name!r} already has a block that does not cover this parameter "
                f"of shape {tuple(p.shape)}: make a new optimizer to change which of a "
                "layer's parameters are trained"
            )
        layers.append(p)
    # In a mixed group "lr" is the layers': the two rules' step sizes are not alike.
    shared = ("weight_decay",) if layers else ("lr", "betas", "eps", "weight_decay")
    given = {key: settings[key] for key in shared if key in settings}
    rule = asdict(replace(first_order, **given))
    groups = []
    if layers:
        groups.append({"params": layers, **settings, "first_order": False})
    if others:
        groups.append({"params": others, **settings, **rule, "first_order": True})
    return groups


def curvature_groups(groups: list[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """The group of each parameter that curvature blocks train."""
    return {p: group for group in groups if not group["first_order"] for p in group["params"]}
