"""What is measured when the user's own ``loss.backward()`` reaches an output of the network.

There the autograd graph is looked through for products with layers' weights (`graph`), and gone
through once more, before it is freed, with labels from the model; ``.grad`` is never touched. For
the empirical Fisher the products are listened to during the user's backward pass itself. Either way
a block gets its layer's output gradients as soon as they are there, so that those of all layers are
never held at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tekfac import verdict
from tekfac.capture.delivery import Delivery, Expected
from tekfac.capture.doubts import doubt_of, is_no_softmax, is_rounding
from tekfac.capture.examples import Examples, Order, projected
from tekfac.capture.fisher import ExactFisher, Fisher
from tekfac.capture.graph import (
    Found,
    Root,
    Use,
    go_through,
    measuring,
    own_pass,
    read_inputs,
    read_scales,
    search,
)
from tekfac.capture.likelihoods import Categorical, Likelihood, is_open
from tekfac.capture.observer import Observer, cleared
from tekfac.capture.passes import Overheard, Pass
from tekfac.capture.places import identity
from tekfac.layers import Assignment, Form, as_used
from tekfac.numerics import undivided
from tekfac.ranks.fully_sharded import Leaves, sharded_parts, whole
from tekfac.ranks.group import check_same
from tekfac.ranks.ranks import Ranks


class Measuring:
    """The part of a `Capture` that runs in backward passes.

    Args:
        model: what the training loop calls.
        assignment: which parameters belong to which layer.
        blocks: the blocks by layer name; looked at in every pass.
        fisher: how labels are averaged over; None for the empirical Fisher.
        likelihoods: one for each output, or one for all.
        mean_over: "terms" or "examples".
        batch_dim: the dimension that counts examples; None to find out.
        chosen: whether a function of the user's finds the outputs.
        called: whether it is known already that the model itself is called.
        lane: the ranks that see the same batches.
    """

    def __init__(
        self,
        model: nn.Module,
        assignment: Assignment,
        blocks: Mapping[str, Observer],
        fisher: Fisher | None,
        likelihoods: Sequence[Likelihood],
        mean_over: str,
        batch_dim: int | None,
        chosen: bool,
        called: bool,
        lane: Ranks,
    ) -> None:
        self.owner, self.candidates = assignment.owner, assignment.candidates
        self.blocks, self.fisher, self.mean_over = blocks, fisher, mean_over
        self.likelihoods = likelihoods
        self.called, self._lane = called, lane
        self.passes = 0
        self.reentrant = self.compiled = False
        self.derived = self.plain = 0
        self.reached_layers: set[str] = set()
        self.strange: dict[str, str] = {}
        self.orders: dict[str, Order] = {}
        self.uncounted: set[int] = set()
        self._made_weights = dict.fromkeys(assignment.made)
        self._sharded_parts = sharded_parts(model)
        self.chosen = chosen
        self._examples = Examples(batch_dim)
        self._fitted: dict[tuple[tuple[str, int], int], Likelihood | None] = {}
        self._settled: set[str] = set()
        self._waiting: list[Delivery] = []
        self._task = -1
        self._behind: set[int] = set()
        self._handles: list[RemovableHandle] = []
        # Outputs that output= made, of the last forward pass, whose graph they hold.
        self._made: dict[int, Tensor] = {}

    def flush(self) -> None:
        """Give the samples of layers of whose calls the backward pass has reached only some."""
        for delivery in self._waiting:
            for name in list(delivery.calls):
                self._give(delivery, name)
        self._waiting.clear()

    def settle(self, names: Iterable[str]) -> None:
        """Take these layers for what they are by now, however they are seen to be used."""
        self._settled.update(names)

    def discard(self) -> None:
        """Forget those samples."""
        self._waiting.clear()
        self._made.clear()
        self.reached_layers.clear()

    def reached_behind(self, here: Pass, number: int, gradient: Tensor | None) -> None:
        """The user's backward pass has reached a tensor that an output was made of."""
        output = self._made.get(number)
        if output is not None and number not in here.done and not self._is_part(here, number):
            self.reached(here, number, get_gradient_edge(output), gradient)

    def reached(self, here: Pass, number: int, root: GradientEdge, gradient: Tensor | None) -> None:
        """The user's backward pass has reached an output of the network.

        Args:
            here: the forward pass that it came from.
            number: the output's.
            root: where it is in the graph.
            gradient: of the loss by it, or by the tensor of which it was made entry by entry; None
                if the loss is not made of either.
        """
        closed = not self._handles
        if closed or measuring() or number in here.done or self._is_part(here, number):
            return
        if not here.assigned:
            here.assign(self.likelihoods, check=self.fisher is not None)
        with whole(self._sharded_parts) as leaves:
            self._look(here, number, root, gradient, leaves)

    def _look(
        self,
        here: Pass,
        number: int,
        root: GradientEdge,
        gradient: Tensor | None,
        leaves: Leaves,
    ) -> None:
        """Look for products behind an output, and measure them."""
        layers = {name: block.layer for name, block in self.blocks.items()}
        found = search(
            root.node,
            leaves.standing_for(self.owner),
            layers,
            leaves.standing_for(self._made_weights),
            leaves.parameters,
        )
        self.reentrant |= found.reentrant
        self.compiled |= found.compiled
        kinds: dict[str, tuple[int, int, int]] = {}
        for use in found.uses:
            reading, name = use.reading, use.name
            looked_up = False
            if name in self._settled or not self.blocks[name].empty:
                # What was measured of a table is the curvature of lookups alone.
                looked_up = reading.layer.looked_up
                form = reading.layer.form
                kinds[name] = form.convolved, form.stacked, form.order
            as_seen = reading.convolved, int(reading.stacked), reading.order
            other = as_seen != kinds.setdefault(name, as_seen)
            if other or (looked_up and not reading.product.lookup):
                words = f"{use.node.name()} beside another kind of product"
                found.strange.setdefault(name, words if other else use.node.name())
        for name, kind in found.strange.items():
            self.strange.setdefault(name, kind)
        uses = found.counted()
        if not uses:
            # Nothing comes into `.grad`. Where it can be differentiated, something is made of it.
            if torch.is_grad_enabled() and number not in here.derived:
                here.derived.add(number)
                self.derived += len(here.outputs[number])
            return
        here.done.add(number)
        self.passes += 1
        self.plain += 0 if number in here.derived else len(here.outputs[number])
        self.reached_layers.update(use.name for use in uses)
        # Of a batch that is empty or not finite there is nothing to be learnt.
        output = here.outputs[number]
        gradient = None if gradient is None else undivided(gradient)
        seen = output if gradient is None else gradient
        check_same(self._lane, output)
        if not seen.numel():
            return
        if not verdict.waits(seen.device) and not bool(seen.isfinite().all()):
            return
        if not self._judges(here, number, gradient):
            return
        with torch.no_grad(), torch.autocast(seen.device.type, enabled=False):
            task = torch._C._current_graph_task_id()
            if task != self._task:
                self._task = task
                self._behind.clear()
                self._begin(leaves)
            if len(here.outputs) > 1 or not self.called:
                self._behind.update(map(identity, found.nodes))
            self._settle(found, uses)
            self._measure(here, number, Root(root, here.meshes[number]), gradient, uses)

    def _is_part(self, here: Pass, number: int) -> bool:
        """Whether what the backward pass has reached is no output, but what one was made of."""
        part = here.places[number][0] != ""
        if (part and self.called) or number in here.inner:
            return True
        if not part and self.chosen:
            return False
        node = torch._C._current_autograd_node()
        same = self._task == torch._C._current_graph_task_id()
        return same and identity(node) in self._behind

    def _begin(self, leaves: Leaves) -> None:
        """A backward pass begins: forget what came along with gradients that are gone by now."""
        pending = [block for block in self.blocks.values() if block.pending]
        gone = cleared([block.layer.parameters for block in pending], leaves)
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
            if name in self._settled:
                continue
            self._settled.add(name)
            if not self.blocks[name].empty:
                continue
            own = [other.reading for other in uses if other.name == name]
            # The bias of a transposed convolution is added where its gradient comes from.
            added = name in found.biases and not any(reading.transposed for reading in own)
            form = Form(
                bias=layer.bias is not None and (layer.weight is None or added),
                looked_up=all(reading.product.lookup for reading in own),
                turned=layer.form.turned,
                convolved=use.reading.convolved,
                stacked=use.reading.stacked,
                order=use.reading.order,
            )
            if not form.convolved and all(reading.swapped for reading in own):
                form = form._replace(turned=not form.turned)
            layer = as_used(layer, form)
            self.blocks[name].take(layer)
            for reading in own:
                reading.layer = layer

    def _measure(
        self,
        here: Pass,
        number: int,
        root: Root,
        gradient: Tensor | None,
        uses: list[Use],
    ) -> None:
        output = here.outputs[number]
        likelihood = self._fit(here, number, gradient)

        def projections(cotangent: Tensor, some: Sequence[Use]) -> list[Tensor | None]:
            rows: dict[Use, Tensor] = {}

            def received(use: Use, g: Tensor) -> None:
                rows[use] = projected(use.reading.output_rows(g.detach()))

            go_through(root, cotangent, some, received)
            return [rows.get(use) for use in some]

        class_dim = getattr(likelihood, "dim", None)
        with own_pass():
            grouping, orders = self._examples.find(output, class_dim, uses, projections)
        used = None
        if likelihood is not None and gradient is not None:
            used = likelihood.used(output, gradient)
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
            self._reach(root, grouping.restore(used.to(output).expand_as(output)), wanted)
        mine = {use: each for use, each in wanted.items() if self.blocks[use.name].observed}
        read_inputs(wanted, mine)
        read_scales(wanted)
        for use in mine:
            x = use.reading.input
            if x is not None and not use.reading.product.lookup and not use.reading.swapped:
                use.reading.layer.check_input(x.mT if use.reading.product.left else x)
        mask = None if used is None else used.flatten(1) if used.dim() > 1 else used[:, None]
        delivery = Delivery(len(output), mask, terms, frozenset(here.given))
        delivery.expect(mine.values())
        here.given |= {use.name for use in wanted}
        if self.fisher is None:
            self._waiting.append(delivery)
            self._listen(delivery, wanted, root, gradient)
            return
        assert likelihood is not None
        for draw, cotangent in enumerate(self.fisher.cotangents(likelihood, output)):
            delivery.first = draw == 0
            delivery.expect(mine.values())
            if used is not None:
                cotangent = cotangent * used
            cotangent = grouping.restore(cotangent * scale)
            with own_pass():
                go_through(
                    root,
                    cotangent,
                    list(wanted),
                    lambda use, g: self._received(delivery, wanted[use], g),
                )
            for name in list(delivery.calls):
                self._give(delivery, name)

    def _reach(self, root: Root, cotangent: Tensor, wanted: Mapping[Use, Expected]) -> None:
        """Note which rows any term looks at, where a draw has only some of the terms."""
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(cotangent.shape, generator=generator)
        cotangent = cotangent * weights.to(cotangent, non_blocking=True)

        def received(use: Use, g: Tensor) -> None:
            wanted[use].reached = (use.reading.output_rows(g.detach()) != 0).flatten(1).any(1)

        with own_pass():
            go_through(root, cotangent, list(wanted), received)

    def _fit(self, here: Pass, number: int, gradient: Tensor | None) -> Likelihood | None:
        """The likelihood of an output; None if it is not known, which "empirical" can bear."""
        given, output = here.likelihoods[number], here.outputs[number]
        if gradient is None:
            return given
        key = here.places[number], output.dim()
        if key in self._fitted:
            return self._fitted[key]
        fitted: Likelihood | None = None
        try:
            given.check(output)
            fitted = given.fitted(output, gradient)
        except ValueError:
            if self.fisher is not None:
                raise
            self.uncounted.add(number)
        if bool((gradient != 0).any()):
            self._fitted[key] = fitted
            words = ""
            if self.fisher is not None and is_open(given):
                words = doubt_of(output, gradient, getattr(fitted, "dim", -1))
            elif (
                isinstance(fitted, Categorical)
                and (dim := fitted.dim) is not None
                and is_no_softmax(output, gradient, dim)
            ):
                warnings.warn(
                    f"the gradient of the loss by the output of shape {tuple(output.shape)} does "
                    f"not even nearly sum to zero along dimension {dim}, as a "
                    "softmax's does: it holds no logits of classes there, and the curvature is not "
                    "that of this loss. Return logits (log-probabilities of the data's labels "
                    "alone are none), or give another likelihood, or output=",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if words:
                warnings.warn(
                    "the loss is no cross entropy of the model's output of shape "
                    f"{tuple(output.shape)} itself: {words}. The curvature is that of the output "
                    "as returned: make what the loss is of in the model, or in output=",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return fitted

    def _judges(self, here: Pass, number: int, gradient: Tensor | None) -> bool:
        """Whether there is a gradient by which an output can be judged, or nothing to be judged."""
        given, output = here.likelihoods[number], here.outputs[number]
        if gradient is None or (here.places[number], output.dim()) in self._fitted:
            return True
        if not is_open(given) or not is_rounding(gradient):
            return True
        try:
            given.fitted(output, gradient)
        except ValueError:
            return False
        return True

    def _listen(
        self,
        delivery: Delivery,
        wanted: Mapping[Use, Expected],
        root: Root,
        gradient: Tensor | None,
    ) -> None:
        """Have the user's own backward pass give what it brings (empirical Fisher)."""
        here = torch._C._current_autograd_node()
        for use, product in wanted.items():
            if use.node is root.edge.node is here and gradient is not None:
                self._received(delivery, product, gradient)
            else:
                use.node.register_prehook(Overheard(self, delivery, product))

    def overheard(self, delivery: Delivery, product: Expected, gradient: Tensor) -> None:
        """The user's backward pass has reached a product (empirical Fisher)."""
        if measuring():
            return
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            gradient = undivided(gradient.detach())  # by all ranks, whoever waits for it
            if delivery in self._waiting:
                self._received(delivery, product, gradient)

    def _received(self, delivery: Delivery, product: Expected, gradient: Tensor) -> None:
        """A product's output gradient is there: hand it on if those of all its layer's are."""
        if product.reading.name in delivery.calls and delivery.received(product, gradient):
            self._give(delivery, product.reading.name)

    def _give(self, delivery: Delivery, name: str) -> None:
        """Hand a block the calls of its layer in one pass, as far as they were reached."""
        for sample in delivery.samples(name):
            device = sample.gradients[0].device.type
            with torch.no_grad(), torch.autocast(device, enabled=False):
                self.blocks[name].observe(sample)
