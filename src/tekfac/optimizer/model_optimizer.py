"""What there is to an optimizer of a model beside its step: blocks, groups, words, state.

It is given a model, not parameters: it makes curvature blocks of its layers, listens to it, says
what it does with each parameter, and saves and loads what it has learnt. The algorithm is
`optimizer.natural_gradient`'s part.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tekfac.capture.capture import Capture
from tekfac.capture.fisher import Fisher, SampledFisher
from tekfac.capture.likelihoods import Likelihood
from tekfac.capture.outputs import chosen_outputs, find_outputs
from tekfac.curvature.blocks import Block
from tekfac.layers import Assignment, Layer
from tekfac.layers.assignment import plain_name
from tekfac.optimizer import state
from tekfac.optimizer.agreement import Agreement
from tekfac.optimizer.events import Events
from tekfac.optimizer.first_order import Adam, adam_state
from tekfac.optimizer.groups import check_group, completed, listed
from tekfac.optimizer.household import Household
from tekfac.optimizer.summary import Summary, summarised
from tekfac.optimizer.timetable import Intervals, Statistic, Timetable
from tekfac.optimizer.update import Preconditioner, momentum_state
from tekfac.ranks.fully_sharded import plain_parameters
from tekfac.ranks.ranks import Ranks


class ModelOptimizer(torch.optim.Optimizer):
    """An optimizer of a model by curvature blocks, without its step."""

    make_block: ClassVar[type[Block]]
    _settings: ClassVar[tuple[str, ...]]
    """What a state holds of the settings: those that may be changed between steps."""

    model: nn.Module
    fisher: Fisher | None
    likelihoods: Sequence[Likelihood]
    output: Callable[[Any], Any] | None
    mean_over: str
    batch_dim: int | None
    factor_every: int
    basis_every: int
    interval_warmup: bool
    factor_decay: float
    factor_rows: int | None
    weight_sharing: str
    rank: int | None
    storage: torch.dtype | None
    first_order: Adam
    kl_clip: float | None

    _assignment: Assignment
    _blocks: dict[str, Block]
    _frozen: set[Tensor]
    _ranks: Ranks
    _household: Household
    _events: Events
    _agreement: Agreement
    _timetable: Timetable
    _in_use: Intervals
    _preconditioner: Preconditioner
    _capture: Capture | None
    _called = False  # whether the model itself has been called in training
    _cleared = False  # whether gradients were cleared since the closure was called
    _reduction_ratio: float | None = None
    _initialised = False  # whether torch.distributed.checkpoint asked for all that a state has

    @property
    def _method(self) -> str:
        return type(self).__name__

    # -- what a user asks --------------------------------------------------------------------------

    @property
    def blocks(self) -> Mapping[str, Block]:
        """The curvature block of every supported layer, by the layer's name in the model."""
        return MappingProxyType(self._blocks)

    @property
    def counters(self) -> dict[str, int]:
        """Steps taken, and how often something was skipped or failed.

        ``steps`` counts steps that were taken; ``skipped_steps`` those left out because a gradient
        was not finite; ``skipped_statistics`` batches of one layer whose statistics were not
        finite; ``failed_decompositions`` refreshes of one layer's basis that failed, and kept the
        old one.

        On an accelerator, which steps and statistics are skipped is decided there. Reading this
        waits for it, as does a refresh of the basis, which is when such a skip is warned of.
        """
        self._events.read()
        return dict(self._events.counts)

    @property
    def reduction_ratio(self) -> float | None:
        """ρ of the last step that `AdaptiveDamping` compared, None before the first.

        nan where nothing could be said: the curvature predicted no decrease of the loss, or one
        too small to be seen in it. -inf where the loss was not finite after the step.
        """
        return self._reduction_ratio

    def treatment(self) -> dict[str, str]:
        """How each parameter of the model is trained, in words, by the parameter's name."""
        return {entry.name: entry.treatment for entry in self.summary().entries}

    def summary(self) -> Summary:
        """Every parameter: its block, that one's sizes and costs, or the first-order rule and why.

        ``print(optimizer)`` shows it. Before the first step it tells what will be, as far as the
        model's modules tell; whether a matrix is multiplied at all is seen when it is.
        """
        return summarised(
            plain_parameters(self.model).items(),
            self._method,
            self._blocks,
            self._assignment,
            self._capture,
            self.param_groups,
            self.state,
            self._timetable.schedule.refreshed,
            self._events.counts["steps"],
        )

    def __str__(self) -> str:
        return str(self.summary())

    def close(self) -> None:
        """Remove all hooks from the model; `step` then raises. Harmless when done twice.

        The same happens by itself when the optimizer is garbage collected.
        """
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    def _open(self) -> Capture:
        if self._capture is None:
            raise RuntimeError(f"this {self._method} optimizer is closed: its hooks were removed")
        return self._capture

    # -- parameter groups --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, e.g. after unfreezing them.

        Layers' parameters get blocks, others (of this model or not) the first-order rule; a group
        that mixes them becomes two.

        Args:
            param_group: a dict with "params" and any of "lr", "momentum", "nesterov",
                "weight_decay", "damping", "power", "rms_clip" and "orthogonalize".

        Raises:
            TypeError: if it is no dict with "params", or holds something that is no parameter.
            ValueError: for a setting out of its range, ``orthogonalize`` beside ``kl_clip``, a
                parameter that is in a group already, or one of a layer whose block exists and
                covers only the layer's other parameter.
            RuntimeError: after `close`.
        """
        if self._blocks:
            self._open()
        param_group = listed(param_group)
        settings = {key: value for key, value in param_group.items() if key != "params"}
        complete = {**self.defaults, **settings}
        check_group(complete, self.make_block.trace_damping, self._method)
        if complete["orthogonalize"] and self.kl_clip is not None:
            raise ValueError(
                f"kl_clip={self.kl_clip} bounds natural gradients, of whose length orthogonalized "
                "steps keep nothing: leave out kl_clip or orthogonalize=True"
            )
        before = len(self.param_groups)
        super().add_param_group(
            completed(
                param_group,
                self.defaults,
                self._assignment,
                self._blocks,
                self.first_order,
            )
        )
        added = self.param_groups[before]["params"]
        self._frozen.update(p for p in added if not p.requires_grad)
        if self._blocks and any(p in self._assignment.owner for p in added):
            self._build_blocks()
        self._household.doubt()

    def _build_blocks(self) -> None:
        """Make the blocks of all layers in the curvature groups, and listen to them."""
        group_of = self._group_of()
        layers: dict[str, Layer] = {}
        for name, candidate in self._assignment.candidates.items():
            weight, bias = candidate.weight, candidate.bias
            own_weight = weight if weight in group_of else None
            own_bias = bias if bias in group_of else None
            if name in self._blocks or (own_weight is None and own_bias is None):
                continue
            layers[name] = candidate.make(name, weight, own_weight, own_bias)
        for name, layer in layers.items():
            group = group_of[layer.parameters[0]]
            self._blocks[name] = self.make_block(layer, group, self.rank, self.storage)
        self._household.place(self._blocks)
        self._listen()

    def _group_of(self) -> dict[Tensor, dict[str, Any]]:
        """The group of each parameter that may be covered by a block."""
        return {
            p: group
            for group in self.param_groups
            for p in group["params"]
            if p in self._assignment.owner and p not in self._frozen
        }

    def _listen(self) -> None:
        """Put the hooks on the model, in place of those there may be."""
        if self._capture is not None:
            self._called = self._capture.called
        self.close()
        self._capture = Capture(
            self.model,
            self._assignment,
            self._blocks,
            self.fisher,
            self.likelihoods,
            find_outputs if self.output is None else chosen_outputs(self.output),
            self.mean_over,
            self.batch_dim,
            self._called,
            self._household.lane,
        )
        # With the optimizer's end, not the capture's: the graph of a loss that is kept holds that.
        weakref.finalize(self, self._capture.close)
        self._set_due()

    def _initialise(self) -> None:
        """Make the state that a step would, as torch.distributed.checkpoint has it made.

        It loads only what is there already: of blocks that have no estimates there are blank ones
        in states from now on.
        """
        self._initialised = True
        covered = {p for block in self._blocks.values() for p in block.layer.parameters}
        for group in self.param_groups:
            adam_state([p for p in group["params"] if p not in covered], self.state)
            if group["momentum"]:
                momentum_state([p for p in group["params"] if p in covered], self.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget statistics taken since the last step along with them."""
        super().zero_grad(set_to_none)
        self._cleared = True
        self._discard()
        if self._capture is not None:
            self._capture.resume()

    def _discard(self) -> None:
        for block in self._blocks.values():
            block.discard()
        if self._capture is not None:
            self._capture.discard()

    def _intervals(self) -> Intervals:
        """How often what is due; settings may be changed between steps."""
        factors = Statistic(self.factor_every, self.factor_decay, self.factor_rows)
        reduce = self.weight_sharing == "reduce"
        return Intervals(factors, self.basis_every, self.interval_warmup, reduce)

    def _set_due(self) -> None:
        capture = self._capture
        again = capture is not None and self._ranks.repeats(capture.missed)
        self._in_use = self._household.common(self._intervals())
        self._timetable.announce(
            self._blocks.values(), self._in_use, self._ranks, again, self._household.divided
        )
        if isinstance(self.fisher, SampledFisher):
            self._ranks.reseed(self.fisher.generator, self.fisher.seed, self._timetable.step)
        if capture is not None:
            capture.expect()

    def _update_fc_scale(self) -> None:
        """Bring β of the fully-connected blocks up to date, where the method has it."""

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues the run bit for bit, as plain tensors, numbers and strings.

        As in ``torch.optim``, tensors are references: save or deep-copy it before the next step.
        Beside "state" and "param_groups" there is "tekfac", with the method, its settings, counters
        and the state of the generator; a block's estimates are in the state of the layer's first
        parameter.
        """
        packed = super().state_dict()
        learnt = self._household.learnt(self._blocks)
        layout = state.layout_of(self.param_groups, self._blocks)
        for name, each in layout.items():
            each["estimates"] = list(learnt[name])
            if self._initialised:
                learnt[name] = self._blocks[name].blank() | learnt[name]
        state.add_blocks(packed, self.param_groups, self._blocks, learnt)
        packed["tekfac"] = {
            "method": self._method,
            "blocks": layout,
            "settings": {name: getattr(self, name) for name in self._settings},
            "counters": self.counters,
            "position": self._timetable.step,
            "reduction_ratio": self._reduction_ratio,
            "agreement": self._agreement.state_dict(),
            "schedule": self._timetable.state_dict(self._blocks.values()),
        }
        if isinstance(self.fisher, SampledFisher):
            packed["tekfac"] |= self.fisher.state_dict()
        if packed["param_groups"]:
            # Where torch.distributed.checkpoint, which knows of nothing else, takes it along: as
            # text, which it does not mix with that of the optimizer that it loads into.
            packed["param_groups"][0]["tekfac"] = json.dumps(packed["tekfac"])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; nothing is changed if it does not fit.

        Settings kept in it (intervals, decays, groups' settings) replace those given to the
        constructor.

        Raises:
            ValueError: if it is of another method, another architecture or no state of this
                package.
        """
        # A copy: torch would share the tensors with the other optimizer.
        packed = state.normal_form(state_dict, self.param_groups, self._blocks)
        own = packed.pop("tekfac")
        # Older states have the names of what wraps the model in those of its layers.
        strange = own["blocks"].keys() - self._blocks.keys()
        state.rename(own, {name: plain_name(self.model, name) for name in strange})
        state.check_fits(packed, own, self._method, self.param_groups, self._blocks)
        learnt = state.take_blocks(packed, own["blocks"])
        parameters = {i: p for p, i in state.index_of(self.param_groups).items()}
        for i, values in packed["state"].items():
            for key, value in values.items():
                values[key] = self._household.shards.adopt(parameters[i], value)
        super().load_state_dict(packed)
        index, group_of = state.index_of(self.param_groups), self._group_of()
        for block in self._blocks.values():
            first = block.layer.parameters[0]
            block.group = group_of[first]
            if own["blocks"].get(block.name) is not None:  # not there in older states
                block.load_state_dict(learnt[index[first]])
        for name, value in own["settings"].items():
            setattr(self, name, value)
        self._events.load(own["counters"])
        self._reduction_ratio = own.get("reduction_ratio")  # not there in older states
        self._agreement.load_state_dict(own.get("agreement"))
        step = own.get("position", own["counters"]["steps"])  # not there in older states
        self._timetable.load(step, own.get("schedule"), self._blocks.values(), self._intervals())
        if isinstance(self.fisher, SampledFisher):
            self.fisher.load_state_dict(own)
        self._update_fc_scale()
        self._household.doubt()
        self._set_due()

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts its own `step` on the instance; it and hooks stay behind, as in torch.
        kept = {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_capture", "_uneven", "step") and not key.startswith("_optimizer_")
        }
        called = self._called if self._capture is None else self._capture.called
        closed = self._capture is None
        return kept | {"closed": closed, "_called": called, "_preconditioner": Preconditioner()}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        closed = kept.pop("closed", None)
        super().__setstate__(kept)
        for group in self.param_groups:
            # Not there in older states.
            group.setdefault("power", 1.0)
            group.setdefault("rms_clip", None)
            group.setdefault("orthogonalize", False)
            group.setdefault("agreement", 0.0)
        if closed is not None:  # unpickled or copied, not load_state_dict
            self._capture = None
            if not closed:
                self._listen()
