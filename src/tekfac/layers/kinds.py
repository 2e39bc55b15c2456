"""Of what kind a layer is: its first use may show another than its module let expect."""

from __future__ import annotations

from tekfac.layers.convolution import ConvLayer
from tekfac.layers.embedding import EmbeddingLayer
from tekfac.layers.geometry import Geometry
from tekfac.layers.layer import Form, Layer
from tekfac.layers.linear import LinearLayer
from tekfac.layers.stack import StackLayer


def as_used(layer: Layer, form: Form) -> Layer:
    """The layer, or the same of another kind, in this form.

    Args:
        layer: as it seemed, before anything was measured.
        form: as its first use shows it.
    """
    if layer.bias is not None and not form.bias:
        layer.without_bias()
    name, full, weight, bias = layer.name, layer.full, layer.weight, layer.bias
    if form.convolved:
        if layer.form.convolved != form.convolved:
            geometry = Geometry.plain(full.dim() - 2, form.convolved)
            layer = ConvLayer(name, full, weight, bias, geometry)
        return layer
    if isinstance(layer, ConvLayer) or (isinstance(layer, StackLayer) and not form.stacked):
        layer = LinearLayer(name, full, weight, bias, bool(layer.form.turned))
    assert isinstance(layer, LinearLayer)
    if form.looked_up != layer.looked_up:
        kind = EmbeddingLayer if form.looked_up else LinearLayer
        layer = kind(name, full, weight, bias, layer.transposed)
    if form.order != layer.form.order:
        layer = LinearLayer(name, full, weight, bias, layer.transposed, form.order)
    if form.turned != layer.transposed:
        layer.turn()
    return layer
