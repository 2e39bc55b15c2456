"""The command line: all commands, and what holds for each of them."""

from __future__ import annotations

import warnings

import typer

from tekfac.cli.compare import compare
from tekfac.cli.console import show_warning
from tekfac.cli.inspect import inspect
from tekfac.cli.reproduce import reproduce
from tekfac.cli.search import search
from tekfac.cli.train import train

app = typer.Typer(
    help="Train networks on images with natural-gradient optimizers, and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, compare, search, reproduce, inspect):
    app.command()(command)


def run() -> None:
    """Run the command line; exits with the command's status."""
    warnings.showwarning = show_warning
    # Loss scaling may skip the very first step, on purpose.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    app()
