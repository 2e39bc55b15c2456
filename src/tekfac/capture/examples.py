"""Which rows of a layer belong to which example.

An *example* is a part of the batch whose terms share nothing with another's: the rule for a row is
that it belongs to the example whose terms' gradients it gets. Where every row of a layer that is
used once is an example (``R = N``), there is nothing to find out. Elsewhere it is found by going
through the graph twice, with cotangents that differ by one weight per example: a row's gradient
then differs by the weight of its example. This is done once for each form of a network's rows, and
again only where an order was found that no rule describes (the nodes of graphs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tekfac.capture.graph import Use
from tekfac.numerics import wide

# Pseudo-random directions onto which rows' gradients are projected to be compared.
PROJECTIONS = 4

# Of a row's gradient, how much (squared) may not follow its example's weight: rounding, and what
# batch normalisation has examples know of one another.
LOOSE, TIGHT = 0.3, 1e-5

# A list of examples that leaves no more than this is theirs, and no blur of a regular order.
SURE = 1e-9

Kind = Literal["blocks", "strided", "indexed", "own", "shared"]


@dataclass(frozen=True)
class Order:
    """How a layer's rows are divided among examples.

    Args:
        kind: "blocks": those of one example lie together; "strided": row ``r`` is of example ``r
            mod N``, as in sequence-first tensors; "indexed": by a list; "own": none is known to
            belong with another, and each counts as an example; "shared": examples have all of them
            in common.
        index: of "indexed", the example of each row.
    """

    kind: Kind
    index: Tensor | None = None

    def examples(self, rows: int, examples: int) -> int:
        """How many examples there are at a layer with so many rows."""
        return {"own": rows, "shared": 1}.get(self.kind, examples)

    def fits(self, rows: int, examples: int) -> bool:
        """Whether so many rows can be in this order."""
        return self.kind in ("own", "shared") or rows % examples == 0

    def arrange(self, values: Tensor, examples: int) -> Tensor:
        """The rows ``(R, ...)``, those of one example together, and each with as many."""
        if self.kind == "strided":
            turned: Tensor = values.unflatten(0, (-1, examples))
            return turned.transpose(0, 1).flatten(0, 1)
        if self.index is None:
            return values
        places = self._places(examples)
        padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
        return padded[places.flatten()]

    def live(self, examples: int) -> Tensor | None:
        """Which rows of `arrange` are rows and not filled up; None for all."""
        if self.index is None:
            return None
        return self._places(examples).flatten() < len(self.index)

    def _places(self, examples: int) -> Tensor:
        """Numbers of each example's rows, filled up with the number after the last."""
        assert self.index is not None
        rows = len(self.index)
        counts = torch.bincount(self.index, minlength=examples)
        places = self.index.new_full((examples, max(1, int(counts.max()))), rows)
        order = torch.argsort(self.index, stable=True)
        sorted_index = self.index[order]
        within = torch.arange(rows, device=order.device) - (counts.cumsum(0) - counts)[sorted_index]
        places[sorted_index, within] = order
        return places


BLOCKS, STRIDED, OWN, SHARED = Order("blocks"), Order("strided"), Order("own"), Order("shared")


