"""Where a block's eigenbasis comes from: the Kronecker factors, in the two forms of the paper.

Both estimate a pair of matrices, ``input`` (d_in × d_in) and ``output`` (d_out × d_out), such that
the layer's Fisher block is near ``coefficient · input ⊗ output``. They differ in what weighs an
example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tekfac.curvature.basis import Basis
from tekfac.curvature.moments import Moment
from tekfac.curvature.statistics import averaged
from tekfac.layers import Rows
from tekfac.numerics import wide
from tekfac.verdict import YES, Verdict


class Factors(ABC):
    """A running estimate of a pair of Kronecker factors and the sums of the batch in flight.

    Args:
        input: what the input side is known by, ``d_in × d_in``.
        output: the same of the output side, ``d_out × d_out``.
    """

    def __init__(self, input: Moment, output: Moment) -> None:
        self.input, self.output = input, output

    @abstractmethod
    def add(self, rows: Rows, first: bool) -> None:
        """Add examples to the batch's sums.

        Args:
            rows: their inputs and output gradients.
            first: whether these examples are added for the first time in this batch, and not again
                with gradients for other labels: what does not depend on ``g`` is then as it was.
        """

    def hold(self, held: bool) -> None:
        """Keep the estimate here, or leave that to another rank."""
        self.input.held = self.output.held = held

    def sums(self, groups: int, d_in: int, d_out: int, like: Tensor) -> dict[str, Tensor]:
        """The batch's sums in the type of ``like``; zeros where there are none."""
        widths = d_in, d_out
        return {
            f"{name}{part}": value
            for (name, moment), width in zip(self._moments(), widths, strict=True)
            for part, value in moment.sums(groups, width, like).items()
        }

    def take_sums(self, sums: dict[str, Tensor]) -> None:
        """Go on with other sums, as of `sums`."""
        for name, moment in self._moments():
            own = {key: value for key, value in sums.items() if key.startswith(name)}
            moment.take_sums({key.removeprefix(name): value for key, value in own.items()})

    def blank(self, groups: int, d_in: int, d_out: int, like: Tensor) -> dict[str, Tensor]:
        """Zeros in the form of `state_dict`."""
        return {
            f"{name}{part}": value
            for (name, moment), width in zip(self._moments(), (d_in, d_out), strict=True)
            for part, value in moment.blank(groups, width, like).items()
        }

    @abstractmethod
    def scale_gradients(self, square: Tensor | float) -> None:
        """Multiply the batch's sums as if every ``g`` had been multiplied by the root of this."""

    def update(
        self,
        units: Tensor | float,
        terms: Tensor | float,
        decay: float,
        usable: Verdict = YES,
    ) -> Verdict:
        """Average the batch's sums in, if they are finite; if not, the estimate is as it was.

        Args:
            units: number of examples in the sums, perhaps of each group, ``(G,)``.
            terms: number of the likelihood's terms in them: what the matrix is a mean over.
            decay: ε2 of (3.6) and (3.7).
            usable: whether the batch may be used at all. If that is open, nothing is read from the
                device, unless it is the first batch.

        Returns:
            Whether the batch was used.
        """
        used = usable.also(self._finite())
        if self.empty:
            used = used.read()
        if used.open:
            self._keep_if(used)
        if not used.refused:
            past = used.weigh(decay, 1.0)
            if isinstance(past, Tensor):
                assert self.input.sum is not None
                past = past.to(self.input.sum.dtype)[None]
            self._average(units, terms, past)
            self.input.release()
            self.output.release()
        return used

    @abstractmethod
    def _average(self, units: Tensor | float, terms: Tensor | float, decay: Tensor | float) -> None:
        """Average the batch's sums in."""

    @property
    def make_basis(self) -> type[Basis]:
        """What a basis of the two is."""
        return self.input.make_basis

    @property
    @abstractmethod
    def coefficient(self) -> Tensor:
        """The factor before ``input ⊗ output``, ``(G,)``."""

    @property
    def empty(self) -> bool:
        """Whether there is no estimate yet."""
        return self.input.value is None

    @property
    def silent(self) -> bool:
        """Whether the batch in flight holds no gradient at all."""
        assert self.output.sum is not None
        return not bool(self.output.sum.any())

    def clear(self) -> None:
        """Forget the batch in flight."""
        self.input.clear()
        self.output.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The running estimate, as tensors by name; empty before the first batch."""
        return {
            f"{name}{part}": value
            for name, moment in self._moments()
            for part, value in moment.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
        """Take over an estimate returned by `state_dict`.

        Args:
            state: the estimate.
            vectors: the basis' eigenvectors, "input" and "output", if there is a basis.
        """
        for name, moment in self._moments():
            own = {key: value for key, value in state.items() if key.startswith(name)}
            parts = {key.removeprefix(name): value for key, value in own.items()}
            moment.load_state_dict(parts, vectors.get(name))

    def _moments(self) -> tuple[tuple[str, Moment], tuple[str, Moment]]:
        return ("input", self.input), ("output", self.output)

    def _finite(self) -> Tensor:
        return self.input.finite() & self.output.finite()

    def _keep_if(self, usable: Verdict) -> None:
        """Make nothing of the batch's sums unless ``usable``."""
        self.input.keep_if(usable)
        self.output.keep_if(usable)


