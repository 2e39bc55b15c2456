"""The update (3.9): from gradients to natural gradients, and along them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tekfac import verdict
from tekfac.curvature.blocks import Block
from tekfac.curvature.stack import Stack
from tekfac.optimizer.first_order import decay_weights, multiply
from tekfac.ranks.shards import local
from tekfac.verdict import Verdict


class Preconditioner:
    """``(F̂ + λ I)^(−power) ∇h`` of many blocks; of small ones with the same shapes together."""

    def __init__(self) -> None:
        self._stacks: dict[object, Stack] = {}

    def natural_gradients(
        self, blocks: Mapping[str, Block], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What each block makes of its gradient, ``(G, d_out, d_in)``, by name.

        Args:
            blocks: those of the names in ``gradients`` among others.
            gradients: of blocks that have a curvature.
        """
        alike: dict[object, list[str]] = {}
        for name in gradients:
            stacking = blocks[name].stacking
            alike.setdefault(name if stacking is None else stacking, []).append(name)
        result: dict[str, Tensor] = {}
        for stacking, names in alike.items():
            members = [blocks[name] for name in names]
            if len(members) == 1:
                result[names[0]] = members[0].precondition(gradients[names[0]])
                continue
            stack = self._stacks.get(stacking)
            if stack is None or stack.blocks != members:
                stack = self._stacks[stacking] = Stack(members)
            found = stack.precondition([gradients[name] for name in names])
            result |= zip(names, found, strict=True)
        return result


def kl_changes(
    naturals: Mapping[str, Tensor], gradients: Mapping[str, Tensor], blocks: Mapping[str, Block]
) -> dict[str, Tensor]:
    """``lr² ⟨u, ∇h⟩`` of each block: how far its step changes the predictive distribution."""
    return {
        name: blocks[name].group["lr"] ** 2 * (natural * gradients[name]).sum()
        for name, natural in naturals.items()
    }


def within_kl(
    naturals: Mapping[str, Tensor], changes: Sequence[Tensor], kl_clip: float
) -> dict[str, Tensor]:
    """All natural gradients times ``min(1, sqrt(kl_clip / Σ lr² ⟨u, ∇h⟩))``.

    Args:
        naturals: those of some blocks.
        changes: the sum's terms, of all blocks.
        kl_clip: the bound.
    """
    if not naturals:
        return {}
    inner = torch.stack([change.to(changes[0]) for change in changes]).sum()
    clip = (kl_clip / inner.clamp_min(torch.finfo(inner.dtype).tiny)).sqrt().clamp_max(1)
    return {name: natural * clip.to(natural) for name, natural in naturals.items()}


def within_rms(naturals: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> dict[str, Tensor]:
    """Each block's natural gradient times ``min(1, (1 − momentum) rms_clip / rms(u))``, in place.

    The sum that momentum makes of such has a root mean square of at most ``rms_clip``. One that is
    too large for its square to be a number becomes zero.
    """
    result = dict(naturals)
    for name, natural in naturals.items():
        group = blocks[name].group
        if group["rms_clip"] is None:
            continue
        limit = (1 - group["momentum"]) * group["rms_clip"] * math.sqrt(natural.numel())
        clip = (limit / torch.linalg.vector_norm(natural)).clamp_max(1)
        if verdict.waits(natural.device):
            result[name] = torch.where(clip > 0, natural * clip, 0)
        elif clip != 1:
            # To go through a gradient takes as long as rotating it does: not where it can be seen.
            result[name] = natural.mul_(clip) if clip > 0 else natural.zero_()
    return result


def accumulate(
    directions: Mapping[Tensor, Tensor],
    state: Mapping[Tensor, dict[str, Any]],
    group: Mapping[str, Any],
    wanted: Verdict,
) -> dict[Tensor, Tensor]:
    """``v ← momentum · v + u`` (3.9), for natural gradients ``u``.

    Args:
        directions: ``u`` of parameters of one group, or of this rank's parts of them.
        state: a dict for each of them, where ``v`` is kept.
        group: its settings.
        wanted: whether the step is taken at all.

    Returns:
        What to step along, ``v``, or ``u + momentum · v`` with Nesterov's momentum.
    """
    if not directions:
        return {}
    params, steps = list(directions), list(directions.values())
    if group["momentum"]:
        steps = _zero_unless(wanted, steps)
        momentum_state(params, state)
        buffers = local(state[p]["momentum_buffer"] for p in params)
        multiply(buffers, group["momentum"], wanted)
        torch._foreach_add_(buffers, steps)
        if group["nesterov"]:
            torch._foreach_add_(steps, buffers, alpha=group["momentum"])
        else:
            steps = buffers
    return dict(zip(params, steps, strict=True))


def step_along(
    directions: Mapping[Tensor, Tensor], group: Mapping[str, Any], wanted: Verdict
) -> None:
    """``θ ← θ − lr · v`` (3.9), for parameters of one group, or this rank's parts of them."""
    if not directions:
        return
    params = list(directions)
    steps = _zero_unless(wanted, list(directions.values()))
    decay_weights(params, group, wanted)
    torch._foreach_add_(local(params), steps, alpha=-float(group["lr"]))


def momentum_state(params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Make the ``v`` of parameters that have none."""
    for p in params:
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = torch.zeros_like(p)


def _zero_unless(wanted: Verdict, tensors: list[Tensor]) -> list[Tensor]:
    return [wanted.choose(t, 0) for t in tensors] if wanted.open else tensors
