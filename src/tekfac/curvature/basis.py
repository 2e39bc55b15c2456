"""Eigenvectors and eigenvalues of a pair of factors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
        result = (rest * matrix).baddbmm_(columns, input.mT)
        return result.baddbmm_(output, (columns_rest - rest) * (output.mT @ matrix))

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


def _counts(vectors: Tensor, values: Tensor) -> Tensor:
    counts = values.new_ones(values.shape[1])
    if vectors.shape[2] < vectors.shape[1]:
        counts[-1] = vectors.shape[1] - vectors.shape[2]
    return counts
