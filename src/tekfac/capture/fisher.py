"""Which Fisher matrix: the output gradients from which a layer's statistics come.

The Fisher matrix is ``E[∇log p(y|x) ∇log p(y|x)ᵀ]`` over inputs from the data and labels from the
*model's* predictive distribution (paper, 2.1). A likelihood says what that distribution is, given
the network's output; with it, the expectation over labels is estimated by drawing them or taken
exactly. Labels from the data give the *empirical* Fisher, another matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tekfac.capture.likelihoods import Likelihood


class Fisher(ABC):
    """A way of taking the expectation over labels."""

    @abstractmethod
    def cotangents(self, likelihood: Likelihood, output: Tensor) -> Iterator[Tensor]:
        """Cotangents whose outer products sum to (an estimate of) the expectation over labels."""


class ExactFisher(Fisher):
    """The expectation itself, one backward pass per class (and position, or output entry)."""

    def cotangents(self, likelihood: Likelihood, output: Tensor) -> Iterator[Tensor]:
        return likelihood.expectation(output)


class SampledFisher(Fisher):
    """Labels drawn from the model's predictive distribution, an unbiased estimate.

    Args:
        samples: labels per example, and backward passes.
        generator: where the draws come from. If None, a generator of its own, seeded by
            ``torch.initial_seed()``: it follows ``torch.manual_seed`` and leaves the global stream
            alone.

    Attributes:
        seed: of ``generator``; of several ranks, which draw from it anew in every step, the first
            one's.
    """

    def __init__(self, samples: int, generator: torch.Generator | None) -> None:
        self.samples = samples
        self.generator = torch.Generator() if generator is None else generator
        if generator is None:
            self.generator.manual_seed(torch.initial_seed())
        self.seed = self.generator.initial_seed()

    def cotangents(self, likelihood: Likelihood, output: Tensor) -> Iterator[Tensor]:
        for _ in range(self.samples):
            yield likelihood.sample(output, self.generator) / math.sqrt(self.samples)

    def state_dict(self) -> dict[str, Any]:
        """What the next draws follow from, the generator's state as text: it is no tensor that
        anybody should move, cast or shard.
        """
        return {"generator": bytes(self.generator.get_state().tolist()).hex(), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draw on where `state_dict` was taken; that of another Fisher matrix changes nothing."""
        if "generator" not in state:
            return
        saved = state["generator"]
        if isinstance(saved, str):  # in older states a tensor
            saved = torch.tensor(list(bytes.fromhex(saved)), dtype=torch.uint8)
        self.generator.set_state(saved.cpu())
        self.seed = state.get("seed", self.seed)  # not there in older states


def make_fisher(fisher: str, samples: int, generator: torch.Generator | None) -> Fisher | None:
    """The Fisher matrix of a name; None for "empirical".

    Raises:
        ValueError: for an unknown name.
    """
    if fisher == "mc":
        return SampledFisher(samples, generator)
    if fisher == "exact":
        return ExactFisher()
    if fisher == "empirical":
        return None
    raise ValueError(f'fisher must be "mc", "exact" or "empirical", got {fisher!r}')
