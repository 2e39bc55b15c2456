"""The scripts of examples/ as somebody runs them: started by torchrun, ended, and gone on with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NAMES = ["ddp", "fsdp"]
EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 300


def run(name: str, ranks: int, *options: object) -> dict[int, float]:
    """The losses that it prints, by step."""
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
    found = re.findall(r"step (\d+): loss ([\d.]+)", done.stdout)
    return {int(step): float(loss) for step, loss in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_with_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    placed = ("--placement", "sharded", "--checkpoint", checkpoint)
    before = run(name, 2, "--steps", 40, *placed)
    after = run(name, 1, "--steps", 120, *placed)
    assert before.keys() == {20, 40}
    assert min(after) == 60
    assert after[120] < 0.35 < before[20]
    assert torch.load(checkpoint, weights_only=True)["step"] == 120
