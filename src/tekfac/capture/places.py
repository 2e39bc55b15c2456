"""Places in the autograd graph: where a tensor was made, and what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

PARALLEL_SINK = "_DDPSinkBackward"


def behind(output: Tensor, tensors: Collection[Tensor]) -> list[Tensor]:
    """Those of some tensors that an output is made of, nothing between."""
    places: dict[tuple[Node, int], Tensor] = {}
    for tensor in tensors:
        edge = get_gradient_edge(tensor)
        places[edge.node, edge.output_nr] = tensor
    start = get_gradient_edge(output)
    reached = nearest([(start.node, start.output_nr)], places.__contains__)
    found = {id(places[edge]): places[edge] for edge in reached}
    return list(found.values())


def nearest(
    edges: Iterable[tuple[Node | None, int]], known: Callable[[tuple[Node, int]], bool]
) -> list[tuple[Node, int]]:
    """The known places that are reached from some in the graph, with nothing known between."""
    found: list[tuple[Node, int]] = []
    seen: set[tuple[Node, int]] = set()
    open_edges = [(node, number) for node, number in edges if node is not None]
    while open_edges:
        edge_of = open_edges.pop()
        if known(edge_of):
            found.append(edge_of)
        elif edge_of not in seen:
            seen.add(edge_of)
            open_edges += [(n, i) for n, i in edge_of[0].next_functions if n is not None]
    return found


def identity(node: Any) -> int:
    """What tells a node from others without keeping it, and with it the graph, alive."""
    number: int = node._sequence_nr()
    return number


def source_of(output: Tensor) -> GradientEdge:
    """Where in the graph an output was made, before it was only cast or passed on.

    A wrapper's ``.float()`` may be off the way that the loss takes; what it cast is on it. And
    `DistributedDataParallel` has outputs go through a node that must see the user's passes only.
    """
    return made_at(get_gradient_edge(output))


def made_at(edge: GradientEdge) -> GradientEdge:
    """`source_of`, by a place in the graph."""
    while edge.node.name() in ("ToCopyBackward0", PARALLEL_SINK):
        # The sink passes all outputs on, each in its place.
        place = edge.output_nr if edge.node.name() == PARALLEL_SINK else 0
        before, number = edge.node.next_functions[place]
        if before is None:
            break
        edge = GradientEdge(before, number)
    return edge
