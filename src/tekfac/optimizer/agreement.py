"""How far steps agree with those before them, which is what `AgreementDamping` goes by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tekfac.curvature.damping import AgreementDamping
from tekfac.ranks.ranks import Ranks
from tekfac.ranks.shards import local
from tekfac.verdict import Verdict

# Steps between comparisons, each of which goes through all layers' weights.
EVERY = 10


class Agreement:
    """Sums of ``⟨u, v⟩``, ``‖u‖²`` and ``‖v‖²`` since they last decided, by parameter group.

    They stay on the device, so that nobody waits for it.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._since = 0

    def note(
        self,
        number: int,
        group: Mapping[str, Any],
        directions: Mapping[Tensor, Tensor],
        state: Mapping[Tensor, Mapping[str, Any]],
        wanted: Verdict,
    ) -> None:
        """Compare natural gradients with the momentum that they are about to be added to.

        Args:
            number: the group's.
            group: its settings.
            directions: ``u`` of its layers' parameters, or of this rank's parts of them.
            state: what holds each parameter's ``v``.
            wanted: whether the step is taken.
        """
        rule = group["damping"]
        if not (isinstance(rule, AgreementDamping) and rule.follows(group)):
            return
        known = [p for p in directions if "momentum_buffer" in state[p]]
        buffers = local(state[p]["momentum_buffer"] for p in known)
        for p, v in zip(known, buffers, strict=True):
            u = directions[p]
            found = torch.stack([(u * v).sum(), u.square().sum(), v.square().sum()]).double()
            found, own = wanted.choose(found, 0.0), self._sums.get(number)
            if own is not None:
                # A loaded state's are on the host: it is these that move, or the host would wait.
                found = found + own.to(found.device, non_blocking=True)
            self._sums[number] = found

    def follow(self, step: int, groups: Sequence[dict[str, Any]], ranks: Ranks) -> None:
        """Have damping follow what was compared since the last time.

        Args:
            step: the coming step, counted from 0.
            groups: the optimizer's.
            ranks: those that take it; each of parameters of its own, or all of the same.
        """
        steps, self._since = step - self._since, step
        following = [
            (group, self._sums.pop(number, torch.zeros(3)).tolist())
            for number, group in enumerate(groups)
            if isinstance(group["damping"], AgreementDamping)
        ]
        if not following:
            return
        told = ranks.mean([each for _, sums in following for each in sums])
        for place, (group, _) in enumerate(following):
            dot, own, past = told[3 * place : 3 * place + 3]
            length = math.sqrt(own * past)
            if length > 0:
                group["agreement"] = dot / length
                group["damping"] = group["damping"].after(group["agreement"], steps)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        sums = {str(number): each.tolist() for number, each in self._sums.items()}
        return {"sums": sums, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict`; older states have none."""
        state = state or {"sums": {}, "since": 0}
        self._sums = {
            int(number): torch.tensor(each, dtype=torch.float64)
            for number, each in state["sums"].items()
        }
        self._since = state["since"]
