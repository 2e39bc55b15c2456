"""Eigenvectors and eigenvalues of a pair of factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tekfac.curvature.linalg import completed
from tekfac.curvature.statistics import (
    carried_over,
    overlap,
    rotates_rows,
    squared_gradients,
    squared_lookups,
    squared_rows,
)
from tekfac.layers import Layer, Sample


@dataclass
class Basis:
    """Eigenvectors (columns) and eigenvalues of a pair of factors.

    Of a wide factor there are only the leading ``k < d`` eigenvectors. All directions orthogonal to
    them share one eigenvalue, which comes last: there are ``k + 1`` values then.

    Args:
        input: ``U_in``, ``(G, d_in, k_in)``.
        output: ``U_out``, ``(G, d_out, k_out)``.
        input_values: ``(G, d_in)`` or ``(G, k_in + 1)``, not negative.
        output_values: ``(G, d_out)`` or ``(G, k_out + 1)``, not negative.
    """

    input: Tensor
    output: Tensor
    input_values: Tensor
    output_values: Tensor

    def __getstate__(self) -> dict[str, Tensor]:
        # Pickled or copied, a part of a joined tensor (see `Stack`) would take the whole with it.
        return {name: value.clone() for name, value in vars(self).items()}

    def apply(self, values: Tensor, matrix: Tensor) -> Tensor:
        """``U_out (values ∘ (U_outᵀ V U_in)) U_inᵀ``: what has these eigenvalues, times ``V``.

        Args:
            values: one for each pair of ``output_values`` and ``input_values``.
            matrix: ``V``, ``(G, d_out, d_in)``.
        """
        input, output = self.input.to(matrix.dtype), self.output.to(matrix.dtype)
        k_in, k_out = input.shape[2], output.shape[2]
        rows_rest, columns_rest = values[:, k_out:], values[:, :, k_in:]
        if k_out == output.shape[1]:
            rows = output.mT @ matrix
            if k_in == input.shape[1]:
                return output @ ((values * (rows @ input)) @ input.mT)
            leading = (values[:, :, :k_in] - columns_rest) * (rows @ input)
            return output @ (columns_rest * rows).baddbmm_(leading, input.mT)
        columns = matrix @ input
        both = output.mT @ columns
        if k_in == input.shape[1]:
            leading = (values[:, :k_out] - rows_rest) * both
            return (rows_rest * columns).baddbmm_(output, leading) @ input.mT
        # Of the four parts, leading or not on each side, all get what belongs to the last; what
        # the others have more, or less, is added. No product is of more than one wide side by k.
        rest, columns_rest = rows_rest[:, :, k_in:], columns_rest[:, :k_out]
        rows_rest = rows_rest[:, :, :k_in]
        leading = (values[:, :k_out, :k_in] - columns_rest - rows_rest + rest) * both
        columns = ((rows_rest - rest) * columns).baddbmm_(output, leading)
        rows = (columns_rest - rest) * (output.mT @ matrix)
        # Side by side: what is as large as the matrix is gone through once.
        return (rest * matrix).baddbmm_(
            torch.cat([columns, output], 2), torch.cat([input.mT, rows], 1)
        )

    def squares(
        self, layer: Layer, sample: Sample, dtype: torch.dtype | None, total: Tensor | None
    ) -> Tensor:
        """``Σ_n (U_outᵀ D_n U_in)^∘2`` of a sample.

        Args:
            layer: whose it is.
            sample: what it saw.
            dtype: what is multiplied; None for what `Layer.chunks` gives.
            total: what to add the sum to, in place.

        Returns:
            One for each pair of ``output_values`` and ``input_values``.
        """
        bases = self.input, self.output
        if rotates_rows(layer.positions(sample), *bases):
            for rows in layer.chunks(sample, dtype=dtype):
                bases = bases[0].to(rows.a.dtype), bases[1].to(rows.a.dtype)
                total = squared_rows(rows.a, rows.g, *bases, total)
        else:
            for gradients in layer.gradients(sample):
                gradients = gradients.to(dtype or gradients.dtype)
                bases = bases[0].to(gradients.dtype), bases[1].to(gradients.dtype)
                total = squared_gradients(gradients, *bases, total)
        assert total is not None
        return total

    def carry_over(self, scale: Tensor, new: Basis) -> Tensor:
        """A rescaling in this basis, in a new one (`statistics.carried_over`)."""
        sides = ((self.input, new.input), (self.output, new.output))
        return carried_over(
            scale, *(overlap(u.to(scale.dtype), v.to(scale.dtype)) for u, v in sides)
        )

    def whole(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As many eigenvectors of either side as it is wide, ``(G, d, d)``."""
        return completed(self.input.to(dtype)), completed(self.output.to(dtype))

    @property
    def input_counts(self) -> Tensor:
        """How many directions each of ``input_values`` stands for."""
        return _counts(self.input, self.input_values)

    @property
    def output_counts(self) -> Tensor:
        """How many directions each of ``output_values`` stands for."""
        return _counts(self.output, self.output_values)

    @property
    def counts(self) -> Tensor:
        """How many coordinates each pair of values stands for."""
        return self.output_counts[:, None] * self.input_counts


class CoordinateBasis(Basis):
    """A basis whose input side are the inputs' own entries: of a diagonal factor.

    ``input`` has no columns then, and ``input_values`` one for each entry.
    """

    def apply(self, values: Tensor, matrix: Tensor) -> Tensor:
        # Turned, as tables lie in memory.
        values, rows = values.mT, matrix.mT
        output = self.output.to(matrix.dtype)
        k_out = output.shape[2]
        if k_out == output.shape[1]:
            return (((rows @ output) * values) @ output.mT).mT
        rest = values[:, :, k_out:]
        leading = (values[:, :, :k_out] - rest) * (rows @ output)
        return (rest * rows).baddbmm_(leading, output.mT).mT

    def squares(
        self, layer: Layer, sample: Sample, dtype: torch.dtype | None, total: Tensor | None
    ) -> Tensor:
        if total is None:
            shape = 1, self.input_values.shape[1], self.output_values.shape[1]
            # Turned: what belongs to an entry lies together.
            total = self.input_values.new_zeros(shape).mT
        for rows in layer.chunks(sample, dtype=dtype):
            squared_lookups(rows.a, rows.g, self.output.to(rows.g.dtype), total.mT)
        return total

    def carry_over(self, scale: Tensor, new: Basis) -> Tensor:
        dtype = scale.dtype
        return overlap(self.output.to(dtype), new.output.to(dtype)).mT @ scale

    def whole(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        width = self.input_values.shape[1]
        entries = torch.eye(width, dtype=dtype, device=self.output.device)
        return entries[None], completed(self.output.to(dtype))

    @property
    def input_counts(self) -> Tensor:
        return torch.ones_like(self.input_values[0])


def _counts(vectors: Tensor, values: Tensor) -> Tensor:
    counts = values.new_ones(values.shape[1])
    if vectors.shape[2] < vectors.shape[1]:
        counts[-1] = vectors.shape[1] - vectors.shape[2]
    return counts
