"""How much of the identity is added to a curvature block before it is inverted.

A rule is a class in this file, or anywhere: a `DampingRule` with its numbers and a λ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tekfac.checks import check_count, check_positive

if TYPE_CHECKING:
    from typing_extensions import Self

# Reduction ratios below and above which adaptive damping rises and falls.
LOWER, UPPER = 1 / 4, 3 / 4

# Cosines between steps and their past likewise.
APART, AGREED = 1 / 2, 9 / 10


@dataclass(frozen=True)
class Measured:
    """What is known of a block that a rule may go by.

    Args:
        trace: gives the trace of the block; not every rule asks for it.
        row_norm: mean squared norm of the rows of the layer's weight, 0-dimensional.
        dim: the block's rows; of an embedding those of as many entries as a batch looks up.
        dtype: its precision.
    """

    trace: Callable[[], Tensor]
    row_norm: Tensor
    dim: Tensor | int
    dtype: torch.dtype


class DampingRule(ABC):
    """A damping λ of each layer's own: a frozen dataclass whose fields are numbers.

    A state holds a rule by its class's name and these, so that a rule of your own loads wherever
    its class has been imported.
    """

    rules: ClassVar[dict[str, type[DampingRule]]] = {}
    of_the_paper: ClassVar[bool] = False
    """Whether it is (3.5), which the paper defines for TKFAC and TEKFAC alone."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        DampingRule.rules[cls.__name__] = cls

    @abstractmethod
    def of(self, block: Measured) -> Tensor | float:
        """The damping λ of a block, a number or 0-dimensional, positive."""


@dataclass(frozen=True)
class MeanDamping(DampingRule):
    """Damping relative to each layer's own curvature.

    Layer ``l`` gets ``λ_l = ratio · tr F_l / dim F_l``, this part of its block's mean eigenvalue:
    where an eigenvalue is far above the mean, the step is natural gradient's, and where it is far
    below, as if it were the mean. It is a number without a unit, which means the same in every
    layer, under every likelihood and at every stage of training. This is `TraceDamping` without its
    ν, which has a unit: ratio 1 is the paper's (3.5) wherever a trace exceeds ν.

    In an embedding, whose rare entries have next to no curvature, the mean is that over as many
    entries as a batch looks up.

    KFAC and TKFAC put ``λ_l`` into their factored form, so that each factor gets ``√ratio`` of its
    own mean eigenvalue.

    Args:
        ratio: of the mean eigenvalue, positive.

    Raises:
        ValueError: if ``ratio`` is not a positive finite number.
    """

    ratio: float = 0.3

    def __post_init__(self) -> None:
        check_positive("MeanDamping's ratio", self.ratio)

    def of(self, block: Measured) -> Tensor | float:
        # Of a layer without any curvature, nothing is to be said: finite, and small.
        smallest = torch.finfo(block.dtype).eps ** 2
        return (self.ratio / block.dim * block.trace()).clamp_min(smallest)


class _MovingDamping(MeanDamping):
    """`MeanDamping` whose ratio changes while training."""

    decay: float
    minimum: float
    maximum: float | None

    def _check(self) -> None:
        name = type(self).__name__
        for each in ("ratio", "minimum", "maximum"):
            check_positive(f"{name}'s {each}", getattr(self, each))
        if not 0 < self.decay < 1:
            raise ValueError(f"{name}'s decay must be above 0 and below 1, got {self.decay!r}")
        if not self.minimum <= self.ratio <= self._highest:
            raise ValueError(
                f"{name}'s ratio must be between minimum={self.minimum!r} and "
                f"maximum={self.maximum!r}, got {self.ratio!r}"
            )

    @property
    def _highest(self) -> float:
        return self.ratio if self.maximum is None else self.maximum

    def _moved(self, found: float, low: float, high: float, steps: int) -> Self:
        """The rule after so many steps: lower if what was found is high, higher if it is low."""
        factor = self.decay**steps
        if found > high:
            return replace(self, ratio=max(self.minimum, self.ratio * factor))
        if found < low:
            return replace(self, ratio=min(self._highest, self.ratio / factor))
        return self


