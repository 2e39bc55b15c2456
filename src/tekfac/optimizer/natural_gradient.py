"""The algorithm that all four methods are: everything but which block they use.

It orchestrates: blocks know their curvature, `capture` knows the model, this module knows when what
is due, and turns preconditioned gradients into steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor, nn

from tekfac import verdict
from tekfac.capture.capture import Capture
from tekfac.capture.fisher import SampledFisher, make_fisher
from tekfac.capture.likelihoods import Likelihood, make_likelihoods
from tekfac.curvature.damping import AdaptiveDamping, AgreementDamping, Damping
from tekfac.layers import assign
from tekfac.optimizer.agreement import EVERY, Agreement
from tekfac.optimizer.arguments import check_arguments
from tekfac.optimizer.events import Events
from tekfac.optimizer.finite import all_finite, name_not_finite
from tekfac.optimizer.first_order import Adam, adam_step
from tekfac.optimizer.groups import check_group, rule_of
from tekfac.optimizer.household import Household
from tekfac.optimizer.model_optimizer import ModelOptimizer
from tekfac.optimizer.orthogonal import length_of, orthogonalized
from tekfac.optimizer.timetable import Timetable
from tekfac.optimizer.trial import check_closure, trial_of
from tekfac.optimizer.unmeasured import check_grouped, check_measured, note_unused
from tekfac.optimizer.update import (
    Preconditioner,
    accumulate,
    kl_changes,
    step_along,
    within_kl,
    within_rms,
)
from tekfac.ranks.fully_sharded import plain_parameters
from tekfac.ranks.group import facts_of, ranks_for, values_of
from tekfac.ranks.layout import layout_of
from tekfac.ranks.placement import check_placement
from tekfac.ranks.uneven import Uneven, check_joined, joinable_part
from tekfac.verdict import YES, Verdict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

SUPPORTED = "matrices that rows are multiplied by, embeddings, convolutions"


class NaturalGradient(ModelOptimizer):
    r"""What KFAC, EKFAC, TKFAC and TEKFAC have in common.

    For every supported layer (paper, 3.9, where ``power`` is 1), with ``∇h`` the mini-batch
    gradient of the user's own loss::

        v ← momentum · v + (F̂ + λ I)^(−power) ∇h
        θ ← θ − lr · v

    Weight decay is decoupled, ``θ ← θ − lr · weight_decay · θ``, as in AdamW: the penalty's
    gradient is not part of the likelihood that the Fisher matrix belongs to. All other parameters
    (norm layers, free parameters) are trained by ``first_order``. Until a layer's
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
            each layer's own curvature, `AgreementDamping`, which is that and falls where gradients
            have no noise, `AdaptiveDamping`, which is that and follows the loss, `RelativeDamping`,
            which follows the size of each layer's weights, `FactoredDamping`, which makes a
            difference to EKFAC and TEKFAC, or, of TKFAC and TEKFAC, `TraceDamping`. The default
            needs no tuning: it has no unit. With a float, ``lr / damping`` is the step in
            directions without curvature.
        power: of the damped curvature that gradients are divided by, above 0 and at most 1. 1 is
            natural gradient, and the paper's. 1/2 divides each direction of the eigenbasis by the
            root of its curvature, as Adam, Shampoo and SOAP do, and wants their learning rates: the
            noise of a gradient is as large as that root, so that all directions are equally noisy.
            None for 1, and 1/2 for tables that are looked up (embeddings), of whose entries some
            are rare.
        rms_clip: bound on the size of each layer's steps, so that a run that would diverge trains:
            natural gradients ``u = (F̂ + λ I)^(−power) ∇h`` are scaled by
            ``min(1, (1 − momentum) rms_clip / rms(u))``, each layer's by its own root mean square,
            before they go into ``v``. No step is larger than ``lr · rms_clip`` then, which is the
            size of Adam's steps where 1, whatever the loss is multiplied by. This is Adafactor's
            clipping of updates (Shazeer and Stern, 2018), with room for the sum that momentum
            makes. None for no bound, as in the paper.
        orthogonalize: step along the polar factor ``U Vᵀ`` of what a layer would step along,
            ``U S Vᵀ``, as Muon does (`optimizer.orthogonal`): along all singular directions alike,
            in place of the few loudest. In every step that takes ten to fifteen multiplications for
            each entry times the matrix's shorter side; a forward and a backward pass take three for
            each entry and row. True: in all layers, each step with a root mean square of
            ``rms_clip``, or 1 without, however short it was. None, the default: in layers for which
            it takes at most a third of a pass (a square one of d columns that sees about 15 d rows
            in a step), each step at most twice as long as it was, and no longer than ``rms_clip``;
            not where steps agree, as `AgreementDamping` finds. With another rule of damping,
            without momentum or ``rms_clip``, and with ``kl_clip``, None is False. Tables that are
            looked up always step as they are. True is refused beside ``kl_clip``.
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
        weight_sharing: how factors see a layer that multiplies an example at several positions
            (tokens, pixels; Eschenhagen et al., 2023). "expand": as if derivatives at different
            positions were independent, as in the paper. "reduce": as one, the mean of its inputs
            and the sum of its output gradients, which is exact where all positions get the same
            gradient, as before a mean over them, and takes less time. Tables that are looked up are
            always seen by entry. EKFAC's and TEKFAC's rescaling is exact with either.
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
            "weight_decay", "damping", "power", "rms_clip" and "orthogonalize"; None for all
            parameters that require a gradient. A group that mixes layers' parameters with others
            becomes two.

        process_group: the ranks that train the model together (docs/ranks.md): a process group, or
            a `DeviceMesh` of one dimension. None for that of a `DistributedDataParallel` in the
            model or the mesh that ``fully_shard`` divides it among, or else for all ranks, if
            torch.distributed is initialised.
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
        NotImplementedError: for a model whose parameters are divided among ranks, unless
            ``fully_shard`` or tensor parallelism, or one around the other, has done it.
    """

    _uneven: Uneven | None = None
    _join_config: Any = None
    _whole = False  # whether all of the model is to be trained
    _settings: ClassVar[tuple[str, ...]] = (
        "factor_every",
        "basis_every",
        "interval_warmup",
        "factor_decay",
        "factor_rows",
        "weight_sharing",
        "rank",
        "kl_clip",
    )

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-3,
        momentum: float = 0.9,
        *,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        damping: Damping = AgreementDamping(),
        power: float | None = None,
        rms_clip: float | None = 1.0,
        orthogonalize: bool | None = None,
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
        weight_sharing: str = "expand",
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
                f"layers see: {self._method}(model, lr=...); got {type(model).__name__} (to a "
                "framework that makes optimizers from a class, give one that is made)"
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"{self._method} can't see what a model compiled by torch.jit multiplies: give it "
                "the model as it was before torch.jit.script or torch.jit.trace (torch.compile may "
                "be used)"
            )
        check_arguments(
            loss_reduction=loss_reduction,
            mean_over=mean_over,
            batch_dim=batch_dim,
            mc_samples=mc_samples,
            kl_clip=kl_clip,
            factor_every=factor_every,
            basis_every=basis_every,
            factor_decay=factor_decay,
            factor_rows=factor_rows,
            weight_sharing=weight_sharing,
            rank=rank,
            storage=storage,
            first_order=first_order,
        )
        check_placement(placement)

        self.model = model
        self.placement = placement
        layout = layout_of(model)
        self._ranks = ranks_for(model, layout, process_group, communication)
        self._household = Household(self._ranks, placement, layout)
        self.factor_every, self.basis_every = factor_every, basis_every
        self.interval_warmup = interval_warmup
        self.factor_decay, self.kl_clip = factor_decay, kl_clip
        self.factor_rows, self.rank, self.storage = factor_rows, rank, storage
        self.weight_sharing = weight_sharing
        self.loss_reduction = loss_reduction
        self.first_order = first_order
        self.mean_over, self.batch_dim = mean_over, batch_dim
        self.fisher = make_fisher(fisher, mc_samples, generator)
        if isinstance(self.fisher, SampledFisher):
            self.fisher.seed = int(self._ranks.texts(str(self.fisher.seed))[0])
        self.likelihoods = make_likelihoods(likelihood)
        self.output = output
        self._assignment = assign(model, exclude)
        if not self._assignment.candidates:
            raise ValueError(
                f"{self._method} found no layer that it supports in {type(model).__name__} "
                f"({SUPPORTED}): use a torch.optim optimizer for this model"
            )
        self._events = Events()
        self._agreement = Agreement()
        self._timetable = Timetable()
        self._blocks = {}
        self._frozen = set()
        self._preconditioner = Preconditioner()
        self._capture = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "damping": damping,
            "power": power,
            "rms_clip": rms_clip,
            "orthogonalize": orthogonalize,
        }
        self._whole = params is None
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
        self._household.check_alike(self._facts)

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
            "their parameters": facts_of(plain_parameters(self.model)),
            "their layers": "\n".join(self._blocks),
            "their settings": "\n".join(f"{name}={value}" for name, value in settings.items()),
            "their parameter groups": "\n".join(
                f"{name}={len(value) if name == 'params' else value}"
                for group in self.param_groups
                for name, value in group.items()
                if name not in ("base_lr", "initial_lr")  # what "lr" was at first
            ),
            "the steps that they took": str(self._timetable.step),
        }

    def _values(self) -> str:
        return values_of(plain_parameters(self.model))

    # -- the step ----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: clears the gradients, evaluates the model, calls ``backward`` and returns the
                loss; called once, by `AdaptiveDamping` now and then twice.

        Returns:
            The closure's loss, None without one.

        Raises:
            RuntimeError: on the first step if no statistics of any layer could be taken, after
                `close`, and under `AdaptiveDamping` without a closure that it can use.
        """
        loss = None
        trial = trial_of(self.model, self.param_groups, self._timetable.step, closure)
        if closure is not None:
            self._cleared = False
            with torch.enable_grad():
                loss = closure()
        if trial is not None:
            trial.begin(loss, self._cleared)
        capture = self._open()
        config = self._join_config
        uneven = self._uneven if config is not None and config.enable else None
        over = uneven is not None and uneven.over
        check_joined(capture.uneven, config, over)
        if uneven is not None:
            uneven.share([p for group in self.param_groups for p in group["params"]])
        elif capture.passes == 0 and all(group["lr"] == 0 for group in self.param_groups):
            self._initialise()
            return loss
        check_closure(self.param_groups, closure)
        self._household.check_alike(self._facts)
        self._household.shards.settle(p for group in self.param_groups for p in group["params"])
        capture.flush()
        for block in self._blocks.values():
            if block.pending and all(p.grad is None for p in block.layer.parameters):
                block.discard()  # its gradients were cleared: there is nothing to step along
        wanted = YES
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        finite = self._ranks.everywhere(all_finite(gradients, self._waits(), self._method))
        if finite is not None and self._leaves_open():
            wanted = Verdict(finite)
            self._events.decide(finite)
        else:
            self._events.read()
            if finite is not None and not bool(finite):
                self._events.skip(name_not_finite(self.model, self._ranks))
                self._discard()
                return loss
            self._events.go()
        self._agree(capture)
        self._timetable.welcome(self._blocks.values(), self._in_use)
        troubled = self._update_curvature(wanted)
        if not (capture.missed or over):
            check_measured(capture, self._blocks, troubled, self._events, self.model, self._method)
        step = self._timetable.step
        if self._whole and self._in_use.last_turn(step) == step:
            # Not in every step: it goes through all modules.
            check_grouped(plain_parameters(self.model), self.param_groups, self._events)
        note_unused(capture, self._blocks, self._ranks)
        capture.discard()
        if any(block.due.basis for block in self._blocks.values()):
            self._agreement.follow(step, self.param_groups, self._ranks)
        self._apply(wanted)
        if trial is not None:
            self._reduction_ratio = trial.end(self._blocks, self._household)
        self._timetable.advance(self._blocks.values())
        self._events.counts["steps"] += 1
        self._set_due()
        return loss

    def join_hook(self, **kwargs: Any) -> Any:
        """For ``with torch.distributed.algorithms.join.Join([model, optimizer]):``.

        There ranks may run out of batches before others do: they take part in the others' steps
        then. A step belongs to each pass through the model but those within ``no_sync``.

        Raises:
            NotImplementedError: with `AdaptiveDamping`.
            ValueError: if the model given has no `DistributedDataParallel`.
        """
        if any(isinstance(group["damping"], AdaptiveDamping) for group in self.param_groups):
            raise NotImplementedError(
                "AdaptiveDamping tries steps on all ranks' batches, and in a Join ranks may have "
                "none: take another damping, or give all ranks as many batches"
            )
        part = joinable_part(self.model)
        if self._uneven is not None:  # one that was left with an error
            self._uneven.close()
        self._uneven = Uneven(part, self._ranks, self._follow, self._leave_join)
        return self._uneven

    @property
    def join_device(self) -> torch.device:
        """Where `Join` has its messages."""
        device: torch.device = joinable_part(self.model).join_device
        return device

    @property
    def join_process_group(self) -> Any:
        """The ranks that `Join` is about."""
        return joinable_part(self.model).join_process_group

    def _follow(self) -> None:
        """Take a step that other ranks have a batch for."""
        self.zero_grad()
        self.step()

    def _leave_join(self) -> None:
        self._uneven = None

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

    def _agree(self, capture: Capture) -> None:
        """Have all ranks know the same before a basis is made or a layer measured the first time.

        On all other steps nothing that ranks do together depends on what one of them has seen.
        """
        blocks = self._blocks.values()
        if not any(
            block.due.basis or (block.listening and block.factors.empty) for block in blocks
        ):
            return
        self._household.agree(self._blocks, self._facts, self._values, capture.parallel)
        capture.settle(block.name for block in blocks if block.pending)

    def _update_curvature(self, wanted: Verdict) -> set[str]:
        """Bring all blocks up to date; names of those whose batch is known to be unusable."""
        blocks = list(self._blocks.values())
        measured = [block for block in blocks if block.listening]
        intervals, step = self._in_use, self._timetable.step
        for block in blocks:
            block.finish(own_mean=self.fisher is None and self.loss_reduction == "mean")
        self._ranks.pool(measured, late=False)
        for block in blocks:
            block.learn(intervals.decay(step, intervals.factors), wanted)
        due = [block for block in blocks if block.refreshing]
        troubled = self._household.refresh(due)
        for name in sorted(troubled):
            self._events.counts["failed_decompositions"] += 1
            self._events.warn(
                "failed_decompositions",
                f"no eigendecomposition of layer {name!r}'s factors could be found, in "
                "float64 either: the last good basis stays "
                "(counters['failed_decompositions'] counts these)",
            )
        self._household.rotate(self._blocks, {block.name for block in due} - troubled)
        self._ranks.pool([block for block in blocks if block.rescaling], late=True)
        for block in blocks:
            block.release()
            report = block.finish_update(intervals.decay(step, intervals.scale))
            if report.used.open:
                self._events.count("skipped_statistics", report.used.missed(wanted))
            elif report.used.refused:
                troubled.add(block.name)
                self._events.counts["skipped_statistics"] += 1
                self._events.warn_of("skipped_statistics", f"layer {block.name!r}")
        if measured:
            self._update_fc_scale()
        return troubled

    def _apply(self, wanted: Verdict) -> None:
        """Turn gradients into steps: preconditioned for the layers, first order for the rest.

        Args:
            wanted: whether to take the step.
        """
        covered: dict[Tensor, str] = {
            p: name
            for name, block in self._blocks.items()
            for p in block.layer.parameters
            if p.grad is not None and not block.empty
        }
        blocks = {name: self._blocks[name] for name in covered.values()}
        own = {p: p.grad for p in covered if p.grad is not None}
        whole = self._household.gather(own, covered)
        gradients = {n: b.layer.matrix_of(whole) for n, b in blocks.items() if b.held}
        naturals = self._preconditioner.natural_gradients(blocks, gradients)
        if self.kl_clip is not None:
            changes = self._household.tell(kl_changes(naturals, gradients, blocks), blocks)
            naturals = within_kl(naturals, changes, self.kl_clip)
        directions = self._hand_out(within_rms(naturals, blocks), covered)
        compared = (self._timetable.step + 1) % EVERY == 0
        steps: dict[Tensor, Tensor] = {}
        for number, group in enumerate(self.param_groups):
            along = {p: directions[p] for p in group["params"] if p in directions}
            if compared:
                self._agreement.note(number, group, along, self.state, wanted)
            steps |= accumulate(along, self.state, group, wanted)
        if self.kl_clip is None:  # of whose bound it would leave nothing
            steps |= self._orthogonalized(steps, covered)
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None]
            step_along({p: steps[p] for p in ready if p in steps}, group, wanted)
            others = [p for p in ready if p not in steps]
            adam_step(others, self.state, rule_of(group), wanted)

    def _orthogonalized(
        self, steps: Mapping[Tensor, Tensor], covered: Mapping[Tensor, str]
    ) -> dict[Tensor, Tensor]:
        """What those of ``steps`` become that are to be orthogonal."""
        chosen = {p: name for p, name in covered.items() if self._blocks[name].orthogonal}
        if not chosen:
            return {}
        blocks = {name: self._blocks[name] for name in chosen.values()}
        whole = self._household.gather(steps, chosen)
        matrices = {n: b.layer.matrix_of(whole) for n, b in blocks.items() if b.held}
        found = {
            name: polar * length_of(matrices[name], blocks[name].group)
            for name, polar in orthogonalized(matrices).items()
        }
        return self._hand_out(found, chosen)

    def _hand_out(
        self, matrices: Mapping[str, Tensor], covered: Mapping[Tensor, str]
    ) -> dict[Tensor, Tensor]:
        """What was found for each layer, where its block is held, by parameter, where it steps."""
        found: dict[Tensor, Tensor] = {}
        for name, matrix in matrices.items():
            layer = self._blocks[name].layer
            parts = zip(layer.parameters, layer.split(matrix), strict=True)
            found |= {p: part.to(p.dtype) for p, part in parts if p in covered}
        return self._household.hand_out(found, covered)

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
