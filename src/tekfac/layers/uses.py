"""Where a parameter is multiplied: nodes of the autograd graph, and what they saved.

A layer is found by its weight's *use*. Whatever module, function or view a product came from, the
graph has one node for it; what that saved is exactly what was multiplied, in the type in which it
was, and is there anyway. `product_of` reads a node, `View.of` follows an operand to the parameter.

A product that this file does not know is added by `register_product`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from tekfac.layers.geometry import Geometry
from tekfac.layers.order import Seen
from tekfac.layers.saved import (
    adds_up,
    axis_of,
    bag_weights,
    bags,
    entries,
    indexed,
    indexes_rows,
    sizes_of,
)


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


@dataclass(frozen=True)
class View:
    """A parameter as an operand sees it: perhaps turned, cast, flattened or a part of it.

    Args:
        parameter: the parameter.
        turned: whether its two dimensions have changed places.
        first: the first of its rows that the operand has.
        rows: how many; None for all.
        takers: the nodes that take the parameter on the way to the operand; none if it is that.
        made: where a function of the parameter is that takes its place (`made_of`), None for the
            parameter itself.
        inner: all nodes of that function.
        member: of a stack of matrices the number of that which is multiplied, `EACH` for each with
            rows of its own; None where the parameter is one matrix.
        order: in which order its dimensions make the matrix, as `Order.code`.
    """

    parameter: nn.Parameter
    turned: bool = False
    first: int = 0
    rows: int | None = None
    member: int | None = None
    takers: frozenset[Any] = frozenset()
    made: tuple[Any, int] | None = None
    inner: frozenset[Any] = frozenset()
    order: int = 0

    @classmethod
    def of(cls, edge: tuple[Any, int]) -> View | None:
        """The parameter behind an operand; None if there is none, or more than a view of one."""
        turned, first, rows, flat, member = False, 0, None, False, None
        node, number = edge
        last: Any = None
        while node is not None:
            name = node.name()
            if name == ACCUMULATE:
                takers = frozenset([] if last is None else [last])
                if member is not None:
                    if node.variable.dim() != 3:
                        return None
                    member %= len(node.variable)
                return cls(node.variable, turned, first, rows, member, takers)
            if name in TURNS or name == "PermuteBackward0":
                # From here on, rows are the parameter's columns.
                if rows is not None or flat or not _turns(node):
                    return None
                turned = not turned
            elif name in MEMBERS:
                if rows is not None or flat or member is not None or node._saved_dim != 0:
                    return None
                member = MEMBERS[name](node, number)
            elif name in SPLITS:
                if (
                    rows is not None
                    or member is not None
                    or node._saved_dim % len(sizes_of(node)) != 0
                ):
                    return None
                first, rows = SPLITS[name](node, number)
            elif name in FLATTENS:
                if sizes_of(node)[:1] != tuple(node._input_metadata[0].shape)[:1]:
                    return None
                flat = True
            elif name not in SAME:
                return None
            last = node
            node, number = node.next_functions[0]
        return None

    @classmethod
    def of_matrix(cls, edge: tuple[Any, int]) -> View | None:
        """The parameter behind an operand that is a matrix, a batch of the same one, or a stack.

        Whatever views, and copies in another order, lie between.
        """
        node: Any = edge[0]
        path: list[Any] = []
        while node is not None and node.name() in RESHAPES:
            path.append(node)
            node = node.next_functions[0][0]
        if node is None or node.name() != ACCUMULATE or node.variable.dim() < 2:
            return None
        p = node.variable
        seen = Seen(p.shape)
        if not all(RESHAPES[each.name()](each, seen) for each in reversed(path)):
            return None
        takers = frozenset(path[-1:])
        if (turned := seen.stack()) is not None:
            return cls(p, turned, member=EACH, takers=takers)
        if (found := seen.matrix()) is not None:
            return cls(p, found[0], takers=takers, order=found[1].code)
        return None

    @classmethod
    def made_of(cls, edge: tuple[Any, int], known: Collection[nn.Parameter]) -> View | None:
        """A parameter that an operand is a function of, of the same shape: normalised, say.

        There must be a way from the one to the other on which nothing is multiplied as a matrix:
        what an orthogonal parametrization makes has little to do with its parameter's rows.

        Args:
            edge: the operand.
            known: parameters that may be meant.
        """
        node, number = edge
        turned = node is not None and node.name() in TURNS and _turns(node)
        if turned:
            node, number = node.next_functions[0]
        inner = _function(node)
        if inner is None:
            return None
        shape = tuple(node._input_metadata[number].shape)
        taken: dict[nn.Parameter, set[Any]] = {}
        for each in inner:
            for child, _ in each.next_functions:
                if child is not None and child.name() == ACCUMULATE:
                    taken.setdefault(child.variable, set()).add(each)
        reached = _reached(node, {each for each in inner if not multiplies(each.name())})
        found = [
            p
            for p, nodes in taken.items()
            if tuple(p.shape) == shape and p in known and not reached.isdisjoint(nodes)
        ]
        if len(found) != 1:
            return None
        own = frozenset(taken[found[0]])
        return cls(found[0], turned, takers=own, made=(node, number), inner=frozenset(inner))


# All members of a stack.
EACH = -1

ACCUMULATE = "torch::autograd::AccumulateGrad"
SAME = {"ToCopyBackward0", "AliasBackward0", "CloneBackward0", "DetachBackward0"}
TURNS = {"TBackward0", "NumpyTBackward0", "TransposeBackward0"}
FLATTENS = {
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    *(f"SqueezeBackward{overload}" for overload in range(3)),
}


def _reshape(node: Any, seen: Seen) -> bool:
    return seen.reshape(tuple(node._input_metadata[0].shape))


def _transpose(node: Any, seen: Seen) -> bool:
    order = [*range(len(seen.dims))]
    one, other = axis_of(node._saved_dim0), axis_of(node._saved_dim1)
    order[one], order[other] = order[other], order[one]
    return seen.permute(order)


# Nodes that show a tensor in another form: each changes what is seen, and says whether that could
# be followed.
RESHAPES: dict[str, Callable[[Any, Seen], bool]] = {
    **dict.fromkeys(SAME, lambda node, seen: True),
    **dict.fromkeys([*FLATTENS, "UnsqueezeBackward0"], _reshape),
    **dict.fromkeys(
        ["TBackward0", "NumpyTBackward0"],
        lambda node, seen: seen.permute(range(len(seen.dims))[::-1]),
    ),
    "TransposeBackward0": _transpose,
    "PermuteBackward0": lambda node, seen: seen.permute([*map(axis_of, node._saved_dims)]),
    "ExpandBackward0": lambda node, seen: seen.expand(tuple(node._input_metadata[0].shape)),
}


# Nodes of a function that makes a weight; what has more is made of the model's input.
FUNCTION = 64


def _function(node: Any) -> set[Any] | None:
    """All nodes behind one, parameters left out; None if these are many."""
    seen = _reached(node, None)
    return None if not seen or len(seen) > FUNCTION else seen


def _reached(node: Any, among: set[Any] | None) -> set[Any]:
    """The nodes behind one, with it, on ways through some only; of too many only the first."""
    seen: set[Any] = set()
    open_nodes = deque([node])
    while open_nodes and len(seen) <= FUNCTION:
        node = open_nodes.popleft()
        if node is None or node in seen or node.name() == ACCUMULATE:
            continue
        if among is None or node in among:
            seen.add(node)
            open_nodes.extend(child for child, _ in node.next_functions)
    return seen


def multiplies(kind: str) -> bool:
    """Whether a node of this name is a product of matrices, known or not."""
    return any(part in kind for part in ("mm", "Mm", "Mv", "mv", "Convolution", "Linear", "Rnn"))


def _turns(node: Any) -> bool:
    """Whether a permutation is that of a matrix's two dimensions, or those of all in a stack."""
    dims = len(node._input_metadata[0].shape)
    if node.name() == "PermuteBackward0":
        return tuple(dim % dims for dim in map(axis_of, node._saved_dims)) in ((1, 0), (0, 2, 1))
    if dims == 3 and node.name() == "TransposeBackward0":
        return {axis_of(node._saved_dim0) % 3, axis_of(node._saved_dim1) % 3} == {1, 2}
    return dims == 2


def _slice(node: Any, number: int) -> tuple[int, int | None]:
    size = sizes_of(node)[0]
    start = node._saved_start % size if node._saved_start < 0 else min(node._saved_start, size)
    return start, node._input_metadata[0].shape[0]


def _split(node: Any, number: int) -> tuple[int, int | None]:
    return node._saved_split_size * number, node._input_metadata[number].shape[0]


def _split_with_sizes(node: Any, number: int) -> tuple[int, int | None]:
    sizes = node._saved_split_sizes
    return sum(sizes[:number]), sizes[number]


SPLITS: dict[str, Callable[[Any, int], tuple[int, int | None]]] = {
    "SliceBackward0": _slice,
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split_with_sizes,
}


# Nodes that take one matrix out of a stack, and its number.
MEMBERS: dict[str, Callable[[Any, int], int]] = {
    "SelectBackward0": lambda node, number: axis_of(node._saved_index),
    "UnbindBackward0": lambda node, number: number,
}


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
    if not found and made:
        for product in products:
            if not product.left and (view := View.made_of(edges[product.weight], made)):
                # Of the bias the gradient is not scaled as that of the weight is.
                found.append((product, view, None))
    return tuple(found)