class KroneckerFactors(Factors):
    """``A = E[Ω]``, ``G = E[Γ]``: the factors of KFAC and EKFAC (paper, 2.4).

    The block is taken to be ``A ⊗ G``, as if inputs and output gradients were uncorrelated. ``A``
    is the mean over examples, ``G`` over the likelihood's terms, so that ``A ⊗ G`` is, too.
    """

    _turned = False
    """Whether the columns see output gradients, and the rows inputs (`Sample.swapped`)."""

    def add(self, rows: Rows, first: bool) -> None:
        each = rows.positions / rows.a.shape[2]  # positions that each of those read stands for
        new_a, new_g = rows.drawn
        self._turned = not new_g
        if first or new_a:
            self.input.add(rows.a, each)
        if first or new_g:
            self.output.add(rows.g, each * rows.per_position)

    def scale_gradients(self, square: Tensor | float) -> None:
        (self.input if self._turned else self.output).scale_sums(square)

    def _average(self, units: Tensor | float, terms: Tensor | float, decay: Tensor | float) -> None:
        if isinstance(units, Tensor) and units.numel() > 1:
            assert self.input.sum is not None
            value = self.input.value if self.input.held else None
            # Of a group that has seen nothing the mean stays, and its first one is taken whole.
            past = units.new_zeros(len(units), dtype=self.input.sum.dtype)
            if value is not None:
                past = torch.where(value.flatten(1).any(1), decay, past)
            self.input.average(units.clamp_min(1), torch.where(units > 0, past, 1.0))
        else:
            self.input.average(units, decay)
        self.output.average(terms, decay)

    @property
    def coefficient(self) -> Tensor:
        value = self.input.value
        assert value is not None
        return value.new_ones(value.shape[0], dtype=wide(value.dtype))


class TraceRestrictedFactors(Factors):
    """``Φ = E[tr(Γ) Ω]/δ``, ``Ψ = E[tr(Ω) Γ]/δ``, ``δ = E[tr(Ω) tr(Γ)]`` (paper, 2.10).

    The factors of TKFAC and TEKFAC. Both have trace 1, and ``tr(δ Φ ⊗ Ψ) = δ``. ``Φ`` and ``Ψ`` of
    a batch are normalised before they are averaged, so their traces stay 1; a batch (or a group)
    without any gradient says nothing about either and leaves the estimate as it is.
    """

    def __init__(self, input: Moment, output: Moment) -> None:
        super().__init__(input, output)
        self.delta: Tensor | None = None
        self._delta: Tensor | None = None

    def add(self, rows: Rows, first: bool) -> None:
        each = rows.positions / rows.a.shape[2]  # positions that each of those read stands for
        trace_omega, g_norms = rows.norms()
        trace_gamma = g_norms * rows.per_position
        self.input.add(rows.a, trace_gamma * each)
        self.output.add(rows.g, trace_omega * each * rows.per_position)
        delta = (trace_omega * trace_gamma).sum(dim=1)
        self._delta = delta if self._delta is None else self._delta.add_(delta)

    def sums(self, groups: int, d_in: int, d_out: int, like: Tensor) -> dict[str, Tensor]:
        delta = like.new_zeros(groups) if self._delta is None else self._delta.to(like.dtype)
        return super().sums(groups, d_in, d_out, like) | {"delta": delta}

    def take_sums(self, sums: dict[str, Tensor]) -> None:
        super().take_sums(sums)
        self._delta = sums["delta"]

    def blank(self, groups: int, d_in: int, d_out: int, like: Tensor) -> dict[str, Tensor]:
        return super().blank(groups, d_in, d_out, like) | {"delta": like.new_zeros(groups)}

    def scale_gradients(self, square: Tensor | float) -> None:
        self.input.scale_sums(square)
        self.output.scale_sums(square)
        if self._delta is not None:
            self._delta.mul_(square)

    def _average(self, units: Tensor | float, terms: Tensor | float, decay: Tensor | float) -> None:
        assert self._delta is not None
        delta, first = self._delta, self.empty
        silent = delta <= 0
        divisor = torch.where(silent, 1, delta)
        past = torch.where(silent, 1.0, decay).to(delta.dtype)
        for moment in (self.input, self.output):
            moment.average(divisor, past)
            if first:
                # Of a group without any gradient no direction is known to differ from another.
                moment.add_identity(silent.to(delta.dtype))
        self.delta = averaged(self.delta, delta / terms, decay)

    def clear(self) -> None:
        super().clear()
        self._delta = None

    def _finite(self) -> Tensor:
        assert self._delta is not None
        return super()._finite() & torch.isfinite(self._delta).all()

    def _keep_if(self, usable: Verdict) -> None:
        super()._keep_if(usable)
        assert self._delta is not None
        self._delta = usable.choose(self._delta, 0)

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        return state if self.delta is None else state | {"delta": self.delta}

    def load_state_dict(self, state: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
        super().load_state_dict(state, vectors)
        self.delta = state.get("delta")

    @property
    def coefficient(self) -> Tensor:
        assert self.delta is not None
        return self.delta
