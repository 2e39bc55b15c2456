"""The optimizer that all four methods are: everything but which block they use.

It orchestrates: blocks know their curvature, `capture` knows the model, this module knows when what
is due, and turns preconditioned gradients into steps.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any, ClassVar, TypedDict, overload

import torch
from torch import Tensor, nn

from tekfac.blocks import Block, Due, Stack
from tekfac.capture import REENTRANT, Capture
from tekfac.checks import check_count, check_decay, check_not_negative, check_positive
from tekfac.damping import Damping, check_damping, packed_damping, unpacked_damping
from tekfac.first_order import Adam, adam_step, decay_weights, multiply
from tekfac.fisher import LIKELIHOODS, ExactFisher, Fisher, Likelihood, SampledFisher
from tekfac.intervals import BASES, STATISTICS, decay_at, is_due
from tekfac.layers import assign, kind_of
from tekfac.sampling import amount_at


class Common(TypedDict, total=False):
    """Keyword arguments of `NaturalGradient` that a method passes on."""

    nesterov: bool
    weight_decay: float
    fisher: str
    likelihood: str | Likelihood
    mc_samples: int
    generator: torch.Generator | None
    loss_reduction: str
    output: Callable[[Any], Tensor] | None
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


class NaturalGradient(torch.optim.Optimizer):
    r"""What KFAC, EKFAC, TKFAC and TEKFAC have in common.

    For every supported layer (paper, 3.9), with ``∇h`` the mini-batch gradient of the user's own
    loss::

        v ← momentum · v + (F̂ + λ I)⁻¹ ∇h
        θ ← θ − lr · v

    Weight decay is decoupled, ``θ ← θ − lr · weight_decay · θ``, as in AdamW: the penalty's
    gradient is not part of the likelihood that the Fisher matrix belongs to. All other parameters
    (norm layers, embeddings, free parameters) are trained by ``first_order``. Until a layer's
    curvature has been measured (its first batch was not finite, it never ran as a module of its
    own, no gradient reached it yet) its parameters are too.

    Args:
        model: the module that the training loop calls. Not its parameters.
        lr: step size α of the layers' natural gradient, not negative.
        momentum: μ, in [0, 1). 0 keeps no buffer.
        nesterov: step along ``(F̂ + λ I)⁻¹ ∇h + momentum · v`` instead of ``v``.
        weight_decay: decoupled, not negative.
        damping: λ, a positive float, or a rule: `RelativeDamping`, which follows the size of each
            layer's weights, `FactoredDamping`, which makes a difference to EKFAC and TEKFAC, or, of
            TKFAC and TEKFAC, `TraceDamping`. The default was chosen with the default ``lr`` on
            three tasks (benchmarks/README.md): ``lr / damping`` is the step in directions without
            curvature.
        fisher: labels for the statistics. "mc": drawn from the model's predictive distribution
            (paper, 2.1). "exact": the expectation over all labels, one extra backward pass per
            class. "empirical": the data's own labels and the user's own loss, which is another
            matrix.
        likelihood: what the network's output means: "categorical", "bernoulli", "gaussian" or a
            `Likelihood`. Not used by "empirical".
        mc_samples: labels drawn per example, and extra backward passes, of "mc".
        generator: where "mc" draws from. If None, a generator of the optimizer's own that follows
            ``torch.manual_seed`` and leaves the global random stream alone. Its state is saved with
            the optimizer's.
        loss_reduction: for "empirical" only. "mean": the loss summed up in ``.grad`` between two
            steps is the mean over the examples of all their batches. "sum": it is their sum.
        output: finds the tensor of logits (or means) in what the model returns. If None, that is
            the model's output itself if it is a tensor, or else its field ``.logits``.
        kl_clip: if given, a bound on how far one step changes the predictive distribution: all
            layers' natural gradients ``u = (F̂ + λ I)⁻¹ ∇h`` are scaled by
            ``min(1, sqrt(kl_clip / Σ lr² ⟨u, ∇h⟩))``.
        factor_every: steps between statistics for the factors, ``T_FIM`` of the paper.
        basis_every: steps between refreshes of the eigenbasis, ``T_EIG``.
        interval_warmup: let intervals of 10 steps or more be shorter early in training: at most an
            eighth of the steps taken for statistics, a quarter for the basis. Averages forget
            sooner then, what is older than the last quarter of the steps (`tekfac.intervals`).
        factor_decay: ε2 of (3.6) and (3.7), in [0, 1): the weight of the past.
        factor_rows: where a layer's factors take much work, inputs that they are estimated from in
            each batch, for each column of the input-side one: at evenly spread positions of every
            example, and multiplied as bfloat16 where the processor is made for that
            (`tekfac.sampling`). Half as many if ``factor_every`` is below 10. None for all, as
            they are.
        rank: eigenvectors kept of a wide factor, one wider than three times that; the directions
            orthogonal to them share one eigenvalue, which keeps the trace. It bounds what memory,
            refreshes and preconditioning cost in wide layers. None for all eigenvectors always.
        storage: dtype in which factors, eigenvectors and rescaling are kept between steps, such as
            ``torch.bfloat16``, which halves their memory and rounds them to three digits. None for
            float32, or the parameters' dtype if that is wider. Computed is in that in any case.
        exclude: names of modules (with all that is inside) and module classes left to
            ``first_order``.
        first_order: the rule for every other parameter.
        params: parameter groups, dicts with "params" and any of "lr", "momentum", "nesterov",
            "weight_decay" and "damping"; None for all parameters that require a gradient. A group
            that mixes layers' parameters with others becomes two.

    Raises:
        TypeError: if ``model`` is no module, or an argument is of the wrong type.
        ValueError: for an argument out of its range, or a model without any supported layer.
        NotImplementedError: for a DistributedDataParallel model on more than one rank.
    """

    make_block: ClassVar[type[Block]]
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
        lr: float = 1e-3,
        momentum: float = 0.9,
        *,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: Damping = 1e-2,
        fisher: str = "mc",
        likelihood: str | Likelihood = "categorical",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        loss_reduction: str = "mean",
        output: Callable[[Any], Tensor] | None = None,
        kl_clip: float | None = None,
        factor_every: int = 10,
        basis_every: int = 100,
        interval_warmup: bool = True,
        factor_decay: float = 0.95,
        factor_rows: int | None = 4,
        rank: int | None = 512,
        storage: torch.dtype | None = None,
        exclude: Sequence[str | type[nn.Module]] = (),
        first_order: Adam = Adam(),
        params: Iterable[dict[str, Any]] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{self._method} needs the model itself, not its parameters, to see what its "
                f"layers see: {self._method}(model, lr=...); got {type(model).__name__}"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._check_ranks(model)
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}')
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

        self.model = model
        self.factor_every, self.basis_every = factor_every, basis_every
        self.interval_warmup = interval_warmup
        self.factor_decay, self.kl_clip = factor_decay, kl_clip
        self.factor_rows, self.rank, self.storage = factor_rows, rank, storage
        self.loss_reduction = loss_reduction
        self.first_order = first_order
        self.fisher = _make_fisher(fisher, likelihood, mc_samples, generator)
        self.output = _find_output if output is None else output
        self._assignment = assign(model, exclude)
        if not self._assignment.modules:
            raise ValueError(
                f"{self._method} found no layer that it supports in {type(model).__name__} "
                f"({_supported()}): use a torch.optim optimizer for this model"
            )
        self._counters = dict.fromkeys(
            ("steps", "skipped_steps", "skipped_statistics", "failed_decompositions"), 0
        )
        self._position = 0
        self._unread: dict[str, Tensor] = {}
        self._warned: set[str] = set()
        self._blocks: dict[str, Block] = {}
        self._stacks: dict[object, Stack] = {}
        self._capture: Capture | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "damping": damping,
        }
        if params is None:
            params = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        elif not isinstance(params, Iterable) or isinstance(params, (Tensor, Mapping)):
            raise TypeError(
                "params takes a list of parameter groups: [{'params': [...], 'lr': ...}]"
            )
        _check_group(defaults, self.make_block.trace_damping, self._method)
        super().__init__(params, defaults)
        self._build_blocks()
        if not self._blocks:
            raise ValueError(
                f"no layer that {self._method} supports ({_supported()}) has a parameter to train: "
                "all are frozen, left out or not in the parameter groups"
            )

    def _check_ranks(self, model: nn.Module) -> None:
        """Don't let the parameters of a model that is trained on several ranks drift apart."""
        ranks = torch.distributed.get_world_size()
        words = (
            f"{self._method} does not average curvature over ranks yet: the parameters of a model "
            f"trained by {ranks} ranks together would drift apart"
        )
        if ranks > 1 and isinstance(model, nn.parallel.DistributedDataParallel):
            raise NotImplementedError(words)
        if ranks > 1:
            warnings.warn(words, RuntimeWarning, stacklevel=4)

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
        self._read_counts()
        return dict(self._counters)

    def treatment(self) -> dict[str, str]:
        """How each parameter of the model is trained, in words, by the parameter's name."""
        covered = {p: block for block in self._blocks.values() for p in block.layer.parameters}
        trained = {p for group in self.param_groups for p in group["params"]}
        result = {}
        for name, p in self.model.named_parameters():
            if p in covered:
                block = covered[p]
                result[name] = f"{self._method} block {block.name!r}"
                if block.empty:
                    result[name] += " (first order until its curvature is measured)"
            elif p not in trained:
                result[name] = "not trained: " + (
                    "frozen" if not p.requires_grad else "in no group"
                )
            else:
                result[name] = (
                    f"first order: {self._assignment.reasons.get(p, 'frozen when added')}"
                )
        return result

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
                "weight_decay" and "damping".

        Raises:
            TypeError: if it is no dict with "params", or holds something that is no parameter.
            ValueError: for a setting out of its range, a parameter that is in a group already, or
                one of a layer whose block exists and covers only the layer's other parameter.
            RuntimeError: after `close`.
        """
        if self._blocks:
            self._open()
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"a parameter group is a dict with 'params', got {param_group!r}")
        group = dict(param_group)
        members = group.pop("params")
        members = [members] if isinstance(members, Tensor) else list(members)
        owner = self._assignment.owner
        layers, others = [], []
        for p in members:
            if isinstance(p, nn.Parameter) and p in owner and p.requires_grad:
                name = owner[p]
                block = self._blocks.get(name)
                if block is not None and not any(p is own for own in block.layer.parameters):
                    raise ValueError(
                        f"layer {name!r} already has a block that does not cover this parameter "
                        f"of shape {tuple(p.shape)}: make a new optimizer to change which of a "
                        "layer's parameters are trained"
                    )
                layers.append(p)
            else:
                others.append(p)
        _check_group({**self.defaults, **group}, self.make_block.trace_damping, self._method)
        # In a mixed group "lr" is the layers': the two rules' step sizes are not alike.
        shared = ("weight_decay",) if layers else ("lr", "betas", "eps", "weight_decay")
        given = {key: group[key] for key in shared if key in group}
        rule = asdict(replace(self.first_order, **given))
        before = len(self.param_groups)
        try:
            if layers:
                super().add_param_group({"params": layers, **group, "first_order": False})
            if others:
                super().add_param_group({"params": others, **group, **rule, "first_order": True})
        except (TypeError, ValueError):
            del self.param_groups[before:]  # not one half without the other
            raise
        if self._blocks and layers:
            self._build_blocks()

    def _build_blocks(self) -> None:
        """Make the blocks of all layers in the curvature groups, and listen to them."""
        group_of = self._group_of()
        for name, module in self._assignment.modules.items():
            weight, bias = module._parameters["weight"], module._parameters.get("bias")
            weight = weight if weight in group_of else None
            bias = bias if bias in group_of else None
            kind = kind_of(module)
            if name in self._blocks or kind is None or (weight is None and bias is None):
                continue
            layer = kind(name, module, weight, bias)
            group = group_of[layer.parameters[0]]
            self._blocks[name] = self.make_block(layer, group, self.rank, self.storage)
        self._listen()

    def _group_of(self) -> dict[Tensor, dict[str, Any]]:
        return {
            p: group
            for group in self.param_groups
            if not group["first_order"]
            for p in group["params"]
        }

    def _listen(self) -> None:
        """Put the hooks on the model, in place of those there may be."""
        self.close()
        self._capture = Capture(self.model, self._blocks, self.fisher, self.output)
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
        finite = self._finite()
        wanted = None
        if finite is not None and not self._reads():
            wanted = finite
            self._count("skipped_steps", ~finite)
        else:
            self._read_counts()
            if finite is not None and not bool(finite):
                self._counters["skipped_steps"] += 1
                self._warn_of("skipped_steps", self._not_finite())
                self._discard()
                return loss
        capture.flush()
        self._check_measured(capture, self._update_curvature(wanted))
        self._apply(wanted)
        self._counters["steps"] += 1
        self._position += 1
        self._set_due()
        return loss

    def _reads(self) -> bool:
        """Whether the coming step may read from the device whether all is finite.

        If not, the device decides by itself what it skips, and the host does not wait for it.
        """
        blocks = self._blocks.values()
        return not self._waits() or any(block.empty or block.due.basis for block in blocks)

    def _waits(self) -> bool:
        """Whether reading from the device makes the host wait for work given to it before."""
        return any(p.device.type != "cpu" for group in self.param_groups for p in group["params"])

    def _count(self, name: str, events: Tensor) -> None:
        """Count what happened on the device, if it did; read by `_read_counts`."""
        count = self._unread.get(name)
        self._unread[name] = events.long() if count is None else count + events.to(count.device)

    def _read_counts(self) -> None:
        for name, count in self._unread.items():
            found = int(count)
            self._counters[name] += found
            if name == "skipped_steps":
                self._counters["steps"] -= found
            if found:
                self._warn_of(name, "a parameter" if name == "skipped_steps" else "some layers")
        self._unread.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget statistics taken since the last step along with them."""
        super().zero_grad(set_to_none)
        self._discard()

    def _discard(self) -> None:
        for block in self._blocks.values():
            block.discard()
        if self._capture is not None:
            self._capture.discard()

    def _due(self, step: int) -> Due:
        """What is due in a step, counted from 0."""
        factors = self._is_due(step, self.factor_every, STATISTICS)
        basis = self._is_due(step, self.basis_every, BASES)
        rows = amount_at(self.factor_every, self.factor_rows)
        return Due(factors, scale=False, basis=basis, factor_rows=rows)

    def _is_due(self, step: int, every: int, divisor: int) -> bool:
        return is_due(step, every, divisor if self.interval_warmup else None)

    def _decay(self, every: int, decay: float) -> float:
        """ε of an average that is due now."""
        divisor = STATISTICS if self.interval_warmup else None
        return decay_at(self._position, every, divisor, decay)

    def _set_due(self) -> None:
        usual = self._due(self._position)
        for block in self._blocks.values():
            if block.empty:
                # Measured as soon as it can be, but a layer that no gradient reaches must not cost
                # an extra backward pass in every step.
                now = usual.factors or not block.silent
                block.due = replace(usual, factors=now, scale=now, basis=now)
            else:
                block.due = usual

    def _decays(self) -> tuple[float, float]:
        """ε2 and ε1 now; the latter for the methods that have a rescaling of their own."""
        return self._decay(self.factor_every, self.factor_decay), 0.0

    def _update_curvature(self, wanted: Tensor | None) -> set[str]:
        """Bring all blocks up to date; names of those whose batch is known to be unusable."""
        troubled = set()
        scale = None if self.fisher is None and self.loss_reduction == "mean" else 1.0
        listened = any(block.listening for block in self._blocks.values())
        decays = self._decays() if listened else (0.0, 0.0)
        for block in self._blocks.values():
            report = block.update(scale, *decays, wanted)
            if isinstance(report.used, Tensor):
                assert wanted is not None
                self._count("skipped_statistics", wanted & ~report.used.to(wanted.device))
            elif not report.used:
                troubled.add(block.name)
                self._counters["skipped_statistics"] += 1
                self._warn_of("skipped_statistics", f"layer {block.name!r}")
            if report.failed:
                troubled.add(block.name)
                self._counters["failed_decompositions"] += 1
                self._warn(
                    "failed_decompositions",
                    f"no eigendecomposition of layer {block.name!r}'s factors could be found, in "
                    "float64 either: the last good basis stays "
                    "(counters['failed_decompositions'] counts these)",
                )
        if listened:
            self._update_fc_scale()
        return troubled

    def _update_fc_scale(self) -> None:
        """Bring β of the fully-connected blocks up to date, where the method has it."""

    def _check_measured(self, capture: Capture, troubled: set[str]) -> None:
        """Raise or warn if layers have gradients but no curvature, and no known trouble."""
        missing = [
            block.name
            for block in self._blocks.values()
            if block.empty
            and not block.silent
            and block.name not in troubled
            and any(p.grad is not None for p in block.layer.parameters)
        ]
        if not missing:
            return
        if capture.without_grad.intersection(missing):
            raise RuntimeError(REENTRANT)
        if capture.passes == 0 and len(missing) == len(self._blocks):
            raise RuntimeError(
                "step() found gradients, but no statistics could be taken: call the model itself "
                f"({type(self.model).__name__}.__call__, the module given to {self._method}), in "
                "training mode (model.train()), before loss.backward()"
            )
        names = ", ".join(map(repr, missing[:3])) + (" and others" if len(missing) > 3 else "")
        self._warn(
            "missing",
            f"no curvature of layers {names}: they have gradients, but "
            "their forward did not run as a module in training mode, the batch was empty, or the "
            "loss does not depend on the model's output; the first-order rule trains them",
        )

    def _finite(self) -> Tensor | None:
        """Whether all gradients are, 0-dimensional; None if there is none."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            return None
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError(
                f"{self._method} does not support sparse gradients: give embeddings sparse=False"
            )
        largest = torch._foreach_norm(grads, math.inf)
        return torch.stack([n.to(grads[0].device) for n in largest]).isfinite().all()

    def _not_finite(self) -> str:
        """Name of a parameter whose gradient is not finite."""
        for name, p in self.model.named_parameters():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                return repr(name)
        return "a parameter outside the model"

    def _apply(self, wanted: Tensor | None) -> None:
        """Turn gradients into steps: preconditioned for the layers, first order for the rest.

        Args:
            wanted: if given, whether to take the step, 0-dimensional.
        """
        directions: dict[Tensor, Tensor] = {}
        inner = 0.0
        unmeasured: list[nn.Parameter] = []
        gradients: dict[str, Tensor] = {}
        for name, block in self._blocks.items():
            weight, bias = block.layer.weight, block.layer.bias
            reached = [p for p in block.layer.parameters if p.grad is not None]
            if reached and block.empty:
                unmeasured += reached
            elif reached:
                gradients[name] = block.layer.matrix(
                    None if weight is None else weight.grad, None if bias is None else bias.grad
                )
        for name, natural in self._preconditioned(gradients).items():
            block = self._blocks[name]
            if self.kl_clip is not None:
                inner = inner + block.group["lr"] ** 2 * (natural * gradients[name]).sum()
            parts = zip(block.layer.parameters, block.layer.split(natural), strict=True)
            directions |= {p: part.to(p.dtype) for p, part in parts if p.grad is not None}
        if self.kl_clip is not None and isinstance(inner, Tensor):
            clip = (
                (self.kl_clip / inner.clamp_min(torch.finfo(inner.dtype).tiny)).sqrt().clamp_max(1)
            )
            directions = {p: d * clip.to(d.dtype) for p, d in directions.items()}
        for group in self.param_groups:
            if group["first_order"]:
                ready = [p for p in group["params"] if p.grad is not None]
                adam_step(ready, self.state, group, wanted)
            else:
                ready = [p for p in group["params"] if p in directions]
                self._step_along(ready, directions, group, wanted)
        adam_step(unmeasured, self.state, asdict(self.first_order), wanted)

    def _preconditioned(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``(F̂ + λ I)⁻¹ ∇h`` of these blocks; of small ones with the same shapes together."""
        alike: dict[object, list[str]] = {}
        for name in gradients:
            stacking = self._blocks[name].stacking
            alike.setdefault(name if stacking is None else stacking, []).append(name)
        result: dict[str, Tensor] = {}
        for stacking, names in alike.items():
            blocks = [self._blocks[name] for name in names]
            if len(blocks) == 1:
                result[names[0]] = blocks[0].precondition(gradients[names[0]])
                continue
            stack = self._stacks.get(stacking)
            if stack is None or stack.blocks != blocks:
                stack = self._stacks[stacking] = Stack(blocks)
            found = stack.precondition([gradients[name] for name in names])
            result |= zip(names, found, strict=True)
        return result

    def _step_along(
        self,
        params: list[Tensor],
        directions: dict[Tensor, Tensor],
        group: dict[str, Any],
        wanted: Tensor | None,
    ) -> None:
        """(3.9): momentum and update."""
        if not params:
            return
        steps = [directions[p] for p in params]
        if wanted is not None:
            steps = _where(wanted, steps)
        if group["momentum"]:
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            multiply(buffers, group["momentum"], wanted)
            torch._foreach_add_(buffers, steps)
            if group["nesterov"]:
                torch._foreach_add_(steps, buffers, alpha=group["momentum"])
            else:
                steps = buffers
            if wanted is not None:
                steps = _where(wanted, steps)
        decay_weights(params, group, wanted)
        torch._foreach_add_(params, steps, alpha=-float(group["lr"]))

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues the run bit for bit, as plain tensors, numbers and strings.

        As in ``torch.optim``, tensors are references: save or deep-copy it before the next step.
        Beside "state" and "param_groups" there is "tekfac", with the method, its settings, counters
        and the state of the generator; a block's estimates are in the state of the layer's first
        parameter.
        """
        packed = super().state_dict()
        index = self._index()
        for block in self._blocks.values():
            key = index[block.layer.parameters[0]]
            own = {f"block.{name}": value for name, value in block.state_dict().items()}
            packed["state"][key] = {**packed["state"].get(key, {}), **own}
        for group in packed["param_groups"]:
            group["damping"] = packed_damping(group["damping"])
        packed["tekfac"] = {
            "method": self._method,
            "blocks": self._layout(),
            "settings": {name: getattr(self, name) for name in self._settings},
            "counters": self.counters,
            "position": self._position,
        }
        if isinstance(self.fisher, SampledFisher):
            packed["tekfac"]["generator"] = self.fisher.generator.get_state()
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; nothing is changed if it does not fit.

        Settings kept in it (intervals, decays, groups' settings) replace those given to the
        constructor.

        Raises:
            ValueError: if it is of another method, another architecture or no state of this
                package.
        """
        self._check_fits(state_dict)
        packed = copy.deepcopy(state_dict)  # torch would share the tensors with the other optimizer
        own = packed.pop("tekfac")
        learnt: dict[int, dict[str, Tensor]] = {}
        for key, values in packed["state"].items():
            learnt[key] = {
                name.removeprefix("block."): values.pop(name)
                for name in list(values)
                if name.startswith("block.")
            }
        for group in packed["param_groups"]:
            group["damping"] = unpacked_damping(group["damping"])
        packed["state"] = {key: values for key, values in packed["state"].items() if values}
        super().load_state_dict(packed)
        index, group_of = self._index(), self._group_of()
        for block in self._blocks.values():
            first = block.layer.parameters[0]
            block.group = group_of[first]
            block.load_state_dict(learnt[index[first]])
        for name, value in own["settings"].items():
            setattr(self, name, value)
        self._unread.clear()
        self._counters = dict(own["counters"])
        self._position = own.get("position", self._counters["steps"])  # not there in older states
        if isinstance(self.fisher, SampledFisher) and "generator" in own:
            self.fisher.generator.set_state(own["generator"].cpu())
        self._update_fc_scale()
        self._set_due()

    def _check_fits(self, state_dict: dict[str, Any]) -> None:
        own = state_dict.get("tekfac")
        if own is None:
            raise ValueError(
                "this state dict was not made by a tekfac optimizer: it has no entry 'tekfac', "
                f"only {sorted(state_dict)}"
            )
        if own["method"] != self._method:
            raise ValueError(f"this is a state of {own['method']}, not of {self._method}")
        theirs, ours = (
            {name: tuple(layout["shape"]) for name, layout in layouts.items()}
            for layouts in (own["blocks"], self._layout())
        )
        if theirs != ours:
            name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
            raise ValueError(
                f"this state is of another architecture: layer {name!r} has a block of shape "
                f"{theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
            )
        sizes = [
            [len(group["params"]) for group in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"this state has parameter groups of {sizes[0]} parameters, this optimizer of "
                f"{sizes[1]}"
            )
        for name, layout in self._layout().items():
            if own["blocks"][name] != layout:
                raise ValueError(
                    f"this state has its parameters in another order: those of layer {name!r} are "
                    f"numbers {own['blocks'][name]['parameters']} there, {layout['parameters']} "
                    "here; make the parameter groups in the same way"
                )
        names = {i: p for p, i in self._index().items()}
        for key, values in state_dict["state"].items():
            for name in ("momentum_buffer", "exp_avg"):
                if name in values and values[name].shape != names[key].shape:
                    raise ValueError(
                        f"this state is of another architecture: parameter {key} has shape "
                        f"{tuple(values[name].shape)} there, {tuple(names[key].shape)} here"
                    )

    def _layout(self) -> dict[str, dict[str, list[int]]]:
        """The shape of each block, and the numbers of the parameters that it covers."""
        index = self._index()
        return {
            name: {
                "shape": list(block.shape),
                "parameters": [index[p] for p in block.layer.parameters],
            }
            for name, block in self._blocks.items()
        }

    def _index(self) -> dict[Tensor, int]:
        """The number under which `state_dict` knows a parameter."""
        params = [p for group in self.param_groups for p in group["params"]]
        return {p: i for i, p in enumerate(params)}

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts its own `step` on the instance; it and hooks stay behind, as in torch.
        state = {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_capture", "step") and not key.startswith("_optimizer_")
        }
        return state | {"closed": self._capture is None, "_stacks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        closed = state.pop("closed", None)
        super().__setstate__(state)
        if closed is not None:  # unpickled or copied, not load_state_dict
            self._capture = None
            if not closed:
                self._listen()

    def _warn_of(self, counter: str, what: str) -> None:
        """Warn once of steps or statistics that were skipped."""
        if counter == "skipped_steps":
            words = (
                f"the gradient of {what} is not finite: the step was skipped, parameters, momentum "
                "and curvature are as they were (counters['skipped_steps'] counts such steps)"
            )
        else:
            words = (
                f"statistics of {what} are not finite in this batch: they were "
                "left out (counters['skipped_statistics'] counts such batches)"
            )
        self._warn(counter, words)

    def _warn(self, kind: str, words: str) -> None:
        """Warn once for each kind of trouble."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(words, RuntimeWarning, stacklevel=4)

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


def _make_fisher(
    fisher: str, likelihood: str | Likelihood, samples: int, generator: torch.Generator | None
) -> Fisher | None:
    if isinstance(likelihood, str):
        if likelihood not in LIKELIHOODS:
            known = ", ".join(map(repr, LIKELIHOODS))
            raise ValueError(f"likelihood must be one of {known}, got {likelihood!r}")
        likelihood = LIKELIHOODS[likelihood]
    elif not isinstance(likelihood, Likelihood):
        raise TypeError(
            "likelihood must be a name or a tekfac likelihood such as tekfac.Categorical(), got "
            f"{likelihood!r}"
        )
    if fisher == "mc":
        return SampledFisher(likelihood, samples, generator)
    if fisher == "exact":
        return ExactFisher(likelihood)
    if fisher == "empirical":
        return None
    raise ValueError(f'fisher must be "mc", "exact" or "empirical", got {fisher!r}')


def _where(wanted: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors if ``wanted``, and else zeros."""
    return [torch.where(wanted.to(t.device), t, 0) for t in tensors]


def _find_output(result: Any) -> Tensor:
    output = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model returned {type(result).__name__}, neither a tensor nor an object with a "
            "tensor in .logits: give output=, a function that finds the logits in it, e.g. "
            "output=lambda result: result[0]"
        )
    return output


def _supported() -> str:
    return "Linear, Conv1d, Conv2d, Conv3d"


def _check_group(group: Mapping[str, Any], trace_damping: bool, method: str) -> None:
    check_not_negative("lr", group["lr"])
    check_not_negative("weight_decay", group["weight_decay"])
    check_decay("momentum", group["momentum"])
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov needs a momentum above 0")
    check_damping(group["damping"], trace_damping=trace_damping, method=method)
