"""The command line: all commands, and what holds for each of them."""

from __future__ import annotations

import sys
import warnings

import typer

from tekfac.cli.compare import compare
from tekfac.cli.console import plain_errors, show_warning
from tekfac.cli.inspect import inspect
from tekfac.cli.reproduce import reproduce
from tekfac.cli.search import search
from tekfac.cli.train import train
from tekfac.runs import ranks
from tekfac.runs.training import follow

app = typer.Typer(
    help="Train networks on images with natural-gradient optimizers, and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, compare, search, reproduce, inspect):
    app.command()(command)


def run() -> None:
    """Run the command line; exits with the command's status.

    Of several ranks the first one does; the others take part in its trainings.
    """
    warnings.showwarning = show_warning
    # Loss scaling may skip the very first step, on purpose.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    if not ranks.follows():
        try:
            app()
        finally:
            ranks.leave()
        return
    ranks.ignore_interrupts()
    try:
        with plain_errors():
            follow(ranks.join())
            ranks.leave()
    except typer.Exit as end:
        sys.exit(end.exit_code)
