"""Where a parameter is multiplied: nodes of the autograd graph, and what they saved.

A layer is found by its weight's *use*. Whatever module, function or view a product came from, the
graph has one node for it; what that saved is exactly what was multiplied, in the type in which it
was, and is there anyway. `product_of` reads a node, `View.of` follows an operand to the parameter.

A product that this file does not know is added by `register_product`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from tekfac.layers.geometry import Geometry
from tekfac.layers.saved import (
    adds_up,
    bag_weights,
    bags,
    entries,
    indexed,
    indexes_rows,
    sizes_of,
)
from tekfac.layers.view import View


@dataclass(frozen=True)
class Product:
    """How a kind of node multiplies one of its operands, taken for the weight.

    Args:
        weight: the operand's number.
        bias: that of what is added to each row, None for nothing.
        input: gives the other operand, as it was saved.
        lookup: whether it is one-hot rows, given as the numbers of the entries, ``(R,)``, -1 for a
            row of zeros.
        right: whether the weight stands to the right as ``Wᵀ`` (``d_in × d_out``).
        left: whether it stands to the left as ``W``, and inputs are columns.
        geometry: gives a convolution's; None for a matrix product.
        transposed: whether a convolution is a transposed one.
        batched: whether it multiplies a batch of matrices, each with its own rows.
        fits: whether a node of the kind is such a product at all.
        ends: where those of each matrix end, ``(E,)``, if they lie one after the other, ``(R, d)``.
        weights: where a row is the sum of up to ``L`` looked up ones, what each is multiplied with,
            ``(R, L)``, as the numbers of the entries are then.
    """

    weight: int
    bias: int | None
    input: Callable[[Any], Tensor | None]
    lookup: bool = False
    right: bool = False
    left: bool = False
    geometry: Callable[[Any], Geometry] | None = None
    transposed: Callable[[Any], bool] = lambda node: False
    batched: bool = False
    fits: Callable[[Any], bool] = lambda node: True
    ends: Callable[[Any], Tensor] | None = None
    weights: Callable[[Any], Tensor] | None = None


def _geometry(node: Any) -> Geometry:
    axes = len(node._input_metadata[0].shape) - 2

    def each(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values) * (axes if len(values) == 1 else 1)  # one may stand for all

    return Geometry(
        each(node._saved_stride),
        each(node._saved_padding),
        each(node._saved_dilation),
        int(node._saved_groups),
    )


PRODUCTS: dict[str, tuple[Product, ...]] = {
    "AddmmBackward0": (
        Product(2, 0, lambda node: node._saved_mat1, right=True),
        Product(1, None, lambda node: node._saved_mat2, left=True),
    ),
    "MmBackward0": (
        Product(1, None, lambda node: node._saved_self, right=True),
        Product(0, None, lambda node: node._saved_mat2, left=True),
    ),
    # One matrix for the whole batch of them, as `torch.einsum` multiplies, or one for each.
    "BmmBackward0": (
        Product(1, None, lambda node: node._saved_self, right=True, batched=True),
        Product(0, None, lambda node: node._saved_mat2, left=True, batched=True),
    ),
    "BaddbmmBackward0": (
        Product(2, None, lambda node: node._saved_batch1, right=True, batched=True),
        Product(1, None, lambda node: node._saved_batch2, left=True, batched=True),
    ),
    "GroupedMmBackward0": (
        Product(
            1,
            None,
            lambda node: node._saved_self,
            right=True,
            batched=True,
            ends=lambda node: node._saved_offs,
        ),
    ),
    "AddmvBackward0": (Product(1, 0, lambda node: node._saved_vec, left=True),),
    "MvBackward0": (Product(0, None, lambda node: node._saved_vec, left=True),),
    "EmbeddingBackward0": (
        Product(
            0,
            None,
            entries,
            right=True,
            lookup=True,
            # What it gives the table then is no gradient of the loss.
            fits=lambda node: not node._saved_scale_grad_by_freq,
        ),
    ),
    "EmbeddingBagBackward0": (
        Product(
            0,
            None,
            bags,
            right=True,
            lookup=True,
            weights=bag_weights,
            fits=adds_up,
        ),
    ),
    # A parameter that is indexed is a table, too.
    "IndexBackward0": (Product(0, None, indexed, right=True, lookup=True, fits=indexes_rows),),
    "IndexSelectBackward0": (
        Product(
            0,
            None,
            lambda node: node._saved_index.flatten() % sizes_of(node)[0],
            right=True,
            lookup=True,
            fits=lambda node: node._saved_dim == 0 and len(sizes_of(node)) > 1,
        ),
    ),
    # Where a device has a kernel of its own for the whole layer.
    "LinearBackward0": (Product(1, 2, lambda node: node._saved_input),),
    "ConvolutionBackward0": (
        Product(
            1,
            2,
            lambda node: node._saved_input,
            geometry=_geometry,
            transposed=lambda node: bool(node._saved_transposed),
        ),
    ),
}


def register_product(node: str, *products: Product) -> None:
    """Teach the package a kind of node, such as that of an autograd function of one's own.

    Args:
        node: its name in the graph, ``tensor.grad_fn.name()``.
        products: one for each operand that may be a weight.
    """
    PRODUCTS[node] = products


def nested(node: Any) -> bool:
    """Whether a node's result is a nested tensor, which has no rows that could be counted."""
    metadata = node._input_metadata
    return any(
        each.is_nested_tensor or any(not isinstance(n, int) for n in each.shape)
        for each in metadata[:1]
    )


def _complex(edge: tuple[Any, int]) -> bool:
    """Whether an operand is complex: of a real parameter it shows only half of what it does."""
    node, number = edge
    return node is not None and bool(node._input_metadata[number].dtype.is_complex)


def product_of(
    node: Node, made: Collection[nn.Parameter] = ()
) -> tuple[tuple[Product, View | None, View | None], ...]:
    """The products that a node may be: each with its weight and bias, where these are parameters.

    The bias of a frozen weight counts too: then there is no view of the weight.

    Args:
        node: the node.
        made: parameters in whose place a function of them may be multiplied.
    """
    found: list[tuple[Product, View | None, View | None]] = []
    edges = node.next_functions
    products = [
        product
        for product in PRODUCTS.get(node.name(), ())
        if product.fits(node) and not nested(node) and not _complex(edges[product.weight])
    ]
    for product in products:
        weight = None if product.batched else View.of(edges[product.weight])
        if weight is None and product.geometry is None:
            weight = View.of_matrix(edges[product.weight])
        bias = None if product.bias is None else View.of(edges[product.bias])
        frozen = edges[product.weight][0] is None
        if weight is not None or (bias is not None and frozen):
            found.append((product, weight, bias))
    for product in products if not found else ():
        if product.left:
            continue
        edge = edges[product.weight]
        view = View.normalised(edge) or (View.made_of(edge, made) if made else None)
        if view is not None:
            # Of the bias the gradient is not scaled as that of the weight is.
            found.append((product, view, None))
    return tuple(found)
