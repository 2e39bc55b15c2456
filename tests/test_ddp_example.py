"""The script of examples/ as somebody runs it: started by torchrun, ended, and gone on with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NAME = "ddp"
SCRIPT = Path(__file__).parents[1] / "examples" / f"{NAME}.py"
SECONDS = 120


def run(ranks: int, *options: object) -> dict[int, float]:
    """The losses that it prints, by step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(SCRIPT)]
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
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    placed = ("--placement", "sharded", "--checkpoint", checkpoint)
    before = run(2, "--steps", 40, *placed)
    after = run(1, "--steps", 120, *placed)
    assert before.keys() == {20, 40}
    assert min(after) == 60
    assert after[120] < 0.35 < before[20]
    assert torch.load(checkpoint, weights_only=True)["step"] == 120
