"""The scripts of examples/ as somebody runs them: started by torchrun, ended, and gone on with."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from processes import Started

NAMES = ["ddp", "fsdp"]
EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 300


def losses(printed: str) -> dict[int, float]:
    """By step."""
    found = re.findall(r"step (\d+): loss ([\d.]+)", printed)
    return {int(step): float(loss) for step, loss in found}


def by_torchrun(name: str, ranks: int, *options: object) -> dict[int, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(
        [*command, *map(str, options)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


def alone(name: str, *options: object) -> dict[int, float]:
    """One rank, which is told that as torchrun tells it."""
    process = Started(_script, str(EXAMPLES / f"{name}.py"), list(map(str, options)))
    output, errors = process.communicate(SECONDS)
    assert process.returncode == 0, errors
    return losses(output)


def _script(path: str, options: list[str]) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    sys.argv = [path, *options]
    runpy.run_path(path, run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_with_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    placed = ("--placement", "sharded", "--checkpoint", checkpoint)
    before = by_torchrun(name, 2, "--steps", 40, *placed)
    after = alone(name, "--steps", 120, *placed)
    assert before.keys() == {20, 40}
    assert min(after) == 60
    assert after[120] < 0.35 < before[20]
    assert torch.load(checkpoint, weights_only=True)["step"] == 120
