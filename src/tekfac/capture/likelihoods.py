"""Likelihoods: what a network's output says of its labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tekfac.checks import check_positive


class Likelihood(ABC):
    """``p(y|x)`` as a function of the network's output; examples are independent and come first.

    A *cotangent* is ``d(-log p(y|x))/d output``, in the output's shape and in float32 at least.
    """

    @abstractmethod
    def check(self, output: Tensor) -> None:
        """Raise if this likelihood can't be applied to such an output.

        Raises:
            ValueError: naming the output's shape or dtype.
        """

    @abstractmethod
    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """The cotangent of one label drawn for every example (and position)."""

    @abstractmethod
    def expectation(self, output: Tensor) -> Iterator[Tensor]:
        """Cotangents whose outer products sum, per example, to the expectation over labels."""

    def used(self, gradient: Tensor) -> Tensor | None:
        """Where the user's loss looks at the output, by its gradient; None for everywhere."""
        return None

    def _check_floating(self, output: Tensor, dims: int, words: str) -> None:
        if not output.is_floating_point() or output.dim() < dims:
            raise ValueError(
                f"the {type(self).__name__.lower()} likelihood needs {words}, got an output of "
                f"shape {tuple(output.shape)} and dtype {output.dtype}; give likelihood=, or "
                "output= to pick the right tensor"
            )


def _wide(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.rand(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return values.to(like.device, non_blocking=True)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Classes by logits, as in ``F.cross_entropy``; trailing dimensions are independent positions.

    Positions that the loss ignores (``ignore_index``, a mask) contribute nothing: they are known by
    the user's own gradient, which is exactly zero for all their classes.

    Args:
        dim: dimension of the classes: 1 as in ``F.cross_entropy``, -1 for a sequence model's ``(N,
            T, classes)``.
    """

    dim: int = 1

    def check(self, output: Tensor) -> None:
        self._check_floating(output, 2, "logits of shape (N, classes, ...)")
        if not -output.dim() <= self.dim < output.dim() or self.dim % output.dim() == 0:
            raise ValueError(
                f"Categorical(dim={self.dim}): an output of shape {tuple(output.shape)} has no "
                "such class dimension after the first"
            )

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        p = F.softmax(_wide(output), self.dim).movedim(self.dim, -1)
        cumulative = p.cumsum(-1)
        threshold = _uniform(p[..., :1], generator) * cumulative[..., -1:]
        label = torch.searchsorted(cumulative, threshold, right=True).clamp_max(p.shape[-1] - 1)
        return p.scatter_add(-1, label, -torch.ones_like(threshold)).movedim(-1, self.dim)

    def expectation(self, output: Tensor) -> Iterator[Tensor]:
        p = F.softmax(_wide(output), self.dim).movedim(self.dim, -1)
        classes = p.shape[-1]
        positions = p.flatten(1, -2) if p.dim() > 2 else p[:, None]
        for position in range(positions.shape[1]):
            here = positions[:, position]
            for label in range(classes):
                cotangent = torch.zeros_like(positions)
                cotangent[:, position] = here
                cotangent[:, position, label] -= 1
                cotangent[:, position] *= here[:, label, None].sqrt()
                yield cotangent.reshape(p.shape).movedim(-1, self.dim)

    def used(self, gradient: Tensor) -> Tensor | None:
        return (gradient != 0).any(self.dim, keepdim=True)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent yes/no outputs by logits, as in ``F.binary_cross_entropy_with_logits``.

    Entries that the loss ignores contribute nothing, as for `Categorical`.
    """

    def check(self, output: Tensor) -> None:
        self._check_floating(output, 1, "logits of shape (N, ...)")

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        p = _wide(output).sigmoid()
        return p - (_uniform(p, generator) < p).to(p.dtype)

    def expectation(self, output: Tensor) -> Iterator[Tensor]:
        p = _wide(output).sigmoid()
        yield from _one_at_a_time((p * (1 - p)).sqrt())

    def used(self, gradient: Tensor) -> Tensor | None:
        return gradient != 0


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Outputs as means of normal distributions: ``-log p = ‖y - output‖²/(2 variance)``.

    Every entry counts: a zero gradient is no sign that the loss ignores it.

    Args:
        variance: of each entry, in squared units of the output. The default 1 fits half the squared
            error, summed over an example's entries.

    Raises:
        ValueError: if ``variance`` is not positive and finite.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        check_positive("Gaussian's variance", self.variance)

    def check(self, output: Tensor) -> None:
        self._check_floating(output, 1, "means of shape (N, ...)")

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        wide = _wide(output)
        noise = torch.randn(
            wide.shape, generator=generator, device=generator.device, dtype=wide.dtype
        )
        return noise.to(wide.device, non_blocking=True) / math.sqrt(self.variance)

    def expectation(self, output: Tensor) -> Iterator[Tensor]:
        yield from _one_at_a_time(torch.ones_like(_wide(output)) / math.sqrt(self.variance))


def _one_at_a_time(values: Tensor) -> Iterator[Tensor]:
    """``values`` with all but one entry of every example zero, for each entry in turn."""
    flat = values.reshape(values.shape[0], -1)
    for entry in range(flat.shape[1]):
        alone = torch.zeros_like(flat)
        alone[:, entry] = flat[:, entry]
        yield alone.reshape(values.shape)


LIKELIHOODS: dict[str, Likelihood] = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
}
