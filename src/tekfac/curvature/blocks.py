"""Curvature blocks: one layer's Fisher matrix, learnt batch by batch.

What it is and does is `curvature.approximation`'s part; here is what a block sees of a batch, when
it brings factors, basis and rescaling up to date, what it tells other ranks, and its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tekfac.curvature import costs
from tekfac.curvature.approximation import Approximation
from tekfac.curvature.basis import Basis
from tekfac.curvature.damping import AgreementDamping
from tekfac.curvature.kept import moments_of
from tekfac.curvature.sampling import factor_reading
from tekfac.layers import Form, Layer, Sample, as_used
from tekfac.verdict import YES, Verdict

# Where nothing is said, steps are orthogonalized if that takes at most this part of the passes'
# multiplications, those of all ranks together, so that a batch divided among ranks is the same as a
# whole one: of a square matrix of d columns from about 15 d rows on.
ORTHOGONAL_SHARE = 1 / 3

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
    reduce: bool = False
    """Whether factors take an example's positions for one (`Rows.reduced`)."""
    scale_examples: int | None = None
    """Examples that the rescaling is measured on, None for all."""


@dataclass(frozen=True)
class Report:
    """What became of a block's statistics in a step."""

    used: Verdict = YES
    """Whether the batch's statistics, if any, were finite; if not, they were left out."""


class Block(Approximation):
    """The curvature of one layer: an approximation of its Fisher matrix, and how it is learnt.

    Vectors are flat or matrices of shape `shape`, flat ones in the order of
    ``torch.cat([weight.flatten(1), bias[:, None]], 1).flatten()``.

    It is made with what an `Approximation` is made with.
    """

    def __init__(
        self,
        layer: Layer,
        group: dict[str, Any],
        rank: int | None = None,
        storage: torch.dtype | None = None,
    ) -> None:
        super().__init__(layer, group, rank, storage)
        self.due = Due()
        self.positions = self._positions = 1
        """Rows that an example has in this layer, as seen when a basis was last due."""
        self.observed = True
        """Whether samples are taken here, and not by another rank that sees the same batches."""
        self.batches = 1
        """Ranks that see batches of their own."""
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
    def orthogonal(self) -> bool:
        """Whether steps are orthogonalized: as the group says, but those of tables never.

        Of a table a batch has few rows, each of which is to go its own way. A group that says None
        has it where it takes little, and where steps differ: those that agree are to become as
        short as the curvature says. (Beside ``kl_clip``, which a block does not know, none is.)
        """
        if self.layer.looked_up:
            return False
        given: bool | None = self.group["orthogonalize"]
        if given is not None:
            return given
        rule = self.group["damping"]
        return (
            isinstance(rule, AgreementDamping)
            and rule.differ(self.group)
            and self._orthogonalization <= ORTHOGONAL_SHARE * self.work * self.batches
        )

    @property
    def _orthogonalization(self) -> int:
        """What it takes to orthogonalize a step, in multiplications."""
        return self.groups * costs.orthogonalization(self.layer.d_in, self.layer.d_out)

    @property
    def step_cost(self) -> int:
        """What the layer takes in every step, in multiplications (`tekfac.curvature.costs`)."""
        own = costs.preconditioning(self.layer.d_in, self.layer.d_out, *self.kept)
        orthogonalization = self._orthogonalization if self.orthogonal else 0
        return self.work + self.groups * own + orthogonalization + costs.CALLS

    @property
    def refresh_cost(self) -> int:
        """What a new basis takes, in multiplications."""
        widths = self.layer.d_in, self.layer.d_out
        sides = (costs.eigenvectors(d, k) for d, k in zip(widths, self.kept, strict=True))
        return self.groups * sum(sides) + costs.CALLS

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
            rows = None if self.due.reduce else self.due.factor_rows
            read = factor_reading(self.layer, sample, rows)
            for part in self.layer.chunks(sample, read.stride, read.dtype):
                self.factors.add(part.reduced() if self.due.reduce else part, sample.first)

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
        self.take(as_used(self.layer, Form(*form)))

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
            self._forget()
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
        self._order_columns()
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

    def rotate(self) -> None:
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
        self._forget()
        state = {name: self._adopted(name, value) for name, value in state.items()}
        basis = _under(state, "basis.")
        self.factors.load_state_dict(_under(state, "factor."), basis)
        self.basis = self.factors.make_basis(**basis) if basis else None
        if self.basis is not None:
            self._order_columns()
        self.release()
        self._row_norm = state["row_norm"]
        self.silent = bool(state["silent"])
        self.positions = self._positions = int(state.get("positions", 1))

    def _adopted(self, name: str, value: Tensor) -> Tensor:
        dtype = self.storage if name in STORED else self.layer.dtype
        return value.to(self.layer.parameters[0].device, dtype, copy=True)

    def _rescale(self, decay: float, usable: Verdict) -> Verdict:
        """Average the batch's rescaling in, if it is finite and usable; whether it was."""
        return usable

    def _change_basis(self, old: Basis, new: Basis) -> None:
        """Called when the basis is refreshed; nothing to do where the rescaling comes with it."""


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
