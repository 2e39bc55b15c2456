"""What a layer saw in a backward pass, as it came and as rows of the matrices of the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sample:
    """What one layer saw in one forward and backward pass, for one draw of the labels.

    Args:
        inputs: the layer's inputs, batch dimension first, one per call of the layer in this pass;
            None where they do not matter (frozen weight).
        gradients: ``d(-log p)/d`` output, one per call, in the shape of the layer's output.
        examples: number of examples ``N``.
        first: whether this is the first draw of the labels in this pass: its inputs are new.
    """

    inputs: list[Tensor | None]
    gradients: list[Tensor]
    examples: int
    first: bool = True

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
        )


@dataclass
class Rows:
    """A few examples of a sample as matrices of rows.

    Args:
        a: inputs, ``(G, n, T', d_in)``: at all ``T`` positions, or at some that stand for all.
        g: output gradients at the same positions, ``(G, n, T', d_out)``.
        positions: ``T``.
        norms: gives ``Σ_t ‖a_nt‖²`` and ``Σ_t ‖g_nt‖²`` over all of them, ``(G, n)`` each: not
            every reader needs them.
    """

    a: Tensor
    g: Tensor
    positions: int
    norms: Callable[[], tuple[Tensor, Tensor]]


def side_by_side(parts: list[Rows]) -> Rows:
    """Several calls of a layer: further positions of the same examples."""

    def norms() -> tuple[Tensor, Tensor]:
        a_norms, g_norms = zip(*(part.norms() for part in parts), strict=True)
        return torch.stack(a_norms).sum(dim=0), torch.stack(g_norms).sum(dim=0)

    return Rows(
        torch.cat([part.a for part in parts], dim=2),
        torch.cat([part.g for part in parts], dim=2),
        sum(part.positions for part in parts),
        norms,
    )
