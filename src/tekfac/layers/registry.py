"""Which layer kind a module is of."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tekfac.layers.layer import Layer

_KINDS: dict[Callable[..., object], type[Layer]] = {}


def register(*modules: type[nn.Module]) -> Callable[[type[Layer]], type[Layer]]:
    """Make a `Layer` subclass the kind of these module classes.

    A subclass of one of them counts too, as long as it does not bring a ``forward`` of its own.
    """

    def add(kind: type[Layer]) -> type[Layer]:
        for module in modules:
            _KINDS[module.forward] = kind
        return kind

    return add


def kind_of(module: nn.Module) -> type[Layer] | None:
    """The layer kind of a module, None if it has none."""
    return _KINDS.get(type(module).forward)
