"""Parameter groups: as the user made them, with settings of layers and of all other parameters."""

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
        TypeError: for a damping that is no rule, or ``orthogonalize`` none of True, False and None.
        ValueError: for any other setting.
    """
    check_not_negative("lr", group["lr"])
    check_not_negative("weight_decay", group["weight_decay"])
    check_decay("momentum", group["momentum"])
    if group["power"] is not None:
        check_fraction("power", group["power"])
    if group["rms_clip"] is not None:
        check_positive("rms_clip", group["rms_clip"])
    if not isinstance(group["orthogonalize"], bool | None):
        raise TypeError(
            f"orthogonalize must be True, False or None, got {group['orthogonalize']!r}"
        )
    check_damping(group["damping"], trace_damping=trace_damping, method=method)


def listed(param_group: object) -> dict[str, Any]:
    """A user's group with a list in "params".

    Raises:
        TypeError: if it is no dict with "params".
    """
    if not isinstance(param_group, dict) or "params" not in param_group:
        raise TypeError(f"a parameter group is a dict with 'params', got {param_group!r}")
    members = param_group["params"]
    members = [members] if isinstance(members, Tensor) else list(members)
    return {**param_group, "params": members}


def completed(
    param_group: dict[str, Any],
    defaults: Mapping[str, Any],
    assignment: Assignment,
    blocks: Mapping[str, Block],
    rule: Adam,
) -> dict[str, Any]:
    """A user's group with the first-order rule for those of its parameters that have no block.

    A group holds both kinds of parameters, so that schedulers see the groups that the user made.
    "lr" is that of the layers; the rule's moves in proportion, from "base_lr", where both are as
    given. In a group without any layer "lr", "betas" and "eps" are the rule's. "agreement" is the
    cosine that `AgreementDamping` goes by.

    Args:
        param_group: the user's, as `listed`.
        defaults: settings where it says nothing.
        assignment: whose parameter is whose.
        blocks: those that there are already, by the layer's name.
        rule: the first-order rule where the group says nothing else.

    Raises:
        ValueError: for a parameter of a layer whose block covers only its other parameter.
    """
    layers = False
    for p in (each[1] if isinstance(each, tuple) else each for each in param_group["params"]):
        if not (isinstance(p, nn.Parameter) and p in assignment.owner and p.requires_grad):
            continue
        name = assignment.owner[p]
        if name in blocks and not any(p is own for own in blocks[name].layer.parameters):
            raise ValueError(
                f"layer {name!r} already has a block that does not cover this parameter "
                f"of shape {tuple(p.shape)}: make a new optimizer to change which of a "
                "layer's parameters are trained"
            )
        layers = True
    group = dict(param_group)
    # In a mixed group "lr" is the layers': the two rules' step sizes are not alike.
    shared = ("weight_decay",) if layers else ("lr", "weight_decay")
    given = {key: group[key] for key in shared if key in group}
    given |= {key: group.pop(key) for key in ("betas", "eps") if key in group}
    group["first_order"] = asdict(replace(rule, **given))
    if not layers:
        group["lr"] = group["first_order"]["lr"]
    group["base_lr"] = group.get("lr", defaults["lr"])
    group["agreement"] = 0.0
    return group


def rule_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The first-order rule of a group as it is now, by the fields of `Adam`."""
    rule = dict(group["first_order"])
    if group["base_lr"]:
        rule["lr"] = rule["lr"] * group["lr"] / group["base_lr"]
    return rule
