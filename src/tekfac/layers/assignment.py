"""Which parameters of a model may get a curvature block, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.swa_utils import AveragedModel

from tekfac.layers.convolution import ConvLayer
from tekfac.layers.embedding import EmbeddingLayer
from tekfac.layers.geometry import Geometry
from tekfac.layers.layer import Layer
from tekfac.layers.linear import LinearLayer
from tekfac.layers.stack import StackLayer


@dataclass
class Candidate:
    """A weight that products may be found of, and its bias.

    Args:
        module: whose it is.
        key: its name there.
        weight: the weight, trained or not.
        bias: its bias, None if it has none.
        make: makes its layer from a name, the weight, and weight and bias as far as trained.
    """

    module: nn.Module
    key: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    make: Callable[..., Layer]

    def check(self, name: str) -> None:
        """Raise if the module has another weight by now, of another shape.

        Raises:
            ValueError: naming the layer and both shapes.
        """
        now = self.module._parameters.get(self.key)
        if now is not None and now.dim() == self.weight.dim() and now.shape != self.weight.shape:
            raise ValueError(
                f"layer {name!r} has a weight of shape {tuple(now.shape)} now, but its curvature "
                f"block was built for {tuple(self.weight.shape)}: make a new optimizer after a "
                "layer's parameters have changed shape"
            )


@dataclass
class Assignment:
    """Which parameters belong to layers, and why the others do not.

    Args:
        candidates: by name: the module's, or the parameter's where a module has several.
        owner: the name in ``candidates`` for each parameter of one.
        reasons: for every other parameter of the model, why the first-order rule trains it.
        made: weights in whose place a function of them may be multiplied: normalised, for example.
    """

    candidates: dict[str, Candidate] = field(default_factory=dict)
    owner: dict[nn.Parameter, str] = field(default_factory=dict)
    reasons: dict[nn.Parameter, str] = field(default_factory=dict)
    made: set[nn.Parameter] = field(default_factory=set)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# The bias that goes with a weight, by the weight's name in its module.
BIASES = {"weight": "bias", "in_proj_weight": "in_proj_bias"}

# As what `torch.nn.utils` keeps the weight that a hook makes one of in each call.
HOOKED = {"weight_v", "weight_orig"}


# Modules that look their weight up.
TABLES = (nn.Embedding, nn.EmbeddingBag)


def candidates_of(module: nn.Module) -> dict[str, Candidate]:
    """A module's weights that may be multiplied with rows, each by its name in the module.

    Matrices, stacks of them, and kernels.
    """
    found: dict[str, Candidate] = {}
    if isinstance(module, (ParametrizationList, torch.jit.ScriptModule)):
        # What is multiplied is made of the parameters of the one, and not shown by the other.
        return found
    for key, weight in {**module._parameters, **_originals(module)}.items():
        if weight is None or not weight.is_floating_point():
            continue
        if key in HOOKED and "weight" not in module._parameters:
            key = "weight"
        bias = module._parameters.get(BIASES.get(key, _rnn_bias(key)))
        if isinstance(module, CONVOLUTIONS) and key == "weight":
            found[key] = Candidate(
                module, key, weight, bias, partial(ConvLayer, geometry=Geometry.of(module))
            )
        elif isinstance(module, TRANSPOSED) and key == "weight":
            # Its bias is added where its gradient comes from: no column of the matrix sees it.
            found[key] = Candidate(
                module, key, weight, None, partial(ConvLayer, geometry=Geometry.of(module))
            )
        elif isinstance(module, TABLES):
            if key == "weight" and not _reason_of_table(module):
                found[key] = Candidate(
                    module, key, weight, None, partial(EmbeddingLayer, transposed=True)
                )
        elif weight.dim() == 2:
            if bias is not None and not (bias.dim() == 1 and len(bias) in weight.shape):
                bias = None
            found[key] = Candidate(module, key, weight, bias, _linear(weight, bias))
        elif weight.dim() in (3, 4, 5):
            # A kernel that some function convolves with, or a stack of matrices: what goes with
            # three dimensions and no bias is seen at its first use.
            if bias is not None and bias.shape != weight.shape[:1]:
                bias = None
            if weight.dim() == 3 and bias is None and min(weight.shape) > 1:
                found[key] = Candidate(module, key, weight, None, StackLayer)
            elif min(weight.shape[0], weight[0].numel()) > 1:
                found[key] = Candidate(module, key, weight, bias, ConvLayer)
    return found


def _originals(module: nn.Module) -> dict[str, nn.Parameter]:
    """What a module's parametrizations make its weights of, by the weights' names."""
    lists: Any = getattr(module, "parametrizations", None)
    if not isinstance(lists, nn.ModuleDict):
        return {}
    # Of a length and a direction (weight_norm), the latter.
    return {
        key: max(own, key=torch.Tensor.numel)
        for key, each in lists.items()
        if (own := list(each.parameters(recurse=False)))
    }


def _may_be_made(candidate: Candidate) -> bool:
    """Whether a function of a weight may take its place, and is known to be nothing else then."""
    module, weight = candidate.module, candidate.weight
    usual = isinstance(module, (*CONVOLUTIONS, nn.Linear)) and candidate.key == "weight"
    return usual or weight is not module._parameters.get(candidate.key)


def _rnn_bias(key: str) -> str:
    return key.replace("weight_ih", "bias_ih").replace("weight_hh", "bias_hh")


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> Callable[..., Layer]:
    # A bias tells which side of a matrix is the output; without one it is the first until it is
    # seen to be used otherwise.
    turned = bias is not None and len(bias) != len(weight)
    return partial(LinearLayer, transposed=turned)


def _reason(module: nn.Module) -> str:
    """Why a module's parameters have no curvature block."""
    kind = type(module).__name__
    if isinstance(module, TABLES) and (why := _reason_of_table(module)):
        return why
    if isinstance(module, torch.jit.ScriptModule):
        return f"{kind} is compiled by torch.jit, which does not show what it multiplies"
    return f"{kind} has no curvature block"


