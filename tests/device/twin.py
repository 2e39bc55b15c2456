"""A device that is not there: its tensors lie in the CPU's memory, but are another device's.

What an accelerator refuses is an error here too, and what the host would have to wait for is noted.
So a machine without one finds a tensor made on the wrong device, a number read in the middle of a
step, and a copy that is waited for.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from harness import WAITING

NAME = "twin"


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())

# Where the host would have waited, and for what.
waited: list[str] = []


class Twin(Tensor):
    """A tensor of the device that is not there."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Twin:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class Mode(TorchDispatchMode):
    """While this is entered, tensors can be made on the device, and moved there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator does, on the one device or the other."""
    tensors: list[Tensor] = []
    inner_args = [_inner(each, tensors) for each in args]
    inner_kwargs = {key: _inner(each, tensors) for key, each in kwargs.items()}
    here = any(type(tensor) is Twin for tensor in tensors)
    device = kwargs.get("device")
    there = here if device is None else torch.device(device).type == NAME
    if here or there:
        _check(func.overloadpacket.__name__, args, kwargs, tensors, here, there)
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if not there:
        return result
    changed = _changed(func)
    if changed is not None:
        return args[changed]
    result = _outer(result)
    # Of what is new torch's own function, which takes its time, would say the same.
    return return_and_correct_aliasing(func, args, kwargs, result) if _aliases(func) else result


@functools.cache
def _changed(func: Any) -> int | None:
    """The place of what an operator changes in place and returns; None if it does other things."""
    places = [n for n, each in enumerate(func._schema.arguments) if _written(each)]
    returns = func._schema.returns
    if len(places) != 1 or len(returns) != 1 or not _written(returns[0]):
        return None
    argument = func._schema.arguments[places[0]]
    reshapes = torch.Tag.inplace_view in func.tags
    return None if argument.kwarg_only or reshapes else places[0]


@functools.cache
def _aliases(func: Any) -> bool:
    """Whether what an operator returns may lie in the memory of what it takes."""
    return any(each.alias_info is not None for each in func._schema.arguments)


def _written(place: Any) -> bool:
    return place.alias_info is not None and place.alias_info.is_write


def _inner(value: Any, tensors: list[Tensor]) -> Any:
    """What lies in the CPU's memory; the tensors are noted."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.inner if type(value) is Twin else value
    if isinstance(value, (list, tuple)):
        return [_inner(each, tensors) for each in value]
    return value


def _outer(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Twin(value)
    return type(value)(map(_outer, value)) if isinstance(value, (list, tuple)) else value


def _check(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[Tensor],
    here: bool,
    there: bool,
) -> None:
    mixed = here and any(not isinstance(tensor, Twin) for tensor in tensors)
    moves = there != here if name == "_to_copy" else mixed and name == "copy_"
    if moves:
        if not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
            _note(f"{name} between devices")
    elif here and name in WAITING:
        _note(name)
    elif name in ("index", "index_put", "index_put_") and any(
        isinstance(each, Twin) and each.dtype == torch.bool for each in args[1]
    ):
        _note(f"{name} by a mask")
    if mixed and not moves:
        # Numbers in the CPU's memory are taken by operators on entries, and by no others.
        shapes = [tuple(t.shape) for t in tensors if not isinstance(t, Twin)]
        if any(shapes) or name.startswith("_foreach") or name in ("where", "lerp", "lerp_", "cat"):
            raise RuntimeError(f"{name} of tensors on two devices; on the CPU: {shapes}")


def _note(what: str) -> None:
    frames = [f for f in traceback.extract_stack() if "/tekfac/" in f.filename]
    place = f" in {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    waited.append(what + place)
