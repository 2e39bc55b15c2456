"""What `benchmarks.ranks` counts of one rank that is alone is what several really say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ranks import __main__ as program
from benchmarks.ranks import kaisa, report, simulation
from benchmarks.ranks.counted import Counter, Message, exchanged
from benchmarks.ranks.model import Machine
from benchmarks.ranks.simulation import Network, Told, Work
from processes import together
from tekfac.ranks.ranks import GATHER

FEW = "tekfac.ranks.ranks.FEW"
WIDTHS = (20, 9, 12, 5)
SECONDS = 180.0  # torch is slow to import on a busy machine


def small() -> Network:
    """Wide and narrow sides, so that with ``rank=2`` some are kept whole."""

    def make() -> nn.Module:
        sizes = pairwise(WIDTHS)
        return nn.Sequential(*(nn.Linear(*size) for size in sizes), nn.Linear(5, 3, bias=False))

    def batch(whole: bool) -> tuple[Tensor, Tensor]:
        count = 8 if whole else 4
        return torch.randn(count, WIDTHS[0]), torch.zeros(count, dtype=torch.long)

    return Network("small", make, batch, 8, "8 rows")


# -- one rank that pretends, and several -----------------------------------------------------------

NAMES = {
    "all_reduce": "allreduce",
    "broadcast": "broadcast",
    "all_gather": "allgather",
    GATHER: "allgather",
    "all_to_all_single": "alltoall",
}


def really_told(
    method: str, options: dict[str, Any], few: int
) -> tuple[Told, list[tuple[str, int]]]:
    """What a rank of several says, and what the optimizer's own calls were in the last step."""
    network = small()
    torch.manual_seed(0)
    model = DistributedDataParallel(network.make())
    optimizer = simulation.optimizer_of(method, model, options)
    log: list[tuple[str, int]] = []
    taken = optimizer.step

    def step() -> None:
        log.clear()

        def noted(name: str) -> Any:
            real = getattr(dist, name)

            def called(tensor: Any, *args: Any, **kwargs: Any) -> Any:
                own = tensor if name in ("all_reduce", "broadcast") else args[0]
                entries = own.numel()
                if name == "all_to_all_single":
                    entries = exchanged(args[1], args[2], dist.get_rank(args[3]))
                log.append((NAMES[name], entries * own.element_size()))
                return real(tensor, *args, **kwargs)

            return mock.patch.object(dist, name, called)

        with ExitStack() as stack:
            for name in NAMES:
                stack.enter_context(noted(name))
            taken()

    optimizer.step = step
    with mock.patch(FEW, few), Counter() as counter:
        return simulation.steps(network, model, optimizer, counter), log


@pytest.mark.parametrize(
    ("method", "ranks", "placement", "few", "quiet"),
    [
        ("TEKFAC", 2, "replicated", 2**14, []),
        ("TEKFAC", 2, "sharded", 2**14, ["allgather"]),
        ("TEKFAC", 4, 0.5, 0, ["allgather"]),
        ("KFAC", 4, "sharded", 0, ["alltoall", "allgather"]),
    ],
)
def test_one_rank_alone_says_what_several_say(
    method: str, ranks: int, placement: str | float, few: int, quiet: list[str]
) -> None:
    options = {"placement": placement, "rank": 2}
    real = together(ranks, really_told, method, options, few, seconds=SECONDS)
    with mock.patch(FEW, few):
        alone = simulation.ask(small(), method, ranks, options)
    # The first rank is the one that is counted; others may have other bases to tell.
    assert real[0][0].said == alone.said
    for told, log in real:
        assert told.homes == alone.homes
        assert told.makers == alone.makers
        assert told.unit == alone.unit
        assert told.gradients == alone.gradients
        # Counted where torch is called, and not at its dispatcher.
        assert log == [(message.kind, message.size) for message in told.said["bases"]]
        assert [message.kind for message in told.said["quiet"]] == quiet


def only_gradients(curved: bool) -> list[list[Message]]:
    """What is said in four steps, with SGD and with TEKFAC on steps without statistics."""
    network = small()
    model = DistributedDataParallel(network.make())
    x, y = network.batch(False)
    if curved:
        options = {"placement": "replicated", "rank": 2}
        optimizer = simulation.optimizer_of("TEKFAC", model, options)
    else:
        optimizer = torch.optim.SGD(model.parameters())
    steps = []
    with Counter() as counter:
        for _ in range(6):
            counter.take()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps.append(counter.take())
    return [steps[1], steps[5]]  # 0, 2 and 4 have statistics, 3 has bases


def test_a_quiet_step_of_replicated_state_says_what_sgd_says() -> None:
    [sgd, _], [own, _] = (
        together(2, only_gradients, curved, seconds=SECONDS) for curved in (False, True)
    )
    assert all(sgd)
    assert own == sgd


# -- multiplications -------------------------------------------------------------------------------


