"""Commands made of groups of options, each declared once (`tekfac.runs.options`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

import typer

from tekfac.cli import option_files
from tekfac.cli.console import plain_errors
from tekfac.runs import ranks
from tekfac.runs.options import Declaration, declarations, flag

T = TypeVar("T")

CONFIG_FILE = "config_file"


@dataclass(frozen=True)
class Given(Generic[T]):
    """What the user has given of the options that ``T`` declares.

    Attributes:
        values: by the fields of ``T``; of options that were not given there is nothing.
    """

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """The heading under which help shows a group of options."""

    title: str


Command = Callable[..., None]


def command(
    without: Collection[str] = (), help: Mapping[str, str] | None = None
) -> Callable[[Command], Command]:
    """Make a function a command, whose errors are plain lines and whose options may be in a file.

    A parameter of the type ``Annotated[Given[T], Panel(...)]`` stands for all options that ``T``
    declares, but for those that the function has as parameters of its own. Other parameters are
    what Typer makes of them.

    Args:
        without: names of declared options that the command does not have.
        help: texts in place of those declared, where an option does something special.
    """

    def decorate(function: Command) -> Command:
        signature = inspect.signature(function, eval_str=True)
        own = [n for n, each in signature.parameters.items() if _group(each.annotation) is None]
        parameters: list[Parameter] = []
        # The fields that each group's options stand for, by the option.
        groups: dict[str, dict[str, str]] = {}
        for name, parameter in signature.parameters.items():
            group = _group(parameter.annotation)
            if group is None:
                parameters.append(parameter)
                continue
            if not groups:
                parameters.append(_parameter(CONFIG_FILE, ConfigFile))
            kind, panel = group
            fields = groups[name] = {}
            for key, each in declarations(kind).items():
                if key not in own and key not in without:
                    fields[key] = each.field
                    text = (help or {}).get(key, each.help)
                    parameters.append(_parameter(key, _annotation(key, each, text, panel)))

        @functools.wraps(function)
        def run(**values: Any) -> None:
            chosen: dict[str, Given[Any]] = {
                name: Given({f: values[o] for o, f in fields.items() if values[o] is not None})
                for name, fields in groups.items()
            }
            with plain_errors():
                ranks.join()
                function(**{name: values[name] for name in own}, **chosen)

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def given(context: typer.Context) -> set[str]:
    """The names of the options that are on the command line or in a file, but for the file's."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    names = {name for name, source in sources.items() if source and source.name != "DEFAULT"}
    return names - {CONFIG_FILE}


def _group(annotation: Any) -> tuple[type[Any], Panel] | None:
    """The type that declares a group's options, and the group's panel; None of no group."""
    if get_origin(annotation) is not Annotated:
        return None
    kind, panel, *_ = get_args(annotation)
    return (get_args(kind)[0], panel) if get_origin(kind) is Given else None


def _parameter(name: str, annotation: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _annotation(name: str, declared: Declaration, text: str, panel: Panel) -> Any:
    """What Typer makes an option of, which is None if it is not given."""
    flags = flag(name)
    if declared.type is bool:
        flags += f"/--no-{flags[2:]}"
    # Typer takes no unions: of a number or a word the parser alone knows what comes of the text.
    info = typer.Option(
        flags,
        help=text,
        rich_help_panel=panel.title,
        hidden=declared.hidden,
        parser=declared.read if declared.words else None,
        metavar=f"<{declared.type.__name__}>" if declared.words else None,
    )
    return Annotated[(str if declared.words else declared.type) | None, info]


def _take_options_from(context: typer.Context, path: Path | None) -> None:
    """Let a file's options be defaults of this command, below what is on the command line.

    Nothing remains of the option itself: what it stands for is among the other options now.
    """
    if path is None:
        return
    parameters = {each.name: each for each in context.command.params if each.name != CONFIG_FILE}
    repeatable = {name for name, each in parameters.items() if getattr(each, "multiple", False)}
    with plain_errors():
        context.default_map = option_files.read(path, parameters.keys(), repeatable)


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        callback=_take_options_from,
        is_eager=True,
        help="Take options from a file with a line `option: value` for each; those on the command "
        "line take precedence.",
    ),
]
