"""A step tried on its own batch: what it does to the loss, and what the curvature predicts of it.

This is what `AdaptiveDamping` goes by.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tekfac.capture.graph import own_pass
from tekfac.curvature.blocks import Block
from tekfac.curvature.damping import AdaptiveDamping
from tekfac.optimizer.household import Household
from tekfac.ranks.shards import local

# A change of the loss is known if it is so many times what the loss is rounded by.
PRECISE = 8

Groups = Sequence[dict[str, Any]]
Closure = Callable[[], Any]


def trial_of(
    model: nn.Module, groups: Groups, number: int, closure: Closure | None
) -> Trial | None:
    """A trial of the coming step, counted from 0, where the damping of any group is due."""
    due = [
        group
        for group in groups
        if isinstance(group["damping"], AdaptiveDamping)
        and (number + 1) % group["damping"].every == 0
    ]
    return Trial(model, groups, due, closure) if due and closure is not None else None


def check_closure(groups: Groups, closure: Closure | None) -> None:
    """Raise where damping is adaptive and there is no closure to find the loss by.

    Raises:
        RuntimeError: saying so.
    """
    if closure is None and any(isinstance(g["damping"], AdaptiveDamping) for g in groups):
        raise RuntimeError(
            "AdaptiveDamping evaluates the loss again after a step: call step(closure), with a "
            "function that clears the gradients, calls backward() and returns the loss. Where "
            "there is none (under GradScaler, in trainers that call step() by themselves) take "
            "tekfac.MeanDamping"
        )


class Trial:
    """One step of the optimizer, from before its closure is called.

    Args:
        model: the model, whose buffers a second evaluation leaves alone.
        groups: the optimizer's parameter groups.
        due: those of them whose damping follows.
        closure: evaluates the loss.
    """

    def __init__(self, model: nn.Module, groups: Groups, due: Groups, closure: Closure) -> None:
        self._model, self._due, self._closure = model, due, closure
        self._parameters = [p for group in groups for p in group["params"]]
        self._grads = {p: weakref.ref(p.grad) for p in self._parameters if p.grad is not None}
        self._randomness = _states(self._parameters)
        self._loss, self._rounding = math.nan, 0.0
        self._before: list[Tensor] = []

    def begin(self, loss: object, cleared: bool) -> None:
        """The closure has been called, and the parameters are still as they were.

        Args:
            loss: what it returned.
            cleared: whether it cleared the gradients by the optimizer's ``zero_grad``.

        Raises:
            TypeError: if that is no number.
            RuntimeError: if gradients were there before, and were not cleared.
        """
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._loss, self._rounding = loss.item(), torch.finfo(loss.dtype).eps
        elif isinstance(loss, float):
            self._loss, self._rounding = loss, torch.finfo(torch.float32).eps
        else:
            raise TypeError(
                f"AdaptiveDamping needs a closure that returns the loss, a number, got {loss!r}"
            )
        if not cleared and any(p.grad is old() for p, old in self._grads.items()):
            raise RuntimeError(
                "AdaptiveDamping needs the gradient of the closure's own loss, and there were "
                "gradients before: have the closure call optimizer.zero_grad() first. Gradient "
                "accumulation belongs inside of it, and it returns the mean loss of all parts"
            )
        self._before = [part.detach().clone() for part in local(self._parameters)]

    def end(self, blocks: Mapping[str, Block], household: Household) -> float:
        """The parameters have changed: compare, and have the damping follow.

        Args:
            blocks: all, by name.
            household: the ranks that have them.

        Returns:
            ρ; nan where nothing can be said, as the curvature predicts no decrease, or one too
            small for the loss's precision; -inf where the loss is not finite any more.
        """
        predicted = float(self._predicted(blocks, household))
        before, after, change = household.ranks.mean([self._loss, self._again(), predicted])
        if not (math.isfinite(before) and -change > PRECISE * self._rounding * abs(before)):
            ratio = math.nan
        else:
            ratio = (after - before) / change if math.isfinite(after) else -math.inf
        for group in self._due:
            group["damping"] = group["damping"].after(ratio)
        return ratio

    def _predicted(self, blocks: Mapping[str, Block], household: Household) -> Tensor:
        """``∇hᵀδ + ½ δᵀ F̂ δ`` of the step, 0-dimensional; of all ranks' the mean counts."""
        own = zip(self._parameters, local(self._parameters), self._before, strict=True)
        steps = {p: part.detach() - old for p, part, old in own}
        self._before.clear()
        linear = [
            (local([p.grad])[0].to(torch.promote_types(p.dtype, torch.float32)) * step).sum()
            * household.shards.count(p)
            for p, step in steps.items()
            if p.grad is not None
        ]
        blocks = {name: block for name, block in blocks.items() if not block.empty}
        covered: dict[Tensor, str] = {
            p: name for name, block in blocks.items() for p in block.layer.parameters
        }
        whole = household.gather(steps, covered)
        bends = {
            name: block.curvature_along(block.layer.matrix_of(whole))
            for name, block in blocks.items()
            if block.held
        }
        parts = [*linear, *(each / 2 for each in household.tell(bends, blocks))]
        if not parts:
            return torch.zeros(())
        return torch.stack([part.to(parts[0]) for part in parts]).sum()

    def _again(self) -> float:
        """The loss as it is now, with the random numbers of the first call."""
        with _left_alone(self._model, self._parameters), torch.no_grad(), own_pass():
            _set_states(self._randomness)
            try:
                with _WithoutBackward():
                    return float(self._closure())
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                raise RuntimeError(
                    "AdaptiveDamping calls the closure once more with gradients off. "
                    "loss.backward() does nothing then; torch.autograd.backward() and grad() "
                    "can't be left out like that: have the closure call loss.backward()"
                ) from error


class _WithoutBackward(TorchFunctionMode):
    """``Tensor.backward`` does nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if func is Tensor.backward else func(*args, **(kwargs or {}))


@contextmanager
def _left_alone(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients, buffers and generators are afterwards as they were."""
    grads = [p.grad for p in parameters]
    buffers = [(b, b.clone()) for b in model.buffers()]
    places = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    states = _states(parameters)
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        for module, name, buffer in places:
            module._buffers[name] = buffer
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)
        _set_states(states)


def _states(tensors: Iterable[Tensor]) -> dict[torch.device, Tensor]:
    """States of torch's generators on the host and on the devices of these tensors."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in {tensor.device for tensor in tensors} - states.keys():
        module = torch.get_device_module(device)
        if hasattr(module, "get_rng_state"):
            states[device] = module.get_rng_state(*_which(device))
    return states


def _set_states(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, *_which(device))


def _which(device: torch.device) -> list[torch.device]:
    return [] if device.type == "mps" else [device]  # there is one of those