@dataclass(frozen=True)
class Grouping:
    """Which terms of an output make an example.

    Args:
        kind: "first": the first dimension counts examples; "second": the second does; "blocks" and
            "strided": the first counts terms, ``T`` of each of ``examples`` in one of these orders.
        examples: their number, of the last two.
    """

    kind: Literal["first", "second", "blocks", "strided"] = "first"
    examples: int = 0

    def count(self, output: Tensor) -> int:
        """How many examples an output has."""
        return self.examples or output.shape[1 if self.kind == "second" else 0]

    def arrange(self, output: Tensor) -> Tensor:
        """The output with a first dimension of examples."""
        if self.kind == "second":
            return output.transpose(0, 1)
        if self.kind == "first":
            return output
        blocks = self.kind == "blocks"
        parts: Tensor = output.unflatten(0, (self.examples, -1) if blocks else (-1, self.examples))
        return parts if blocks else parts.transpose(0, 1)

    def restore(self, arranged: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        if self.kind == "second":
            return arranged.transpose(0, 1)
        if self.kind == "blocks":
            return arranged.flatten(0, 1)
        if self.kind == "strided":
            return arranged.transpose(0, 1).flatten(0, 1)
        return arranged


def weights_of(examples: int, like: Tensor) -> Tensor:
    """A weight for each example, between 1 and 2, all different and in no order."""
    numbers = torch.arange(1, examples + 1, dtype=torch.float64)
    spread = (numbers * 0.6180339887498949) % 1
    return (1 + spread).to(like.device, wide(like.dtype))


def projected(gradient: Tensor) -> Tensor:
    """Rows ``(R, ...)`` as ``(R, PROJECTIONS)``: what is compared of them."""
    flat = gradient.flatten(1)
    rows = flat.to(wide(flat.dtype))
    generator = torch.Generator().manual_seed(rows.shape[1])
    directions = torch.randn(rows.shape[1], PROJECTIONS, generator=generator)
    return rows @ directions.to(rows)


def order_of(plain: Tensor, weighted: Tensor, weights: Tensor) -> Order:
    """The order in which rows belong to examples.

    Args:
        plain: the rows' gradients, as `projected`.
        weighted: those from a cotangent with each example's part multiplied by its weight.
        weights: of the examples.
    """
    rows, examples = len(plain), len(weights)
    size = plain.square().sum()
    if not bool(size > 0):
        return BLOCKS if rows % examples == 0 else OWN
    spread = weights.var(correction=0).clamp_min(1e-12) * size

    def missed(pattern: Tensor) -> Tensor:
        return (weighted - pattern[:, None] * plain).square().sum() / spread

    regular: list[tuple[Tensor, Order]] = []
    if rows % examples == 0:
        each = rows // examples
        for order, pattern in (
            (BLOCKS, weights.repeat_interleave(each)),
            (STRIDED, weights.repeat(each)),
        ):
            regular.append((missed(pattern), order))
            if bool(regular[-1][0] < TIGHT):
                return order
    if examples == 1:
        return SHARED
    ratio = (plain * weighted).sum(1) / plain.square().sum(1).clamp_min(1e-300)
    index = (ratio[:, None] - weights).abs().argmin(1)
    listed = missed(weights[index])
    if bool(listed < SURE):
        return Order("indexed", index)
    for found, order in regular:
        if bool(found < LOOSE):
            return order
    # Among many examples some weight is always near.
    return Order("indexed", index) if bool(listed < TIGHT) else SHARED


Gradients = Callable[[Tensor, Sequence[Use]], Sequence[Tensor | None]]


class Examples:
    """Finds out which terms of an output make an example, and which rows belong to it.

    Args:
        batch_dim: the dimension that counts examples where there is more than one before the last,
            if the user says so; None to find out.
    """

    def __init__(self, batch_dim: int | None = None) -> None:
        self.batch_dim = batch_dim
        self._known: dict[object, tuple[str, list[Order]]] = {}

    def find(
        self,
        output: Tensor,
        class_dim: int | None,
        uses: Sequence[Use],
        gradients: Gradients,
    ) -> tuple[Grouping, list[Order]]:
        """The grouping of an output's terms, and the order of each product's rows.

        Args:
            output: of the network.
            class_dim: the dimension of a term's entries, counted from the last; None for none.
            uses: the products.
            gradients: takes a cotangent of the output and gives the row gradients of some products,
                as `projected`; None where none came.
        """
        groupings = _groupings(output, class_dim, uses)
        if self.batch_dim is not None:
            kinds = ("second", "strided") if self.batch_dim == 1 else ("first", "blocks")
            grouping = next((g for g in groupings[::-1] if g.kind in kinds), groupings[0])
            return grouping, [self._given(use, grouping.count(output)) for use in uses]
        times = Counter(use.name for use in uses)
        plain = {use for use in uses if len(groupings) == 1 and use.rows == len(output)}
        # Where a layer is used once, it is all the same which of so many rows is whose.
        open_ones = [use for use in uses if use not in plain or times[use.name] > 1]
        if not open_ones:
            return groupings[0], [BLOCKS] * len(uses)
        key = tuple(each.kind for each in groupings), tuple(use.name for use in uses)
        if key in self._known:
            kind, orders = self._known[key]
            grouping = next(each for each in groupings if each.kind == kind)
            examples = grouping.count(output)
            if all(order.fits(use.rows, examples) for use, order in zip(uses, orders, strict=True)):
                return grouping, orders
        grouping, found = _compared(output, groupings, lambda c: gradients(c, open_ones))
        by_use = {
            # Batch normalisation may blur what is found, but not what the sizes say.
            use: BLOCKS if use in plain and order.kind != "indexed" else order
            for use, order in zip(open_ones, found, strict=True)
        }
        orders = [by_use.get(use, BLOCKS) for use in uses]
        if all(order.index is None for order in orders):
            self._known[key] = grouping.kind, orders
        return grouping, orders

    def _given(self, use: Use, examples: int) -> Order:
        order = STRIDED if self.batch_dim == 1 and len(use.lead) > 1 else BLOCKS
        return order if order.fits(use.rows, examples) else OWN


def _groupings(output: Tensor, class_dim: int | None, uses: Sequence[Use]) -> list[Grouping]:
    """Which groupings there may be, the finest first."""
    groupings = [Grouping()]
    if output.dim() > 2 and class_dim in (None, -1):
        groupings.append(Grouping("second"))
    if output.dim() <= 2:
        # Layers saw (N, T) or (T, N) rows where the output has N T.
        leads = sorted({use.lead[:2] for use in uses if len(use.lead) > 1})
        for one, other in leads:
            if one * other == len(output) > 1:
                groupings += [Grouping("blocks", one), Grouping("strided", other)]
                break
    return groupings


def _compared(
    output: Tensor,
    groupings: Sequence[Grouping],
    gradients: Callable[[Tensor], Sequence[Tensor | None]],
) -> tuple[Grouping, list[Order]]:
    """The first grouping in which all rows belong to single examples, or that in which most do."""
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(output.shape, generator=generator).to(output)
    plain = gradients(cotangent)
    best: tuple[Grouping, list[Order]] | None = None
    fewest = len(plain) + 1
    for grouping in groupings:
        arranged = grouping.arrange(cotangent)
        weights = weights_of(len(arranged), arranged)
        shaped = weights.view(-1, *[1] * (arranged.dim() - 1)).to(arranged.dtype)
        weighted = gradients(grouping.restore(arranged * shaped))
        orders = [
            OWN if one is None or other is None else order_of(one, other, weights.to(one))
            for one, other in zip(plain, weighted, strict=True)
        ]
        shared = sum(order.kind == "shared" for order in orders)
        if shared < fewest:
            best, fewest = (grouping, orders), shared
        if not shared:
            break
    assert best is not None
    return best
