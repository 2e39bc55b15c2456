"""The user's autograd graph: which products it has, and going through it once more."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from tekfac.capture.reading import Reading
from tekfac.layers import Layer, StackLayer, View, product_of
from tekfac.layers.uses import nested
from tekfac.layers.view import ACCUMULATE, RESHAPES, SPLITS, multiplies
from tekfac.numerics import undivided
from tekfac.ranks.layout import on_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Our own backward passes, now running in this process: hooks that they reach, of any optimizer, are
# not to take them for the user's. Not thread-local: autograd runs hooks in its own threads.
_own_passes = 0

# What stands between a product and the shape in which its result is used.
VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}

FORMS = RESHAPES.keys() | SPLITS.keys() | {"SelectBackward0"}

# What is said of an autograd function that somebody wrote: it may be a product or not.
CUSTOM = " (a custom autograd function)"

REENTRANT = (
    "curvature can't be measured through reentrant activation checkpointing: call "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or in Hugging Face's models "
    'gradient_checkpointing_kwargs={"use_reentrant": False}'
)


def measuring() -> bool:
    """Whether a pass of an optimizer of this package is running: backward, with its own labels.

    Or forward, where `AdaptiveDamping` evaluates the loss again. Hooks of yours on modules and
    tensors run in it too; this tells it from your own ``loss.backward()``.
    """
    return _own_passes > 0


@contextmanager
def own_pass() -> Iterator[None]:
    """While this is entered, passes are ours."""
    global _own_passes
    _own_passes += 1
    try:
        yield
    finally:
        _own_passes -= 1


@dataclass(eq=False)
class Use:
    """One product with a layer's weight in the graph.

    Args:
        reading: what is to be known of it.
        node: where it is.
        lead: leading dimensions of the result as the model goes on with it: ``(N, T)`` of
            ``(N, T, d_out)``; ``(R,)`` if that is not known.
    """

    reading: Reading
    node: Node
    lead: tuple[int, ...]

    @property
    def name(self) -> str:
        """The layer's."""
        return self.reading.name

    @property
    def rows(self) -> int:
        """How many rows (or images) it has."""
        return math.prod(self.lead)


@dataclass
class Found:
    """What a search through the graph has found.

    Attributes:
        nodes: all that there are.
        uses: products with layers' weights.
        accumulators: the nodes that gather layers' parameters' gradients.
        strange: for a layer, the name of a node that uses its weight in another way, and what
            multiplies what that gives, if anything does.
        biases: layers whose bias was seen to be added to the product's own result.
        reentrant: whether there is a part that only runs in the backward pass.
        compiled: whether there is a part made by a compiler, which has no products to be seen.
    """

    nodes: set[Node] = field(default_factory=set)
    uses: list[Use] = field(default_factory=list)
    accumulators: dict[str, list[Any]] = field(default_factory=dict)
    strange: dict[str, str] = field(default_factory=dict)
    biases: set[str] = field(default_factory=set)
    reentrant: bool = False
    compiled: bool = False

    def counted(self) -> list[Use]:
        """Uses of layers to whose ``.grad`` the backward pass that is running adds something.

        Of a layer whose weight is used in another way, too, there are none: what the products make
        is not all that the weight does.
        """
        names = {name for name, nodes in self.accumulators.items() if any(map(_runs, nodes))}
        return [use for use in self.uses if use.name in names - self.strange.keys()]


def _runs(accumulator: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(accumulator))
    except RuntimeError:  # a leaf that autograd.grad was asked for: its .grad stays as it is
        return False


