"""The public interface as text: names, signatures, defaults. Prints it when run as a program."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import tekfac

KEPT = Path(__file__).with_name("public_api.txt")


def snapshot() -> str:
    """Every name of ``tekfac.__all__`` with its arguments, and the methods that it defines."""
    members = (getattr(tekfac, name) for name in sorted(tekfac.__all__))
    texts = (_class(each) if isinstance(each, type) else _function(each) for each in members)
    return "\n\n".join("\n".join(text) for text in texts) + "\n"


def _function(function: Callable[..., object]) -> Iterator[str]:
    signature = inspect.signature(function)
    yield f"{function.__name__}({', '.join(_arguments(signature))}){_returned(signature, ' -> ')}"


def _class(cls: type) -> Iterator[str]:
    inner = list(_inner(cls))
    bases = ", ".join(
        base.__name__
        for each in (cls, *inner)
        for base in each.__bases__
        if base is not object and base not in inner
    )
    yield f"class {cls.__name__}({bases})" if bases else f"class {cls.__name__}"
    # A line for each argument, so that a difference shows what changed.
    for argument in _arguments(inspect.signature(cls)):
        yield f"    {argument}"
    members = {name: (c, m) for c in (*reversed(inner), cls) for name, m in vars(c).items()}
    for name, (owner, member) in sorted(members.items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property) and member.fget is not None:
            yield f"    .{name}{_returned(inspect.signature(member.fget), ': ')}"
        # torch puts a wrapped copy of an inherited `step` into classes that were used.
        elif inspect.isfunction(member) and member.__qualname__ == f"{owner.__qualname__}.{name}":
            signature = inspect.signature(member)
            _, *arguments = _arguments(signature)
            yield f"    .{name}({', '.join(arguments)}){_returned(signature, ' -> ')}"


def _inner(cls: type) -> Iterator[type]:
    """Base classes of the package that are not public: to a user a part of the class itself."""
    for base in cls.__bases__:
        if base.__module__.startswith("tekfac.") and base.__name__ not in tekfac.__all__:
            yield base
            yield from _inner(base)


def _arguments(signature: inspect.Signature) -> Iterator[str]:
    """As in the source. Python's own text puts quotes around annotations in some versions."""
    by_name_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not by_name_only:
            by_name_only = True
            yield "*"
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        text = stars.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {parameter.annotation}"
        yield text if parameter.default is parameter.empty else f"{text} = {parameter.default!r}"


def _returned(signature: inspect.Signature, before: str) -> str:
    found = signature.return_annotation
    return "" if found is signature.empty else f"{before}{found}"


if __name__ == "__main__":
    print(snapshot(), end="")