@dataclass(frozen=True)
class AdaptiveDamping(_MovingDamping):
    """`MeanDamping` whose ratio follows from how well the curvature predicts the loss.

    Every ``every`` steps the loss of the step's own batch is evaluated once more, after the step
    ``δ``, and its change compared with what the curvature that the optimizer holds predicts::

        ρ = (h(θ + δ) − h(θ)) / (∇hᵀδ + ½ δᵀ F̂ δ)

    Above 3/4 the ratio is multiplied by ``decay^every``, below 1/4 divided by it: the
    Levenberg–Marquardt rule as K-FAC has it (Martens and Grosse, 2015, 6.5), with one factor for
    all layers. ``ρ`` is `NaturalGradient.reduction_ratio`, and the ratio in force
    ``optimizer.param_groups[0]["damping"].ratio``; both are part of the optimizer's state.

    It needs ``optimizer.step(closure)``. The closure is called a second time in every ``every``-th
    step, which costs a forward pass, a copy of the parameters and, on an accelerator, waiting for
    it. Gradients are off then, torch's generators give the same random numbers, ``loss.backward()``
    does nothing, and ``.grad``, buffers (such as running statistics) and generators are left as
    they were. The closure must give the batch's whole loss, of which
    ``.grad`` is the gradient (not clipped), as a mean of ``-log p`` like the Fisher matrix: of
    squared errors half the mean, or else ``likelihood=tekfac.Gaussian(variance=0.5)``. Of several
    ranks the mean loss counts. Under `GradScaler` there is no closure, and so not this rule.

    It pays on full batches of a loss without noise, and hardly on an autoencoder's batches of 256
    (benchmarks/README.md). δ is the step taken, with ``lr``, momentum and ``rms_clip`` in it: a
    short one changes the loss by next to ``∇hᵀδ`` alone, ``ρ`` is near 1 whatever the damping, and
    the ratio falls by ``decay`` a step, down to ``minimum``. F̂ is the blocks' matrix: what layers
    do together, and what the first-order rule's parameters do beyond ``∇hᵀδ``, it does not predict.
    The source predicts by the batch's exact Fisher matrix, and with λ in it; here λ is no part of
    the prediction, as the loss has none.

    Args:
        ratio: of the mean eigenvalue, positive; the first one, which changes.
        every: steps between comparisons. 5 is the source's.
        decay: ω, above 0 and below 1, by which the ratio changes for each step. 19/20 is the
            source's.
        minimum, maximum: what the ratio stays between.

    Raises:
        ValueError: for a number out of its range.
    """

    every: int = 5
    decay: float = 0.95
    minimum: float = 1e-3
    maximum: float = 1e3

    def __post_init__(self) -> None:
        check_count("AdaptiveDamping's every", self.every)
        self._check()

    def after(self, reduction: float) -> AdaptiveDamping:
        """The rule that follows a step with this ``ρ``; the same where that is nan."""
        return self._moved(reduction, LOWER, UPPER, self.every)


@dataclass(frozen=True)
class AgreementDamping(_MovingDamping):
    """`MeanDamping` whose ratio falls where steps agree with those before: where there is no noise.

    Damping keeps a gradient's noise from being blown up in directions with little curvature. On
    batches drawn at random a step has next to nothing to do with the last ones; on full batches of
    a loss without noise it points along them, and damping only slows such directions down. In every
    tenth step, of all of a parameter group's layers together, natural gradients ``u`` are compared
    with the momentum ``v`` that they are added to::

        c = Σ ⟨u, v⟩ / √(Σ ‖u‖² Σ ‖v‖²)

    and when a basis is due, which is when the host waits for an accelerator anyway, the sums since
    the last one decide: above 0.9 the ratio is multiplied by ``decay`` for each step between, below
    1/2 divided by it. So it is `MeanDamping` itself in training on small batches. The ratio in
    force, ``optimizer.param_groups[0]["damping"].ratio``, and the last ``c``, the group's
    ``"agreement"``, are part of the optimizer's state.

    It stays as it is without momentum, of which there is no ``v``, and without ``rms_clip``: the
    bound keeps steps short where little damping makes natural gradients long. What it gains is our
    finding (benchmarks/README.md).

    Args:
        ratio: of the mean eigenvalue, positive; the first one, which changes.
        decay: above 0 and below 1, by which the ratio changes for each step.
        minimum: what the ratio does not fall below.
        maximum: what it does not rise above; None for the first.

    Raises:
        ValueError: for a number out of its range.
    """

    decay: float = 0.98
    minimum: float = 1e-5
    maximum: float | None = None

    def __post_init__(self) -> None:
        if self.maximum is None:
            object.__setattr__(self, "maximum", self.ratio)
        self._check()

    def follows(self, group: Mapping[str, Any]) -> bool:
        """Whether it goes by the steps of a parameter group with these settings."""
        return group["momentum"] > 0 and group["rms_clip"] is not None

    def differ(self, group: Mapping[str, Any]) -> bool:
        """Whether it goes by the steps of a group with these settings, and they do not agree."""
        agreement: float = group["agreement"]
        return self.follows(group) and self.ratio == self._highest and agreement <= APART

    def after(self, agreement: float, steps: int) -> AgreementDamping:
        """The rule that follows so many steps with this ``c``; the same where that is nan."""
        return self._moved(agreement, APART, AGREED, steps)


@dataclass(frozen=True)
class TraceDamping(DampingRule):
    """Damping that follows each layer's curvature (paper, 3.5).

    Layer ``l`` gets ``λ_l = max(tr F_l, ν) / dim F_l``: the mean eigenvalue of its own block, kept
    from vanishing by ``ν`` when the trace does. The formula is our reading of the paper, whose
    text gives it in words only.

    Args:
        nu: ν, in the units of a trace of the Fisher matrix, positive. The paper's grid is 1e-4 to
            100, its best value for ResNet20 on CIFAR-100 the default 1e-2.

    Raises:
        ValueError: if ``nu`` is not a positive finite number.
    """

    of_the_paper = True
    nu: float = 1e-2

    def __post_init__(self) -> None:
        check_positive("TraceDamping's nu", self.nu)

    def of(self, block: Measured) -> Tensor | float:
        return block.trace().clamp_min(self.nu) / block.dim


