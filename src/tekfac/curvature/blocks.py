"""Curvature blocks: one layer's Fisher matrix as a basis and a rescaling, and what it can do.

A block stands for ``F̂ = (U_in ⊗ U_out) diag(s) (U_in ⊗ U_out)ᵀ``. Which factors the basis comes
from (`curvature.factors`) and what the rescaling ``s`` is (`curvature.rescaling`) make the four
methods; both choices are named in the modules `kfac`, `ekfac`, `tkfac` and `tekfac`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tekfac.curvature import costs
from tekfac.curvature.basis import Basis
from tekfac.curvature.damping import Measured, damping_of
from tekfac.curvature.factors import Factors
from tekfac.curvature.kept import moments_of
from tekfac.curvature.moments import Moment
from tekfac.curvature.sampling import factor_reading
from tekfac.layers import Layer, Sample, as_used
from tekfac.verdict import YES, Verdict

DENSE_LIMIT = 8192

# Multiplications of one rotation above which a block is preconditioned by itself.
STACKED = 2**26

# The large parts of a block's state.
STORED = ("factor.input", "factor.output", "basis.input", "basis.output", "scale")


@dataclass(frozen=True)
class Due:
    """What a block is to do in the coming step."""

    factors: bool = True
    scale: bool = True
    basis: bool = True
    late: bool = True
    """Whether the rescaling's samples wait for a basis that is known at the end of the step."""
    factor_rows: float | None = None
    """Inputs that factors read for each of their columns, None for all (`curvature.sampling`)."""
    scale_examples: int | None = None
    """Examples that the rescaling is measured on, None for all."""


@dataclass(frozen=True)
class Report:
    """What became of a block's statistics in a step."""

    used: Verdict = YES
    """Whether the batch's statistics, if any, were finite; if not, they were left out."""


