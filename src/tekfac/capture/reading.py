"""What a product's node in the graph shows of a layer: its input, and whose its gradient is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tekfac.layers import Geometry, Layer, LinearLayer, Product, View
from tekfac.layers.view import EACH
from tekfac.numerics import undivided


@dataclass(eq=False)
class Reading:
    """What there is to know of a product, without its place in the graph.

    Args:
        name: the layer's.
        layer: the layer.
        product: what kind of product.
        view: what it sees of the weight; None if that is not trained.
        transposed: whether it is a transposed convolution.
        geometry: how a convolution reads its input; None for a matrix product.
        input: what was multiplied, once `read_inputs` has been there.
        weights: where a row is the sum of several entries of a table, what each is multiplied with,
            ``(R, L)``, once `read_inputs` has been there.
        members: of which matrix of a stack each row is a factor, ``(R,)``, once `read_inputs` has
            been there; None where each of them has rows of its own, or the weight is no stack.
        biased: whether the layer's bias was added to it.
        scale: where a function of the weight was multiplied, what a row of the weight's gradient is
            longer by, ``(d_out,)``, once `read_scales` has been there.
    """

    name: str
    layer: Layer
    product: Product
    view: View | None
    transposed: bool
    geometry: Geometry | None = None
    input: Tensor | None = None
    weights: Tensor | None = None
    members: Tensor | None = None
    biased: bool = False
    scale: Tensor | None = None

    @property
    def swapped(self) -> bool:
        """Whether the matrix's columns see the gradient of this product and not its input."""
        if self.geometry is not None or self.view is None:
            return self.transposed
        # To the right of the rows there is Wᵀ: an unturned parameter is that.
        return (self.view.turned != self.product.right) != bool(self.layer.form.turned)

    @property
    def convolved(self) -> int:
        """In how many groups of channels the weight is convolved; 0 for a matrix product."""
        return 0 if self.geometry is None else self.geometry.groups

    @property
    def stacked(self) -> bool:
        """Whether the weight's first dimension counts matrices."""
        return self.view is not None and self.view.member is not None

    @property
    def order(self) -> int:
        """In which order the weight's dimensions make a matrix, as `Order.code`."""
        return 0 if self.view is None else self.view.order

    @property
    def plain(self) -> bool:
        """Whether the parameter's first dimension is the output's."""
        return not (self.swapped or self.layer.form.turned)

    def output_rows(self, gradient: Tensor) -> Tensor:
        """The product's output gradient, one row (or image) after the other."""
        if gradient.dim() == 1:
            gradient = gradient[None]
        elif self.product.left:
            gradient = gradient.mT
        if self.each:
            return gradient.transpose(0, 1)
        if self._cuts_outputs:
            # The other rows of the weight made nothing here.
            gradient = self._whole(gradient, 1 if self.geometry is not None else -1)
        if self.scale is not None:
            axes = gradient.dim() - 2 if self.geometry is not None else 0
            gradient = gradient * self.scale.to(gradient.dtype).reshape(-1, *[1] * axes)
        return gradient if self.geometry is not None else gradient.flatten(0, -2)

    def read(self, node: Any) -> Tensor | None:
        """The product's input as its node has saved it; None if it was not."""
        saved = self.product.input(node)
        if saved is None:
            return None
        x = undivided(saved.detach())
        if x.layout != torch.strided:  # a sparse matrix of inputs
            x = x.to_dense()
        if self.view is None or self.view.rows is None or self._cuts_outputs or self.product.lookup:
            return x
        # Of the other rows of an input-first weight the inputs are as good as zeros.
        if self.geometry is not None:
            return self._whole(x, 1)
        return self._whole(x, -2 if self.product.left and x.dim() > 1 else -1)

    def read_weights(self, node: Any) -> Tensor | None:
        """What each of a row's entries of a table is multiplied with, ``(R, L)``."""
        return None if self.product.weights is None else self.product.weights(node)

    def read_members(self, node: Any, rows: int) -> Tensor | None:
        """Of which matrix of a stack each row is a factor, ``(R,)``."""
        if self.view is None or self.view.member is None or self.each:
            return None
        if self.product.ends is None:
            return torch.full((rows,), self.view.member)
        ends = self.product.ends(node)
        return torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True)

    def input_rows(self) -> Tensor | None:
        """Its input likewise."""
        x = self.input
        if x is None or self.geometry is not None:
            return x
        if self.product.lookup:
            return self._looked_up(x)
        if x.dim() == 1:
            return x[None]
        x = x.mT if self.product.left else x
        return x.transpose(0, 1) if self.each else x.flatten(0, -2)

    @property
    def each(self) -> bool:
        """Whether all matrices of a stack are multiplied, each with rows of its own."""
        view = self.view
        return view is not None and view.member == EACH and self.product.ends is None

    @property
    def _cuts_outputs(self) -> bool:
        """Whether the product has some of the parameter's rows, and these are outputs."""
        view = self.view
        if view is None or view.rows is None:
            return False
        return (view.turned == self.product.right) != self.transposed

    def _whole(self, part: Tensor, dim: int) -> Tensor:
        """With zeros for the rows of the parameter that the product has not, along a dimension."""
        view = self.view
        assert view is not None
        assert view.rows is not None
        shape = list(part.shape)
        shape[dim] = len(view.parameter)
        whole = part.new_zeros(shape)
        whole.narrow(dim, view.first, view.rows).copy_(part)
        return whole

    def _looked_up(self, entries: Tensor) -> Tensor:
        assert self.view is not None
        assert isinstance(self.layer, LinearLayer)
        if not self._cuts_outputs:
            entries = entries.where(entries < 0, entries + self.view.first)
        count = self.view.parameter.shape[int(self.view.turned)]
        return self.layer.looked_up_rows(entries, count, self.weights)
