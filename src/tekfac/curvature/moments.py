"""The second moment of one side of a layer: its running estimate, and what a basis needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from tekfac.curvature.basis import Basis, CoordinateBasis
from tekfac.curvature.linalg import eigh, leading, orthonormal
from tekfac.curvature.statistics import (
    averaged,
    counted,
    folded,
    second_moment,
    sketched,
    symmetric,
    unfolded,
)
from tekfac.numerics import square_norms, wide
from tekfac.verdict import Verdict


class Moment:
    """A running second moment ``M``, ``(G, d, d)``, and the sum of the batch in flight.

    Of a wide side (wider than three times ``rank``) only ``M P`` is kept, with ``rank`` orthonormal
    columns in ``P``, and the trace. Averages are linear, so that nothing more is lost until the
    next refresh: that takes the leading eigenvectors from ``M P``, goes on with the matrix that
    they and one isotropic remainder stand for, and makes them the next ``P``.

    Args:
        rank: eigenvectors that are kept of a wide side; None for all.
        storage: what the estimate is kept in between steps; None for what it is computed in.

    Attributes:
        value: ``(G, d, d)``, or ``M P``, ``(G, d, rank)``; None before the first batch. On the meta
            device where another rank holds it.
        trace: ``(G,)`` along with ``M P``, else None.
        probe: ``P``, ``(G, d, rank)``, or None.
        held: whether the estimate is kept here, and not by another rank. What batches' sums need of
            it, the trace and the probe, is kept in any case.
    """

    make_basis: ClassVar[type[Basis]] = Basis
    """What a layer's basis is if its input side is known by this."""

    def __init__(self, rank: int | None, storage: torch.dtype | None) -> None:
        self.rank = rank
        self.storage = storage
        self.value: Tensor | None = None
        self.trace: Tensor | None = None
        self.probe: Tensor | None = None
        self.sum: Tensor | None = None
        self._trace_sum: Tensor | None = None
        self.held = True

    def add(self, rows: Tensor, weights: Tensor | float) -> None:
        """Add ``Σ_n w_n Σ_t x_nt x_ntᵀ`` to the batch's sum.

        Args:
            rows: ``(G, N, T, d)``.
            weights: one per example, ``(G, N)``, or one for all.
        """
        self._begin(rows.shape[0], rows.shape[3], rows)
        if self.probe is None:
            self.sum = second_moment(rows, weights, self.sum)
        else:
            self.sum = sketched(rows, weights, self.probe.to(rows.dtype), self.sum)
            trace = (square_norms(rows) * weights).sum(dim=1)
            self._trace_sum = trace if self._trace_sum is None else self._trace_sum.add_(trace)

    def _begin(self, groups: int, width: int, like: Tensor) -> None:
        if self.value is None and self.sum is None:
            kept, self.probe = self.kept(width), None
            if kept < width:
                self.probe = orthonormal(groups, width, kept, like)

    def sums(self, groups: int, width: int, like: Tensor) -> dict[str, Tensor]:
        """The batch's sums in the type of ``like``, with nothing twice; zeros before the first."""
        self._begin(groups, width, like)
        if self.probe is None:
            upper = like.new_zeros(groups, width, width) if self.sum is None else self.sum
            return {"": folded(upper.to(like.dtype))}
        if self.sum is None or self._trace_sum is None:
            return {"": like.new_zeros(self.probe.shape), "_trace": like.new_zeros(groups)}
        return {"": self.sum.to(like.dtype), "_trace": self._trace_sum.to(like.dtype)}

    def take_sums(self, sums: dict[str, Tensor]) -> None:
        """Go on with other sums, as of `sums`."""
        self.sum = unfolded(sums[""]) if self.probe is None else sums[""]
        self._trace_sum = sums.get("_trace")

    def scale_sums(self, factor: Tensor | float) -> None:
        """Multiply the batch's sums."""
        if self.sum is not None:
            self.sum.mul_(factor)
        if self._trace_sum is not None:
            self._trace_sum.mul_(factor)

    def release(self) -> None:
        """Keep only the estimate's shape, if another rank holds it."""
        if self.value is not None and not self.held:
            self.value = self.value.to("meta")

    def kept(self, width: int) -> int:
        """How many eigenvectors of ``width`` are kept."""
        if self.value is not None:
            return self.value.shape[2]
        return width if self.rank is None or width <= 3 * self.rank else self.rank

    def values(self, width: int) -> int:
        """How many eigenvalues there are of ``width``."""
        kept = self.kept(width)
        return kept + (kept < width)

    def entries(self, width: int) -> int:
        """How many numbers of ``width``'s second moment are kept, as far as they are many."""
        return width * self.kept(width)

    def active(self, width: int) -> Tensor | int:
        """In how many of ``width`` directions a batch has gradients at all."""
        return width

    def finite(self) -> Tensor:
        """Whether the batch's sum is, 0-dimensional."""
        assert self.sum is not None
        return torch.isfinite(self.sum).all()

    def keep_if(self, usable: Verdict) -> None:
        """Make nothing of the batch's sum unless ``usable``."""
        assert self.sum is not None
        self.sum = usable.choose(self.sum, 0)
        if self._trace_sum is not None:
            self._trace_sum = usable.choose(self._trace_sum, 0)

    def average(self, divisor: Tensor | float, past: Tensor | float) -> None:
        """Average the batch's sum, divided by ``divisor``, in; both are numbers, perhaps
        0-dimensional, or ``(G,)``."""
        assert self.sum is not None
        new = symmetric(self.sum) if self.probe is None else self.sum
        new.div_(_for_matrices(divisor))
        old = None if self.value is None or not self.held else self.value.to(new.dtype)
        self.value = averaged(old, new, _for_matrices(past)).to(self.storage or new.dtype)
        if self._trace_sum is not None:
            self.trace = averaged(self.trace, self._trace_sum.div_(divisor), past)

    def add_identity(self, share: Tensor) -> None:
        """Add ``share / d`` times the identity, ``share`` of shape ``(G,)``."""
        assert self.value is not None
        part = share / self.value.shape[1]
        if self.probe is None:
            self.value.diagonal(dim1=1, dim2=2).add_(part[:, None])
        else:
            assert self.trace is not None
            self.value.add_(part[:, None, None] * self.probe)
            self.trace.add_(share)

    def eigen(self) -> tuple[Tensor, Tensor] | None:
        """Eigenvalues ``(G, k)`` and eigenvectors ``(G, d, k)``; None if they can't be had.

        In float32 at least. Where only the leading ones are kept there is one more value, the mean
        of all others.
        """
        assert self.value is not None
        value = self.value.to(wide(self.value.dtype))
        if self.probe is None:
            return eigh(value)
        assert self.trace is not None
        found = leading(value, self.probe.to(value.dtype))
        if found is None:
            return None
        values, vectors = found
        others = vectors.shape[1] - vectors.shape[2]
        rest = ((self.trace - values.sum(dim=1)) / others).clamp_min(0)
        return torch.cat([values, rest[:, None]], dim=1), vectors

    def blank(self, groups: int, width: int, like: Tensor) -> dict[str, Tensor]:
        """Zeros in the form of the estimate: the value, and the trace along with a part of it."""
        kept = self.kept(width)
        blank = {"": like.new_zeros(groups, width, kept, dtype=self.storage)}
        return blank | ({"_trace": like.new_zeros(groups)} if kept < width else {})

    def follow(self, values: Tensor, vectors: Tensor) -> None:
        """Go on from a basis taken into use, by `eigen`, if only its part of the matrix is kept."""
        if self.probe is not None:
            assert self.value is not None
            # On the new probe, the isotropic remainder does not act.
            product = vectors * values[:, None, :-1]
            self.probe, self.value = vectors.to(self.value.dtype), product.to(self.value.dtype)
            self.release()

    def state_dict(self) -> dict[str, Tensor]:
        """The estimate, as tensors by name; empty before the first batch."""
        state = {"": self.value, "_trace": self.trace}
        return {name: value for name, value in state.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Tensor], vectors: Tensor | None) -> None:
        """Take over an estimate, and the eigenvectors of the basis that it belongs to, if any."""
        self.clear()
        value, trace = state.get(""), state.get("_trace")
        self.value, self.trace, self.probe = value, trace, None
        if value is not None and trace is not None:
            groups, width, rank = value.shape
            self.probe = orthonormal(groups, width, rank, value) if vectors is None else vectors
        self.release()

    def clear(self) -> None:
        """Forget the batch in flight."""
        self.sum = self._trace_sum = None


