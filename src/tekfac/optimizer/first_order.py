"""The rule for parameters that no curvature block covers: of norm layers and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from tekfac.checks import check_decay, check_not_negative
from tekfac.ranks.shards import local
from tekfac.verdict import YES, Verdict


@dataclass(frozen=True)
class Adam:
    """The first-order rule, for every parameter that no curvature block covers.

    Args:
        lr: step size, in the parameters' units; a parameter group of its own holds it, so that
            schedulers scale it along with the curvature groups'.
        betas: decays of the running averages of the gradient and of its square.
        eps: added to the root of the second, for stability.
        weight_decay: decoupled, a fraction of the parameter per unit of ``lr``.

    Raises:
        ValueError: for a negative or nan ``lr``, ``eps`` or ``weight_decay``, or betas that are
            not in [0, 1).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_not_negative(f"Adam's {name}", getattr(self, name))
        for beta in self.betas:
            check_decay("Adam's betas", beta)


def adam_step(
    params: Sequence[Tensor],
    state: Mapping[Tensor, dict[str, Any]],
    group: Mapping[str, Any],
    wanted: Verdict = YES,
) -> None:
    """One step of Adam, by torch's own implementation, with decoupled weight decay.

    Args:
        params: parameters with a gradient.
        state: a dict for each of them, where the averages are kept.
        group: settings, the fields of `Adam`.
        wanted: whether to take the step at all; if that is open, the fused implementation decides
            on the device.
    """
    if not params:
        return
    adam_state(params, state)
    # By default torch takes a loop over the parameters on a CPU, a tenth as fast, and on a GPU one
    # that reads the number of each one's steps from there.
    fused: dict[str, Any] = {}
    if wanted.open or all(p.is_floating_point() for p in params):
        fused["fused"] = True
        for p in params:
            state[p]["step"] = state[p]["step"].to(p.device, non_blocking=True)
    if wanted.open:
        fused["found_inf"] = wanted.inverse()
    decay_weights(params, group, wanted)
    adam(
        local(params),
        local(p.grad for p in params),  # type: ignore[misc]
        local(state[p]["exp_avg"] for p in params),
        local(state[p]["exp_avg_sq"] for p in params),
        [],
        [state[p]["step"] for p in params],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
        **fused,
    )


def adam_state(params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Make the averages of parameters that have none."""
    for p in params:
        if "exp_avg" not in state[p]:
            state[p]["step"] = torch.tensor(0.0)
            state[p]["exp_avg"] = torch.zeros_like(p)
            state[p]["exp_avg_sq"] = torch.zeros_like(p)


def decay_weights(
    params: Sequence[Tensor], group: Mapping[str, Any], wanted: Verdict = YES
) -> None:
    """``θ ← θ − lr · weight_decay · θ``, if ``wanted``."""
    if group["weight_decay"]:
        multiply(local(params), 1 - float(group["lr"] * group["weight_decay"]), wanted)


def multiply(tensors: Sequence[Tensor], factor: float, wanted: Verdict = YES) -> None:
    """Multiply tensors by a number in place, if ``wanted``."""
    by = wanted.weigh(factor, 1.0)
    if not isinstance(by, Tensor):
        torch._foreach_mul_(list(tensors), by)
        return
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for some in alike.values():
        # In their type, or torch goes through them one by one.
        torch._foreach_mul_(some, by.to(some[0]))
