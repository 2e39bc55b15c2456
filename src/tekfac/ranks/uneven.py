"""Ranks that run out of batches before others do: `torch.distributed.algorithms.join`.

A rank whose batches are over goes on with the others' steps, without a batch and with their
gradients, until all are done: it has its part in what ranks do together, and all stay alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel

from tekfac.ranks.group import parallel_parts
from tekfac.ranks.ranks import Ranks


class Uneven(JoinHook):
    """What an optimizer does in a `Join`, before this rank is out of batches and after.

    Args:
        part: the model's `DistributedDataParallel`, which `Join` has first.
        ranks: those that train it.
        follow: takes a step without a batch, which asks for gradients by `share`.
        leave: called when all ranks are done.

    Attributes:
        over: whether this rank is out of batches.
    """

    def __init__(
        self,
        part: DistributedDataParallel,
        ranks: Ranks,
        follow: Callable[[], object],
        leave: Callable[[], object],
    ) -> None:
        self._part, self._ranks, self._follow, self._leave = part, ranks, follow, leave
        self.over = self._passed = False
        self._handle = part.register_forward_pre_hook(self._before)

    def main_hook(self) -> None:
        """Another rank has passed a batch through the model."""
        self.over = True
        if self._part.require_forward_param_sync:  # not one of several before a step (no_sync)
            self._follow()

    def post_hook(self, is_last_joiner: bool) -> None:
        """All ranks are out of batches."""
        self.close()
        self._leave()

    def close(self) -> None:
        """Look at the model no longer."""
        self._handle.remove()

    def share(self, parameters: Sequence[Tensor]) -> None:
        """Have the gradients of those who have a batch, if this rank has none."""
        self._passed = False
        own = -self._ranks.count if self.over else -self._ranks.number
        there = [not self.over and p.grad is not None for p in parameters]
        some_over, first, *known = self._ranks.highest([self.over, own, *there])
        if not some_over:
            return
        # Averaged, they are the same on all that have them.
        trained = [p for p, each in zip(parameters, known, strict=True) if each]
        gradients = [
            torch.empty_like(p, device="meta")
            if self.over
            else torch.zeros_like(p)
            if p.grad is None
            else p.grad
            for p in trained
        ]
        told = self._ranks.spread(gradients, [-first] * len(trained))
        if self.over:
            for p, gradient in zip(trained, told, strict=True):
                p.grad = gradient.to(p.device)

    def _before(self, module: nn.Module, args: Any) -> None:
        # A rank that is out of batches takes a step after each pass that it hears of.
        if not self._part._join_config.enable:
            return
        if self._passed:
            raise RuntimeError(
                "two passes through the model before a step, while ranks may run out of batches "
                "(Join): ranks that have none any more take a step after each. Where gradients are "
                "accumulated, have all passes but the last within model.no_sync()"
            )
        self._passed = torch.is_grad_enabled() and self._part.require_backward_grad_sync


def joinable_part(model: nn.Module) -> DistributedDataParallel:
    """The part of a model that `Join` is about.

    Raises:
        ValueError: if there is none, or several.
    """
    parts = parallel_parts(model)
    if len(parts) != 1:
        raise ValueError(
            "Join is for an optimizer that was given a model with one DistributedDataParallel, "
            f"and this one has {len(parts)}: give the optimizer the DistributedDataParallel itself"
        )
    return parts[0]


def check_joined(uneven: bool, config: Any, over: bool) -> None:
    """Raise if a model is in a `Join` without its optimizer, or the other way.

    Args:
        uneven: whether the model was seen to be in one.
        config: what the last one has set on the optimizer; None if there was none.
        over: whether this rank has no batch to see the model with.

    Raises:
        RuntimeError: if so.
    """
    there = config is not None and config.enable
    if uneven and not there:
        raise RuntimeError(
            "ranks that run out of batches (join) would leave those that go on waiting for their "
            "statistics: have the optimizer take part, by `with Join([model, optimizer]):` of "
            "torch.distributed.algorithms.join in place of model.join()"
        )
    if there and (config.is_first_joinable or not (uneven or over)):
        raise RuntimeError(
            "Join needs the model's DistributedDataParallel and then its optimizer: "
            "`with Join([model, optimizer]):`"
        )
