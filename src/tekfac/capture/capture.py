"""What layers saw, taken from an unchanged training loop.

Hooks on the model note what a forward pass returned, and wait on the nodes that made it for the
user's own ``loss.backward()``. What happens there is `capture.backward`'s part.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from tekfac.capture.backward import Measuring
from tekfac.capture.compiled import stand_aside, stand_down
from tekfac.capture.fisher import Fisher
from tekfac.capture.graph import measuring
from tekfac.capture.hook import Hook, drop_inert
from tekfac.capture.likelihoods import Likelihood, is_open
from tekfac.capture.losses import fed_into, is_compared, losses_in
from tekfac.capture.observer import Observer
from tekfac.capture.outputs import find_outputs, tensors_of
from tekfac.capture.passes import Pass, Reached, ReachedBehind, parts_of
from tekfac.capture.places import behind, made_at, source_of
from tekfac.checks import first_few
from tekfac.layers import Assignment
from tekfac.numerics import undivided
from tekfac.ranks.group import parallel_parts, running_parts
from tekfac.ranks.layout import mesh_of
from tekfac.ranks.ranks import Ranks

# Steps that were to measure a layer and did not see it, before that is said.
PATIENCE = 3


class Capture(Measuring):
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
        lane: the ranks that see the same batches.

    Attributes:
        passes: backward passes measured so far.
        reentrant: whether a part of the model was seen that only runs in the backward pass.
        compiled: whether the graph was seen to be a compiler's, which shows no products.
        derived: examples of outputs of which derivatives were taken since the last step, that can
            be differentiated in turn.
        plain: examples of other outputs that a loss was made of.
        reached_layers: those that a backward pass has reached since the last step.
        strange: for a layer, what was seen to use its weight in a way that is not known.
        orders: for a layer, how its rows were found to belong to examples.
        problem: what was wrong with what the model returned in evaluation mode.
        uncounted: outputs of which it is not known how many terms they have.
        chosen: whether a function of the user's finds the outputs.
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
        lane: Ranks | None = None,
    ) -> None:
        chosen = outputs is not find_outputs
        super().__init__(
            model,
            assignment,
            blocks,
            fisher,
            likelihoods,
            mean_over,
            batch_dim,
            chosen,
            called,
            lane or Ranks(),
        )
        self.outputs = outputs
        self.parallel = self.uneven = False
        self.problem: ValueError | None = None
        self.missed = self._late = False
        self._model = weakref.ref(model)
        self._unseen: dict[str, int] = {}
        self._told = False
        self._parts: Pass | None = None
        self._outermost: nn.Module | None = None
        self._unfused = ExitStack()
        self._parallel_parts = parallel_parts(model)
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        for module in model.modules():
            drop_inert(module)
        self._handles = [
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
        self.derived = self.plain = 0
        self.resume()

    def resume(self) -> None:
        """The forward passes of the step are about to come."""
        stand_aside(self, any(block.listening for block in self.blocks.values()))

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
        found = self.outputs(result) if self.chosen else []
        losses = losses_in(found or result)
        # A number that is made of no output known here may be one itself.
        if losses and (not isinstance(result, Tensor) or is_compared(losses)):
            for fed in fed_into(losses, self.likelihoods):
                if self.fisher is not None:
                    fed.likelihood.check(fed.values)
                number = self._add(here, name, fed.values, fed.likelihood)
                self._await(here, number, made_at(fed.edge))
            return
        found = found or self.outputs(result)
        if name and len(self.likelihoods) > 1:
            # Which is whose can only be said when it is known what goes into other parts.
            here.assigned = False
            likelihoods = [self.likelihoods[0]] * len(found)
        elif len(self.likelihoods) not in (1, len(found)):
            raise ValueError(
                f"{len(self.likelihoods)} likelihoods were given, but the model has {len(found)} "
                "outputs: give one for each, or output= to pick the right tensors"
            )
        else:
            likelihoods = list(self.likelihoods)
            likelihoods *= len(found) if len(likelihoods) == 1 else 1
        returned = tensors_of(result)
        if not here.outputs:
            self._made.clear()
        for output, likelihood in zip(found, likelihoods, strict=True):
            if not output.requires_grad or any(output is each for each in returned):
                self._wait(here, name, output, likelihood)
                continue
            parts = behind(output, returned)
            if is_open(likelihood) and output.dim() == 2 and _is_other(output, parts):
                likelihood = replace(likelihood, dim=1)
            if here.assigned and is_open(likelihood) and not _alike(output, parts):
                # Which dimension holds the classes is judged by the loss, which is not made of what
                # output= made: by the tensors, then, that this was made of.
                for each in parts:
                    self._wait(here, name, each, likelihood)
            else:
                self._made[len(here.outputs)] = output
                self._wait(here, name, output, likelihood, parts)
        if not here.assigned:
            here.took(found)

    def _wait(
        self,
        here: Pass,
        name: str,
        output: Tensor,
        likelihood: Likelihood,
        made_of: Sequence[Tensor] = (),
    ) -> None:
        """Wait for the backward pass to reach an output, or one of what it was made of."""
        if here.assigned and (self.fisher is not None or not output.dim()):
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
        here.outputs.append(undivided(values))
        here.meshes.append(mesh_of(values))
        here.likelihoods.append(likelihood)
        return len(here.outputs) - 1

    def _await(self, here: Pass, number: int, edge: GradientEdge) -> None:
        edge.node.register_prehook(Reached(self, here, number, edge.output_nr))


def _alike(output: Tensor, made_of: Sequence[Tensor]) -> bool:
    """Whether an output is made of one tensor, entry by entry as far as that can be seen."""
    return len(made_of) == 1 and made_of[0].shape == output.shape


def _is_other(output: Tensor, made_of: Sequence[Tensor]) -> bool:
    """Whether an output is more than another form of the one tensor that it is made of.

    A part of it, or a mean; or an example without a batch dimension.
    """
    if len(made_of) != 1:
        return False
    return made_of[0].dim() < 2 or made_of[0].numel() != output.numel()
