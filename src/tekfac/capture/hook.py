"""Hooks on a model that hold nothing of whoever put them there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn


class Hook:
    """A method of an object as a hook that does not keep the object alive.

    A model's hooks go along when it is copied or saved; there, an inert function takes their place.
    In a graph that is compiled or traced there is no hook.
    """

    def __init__(self, owner: object, method: str) -> None:
        self.owner = weakref.ref(owner)
        self.method = method

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        owner = self.owner()
        if owner is not None:
            getattr(owner, self.method)(*args)

    @property
    def __name__(self) -> str:
        # Asked for by torch.jit.script, which compiles hooks along with the model.
        raise AttributeError(
            "torch.jit.script can't compile the hooks that an optimizer of tekfac puts on a model. "
            "Script another model with the same weights (load_state_dict), or close() the "
            "optimizer first; torch.export and torch.jit.trace take the model as it is"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (nullcontext(), "__exit__")


def inert() -> Callable[..., None]:
    """What stands for our hooks in a copied or saved model: it takes anything and does nothing.

    It is Python's own, so that such a model can be loaded where this package is not installed.
    """
    return nullcontext().__exit__


def _is_inert(hook: object) -> bool:
    return getattr(hook, "__func__", None) is nullcontext.__exit__


def drop_inert(module: nn.Module) -> None:
    """Remove what stands for the hooks of an optimizer of the model that this is a copy of."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if _is_inert(hook)]:
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
