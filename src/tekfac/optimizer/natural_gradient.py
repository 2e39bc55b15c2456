"""The optimizer that all four methods are: everything but which block they use.

It orchestrates: blocks know their curvature, `capture` knows the model, this module knows when what
is due, and turns preconditioned gradients into steps.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import reduce
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, overload

import torch
from torch import Tensor, nn

from tekfac import verdict
from tekfac.capture.capture import Capture
from tekfac.capture.fisher import SampledFisher, make_fisher
from tekfac.capture.graph import REENTRANT, multiplies
from tekfac.capture.likelihoods import Likelihood, make_likelihoods
from tekfac.capture.outputs import chosen_outputs, find_outputs
from tekfac.checks import check_count, check_decay, check_positive, first_few
from tekfac.curvature.blocks import STORED, Block, Due
from tekfac.curvature.damping import Damping, MeanDamping
from tekfac.layers import Layer, assign
from tekfac.layers.assignment import plain_name
from tekfac.optimizer import state
from tekfac.optimizer.events import Events
from tekfac.optimizer.first_order import Adam, adam_state, adam_step
from tekfac.optimizer.groups import check_group, completed, listed, rule_of
from tekfac.optimizer.intervals import (
    BASES,
    LONG,
    STATISTICS,
    amount_at,
    decay_at,
    is_due,
    last_due,
)
from tekfac.optimizer.schedule import Job, Schedule
from tekfac.optimizer.summary import Entry, Summary, treatment_of
from tekfac.optimizer.update import (
    Preconditioner,
    momentum_state,
    step_along,
    within_kl,
    within_rms,
)
from tekfac.ranks.group import check_alike, digest, facts_of, ranks_for
from tekfac.ranks.placement import check_placement, divided, holders, unit_size
from tekfac.ranks.ranks import Ranks
from tekfac.verdict import YES, Verdict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

SUPPORTED = "matrices that rows are multiplied by, convolutions"


class Common(TypedDict, total=False):
    """Keyword arguments of `NaturalGradient` that a method passes on."""

    nesterov: bool
    weight_decay: float
    power: float
    rms_clip: float | None
    fisher: str
    likelihood: str | Likelihood | Sequence[str | Likelihood]
    mc_samples: int
    generator: torch.Generator | None
    loss_reduction: str
    mean_over: str
    batch_dim: int | None
    output: Callable[[Any], Any] | None
    kl_clip: float | None
    factor_every: int
    basis_every: int
    interval_warmup: bool
    factor_decay: float
    factor_rows: int | None
    rank: int | None
    storage: torch.dtype | None
    exclude: Sequence[str | type[nn.Module]]
    first_order: Adam
    params: Iterable[dict[str, Any]] | None
    process_group: ProcessGroup | DeviceMesh | None
    placement: str | float
    communication: torch.dtype | None


class NaturalGradient(torch.optim.Optimizer):
    r"""What KFAC, EKFAC, TKFAC and TEKFAC have in common.

    For every supported layer (paper, 3.9, where ``power`` is 1), with ``∇h`` the mini-batch
    gradient of the user's own loss::

        v ← momentum · v + (F̂ + λ I)^(−power) ∇h
        θ ← θ − lr · v

    Weight decay is decoupled, ``θ ← θ − lr · weight_decay · θ``, as in AdamW: the penalty's
    gradient is not part of the likelihood that the Fisher matrix belongs to. All other parameters
    (norm layers, embeddings, free parameters) are trained by ``first_order``. Until a layer's
    curvature has been measured (its first batch was not finite, it never ran as a module of its
    own, no gradient reached it yet) its parameters are too.

    Args:
        model: the module that the training loop calls. Not its parameters.
        lr: step size α of the layers' natural gradient, not negative. With ``rms_clip`` it is to be
            chosen like Adam's.
        momentum: μ, in [0, 1). 0 keeps no buffer.
        nesterov: step along ``(F̂ + λ I)^(−power) ∇h + momentum · v`` instead of ``v``, which was
            better on every task that we tried. False in the paper. Without momentum, no difference.
        weight_decay: decoupled, not negative.
        damping: λ, a positive float, the same for all layers, or a rule: `MeanDamping`, relative to
            each layer's own curvature, `RelativeDamping`, which follows the size of each layer's
            weights, `FactoredDamping`, which makes a difference to EKFAC and TEKFAC, or, of TKFAC
            and TEKFAC, `TraceDamping`. The default needs no tuning: it has no unit. With a float,
            ``lr / damping`` is the step in directions without curvature.
        power: of the damped curvature that gradients are divided by, above 0 and at most 1. 1 is
            natural gradient, and the paper's. 1/2 divides each direction of the eigenbasis by the
            root of its curvature, as Adam, Shampoo and SOAP do, and wants their learning rates: the
            noise of a gradient is as large as that root, so that all directions are equally noisy.
        rms_clip: bound on the size of each layer's steps, so that a run that would diverge trains:
            natural gradients ``u = (F̂ + λ I)^(−power) ∇h`` are scaled by
            ``min(1, (1 − momentum) rms_clip / rms(u))``, each layer's by its own root mean square,
            before they go into ``v``. No step is larger than ``lr · rms_clip`` then, which is the
            size of Adam's steps where 1, whatever the loss is multiplied by. This is Adafactor's
            clipping of updates (Shazeer and Stern, 2018), with room for the sum that momentum
            makes. None for no bound, as in the paper.
        fisher: labels for the statistics. "mc": drawn from the model's predictive distribution
            (paper, 2.1). "exact": the expectation over all labels, one extra backward pass per
            class. "empirical": the data's own labels and the user's own loss, which is another
            matrix.
        likelihood: what the network's output means: "categorical", "bernoulli", "gaussian" or a
            `Likelihood`; of several outputs a list of one for each. Of "empirical" only the number
            of terms is asked.
        mc_samples: labels drawn per term, and extra backward passes, of "mc".
        generator: where "mc" draws from. If None, a generator of the optimizer's own that follows
            ``torch.manual_seed`` and leaves the global random stream alone. Its state is saved with
            the optimizer's.
        loss_reduction: for "empirical" only. "mean": the loss summed up in ``.grad`` between two
            steps is the mean over the terms of all their batches. "sum": it is their sum.
        mean_over: what the Fisher matrix, like the loss, is a mean over: "terms", every label that
            the loss looks at (an image's, a token's, a pixel's), as PyTorch's losses with
            ``reduction="mean"`` are; or "examples", for a loss that sums the terms of an example.
            See docs/fisher.md.
        batch_dim: 0 or 1: the dimension of layers' inputs and of the output that counts examples,
            where they have several before the last. None to find out, by one more backward pass
            or two at the beginning.
        output: finds the logits (or means) in what the model returns: a tensor, or a list of
            several. If None: the model's output itself if it is a tensor, or else its field
            ``.logits``, or else all tensors of two dimensions or more in it that have a gradient.
        kl_clip: if given, a bound on how far one step changes the predictive distribution: all
            layers' natural gradients ``u = (F̂ + λ I)^(−power) ∇h`` are scaled by
            ``min(1, sqrt(kl_clip / Σ lr² ⟨u, ∇h⟩))``.
        factor_every: steps between statistics for the factors, ``T_FIM`` of the paper.
        basis_every: steps between refreshes of the eigenbasis, ``T_EIG``. From 10 on, at most that
            often: where all layers' new bases take longer than a step, they are made layer by layer
            in as many steps as leaves none of them much longer than the others, by a count of
            operations (`optimizer.schedule`). Below 10 every layer's at once.
        interval_warmup: let intervals of 10 steps or more be shorter early in training: at most an
            eighth of the steps taken for statistics, a quarter for the basis. Averages forget
            sooner then, what is older than the last quarter of the steps (`optimizer.intervals`).
        factor_decay: ε2 of (3.6) and (3.7), in [0, 1): the weight of the past.
        factor_rows: where a layer's factors take much work, inputs that they are estimated from in
            each batch, for each column of the input-side one: at evenly spread positions of every
            example, and multiplied as bfloat16 where the processor is made for that
            (`curvature.sampling`). Half as many if ``factor_every`` is below 10. None for all, as
            they are.
        rank: eigenvectors kept of a wide factor, one wider than three times that; the directions
            orthogonal to them share one eigenvalue, which keeps the trace. It bounds what memory,
            refreshes and preconditioning cost in wide layers; more than the default gained little
            or nothing (benchmarks/README.md). Of each group of a grouped convolution at most four
            times as many as it has outputs (or, on the output side, inputs). None for all
            eigenvectors always.
        storage: dtype in which factors, eigenvectors and rescaling are kept between steps, such as
            ``torch.bfloat16``, which halves their memory and rounds them to three digits. None for
            float32, or the parameters' dtype if that is wider. Computed is in that in any case.
        exclude: names of modules (with all that is inside) and module classes left to
            ``first_order``.
        first_order: the rule for every other parameter.
        params: parameter groups, dicts with "params" and any of "lr", "momentum", "nesterov",
            "weight_decay", "damping", "power" and "rms_clip"; None for all parameters that require
            a gradient. A group that mixes layers' parameters with others becomes two.

        process_group: the ranks that train the model together (docs/ranks.md): a process group, or
            a `DeviceMesh` of one dimension. None for that of a `DistributedDataParallel` in the
            model, or else for all ranks, if torch.distributed is initialised.
        placement: which ranks hold the curvature state: "replicated", all of it on every rank;
            "sharded", each layer's on one rank, which tells the others what it makes of each
            gradient; a number, the part of the state that a rank is to hold at most; "auto",
            replicated up to a GiB of it.
        communication: dtype in which ranks send sums of matrices, such as ``torch.bfloat16``, which
            halves what is sent. None for that in which they are summed up.

    Raises:
        TypeError: if ``model`` is no module, or an argument is of the wrong type.
        ValueError: for an argument out of its range, a model without any supported layer, or if
            ranks are given different models or settings.
        NotImplementedError: for a model whose parameters are divided among ranks.
    """

    make_block: ClassVar[type[Block]]
    _called = False  # whether the model itself has been called in training
    _settings: ClassVar[tuple[str, ...]] = (
        "factor_every",
        "basis_every",
        "interval_warmup",
        "factor_decay",
        "factor_rows",
        "rank",
        "kl_clip",
    )

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-3,
        momentum: float = 0.9,
        *,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        damping: Damping = MeanDamping(),
        power: float = 1.0,
        rms_clip: float | None = 1.0,
        fisher: str = "mc",
        likelihood: str | Likelihood | Sequence[str | Likelihood] = "categorical",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        loss_reduction: str = "mean",
        mean_over: str = "terms",
        batch_dim: int | None = None,
        output: Callable[[Any], Any] | None = None,
        kl_clip: float | None = None,
        factor_every: int = 10,
        basis_every: int = 100,
        interval_warmup: bool = True,
        factor_decay: float = 0.95,
        factor_rows: int | None = 4,
        rank: int | None = 32,
        storage: torch.dtype | None = None,
        exclude: Sequence[str | type[nn.Module]] = (),
        first_order: Adam = Adam(),
        params: Iterable[dict[str, Any]] | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
        placement: str | float = "auto",
        communication: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{self._method} needs the model itself, not its parameters, to see what its "
                f"layers see: {self._method}(model, lr=...); got {type(model).__name__}"
            )
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}')
        if mean_over not in ("terms", "examples"):
            raise ValueError(f'mean_over must be "terms" or "examples", got {mean_over!r}')
        if batch_dim not in (None, 0, 1) or isinstance(batch_dim, bool):
            raise ValueError(f"batch_dim must be 0, 1 or None, got {batch_dim!r}")
        check_count("factor_every", factor_every)
        check_count("basis_every", basis_every)
        check_count("mc_samples", mc_samples)
        check_decay("factor_decay", factor_decay)
        if factor_rows is not None:
            check_count("factor_rows", factor_rows)
        if rank is not None:
            check_count("rank", rank)
        if storage is not None and not (
            isinstance(storage, torch.dtype) and storage.is_floating_point
        ):
            raise ValueError(f"storage must be a floating-point torch.dtype, got {storage!r}")
        if kl_clip is not None:
            check_positive("kl_clip", kl_clip)
        if not isinstance(first_order, Adam):
            raise TypeError(f"first_order must be a tekfac.Adam, got {first_order!r}")

        check_placement(placement)

        self.model = model
        self.placement = placement
        self._ranks = ranks_for(model, process_group, communication)
        self._unit = Ranks()
        self._homes: dict[str, int] = {}
        self._alike = False
        self.factor_every, self.basis_every = factor_every, basis_every
        self.interval_warmup = interval_warmup
        self.factor_decay, self.kl_clip = factor_decay, kl_clip
        self.factor_rows, self.rank, self.storage = factor_rows, rank, storage
        self.loss_reduction = loss_reduction
        self.first_order = first_order
        self.mean_over, self.batch_dim = mean_over, batch_dim
        self.fisher = make_fisher(fisher, mc_samples, generator)
        self._seed = 0
        if isinstance(self.fisher, SampledFisher):
            own = self.fisher.generator.initial_seed()
            self._seed = int(self._ranks.texts(str(own))[0])
        self.likelihoods = make_likelihoods(likelihood)
        self.output = output
        self._assignment = assign(model, exclude)
        if not self._assignment.candidates:
            raise ValueError(
                f"{self._method} found no layer that it supports in {type(model).__name__} "
                f"({SUPPORTED}): use a torch.optim optimizer for this model"
            )
        self._events = Events()
        self._position = 0
        self._schedule = Schedule()
        self._blocks: dict[str, Block] = {}
        self._frozen: set[Tensor] = set()
        self._preconditioner = Preconditioner()
        self._capture: Capture | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "damping": damping,
            "power": power,
            "rms_clip": rms_clip,
        }
        if params is None:
            params = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        elif not isinstance(params, Iterable) or isinstance(params, (Tensor, Mapping)):
            raise TypeError(
                "params takes a list of parameter groups: [{'params': [...], 'lr': ...}]"
            )
        check_group(defaults, self.make_block.trace_damping, self._method)
        super().__init__(params, defaults)
        self._build_blocks()
        if not self._blocks:
            raise ValueError(
                f"no layer that {self._method} supports ({SUPPORTED}) has a parameter to train: "
                "all are frozen, left out or not in the parameter groups"
            )
        self._check_alike()

    def _check_alike(self) -> None:
        """Raise on all ranks unless they train the same model in the same way."""
        if not self._alike:
            check_alike(self._ranks, self._facts())
            self._alike = True

    def _facts(self) -> dict[str, str]:
        """What ranks have to agree on, in words."""
        settings: dict[str, object] = {
            "method": self._method,
            **{name: getattr(self, name) for name in self._settings},
            "fisher": type(self.fisher).__name__,
            "mc_samples": getattr(self.fisher, "samples", None),
            "likelihood": [
                each if is_dataclass(each) else type(each).__name__ for each in self.likelihoods
            ],
            "loss_reduction": self.loss_reduction,
            "mean_over": self.mean_over,
            "batch_dim": self.batch_dim,
            "storage": self.storage,
            "placement": self.placement,
        }
        return {
            "their parameters": facts_of(dict(self.model.named_parameters())),
            "their layers": "\n".join(self._blocks),
            "their settings": "\n".join(f"{name}={value}" for name, value in settings.items()),
            "their parameter groups": "\n".join(
                f"{name}={len(value) if name == 'params' else value}"
                for group in self.param_groups
                for name, value in group.items()
                if name not in ("base_lr", "initial_lr")  # what "lr" was at first
            ),
            "the steps that they took": str(self._position),
        }

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

    def treatment(self) -> dict[str, str]:
        """How each parameter of the model is trained, in words, by the parameter's name."""
        return {entry.name: entry.treatment for entry in self.summary().entries}

    def summary(self) -> Summary:
        """Every parameter: its block, that one's sizes and costs, or the first-order rule and why.

        ``print(optimizer)`` shows it. Before the first step it tells what will be, as far as the
        model's modules tell; whether a matrix is multiplied at all is seen when it is.
        """
        covered = {p: block for block in self._blocks.values() for p in block.layer.parameters}
        trained = {p for group in self.param_groups for p in group["params"]}
        strange = {} if self._capture is None else self._capture.strange
        orders = {} if self._capture is None else self._capture.orders
        entries = []
        for name, p in self.model.named_parameters():
            block = covered.get(p)
            owner = self._assignment.owner.get(p)
            order = None if block is None else orders.get(block.name)
            words = treatment_of(
                p,
                self._method,
                block,
                p in trained,
                owner if owner in self._blocks else None,
                self._assignment.reasons.get(p, "frozen when added"),
                strange,
            )
            entries.append(
                Entry(
                    name=name,
                    shape=tuple(p.shape),
                    treatment=words,
                    block=block,
                    measured=block is not None and not block.empty,
                    leads=block is not None and p is block.layer.parameters[0],
                    order="" if order is None else order.kind,
                    refreshed=None if block is None else self._schedule.refreshed.get(block.name),
                    own_bytes=sum(
                        value.numel() * value.element_size()
                        for value in self.state.get(p, {}).values()
                        if isinstance(value, Tensor)
                    ),
                )
            )
        return Summary(self._method, entries, self._events.counts["steps"])

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
                "weight_decay", "damping", "power" and "rms_clip".

        Raises:
            TypeError: if it is no dict with "params", or holds something that is no parameter.
            ValueError: for a setting out of its range, a parameter that is in a group already, or
                one of a layer whose block exists and covers only the layer's other parameter.
            RuntimeError: after `close`.
        """
        if self._blocks:
            self._open()
        param_group = listed(param_group)
        settings = {key: value for key, value in param_group.items() if key != "params"}
        check_group({**self.defaults, **settings}, self.make_block.trace_damping, self._method)
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
        self._alike = False

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
        self._place()
        self._listen()

    def _place(self) -> None:
        """Decide which rank holds which block; those that have a place keep it."""
        sizes = {name: block.state_bytes for name, block in self._blocks.items()}
        if not self._homes:
            size = unit_size(self.placement, self._ranks.count, sum(sizes.values()))
            self._unit = self._ranks.unit(size)
        unit = self._unit
        loads = [0] * unit.count
        for name, home in self._homes.items():
            loads[home] += sizes[name]
        new = [name for name in self._blocks if name not in self._homes]
        everybody = [range(unit.count)] * len(new)
        homes = divided([sizes[name] for name in new], everybody, loads)
        self._homes |= zip(new, homes, strict=True)
        for name in new:
            self._blocks[name].hold(self._homes[name] == unit.number)

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
        )
        # With the optimizer's end, not the capture's: the graph of a loss that is kept holds that.
        weakref.finalize(self, self._capture.close)
        self._set_due()

    # -- the step ----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: evaluates the model, calls ``backward`` and returns the loss; called once.

        Returns:
            The closure's loss, None without one.

        Raises:
            RuntimeError: on the first step if no statistics of any layer could be taken, and after
                `close`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capture = self._open()
        if capture.passes == 0 and all(group["lr"] == 0 for group in self.param_groups):
            self._initialise()
            return loss
        self._check_alike()
        capture.flush()
        for block in self._blocks.values():
            if block.pending and all(p.grad is None for p in block.layer.parameters):
                block.discard()  # its gradients were cleared: there is nothing to step along
        wanted = YES
        finite = self._ranks.everywhere(self._finite())
        if finite is not None and self._leaves_open():
            wanted = Verdict(finite)
            self._events.decide(finite)
        else:
            self._events.read()
            if finite is not None and not bool(finite):
                self._events.skip(self._not_finite())
                self._discard()
                return loss
            self._events.go()
        self._agree(capture)
        self._choose_newcomers()
        troubled = self._update_curvature(wanted)
        if not capture.missed:
            self._check_measured(capture, troubled)
        self._note_unused(capture)
        capture.discard()
        self._apply(wanted)
        done = [job for job in self._turns if not self._blocks[job.name].factors.empty]
        self._schedule.charge(done, self._step_cost(), self._position)
        self._events.counts["steps"] += 1
        self._position += 1
        self._set_due()
        return loss

    def _initialise(self) -> None:
        """Make the state that a step would, as torch.distributed.checkpoint has it made."""
        covered = {p for block in self._blocks.values() for p in block.layer.parameters}
        for group in self.param_groups:
            adam_state([p for p in group["params"] if p not in covered], self.state)
            if group["momentum"]:
                momentum_state([p for p in group["params"] if p in covered], self.state)

    def _leaves_open(self) -> bool:
        """Whether the device decides by itself what the coming step skips.

        The host does not wait for it then. It has to know where a basis is made.
        """
        if not self._waits():
            return False
        alone = self._ranks.count == 1
        for block in self._blocks.values():
            if block.due.basis and not block.factors.empty:
                return False
            # What one rank has seen, another may not have: they decide by what is due.
            first = block.pending if alone else block.listening
            if first and block.empty and not block.waiting:
                return False
        return True

    def _waits(self) -> bool:
        """Whether reading from the device makes the host wait for work given to it before."""
        return any(verdict.waits(p.device) for group in self.param_groups for p in group["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget statistics taken since the last step along with them."""
        super().zero_grad(set_to_none)
        self._discard()
        if self._capture is not None:
            self._capture.resume()

    def _discard(self) -> None:
        for block in self._blocks.values():
            block.discard()
        if self._capture is not None:
            self._capture.discard()

    def _due(self, step: int) -> Due:
        """What is due in a step, counted from 0."""
        factors = self._is_due(step, self.factor_every)
        rows = amount_at(self.factor_every, self.factor_rows)
        here = None if rows is None else rows / self._ranks.count
        return Due(factors, scale=False, basis=False, factor_rows=here)

    def _is_due(self, step: int, every: int) -> bool:
        """Whether statistics are that are taken so often."""
        return is_due(step, every, STATISTICS if self.interval_warmup else None)

    def _last_turn(self, position: int) -> int:
        """The last step, up to this one, in which all bases were due."""
        return last_due(position, self.basis_every, BASES if self.interval_warmup else None)

    def _decay(self, every: int, decay: float) -> float:
        """ε of an average that is due now."""
        divisor = STATISTICS if self.interval_warmup else None
        return decay_at(self._position, every, divisor, decay)

    def _set_due(self) -> None:
        usual = self._due(self._position)
        if self._capture is not None and self._ranks.repeats(self._capture.missed):
            # What the last step was to measure, it has not seen.
            missed = [block.due for block in self._blocks.values() if not block.factors.empty]
            usual = replace(
                usual,
                factors=usual.factors or any(due.factors for due in missed),
                scale=usual.scale or any(due.scale for due in missed),
            )
        self._turns = self._choose()
        turns = {job.name for job in self._turns}
        divided = self._unit.count > 1  # not every rank has every basis when it measures
        for block in self._blocks.values():
            basis = block.name in turns
            if block.factors.empty:
                # Measured as soon as it can be, but a layer that no gradient reaches must not cost
                # an extra backward pass in every step.
                now = usual.factors or not block.silent
                block.due = replace(usual, factors=now, scale=now, basis=now, late=True)
            else:
                # A first basis has its rescaling with the next measurement: one for it alone would
                # cost a backward pass in every turn.
                scale = usual.scale and (basis or block.basis is not None)
                block.due = replace(usual, scale=scale, basis=basis, late=basis or divided)
        if isinstance(self.fisher, SampledFisher):
            self._ranks.reseed(self.fisher.generator, self._seed, self._position)
        if self._capture is not None:
            self._capture.expect()

    def _choose(self) -> list[Job]:
        """The blocks whose turn it is to get a new basis in the coming step, or in this one."""
        last = self._last_turn(self._position)
        since = self._schedule.refreshed
        jobs = [
            Job(block.name, since.get(block.name, -1), block.refresh_cost)
            for block in self._blocks.values()
            if (block.basis is None or since.get(block.name, -1) < last)
            and (block.pending or not block.factors.empty)
        ]
        if self.basis_every < LONG:
            return jobs
        return self._schedule.choose(jobs, self._step_cost())

    def _agree(self, capture: Capture) -> None:
        """Have all ranks know the same before a basis is made or a layer measured the first time.

        On all other steps nothing that ranks do together depends on what one of them has seen.
        """
        blocks = self._blocks.values()
        if not any(
            block.due.basis or (block.listening and block.factors.empty) for block in blocks
        ):
            return
        mark = digest(self._facts())
        own = [block.tell() for block in blocks]
        said = [mark, -mark, -int(capture.parallel), *(each for told in own for each in told)]
        highest, lowest, unaveraged, *heard = self._ranks.highest(said)
        if highest != -lowest:
            check_alike(self._ranks, self._facts())
        self._ranks.averaged |= unaveraged == -1
        for block, told in zip(blocks, own, strict=True):
            block.hear(heard[: len(told)])
            heard = heard[len(told) :]
        capture.settle(block.name for block in blocks if block.pending)

    def _choose_newcomers(self) -> None:
        """Choose again if blocks were measured for the first time: now what they take is known."""
        if any(block.factors.empty and block.pending for block in self._blocks.values()):
            self._turns = self._choose()
            turns = {job.name for job in self._turns}
            for block in self._blocks.values():
                block.due = replace(block.due, basis=block.name in turns)

    def _step_cost(self) -> int:
        return sum(block.step_cost for block in self._blocks.values())

    def _decays(self) -> tuple[float, float]:
        """ε2 and ε1 now; the latter for the methods that have a rescaling of their own."""
        return self._decay(self.factor_every, self.factor_decay), 0.0

    def _update_curvature(self, wanted: Verdict) -> set[str]:
        """Bring all blocks up to date; names of those whose batch is known to be unusable."""
        blocks = list(self._blocks.values())
        measured = [block for block in blocks if block.listening]
        factor_decay, scale_decay = self._decays() if measured else (0.0, 0.0)
        for block in blocks:
            block.finish(own_mean=self.fisher is None and self.loss_reduction == "mean")
        self._ranks.pool(measured, late=False)
        for block in blocks:
            block.learn(factor_decay, wanted)
        troubled = self._refresh([block for block in blocks if block.refreshing])
        self._ranks.pool([block for block in blocks if block.rescaling], late=True)
        for block in blocks:
            block.release()
            report = block.finish_update(scale_decay)
            if report.used.open:
                self._events.count("skipped_statistics", report.used.missed(wanted))
            elif report.used.refused:
                troubled.add(block.name)
                self._events.counts["skipped_statistics"] += 1
                self._events.warn_of("skipped_statistics", f"layer {block.name!r}")
        if measured:
            self._update_fc_scale()
        return troubled

    def _refresh(self, due: Sequence[Block]) -> set[str]:
        """Make new bases, each on one rank, and rotate what waited for them.

        Returns:
            The names of blocks for which none could be found.
        """
        ranks, failed = self._ranks, set()
        places = [holders(self._homes[b.name], ranks.count, self._unit.count) for b in due]
        makers = divided([block.refresh_cost for block in due], places, [0] * ranks.count)
        own = [
            block.eigen() if maker == ranks.number else block.eigen_shapes()
            for block, maker in zip(due, makers, strict=True)
        ]
        sources = [maker for maker, each in zip(makers, own, strict=True) for _ in each]
        found = iter(ranks.spread([tensor for each in own for tensor in each], sources))
        for block, each in zip(due, own, strict=True):
            if not block.refresh([next(found) for _ in each]):
                failed.add(block.name)
                self._events.counts["failed_decompositions"] += 1
                self._events.warn(
                    "failed_decompositions",
                    f"no eigendecomposition of layer {block.name!r}'s factors could be found, in "
                    "float64 either: the last good basis stays "
                    "(counters['failed_decompositions'] counts these)",
                )
        known = {block.name for block in due} - failed
        for block in self._blocks.values():
            if block.rescaling:
                if block.name not in known:
                    home = self._homes[block.name]
                    block.borrow(self._unit.spread(block.vectors(), [home, home]))
                block.rotate()
                block.release()
        return failed

    def _update_fc_scale(self) -> None:
        """Bring β of the fully-connected blocks up to date, where the method has it."""

    def _note_unused(self, capture: Capture) -> None:
        """Don't look out in every step for layers that a backward pass, seen whole, came not by."""
        new = [block for block in self._blocks.values() if block.listening and block.factors.empty]
        if not new:
            return
        reached = capture.reached_layers
        said = [int(bool(reached)), *(int(block.name in reached) for block in new)]
        anything, *seen = self._ranks.highest(said)
        for block, here in zip(new, seen, strict=True):
            block.silent |= bool(anything and not here)

    def _check_measured(self, capture: Capture, troubled: set[str]) -> None:
        """Raise or warn if layers have gradients but no curvature, and no known trouble."""
        if lost := [*map(repr, capture.lost())]:
            self._events.warn(
                "unseen",
                f"the curvature of layers {first_few(lost)} stays as it was: they get gradients, "
                "but the last steps that were to measure it have not seen them behind the model's "
                "output (is the model itself called, and its gradient not put there by hand?)",
            )
        missing = [
            block.name
            for block in self._blocks.values()
            if block.empty
            and not (block.silent or block.waiting)
            and block.name not in troubled
            and block.name not in capture.reached_layers
            # A matrix that nobody multiplies (a table, positions) is no layer.
            and multiplies(capture.strange.get(block.name, "mm"))
            and any(p.grad is not None for p in block.layer.parameters)
        ]
        if not missing:
            return
        if capture.reentrant:
            raise RuntimeError(REENTRANT)
        if capture.problem is not None:
            raise RuntimeError(
                f"no statistics could be taken: {capture.problem}"
            ) from capture.problem
        if capture.passes == 0 and len(missing) == len(self._blocks):
            raise RuntimeError(
                "step() found gradients, but no statistics could be taken: call the model itself "
                f"({type(self.model).__name__}.__call__, the module given to {self._method}) "
                "or modules in it, and backward() of a loss that is made of what they return"
            )
        kinds = {capture.strange[name] for name in missing if name in capture.strange}
        self._events.warn(
            "missing",
            f"no curvature of layers {first_few([*map(repr, missing)])}: they have gradients, but "
            + (
                f"their weights are used by {', '.join(sorted(kinds))}, which is no product known "
                "here"
                if kinds
                else "no product with their weights was found behind the model's output in the "
                "backward pass (did the loss take another way than the output? output= may give "
                "several tensors)"
            )
            + "; the first-order rule trains them",
        )

    def _finite(self) -> Tensor | None:
        """Whether all gradients are, 0-dimensional; None if there is none.

        One whose square is beyond float32's range (entries above 1e19) counts as not finite.
        """
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            return None
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError(
                f"{self._method} does not support sparse gradients: give embeddings sparse=False"
            )
        waits = self._waits()
        finite = _all_finite(grads, math.inf if waits else 2.0)
        # Of numbers near the end of their range the square is not finite, and the largest is: of
        # gradients on a processor that takes 20 times as long to find.
        return finite if waits or bool(finite) else _all_finite(grads, math.inf)

    def _not_finite(self) -> str:
        """Name of a parameter whose gradient is not finite."""
        for name, p in self.model.named_parameters():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                return repr(name)
        return "a parameter outside the model"

    def _apply(self, wanted: Verdict) -> None:
        """Turn gradients into steps: preconditioned for the layers, first order for the rest.

        Args:
            wanted: whether to take the step.
        """
        directions: dict[Tensor, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for name, block in self._blocks.items():
            weight, bias = block.layer.weight, block.layer.bias
            reached = [p for p in block.layer.parameters if p.grad is not None]
            if reached and not block.empty:
                gradients[name] = block.layer.matrix(
                    None if weight is None else weight.grad, None if bias is None else bias.grad
                )
        naturals = self._preconditioner.natural_gradients(
            self._blocks,
            {name: each for name, each in gradients.items() if self._blocks[name].held},
        )
        known = [naturals.get(name, gradient) for name, gradient in gradients.items()]
        spread = self._unit.spread(known, [self._homes[name] for name in gradients])
        naturals = dict(zip(gradients, spread, strict=True))
        if self.kl_clip is not None:
            naturals = within_kl(naturals, gradients, self._blocks, self.kl_clip)
        for name, natural in within_rms(naturals, self._blocks).items():
            layer = self._blocks[name].layer
            parts = zip(layer.parameters, layer.split(natural), strict=True)
            directions |= {p: part.to(p.dtype) for p, part in parts if p.grad is not None}
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None]
            own = {p: directions[p] for p in ready if p in directions}
            step_along(own, self.state, group, wanted)
            others = [p for p in ready if p not in directions]
            adam_step(others, self.state, rule_of(group), wanted)

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues the run bit for bit, as plain tensors, numbers and strings.

        As in ``torch.optim``, tensors are references: save or deep-copy it before the next step.
        Beside "state" and "param_groups" there is "tekfac", with the method, its settings, counters
        and the state of the generator; a block's estimates are in the state of the layer's first
        parameter.
        """
        packed = super().state_dict()
        state.add_blocks(packed, self.param_groups, self._blocks, self._learnt())
        packed["tekfac"] = {
            "method": self._method,
            "blocks": state.layout_of(self.param_groups, self._blocks),
            "settings": {name: getattr(self, name) for name in self._settings},
            "counters": self.counters,
            "position": self._position,
            "schedule": {
                "credit": self._schedule.credit,
                "refreshed": dict(self._schedule.refreshed),
                "work": {name: block.work for name, block in self._blocks.items()},
            },
        }
        if isinstance(self.fisher, SampledFisher):
            # As text: it is no tensor that anybody should move, cast or shard.
            state_of = bytes(self.fisher.generator.get_state().tolist())
            packed["tekfac"]["generator"] = state_of.hex()
            packed["tekfac"]["seed"] = self._seed
        if packed["param_groups"]:
            # Where torch.distributed.checkpoint, which knows of nothing else, takes it along.
            packed["param_groups"][0]["tekfac"] = packed["tekfac"]
        return packed

    def _learnt(self) -> dict[str, dict[str, Tensor]]:
        """All blocks' estimates by name, also those that other ranks hold."""
        own = {name: block.state_dict() for name, block in self._blocks.items()}
        shared = [(name, key) for name in own for key in own[name] if key in STORED]
        values = [own[name][key] for name, key in shared]
        whole = self._unit.spread(values, [self._homes[name] for name, _ in shared])
        for (name, key), value in zip(shared, whole, strict=True):
            own[name][key] = value
        return own

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
        learnt = state.take_blocks(packed)
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
        self._position = own.get("position", own["counters"]["steps"])  # not there in older states
        self._schedule = self._scheduled(own.get("schedule"))
        if isinstance(self.fisher, SampledFisher) and "generator" in own:
            saved = own["generator"]
            if isinstance(saved, str):  # in older states a tensor
                saved = torch.tensor(list(bytes.fromhex(saved)), dtype=torch.uint8)
            self.fisher.generator.set_state(saved.cpu())
            self._seed = own.get("seed", self._seed)  # not there in older states
        self._update_fc_scale()
        self._alike = False
        self._set_due()

    def _scheduled(self, packed: dict[str, Any] | None) -> Schedule:
        """What `state_dict` kept of the schedule; older states had none, and all turns at once."""
        if packed is None:
            last = self._last_turn(self._position - 1)
            return Schedule(
                refreshed={name: last for name, block in self._blocks.items() if block.basis}
            )
        for name, work in packed["work"].items():
            self._blocks[name].work = work
        return Schedule(packed["credit"], dict(packed["refreshed"]))

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts its own `step` on the instance; it and hooks stay behind, as in torch.
        kept = {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_capture", "step") and not key.startswith("_optimizer_")
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
        if closed is not None:  # unpickled or copied, not load_state_dict
            self._capture = None
            if not closed:
                self._listen()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the whole signature of a method's constructor, whose common part is ``**common``."""
        super().__init_subclass__(**kwargs)
        merged: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__:
            if issubclass(base, NaturalGradient) and "__init__" in vars(base):
                for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items():
                    if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
                        merged.setdefault(name, parameter)
        cls.__signature__ = inspect.Signature(list(merged.values()))  # type: ignore[attr-defined]


def _all_finite(tensors: list[Tensor], order: float) -> Tensor:
    """Whether the norms of this order of all tensors are, 0-dimensional."""
    dtype = reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    norms = torch._foreach_norm(tensors, order, dtype=dtype)
    return torch.stack([n.to(tensors[0].device) for n in norms]).isfinite().all()
