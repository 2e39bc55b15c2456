"""``tekfac inspect``: what an optimizer would do with each parameter of somebody's model."""

from __future__ import annotations

import importlib
import sys
from enum import Enum
from typing import Annotated

import typer
from torch import nn

import tekfac
from tekfac.cli.console import console, plain_errors
from tekfac.errors import InputError


class Method(str, Enum):
    """The optimizers that cover layers."""

    KFAC = "kfac"
    EKFAC = "ekfac"
    TKFAC = "tkfac"
    TEKFAC = "tekfac"


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A module on the path or in this folder, and a function (or class) in it that "
            "makes the model without arguments, e.g. torchvision.models:resnet18.",
        ),
    ],
    optimizer: Annotated[Method, typer.Option(help="Whose table.")] = Method.TEKFAC,
) -> None:
    """Show what an optimizer would do with each parameter of a model: blocks, sizes, memory."""
    with plain_errors():
        made = _made(model)
        try:
            chosen = getattr(tekfac, optimizer.name)(made)
        except ValueError as error:
            raise InputError(str(error)) from error
        console.print(str(chosen.summary()), soft_wrap=True)


def _made(reference: str) -> nn.Module:
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise InputError(f"{reference!r} is not MODULE:FACTORY, e.g. torchvision.models:resnet18")
    sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module), name)
        made = factory()
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"{reference}: {error}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{reference} made a {type(made).__name__}, not a torch.nn.Module")
    return made
