"""On which device these tests run: ``TEKFAC_DEVICE``, by default the CPU.

``cuda`` is what they are for. On the CPU they show that they are right, and on ``twin``, a device
that is not there (`twin`), that nothing is mixed up and nothing is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import Waits

NAME = os.environ.get("TEKFAC_DEVICE", "cpu")

Pair = tuple[str, Any, Any]
NoWaiting = Callable[[], AbstractContextManager[None]]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is no GPU, on ``twin`` above all, whose operators take a hundred times as long,
    some of the cases stand for all: any two parameters of a test meet with all their values."""
    if NAME == "cuda":
        return
    folder = Path(__file__).parent
    here = [item for item in items if folder in item.path.parents]
    tests: dict[str, dict[pytest.Item, set[Pair]]] = {}
    for item in here:
        given = sorted(item.callspec.params.items()) if hasattr(item, "callspec") else []
        pairs = {(f"{a[0]} {b[0]}", repr(a[1]), repr(b[1])) for a in given for b in given if a != b}
        tests.setdefault(item.nodeid.split("[")[0], {})[item] = pairs or {("", repr(given), "")}
    kept: set[pytest.Item] = set()
    for cases in tests.values():
        missing = set().union(*cases.values())
        while missing:
            best = max(cases, key=lambda item: len(cases[item] & missing))
            missing -= cases[best]
            kept.add(best)
    left_out = set(here) - kept
    config.hook.pytest_deselected(items=[item for item in here if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device; float32 products are exact there, and the same in every run."""
    if NAME == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if NAME == "twin":
        import twin

        with twin.Mode():
            yield torch.device("twin", 0)
    else:
        yield torch.device(NAME, 0) if NAME != "cpu" else torch.device("cpu")


@pytest.fixture
def no_waiting(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> NoWaiting:
    """A context in which it is an error if the host waits for the device.

    The CPU is taken for an accelerator.
    """
    monkeypatch.setattr("tekfac.verdict.waits", lambda device: True)

    @contextmanager
    def context() -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        elif device.type == "twin":
            import twin

            twin.waited.clear()
            yield
            assert not twin.waited
        else:
            with Waits() as waits:
                yield
            assert not waits.found

    return context
