"""What a product's operand shows of a parameter: a view, a part, or a function of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from tekfac.layers.order import Seen
from tekfac.layers.saved import axis_of, sizes_of


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
            if name in TURNS:
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
        turned, node, number = _unturned(edge)
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

    @classmethod
    def normalised(cls, edge: tuple[Any, int]) -> View | None:
        """A matrix whose rows have been divided by their lengths, as metric learning has it.

        Whatever parameter it is: what is done to it is known.
        """
        turned, node, number = _unturned(edge)
        made, inner = (node, number), set()
        while node is not None and node.name() == "MulBackward0" and _by_number(node):
            inner.add(node)
            node = node.next_functions[0][0]
        if node is None or node.name() != "DivBackward0":
            return None
        (own, _), (length, _) = node.next_functions
        inner.add(node)
        takers = [node]
        while length is not None and length.name() in ("ExpandBackward0", "ClampMinBackward0"):
            inner.add(length)
            length = length.next_functions[0][0]
        if length is None or length.name() != "LinalgVectorNormBackward0":
            return None
        inner.add(length)
        takers.append(length)
        if own is None or own.name() != ACCUMULATE or length.next_functions[0][0] is not own:
            return None
        p = own.variable
        # Without dimensions it is the length of all of it.
        if p.dim() != 2 or [axis_of(dim) % 2 for dim in length._saved_dim or ()] != [1]:
            return None
        return cls(p, turned, takers=frozenset(takers), made=made, inner=frozenset(inner))


# All members of a stack.
EACH = -1

ACCUMULATE = "torch::autograd::AccumulateGrad"
SAME = {"ToCopyBackward0", "AliasBackward0", "CloneBackward0", "DetachBackward0"}
TURNS = {"TBackward0", "NumpyTBackward0", "TransposeBackward0", "PermuteBackward0"}
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


def _by_number(node: Any) -> bool:
    """Whether a product is with something that has no gradient."""
    return len(node.next_functions) < 2 or node.next_functions[1][0] is None


def _unturned(edge: tuple[Any, int]) -> tuple[bool, Any, int]:
    """Whether an operand is another, transposed, and that other one."""
    node, number = edge
    if node is None or node.name() not in TURNS or not _turns(node):
        return False, node, number
    return True, *node.next_functions[0]


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