def search(
    root: Node,
    owner: Mapping[nn.Parameter, str],
    layers: Mapping[str, Layer],
    made: Collection[nn.Parameter] = (),
    leaves: Mapping[Tensor, nn.Parameter] = MappingProxyType({}),
) -> Found:
    """Look for products with layers' weights in all of the graph behind a node.

    Args:
        root: where to begin.
        owner: the layer that each parameter (leaf of the graph) belongs to.
        layers: those to look for, by name.
        made: weights in whose place a function of them may be multiplied.
        leaves: for leaves that stand in the place of layers' parameters, these.
    """
    seen = {root}
    found = Found(seen)
    open_nodes = [root]
    leads: dict[Node, tuple[int, ...]] = {}
    products: dict[Node, Use] = {}
    added: list[tuple[Node, View, Node]] = []
    # What takes a node's result, past nodes that only show it in another form.
    consumers: dict[Node, str] = {}
    # Which nodes take a parameter, and which of them are known to be on the way to a product.
    takers: dict[nn.Parameter, set[Node]] = {}
    explained: dict[nn.Parameter, set[Node]] = {}
    # What is multiplied on the way from a parameter to a function of it is no layer's product.
    inner: set[Node] = set()

    def explain(view: View, node: Node) -> None:
        explained.setdefault(view.parameter, set()).update(view.takers or {node})

    while open_nodes:
        node: Any = open_nodes.pop()
        kind = node.name()
        if kind == "CheckpointFunctionBackward":
            found.reentrant = True
        elif kind.startswith("CompiledFunction"):
            found.compiled = True
        edges = node.next_functions
        consumer = consumers.get(node, "") if kind in FORMS else _named(node)
        for use, bias in _uses(node, owner, layers, made):
            if not use.reading.each:
                use.lead = leads.get(node, use.lead)
            found.uses.append(use)
            products[node] = use
            if use.reading.view is not None:
                explain(use.reading.view, node)
                inner |= use.reading.view.inner
                # What else comes here is this layer's input, no weight of another layer's.
                consumer = ""
            if bias is not None:
                explain(bias, node)
                use.reading.biased = True
        if kind == "AddBackward0":
            for edge, (other, _) in (edges, edges[::-1]):
                view = View.of(edge)
                if view is not None and view.parameter.dim() == 1 and other is not None:
                    while other.name() in VIEWS:
                        other = other.next_functions[0][0]
                    added.append((node, view, other))
        shape = tuple(node._input_metadata[0].shape) if kind in VIEWS and not nested(node) else ()
        for child, _ in edges:
            if child is None:
                continue
            if child.name() == ACCUMULATE:
                takers.setdefault(child.variable, set()).add(node)
                name = owner.get(child.variable)
                if child not in seen and name is not None and name in layers:
                    found.accumulators.setdefault(name, []).append(child)
            elif child not in seen:
                open_nodes.append(child)
            seen.add(child)
            consumers.setdefault(child, consumer)
            if shape and not nested(child):
                leads.setdefault(child, _lead(child, shape))
    found.uses = [use for use in found.uses if use.node not in inner]
    for node, view, product in added:
        biased = products.get(product)
        if biased is not None and biased.name == owner.get(view.parameter):
            explain(view, node)
            biased.reading.biased = True
    found.biases = {use.name for use in found.uses if use.reading.biased}
    for parameter, nodes in takers.items():
        name = owner.get(parameter)
        others = nodes - explained.get(parameter, set())
        if name is not None and name in layers and others:
            own = leaves.get(parameter, parameter)
            if own is layers[name].bias:
                found.biases.discard(name)
            elif own is layers[name].weight:
                found.strange[name] = min(
                    f"{other.name()} before {consumers[other]}"
                    if multiplies(consumers.get(other, ""))
                    else _named(other)
                    for other in others
                )
    return found


