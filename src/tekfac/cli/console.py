"""What commands write: lines, tables, errors and warnings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table

from tekfac.errors import InputError
from tekfac.runs import ranks
from tekfac.searches.trials import Result

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130

console = Console(highlight=False, markup=False)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table."""
    table = Table(*(Column(title, no_wrap=True) for title in header), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_trial(label: str, result: Result) -> None:
    """Write a line on a search's trial, after a label for it."""
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items())
    line = f"{label}{settings}: {result.outcome.value}"
    if result.metrics is not None:
        accuracy = f"{100 * result.metrics.test_accuracy:.2f} %"
        line += f" after epoch {result.metrics.epoch}, held-out accuracy {accuracy}"
    if result.reason is not None:
        line += f", {result.reason}"
    console.print(line, soft_wrap=True)


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with a line, and a status, in place of a traceback that helps no user."""
    try:
        yield
    except InputError as error:
        fail(str(error), BAD_INPUT)
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        fail(f"{error.strerror or error}{where}", FAILURE)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except RuntimeError as error:
        if not ranks.lost(error):
            raise
        fail(
            f"rank {ranks.current().number} lost another, which ended or did not answer "
            f"({ranks.first_words(error)}). The checkpoint of the last epoch is kept",
            FAILURE,
        )


def fail(message: str, status: int) -> NoReturn:
    """End the program with a line and an exit status; of several ranks, the first writes it.

    It is the cause: what one ends of, the others learn when it has.
    """
    if ranks.current().first_to("fail"):
        print(f"tekfac: {message}", file=sys.stderr)
    raise typer.Exit(status)


def show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """Write a warning as a line, in place of ``warnings.showwarning``; of several ranks, one."""
    if ranks.current().first_to(f"warn: {message}"):
        print(f"tekfac: warning: {message}", file=sys.stderr)
