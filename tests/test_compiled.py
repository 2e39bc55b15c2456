"""A compiled network runs as compiled, but for the steps that measure it.

What a compiler makes is counted: graphs, breaks in them and recompilations. Its backend runs the
graph as it is, so that a test takes no time for what is not asked.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import tekfac
from harness import METHODS, TORCH

EVERY = 3
# torch 2.6 leaves a model alone that was compiled in place.
IN_PLACE = ["model.compile"] if TORCH >= (2, 7) else []
HOW = ["torch.compile", "fullgraph", *IN_PLACE]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, 3),
    )  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 2, 6, 6, generator=generator)
    return x, torch.randint(3, (6,), generator=generator)


def build(model: nn.Module, method: str = "TEKFAC", **options: Any) -> Any:
    every = {"factor_every": EVERY, "basis_every": 2 * EVERY, "interval_warmup": False}
    if method in ("EKFAC", "TEKFAC"):
        every["scale_every"] = EVERY
    return getattr(tekfac, method)(model, **{**every, **options})


def compiled(model: nn.Module, how: str, backend: Any) -> Callable[[Tensor], Tensor]:
    if how == "model.compile":
        model.compile(backend=backend)
        return model
    return torch.compile(model, backend=backend, fullgraph=how == "fullgraph")


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


class Run:
    """A compiled network in training, and what its compiler has made."""

    def __init__(self, how: str = "torch.compile", method: str = "TEKFAC", **options: Any) -> None:
        self.graphs = CompileCounterWithBackend("eager")
        self.model = network()
        self.optimizer = build(self.model, method, **options)
        self.forward = compiled(self.model, how, self.graphs)

    def step(self, number: int, clear: Callable[[], None] | None = None) -> None:
        (clear or self.optimizer.zero_grad)()
        x, y = batch(number)
        F.cross_entropy(self.forward(x), y).backward()
        self.optimizer.step()

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.forward(batch(99)[0])
        self.model.train()

    @property
    def measured(self) -> int:
        return self.optimizer._capture.passes


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    assert stance() == "default"


# All ways with both, and with each method.
@pytest.mark.parametrize(
    ("how", "method", "fisher"),
    [
        (how, method, ("mc", "empirical")[(i + j) % 2])
        for i, how in enumerate(HOW)
        for j, method in enumerate(METHODS)
    ],
)
def test_one_graph_without_a_break_and_never_another(how: str, method: str, fisher: str) -> None:
    run = Run(how, method, fisher=fisher)
    for number in range(4 * EVERY):
        before = run.measured
        run.step(number)
        due = number % EVERY == 0
        assert run.measured - before == due, number
        assert run.graphs.frame_count == (number > 0), number
    assert not counters["graph_break"]
    assert "recompiles" not in counters or not counters["recompiles"]
    assert counters["stats"]["unique_graphs"] == 1
    run.optimizer.close()


def test_there_is_nothing_of_ours_in_the_graph() -> None:
    model = network()
    optimizer = build(model)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    explained = torch._dynamo.explain(model)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    ops = [node.target for node in explained.graphs[0].graph.nodes if node.op == "call_function"]
    optimizer.close()
    torch._dynamo.reset()
    bare = torch._dynamo.explain(network())(x)
    assert ops == [n.target for n in bare.graphs[0].graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("how", HOW)
def test_an_evaluation_is_compiled(how: str) -> None:
    run = Run(how)
    run.step(0)
    run.step(1)
    run.step(2)
    assert stance() == "force_eager"  # the coming step measures
    run.evaluate()
    assert stance() == "default"
    assert run.graphs.frame_count == 1
    run.evaluate()
    assert run.graphs.frame_count == 2
    run.optimizer.close()


@pytest.mark.parametrize("how", HOW)
def test_a_step_after_an_evaluation_is_measured(how: str) -> None:
    """Clearing gradients through the optimizer says that training goes on."""
    run = Run(how)
    run.evaluate()
    for number in range(2 * EVERY + 1):
        run.step(number)
        run.evaluate()
    assert run.measured == 3
    run.optimizer.close()


def test_what_an_evaluation_made_a_step_miss_is_measured_in_the_next() -> None:
    """Where gradients were cleared before it, nobody says that training goes on."""
    run = Run()
    run.step(0)
    found = []
    for number in range(1, 9):
        before = run.measured
        run.evaluate()
        run.step(number, clear=run.model.zero_grad)
        found.append(run.measured - before)
    assert found == [0, 0, 0, 1, 0, 0, 1, 0]
    run.optimizer.close()


def test_an_evaluation_before_the_first_step() -> None:
    run = Run()
    run.model.zero_grad()
    run.evaluate()
    run.evaluate()
    run.step(0, clear=run.model.zero_grad)
    assert all(block.empty for block in run.optimizer.blocks.values())
    run.step(1, clear=run.model.zero_grad)
    assert not any(block.empty for block in run.optimizer.blocks.values())
    run.optimizer.close()


def test_a_layer_that_is_not_used_keeps_nothing_from_being_compiled() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, graphs = Idle(), CompileCounterWithBackend("eager")
    optimizer = build(model)
    forward = torch.compile(model, backend=graphs)
    found = []
    for _ in range(7):
        optimizer.zero_grad()
        F.cross_entropy(forward(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
        optimizer.step()
        found.append(stance())
    assert graphs.frame_count == 1
    assert [s == "force_eager" for s in found] == [False, False, True, False, False, True, False]
    optimizer.close()


def test_the_stance_ends_with_the_optimizer() -> None:
    run = Run()
    assert stance() == "force_eager"
    run.optimizer.close()
    assert stance() == "default"
    other = Run()
    assert stance() == "force_eager"
    del other
    gc.collect()
    assert stance() == "default"


def test_of_two_optimizers_either_can_have_compilers_stand_aside() -> None:
    one, other = Run(), Run()
    one.optimizer.close()
    assert stance() == "force_eager"
    other.step(0)
    assert stance() == "default"
    other.optimizer.close()
