"""What a layer saw: inputs and output gradients, taken from an unchanged training loop.

Forward hooks note each layer's input and the place of its output in the autograd graph. A hook on
the network's output runs when the user's own ``loss.backward()`` reaches it, and there has
autograd go through the user's graph, before that is freed, with labels from the model; ``.grad`` is
never touched. For the empirical Fisher the layers' outputs are listened to during the user's
backward pass itself. Either way a block gets its layer's output gradients as soon as they are
there, so that those of all layers are never held at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tekfac.capture.fisher import Fisher
from tekfac.layers import Layer, Sample

# Backward passes of our own, now running in this process: hooks that they reach, of any optimizer,
# are not to take them for the user's. Not thread-local: autograd runs hooks in its own threads.
_own_passes = 0

REENTRANT = (
    "curvature can't be measured through reentrant activation checkpointing: call "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
)


class Observer(Protocol):
    """Who wants to know what a layer saw: a curvature block."""

    @property
    def layer(self) -> Layer:
        """The layer."""

    @property
    def name(self) -> str:
        """The layer's name in the model."""

    @property
    def listening(self) -> bool:
        """Whether the coming step needs samples."""

    def observe(self, sample: Sample) -> None:
        """Take one backward pass."""


@dataclass
class _Call:
    """One call of a layer in a forward pass."""

    block: Observer
    input: Tensor | None
    rows: int
    edge: GradientEdge | None = None
    """Where the output is in the graph; None if it is the network's output itself."""
    gradient: Tensor | None = None
    given: bool = False
    """Whether a block has had it, and is not to get it from another backward pass."""


@dataclass(eq=False)
class _Pass:
    """One forward pass through the model."""

    calls: list[_Call] = field(default_factory=list)
    examples: int = 0
    first: bool = True
    """Whether the backward pass through it that is going on is the first."""


