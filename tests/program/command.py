"""What tests of the ``tekfac`` command share: a folder to work in, the command, its tables."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from processes import Started
from tekfac.cli.app import app


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a small data set in it, as the current folder."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    images = rng.normal(size=(90, 6, 6)) + labels[:, None, None]
    np.savez(
        tmp_path / "small.npz",
        x_train=images[:60],
        y_train=labels[:60],
        x_test=images[60:],
        y_test=labels[60:],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tekfac(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


# Where the tests run in the background, the system has processes ignore Ctrl-C.
PROGRAM = """\
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from tekfac.cli import main
main()
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def fork(*arguments: str) -> Started:
    """The same, forked from one that has imported torch."""
    return Started(_command, arguments)


def _command(arguments: Sequence[str]) -> None:
    sys.argv = ["tekfac", *arguments]
    exec(PROGRAM, {})


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_identical(expected: object, actual: Any) -> None:
    """Equal to the last bit, tensors in nested containers too."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, actual)
    elif isinstance(expected, dict):
        assert expected.keys() == actual.keys()
        for key in expected:
            assert_identical(expected[key], actual[key])
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(actual)
        for left, right in zip(expected, actual, strict=True):
            assert_identical(left, right)
    else:
        assert expected == actual
