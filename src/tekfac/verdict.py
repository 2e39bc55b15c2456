"""Whether something goes ahead: known here, or left to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def waits(device: torch.device) -> bool:
    """Whether reading a number from the device makes the host wait for work given to it before."""
    return device.type != "cpu"


class Verdict:
    """Yes or no, in one form for a host that knows and for a device that is not waited for.

    Whether all of a batch is finite is known on the device; on an accelerator, reading it makes the
    host wait for all the work given to the device before. So a verdict may stay *open*: what
    depends on it is then chosen there, by `choose` and its like, and nobody reads it.

    Args:
        value: a bool, or a 0-dimensional tensor of one for an open verdict.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bool | Tensor) -> None:
        self._value = value

    @property
    def open(self) -> bool:
        """Whether only the device knows."""
        return isinstance(self._value, Tensor)

    @property
    def refused(self) -> bool:
        """Whether it is known to be no."""
        return self._value is False

    def also(self, condition: Tensor) -> Verdict:
        """This and a 0-dimensional condition: open if this is, and else read."""
        if isinstance(self._value, Tensor):
            return Verdict(self._value.to(condition.device) & condition)
        return Verdict(self._value and bool(condition))

    def read(self) -> Verdict:
        """The verdict as the host knows it, having waited for the device if it was open."""
        return Verdict(bool(self._value))

    def choose(self, yes: Tensor, no: Tensor | float) -> Tensor:
        """One tensor or the other, or a number in its place, on the device of ``yes``."""
        if isinstance(self._value, Tensor):
            return torch.where(self._value.to(yes.device), yes, no)
        return yes if self._value else torch.as_tensor(no, dtype=yes.dtype, device=yes.device)

    def weigh(self, yes: float, no: float) -> Tensor | float:
        """One number or the other, 0-dimensional if the verdict is open."""
        if isinstance(self._value, Tensor):
            return torch.where(self._value, yes, no)
        return yes if self._value else no

    def missed(self, wanted: Verdict) -> Tensor:
        """1 where ``wanted`` was yes and this is no, and else 0; both open."""
        assert isinstance(self._value, Tensor)
        return wanted.also(~self._value).choose(torch.ones_like(self._value, dtype=torch.long), 0)

    def inverse(self) -> Tensor:
        """1.0 where this, an open verdict, is no: what fused optimizers call ``found_inf``."""
        assert isinstance(self._value, Tensor)
        return (~self._value).float()


YES = Verdict(True)