class DiagonalMoment(Moment):
    """That of one-hot rows, which is diagonal: how often each entry was looked up, ``(G, d)``.

    Its eigenvectors are the entries themselves, and none is kept.

    Attributes:
        seen: how many entries a batch looks up, a running average, ``(1,)``; None before the first.

    Args:
        width: ``d``, how many entries there are.
        dtype: what sums are kept in.
        storage: what the estimate is kept in between steps; None for ``dtype``.
    """

    make_basis = CoordinateBasis

    def __init__(self, width: int, dtype: torch.dtype, storage: torch.dtype | None) -> None:
        super().__init__(None, storage)
        self.width, self.dtype = width, dtype
        self.seen: Tensor | None = None

    def add(self, rows: Tensor, weights: Tensor | float) -> None:
        """Add ``Σ_n w_n Σ_t x_nt x_ntᵀ`` for the one-hot ``x`` of these entries, ``(G, N, T)``."""
        self.sum = counted(rows, weights, self._sum_on(rows.device))

    def _sum_on(self, device: torch.device) -> Tensor:
        if self.sum is None:
            return torch.zeros(1, self.width, dtype=self.dtype, device=device)
        return self.sum

    def sums(self, groups: int, width: int, like: Tensor) -> dict[str, Tensor]:
        return {"": self._sum_on(like.device).to(like.dtype)}

    def take_sums(self, sums: dict[str, Tensor]) -> None:
        self.sum = sums[""]

    def kept(self, width: int) -> int:
        return 0

    def values(self, width: int) -> int:
        return width

    def entries(self, width: int) -> int:
        return width

    def average(self, divisor: Tensor | float, past: Tensor | float) -> None:
        assert self.sum is not None
        new = self.sum / _for_columns(divisor)
        old = None if self.value is None or not self.held else self.value.to(new.dtype)
        self.value = averaged(old, new, _for_columns(past)).to(self.storage or new.dtype)
        self.seen = averaged(self.seen, (self.sum > 0).sum(dim=1).to(self.dtype), past)

    def active(self, width: int) -> Tensor | int:
        return width if self.seen is None else self.seen.clamp_min(1).squeeze(0)

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        return state if self.seen is None else state | {"_seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Tensor], vectors: Tensor | None) -> None:
        super().load_state_dict(state, vectors)
        self.seen = state.get("_seen")

    def blank(self, groups: int, width: int, like: Tensor) -> dict[str, Tensor]:
        value = like.new_zeros(1, width, dtype=self.storage)
        return {"": value, "_seen": like.new_zeros(1)}

    def add_identity(self, share: Tensor) -> None:
        assert self.value is not None
        self.value.add_((share / self.width)[:, None])

    def eigen(self) -> tuple[Tensor, Tensor] | None:
        """Eigenvalues ``(G, d)`` in the order of the entries, and no eigenvector; None if they
        can't be had."""
        assert self.value is not None
        value = self.value.to(wide(self.value.dtype))
        if not bool(torch.isfinite(value).all()):
            return None
        return value.clamp_min(0), value.new_empty(*value.shape, 0)


def _for_columns(value: Tensor | float) -> Tensor | float:
    return value[:, None] if isinstance(value, Tensor) and value.dim() else value


def _for_matrices(value: Tensor | float) -> Tensor | float:
    return value[:, None, None] if isinstance(value, Tensor) and value.dim() else value
