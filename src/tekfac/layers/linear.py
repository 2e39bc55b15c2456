"""Fully-connected layers: weights that rows are multiplied with."""

from __future__ import annotations

from torch import Tensor, nn

from tekfac.layers.layer import Form, Layer
from tekfac.layers.order import Order
from tekfac.numerics import square_norms


class LinearLayer(Layer):
    """A fully-connected layer; all leading dimensions are rows.

    Attributes:
        transposed: whether the parameter is ``Wᵀ``, ``(d_in, d_out)``, as in GPT-2's ``Conv1D``.
        order: in which order the parameter's dimensions make that matrix: all after the first are
            its columns, or heads come first, say.
    """

    def __init__(
        self,
        name: str,
        full: Tensor,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        transposed: bool = False,
        order: int = 0,
    ) -> None:
        self.transposed = transposed
        self.order = Order.of(order, full.dim())
        super().__init__(name, full, weight, bias)

    def turn(self) -> None:
        """Take the parameter for the other of ``W`` and ``Wᵀ``."""
        self.transposed = not self.transposed
        self._measure()

    @property
    def form(self) -> Form:
        return super().form._replace(turned=self.transposed, order=self.order.code)

    def resemble(
        self, shape: tuple[int, int], parameters: int, transposed: bool | None = None
    ) -> None:
        super().resemble(shape, parameters, transposed)
        if transposed is not None and transposed != self.transposed:
            self.turn()
        if shape != self.shape:
            self.turn()
            if shape != self.shape:
                self.turn()

    def _measure(self) -> None:
        rows, columns = self.order.sizes(self.full.shape)
        if self.transposed:
            rows, columns = columns, rows
        self.d_out = rows
        self.d_in = (columns if self.weight is not None else 0) + (self.bias is not None)

    def looked_up_rows(self, entries: Tensor, count: int, weights: Tensor | None) -> Tensor:
        """Rows that look these of ``count`` entries up when they are multiplied with the weight.

        Args:
            entries: their numbers, ``(R,)``, -1 for a row of zeros.
            count: how many entries there are.
            weights: for rows that are the sum of several, ``(R, L)`` like the numbers then, what
                each is multiplied with.
        """
        rows = entries.new_zeros(len(entries), count + 1, dtype=self.dtype)
        if weights is None:
            entries, weights = entries[:, None], rows.new_ones(len(entries), 1)
        return rows.scatter_add_(1, entries % (count + 1), weights.to(rows.dtype))[:, :count]

    def check_input(self, x: Tensor) -> None:
        self._check_width(x, x.shape[-1], self.d_in - (self.bias is not None))

    def _columns(self, weight: Tensor) -> Tensor:
        matrix = self.order.matrix(weight)
        return matrix.mT if self.transposed else matrix

    def _weight(self, columns: Tensor) -> Tensor:
        return self.order.weight(columns.mT if self.transposed else columns, self.full.shape)

    def _plain_weight(self, columns: Tensor) -> Tensor:
        return self._weight(columns)

    def _plain_columns(self, weight: Tensor) -> Tensor:
        return self._columns(weight)

    def _fill(self, target: Tensor, x: Tensor, seen: Tensor | None) -> None:
        rows = x.reshape(-1, x.shape[-1])
        target.copy_((rows if seen is None else rows[seen]).view(target.shape))

    def _norms(self, x: Tensor) -> Tensor:
        return square_norms(self._outputs(x))

    def _outputs(self, g: Tensor) -> Tensor:
        return g.reshape(1, g.shape[0], -1, g.shape[-1])
