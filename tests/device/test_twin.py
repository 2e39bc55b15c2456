"""A step on a device that is not there mixes up no devices, and waits for nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.parametrize(
    "chosen",
    [
        "waits and TEKFAC-convolutional-mc-True",
        pytest.param("waits or exact", marks=pytest.mark.slow),
        pytest.param("test_device and not waits and not exact", marks=pytest.mark.slow),
    ],
)
def test_the_device_tests_on_a_device_that_is_not_there(chosen: str) -> None:
    """In a process of its own: torch knows of one such device, from then on."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("needs a torch in which devices can be made in Python")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen,
         str(Path(__file__).with_name("test_device.py"))],
        env={**os.environ, "TEKFAC_DEVICE": "twin"},
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
