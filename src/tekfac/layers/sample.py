"""What a layer saw in a backward pass, as it came and as rows of the matrices of the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tekfac.layers.geometry import Geometry
from tekfac.numerics import square_norms, wide


@dataclass
class Sample:
    """What one layer saw in one forward and backward pass, for one draw of the labels.

    A layer may have multiplied several times in a pass (a *call* each). Leading dimensions count
    rows, or images, example by example: ``k N`` of them hold ``k`` of each of ``N`` examples.

    Args:
        inputs: the layer's inputs, one per call; None where they do not matter (frozen weight).
        gradients: ``d(-log p)/d`` output, one per call, in the shape of the layer's output.
        examples: number of examples ``N``.
        first: whether this is the first draw of the labels in this pass: its inputs are new.
        terms: the likelihood's terms that each example stands for, ``(N,)``; None for one each.
        live: for each call, which of its leading rows count, or None for all: padding, which no
            term looks at, is no input. Gradients of the others are zero. Of a stack of matrices
            ``(R, E)``, else ``(R,)``.
        swapped: for each call, whether the weight was multiplied from the other side: then the
            matrix's columns see the gradient and its rows the input. Empty for none.
        geometry: for each call of a convolution, how it reads its input. Empty for as its layer
            has it.
        biased: for each call, whether the layer's bias was added to what the weight made. Empty for
            all that are not swapped.

    Attributes:
        rows: as which it was read last, by how, if that was in one piece: who reads it the same way
            need not make them once more.
    """

    inputs: list[Tensor | None]
    gradients: list[Tensor]
    examples: int
    first: bool = True
    terms: Tensor | None = None
    live: list[Tensor | None] = field(default_factory=list)
    swapped: list[bool] = field(default_factory=list)
    geometry: list[Geometry | None] = field(default_factory=list)
    biased: list[bool] = field(default_factory=list)
    rows: tuple[object, Rows] | None = field(default=None, init=False, repr=False)

    @property
    def calls(self) -> list[Call]:
        """The calls, each with its two sides in the order of the matrix's columns and rows."""
        live = self.live or [None] * len(self.gradients)
        swapped = self.swapped or [False] * len(self.gradients)
        geometry = self.geometry or [None] * len(self.gradients)
        biased = self.biased or [not swap for swap in swapped]
        result = []
        for x, g, rows, swap, form, bias in zip(
            self.inputs, self.gradients, live, swapped, geometry, biased, strict=True
        ):
            if swap:
                assert x is not None
                result.append(Call(g, x, rows, True, form, bias))
            else:
                result.append(Call(x, g, rows, False, form, bias))
        return result

    @property
    def units(self) -> Tensor | int:
        """How many examples have anything that counts; of a stack of matrices at each, ``(E,)``."""
        if not self.live or any(live is None for live in self.live):
            return self.examples
        alive = [by_example(live, self.examples).any(2) for live in self.live if live is not None]
        return torch.stack(torch.broadcast_tensors(*alive)).any(0).sum(1).squeeze()

    @property
    def term_count(self) -> Tensor:
        """Terms of all examples, 0-dimensional."""
        if self.terms is not None:
            return self.terms.sum()
        return torch.tensor(float(self.examples), dtype=torch.float64)

    def head(self, examples: int, *, copied: bool = False) -> Sample:
        """The first so many examples; copied, if they are to be kept without the rest."""
        if examples == self.examples:
            return self

        def rows(values: Tensor) -> Tensor:
            part = values[: -(-len(values) * examples // self.examples)]
            return part.clone() if copied else part

        return Sample(
            [None if x is None else rows(x) for x in self.inputs],
            [rows(g) for g in self.gradients],
            examples,
            self.first,
            None if self.terms is None else self.terms[:examples],
            [None if live is None else rows(live) for live in self.live],
            self.swapped,
            self.geometry,
            self.biased,
        )


def by_example(live: Tensor, examples: int) -> Tensor:
    """Which leading rows count, ``(R,)`` or ``(R, G)``, as ``(1 or G, N, rows of an example)``."""
    return live.view(examples, len(live) // examples, -1).movedim(2, 0)


@dataclass
class Call:
    """One product with a layer's weight.

    Args:
        a: what the matrix's columns see, None where that does not matter.
        g: what its rows see.
        live: which leading rows count; None for all.
        swapped: whether ``a`` is an output gradient, and ``g`` an input.
        geometry: how a convolution reads its input; None for as its layer has it.
        biased: whether the layer's bias was added.
    """

    a: Tensor | None
    g: Tensor
    live: Tensor | None
    swapped: bool
    geometry: Geometry | None = None
    biased: bool = True


@dataclass
class Rows:
    """A few examples of a sample as matrices of rows.

    Args:
        a: inputs, ``(G, n, T', d_in)``: at all ``T`` positions, or at some that stand for all. Of
            one-hot rows the numbers of their entries, ``(G, n, T')``, -1 for a row of zeros.
        g: output gradients at the same positions, ``(G, n, T', d_out)``.
        positions: ``T``.
        norms: gives ``Σ_t ‖a_nt‖²`` and ``Σ_t ‖g_nt‖²`` over all of them, ``(G, n)`` each: not
            every reader needs them.
        counted: how many of an example's positions count, ``(1 or G, n)``; None for all.
        drawn: whether ``a`` and ``g``, in turn, come with every draw of the labels, or are what
            they were in the first.
    """

    a: Tensor
    g: Tensor
    positions: int
    norms: Callable[[], tuple[Tensor, Tensor]]
    counted: Tensor | None = None
    drawn: tuple[bool, bool] = (False, True)

    @property
    def per_position(self) -> Tensor | float:
        """1 over the number of positions that count, ``(1 or G, n)`` if it differs."""
        return 1 / self.positions if self.counted is None else 1 / self.counted.clamp_min(1)

    def reduced(self) -> Rows:
        """One row for each example: the mean of its inputs, and the sum of its gradients.

        Of one-hot rows there is no such: they are left as they are.
        """
        if self.a.dim() == 3 or self.positions == 1:
            return self
        share = self.per_position
        share = share[..., None, None] if isinstance(share, Tensor) else share
        a = self.a.sum(2, keepdim=True, dtype=wide(self.a.dtype)) * share
        g = self.g.sum(2, keepdim=True, dtype=wide(self.g.dtype))
        return Rows(a, g, 1, lambda: (square_norms(a), square_norms(g)), drawn=self.drawn)


def side_by_side(parts: list[Rows]) -> Rows:
    """Several calls of a layer: further positions of the same examples."""

    def norms() -> tuple[Tensor, Tensor]:
        a_norms, g_norms = zip(*(part.norms() for part in parts), strict=True)
        return torch.stack(a_norms).sum(dim=0), torch.stack(g_norms).sum(dim=0)

    counted = None
    if any(part.counted is not None for part in parts):
        counts = [
            part.a.new_full((1, part.a.shape[1]), part.positions)
            if part.counted is None
            else part.counted
            for part in parts
        ]
        counted = torch.stack(torch.broadcast_tensors(*counts)).sum(dim=0)
    return Rows(
        torch.cat([part.a for part in parts], dim=2),
        torch.cat([part.g for part in parts], dim=2),
        sum(part.positions for part in parts),
        norms,
        counted,
        (any(part.drawn[0] for part in parts), any(part.drawn[1] for part in parts)),
    )
