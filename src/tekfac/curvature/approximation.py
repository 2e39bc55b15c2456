"""One layer's Fisher matrix as a basis and a rescaling, and what can be done with it.

``F̂ = (U_in ⊗ U_out) diag(s) (U_in ⊗ U_out)ᵀ``. Which factors the basis comes from
(`curvature.factors`) and what the rescaling ``s`` is (`curvature.rescaling`) make the four methods;
both choices are named in the modules `kfac`, `ekfac`, `tkfac` and `tekfac`. How it is learnt, batch
by batch, is a `Block`'s part (`curvature.blocks`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tekfac.curvature.basis import Basis
from tekfac.curvature.damping import Measured, damping_of
from tekfac.curvature.factors import Factors
from tekfac.curvature.kept import moments_of
from tekfac.curvature.moments import Moment
from tekfac.layers import Layer

DENSE_LIMIT = 8192

# Powers where none is given. Entries of a table are looked up one much more often than another: of
# a rare one a batch has mostly noise, as large as its curvature's root (benchmarks/README.md).
MULTIPLIED, LOOKED_UP = 1.0, 0.5

# Multiplications of one rotation above which a block is preconditioned by itself.
STACKED = 2**26

# Eigenvalues of a block up to which what a gradient is multiplied by is kept from step to step.
KEPT = 2**16


class Approximation(ABC):
    """``F̂`` of one layer.

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
        self._rank, self._storage = rank, storage
        self.factors = self.make_factors(*moments_of(layer, rank, storage))
        self.basis: Basis | None = None
        self.fc_scale: Tensor | float = 1.0
        """β of the paper: the block is this times the layer's Fisher matrix."""
        self.held = True
        """Whether the estimate is kept here, and not by another rank."""
        self._row_norm = layer.row_norm
        self._damping_kept: tuple[object, object, Tensor, Tensor] | None = None
        self._multipliers_kept: tuple[object, object, Tensor] | None = None

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
    def power(self) -> float:
        """Of the damped curvature that gradients are divided by: the group's, or the default."""
        given: float | None = self.group["power"]
        if given is not None:
            return given
        return LOOKED_UP if self.layer.looked_up else MULTIPLIED

    @property
    def eigenvalues(self) -> Tensor:
        """The block's eigenvalues, undamped, ``(d_out, d_in)``, one per coordinate of the basis."""
        self._own_basis()
        return self._expanded(self._eigenvalues()).reshape(self.shape)

    def matvec(self, vector: Tensor) -> Tensor:
        """``F̂ v``, without damping, in the shape of ``vector``."""
        matrix = self._aligned_basis().apply(self._eigenvalues(), self._matrix(vector))
        return self.layer.to_vector(matrix).reshape(vector.shape)

    def curvature_along(self, matrix: Tensor) -> Tensor:
        """``δᵀ F_l δ`` of a ``(G, d_out, d_in)`` step, 0-dimensional; F_l is without β."""
        product = self._aligned_basis().apply(self._eigenvalues(), matrix)
        return (matrix * product).sum() / self.fc_scale

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
        basis = self._aligned_basis()
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

    def precondition(self, matrix: Tensor) -> Tensor:
        """``(F̂ + λ I)^(−power) ∇h`` for a ``(G, d_out, d_in)`` gradient: rotate, rescale, rotate.

        (2.5), where the power is 1.
        """
        return self._aligned_basis().apply(self.multipliers(), matrix)

    def multipliers(self) -> Tensor:
        """What a gradient in the basis is multiplied by: eigenvalues of ``(F̂ + λ I)^(−power)``."""
        rule, power, fc_scale = self.group["damping"], self.power, self.fc_scale
        kept = self._multipliers_kept
        if kept is None or kept[0] != (rule, power) or kept[1] is not fc_scale:
            found = self._damped_eigenvalues().pow(-power)
            kept = ((rule, power), fc_scale, found)
            # Many small operations: worth keeping where there are few numbers.
            self._multipliers_kept = kept if found.numel() <= KEPT else None
        return kept[2]

    @property
    def stacking(self) -> object | None:
        """What blocks must agree in to be preconditioned together; None for one by itself.

        Products of large matrices gain nothing from that.
        """
        basis = self._require_basis()
        d_out, d_in = self.layer.d_out, self.layer.d_in
        work = d_out * d_in * (d_out + d_in)
        own = type(self).precondition is not Approximation.precondition
        if own or work > STACKED or basis.input.shape[2] < d_in or basis.output.shape[2] < d_out:
            return None
        return (d_out, d_in, basis.input.dtype, self.layer.dtype, basis.input.device)

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

    @abstractmethod
    def fisher_trace(self) -> Tensor:
        """``tr F_l`` by the running estimate, without ``fc_scale``, 0-dimensional."""

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

    def _forget(self) -> None:
        """The estimate changes: what was kept of what follows from it is gone."""
        self._damping_kept = self._multipliers_kept = None

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

    def _aligned_basis(self) -> Basis:
        """The basis, with entries in the order of `Layer.matrix`."""
        basis = self._own_basis()
        input = self.layer.aligned(basis.input)
        return basis if input is basis.input else replace(basis, input=input)

    def _order_columns(self) -> None:
        """Let gradients lie as they are stored, where few eigenvectors are to be aligned to that.

        To go through a gradient once more takes as long as a fourth part of preconditioning it.
        """
        assert self.basis is not None
        kept = self.basis.input.shape[2]
        narrow = kept < min(self.layer.d_in, self.layer.d_out)
        self.layer.as_stored = narrow and self.layer.storable

    def _matrix(self, vector: Tensor) -> Tensor:
        if vector.shape not in {self.shape, (self.dim,)}:
            raise ValueError(
                f"block {self.name!r} takes vectors of shape {self.shape} or ({self.dim},), "
                f"got {tuple(vector.shape)}"
            )
        return self.layer.from_vector(vector)
