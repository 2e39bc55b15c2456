"""The two rescalings: eigenvalues of a block's own factors, or second moments in their basis."""

from __future__ import annotations

import torch
from torch import Tensor

from tekfac.curvature.basis import Basis
from tekfac.curvature.blocks import Block
from tekfac.curvature.damping import FactoredDamping
from tekfac.curvature.sampling import scale_reading
from tekfac.curvature.statistics import averaged
from tekfac.layers import Sample
from tekfac.verdict import Verdict


class FactoredBlock(Block):
    """Rescaled by the eigenvalues of its own factors: ``c · D_in ⊗ D_out`` (paper, 2.6 and 3.1).

    ``c`` is the factors' coefficient, 1 or ``δ``. Damping is factored Tikhonov damping on ``√c``
    times each factor.
    """

    def _eigenvalues(self) -> Tensor:
        basis = self._require_basis()
        coefficient = self.fc_scale * self.factors.coefficient
        return (
            coefficient[:, None, None]
            * basis.output_values[:, :, None]
            * basis.input_values[:, None]
        )

    def _damped_eigenvalues(self) -> Tensor:
        return self._with_factored_damping(self._eigenvalues())

    def fisher_trace(self) -> Tensor:
        basis = self._require_basis()
        traces = (basis.input_values @ basis.input_counts) * (
            basis.output_values @ basis.output_counts
        )
        return (self.factors.coefficient * traces).sum()


class CorrectedBlock(Block):
    """Rescaled by second moments in its basis: ``E[(U_outᵀ D_n U_in)^∘2]`` (paper, 2.7 and 3.2).

    It is the best diagonal there is in this basis (Theorem 3.1), and its sum is the trace of ``F``.
    Damping is added to it: λ (3.4), or what `FactoredDamping` says.
    """

    scale: Tensor | None = None
    """``S`` or ``Λ``, ``(G, d_out, d_in)``: a value for each pair of the basis' eigenvalues."""
    _rescaled: Tensor | float = 0.0
    _trace_kept: tuple[Tensor, Tensor] | None = None
    """The scale that the trace was last taken of, and its trace."""

    @property
    def empty(self) -> bool:
        return super().empty or self.scale is None

    @property
    def rotating(self) -> bool:
        return self.due.scale and self.due.late and not self._used.refused

    def observe(self, sample: Sample) -> None:
        super().observe(sample)
        if self.due.scale:
            read = scale_reading(self.layer, sample, self.due.scale_examples)
            part = sample.head(read.examples, copied=self.due.late)
            if part.first:
                self._rescaled = self._rescaled + self._here(part.term_count)
            if self.due.late:
                # Until the basis that it belongs to is known. Rows would be several times as much.
                part.rows = None
                self._pending.append((part, read.dtype))
            else:
                self._add_squares(part, read.dtype)

    def _scales(self, inputs: int, outputs: int) -> int:
        return inputs * outputs

    def discard(self) -> None:
        super().discard()
        self._pending: list[tuple[Sample, torch.dtype | None]] = []
        self._sum: Tensor | None = None
        self._rescaled = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        return state if self.scale is None else state | {"scale": self.scale}

    def blank(self) -> dict[str, Tensor]:
        blank = super().blank()
        rows, columns = (blank[f"basis.{side}_values"].shape[1] for side in ("output", "input"))
        return blank | {
            "scale": self._like().new_zeros(self.groups, rows, columns).to(self.storage)
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        scale = state.get("scale")
        self.scale = None if scale is None else self._adopted("scale", scale)
        self.release()

    def _add_squares(self, sample: Sample, dtype: torch.dtype | None) -> None:
        assert self.basis is not None
        self._sum = self.basis.squares(self.layer, sample, dtype, self._sum)

    def finish(self, own_mean: bool) -> None:
        super().finish(own_mean)
        if self._sum is not None:
            self._sum.mul_(self._gradient_scale**2)

    def sums(self, late: bool) -> dict[str, Tensor]:
        sums = super().sums(late)
        if self.due.scale and late == self.due.late and self.basis is not None:
            like = self._like()
            found = like.new_zeros(self.basis.counts.shape) if self._sum is None else self._sum
            sums |= {
                "scale": found.to(like.dtype).expand(self.groups, -1, -1),
                "rescaled": torch.as_tensor(self._rescaled).to(like),
            }
        return sums

    def take_sums(self, sums: dict[str, Tensor]) -> None:
        super().take_sums(sums)
        if "scale" in sums:
            self._sum, self._rescaled = sums["scale"], sums["rescaled"]

    def rotate(self) -> None:
        if self._pending and self.basis is not None:
            for waiting in self._pending:
                self._add_squares(*waiting)
            self._pending.clear()
            assert self._sum is not None
            self._sum.mul_(self._gradient_scale**2)

    def _rescale(self, decay: float, usable: Verdict) -> Verdict:
        if self._sum is None:
            return super()._rescale(decay, usable)
        some = torch.as_tensor(self._rescaled) > 0
        if not usable.open and not bool(some):
            return usable  # none of the examples read has a term
        usable = usable.also(some.to(self._sum.device))
        used = usable.also(torch.isfinite(self._sum).all())
        if self.scale is None:
            used = used.read()
        if used.refused:
            return used
        self._sum = used.choose(self._sum, 0)
        past = used.weigh(decay, 1.0)
        if isinstance(past, Tensor):
            past = past.to(self._sum.dtype)
        assert self.basis is not None
        terms = torch.as_tensor(self._rescaled).clamp_min(torch.finfo(torch.float32).tiny)
        mean = self._sum * (1 / terms) / self.basis.counts
        if not self.held:
            # The average is another rank's; of the trace everybody knows.
            before = None if self.scale is None else self.fisher_trace()
            trace = averaged(before, (mean * self.basis.counts).sum(), past)
            self.scale = mean.to("meta", self.storage)
            self._trace_kept = self.scale, trace
            return used
        old = None if self.scale is None else self.scale.to(mean.dtype)
        self.scale = averaged(old, mean, past).to(self.storage)
        return used

    def release(self) -> None:
        super().release()
        if self.scale is not None and not self.held and not self.scale.is_meta:
            trace = self.fisher_trace()
            self.scale = self.scale.to("meta")
            self._trace_kept = self.scale, trace

    def _change_basis(self, old: Basis, new: Basis) -> None:
        if self.scale is not None and self.held:
            carried = old.carry_over(self.scale.to(self.layer.dtype), new)
            self.scale = carried.to(self.storage)

    def _eigenvalues(self) -> Tensor:
        assert self.scale is not None
        scale = self.scale.to(self.layer.dtype)
        # Most layers have no β.
        plain = not isinstance(self.fc_scale, Tensor) and self.fc_scale == 1
        return scale if plain else self.fc_scale * scale

    def _damped_eigenvalues(self) -> Tensor:
        if isinstance(self.group["damping"], FactoredDamping):
            return self._with_factored_damping(self._eigenvalues())
        return self._eigenvalues() + self._damping()

    def fisher_trace(self) -> Tensor:
        assert self.scale is not None
        kept = self._trace_kept
        if kept is None or kept[0] is not self.scale:
            # A pass over as many numbers as the layer has weights: not in every step.
            trace = (self.scale.to(self.layer.dtype) * self._require_basis().counts).sum()
            kept = self._trace_kept = self.scale, trace
        return kept[1]