def _lead(node: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the form in which a result is used, the dimensions that count its rows.

    The others may be several: heads, and what each has.
    """
    rows = math.prod(tuple(node._input_metadata[0].shape)[:-1])
    for dims in range(len(shape) - 1, 0, -1):
        if math.prod(shape[:dims]) == rows:
            return shape[:dims]
    return shape[:-1]


def _named(node: Any) -> str:
    """A kind of node in words."""
    name: str = node.name()
    if isinstance(node, BackwardCFunction):
        name += CUSTOM
    return f"{name} of a nested tensor" if nested(node) else name


def _uses(
    node: Node,
    owner: Mapping[nn.Parameter, str],
    layers: Mapping[str, Layer],
    made: Collection[nn.Parameter],
) -> Iterator[tuple[Use, View | None]]:
    for product, weight, bias in product_of(node, made):
        known = weight or bias
        assert known is not None
        name = owner.get(known.parameter)
        layer = layers.get(name) if name is not None else None
        if name is None or layer is None:
            continue
        geometry = None if product.geometry is None else product.geometry(node)
        if geometry is not None:
            # Some of a kernel's rows are not as many for each group of channels.
            cut = weight is not None and weight.rows is not None and geometry.groups > 1
            if cut or (weight is not None and weight.turned):
                continue
        elif weight is not None and weight.member is not None:
            if not isinstance(layer, StackLayer):
                continue
        elif product.lookup and layer.full.dim() > 2:
            # Each entry is a matrix: too wide for a block.
            continue
        metadata: Any = node
        shape = tuple(metadata._input_metadata[0].shape)
        lead = (*shape[:-2], *shape[-1:]) if product.left and len(shape) > 1 else shape[:-1] or (1,)
        if geometry is not None:
            lead = shape[:1]
        reading = Reading(name, layer, product, weight, product.transposed(node), geometry)
        if reading.each:
            lead = lead[1:]
        if weight is not None and weight.made is not None and not reading.plain:
            continue
        yield Use(reading, node, lead), bias


def read_inputs(uses: Collection[Use], kept: Collection[Use]) -> None:
    """Read what the graph has saved of each product.

    In a backward pass of its own: activation checkpointing gives what it recomputes only once in
    each, and the user's, and ours with the labels, want it too.

    Args:
        uses: the products.
        kept: those whose input is wanted here. Where ranks have parts of it, all have to read.
    """

    def read(gradient: Tensor) -> None:
        for use in uses:
            if use.reading.view is not None:
                x = use.reading.read(use.node)
                use.reading.input = x if use in kept else None
                use.reading.weights = use.reading.read_weights(use.node)
                use.reading.members = use.reading.read_members(use.node, use.rows)

    with own_pass(), torch.enable_grad():
        start = torch.zeros((), requires_grad=True)
        end = start * 1
        end.register_hook(read)
        torch.autograd.grad(end, start)


def read_scales(uses: Collection[Use]) -> None:
    """Find out how much longer a row's gradient is by a weight than by the function made of it.

    By the gradient of a random vector, the same in every run: what a function does to single
    directions (a standardised row has no mean) is left out.
    """
    made = {
        use.reading.view.parameter: use.reading.view
        for use in uses
        if use.reading.view is not None and use.reading.view.made is not None
    }
    if not made:
        return
    # A seed that no weight was drawn with.
    generator = torch.Generator().manual_seed(20111360900)
    edges, probes = [], []
    for p, view in made.items():
        assert view.made is not None
        edges.append(GradientEdge(*view.made))
        metadata = view.made[0]._input_metadata[view.made[1]]
        probe = torch.randn(p.shape, generator=generator)
        probes.append(probe.to(metadata.device, metadata.dtype))
    with own_pass():
        found = torch.autograd.grad(edges, list(made), probes, retain_graph=True)
    scales = {
        p: (gradient.flatten(1).norm(dim=1) / probe.flatten(1).norm(dim=1).to(gradient)).detach()
        for p, gradient, probe in zip(made, found, probes, strict=True)
    }
    for use in uses:
        if use.reading.view is not None and use.reading.view.made is not None:
            use.reading.scale = scales[use.reading.view.parameter]


@dataclass(frozen=True)
class Root:
    """Where our own backward passes begin.

    Args:
        edge: the place in the graph.
        mesh: that which the tensor made there is divided among; None if it is not.
    """

    edge: GradientEdge
    mesh: DeviceMesh | None

    def fitting(self, cotangent: Tensor) -> Tensor:
        """A cotangent as autograd takes it here."""
        node: Any = self.edge.node
        return on_mesh(cotangent.to(node._input_metadata[self.edge.output_nr].dtype), self.mesh)


def go_through(
    root: Root,
    cotangent: Tensor,
    uses: Collection[Use],
    received: Callable[[Use, Tensor], None],
) -> None:
    """A backward pass of our own through the user's graph, which is kept.

    Args:
        root: where it begins.
        cotangent: with what, whole.
        uses: products whose output gradients are wanted.
        received: gets each of them, whole, as soon as it is there.
    """
    start, cotangent = root.edge, root.fitting(cotangent)
    handles: list[RemovableHandle] = []
    last = _last(start.node, {use.node for use in uses})
    at_root = [use for use in uses if use.node is start.node]
    ends = [use for use in uses if use.node in last and use.node is not start.node]
    try:
        for use in uses:
            if use.node not in last and use.node is not start.node:
                handles.append(use.node.register_prehook(_Passed(use, received)))
        # Asked for, and not taken as it is: what a hook on the output does to it is done to all.
        for use in at_root:
            (gradient,) = _gradients(start, [GradientEdge(start.node, start.output_nr)], cotangent)
            assert gradient is not None
            received(use, undivided(gradient))
        edges = [GradientEdge(use.node, 0) for use in ends]
        for use, gradient in zip(ends, _gradients(start, edges, cotangent), strict=True):
            if gradient is not None:
                received(use, undivided(gradient))
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Passed:
    """Our own backward pass is about to go through a product."""

    use: Use
    received: Callable[[Use, Tensor], None]

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            self.received(self.use, undivided(gradients[0]))


def _last(root: Node, wanted: set[Node]) -> set[Node]:
    """Those of the nodes reached from the root from which no other of them is reached.

    Autograd that is asked for their gradients goes through all the others on its way.
    """
    leads: dict[Node, bool] = {}  # holds the nodes: one that nothing holds has no lasting identity
    open_nodes = [(root, False)]
    while open_nodes:
        node, done = open_nodes.pop()
        following = [other for other, _ in node.next_functions if other is not None]
        if done:
            leads[node] = any(other in wanted or leads[other] for other in following)
        elif node not in leads:
            leads[node] = False
            open_nodes.append((node, True))
            open_nodes += [(other, False) for other in following]
    return {node for node in wanted if node in leads and not leads[node]}


def _gradients(
    root: GradientEdge, edges: list[GradientEdge], cotangent: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients at these places of the user's graph, which is kept."""
    if not edges:
        return ()
    try:
        return torch.autograd.grad(root, edges, cotangent, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
        raise RuntimeError(REENTRANT) from error
