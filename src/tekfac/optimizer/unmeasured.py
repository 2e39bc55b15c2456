"""What has gradients and no curvature, or is not trained at all: what is said of it, and when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from torch import nn

from tekfac.capture.capture import Capture
from tekfac.capture.graph import CUSTOM, REENTRANT
from tekfac.checks import first_few
from tekfac.curvature.blocks import Block
from tekfac.layers.view import multiplies
from tekfac.optimizer.events import Events
from tekfac.ranks.layout import mesh_of
from tekfac.ranks.ranks import Ranks

Blocks = Mapping[str, Block]


def check_measured(
    capture: Capture,
    blocks: Blocks,
    troubled: Set[str],
    events: Events,
    model: nn.Module,
    method: str,
) -> None:
    """Raise or warn if layers have gradients but no curvature, and no known trouble.

    Args:
        capture: what was seen.
        blocks: all.
        troubled: names of those whose batch is known to be unusable.
        events: where it is said once.
        model: what the optimizer was given.
        method: the optimizer's name.

    Raises:
        RuntimeError: if no layer could be measured, and the way out is known.
    """
    if lost := [*map(repr, capture.lost())]:
        events.warn(
            "unseen",
            f"the curvature of layers {first_few(lost)} stays as it was: they get gradients, "
            "but the last steps that were to measure it have not seen them behind the model's "
            "output (is the model itself called, and its gradient not put there by hand?)",
        )
    # A penalty on gradients has no more examples than what it is added to.
    if capture.derived > capture.plain and capture.passes:
        events.warn(
            "derived",
            "derivatives of what the model returned were taken (torch.autograd.grad with "
            "create_graph=True), and a loss of these is not measured: the curvature is that of the "
            "outputs themselves. What is fitted (a differential equation, forces, a score) belongs "
            "into what the model returns; of a penalty on gradients nothing need be measured",
        )
    missing = [
        block.name
        for block in blocks.values()
        if block.empty
        and not (block.silent or block.waiting)
        and block.name not in troubled
        and block.name not in capture.reached_layers
        # A matrix that nobody multiplies (a table, positions) is no layer.
        and _may_multiply(capture.strange.get(block.name, "mm"))
        and any(p.grad is not None for p in block.layer.parameters)
    ]
    if not missing:
        return
    if capture.reentrant:
        raise RuntimeError(REENTRANT)
    if capture.problem is not None:
        raise RuntimeError(f"no statistics could be taken: {capture.problem}") from capture.problem
    if capture.passes == 0 and len(missing) == len(blocks) and not capture.strange:
        raise RuntimeError(
            "step() found gradients, but no statistics could be taken: call the model itself "
            f"({type(model).__name__}.__call__, the module given to {method}) "
            "or modules in it, and backward() of a loss that is made of what they return"
            + (", and of the tensor that output= gives" if capture.chosen else "")
            + (
                ": the derivatives of that, which were taken by torch.autograd.grad, have to be "
                "made in the model, and returned"
                if capture.derived
                else ""
            )
        )
    kinds = {capture.strange[name] for name in missing if name in capture.strange}
    events.warn(
        "missing",
        f"no curvature of layers {first_few([*map(repr, missing)])}: they have gradients, but "
        + (
            f"their weights are used by {', '.join(sorted(kinds))}, which is no product known here"
            if kinds
            else "no product with their weights was found behind the model's output in the "
            "backward pass (did the loss take another way than the output? output= may give "
            "several tensors)"
        )
        + "; the first-order rule trains them",
    )


def _may_multiply(kind: str) -> bool:
    return multiplies(kind) or CUSTOM in kind


def check_grouped(
    parameters: Mapping[str, nn.Parameter], groups: Iterable[Mapping[str, Any]], events: Events
) -> None:
    """Warn if parameters of the model have gradients, and nothing trains them.

    Args:
        parameters: the model's, by name.
        groups: the optimizer's.
        events: where it is said once.

    Raises:
        RuntimeError: if they are others than when the optimizer was made, divided among ranks.
    """
    trained = {p for group in groups for p in group["params"]}
    left = [name for name, p in parameters.items() if p.grad is not None and p not in trained]
    if _divided(parameters[name] for name in left) and not _divided(trained):
        raise RuntimeError(
            f"parameters {first_few([*map(repr, left)])} were divided among ranks (fully_shard, "
            "parallelize_module) after the optimizer was made, which has the tensors that were in "
            "their place: make it last"
        )
    if left:
        events.warn(
            "left",
            f"parameters {first_few([*map(repr, left)])} have gradients, but are in no parameter "
            "group, and stay as they are: they were frozen, or not in the model, when the "
            "optimizer was made; add_param_group({'params': [...]}) trains them from now on",
        )


def _divided(parameters: Iterable[nn.Parameter]) -> bool:
    return any(mesh_of(p) is not None for p in parameters)


def note_unused(capture: Capture, blocks: Blocks, ranks: Ranks) -> None:
    """Don't look out in every step for layers that a backward pass, seen whole, came not by."""
    new = [block for block in blocks.values() if block.listening and block.factors.empty]
    if not new:
        return
    reached = capture.reached_layers
    said = [int(bool(reached)), *(int(block.name in reached) for block in new)]
    anything, *seen = ranks.highest(said)
    for block, here in zip(new, seen, strict=True):
        block.silent |= bool(anything and not here)
