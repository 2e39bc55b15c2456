"""What layers saw, taken from an unchanged training loop.

A hook on the network's output runs when the user's own ``loss.backward()`` reaches it. There the
autograd graph is looked through for products with layers' weights (`graph`), and gone through once
more, before it is freed, with labels from the model; ``.grad`` is never touched. For the empirical
Fisher the products are listened to during the user's backward pass itself. Either way a block gets
its layer's output gradients as soon as they are there, so that those of all layers are never held
at once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tekfac import verdict
from tekfac.capture.compiled import stand_aside, stand_down
from tekfac.capture.delivery import Delivery, Expected
from tekfac.capture.examples import Examples, Order, projected
from tekfac.capture.fisher import ExactFisher, Fisher
from tekfac.capture.graph import (
    Found,
    Use,
    behind,
    go_through,
    made_at,
    measuring,
    own_pass,
    read_inputs,
    read_scales,
    search,
    source_of,
)
from tekfac.capture.hook import Hook, drop_inert
from tekfac.capture.likelihoods import Likelihood
from tekfac.capture.losses import fed_into, is_compared, losses_in
from tekfac.capture.observer import Observer, cleared
from tekfac.capture.outputs import find_outputs, tensors_of
from tekfac.capture.passes import Overheard, Pass, Reached, ReachedBehind, parts_of
from tekfac.checks import first_few
from tekfac.layers import Assignment, ConvLayer, LinearLayer, as_used
from tekfac.ranks.fully_sharded import Leaves, sharded_parts, whole
from tekfac.ranks.group import parallel_parts, running_parts

# Steps that were to measure a layer and did not see it, before that is said.
PATIENCE = 3


class Capture:
    """Hooks on a model that give its blocks their samples.

    Only forward passes through the model, with gradients enabled, are seen, and only by blocks that
    are `listening`; of backward passes only those that leave something in ``.grad``.

    A model that is never called itself is one whose parts are: a LightningModule, whose
    ``training_step`` calls ``self.net``. Then what the outermost calls of its parts return is taken
    for its outputs, as far as nothing that another of them returned is made of it.

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
        called: whether it is known already that the model itself is called.

    Attributes:
        passes: backward passes measured so far.
        reentrant: whether a part of the model was seen that only runs in the backward pass.
        compiled: whether the graph was seen to be a compiler's, which shows no products.
        reached_layers: those that a backward pass has reached since the last step.
        strange: for a layer, what was seen to use its weight in a way that is not known.
        orders: for a layer, how its rows were found to belong to examples.
        problem: what was wrong with what the model returned in evaluation mode.
        uncounted: outputs of which it is not known how many terms they have.
        called: whether the model itself was called, so that calls of its parts say nothing.
        missed: whether compilers stopped standing aside, for an evaluation, and no pass that a step
            could have been measured by was seen since.
        parallel: whether the model was seen to run within a `DistributedDataParallel`.
        uneven: whether that was seen to be one whose ranks may run out of batches.
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
        called: bool = False,
    ) -> None:
        self.owner, self.candidates = assignment.owner, assignment.candidates
        self._made_weights = dict.fromkeys(assignment.made)
        self.blocks, self.fisher = blocks, fisher
        self.likelihoods, self.outputs, self.mean_over = likelihoods, outputs, mean_over
        self.passes = 0
        self.reentrant = self.compiled = self.parallel = self.uneven = False
        self.problem: ValueError | None = None
        self.reached_layers: set[str] = set()
        self.strange: dict[str, str] = {}
        self.orders: dict[str, Order] = {}
        self.uncounted: set[int] = set()
        self.called = called
        self.missed = self._late = False
        self._chosen = outputs is not find_outputs
        self._examples = Examples(batch_dim)
        self._model = weakref.ref(model)
        self._unseen: dict[str, int] = {}
        self._told = False
        self._fitted: dict[tuple[tuple[str, int], int], Likelihood | None] = {}
        self._settled: set[str] = set()
        self._waiting: list[Delivery] = []
        self._task = -1
        self._behind: set[int] = set()
        self._parts: Pass | None = None
        self._outermost: nn.Module | None = None
        # Outputs that output= made, of the last forward pass, whose graph they hold.
        self._made: dict[int, Tensor] = {}
        self._unfused = ExitStack()
        self._parallel_parts = parallel_parts(model)
        self._sharded_parts = sharded_parts(model)
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        for module in model.modules():
            drop_inert(module)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(Hook(self, "_before_model")),
            model.register_forward_hook(Hook(self, "_after_model"), always_call=True),
        ]
        self._names = {} if called else parts_of(model, blocks)
        self._part_handles: list[RemovableHandle] = []
        for module in self._names:
            self._part_handles += [
                module.register_forward_pre_hook(Hook(self, "_before_part")),
                module.register_forward_hook(Hook(self, "_after_part"), always_call=True),
            ]

    def close(self) -> None:
        """Remove all hooks. Harmless when done twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._leave_parts()
        self.discard()
        stand_aside(self, False)

    def expect(self) -> None:
        """A step begins, and with it what its blocks want to know."""
        # An evaluation has made the last step miss what it was to measure: not this one, too.
        self._late, self.missed = self.missed, False
        self._parts = self._outermost = None
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

    def lost(self) -> list[str]:
        """Layers that get gradients, were measured once, and have not been for a while.

        Those that the last steps that were to measure have not seen: as many as `PATIENCE`, counted
        here, once in each step.
        """
        found = []
        for name, block in self.blocks.items():
            trained = any(p.grad is not None for p in block.layer.parameters)
            if name in self.reached_layers:
                self._unseen.pop(name, None)
            elif block.listening and trained and not block.empty:
                self._unseen[name] = self._unseen.get(name, 0) + 1
                if self._unseen[name] == PATIENCE:
                    found.append(name)
        return found

    def settle(self, names: Iterable[str]) -> None:
        """Take these layers for what they are by now, however they are seen to be used."""
        self._settled.update(names)

    def discard(self) -> None:
        """Forget those samples."""
        self._waiting.clear()
        self._made.clear()
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
        if measuring():  # the optimizer's own, of which nothing is to be learnt
            return
        if torch.is_grad_enabled():
            self.called = True
            self._leave_parts()
        self._before()

    def _after_model(self, module: nn.Module, args: Any, result: Any) -> None:
        self._unfused.close()
        if result is None or not self._looks():  # None: the forward has failed
            return
        try:
            self._note(Pass(), "", result)
        except ValueError as error:
            if module.training:
                raise
            # Evaluation may do as it likes; a step will say it. The way there would keep alive what
            # the callers know, the optimizer among it.
            self.problem = error.with_traceback(None)

    def _before_part(self, module: nn.Module, args: Any) -> None:
        # What activation checkpointing runs again in the backward pass is no call of the user's.
        if self._outermost is None and torch._C._current_graph_task_id() == -1 and not measuring():
            self._outermost = module
            self._before()

    def _after_part(self, module: nn.Module, args: Any, result: Any) -> None:
        if module is not self._outermost:
            return
        self._outermost = None
        self._unfused.close()
        if result is None or not self._looks():
            return
        name = self._names[module]
        if self._parts is None or any(name == part for part, _ in self._parts.places):
            self._parts = Pass()
        try:
            self._note(self._parts, name, result)
        # A function of the user's that finds the logits may not know what this part returns.
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            self.problem = ValueError(f"of what {name!r} returned: {error}")

    def _leave_parts(self) -> None:
        """Calls of the model's parts are not listened to any more."""
        for handle in self._part_handles:
            handle.remove()
        self._part_handles.clear()

    def _before(self) -> None:
        """A forward pass begins."""
        self._unfused.close()
        if not torch.is_grad_enabled() and not self._late:
            # Training pauses, or is over: compilers need not stand aside for what is evaluated.
            self.missed |= stand_down(self)
        running = running_parts(self._parallel_parts)
        self.parallel |= bool(running)
        self.uneven |= any(part._join_config.enable for part in running)
        if not self._looks():
            return
        self.missed = False
        self._tell_of_hooks()
        for name, candidate in self.candidates.items():
            if name in self.blocks:
                candidate.check(name)
        if self._recurrent:
            # Fused kernels of recurrent layers keep to themselves what they multiply.
            backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
            for backend in backends:
                self._unfused.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False

    def _tell_of_hooks(self) -> None:
        """Say once that hooks of others will run in our backward pass, too."""
        if self._told or self.fisher is None:
            return
        self._told = True
        model = self._model()
        assert model is not None
        hooked = [
            repr(name) if name else "the model"
            for name, module in model.named_modules()
            if module._backward_hooks or module._backward_pre_hooks
        ]
        if hooked:
            warnings.warn(
                f"backward hooks on {first_few(hooked)} run "
                "once more on steps that measure curvature, in a pass with the model's own labels; "
                "tekfac.measuring() is true in them then",
                RuntimeWarning,
                stacklevel=2,
            )

    def _note(self, here: Pass, name: str, result: Any) -> None:
        """Wait for a backward pass from what the model, or a part of it, returned."""
        losses = [] if self._chosen else losses_in(result)
        # A number that is made of no output known here may be one itself.
        if losses and (not isinstance(result, Tensor) or is_compared(losses)):
            for fed in fed_into(losses, self.likelihoods):
                if self.fisher is not None:
                    fed.likelihood.check(fed.values)
                number = self._add(here, name, fed.values, fed.likelihood)
                self._await(here, number, made_at(fed.edge))
            return
        found = self.outputs(result)
        if len(self.likelihoods) not in (1, len(found)):
            raise ValueError(
                f"{len(self.likelihoods)} likelihoods were given, but the model has {len(found)} "
                "outputs: give one for each, or output= to pick the right tensors"
            )
        returned = tensors_of(result)
        likelihoods = list(self.likelihoods)
        likelihoods *= len(found) if len(likelihoods) == 1 else 1
        if not here.outputs:
            self._made.clear()
        for output, likelihood in zip(found, likelihoods, strict=True):
            if not output.requires_grad or any(output is each for each in returned):
                self._wait(here, name, output, likelihood)
                continue
            parts = behind(output, returned)
            if getattr(likelihood, "dim", 0) is None and not _alike(output, parts):
                # Which dimension holds the classes is judged by the loss, which is not made of what
                # output= made: by the tensors, then, that this was made of.
                for each in parts:
                    self._wait(here, name, each, likelihood)
            else:
                self._made[len(here.outputs)] = output
                self._wait(here, name, output, likelihood, parts)

    def _wait(
        self,
        here: Pass,
        name: str,
        output: Tensor,
        likelihood: Likelihood,
        made_of: Sequence[Tensor] = (),
    ) -> None:
        """Wait for the backward pass to reach an output, or one of what it was made of."""
        if self.fisher is not None or not output.dim():
            likelihood.check(output)
        # What the user changes in place later is not what the labels are drawn from.
        values = output.detach().clone() if output.requires_grad else output.detach()
        number = self._add(here, name, values, likelihood)
        for each in made_of:
            edge = source_of(each)
            hook = ReachedBehind(self, here, number, edge.output_nr, _alike(output, made_of))
            edge.node.register_prehook(hook)
        if output.requires_grad and not made_of:
            self._await(here, number, source_of(output))

    @staticmethod
    def _add(here: Pass, name: str, values: Tensor, likelihood: Likelihood) -> int:
        """Note an output; its number."""
        here.places.append((name, sum(name == other for other, _ in here.places)))
        here.outputs.append(values)
        here.likelihoods.append(likelihood)
        return len(here.outputs) - 1

    def _await(self, here: Pass, number: int, edge: GradientEdge) -> None:
        edge.node.register_prehook(Reached(self, here, number, edge.output_nr))

    # -- backward ----------------------------------------------------------------------------------

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
        for use in found.uses:
            known = use.name in self._settled or not self.blocks[use.name].empty
            if known and use.reading.layer.looked_up and not use.reading.product.lookup:
                # What was measured is the curvature of lookups alone.
                found.strange.setdefault(use.name, use.node.name())
        for name, kind in found.strange.items():
            self.strange.setdefault(name, kind)
        uses = found.counted()
        if not uses:
            return
        here.done.add(number)
        self.passes += 1
        self.reached_layers.update(use.name for use in uses)
        # Of a batch that is empty or not finite there is nothing to be learnt.
        seen = here.outputs[number] if gradient is None else gradient
        if not seen.numel():
            return
        if not verdict.waits(seen.device) and not bool(seen.isfinite().all()):
            return
        with torch.no_grad(), torch.autocast(seen.device.type, enabled=False):
            task = torch._C._current_graph_task_id()
            if task != self._task:
                self._task = task
                self._behind.clear()
                self._begin(leaves)
            if len(here.outputs) > 1 or not self.called:
                self._behind.update(map(_identity, found.nodes))
            self._settle(found, uses)
            self._measure(here, number, root, gradient, uses)

    def _is_part(self, here: Pass, number: int) -> bool:
        """Whether what the backward pass has reached is no output, but what one was made of."""
        part = here.places[number][0] != ""
        if part and self.called:
            return True
        if not part and self._chosen:
            return False
        node = torch._C._current_autograd_node()
        same = self._task == torch._C._current_graph_task_id()
        return same and _identity(node) in self._behind

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
            own = [other.reading for other in uses if other.name == name]
            layer = as_used(layer, all(reading.product.lookup for reading in own))
            self.blocks[name].take(layer)
            for reading in own:
                reading.layer = layer

    def _measure(
        self,
        here: Pass,
        number: int,
        root: GradientEdge,
        gradient: Tensor | None,
        uses: list[Use],
    ) -> None:
        output = here.outputs[number]
        made: Any = root.node
        dtype = made._input_metadata[root.output_nr].dtype
        likelihood = self._fit(here, number, gradient)

        def projections(cotangent: Tensor, some: Sequence[Use]) -> list[Tensor | None]:
            rows: dict[Use, Tensor] = {}

            def received(use: Use, g: Tensor) -> None:
                rows[use] = projected(use.reading.output_rows(g.detach()))

            go_through(root, cotangent.to(dtype), some, received)
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
            self._reach(root, grouping.restore(used.to(dtype).expand_as(output)), wanted)
        read_inputs(wanted)
        read_scales(wanted)
        for use in wanted:
            x = use.reading.input
            if x is not None and not use.reading.product.lookup and not use.reading.swapped:
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
            cotangent = grouping.restore(cotangent * scale).to(dtype)
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
        return fitted

    def _listen(
        self,
        delivery: Delivery,
        wanted: Mapping[Use, Expected],
        root: GradientEdge,
        gradient: Tensor | None,
    ) -> None:
        """Have the user's own backward pass give what it brings (empirical Fisher)."""
        here = torch._C._current_autograd_node()
        for use, product in wanted.items():
            if use.node is root.node is here and gradient is not None:
                self._received(delivery, product, gradient)
            else:
                use.node.register_prehook(Overheard(self, delivery, product))

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


def _alike(output: Tensor, made_of: Sequence[Tensor]) -> bool:
    """Whether an output is made of one tensor, entry by entry as far as that can be seen."""
    return len(made_of) == 1 and made_of[0].shape == output.shape


def _identity(node: Any) -> int:
    """What tells a node from others without keeping it, and with it the graph, alive."""
    number: int = node._sequence_nr()
    return number
