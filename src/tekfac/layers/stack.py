"""Stacks of matrices in one parameter, such as those of a mixture of experts."""

from __future__ import annotations

from torch import Tensor

from tekfac.layers.layer import Form
from tekfac.layers.linear import LinearLayer


class StackLayer(LinearLayer):
    """A parameter ``(E, d_out, d_in)``, or turned: ``E`` layers, each with a block of its own.

    Rows are ``(R, E, d)``: at each place one for each of them, of which some may not count.
    """

    apart = True

    @property
    def form(self) -> Form:
        return super().form._replace(stacked=1)

    def _measure(self) -> None:
        self.groups, rows, columns = self.full.shape
        self.d_out, self.d_in = (columns, rows) if self.transposed else (rows, columns)

    def _columns(self, weight: Tensor) -> Tensor:
        return (weight.mT if self.transposed else weight).reshape(self.shape[0], -1)

    def _weight(self, columns: Tensor) -> Tensor:
        matrices = columns.reshape(self.groups, self.d_out, self.d_in)
        return matrices.mT if self.transposed else matrices

    def _fill(self, target: Tensor, x: Tensor, seen: Tensor | None) -> None:
        rows = x if seen is None else x[seen]
        target.copy_(rows.movedim(1, 0).reshape(target.shape))

    def _outputs(self, g: Tensor) -> Tensor:
        return g.movedim(1, 0)[:, :, None]
