"""Without the program's extra, its tests are left out: the optimizers need torch alone."""

from __future__ import annotations

import importlib.util

import pytest

from tekfac.capture import compiled

collect_ignore = [] if importlib.util.find_spec("typer") else ["program"]


def pytest_report_header() -> list[str]:
    left_out = "left out: tests/program, for tekfac[train] is not installed"
    return [left_out] if collect_ignore else []


@pytest.fixture(autouse=True)
def no_compiler_stands_aside() -> None:
    """For optimizers of other tests, that is, which a framework or a traceback may still hold."""
    compiled._holders.clear()
    compiled._update()
