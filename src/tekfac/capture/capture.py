"""What layers saw, taken from an unchanged training loop.

A hook on the network's output runs when the user's own ``loss.backward()`` reaches it. There the
autograd graph is looked through for products with layers' weights (`graph`), and gone through once
more, before it is freed, with labels from the model; ``.grad`` is never touched. For the empirical
Fisher the products are listened to during the user's backward pass itself. Either way a block gets
its layer's output gradients as soon as they are there, so that those of all layers are never held
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from tekfac import verdict
from tekfac.capture.compiled import stand_aside, stand_down
from tekfac.capture.delivery import Delivery, Expected
from tekfac.capture.examples import Examples, Order, projected
from tekfac.capture.fisher import ExactFisher, Fisher
from tekfac.capture.graph import (
    Found,
    Use,
    go_through,
    measuring,
    own_pass,
    read_inputs,
    search,
    source_of,
)
from tekfac.capture.hook import Hook, drop_inert
from tekfac.capture.likelihoods import Likelihood
from tekfac.layers import Assignment, ConvLayer, Layer, LinearLayer, Sample


class Observer(Protocol):
    """Who wants to know what a layer saw: a curvature block."""

    @property
    def layer(self) -> Layer:
        """The layer."""

    @property
    def listening(self) -> bool:
        """Whether the coming step needs samples."""

    @property
    def empty(self) -> bool:
        """Whether nothing is known yet."""

    @property
    def pending(self) -> bool:
        """Whether it has been given samples since the last step."""

    def observe(self, sample: Sample) -> None:
        """Take one backward pass."""

    def discard(self) -> None:
        """Forget what was given since the last step."""


@dataclass(eq=False)
class _Pass:
    """One forward pass through the model.

    Attributes:
        outputs: the tensors that likelihoods are about, without their graph.
        done: which of them a backward pass has reached.
        given: layers that have had a sample of this pass.
        terms: of the first output that was reached, 0-dimensional.
    """

    outputs: list[Tensor]
    done: set[int] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    terms: Tensor | None = None


class Capture:
    """Hooks on a model that give its blocks their samples.

    Only forward passes through the model itself, with gradients enabled, are seen, and only by
    blocks that are `listening`; of backward passes only those that leave something in ``.grad``.

    Args:
        model: what the training loop calls.
        assignment: which parameters belong to which layer.
        blocks: the blocks by layer name; looked at in every pass.
        fisher: how labels are averaged over; None for the empirical Fisher.
        likelihoods: one for each output, or one for all.
        outputs: finds the tensors of logits (or means) in what the model returns.
        mean_over: "terms" or "examples": what the user's loss, and the matrix, is a mean over.
        batch_dim: the dimension that counts examples in layers' inputs and in the output, where
            they have more than one before the last; None to find out.

    Attributes:
        passes: backward passes measured so far.
        reentrant: whether a part of the model was seen that only runs in the backward pass.
        compiled: whether the graph was seen to be a compiler's, which shows no products.
        reached_layers: those that a backward pass has reached since the last step.
        strange: for a layer, what was seen to use its weight in a way that is not known.
        orders: for a layer, how its rows were found to belong to examples.
        problem: what was wrong with what the model returned in evaluation mode.
        uncounted: outputs of which it is not known how many terms they have.
        missed: whether compilers stopped standing aside, for an evaluation, and no pass that a step
            could have been measured by was seen since.
    """

    def __init__(
        self,
        model: nn.Module,
        assignment: Assignment,
        blocks: Mapping[str, Observer],
        fisher: Fisher | None,
        likelihoods: Sequence[Likelihood],
        outputs: Callable[[Any], list[Tensor]],
        mean_over: str = "terms",
        batch_dim: int | None = None,
    ) -> None:
        self.owner, self.candidates = assignment.owner, assignment.candidates
        self.blocks, self.fisher = blocks, fisher
        self.likelihoods, self.outputs, self.mean_over = likelihoods, outputs, mean_over
        self.passes = 0
        self.reentrant = self.compiled = False
        self.problem: ValueError | None = None
        self.reached_layers: set[str] = set()
        self.strange: dict[str, str] = {}
        self.orders: dict[str, Order] = {}
        self.uncounted: set[int] = set()
        self.missed = self._late = False
        self._examples = Examples(batch_dim)
        self._fitted: dict[tuple[int, int], Likelihood | None] = {}
        self._settled: set[str] = set()
        self._waiting: list[Delivery] = []
        self._task = -1
        self._unfused = ExitStack()
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        for module in model.modules():
            drop_inert(module)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(Hook(self, "_before_model")),
            model.register_forward_hook(Hook(self, "_after_model"), always_call=True),
        ]

    def close(self) -> None:
        """Remove all hooks. Harmless when done twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.discard()
        stand_aside(self, False)

    def expect(self) -> None:
        """A step begins, and with it what its blocks want to know."""
        # An evaluation has made the last step miss what it was to measure: not this one, too.
        self._late, self.missed = self.missed, False
        self.resume()

    def resume(self) -> None:
        """The forward passes of the step are about to come."""
        stand_aside(self, any(block.listening for block in self.blocks.values()))

    def flush(self) -> None:
        """Give the samples of layers of whose calls the backward pass has reached only some."""
        for delivery in self._waiting:
            for name in list(delivery.calls):
                self._give(delivery, name)
        self._waiting.clear()

    def discard(self) -> None:
        """Forget those samples."""
        self._waiting.clear()
        self.reached_layers.clear()

    # -- forward -----------------------------------------------------------------------------------

    def _looks(self) -> bool:
        """Whether the forward pass that is running is one to be seen."""
        # What torch.func differentiates is somebody's own computation, not a step's loss.
        return (
            torch.is_grad_enabled()
            and not torch._C._are_functorch_transforms_active()
            and any(block.listening for block in self.blocks.values())
        )

    def _before_model(self, module: nn.Module, args: Any) -> None:
        self._unfused.close()
        if not torch.is_grad_enabled() and not self._late:
            # Training pauses, or is over: compilers need not stand aside for what is evaluated.
            self.missed |= stand_down(self)
        if not self._looks():
            return
        self.missed = False
        for name, candidate in self.candidates.items():
            if name in self.blocks:
                candidate.check(name)
        if self._recurrent:
            # Fused kernels of recurrent layers keep to themselves what they multiply.
            backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
            for backend in backends:
                self._unfused.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False

    def _after_model(self, module: nn.Module, args: Any, result: Any) -> None:
        self._unfused.close()
        if result is None or not self._looks():  # None: the forward has failed
            return
        try:
            self._note(result)
        except ValueError as error:
            if module.training:
                raise
            self.problem = error  # evaluation may do as it likes; a step will say it

    def _note(self, result: Any) -> None:
        """Wait for a backward pass from what the model returned."""
        found = self.outputs(result)
        if len(self.likelihoods) not in (1, len(found)):
            raise ValueError(
                f"{len(self.likelihoods)} likelihoods were given, but the model has {len(found)} "
                "outputs: give one for each, or output= to pick the right tensors"
            )
        here = _Pass([output.detach() for output in found])
        for number, output in enumerate(found):
            if self.fisher is not None:
                self._likelihood(number).check(output)
            if output.requires_grad:
                # What the user changes in place later is not what the labels are drawn from.
                here.outputs[number] = output.detach().clone()
                edge = source_of(output)
                edge.node.register_prehook(_Reached(self, here, number, edge.output_nr))

    def _likelihood(self, number: int) -> Likelihood:
        return self.likelihoods[number if len(self.likelihoods) > 1 else 0]

    # -- backward ----------------------------------------------------------------------------------

    def reached(self, here: _Pass, number: int, root: GradientEdge, gradient: Tensor) -> None:
        """The user's backward pass has reached an output of the network."""
        closed = not self._handles
        if closed or measuring() or number in here.done:
            return
        layers = {name: block.layer for name, block in self.blocks.items()}
        found = search(root.node, self.owner, layers)
        self.reentrant |= found.reentrant
        self.compiled |= found.compiled
        for name, kind in found.strange.items():
            self.strange.setdefault(name, kind)
        uses = found.counted()
        if not uses:
            return
        here.done.add(number)
        self.passes += 1
        self.reached_layers.update(use.name for use in uses)
        # Of a batch that is empty or not finite there is nothing to be learnt.
        if not gradient.numel():
            return
        if not verdict.waits(gradient.device) and not bool(gradient.isfinite().all()):
            return
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            task = torch._C._current_graph_task_id()
            if task != self._task:
                self._task = task
                self._begin()
            self._settle(found, uses)
            self._measure(here, number, root, gradient, uses)

    def _begin(self) -> None:
        """A backward pass begins: forget what came along with gradients that are gone by now."""
        pending = [block for block in self.blocks.values() if block.pending]
        gone = cleared([block.layer.parameters for block in pending])
        for block, without in zip(pending, gone, strict=True):
            if without:
                block.discard()
        if any(gone) or not pending:
            self._waiting.clear()
        self.flush()

    def _settle(self, found: Found, uses: Sequence[Use]) -> None:
        """Let layers be as they are seen to be used, the first time that they are."""
        for use in uses:
            layer, name = use.reading.layer, use.name
            if isinstance(layer, ConvLayer) and use.reading.product.geometry is not None:
                layer.geometry = use.reading.product.geometry(use.node)
            if name in self._settled:
                continue
            self._settled.add(name)
            if not self.blocks[name].empty:
                continue
            if isinstance(layer, LinearLayer) and all(
                other.reading.swapped for other in uses if other.name == name
            ):
                layer.turn()
            if layer.bias is not None and layer.weight is not None and name not in found.biases:
                layer.without_bias()

    def _measure(
        self,
        here: _Pass,
        number: int,
        root: GradientEdge,
        gradient: Tensor,
        uses: list[Use],
    ) -> None:
        output = here.outputs[number]
        likelihood = self._fit(number, output, gradient)

        def projections(cotangent: Tensor, some: Sequence[Use]) -> list[Tensor | None]:
            rows: dict[Use, Tensor] = {}

            def received(use: Use, g: Tensor) -> None:
                rows[use] = projected(use.reading.output_rows(g.detach()))

            go_through(root, cotangent.to(gradient.dtype), some, received)
            return [rows.get(use) for use in some]

        class_dim = getattr(likelihood, "dim", None)
        with own_pass():
            grouping, orders = self._examples.find(output, class_dim, uses, projections)
        used = None if likelihood is None else likelihood.used(output, gradient)
        output = grouping.arrange(output)
        used = None if used is None else grouping.arrange(used)
        terms = output.new_ones(len(output), dtype=torch.float64)
        if likelihood is not None:
            terms = likelihood.terms(output, used)
            if self.mean_over == "examples":
                terms = (terms > 0).double()
        scale: Tensor | float = 1.0
        if here.terms is None:
            here.terms = terms.sum()
        else:
            # Blocks divide by the terms of the first output; each output's mean counts alike.
            ratio = here.terms / terms.sum().clamp_min(1)
            scale, terms = ratio.sqrt(), terms * ratio
        wanted: dict[Use, Expected] = {}
        for use, order in zip(uses, orders, strict=True):
            self.orders[use.name] = order
            if self.blocks[use.name].listening:
                wanted[use] = Expected(use.reading, order)
        if used is not None and isinstance(self.fisher, ExactFisher):
            self._reach(root, grouping.restore(used.to(gradient.dtype).expand_as(output)), wanted)
        read_inputs(wanted)
        for use in wanted:
            x = use.reading.input
            if x is not None and not use.reading.swapped:
                use.reading.layer.check_input(x.mT if use.reading.product.left else x)
        mask = None if used is None else used.flatten(1) if used.dim() > 1 else used[:, None]
        delivery = Delivery(len(output), mask, terms, frozenset(here.given))
        delivery.expect(wanted.values())
        here.given |= {use.name for use in wanted}
        if self.fisher is None:
            self._waiting.append(delivery)
            self._listen(delivery, wanted, root, gradient)
            return
        assert likelihood is not None
        for draw, cotangent in enumerate(self.fisher.cotangents(likelihood, output)):
            delivery.first = draw == 0
            delivery.expect(wanted.values())
            if used is not None:
                cotangent = cotangent * used
            cotangent = grouping.restore(cotangent * scale).to(gradient.dtype)
            with own_pass():
                go_through(
                    root,
                    cotangent,
                    list(wanted),
                    lambda use, g: self._received(delivery, wanted[use], g),
                )
            for name in list(delivery.calls):
                self._give(delivery, name)

    def _reach(self, root: GradientEdge, cotangent: Tensor, wanted: Mapping[Use, Expected]) -> None:
        """Note which rows any term looks at, where a draw has only some of the terms."""
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(cotangent.shape, generator=generator)
        cotangent = cotangent * weights.to(cotangent, non_blocking=True)

        def received(use: Use, g: Tensor) -> None:
            wanted[use].reached = (use.reading.output_rows(g.detach()) != 0).flatten(1).any(1)

        with own_pass():
            go_through(root, cotangent, list(wanted), received)

    def _fit(self, number: int, output: Tensor, gradient: Tensor) -> Likelihood | None:
        """The likelihood of an output; None if it is not known, which "empirical" can bear."""
        key = number, output.dim()
        if key in self._fitted:
            return self._fitted[key]
        fitted: Likelihood | None = None
        try:
            self._likelihood(number).check(output)
            fitted = self._likelihood(number).fitted(output, gradient)
        except ValueError:
            if self.fisher is not None:
                raise
            self.uncounted.add(number)
        if bool((gradient != 0).any()):
            self._fitted[key] = fitted
        return fitted

    def _listen(
        self,
        delivery: Delivery,
        wanted: Mapping[Use, Expected],
        root: GradientEdge,
        gradient: Tensor,
    ) -> None:
        """Have the user's own backward pass give what it brings (empirical Fisher)."""
        for use, product in wanted.items():
            if use.node is root.node:
                self._received(delivery, product, gradient)
            else:
                use.node.register_prehook(_Overheard(self, delivery, product))

    def overheard(self, delivery: Delivery, product: Expected, gradient: Tensor) -> None:
        """The user's backward pass has reached a product (empirical Fisher)."""
        if not measuring() and delivery in self._waiting and product.reading.name in delivery.calls:
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                self._received(delivery, product, gradient)

    def _received(self, delivery: Delivery, product: Expected, gradient: Tensor) -> None:
        """A product's output gradient is there: hand it on if those of all its layer's are."""
        if delivery.received(product, gradient):
            self._give(delivery, product.reading.name)

    def _give(self, delivery: Delivery, name: str) -> None:
        """Hand a block the calls of its layer in one pass, as far as they were reached."""
        for sample in delivery.samples(name):
            device = sample.gradients[0].device.type
            with torch.no_grad(), torch.autocast(device, enabled=False):
                self.blocks[name].observe(sample)