def _reason_of_table(module: nn.Embedding | nn.EmbeddingBag) -> str:
    """Why a table has no curvature block; "" if it may have one."""
    kind = type(module).__name__
    if module.scale_grad_by_freq:
        return f"{kind} with scale_grad_by_freq=True gets what is no gradient of the loss"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return f"{kind} with mode='max' multiplies each column with other entries"
    return ""


def layer_of(module: nn.Module, *, weight: bool = True, name: str = "layer") -> Layer:
    """A module with one weight, as a layer; without the weight, if that is not trained.

    Raises:
        ValueError: if the module has not exactly one weight that can be multiplied.
    """
    found = list(candidates_of(module).values())
    if len(found) != 1:
        raise ValueError(f"{type(module).__name__} has {len(found)} weights, not one")
    [candidate] = found
    own = candidate.weight if weight else None
    return candidate.make(name, candidate.weight, own, candidate.bias)


def plain_names(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by name, as if nothing was wrapped.

    So a layer has the same name whether the model is trained by one process or several, compiled or
    not, and a state fits either.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found[plain_name(model, name)] = module  # of a wrapper and what is in it, the latter
    return found


def plain_name(model: nn.Module, name: str) -> str:
    """A module's name without the parts that lead from a wrapper to what is wrapped."""
    parts, module = [], model
    for part in name.split(".") if name else []:
        if _wraps(module) != part:
            parts.append(part)
        module = getattr(module, part, None) or module
    return ".".join(parts)


def _wraps(module: nn.Module) -> str | None:
    """Under which name a module has what it only wraps."""
    if isinstance(module, (DistributedDataParallel, nn.DataParallel, AveragedModel)):
        return "module"
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None


def assign(model: nn.Module, exclude: Sequence[str | type[nn.Module]]) -> Assignment:
    """Find a model's layers, as far as they can be told before any use is seen.

    Args:
        model: the model.
        exclude: module names (with all that is inside them) and module classes to leave out.

    Raises:
        ValueError: for a name that is no module's, and for a parameter without a shape yet.
        TypeError: for an entry that is neither a name nor a module class, and for no list of them.
    """
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise TypeError(
            f"exclude takes a list of module names and nn.Module classes, got {exclude!r}"
        )
    names = plain_names(model)
    exclude = [plain_name(model, entry) if isinstance(entry, str) else entry for entry in exclude]
    for entry in exclude:
        if isinstance(entry, str):
            if entry not in names:
                known = ", ".join(repr(name) for name in names if name)
                raise ValueError(
                    f"exclude names no module of the model: {entry!r} (it has {known})"
                )
        elif not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise TypeError(
                "exclude takes module names and nn.Module classes, got "
                f"{type(entry).__name__}: {entry!r}"
            )
    types = tuple(entry for entry in exclude if isinstance(entry, type))
    prefixes = tuple(entry for entry in exclude if isinstance(entry, str))

    result = Assignment()
    left_out: set[nn.Parameter] = set()
    for name, module in names.items():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        for key, parameter in own.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"parameter {key!r} of module {name!r} has no shape yet: run one batch through "
                    "a lazy model before making its optimizer"
                )
        if isinstance(module, types) or any(
            name == prefix or name.startswith(prefix + ".") or prefix == "" for prefix in prefixes
        ):
            left_out.update(own.values())
    # What is multiplied somewhere is no table, whichever module comes first.
    tables = [name for name, module in names.items() if isinstance(module, TABLES)]
    for name in sorted(names, key=tables.__contains__):
        for key, candidate in candidates_of(names[name]).items():
            parameters = [p for p in (candidate.weight, candidate.bias) if p is not None]
            # Tied: the uses of a weight add up in the block of the module that has it first.
            if any(p in left_out or p in result.owner for p in parameters):
                continue
            label = name if key == "weight" else ".".join(part for part in (name, key) if part)
            result.candidates[label] = candidate
            if _may_be_made(candidate):
                result.made.add(candidate.weight)
            result.owner.update(dict.fromkeys(parameters, label))
    for module in names.values():
        for p in module._parameters.values():
            if p is not None and p not in result.owner:
                reason = "left out by exclude" if p in left_out else _reason(module)
                result.reasons.setdefault(p, reason)
    return result
