"""Likelihoods: what a network's output says of its labels."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from tekfac import verdict
from tekfac.checks import check_positive
from tekfac.numerics import wide


class Likelihood(ABC):
    """``p(y|x)`` as a function of the network's output; examples come first.

    A *term* is one draw: the label of an image, a token or a pixel, one entry of a regression's
    target (docs/fisher.md). Given the output, terms are independent. A *cotangent* is
    ``d(-log p(y|x))/d output``, in the output's shape and in float32 at least.
    """

    def fitted(self, output: Tensor, gradient: Tensor) -> Likelihood:
        """This likelihood, with what it left open decided by an output and the loss's gradient.

        Raises:
            ValueError: if it does not fit them.
        """
        return self

    @abstractmethod
    def check(self, output: Tensor) -> None:
        """Raise if this likelihood can't be applied to such an output.

        Raises:
            ValueError: naming the output's shape or dtype.
        """

    @abstractmethod
    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """The cotangent of one label drawn for every term."""

    @abstractmethod
    def expectation(self, output: Tensor) -> Iterator[Tensor]:
        """Cotangents whose outer products sum, per example, to the expectation over labels."""

    def used(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        """Which terms the user's loss has, judged by its gradient; None for all.

        Of the output's shape, with 1 along dimensions that belong to one term.
        """
        return None

    def terms(self, output: Tensor, used: Tensor | None) -> Tensor:
        """How many terms each example has that are ``used``: ``(N,)``, in float64."""
        if used is None:
            each = output[:1].numel() // self._entries(output)
            return torch.full((len(output),), each, dtype=torch.float64, device=output.device)
        return used.flatten(1).sum(1, dtype=torch.float64) if used.dim() > 1 else used.double()

    def _entries(self, output: Tensor) -> int:
        """How many of the output's entries a term has."""
        return 1

    def _check_floating(self, output: Tensor, dims: int, words: str) -> None:
        if not output.is_floating_point() or output.dim() < dims:
            loss = ""
            if output.dim() == 0:
                loss = (
                    " (the loss itself, made by hand? Then return the output beside it, or make "
                    "the optimizer of the module in the model that returns that)"
                )
            elif output.dim() == 1 and output.is_floating_point():
                loss = (
                    ' (one logit for each example is likelihood="bernoulli"; for all logits of a '
                    "single one give output=lambda logits: logits[None]; of a flow's "
                    'log-probabilities no label can be drawn: fisher="empirical")'
                )
            raise ValueError(
                f"the {type(self).__name__.lower()} likelihood needs {words}, got an output of "
                f"shape {tuple(output.shape)} and dtype {output.dtype}{loss}; give likelihood=, or "
                "output= to pick the right tensor"
            )


