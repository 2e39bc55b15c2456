"""The worked examples of CONTRIBUTING.md: each is applied to a copy, where its own tests pass."""

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
EXAMPLES = {
    number: found.groups()
    for number, found in enumerate(EXAMPLE.finditer((ROOT / "CONTRIBUTING.md").read_text("utf-8")))
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the examples")
@pytest.mark.parametrize("number", EXAMPLES)
def test_a_worked_example_works(number: int, tmp_path: Path) -> None:
    diff, arguments = EXAMPLES[number]
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # Not the repository that the folder may lie in.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    run("git", "apply", "-", folder=tmp_path, environment=environment, given=diff)
    environment["PYTHONPATH"] = str(tmp_path / "src")
    tests = [sys.executable, "-m", "pytest", "-q", *shlex.split(arguments)]
    assert re.search(r"^\d+ passed", run(*tests, folder=tmp_path, environment=environment), re.M)


def test_there_are_two() -> None:
    assert len(EXAMPLES) == 2


def run(*command: str, folder: Path, environment: dict[str, str], given: str = "") -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, input=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
