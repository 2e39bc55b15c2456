"""A model inside of what compiles, distributes or averages it; saved where this package is not."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tekfac

torch.set_num_threads(1)

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
Y = torch.arange(6) % 3


class Network(nn.Module):
    """With a part of a name that a wrapper has, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.module(x))


def with_compiled_part(model: Network) -> nn.Module:
    model.module = torch.compile(model.module, backend="eager")
    return model


WRAPPERS: dict[str, Callable[[Network], Any]] = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "distributed": DistributedDataParallel,
    "both": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "compiled part": with_compiled_part,
}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch._dynamo.reset()
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def train(model: nn.Module, optimizer: tekfac.NaturalGradient, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


@pytest.mark.parametrize(("one", "other"), list(itertools.product(WRAPPERS, WRAPPERS)))
def test_a_state_fits_the_model_however_it_is_wrapped(one: str, other: str) -> None:
    inner, twin = Network(), Network()
    model, resumed = WRAPPERS[one](inner), WRAPPERS[other](twin)
    optimizer, second = tekfac.TEKFAC(model), tekfac.TEKFAC(resumed)
    train(model, optimizer, 5)
    for p, q in zip(twin.parameters(), inner.parameters(), strict=True):
        p.data.copy_(q.data)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, 3)
    train(resumed, second, 3)
    for p, q in zip(twin.parameters(), inner.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert set(optimizer.state_dict()["tekfac"]["blocks"]) == {"module.0", "head"}


def test_a_state_with_wrappers_names() -> None:
    """As they were kept before."""
    model = torch.compile(Network(), backend="eager")
    optimizer = tekfac.TEKFAC(model)
    train(model, optimizer, 3)
    packed = copy.deepcopy(optimizer.state_dict())
    entry = packed["tekfac"]
    entry["blocks"] = {f"_orig_mod.{name}": each for name, each in entry["blocks"].items()}
    for key in ("refreshed", "work"):
        each = entry["schedule"][key]
        entry["schedule"][key] = {f"_orig_mod.{name}": value for name, value in each.items()}
    second = tekfac.TEKFAC(torch.compile(Network(), backend="eager"))
    second.load_state_dict(packed)
    assert second.blocks["head"].trace == optimizer.blocks["head"].trace


def test_a_saved_model_loads_without_this_package(tmp_path: Path) -> None:
    """Saved before its first step, in between, and when its optimizer is closed."""
    torch.save(X, tmp_path / "x.pt")
    for when in ("before", "in between", "closed"):
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = tekfac.TEKFAC(model)
        if when != "before":
            train(model, optimizer, 2)
        if when == "closed":
            optimizer.close()
        torch.save(model, tmp_path / f"{when} model.pt")
        torch.save(model(X).detach(), tmp_path / f"{when} y.pt")
    script = """
import sys
sys.modules["tekfac"] = None  # an import of it fails
import torch
x = torch.load("x.pt")
for when in ("before", "in between", "closed"):
    model = torch.load(f"{when} model.pt", weights_only=False)
    assert torch.equal(model(x), torch.load(f"{when} y.pt")), when
    model(x).sum().backward()
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_averaged_copies_leave_the_run_alone() -> None:
    models, traces = [], []
    for averaged in (False, True):
        model = Network()
        torch.manual_seed(1)
        optimizer = tekfac.TEKFAC(model)
        copies = []
        for _ in range(6):
            train(model, optimizer, 1)
            if averaged:
                copies.append(copy.deepcopy(model))
                with torch.no_grad():
                    copies[-1](X)
                copies[-1](X).sum().backward()
        models.append(model)
        traces.append([block.trace for block in optimizer.blocks.values()])
    assert traces[0] == traces[1]
    assert all(map(torch.equal, *(model.parameters() for model in models)))


def test_a_closure_that_evaluates_several_times() -> None:
    """As those for line searches: what counts is the last evaluation, whose gradients stay."""
    models = []
    for times in (1, 3):
        model = Network()
        optimizer = tekfac.TEKFAC(model, fisher="exact")

        def closure(
            model: nn.Module = model, optimizer: Any = optimizer, times: int = times
        ) -> Any:
            for _ in range(times):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(X), Y)
                loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        models.append(model)
    assert all(map(torch.equal, *(model.parameters() for model in models)))