def _wide(output: Tensor) -> Tensor:
    return output.to(wide(output.dtype))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.rand(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return values.to(like.device, non_blocking=True)


# A softmax's gradient sums to zero over its classes: how near to it, of its absolute sum, in the
# types that outputs come in.
SUMS_TO_ZERO = 0.02


def off_zero(values: Tensor, dim: int) -> float:
    """How far from zero sums along a dimension are, of the absolute sums: 0 to 1, nan of zeros."""
    size = values.abs().sum(dtype=torch.float64)
    return float(_wide(values).sum(dim).abs().sum(dtype=torch.float64) / size)


def _labelled(g: Tensor, p: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which terms' gradients are those of a label: ``w (p - e_y)`` with a weight of this sign.

    Args:
        g: the gradients ``(M, C)``.
        p: the probabilities ``(M, C)``.
        sign: that of the weight.

    Returns:
        Whether they are, what size the weight has, and which label, each ``(M,)``.
    """
    label = (sign * g).argmin(-1, keepdim=True)
    weight = -sign * g.gather(-1, label) / (1 - p.gather(-1, label)).clamp_min(1e-12)
    model = sign * weight * p.scatter_add(-1, label, -torch.ones_like(weight))
    missed = (g - model).abs().sum(-1) > 0.02 * g.abs().sum(-1)
    return ~missed, weight[:, 0], label[:, 0]


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Classes by logits, as in ``F.cross_entropy``; all other dimensions are terms of their own.

    Args:
        dim: dimension of the classes, never the first: 1 as in ``F.cross_entropy``, -1 for a
            sequence model's ``(N, T, classes)``. None for that along which the loss's gradient
            sums to zero, as a softmax's does; a loss of which that is true along none, or several,
            is refused.
        masked: whether a term whose gradient is exactly zero is one that the loss leaves out, as
            ``ignore_index`` and masks do, and does not count. False for never: a policy's state
            counts whatever its advantage. None to judge by the others' gradients: they are left
            out where those are of a (perhaps weighted) cross entropy, and not where weights differ
            within a class or pull away from it, as advantages do.
    """

    dim: int | None = None
    masked: bool | None = None

    def fitted(self, output: Tensor, gradient: Tensor) -> Likelihood:
        dims = output.dim()
        if self.dim is not None:
            return replace(self, dim=self.dim % dims - dims)
        if not bool((gradient != 0).any()):
            # Nothing to judge by; without a gradient no term will count.
            return replace(self, dim=1 - dims if dims == 2 or self.masked is False else -1)
        parts = []
        for dim in range(1, dims):
            if output.shape[dim] > 1:
                logs = _wide(output).logsumexp(dim).abs().max()
                parts.append((off_zero(gradient, dim), float(logs), dim))
        # A model that returns log-probabilities leaves the softmax's gradient to be made of them.
        fits = [dim for off, logs, dim in parts if off < SUMS_TO_ZERO or logs < SUMS_TO_ZERO]
        if len(fits) > 1:
            smallest, second = sorted(parts)[:2]
            fits = [smallest[2]] if 10 * smallest[0] < second[0] else fits
        if len(fits) == 1 and not _normalised(output, gradient, fits[0]):
            return replace(self, dim=fits[0] - dims)
        words = "along several dimensions" if len(fits) > 1 else "along no dimension"
        raise ValueError(
            f"the gradient of the loss by the output of shape {tuple(output.shape)} sums to zero "
            + (
                f"along dimension {fits[0]}, but so does the output itself, as a layer norm's "
                "does, and it is that of no label. If it holds features that the loss compares, "
                "make the comparison in the model, or in output=; if it holds logits, say so: "
                f"likelihood=tekfac.Categorical(dim={fits[0]})"
                if len(fits) == 1
                else f"{words}, as a softmax's does over its classes"
                + _what_else(output, gradient, bool(fits))
            )
        )

    def check(self, output: Tensor) -> None:
        self._check_floating(output, 2, "logits of shape (N, classes, ...)")
        if self.dim is not None and (
            not -output.dim() <= self.dim < output.dim() or self.dim % output.dim() == 0
        ):
            raise ValueError(
                f"Categorical(dim={self.dim}): an output of shape {tuple(output.shape)} has no "
                "such class dimension after the first"
            )
        classes = output.shape[self.dim] if self.dim is not None else max(output.shape[1:])
        if classes < 2:
            raise ValueError(
                f"the categorical likelihood needs two classes or more, got an output of shape "
                f'{tuple(output.shape)}: for one logit give likelihood="bernoulli"'
            )

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        dim = self._dim
        p = F.softmax(_wide(output), dim).movedim(dim, -1)
        cumulative = p.cumsum(-1)
        threshold = _uniform(p[..., :1], generator) * cumulative[..., -1:]
        label = torch.searchsorted(cumulative, threshold, right=True).clamp_max(p.shape[-1] - 1)
        return p.scatter_add(-1, label, -torch.ones_like(threshold)).movedim(-1, dim)

    def expectation(self, output: Tensor) -> Iterator[Tensor]:
        dim = self._dim
        p = F.softmax(_wide(output), dim).movedim(dim, -1)
        classes = p.shape[-1]
        positions = p.flatten(1, -2) if p.dim() > 2 else p[:, None]
        for position in range(positions.shape[1]):
            here = positions[:, position]
            for label in range(classes):
                cotangent = torch.zeros_like(positions)
                cotangent[:, position] = here
                cotangent[:, position, label] -= 1
                cotangent[:, position] *= here[:, label, None].sqrt()
                yield cotangent.reshape(p.shape).movedim(-1, dim)

    def used(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        if self.masked is False:
            return None
        used = (gradient != 0).any(self._dim, keepdim=True)
        # A label that is certain, to the last bit, has no gradient either.
        used = used | (F.softmax(_wide(output), self._dim).amax(self._dim, keepdim=True) == 1)
        if self.masked is None:
            used = used | self._advantages(output, gradient, used)
        # Where the host can see that there is nothing to leave out, nobody need look again.
        return used if verdict.waits(used.device) or not bool(used.all()) else None

    def _advantages(self, output: Tensor, gradient: Tensor, used: Tensor) -> Tensor:
        """Whether the gradients are of log-probabilities weighed by anything, 0-dimensional.

        A cross entropy's gradient is ``w (p - e_y)``, with one weight ``w > 0``, or one for each
        class. Weights that differ within a class, or are negative, are advantages; and so are
        those whose one value is that of a mean over all terms, of which some got nothing.
        """
        if not verdict.waits(used.device) and bool(used.all() | ~used.any()):
            return torch.tensor(False)
        g = _wide(gradient).movedim(self._dim, -1).flatten(0, -2)
        p = F.softmax(_wide(output), self._dim).movedim(self._dim, -1).flatten(0, -2)
        there = used.movedim(self._dim, -1).flatten()

        pulls, weight, label = _labelled(g, p, 1)
        pulls &= there
        pushes = torch.zeros_like(pulls)
        if g.shape[-1] > 2:
            pushes = _labelled(g, p, -1)[0] & there & ~pulls
        # Of softer targets some may look like one by chance.
        pushes &= ((pulls | pushes) == there).all()
        highest = weight.new_full((g.shape[-1],), -math.inf)
        lowest = weight.new_full((g.shape[-1],), math.inf)
        highest = highest.scatter_reduce(0, label[:], weight.where(there, -math.inf), "amax")
        lowest = lowest.scatter_reduce(0, label[:], weight.where(there, math.inf), "amin")
        plain = (pulls == there).all()
        differ = (highest > 1.05 * lowest).any()
        even = (highest.max() < 1.001 * lowest.min()) & (
            (highest.max() * len(there) - 1).abs() < 1e-3
        )
        return pushes.any() | (plain & (differ | even))

    @property
    def _dim(self) -> int:
        """The classes' dimension, decided by `fitted` if it was left open."""
        return 1 if self.dim is None else self.dim

    def _entries(self, output: Tensor) -> int:
        return output.shape[self._dim]


def _normalised(output: Tensor, gradient: Tensor, dim: int) -> bool:
    """Whether an output's own sums along a dimension are zero, and its gradient is of no label.

    Whatever a loss makes of differences of such vectors, its gradient sums to zero there, too. An
    output that is zero throughout is that of a head which is not trained yet.
    """
    if not 0 <= off_zero(output, dim) < 64 * torch.finfo(output.dtype).eps:
        return False
    g = _wide(gradient).movedim(dim, -1).flatten(0, -2)
    p = F.softmax(_wide(output), dim).movedim(dim, -1).flatten(0, -2)
    there = (g != 0).any(-1)
    known = _labelled(g, p, 1)[0] | _labelled(g, p, -1)[0]
    return bool((known & there).sum() < 0.5 * there.sum())


def _what_else(output: Tensor, gradient: Tensor, several: bool) -> str:
    """What an output that is no softmax's may be, and what to do, as the end of a sentence."""
    for dim in range(1, output.dim()):
        total = _wide(output).sum(dim)
        if bool((output >= 0).all()) and bool(((total - 1).abs() < 1e-2).all()):
            return (
                ": the output holds probabilities; return logits, or their logarithm "
                f"(they sum to 1 along dimension {dim})"
            )
    total = gradient.sum(dtype=torch.float64).abs() / gradient.abs().sum(dtype=torch.float64)
    if (
        output.dim() == 2
        and len(output) == output.shape[1]
        and not several
        and total < SUMS_TO_ZERO
    ):
        # Of rows' softmaxes and columns' together the gradient vanishes over both dimensions only.
        return (
            ", only as a whole, as that of similarities does that are compared along both "
            "dimensions (CLIP): likelihood=tekfac.Categorical(dim=-1) takes each row for the "
            "logits of an example"
        )
    if bool((output <= 0).all()) and off_zero(gradient, -1) > 0.99:
        return (
            ". It looks like log-probabilities of the data's own labels, never above zero and "
            "pulled one way: of these no other label can be drawn; return the logits of all "
            'classes, or give fisher="empirical"'
        )
    dims = "dim=1" if output.dim() == 2 else "dim=1) for (N, classes, ...), (dim=-1"
    return (
        ". If the output holds logits of classes, say along which dimension: "
        f"likelihood=tekfac.Categorical({dims})"
        + ("" if output.dim() == 2 else " for (N, ..., classes)")
        + '; of another loss, e.g. likelihood="gaussian" for a squared error, "bernoulli" for yes '
        "or no"
    )


def is_open(likelihood: Likelihood) -> TypeGuard[Categorical]:
    """Whether the dimension of its classes is to be found out."""
    return isinstance(likelihood, Categorical) and likelihood.dim is None


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent yes/no outputs by logits, as in ``F.binary_cross_entropy_with_logits``.

    Every entry is a term. One whose gradient is exactly zero is one that the loss leaves out,
    unless its label is certain to the last bit.
    """

    def fitted(self, output: Tensor, gradient: Tensor) -> Likelihood:
        if output.numel() >= 32 and bool(((output >= 0) & (output <= 1)).all()):
            warnings.warn(
                f"an output of shape {tuple(output.shape)} lies between 0 and 1, as probabilities "
                "do: the bernoulli likelihood takes logits; give output=, e.g. output=torch.logit",
                RuntimeWarning,
                stacklevel=2,
            )
        return self

    def check(self, output: Tensor) -> None:
        self._check_floating(output, 1, "logits of shape (N, ...)")

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        p = _wide(output).sigmoid()
        return p - (_uniform(p, generator) < p).to(p.dtype)

    def expectation(self, output: Tensor) -> Iterator[Tensor]:
        p = _wide(output).sigmoid()
        yield from _one_at_a_time((p * (1 - p)).sqrt())

    def used(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        p = _wide(output).sigmoid()
        used = (gradient != 0) | (p == 0) | (p == 1)
        return used if verdict.waits(used.device) or not bool(used.all()) else None


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Outputs as means of normal distributions: ``-log p = ‖y - output‖²/(2 variance)``.

    Every entry is a term, and counts: a zero gradient is no sign that the loss leaves it out.

    Args:
        variance: of each entry, in squared units of the output. The default 1 fits half the squared
            error.

    Raises:
        ValueError: if ``variance`` is not positive and finite.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        check_positive("Gaussian's variance", self.variance)

    def check(self, output: Tensor) -> None:
        self._check_floating(output, 1, "means of shape (N, ...)")

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        mean = _wide(output)
        noise = torch.randn(
            mean.shape, generator=generator, device=generator.device, dtype=mean.dtype
        )
        return noise.to(mean.device, non_blocking=True) / math.sqrt(self.variance)

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


def make_likelihoods(given: object) -> list[Likelihood]:
    """Likelihoods by what a user gave: one, or a list of one for each output.

    Raises:
        TypeError: if something is neither a name nor a `Likelihood`.
        ValueError: for an unknown name, and no likelihood at all.
    """
    if isinstance(given, (list, tuple)):
        if not given:
            raise ValueError("likelihood is an empty list: give one for each output")
        return [each for one in given for each in make_likelihoods(one)]
    if isinstance(given, str):
        if given not in LIKELIHOODS:
            known = ", ".join(map(repr, LIKELIHOODS))
            raise ValueError(f"likelihood must be one of {known}, got {given!r}")
        return [LIKELIHOODS[given]]
    if not isinstance(given, Likelihood):
        raise TypeError(
            "likelihood must be a name or a tekfac likelihood such as tekfac.Categorical(), got "
            f"{given!r}"
        )
    return [given]
