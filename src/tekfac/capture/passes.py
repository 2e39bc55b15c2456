"""A forward pass, and hooks that a backward pass runs when it comes to what that returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils.parametrize import ParametrizationList

from tekfac.capture.delivery import Delivery, Expected
from tekfac.capture.likelihoods import Likelihood
from tekfac.capture.observer import Observer
from tekfac.capture.places import identity, nearest, source_of
from tekfac.checks import first_few

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(eq=False)
class Pass:
    """One forward pass through the model.

    Attributes:
        places: where outputs came from: the name of the module ("" for the model), and which of
            those that it returned.
        outputs: the tensors that likelihoods are about, without their graph.
        meshes: those that they are divided among, None of whole ones.
        likelihoods: theirs.
        done: which of them a backward pass has reached.
        derived: of which of them derivatives were taken, to make something of.
        given: layers that have had a sample of this pass.
        terms: of the first output that was reached, 0-dimensional.
        assigned: whether `likelihoods` is what is meant. Of parts that are called one by one it is
            not, as long as it is not known which of them return what the loss is made of.
        inner: then, outputs that others are made of, or that have no gradient.
    """

    places: list[tuple[str, int]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    meshes: list[DeviceMesh | None] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    derived: set[int] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    terms: Tensor | None = None
    assigned: bool = True
    inner: set[int] = field(default_factory=set)
    _made_at: dict[tuple[int, int], int] = field(default_factory=dict)

    def took(self, outputs: Sequence[Tensor]) -> None:
        """Note which outputs the last ones, already in the lists, are made of.

        By what tells their nodes from others: to hold these would keep the graph alive.
        """
        edges: dict[int, GradientEdge] = {}
        for number, output in enumerate(outputs, len(self.outputs) - len(outputs)):
            if not output.requires_grad:
                self.inner.add(number)
                continue
            edges[number] = edge = source_of(output)
            place = identity(edge.node), edge.output_nr
            if place in self._made_at:  # passed on as it was
                self.inner.add(self._made_at[place])
            self._made_at[place] = number
        for edge in edges.values():
            made_of = nearest(
                edge.node.next_functions, lambda e: (identity(e[0]), e[1]) in self._made_at
            )
            self.inner |= {self._made_at[identity(node), number] for node, number in made_of}

    def assign(self, likelihoods: Sequence[Likelihood], check: bool) -> None:
        """Give the outputs that no other is made of their likelihoods, in the order of the calls.

        Raises:
            ValueError: if there are not as many of these, or one can't be of its likelihood.
        """
        self.assigned = True
        last = [n for n in range(len(self.outputs)) if n not in self.inner]
        of_each = Counter(self.places[number][0] for number in last)
        given = list(likelihoods)
        if len(last) != len(given) and {*of_each.values()} == {len(given)}:
            given *= len(of_each)  # as many for each part
        if len(last) != len(given):
            raise ValueError(
                f"{len(given)} likelihoods were given, but the parts of the model that were called "
                f"returned {len(last)} outputs that no other part took: of "
                f"{first_few([*map(repr, of_each)])}; give one for each, in the order of the calls"
            )
        for number, likelihood in zip(last, given, strict=True):
            self.likelihoods[number] = likelihood
            if check:
                likelihood.check(self.outputs[number])


class Listener(Protocol):
    """Who is told what a backward pass has reached: the capture."""

    def reached(self, here: Pass, number: int, root: GradientEdge, gradient: Tensor | None) -> None:
        """An output, by its number, and the gradient of the loss by it."""

    def reached_behind(self, here: Pass, number: int, gradient: Tensor | None) -> None:
        """What an output was made of, and the gradient by it where that is entry by entry."""

    def overheard(self, delivery: Delivery, product: Expected, gradient: Tensor) -> None:
        """A product with a layer's weight."""


@dataclass(eq=False)
class Reached:
    """A hook on the node that made an output.

    It must not hold that node: the cycle would run through autograd, where Python's collector can't
    see it, and the graph would never be freed.
    """

    capture: Listener
    here: Pass
    number: int
    place: int

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[self.place]
        if gradient is not None:
            root = GradientEdge(torch._C._current_autograd_node(), self.place)
            self.capture.reached(self.here, self.number, root, gradient)


@dataclass(eq=False)
class ReachedBehind:
    """A hook on the node that made what an output was made of; it holds no node either."""

    capture: Listener
    here: Pass
    number: int
    place: int
    alike: bool

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[self.place]
        if gradient is not None:
            self.capture.reached_behind(self.here, self.number, gradient if self.alike else None)


@dataclass(eq=False)
class Overheard:
    """A hook on a product that the user's backward pass is about to go through."""

    capture: Listener
    delivery: Delivery
    product: Expected

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            self.capture.overheard(self.delivery, self.product, gradients[0])


def parts_of(model: nn.Module, blocks: Mapping[str, Observer]) -> dict[nn.Module, str]:
    """The modules inside of a model that have layers in them, and their names."""
    layers = {p for block in blocks.values() for p in block.layer.parameters}
    lists = [m for m in model.modules() if isinstance(m, ParametrizationList)]
    own = {each for m in lists for each in m.modules()}
    return {
        module: name
        for name, module in model.named_modules()
        if module is not model
        and module not in own
        and not isinstance(module, torch.jit.ScriptModule)
        and not layers.isdisjoint(module.parameters())
    }
