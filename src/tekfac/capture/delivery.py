"""From gradients as they come to samples of layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from tekfac import verdict
from tekfac.capture.examples import Order
from tekfac.capture.reading import Reading
from tekfac.layers import Geometry, Sample


@dataclass(eq=False)
class Expected:
    """A product whose output gradient a backward pass is to bring.

    Args:
        reading: the product.
        order: how its rows belong to examples.
        reached: which of its rows any term looks at; None to judge by the gradient.
        gradient: what came.
    """

    reading: Reading
    order: Order
    reached: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(eq=False)
class Delivery:
    """One backward pass from one output: what comes of it, layer by layer.

    Args:
        examples: how many the output has.
        used: which terms count, ``(N, T)``; None for all.
        terms: how many of them each example has, ``(N,)``.
        known: layers that have had their inputs in an earlier backward pass through the same graph.
        calls: the products of each layer that are still to come.
        first: whether this is the first draw of the labels.
    """

    examples: int
    used: Tensor | None
    terms: Tensor
    known: frozenset[str]
    calls: dict[str, list[Expected]] = field(default_factory=dict)
    first: bool = True

    def expect(self, products: Iterable[Expected]) -> None:
        """Wait for the gradients of these products."""
        self.calls = {}
        for each in products:
            each.gradient = None
            self.calls.setdefault(each.reading.name, []).append(each)

    def received(self, product: Expected, gradient: Tensor) -> bool:
        """A product's gradient is there; whether those of all its layer's are."""
        product.gradient = gradient.detach()
        return all(each.gradient is not None for each in self.calls[product.reading.name])

    def samples(self, name: str) -> list[Sample]:
        """What came for a layer, which is then not waited for any more."""
        groups: dict[int, list[_Part]] = {}
        calls = self.calls.pop(name)
        matrices = calls[0].reading.layer.groups
        for each in calls:
            if each.gradient is not None:
                g = each.reading.output_rows(each.gradient)
                each.gradient = None
                units = each.order.examples(len(g), self.examples)
                groups.setdefault(units, []).append(self._part(each, g))
        found: list[Sample] = []
        for units, parts in groups.items():
            # A layer with rows of several kinds counts the terms once.
            terms = self._terms(units) if not found else torch.zeros_like(self._terms(units))
            parts = _side_by_side(parts, units, matrices)
            sample = _sample(parts, units, terms, self.first and name not in self.known)
            if sample is not None:
                found.append(sample)
        return found

    def _part(self, product: Expected, g: Tensor) -> _Part:
        order, n = product.order, self.examples
        x = product.reading.input_rows()
        units = order.examples(len(g), n)
        reached = (g != 0).flatten(1).any(1) if product.reached is None else product.reached
        g = order.arrange(g, n)
        x = None if x is None else order.arrange(x, n)
        live = order.live(n)
        if self.used is not None and order.kind != "shared":
            reached = order.arrange(reached, n)
            # In a list, which row is of which term is not known: those that none looks at are out.
            if units == n and order.kind != "indexed":
                used, per = self.used, len(g) // n
                if used.shape[1] != per:
                    used = used.any(1, keepdim=True).expand(-1, per)
                reached = reached | used.flatten()
            live = reached if live is None else live & reached
        weights = product.reading.weights
        if weights is not None and product.reading.layer.looked_up:
            # Each entry of a sum is a position of its own.
            assert x is not None
            weights = order.arrange(weights, n)
            g = (g[:, None] * weights[:, :, None].to(g.dtype)).flatten(0, 1)
            if live is not None:
                live = live.repeat_interleave(weights.shape[1])
            x = x.flatten()
            live = x >= 0 if live is None else live & (x >= 0)
        members = product.reading.members
        if members is not None:
            members = order.arrange(members.to(g.device), n)
        reading = product.reading
        return _Part(x, g, live, reading.swapped, reading.biased, members, reading.geometry)

    def _terms(self, units: int) -> Tensor:
        if units == self.examples:
            return self.terms
        return (self.terms.sum() / units).expand(units)


@dataclass
class _Part:
    x: Tensor | None
    g: Tensor
    live: Tensor | None
    swapped: bool
    biased: bool
    members: Tensor | None
    geometry: Geometry | None = None

    def only(self, kept: Tensor) -> _Part:
        """That of some examples."""

        def some(values: Tensor) -> Tensor:
            parts: Tensor = values.unflatten(0, (len(kept), -1))
            return parts[kept].flatten(0, 1)

        return _Part(
            None if self.x is None else some(self.x),
            some(self.g),
            None if self.live is None else some(self.live),
            self.swapped,
            self.biased,
            None if self.members is None else some(self.members),
            self.geometry,
        )


def _side_by_side(parts: list[_Part], units: int, matrices: int) -> list[_Part]:
    """Calls with rows of single matrices of a stack as one call of all of them."""
    found = [part for part in parts if part.members is None]
    for swapped in (False, True):
        own = [p for p in parts if p.members is not None and p.swapped == swapped]
        if own:
            found.append(_stacked(own, units, matrices))
    return found


def _stacked(parts: list[_Part], units: int, matrices: int) -> _Part:
    """Each matrix's rows of an example at the first places ``(N T, E, d)`` that there are.

    ``T`` is the most that any has.
    """

    def joined(values: list[Tensor]) -> Tensor:
        return torch.cat([each.unflatten(0, (units, -1)) for each in values], 1)

    members = joined([part.members for part in parts if part.members is not None])
    live = joined(
        [
            torch.ones_like(part.g[:, 0], dtype=torch.bool) if part.live is None else part.live
            for part in parts
        ]
    )
    live &= members < matrices
    members = members.where(live, 0)
    here = F.one_hot(members, matrices) * live[:, :, None]
    places = (here.cumsum(1) - 1).gather(2, members[:, :, None])[:, :, 0]
    example = torch.arange(units, device=live.device)[:, None].expand_as(members)
    index, length = (example[live], places[live], members[live]), int(here.sum(1).max())

    def spread(values: Tensor) -> Tensor:
        whole = values.new_zeros(units, length, matrices, *values.shape[2:])
        whole[index] = values[live]
        return whole.flatten(0, 1)

    x = [part.x for part in parts if part.x is not None]
    g = spread(joined([part.g for part in parts]))
    inputs = spread(joined(x)) if x else None
    return _Part(inputs, g, spread(live), parts[0].swapped, False, None)


def _sample(parts: list[_Part], units: int, terms: Tensor, first: bool) -> Sample | None:
    """The sample of these calls; None if no example is left."""
    waits = verdict.waits(parts[0].g.device)
    if not waits and all(part.live is not None for part in parts):
        alive = [part.live.view(units, -1).any(1) for part in parts if part.live is not None]
        # One that has terms, and only no row here, counts in what the matrix is a mean over.
        kept = torch.stack(alive).any(0) | (terms > 0)
        if not bool(kept.all()):
            # Examples that the loss leaves out: as if they were not there.
            parts, terms, units = [part.only(kept) for part in parts], terms[kept], int(kept.sum())
    if not units:
        return None
    live = [
        None if part.live is None or (not waits and bool(part.live.all())) else part.live
        for part in parts
    ]
    return Sample(
        [part.x for part in parts],
        [part.g for part in parts],
        units,
        first,
        terms,
        live,
        [part.swapped for part in parts],
        [part.geometry for part in parts],
        [part.biased for part in parts],
    )