def test_multiplications_by_hand() -> None:
    [one, *_] = simulation.works(small(), "TEKFAC", [1], rank=None).values()
    d_in, d_out, n = 21, 9, 8
    assert one.widths == (d_in, d_out)
    assert one.forward == n * d_in * d_out
    factors = n * (d_in**2 + d_out**2)
    rescaling = n * (d_in**2 + d_out**2) + n * d_in * d_out
    assert one.statistics == {1: factors + rescaling}
    assert one.preconditioning == 2 * d_in * d_out * (d_in + d_out)
    assert one.bases == sum(9 * d**3 // 2 for d in (d_in, d_out))
    # Factors, vectors, their values and the rescaling, δ and four numbers more at most.
    entries = 2 * (d_in**2 + d_out**2) + d_in + d_out + d_in * d_out
    assert 4 * entries < one.held <= 4 * entries + 4 * 8 + 64


def test_the_model_itself_by_hand() -> None:
    products = sum(a * b for a, b in zip(WIDTHS, (*WIDTHS[1:], 3), strict=True))
    layers = 8 * products
    plain = simulation.plain(small(), layers)
    assert plain.forward == layers
    assert plain.outputs == layers - 8 * WIDTHS[0] * WIDTHS[1]  # nobody asks for the input's
    assert plain.backward == plain.outputs + layers


# -- seconds, tables -------------------------------------------------------------------------------

MACHINE = Machine(
    products=1e3, precise=100, decomposing=10, starting=1, node=2, inside=20, between=5, hop=0.5
)


def test_seconds_of_messages() -> None:
    assert MACHINE.sending([Message("allreduce", 2, 40)]) == 40 / 20 + 2 * 0.5
    assert MACHINE.sending([Message("allreduce", 4, 40)]) == 60 / 5 + 4 * 0.5
    assert MACHINE.sending([Message("broadcast", 4, 40, 1)] * 2) == 2 * (40 / 5 + 3 * 0.5)
    assert MACHINE.decompositions(2, 15) == 2 + 3


def test_seconds_of_a_step() -> None:
    """Two ranks and two layers, one on each; the second has twice the work."""
    works = {
        name: Work((1, 1), 0, {2: 500 * k}, 5 * k, 1, 50 * k, 100 * k)
        for name, k in (("a", 1), ("b", 2))
    }
    plain = simulation.Plain(1000, 2000, 1500, 10)
    said = {
        "quiet": [Message("broadcast", 2, 20, 0)],
        "statistics": [Message("broadcast", 2, 20, 0), Message("allreduce", 2, 200)],
        "bases": [Message("broadcast", 2, 20, 0)] * 2,
    }
    homes = {"a": 0, "b": 1}
    told = Told([Message("allreduce", 2, 160)], said, homes, homes, 2, {"a": 10, "b": 10})
    row = report.row("n", "m", 2, "sharded", plain, works, told, {"x": MACHINE})
    quiet, sums = 20 / 20 + 0.5, 200 / 20 + 2 * 0.5
    expected = (
        2 + (160 / 20 + 1)  # forward; the gradients' sum is longer than the backward pass
        + 2 * 100 / 100  # preconditioning of the second
        + (2 * (1500 + 1500) / 1000 + sums) / 10
        + (1 + 2 * 10 / 10 + quiet) / 100
        + quiet
    )  # fmt: skip
    assert row.seconds["x"] == pytest.approx(expected)
    assert row.bases == (10, 7.5)
    assert row.state == (210, 110)
    assert row.sent == {"quiet": 10, "statistics": 210, "bases": 20}
    assert row.sent_each == pytest.approx(10 + 200 / 10 + 10 / 100)
    alone = report.row("n", "m", 2, report.EVERYWHERE, plain, works, told, {"x": MACHINE})
    assert alone.bases == (15, 15)
    assert alone.sent["bases"] == 10


def test_kaisa_by_hand() -> None:
    """Two layers alike on four ranks: nobody tells eigenvectors where each has one worker."""
    sizes = {"a": (3, 2), "b": (3, 2)}
    factors, bases = 4 * 13, 4 * (13 + 5)
    few = kaisa.rules(sizes, 4, 1)
    assert few.said["bases"] == few.said["quiet"] == [Message("broadcast", 4, 24, 0)] * 2
    assert few.said["statistics"][2:] == [Message("allreduce", 4, factors)] * 2
    assert few.state == 2 * factors + bases
    many = kaisa.rules(sizes, 4, 4)
    assert many.said["quiet"] == []
    assert many.said["bases"] == [Message("broadcast", 4, 2 * bases, 0)]
    assert many.state == 2 * (factors + bases)


@pytest.fixture
def only_small() -> Iterator[None]:
    with mock.patch.dict(program.NETWORKS, {"small": small, "resnet50": small}):
        yield


@pytest.mark.usefixtures("only_small", "drawn")
def test_the_program(tmp_path: Path) -> None:
    program.main(["--networks", "small", "--counts", "1,16", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "ranks.json").read_text())
    assert [(row["ranks"], row["placement"]) for row in rows] == [
        (1, "SGD"), (1, "replicated"), (16, "SGD"), (16, "replicated"),
        (16, "each makes all bases"), (16, "1/8"), (16, "sharded"),
    ]  # fmt: skip
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    text = (tmp_path / "ranks.md").read_text()
    assert text.count("| 16 |") == 5
    assert "MEM-OPT: 1 gradient worker" in text
    assert len((tmp_path / "ranks.csv").read_text().splitlines()) == 8