class Capture:
    """Hooks on a model that give its blocks their samples.

    Only forward passes through the model itself, of layers in training mode and with gradients
    enabled, are seen, and only by blocks that are `listening`.

    Args:
        model: what the training loop calls.
        blocks: the blocks by layer name; looked at in every pass.
        fisher: how labels are averaged over; None for the empirical Fisher.
        output: finds the tensor of logits (or means) in what the model returns.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, Observer],
        fisher: Fisher | None,
        output: Callable[[Any], Tensor],
    ) -> None:
        self.blocks = blocks
        self.fisher = fisher
        self.output = output
        self.passes = 0
        """Forward passes through the model so far in which a layer was captured."""
        self.without_grad: set[str] = set()
        """Layers that ran without gradients inside a forward pass that had them."""
        self._pass: _Pass | None = None
        self._waiting: dict[tuple[_Pass, str], list[_Call]] = {}
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            _drop_inert(module)
        for name, block in blocks.items():
            self._register(block.layer.module, "_after_layer", name)
        self._handles.append(model.register_forward_pre_hook(_Hook(self, "_before_model")))
        self._handles.append(
            model.register_forward_hook(_Hook(self, "_after_model"), always_call=True)
        )

    def close(self) -> None:
        """Remove all hooks. Harmless when done twice."""
        _remove(self._handles)
        self.discard()
        self._pass = None

    def flush(self) -> None:
        """Give the samples of layers of whose calls the backward pass has reached only some."""
        for key in list(self._waiting):
            self._give_waiting(*key)

    def discard(self) -> None:
        """Forget those samples."""
        self._waiting.clear()

    def _give_waiting(self, here: _Pass, name: str) -> None:
        calls = self._waiting.pop((here, name))
        self._give(calls, here)
        for call in calls:
            call.gradient = None
            if self.fisher is None:
                call.input, call.given = None, True

    def _register(self, module: nn.Module, method: str, name: str) -> None:
        hook = _Hook(self, method, name)
        # Before the model's own hook, should the model itself be a layer.
        self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def _before_model(self, module: nn.Module, args: Any) -> None:
        # What torch.func differentiates is somebody's own computation, not a step's loss.
        seen = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        self._pass = _Pass() if seen else None

    def _after_layer(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        block, here = self.blocks[name], self._pass
        if here is None or not (block.listening and module.training):
            return
        if not torch.is_grad_enabled():
            self.without_grad.add(name)
            return
        x = args[0] if args else kwargs["input"]
        block.layer.check_input(x)
        if not out.requires_grad:
            return
        seen = None if block.layer.weight is None else x.detach()
        call = _Call(block, seen, len(block.layer.batched(out)))
        here.calls.append(call)
        self._follow(here, call, out)

    # A hook put on a tensor inside a compiled graph would not run.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _follow(self, here: _Pass, call: _Call, out: Tensor) -> None:
        if self.fisher is None:
            out.register_hook(lambda gradient: self._overheard(here, call, gradient))
        else:
            call.edge = get_gradient_edge(out)

    def _after_model(self, module: nn.Module, args: Any, result: Any) -> None:
        here, self._pass = self._pass, None
        if here is None or not here.calls or result is None:  # None: the forward has failed
            return
        self.passes += 1
        if self.fisher is None:
            first = here.calls[0].rows
            here.examples = len(result) if _has_rows(result) else first
            return
        output = self.output(result)
        self.fisher.likelihood.check(output)
        here.examples = len(output)
        if output.requires_grad:
            values, edge = output.detach().clone(), get_gradient_edge(output)
            # The graph's last node must not be held by its own hook: the cycle would run through
            # autograd, where Python's collector can't see it, and the graph would never be freed.
            for call in here.calls:
                if call.edge is not None and call.edge.node is edge.node:
                    call.edge = None
            number = edge.output_nr
            output.register_hook(
                lambda gradient: self._differentiate(here, values, number, gradient)
            )

    def _overheard(self, here: _Pass, call: _Call, gradient: Tensor) -> None:
        """The user's backward pass has reached a layer's output (empirical Fisher)."""
        if not (_own_passes or call.given) and here.examples:
            self._received(here, call, gradient)

    def _received(self, here: _Pass, call: _Call, gradient: Tensor) -> None:
        """A layer's output gradient is there: hand it on if those of all its calls are."""
        call.gradient = gradient.detach()
        calls = [other for other in here.calls if other.block is call.block]
        self._waiting[here, call.block.name] = calls
        if all(other.gradient is not None for other in calls):
            self._give_waiting(here, call.block.name)

    def _differentiate(self, here: _Pass, values: Tensor, number: int, gradient: Tensor) -> None:
        """The user's backward pass has reached the network's output."""
        global _own_passes
        assert self.fisher is not None
        if _own_passes or not here.examples or not here.calls:
            return
        root = GradientEdge(torch._C._current_autograd_node(), number)
        nodes = [call.edge.node for call in here.calls if call.edge is not None]
        last = _last(root.node, nodes)
        used = self.fisher.likelihood.used(gradient)
        _own_passes += 1
        try:
            for draw, cotangent in enumerate(self.fisher.cotangents(values)):
                here.first = draw == 0
                cotangent = (cotangent if used is None else cotangent * used).to(values.dtype)
                self._go_through(here, root, last, cotangent)
                self.flush()
        finally:
            _own_passes -= 1
            here.calls = []  # once for each forward pass

    def _go_through(
        self, here: _Pass, root: GradientEdge, last: set[Node], cotangent: Tensor
    ) -> None:
        """A backward pass of our own through the user's graph, which is kept."""
        ends, handles = [], []
        try:
            for call in here.calls:
                if call.edge is None:
                    self._received(here, call, cotangent)
                elif call.edge.node in last:
                    ends.append((call, call.edge))
                else:
                    hook = partial(self._passed, here, call, call.edge.output_nr)
                    handles.append(call.edge.node.register_prehook(hook))
            edges = [edge for _, edge in ends]
            for (call, _), gradient in zip(ends, _gradients(root, edges, cotangent), strict=True):
                if gradient is not None:
                    self._received(here, call, gradient)
        finally:
            _remove(handles)

    def _passed(
        self, here: _Pass, call: _Call, number: int, gradients: tuple[Tensor | None, ...]
    ) -> None:
        """Our own backward pass is about to go through what made a layer's output."""
        gradient = gradients[number]
        if gradient is not None:
            self._received(here, call, gradient)

    def _give(self, calls: list[_Call], here: _Pass) -> None:
        """Hand a block the calls of its layer in one pass."""
        inputs: list[Tensor | None] = []
        outputs: list[Tensor] = []
        for call in calls:
            if call.gradient is not None:
                batched = call.block.layer.batched
                inputs.append(None if call.input is None else batched(call.input))
                outputs.append(batched(call.gradient))
        sample = Sample(inputs, outputs, here.examples, here.first)
        with torch.no_grad(), torch.autocast(outputs[0].device.type, enabled=False):
            calls[0].block.observe(sample)


def _last(root: Node, nodes: list[Node]) -> set[Node]:
    """Those of the nodes reached from the root from which no other of them is reached.

    Autograd that is asked for their gradients goes through all the others on its way.
    """
    wanted = set(nodes)
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
    """Gradients of layer outputs, from the user's graph, which is kept."""
    if not edges:
        return ()
    try:
        return torch.autograd.grad(root, edges, cotangent, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
        raise RuntimeError(REENTRANT) from error


def find_output(result: Any) -> Tensor:
    """The logits in what a model returned: itself, or its field ``.logits``.

    Raises:
        ValueError: if it is neither.
    """
    output = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model returned {type(result).__name__}, neither a tensor nor an object with a "
            "tensor in .logits: give output=, a function that finds the logits in it, e.g. "
            "output=lambda result: result[0]"
        )
    return output


def _has_rows(result: Any) -> bool:
    return isinstance(result, Tensor) and result.dim() > 0


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class _Hook:
    """A hook that does not keep its `Capture` alive, and does nothing in a copy of the model.

    A model's hooks go along when it is copied or saved; there, an inert function takes their place.
    """

    def __init__(self, capture: Capture, method: str, *args: str) -> None:
        self.capture = weakref.ref(capture)
        self.method = method
        self.args = args

    def __call__(self, *args: Any) -> None:
        capture = self.capture()
        if capture is not None:
            getattr(capture, self.method)(*self.args, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


def inert(*args: Any) -> None:
    """What stands for our hooks in a copied or saved model."""


def _make_inert() -> Callable[..., None]:
    return inert


def _drop_inert(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook is inert]:
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
