"""The worked examples of CONTRIBUTING.md are applied to a copy, where their own tests pass."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = re.compile(
    r"^```diff\n(.*?)^```\n+```sh\n\S+ -m pytest (.*?)\n```", re.MULTILINE | re.DOTALL
)
EXAMPLES = EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the examples")
def test_the_worked_examples_work(tmp_path: Path) -> None:
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # Not the repository that the folder may lie in.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for diff, _ in EXAMPLES:
        run("git", "apply", "-", folder=tmp_path, environment=environment, given=diff)
    environment["PYTHONPATH"] = str(tmp_path / "src")
    tests = [sys.executable, "-m", "pytest", "-q"]
    tests += [argument for _, arguments in EXAMPLES for argument in shlex.split(arguments)]
    found = run(*tests, folder=tmp_path, environment=environment)
    assert re.search(rf"^{len(EXAMPLES)} passed", found, re.MULTILINE)


def test_there_are_two() -> None:
    assert len(EXAMPLES) == 2


def run(*command: str, folder: Path, environment: dict[str, str], given: str = "") -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, input=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
