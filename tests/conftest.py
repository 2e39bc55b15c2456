"""Without the program's extra, its tests are left out: the optimizers need torch alone."""

from __future__ import annotations

import importlib.util

PROGRAM = [
    "test_augmentation.py",
    "test_baselines.py",
    "test_benchmarks.py",
    "test_cli.py",
    "test_data.py",
    "test_downloads.py",
    "test_networks.py",
    "test_reproduce.py",
    "test_search.py",
    "test_theorem31.py",
    "test_training.py",
]

collect_ignore = [] if importlib.util.find_spec("typer") else PROGRAM


def pytest_report_header() -> list[str]:
    left_out = "left out: the program's tests, for tekfac[train] is not installed"
    return [left_out] if collect_ignore else []
