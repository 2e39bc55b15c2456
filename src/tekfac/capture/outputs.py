"""What a model returned, and which tensors in it a likelihood is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

WHAT_TO_GIVE = (
    "give output=, a function that finds the logits in it (or a list of several tensors), e.g. "
    "output=lambda result: result[0]"
)


def find_outputs(result: Any) -> list[Tensor]:
    """The logits in what a model returned.

    Itself if it is a tensor; its field ``.logits``; of a tuple, list or dict all tensors of two
    dimensions or more that have a gradient (a loss that stands beside them has one dimension less);
    those that another one is made of, such as a VAE's means, are left out once the loss is seen.
    Without any, the one tensor that there is.

    Raises:
        ValueError: if there is none of these.
    """
    if isinstance(result, Tensor):
        return [result]
    logits = getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        rest = [v for v in _tensors(result) if v is not logits and _is_auxiliary(v, logits)]
        return [logits, *rest]
    tensors = [value for value in _tensors(result) if value.requires_grad]
    shaped = [value for value in tensors if value.dim() >= 2]
    if shaped:
        return shaped
    if len(tensors) == 1 and tensors[0].dim() > 0:
        return tensors
    if _tensors(result) and not tensors:
        return _tensors(result)[:1]
    raise ValueError(
        f"the model returned {type(result).__name__}, neither a tensor nor something with logits "
        f"in it: {WHAT_TO_GIVE}"
    )


def chosen_outputs(choose: Callable[[Any], Any]) -> Callable[[Any], list[Tensor]]:
    """The outputs that a user's function gives, one tensor or several.

    Raises:
        ValueError: from the result, if the function gives anything else.
    """

    def find(result: Any) -> list[Tensor]:
        found = choose(result)
        outputs = [found] if isinstance(found, Tensor) else _tensors(found)
        if not outputs:
            raise ValueError(
                f"output= gave {type(found).__name__}, neither a tensor nor a list of tensors"
            )
        return outputs

    return find


def tensors_of(result: Any, depth: int = 4) -> list[Tensor]:
    """All tensors with a gradient in what a model returned, however deep."""
    if isinstance(result, Tensor):
        return [result] if result.requires_grad else []
    if isinstance(result, Mapping):
        parts: Sequence[Any] = list(result.values())
    elif isinstance(result, (list, tuple)):
        parts = result
    else:
        parts = list(getattr(result, "__dict__", {}).values())
    return [tensor for part in parts if depth for tensor in tensors_of(part, depth - 1)]


def _is_auxiliary(value: Tensor, logits: Tensor) -> bool:
    """Whether a tensor beside the logits is another classifier's, as in torchvision's models."""
    return value.requires_grad and value.dim() == logits.dim() and value.shape == logits.shape


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Mapping):
        values: Sequence[Any] = list(result.values())
    elif isinstance(result, (list, tuple)):
        values = result
    else:
        values = ()
    found = {id(value): value for value in values if isinstance(value, Tensor)}
    return list(found.values())
