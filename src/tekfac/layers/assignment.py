"""Which parameters of a model belong to which layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tekfac.layers.registry import kind_of


@dataclass
class Assignment:
    """Which parameters belong to layers, and why the others do not.

    Args:
        modules: modules with a layer kind, by name.
        owner: the name in ``modules`` for each parameter of such a module.
        reasons: for every other parameter of the model, why the first-order rule trains it.
    """

    modules: dict[str, nn.Module]
    owner: dict[nn.Parameter, str]
    reasons: dict[nn.Parameter, str]


def assign(model: nn.Module, exclude: Sequence[str | type[nn.Module]]) -> Assignment:
    """Find a model's layers.

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
    names = dict(model.named_modules())
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

    uses: dict[nn.Parameter, int] = {}
    for module in names.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[parameter] = uses.get(parameter, 0) + 1

    bypassed = {
        child
        for module in names.values()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    result = Assignment({}, {}, {})
    for name, module in names.items():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        if not own:
            continue
        for key, parameter in own.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"parameter {key!r} of module {name!r} has no shape yet: run one batch through "
                    "a lazy model before making its optimizer"
                )
        if isinstance(module, types) or any(
            name == prefix or name.startswith(prefix + ".") or prefix == "" for prefix in prefixes
        ):
            reason = "left out by exclude"
        elif any(uses[p] > 1 for p in own.values()):
            reason = "shared between modules"
        elif kind_of(module) is None or "weight" not in own:
            reason = f"{type(module).__name__} has no curvature block"
        elif module in bypassed:
            reason = "MultiheadAttention uses its weight without calling it"
        else:
            result.modules[name] = module
            result.owner.update(dict.fromkeys(own.values(), name))
            continue
        for parameter in own.values():
            result.reasons.setdefault(parameter, reason)
    return result
