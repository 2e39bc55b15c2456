"""Where a block's eigenbasis comes from: the Kronecker factors, in the two forms of the paper.

Both estimate a pair of matrices, ``input`` (d_in × d_in) and ``output`` (d_out × d_out), such that
the layer's Fisher block is near ``coefficient · input ⊗ output``. They differ in what weighs an
example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tekfac.statistics import averaged, second_moment, square_norms, symmetric


class Factors(ABC):
    """A running estimate of a pair of Kronecker factors and the sums of the batch in flight.

    Attributes:
        input: ``(G, d_in, d_in)``, or None before the first batch.
        output: ``(G, d_out, d_out)``, or None before the first batch.
    """

    names: tuple[str, ...]
    """Names of the tensors that `state_dict` holds."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    @abstractmethod
    def add(self, a: Tensor, g: Tensor, first: bool) -> None:
        """Add examples to the batch's sums.

        Args:
            a: inputs, ``(G, N, T, d_in)``, or those at some of the positions, which then stand for
                all of them.
            g: output gradients, ``(G, N, T, d_out)``.
            first: whether these examples are added for the first time in this batch, and not again
                with gradients for other labels: what does not depend on ``g`` is then as it was.
        """

    @abstractmethod
    def update(self, examples: int, gradient_scale: float, decay: float) -> bool:
        """Average the batch's sums in.

        Args:
            examples: number of examples in the sums.
            gradient_scale: what every ``g`` is to be multiplied by.
            decay: ε2 of (3.6) and (3.7).

        Returns:
            Whether the batch was finite; if not, the estimate is as it was.
        """

    @property
    @abstractmethod
    def coefficient(self) -> Tensor:
        """The factor before ``input ⊗ output``, ``(G,)``."""

    @property
    def empty(self) -> bool:
        """Whether there is no estimate yet."""
        return self.input is None

    @property
    def silent(self) -> bool:
        """Whether the batch in flight holds no gradient at all."""
        return not bool(self._sums["output"].any())

    def clear(self) -> None:
        """Forget the batch in flight."""
        self._sums = {}

    def state_dict(self) -> dict[str, Tensor]:
        """The running estimate, as tensors by name; empty before the first batch."""
        return {} if self.empty else {name: getattr(self, name) for name in self.names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over an estimate returned by `state_dict`."""
        self.clear()
        for name in self.names:
            setattr(self, name, state.get(name))

    def _add_moment(self, name: str, rows: Tensor, weights: Tensor | float) -> None:
        self._sums[name] = second_moment(rows, weights, self._sums.get(name))

    def _take(self) -> dict[str, Tensor] | None:
        """The sums of the batch, which are cleared; None if they are not finite."""
        sums, self._sums = self._sums, {}
        for name in ("input", "output"):
            sums[name] = symmetric(sums[name])
        finite = all(bool(torch.isfinite(value).all()) for value in sums.values())
        return sums if finite else None


class KroneckerFactors(Factors):
    """``A = E[Ω]``, ``G = E[Γ]``: the factors of KFAC and EKFAC (paper, 2.4).

    The block is taken to be ``A ⊗ G``, as if inputs and output gradients were uncorrelated.
    """

    names = ("input", "output")

    def add(self, a: Tensor, g: Tensor, first: bool) -> None:
        if first:
            self._add_moment("input", a, g.shape[2] / a.shape[2])
        self._add_moment("output", g, 1 / g.shape[2])

    def update(self, examples: int, gradient_scale: float, decay: float) -> bool:
        sums = self._take()
        if sums is None:
            return False
        self.input = averaged(self.input, sums["input"].div_(examples), decay)
        output = sums["output"].mul_(gradient_scale**2 / examples)
        self.output = averaged(self.output, output, decay)
        return True

    @property
    def coefficient(self) -> Tensor:
        assert self.input is not None
        return self.input.new_ones(self.input.shape[0])


class TraceRestrictedFactors(Factors):
    """``Φ = E[tr(Γ) Ω]/δ``, ``Ψ = E[tr(Ω) Γ]/δ``, ``δ = E[tr(Ω) tr(Γ)]`` (paper, 2.10).

    The factors of TKFAC and TEKFAC. Both have trace 1, and ``tr(δ Φ ⊗ Ψ) = δ``. ``Φ`` and ``Ψ`` of
    a batch are normalised before they are averaged, so their traces stay 1; a batch (or a group)
    without any gradient says nothing about either and leaves the estimate as it is.
    """

    names = ("input", "output", "delta")

    def __init__(self) -> None:
        super().__init__()
        self.delta: Tensor | None = None

    def add(self, a: Tensor, g: Tensor, first: bool) -> None:
        times = g.shape[2] / a.shape[2]
        trace_omega = square_norms(a) * times
        trace_gamma = square_norms(g) / g.shape[2]
        self._add_moment("input", a, trace_gamma * times)
        self._add_moment("output", g, trace_omega / g.shape[2])
        delta = (trace_omega * trace_gamma).sum(dim=1)
        self._sums["delta"] = self._sums.get("delta", 0) + delta

    def update(self, examples: int, gradient_scale: float, decay: float) -> bool:
        sums = self._take()
        if sums is None:
            return False
        delta = sums["delta"][:, None, None]
        divisor = torch.where(delta > 0, delta, 1)
        past = torch.where(delta > 0, delta.new_full((), decay), 1)
        for name in ("input", "output"):
            new, old = sums[name].div_(divisor), getattr(self, name)
            if old is None:
                # Of a group without any gradient no direction is known to differ from another.
                new.diagonal(dim1=1, dim2=2).add_((delta[:, 0] <= 0) / new.shape[-1])
            else:
                new.lerp_(old, past)
            setattr(self, name, new)
        mean = sums["delta"] * (gradient_scale**2 / examples)
        self.delta = averaged(self.delta, mean, decay)
        return True

    @property
    def coefficient(self) -> Tensor:
        assert self.delta is not None
        return self.delta
