"""Options, declared once: on the fields of the types that say what a run is to do.

A field's annotation, default and `Option` are all there is to know of an option. The command line
and its files of options are made of them, and values kept as text are read by them.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Option:
    """What makes a field an option, beside its annotation and its default.

    Attributes:
        help: what it is; empty where the name says it.
        default: what is taken if it is not given, in words; None for the field's own default.
        name: the option's, if it is not the field's.
        hidden: whether help leaves it out.
    """

    help: str = ""
    default: str | None = None
    name: str | None = None
    hidden: bool = False


@dataclass(frozen=True)
class Declaration:
    """A field that is an option.

    Attributes:
        field: its name.
        type: bool, int, float or str.
        words: what may stand in place of a number.
        default: the field's; None if it has none.
        help: for the user, with the default at its end.
        hidden: whether it is left out of help.
    """

    field: str
    type: type[Any]
    words: tuple[str, ...]
    default: Any
    help: str
    hidden: bool

    def read(self, value: Any) -> Any:
        """A value that may have been written as text, in the option's type.

        Of one that takes words in place of a number, text that is no number stays as it is:
        whoever takes the value knows the words, and refuses others.

        Raises:
            ValueError: if text does not stand for a value of the type.
        """
        if not isinstance(value, str):
            return value
        if self.type is bool:
            if value not in BOOLEANS:
                raise ValueError(f"{value!r} is neither true nor false")
            return BOOLEANS[value]
        try:
            return self.type(value)
        except ValueError:
            if self.words:
                return value
            raise


def declarations(kind: type[Any]) -> dict[str, Declaration]:
    """The options that a dataclass or a ``TypedDict`` declares, by their names with underscores."""
    found = {}
    for field, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        annotation, option = get_args(hint)
        default = getattr(kind, field, None)
        alternatives = [annotation]
        if get_origin(annotation) in (Union, types.UnionType):
            alternatives = [each for each in get_args(annotation) if each is not type(None)]
        words = [word for each in alternatives[1:] for word in get_args(each)]
        found[option.name or field] = Declaration(
            field=field,
            type=alternatives[0],
            words=tuple(words),
            default=default,
            help=_help(option, default),
            hidden=option.hidden,
        )
    return found


def flag(name: str) -> str:
    """An option as it is typed, from its name."""
    return "--" + name.replace("_", "-")


def _help(option: Option, default: object) -> str:
    text = option.default
    if text is None and default is not None:
        if isinstance(default, bool):
            text = "yes" if default else "no"
        else:
            text = f"{default:g}" if isinstance(default, float) else str(default)
    return option.help if text is None else f"{option.help} (default: {text})".strip()
