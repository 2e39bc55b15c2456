"""Fully-connected layers."""

from __future__ import annotations

from torch import Tensor, nn

from tekfac.layers.layer import Layer
from tekfac.layers.registry import register
from tekfac.numerics import square_norms


@register(nn.Linear)
class LinearLayer(Layer):
    """A fully-connected layer; leading dimensions after the first are positions."""

    def batched(self, x: Tensor) -> Tensor:
        return x[None] if x.dim() == 1 else x

    def _width(self, x: Tensor) -> int:
        return x.shape[-1]

    def _expected_width(self) -> int:
        return self.d_in - (self.bias is not None)

    def _fill(self, target: Tensor, x: Tensor, seen: Tensor | None) -> None:
        rows = x.reshape(-1, x.shape[-1])
        target.copy_((rows if seen is None else rows[seen]).view(target.shape))

    def _norms(self, x: Tensor) -> Tensor:
        return square_norms(self._outputs(x))

    def _outputs(self, g: Tensor) -> Tensor:
        return g.reshape(1, g.shape[0], -1, g.shape[-1])