class Block(ABC):
    """The curvature of one layer.

    Vectors are flat or matrices of shape `shape`, flat ones in the order of
    ``torch.cat([weight.flatten(1), bias[:, None]], 1).flatten()``.

    Args:
        layer: the layer.
        group: the optimizer's parameter group of the layer's weight; its ``damping`` and ``power``
            are used.
        rank: eigenvectors that wide factors keep (`curvature.kept`); None for all.
        storage: what factors, eigenvectors and rescaling are kept in between steps; None for what
            they are computed in.
    """

    make_factors: ClassVar[type[Factors]]
    trace_damping: ClassVar[bool]
    """Whether the method knows the paper's damping (3.5) and β."""

    def __init__(
        self,
        layer: Layer,
        group: dict[str, Any],
        rank: int | None = None,
        storage: torch.dtype | None = None,
    ) -> None:
        self.layer = layer
        self.group = group
        self._storage = storage
        self._rank = rank
        self.factors = self.make_factors(*moments_of(layer, rank, storage))
        self.basis: Basis | None = None
        self.fc_scale: Tensor | float = 1.0
        """β of the paper: the block is this times the layer's Fisher matrix."""
        self.due = Due()
        self._row_norm = layer.row_norm
        self._damping_kept: tuple[object, object, Tensor, Tensor] | None = None
        self.positions = self._positions = 1
        """Rows that an example has in this layer, as seen when a basis was last due."""
        self.held = True
        """Whether the estimate is kept here, and not by another rank."""
        self.pending = False
        self._units: Tensor | float = 0
        self._terms: Tensor | float = 0.0
        self._gradient_scale: Tensor | float = 1.0
        self._some, self._used = False, YES
        self.silent = False
        """Looked at, and found to get no gradient at all, before there was any estimate."""
        self.work = 0
        """Multiplications of the layer's own passes in a step, seen when a basis was last due."""
        self.discard()

    # -- what a curious user asks ------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The layer's name in the model."""
        return self.layer.name

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the layer's matrix; ``d_in`` counts the bias."""
        return self.layer.shape

    @property
    def groups(self) -> int:
        """Groups of a convolution: the block is block-diagonal over them. 1 elsewhere."""
        return self.layer.groups

    @property
    def dim(self) -> int:
        """Rows of the block, ``d_out d_in``."""
        return self.shape[0] * self.shape[1]

    @property
    def storage(self) -> torch.dtype:
        """What factors, eigenvectors and rescaling are kept in."""
        return self.layer.dtype if self._storage is None else self._storage

    @property
    def empty(self) -> bool:
        """Whether there is no curvature yet (no batch has been measured)."""
        return self.basis is None

    @property
    def trace(self) -> float:
        """Trace of the block, by the running estimate."""
        self._require_basis()
        return float(self.fc_scale * self.fisher_trace())

    @property
    def damping(self) -> float:
        """The damping λ in use now."""
        self._require_basis()
        return float(self._damping())

    @property
    def eigenvalues(self) -> Tensor:
        """The block's eigenvalues, undamped, ``(d_out, d_in)``, one per coordinate of the basis."""
        self._own_basis()
        return self._expanded(self._eigenvalues()).reshape(self.shape)

    def matvec(self, vector: Tensor) -> Tensor:
        """``F̂ v``, without damping, in the shape of ``vector``."""
        basis = self._own_basis()
        matrix = basis.apply(self._eigenvalues(), self._matrix(vector))
        return self.layer.to_vector(matrix).reshape(vector.shape)

    def curvature_along(self, matrix: Tensor) -> Tensor:
        """``δᵀ F_l δ`` of a ``(G, d_out, d_in)`` step, 0-dimensional; F_l is without β."""
        basis = self._own_basis()
        return (matrix * basis.apply(self._eigenvalues(), matrix)).sum() / self.fc_scale

    def inverse_matvec(self, vector: Tensor) -> Tensor:
        """``(F̂ + λ I)^(−power) v``, what `precondition` does, in the shape of ``vector``.

        With ``power=1`` that is a product with the damped block's inverse; KFAC's and TKFAC's
        damped block is the product of their damped factors, and its power that of either factor.
        """
        matrix = self.precondition(self._matrix(vector))
        return self.layer.to_vector(matrix).reshape(vector.shape)

    def dense(self, damped: bool = False) -> Tensor:
        """The block as a matrix, ``(d_out d_in, d_out d_in)``.

        Args:
            damped: include the damping, so that the result is what `inverse_matvec` inverts, or
                takes to the power of ``-power``.

        Raises:
            ValueError: if the block has more than 8192 rows.
        """
        basis = self._own_basis()
        if self.dim > DENSE_LIMIT:
            raise ValueError(
                f"block {self.name!r} has {self.dim} rows; dense() makes matrices of up to "
                f"{DENSE_LIMIT} rows: use matvec or inverse_matvec"
            )
        values = self._expanded(self._damped_eigenvalues() if damped else self._eigenvalues())
        parts = []
        for u_in, u_out, s in zip(
            *basis.whole(values.dtype),
            values,
            strict=True,
        ):
            vectors = torch.kron(u_out.contiguous(), u_in.contiguous())
            parts.append((vectors * s.flatten()) @ vectors.mT)
        dense: Tensor = torch.block_diag(*parts)
        numbers = torch.arange(self.dim, device=dense.device).reshape(values.shape)
        order = self.layer.to_vector(numbers).flatten()
        return dense[order[:, None], order]

    # -- what the optimizer asks -------------------------------------------------------------------

    @property
    def listening(self) -> bool:
        """Whether the coming step needs statistics of this block."""
        return self.due.factors or self.due.scale

    def hold(self, held: bool) -> None:
        """Keep the estimate here, or only its shape: another rank then does what needs it."""
        self.held = held
        self.factors.hold(held)

    def take(self, layer: Layer) -> None:
        """Go on with the same layer as of another kind, before anything is known of it."""
        if layer is not self.layer:
            self.layer = layer
            self.factors = self.make_factors(*moments_of(layer, self._rank, self._storage))
            self.factors.hold(self.held)

    def release(self) -> None:
        """Keep only the shapes of what another rank holds.

        Eigenvectors of a wide side stay: along them the batches' sums are taken.
        """
        basis = self.basis
        if self.held or basis is None:
            return
        input, output = (
            each.to("meta") if is_whole(each) else each for each in (basis.input, basis.output)
        )
        self.basis = replace(basis, input=input, output=output)

    @property
    def waiting(self) -> bool:
        """Whether it has been measured, and its first basis or rescaling is still to come."""
        return self.empty and not self.factors.empty

    @property
    def step_cost(self) -> int:
        """What the layer takes in every step, in multiplications (`tekfac.curvature.costs`)."""
        d_in, d_out = self.layer.d_in, self.layer.d_out
        own = costs.preconditioning(d_in, d_out, *self.kept)
        return self.work + self.groups * own + costs.CALLS

    @property
    def refresh_cost(self) -> int:
        """What a new basis takes, in multiplications."""
        widths = self.layer.d_in, self.layer.d_out
        sides = (costs.eigenvectors(d, k) for d, k in zip(widths, self.kept, strict=True))
        return self.groups * sum(sides) + costs.CALLS

    @property
    def kept(self) -> tuple[int, int]:
        """How many eigenvectors the input side and the output side keep."""
        (input, d_in), (output, d_out) = self._sides
        return input.kept(d_in), output.kept(d_out)

    @property
    def _sides(self) -> tuple[tuple[Moment, int], tuple[Moment, int]]:
        """The factors, input side first, and how wide they are."""
        layer, factors = self.layer, self.factors
        return (factors.input, layer.d_in), (factors.output, layer.d_out)

    @property
    def state_bytes(self) -> int:
        """What the block holds between steps, or will hold once it has a basis."""
        # Factors, or what of them is kept, eigenvectors, and a value for each of these.
        large = sum(moment.entries(d) + d * moment.kept(d) for moment, d in self._sides)
        values = [moment.values(d) for moment, d in self._sides]
        sizes = self._scales(*values) + large, sum(values)
        return self.groups * (
            sizes[0] * self.storage.itemsize + sizes[1] * self.layer.dtype.itemsize
        )

    def _scales(self, inputs: int, outputs: int) -> int:
        """Entries of a rescaling that is no product of eigenvalues."""
        return 0

    def observe(self, sample: Sample) -> None:
        """Take the statistics of one backward pass into the sums of the step."""
        self.pending = True
        self._positions = self.layer.positions(sample)
        if sample.first:
            self._units = self._units + sample.units
            self._terms = self._terms + self._here(sample.term_count)
            self._work += costs.model_pass(
                self.groups * sample.examples * self._positions,
                self.layer.product_width,
                self.layer.d_out,
            )
        if self.due.factors:
            read = factor_reading(self.layer, sample, self.due.factor_rows)
            for part in self.layer.chunks(sample, read.stride, read.dtype):
                self.factors.add(part, sample.first)

    @property
    def stacking(self) -> object | None:
        """What blocks must agree in to be preconditioned together; None for one by itself.

        Products of large matrices gain nothing from that.
        """
        basis = self._require_basis()
        d_out, d_in = self.layer.d_out, self.layer.d_in
        work = d_out * d_in * (d_out + d_in)
        own = type(self).precondition is not Block.precondition
        if own or work > STACKED or basis.input.shape[2] < d_in or basis.output.shape[2] < d_out:
            return None
        return (d_out, d_in, basis.input.dtype, self.layer.dtype, basis.input.device)

    def precondition(self, matrix: Tensor) -> Tensor:
        """``(F̂ + λ I)^(−power) ∇h`` for a ``(G, d_out, d_in)`` gradient: rotate, rescale, rotate.

        (2.5), where the power is 1.
        """
        basis = self._own_basis()
        return basis.apply(self.multipliers(), matrix)

    def multipliers(self) -> Tensor:
        """What a gradient in the basis is multiplied by: eigenvalues of ``(F̂ + λ I)^(−power)``."""
        return self._damped_eigenvalues().pow(-self.group["power"])

    def tell(self) -> list[int]:
        """What ranks have to agree on before they go on from a batch, the highest of all counting.

        Whether the layer was seen, with how many rows and how much work, and in which form: by
        that and its negative, of which ranks that have not seen it leave the others' as they are.
        """
        form = self.layer.form
        signed = [*form, *(-each for each in form)]
        work = self._work or self.work
        return [
            self.pending,
            work,
            self._positions,
            *(signed if self.pending else map(_low, form * 2)),
        ]

    def hear(self, said: Sequence[int]) -> None:
        """Go on from what all ranks told.

        Raises:
            RuntimeError: if they use the layer differently.
        """
        pending, self.work, self.positions, *signed = said
        self._work, self._positions = 0, self.positions
        self.pending = bool(pending)
        half = len(signed) // 2
        form, lowest = signed[:half], [-each for each in signed[half:]]
        if not pending or not self.factors.empty:
            return
        if form != lowest:
            raise RuntimeError(
                f"ranks use layer {self.name!r} differently: its weight is not on the same side of "
                "its product everywhere, or its bias is not added everywhere"
            )
        self.layer.adopt(tuple(form))
        self.take(as_used(self.layer, bool(form[1])))

    def finish(self, own_mean: bool) -> None:
        """The batch is complete, as far as this rank has seen it.

        Args:
            own_mean: whether the gradients observed are those of a mean over the terms observed
                here: they are multiplied by the number of these then.
        """
        self._gradient_scale = self._terms if own_mean else 1.0
        if own_mean and self.pending:
            self.factors.scale_gradients(self._gradient_scale**2)

    def sums(self, late: bool) -> dict[str, Tensor]:
        """What this rank adds to the batch's sums, zeros where it has seen nothing.

        Args:
            late: whether only those are meant that have to wait for the basis.
        """
        if late:
            return {}
        like = self._like()
        counts = {"units": self._units, "terms": self._terms}
        sums = {name: torch.as_tensor(each).to(like) for name, each in counts.items()}
        if self.layer.apart:
            sums["units"] = sums["units"].expand(self.groups)
        if self.due.factors:
            layer = self.layer
            sums |= {
                f"factor.{name}": value
                for name, value in self.factors.sums(
                    self.groups, layer.d_in, layer.d_out, like
                ).items()
            }
        return sums

    def take_sums(self, sums: dict[str, Tensor]) -> None:
        """Go on with the sums of all ranks together, as of `sums`."""
        self.pending = True
        if "terms" in sums:
            # Of nothing at all the mean is not used, and has to be a number.
            self._units, self._terms = sums["units"].clamp_min(1), sums["terms"]
        factors = _under(sums, "factor.")
        if factors:
            self.factors.take_sums(factors)

    def learn(self, decay: float, usable: Verdict = YES) -> None:
        """Bring the factors up to date, if they are due.

        Args:
            decay: ε2 of (3.6) and (3.7).
            usable: whether what was observed may be used. If that is open, no basis is due and
                there is an estimate already, nothing is read from the device.
        """
        if self.pending or self.due.basis:
            self._damping_kept = None
        some, terms = self.pending, self._terms
        used = usable
        if some and isinstance(terms, Tensor):
            if used.open:
                used = used.also(terms > 0)
                terms = torch.where(terms > 0, terms, 1)
            else:
                # A batch in which no term counts says nothing.
                some = bool(terms > 0)
        if some and self.due.factors:
            if self.empty and self.factors.silent:
                self.silent = True
                self.discard()
                return
            used = self.factors.update(self._units, terms, decay, used)
        self._some, self._used = some, used

    @property
    def rotating(self) -> bool:
        """Whether samples wait for the basis with which this step ends."""
        return False

    @property
    def rescaling(self) -> bool:
        """Whether samples that waited for the basis are to be taken into the sums now."""
        return self.rotating and self.basis is not None

    @property
    def refreshing(self) -> bool:
        """Whether a new basis is to be made now."""
        return self.due.basis and not self.factors.empty and not self._used.refused

    def eigen(self) -> list[Tensor]:
        """Eigenvalues and eigenvectors of the factors, and whether they could be had.

        Where another rank holds the factors, or they could not be had, the numbers say nothing.
        """
        input, output = self.factors.input.eigen(), self.factors.output.eigen()
        if input is None or output is None:
            return self.eigen_shapes()
        found = [each.to(self.layer.dtype) for pair in (input, output) for each in pair]
        return [*found, torch.ones((), device=found[0].device)]

    def eigen_shapes(self) -> list[Tensor]:
        """What `eigen` gives where the factors are, as zeros."""
        like, found = self._like(), []
        for moment, d in self._sides:
            found.append(like.new_zeros(self.groups, moment.values(d)))
            found.append(like.new_zeros(self.groups, d, moment.kept(d)))
        return [*found, torch.zeros((), device=like.device)]

    def refresh(self, found: list[Tensor]) -> bool:
        """Go over to a new basis, by `eigen`; whether that could be had."""
        *values, had = found
        if not bool(had):
            return False
        input, output = (values[0], values[1]), (values[2], values[3])
        self.factors.input.follow(*input)
        self.factors.output.follow(*output)
        vectors = input[1].to(self.storage), output[1].to(self.storage)
        new = self.factors.make_basis(*vectors, input[0], output[0])
        if self.basis is not None:
            self._change_basis(self.basis, new)
        self.basis = new
        return True

    def vectors(self) -> list[Tensor]:
        """The eigenvectors that only those have who hold the block, input side first."""
        assert self.basis is not None
        return [each for each in (self.basis.input, self.basis.output) if is_whole(each)]

    def borrow(self, vectors: Sequence[Tensor]) -> None:
        """Have the eigenvectors that another rank holds, those of `vectors`, until `release`."""
        assert self.basis is not None
        if not self.held:
            lent = iter(vectors)
            input, output = (
                next(lent) if is_whole(each) else each
                for each in (self.basis.input, self.basis.output)
            )
            self.basis = replace(self.basis, input=input, output=output)

    def rotate(self) -> None:  # noqa: B027
        """Take what waited for the basis into the sums; nothing where there is no rescaling."""

    def finish_update(self, decay: float) -> Report:
        """Bring the rescaling up to date, if it is due, and be done with the batch.

        Args:
            decay: ε1 of (3.8).
        """
        some, used = self._some, self._used
        if some and self.basis is not None and not used.refused:
            # What the factors could not use is not used here either.
            used = self._rescale(decay, used)
        if some and not used.refused:
            self._row_norm = used.choose(self.layer.row_norm, self._row_norm)
        self.discard()
        return Report(used if some else YES)

    def _like(self) -> Tensor:
        return torch.empty((), dtype=self.layer.dtype, device=self.layer.full.device)

    def _here(self, count: Tensor) -> Tensor:
        return count.to(self.layer.full.device, non_blocking=True)

    @abstractmethod
    def fisher_trace(self) -> Tensor:
        """``tr F_l`` by the running estimate, without ``fc_scale``, 0-dimensional."""

    def discard(self) -> None:
        """Forget what was observed since the last update."""
        self.factors.clear()
        self.pending = False
        self._units, self._terms = 0, 0.0
        self._gradient_scale = 1.0
        self._some, self._used = False, YES
        self._work = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the block has learnt, as tensors by name."""
        state = {f"factor.{name}": value for name, value in self.factors.state_dict().items()}
        if self.basis is not None:
            state |= {f"basis.{name}": value for name, value in vars(self.basis).items()}
        return state | {
            "row_norm": self._row_norm,
            "silent": torch.tensor(self.silent),
            "positions": torch.tensor(self.positions),
        }

    def blank(self) -> dict[str, Tensor]:
        """Zeros in the form of what `state_dict` has of a block that has a curvature."""
        layer, like = self.layer, self._like()
        factors = self.factors.blank(self.groups, layer.d_in, layer.d_out, like)
        input_values, input, output_values, output, _ = self.eigen_shapes()
        vectors = input.to(self.storage), output.to(self.storage)
        basis = vars(Basis(*vectors, input_values, output_values))
        return {
            **{f"factor.{name}": value for name, value in factors.items()},
            **{f"basis.{name}": value for name, value in basis.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave, in copies on the layer's device and as kept here."""
        self.discard()
        self._damping_kept = None
        state = {name: self._adopted(name, value) for name, value in state.items()}
        basis = _under(state, "basis.")
        self.factors.load_state_dict(_under(state, "factor."), basis)
        self.basis = self.factors.make_basis(**basis) if basis else None
        self.release()
        self._row_norm = state["row_norm"]
        self.silent = bool(state["silent"])
        self.positions = self._positions = int(state.get("positions", 1))

    def _adopted(self, name: str, value: Tensor) -> Tensor:
        dtype = self.storage if name in STORED else self.layer.dtype
        return value.to(self.layer.parameters[0].device, dtype, copy=True)

    # -- what the rescaling decides ----------------------------------------------------------------

    @abstractmethod
    def _eigenvalues(self) -> Tensor:
        """The undamped eigenvalues, ``(G, d_out, d_in)``."""

    @abstractmethod
    def _damped_eigenvalues(self) -> Tensor:
        """The eigenvalues of ``F̂ + λ I``, ``(G, d_out, d_in)``, positive."""

    def _with_factored_damping(self, eigenvalues: Tensor) -> Tensor:
        """The eigenvalues and what factored Tikhonov damping adds to them, ``(G, d_out, d_in)``.

        With ``c`` the factors' coefficient, ``(√c D_in + π√λ) ⊗ (√c D_out + √λ/π)`` exceeds
        ``c D_in ⊗ D_out`` by that; ``π² = (tr input/d_in) / (tr output/d_out)``.
        """
        rule, fc_scale = self.group["damping"], self.fc_scale
        kept = self._damping_kept
        if kept is None or kept[0] != rule or kept[1] is not fc_scale:
            # Many small operations, whose result changes with the statistics only.
            kept = self._damping_kept = (rule, fc_scale, *self._factored_damping())
        return eigenvalues + kept[2][:, :, None] + kept[3][:, None]

    def _factored_damping(self) -> tuple[Tensor, Tensor]:
        """The part that belongs to ``D_out``, ``(G, d_out)``, and all else, ``(G, d_in)``."""
        basis = self._require_basis()
        root = (self.fc_scale * self.factors.coefficient).sqrt()[:, None]
        damping = self._damping() ** 0.5
        input, output = root * basis.input_values, root * basis.output_values
        # Both traces by their dimensions.
        active = self.factors.input.active(self.layer.d_in)
        ratio = (input @ basis.input_counts / active)[:, None] / (
            output @ basis.output_counts / self.layer.d_out
        )[:, None]
        # A factor that vanishes says nothing about how to share the damping out.
        pi = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1).sqrt()
        more_in, more_out = damping * pi, damping / pi
        return output * more_in, more_out * (input + more_in)

    def _rescale(self, decay: float, usable: Verdict) -> Verdict:
        """Average the batch's rescaling in, if it is finite and usable; whether it was."""
        return usable

    def _change_basis(self, old: Basis, new: Basis) -> None:  # noqa: B027
        """Called when the basis is refreshed; nothing to do where the rescaling comes with it."""

    # -- inside ------------------------------------------------------------------------------------

    def _expanded(self, values: Tensor) -> Tensor:
        """Values for every coordinate, ``(G, d_out, d_in)``."""
        basis = self._require_basis()
        rows = values.repeat_interleave(basis.output_counts.long(), dim=1)
        return rows.repeat_interleave(basis.input_counts.long(), dim=2)

    def _damping(self) -> Tensor | float:
        def trace() -> Tensor:
            return self.fc_scale * self.fisher_trace()

        dtype = self._require_basis().input_values.dtype
        (input, d_in), (_, d_out) = self._sides
        dim = self.groups * d_out * input.active(d_in)
        measured = Measured(trace, self._row_norm, dim, dtype)
        return damping_of(self.group["damping"], measured)

    def _require_basis(self) -> Basis:
        if self.empty or self.basis is None:
            raise RuntimeError(
                f"block {self.name!r} has no curvature yet: it comes with the first step() whose "
                "backward pass reaches the layer"
            )
        return self.basis

    def _own_basis(self) -> Basis:
        basis = self._require_basis()
        if not self.held:
            raise RuntimeError(
                f"block {self.name!r} is held by another rank: state_dict() gathers all, and "
                'placement="replicated" keeps all on every rank'
            )
        return basis

    def _matrix(self, vector: Tensor) -> Tensor:
        if vector.shape not in {self.shape, (self.dim,)}:
            raise ValueError(
                f"block {self.name!r} takes vectors of shape {self.shape} or ({self.dim},), "
                f"got {tuple(vector.shape)}"
            )
        return self.layer.from_vector(vector)


def is_whole(tensor: Tensor) -> bool:
    """Whether it is all eigenvectors of a side, which only those keep who hold the block."""
    return tensor.dim() == 3 and tensor.shape[1] == tensor.shape[2]


def _low(_: int) -> int:
    """Less than anybody says."""
    return -(2**62)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
