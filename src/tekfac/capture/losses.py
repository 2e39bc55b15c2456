"""What goes into a loss that a model returns alone: the outputs that likelihoods are about.

A model that makes its loss itself shows no logits, but the graph of its loss does. The node of a
cross entropy or a squared error leads to where its input was made, and has kept the values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from tekfac.capture.graph import VIEWS
from tekfac.capture.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tekfac.capture.outputs import tensors_of
from tekfac.layers.saved import axis_of
from tekfac.layers.view import multiplies


@dataclass(frozen=True)
class Fed:
    """An output that a loss is made of.

    Args:
        edge: where it was made.
        values: what the loss's node has kept of it; of logits their log-softmax, which is as good.
        likelihood: whose.
    """

    edge: GradientEdge
    values: Tensor
    likelihood: Likelihood


@dataclass(frozen=True)
class Kind:
    """A kind of node that an output goes into on its way to a loss.

    Args:
        words: what is made there.
        name: of its likelihood.
        likelihood: its class.
        values: gives the output's values, by the number of the operand.
        sides: operands that the output may be.
    """

    words: str
    name: str
    likelihood: type[Likelihood]
    values: Callable[[Any, int], Tensor]
    sides: int = 1


_SQUARED = Kind(
    "squared error",
    "gaussian",
    Gaussian,
    lambda node, side: node._saved_target if side else node._saved_self,
    sides=2,
)
KINDS: dict[str, Kind] = {
    "LogSoftmaxBackward0": Kind(
        "log-softmax", "categorical", Categorical, lambda node, side: node._saved_result
    ),
    "BinaryCrossEntropyWithLogitsBackward0": Kind(
        "binary cross entropy with logits",
        "bernoulli",
        Bernoulli,
        lambda node, side: node._saved_self,
    ),
    "MseLossBackward0": _SQUARED,
    "HuberLossBackward0": replace(_SQUARED, words="Huber loss"),
    "SmoothL1LossBackward0": replace(_SQUARED, words="smooth L1 loss"),
}

# Nodes whose result is a loss, of each term if it is not summed up, and what may be done to that.
REDUCTIONS = VIEWS | {
    "ToCopyBackward0",
    *(f"{kind}Backward{number}" for kind in ("Sum", "Mean") for number in (0, 1)),
}
LOSSES = (KINDS.keys() - {"LogSoftmaxBackward0"}) | {"NllLossBackward0", "NllLoss2DBackward0"}


def losses_in(result: Any) -> list[Tensor]:
    """The losses in what a model returned, if nothing else in it has a gradient."""
    tensors = tensors_of(result)
    return tensors if all(map(_is_loss, tensors)) else []


def _is_loss(tensor: Tensor) -> bool:
    node = tensor.grad_fn
    while node is not None and node.name() in REDUCTIONS:
        node = node.next_functions[0][0]
    return node is not None and (tensor.dim() == 0 or node.name() in LOSSES)


def is_compared(losses: Collection[Tensor]) -> bool:
    """Whether anything that losses are made of is known to be compared with a target."""
    return bool(_compared(losses))


def fed_into(losses: Collection[Tensor], likelihoods: Sequence[Likelihood]) -> list[Fed]:
    """The outputs that losses are made of, each with its likelihood.

    Those that are compared with a target by a node of `KINDS`, with no product of matrices between
    that and the loss.

    Args:
        losses: as of `losses_in`.
        likelihoods: one for each output, in any order.

    Raises:
        ValueError: if these are not as many, and of the same kinds, as the outputs found.
    """
    found = [(kind, node, side) for node in _compared(losses) for kind, side in _sides(node)]
    left, fed = list(likelihoods), []
    for kind, node, side in found:
        fitting = [each for each in left if isinstance(each, kind.likelihood)]
        if not fitting or any(each != fitting[0] for each in fitting):
            break
        own = fitting[0]
        left.remove(own)
        values = kind.values(node, side).detach()
        if isinstance(own, Categorical) and own.dim is None:
            own = replace(own, dim=axis_of(node._saved_dim) % values.dim() - values.dim())
        fed.append(Fed(GradientEdge(*node.next_functions[side]), values, own))
    if left or len(fed) < len(found) or not fed:
        raise ValueError(_words(found))
    return fed


def _compared(losses: Collection[Tensor]) -> list[Any]:
    """The nodes of `KINDS` that are next to losses."""
    open_nodes: list[Any] = [loss.grad_fn for loss in losses][::-1]
    seen, found = set(), []
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in KINDS:
            found.append(node)
        elif not multiplies(node.name()):
            open_nodes.extend(child for child, _ in node.next_functions[::-1])
    return found


def _sides(node: Any) -> list[tuple[Kind, int]]:
    """Which operands of a node are outputs: of two that are compared with one another, both."""
    kind = KINDS[node.name()]
    edges = node.next_functions[: kind.sides]
    return [(kind, side) for side, (child, _) in enumerate(edges) if child is not None]


def _words(found: Sequence[tuple[Kind, Any, int]]) -> str:
    """What a loss is made of, and what to do."""
    beside = 'return the outputs beside the loss, e.g. {"loss": loss, "logits": logits}'
    if not found:
        return (
            "the model returned its loss alone, which is made by no cross_entropy, "
            f"binary_cross_entropy_with_logits or mse_loss of an output: {beside}, or make the "
            "optimizer of the module in the model that returns what the loss is made of"
        )
    made = ", ".join(
        f"{kind.words} of {tuple(kind.values(node, side).shape)}" for kind, node, side in found
    )
    names = ", ".join(f'"{kind.name}"' for kind, _, _ in found)
    given = f"[{names}]" if len(found) > 1 else names
    return (
        f"the model returned its loss alone, which is made of {made}: give a likelihood for each "
        f"of them, likelihood={given}, or {beside}"
    )