@dataclass(frozen=True)
class FactoredDamping(DampingRule):
    """The damping that KFAC and TKFAC have, for EKFAC and TEKFAC too.

    KFAC's ``(A + π√λ I) ⊗ (G + √λ/π I)`` adds ``π√λ I ⊗ G + √λ/π A ⊗ I + λ I`` to its block, and
    TKFAC's form of it likewise. That is diagonal in their eigenbasis, so that EKFAC and TEKFAC,
    which share it, can add the same to their own rescaling: a direction with much curvature on one
    side alone is damped by more than λ. The paper adds λ alone (3.4); that this serves TEKFAC
    better is our finding (results/README.md).

    For KFAC and TKFAC it is the same as the number.

    Args:
        damping: λ, positive.

    Raises:
        ValueError: if ``damping`` is not a positive finite number.
    """

    damping: float

    def __post_init__(self) -> None:
        check_positive(f"{type(self).__name__}'s damping", self.damping)

    def of(self, block: Measured) -> Tensor | float:
        return max(self.damping, torch.finfo(block.dtype).tiny)


@dataclass(frozen=True)
class RelativeDamping(FactoredDamping):
    """Factored damping that falls as a layer's weights grow.

    Layer ``l`` gets ``λ_l = λ / max(1, w_l)``, with ``w_l = ‖W_l‖² / d_out`` the mean squared norm
    of its weight's rows, 2 in a freshly He-initialised layer. In front of a norm layer only the
    direction of ``W_l`` matters: with weights ``c`` times as large gradients are ``1/c`` and
    curvature ``1/c²`` times as large, so that a constant λ, as the weights grow, comes to outweigh
    all curvature, and relative steps shrink with ``1/c²``. With this λ they stay the same. That
    it serves convolutional networks with batch normalisation better is our finding
    (results/README.md).

    Weights with rows shorter than 1 are damped by λ itself, so that layers that start from zero can
    leave it. ``w_l`` is measured along with the layer's statistics.

    Args:
        damping: λ, positive.

    Raises:
        ValueError: if ``damping`` is not a positive finite number.
    """

    def of(self, block: Measured) -> Tensor | float:
        smallest = torch.finfo(block.dtype).tiny
        return (self.damping / block.row_norm.clamp_min(1)).clamp_min(smallest)


Damping = float | DampingRule


def damping_of(damping: Damping, block: Measured) -> Tensor | float:
    """The damping λ of a block, a number or 0-dimensional.

    A number too small for the block's precision must not become a division by 0.
    """
    if isinstance(damping, DampingRule):
        return damping.of(block)
    return max(damping, torch.finfo(block.dtype).tiny)


def packed_damping(rule: Damping) -> float | dict[str, Any]:
    """The rule as a ``state_dict`` holds it: its numbers, by its name if it has one."""
    if not isinstance(rule, DampingRule):
        return rule
    fields = asdict(rule)  # type: ignore[call-overload]
    return {type(rule).__name__: fields if len(fields) > 1 else next(iter(fields.values()))}


def unpacked_damping(state: float | dict[str, Any]) -> Damping:
    """The rule that `packed_damping` gave this.

    Raises:
        ValueError: for a rule whose class has not been imported.
    """
    if not isinstance(state, dict):
        return state
    [(name, numbers)] = state.items()
    if name not in DampingRule.rules:
        raise ValueError(
            f"this state has a damping rule {name!r}, which is not known here: import the module "
            "that defines it before loading"
        )
    rule: Callable[..., DampingRule] = DampingRule.rules[name]
    return rule(**numbers) if isinstance(numbers, dict) else rule(numbers)


def check_damping(rule: object, *, trace_damping: bool, method: str) -> None:
    """Raise if ``rule`` is no damping that ``method`` can use.

    Raises:
        TypeError: if it is neither a number nor a `DampingRule`.
        ValueError: if it is not positive and finite, or trace damping where the method has none.
    """
    if isinstance(rule, DampingRule):
        if rule.of_the_paper and not trace_damping:
            raise ValueError(
                f"{method} has no trace damping (the paper defines it for TKFAC and TEKFAC): "
                "give damping as a positive float, e.g. damping=1e-3"
            )
        return
    if isinstance(rule, bool) or not isinstance(rule, (int, float)):
        kinds = "a positive float, tekfac.MeanDamping, tekfac.AdaptiveDamping, "
        kinds += "tekfac.TraceDamping, " if trace_damping else ""
        kinds += "tekfac.FactoredDamping or tekfac.RelativeDamping"
        raise TypeError(f"damping must be {kinds}, got {type(rule).__name__}: {rule!r}")
    check_positive("damping", rule)
