"""The second moment of one side of a layer: its running estimate, and what a basis needs of it."""

from __future__ import annotations

import torch
from torch import Tensor

from tekfac.linalg import eigh, leading, orthonormal
from tekfac.statistics import averaged, second_moment, sketched, square_norms, symmetric


class Moment:
    """A running second moment ``M``, ``(G, d, d)``, and the sum of the batch in flight.

    Of a wide side (wider than three times ``rank``) only ``M P`` is kept, with ``rank`` orthonormal
    columns in ``P``, and the trace. Averages are linear, so that nothing more is lost until the
    next refresh: that takes the leading eigenvectors from ``M P``, goes on with the matrix that
    they and one isotropic remainder stand for, and makes them the next ``P``.

    Args:
        rank: eigenvectors that are kept of a wide side; None for all.

    Attributes:
        value: ``(G, d, d)``, or ``M P``, ``(G, d, rank)``; None before the first batch.
        trace: ``(G,)`` along with ``M P``, else None.
        probe: ``P``, ``(G, d, rank)``, or None.
    """

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.value: Tensor | None = None
        self.trace: Tensor | None = None
        self.probe: Tensor | None = None
        self.sum: Tensor | None = None
        self._trace_sum: Tensor | None = None

    def add(self, rows: Tensor, weights: Tensor | float) -> None:
        """Add ``Σ_n w_n Σ_t x_nt x_ntᵀ`` to the batch's sum.

        Args:
            rows: ``(G, N, T, d)``.
            weights: one per example, ``(G, N)``, or one for all.
        """
        groups, width = rows.shape[0], rows.shape[3]
        if self.value is None and self.sum is None:
            self.probe = None
            if self.rank is not None and width > 3 * self.rank:
                self.probe = orthonormal(groups, width, self.rank, rows)
        if self.probe is None:
            self.sum = second_moment(rows, weights, self.sum)
        else:
            self.sum = sketched(rows, weights, self.probe, self.sum)
            trace = (square_norms(rows) * weights).sum(dim=1)
            self._trace_sum = trace if self._trace_sum is None else self._trace_sum.add_(trace)

    def finite(self) -> bool:
        """Whether the batch's sum is."""
        assert self.sum is not None
        return bool(torch.isfinite(self.sum).all())

    def average(self, divisor: Tensor | float, past: Tensor | float) -> None:
        """Average the batch's sum, divided by ``divisor``, in; both are numbers or ``(G,)``."""
        assert self.sum is not None
        new = symmetric(self.sum) if self.probe is None else self.sum
        new.div_(_for_matrices(divisor))
        self.value = averaged(self.value, new, _for_matrices(past))
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

        Where only the leading ones are kept there is one more value, the mean of all others.
        """
        assert self.value is not None
        if self.probe is None:
            return eigh(self.value)
        assert self.trace is not None
        found = leading(self.value, self.probe)
        if found is None:
            return None
        values, vectors = found
        others = vectors.shape[1] - vectors.shape[2]
        rest = ((self.trace - values.sum(dim=1)) / others).clamp_min(0)
        # On the new probe, the isotropic remainder does not act.
        self.probe, self.value = vectors, vectors * values[:, None]
        return torch.cat([values, rest[:, None]], dim=1), vectors

    def load_probe(self, vectors: Tensor) -> None:
        """Take a basis' vectors, which a loaded value belongs to."""
        self.probe = vectors if vectors.shape[2] < vectors.shape[1] else None

    def clear(self) -> None:
        """Forget the batch in flight."""
        self.sum = self._trace_sum = None


def _for_matrices(value: Tensor | float) -> Tensor | float:
    return value[:, None, None] if isinstance(value, Tensor) else value