@dataclass(eq=False)
class _Reached:
    """A hook on the node that made an output.

    It must not hold that node: the cycle would run through autograd, where Python's collector can't
    see it, and the graph would never be freed.
    """

    capture: Capture
    here: _Pass
    number: int
    place: int

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[self.place]
        if gradient is not None:
            root = GradientEdge(torch._C._current_autograd_node(), self.place)
            self.capture.reached(self.here, self.number, root, gradient)


@dataclass(eq=False)
class _Overheard:
    """A hook on a product that the user's backward pass is about to go through."""

    capture: Capture
    delivery: Delivery
    product: Expected

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            self.capture.overheard(self.delivery, self.product, gradients[0])


def cleared(layers: Sequence[Sequence[nn.Parameter]]) -> list[bool]:
    """Of which layers the gradients that were there are gone, by whoever cleared them."""
    left: dict[int, Tensor] = {}
    for number, parameters in enumerate(layers):
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            left[number] = torch.stack([grad.any().to(grads[0].device) for grad in grads]).any()
    if not left:
        return [True] * len(layers)
    # One look at the device for all of them.
    first = next(iter(left.values()))
    kept = torch.stack([each.to(first.device) for each in left.values()]).cpu().tolist()
    there = dict(zip(left, kept, strict=True))
    return [not there.get(number, False) for number in range(len(layers))]
