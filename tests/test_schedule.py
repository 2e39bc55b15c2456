"""New bases layer by layer: whose turn it is, what that takes, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tekfac
from tekfac.curvature import costs
from tekfac.curvature.blocks import Block
from tekfac.optimizer import schedule
from tekfac.optimizer.schedule import BURST, SHARE, Job, Schedule

METHODS = ("KFAC", "EKFAC", "TKFAC", "TEKFAC")
WIDTHS = (4, 40, 30, 50, 3)


@pytest.fixture
def nothing_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small networks are scheduled as large ones are."""
    monkeypatch.setattr(schedule, "FREE", 0)
    monkeypatch.setattr(costs, "CALLS", 0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def train(model: nn.Module, optimizer: Any, steps: int, batch: int = 2000) -> list[dict[str, bool]]:
    """For each step, whether each block's basis is another than before."""
    changed = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        before = {name: block.basis for name, block in optimizer.blocks.items()}
        x = torch.randn(batch, WIDTHS[0], generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), x.argmax(1) % WIDTHS[-1]).backward()
        optimizer.step()
        after = optimizer.blocks
        changed.append({name: after[name].basis is not before[name] for name in after})
    return changed


# -- the schedule alone ----------------------------------------------------------------------------


def names(jobs: list[Job]) -> list[str]:
    return [job.name for job in jobs]


@pytest.mark.usefixtures("nothing_free")
def test_the_oldest_comes_first_and_then_the_least_work() -> None:
    jobs = [Job("a", 5, 30), Job("b", -1, 40), Job("c", 5, 10), Job("d", -1, 20)]
    assert names(Schedule().choose(jobs, round(100 / BURST))) == ["d", "b", "c", "a"]
    assert names(Schedule().choose(jobs, round(70 / BURST))) == ["d", "b", "c"]
    assert names(Schedule().choose(jobs, round(68 / BURST))) == ["d", "b"]


@pytest.mark.usefixtures("nothing_free")
def test_what_does_not_fit_holds_up_the_rest_and_never_starves() -> None:
    plan = Schedule()
    large, small = Job("large", 0, 350), Job("small", 1, 10)
    assert names(plan.choose([small, large], 100)) == ["large"]  # with all the credit there can be
    plan.charge([large], 100, 7)
    assert plan.refreshed == {"large": 7}
    assert plan.credit == pytest.approx(BURST + SHARE - 3.5)
    waits = 0
    while not plan.choose([small], 100):
        plan.charge([], 100, 8 + waits)
        waits += 1
    assert waits == pytest.approx((3.5 - BURST - SHARE + 0.1) / SHARE, abs=1)


@pytest.mark.usefixtures("nothing_free")
def test_new_bases_take_no_more_than_their_share() -> None:
    """Jobs that are due again and again, each larger or smaller than a step."""
    plan, spent = Schedule(), 0.0
    costs_of = {"a": 10, "b": 90, "c": 250, "d": 3}
    for step in range(500):
        jobs = [Job(name, plan.refreshed.get(name, -1), cost) for name, cost in costs_of.items()]
        chosen = plan.choose(jobs, 100)
        spent += sum(job.cost for job in chosen) / 100
        plan.charge(chosen, 100, step)
        assert spent <= BURST + SHARE * (step + 1) + 2.5
    assert spent >= SHARE * 500 - 2.5
    assert min(plan.refreshed.values()) > 450


def test_little_work_is_never_put_off() -> None:
    plan = Schedule(credit=-10.0)
    jobs = [Job(str(i), -1, schedule.FREE // 4) for i in range(5)]
    assert len(plan.choose(jobs, 1)) == 4
    plan.charge(jobs[:4], 1, 0)
    assert plan.credit == -10 + SHARE


# -- what things take ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(7, 5, bias=False), (3, 7)),
        (nn.Linear(7, 5, bias=False), (3, 4, 7)),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), (2, 6, 9, 8)),
        (nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 9, 8)),
        (nn.Conv1d(6, 6, 3, groups=6, bias=False), (2, 6, 9)),
    ],
)
def test_the_models_own_work_is_what_torch_counts(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Identity(), layer)
    optimizer = tekfac.TEKFAC(model, likelihood="gaussian")
    x = torch.randn(shape)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    # A backward pass takes twice what the forward pass takes, and a multiplication has an addition.
    assert 2 * optimizer.blocks["1"].work == 3 * counter.get_total_flops()


def test_products_of_preconditioning_are_what_torch_counts() -> None:
    for rank in (None, 8):
        model = nn.Sequential(nn.Linear(30, 20, bias=False))
        optimizer = tekfac.TEKFAC(model, rank=rank)
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(9, 30)), torch.arange(9)).backward()
        optimizer.step()
        block = optimizer.blocks["0"]
        with FlopCounterMode(display=False) as counter:
            block.precondition(torch.randn(1, 20, 30))
        k_in, k_out = block.basis.input.shape[2], block.basis.output.shape[2]
        assert (k_in, k_out) == ((30, 20) if rank is None else (8, 20))
        expected = costs.preconditioning(30, 20, k_in, k_out) - 30 * 20 * costs.UPDATED
        # Products with a side that is cut already may be less.
        assert 0.8 * expected <= counter.get_total_flops() / 2 <= expected


def test_leading_eigenvectors_take_less_than_all() -> None:
    for d in (200, 500, 2000):
        assert costs.eigenvectors(d, d // 8) < costs.eigenvectors(d, d // 4)
        assert costs.eigenvectors(d, d // 4) < costs.eigenvectors(d, d)


def test_channels_of_a_depthwise_convolution_keep_few_eigenvectors() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 6, 7, padding=3, groups=6), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.LazyLinear(3)
    )
    x, y = torch.randn(4, 3 * 2, 9, 9), torch.arange(4) % 3
    model(x)
    for rank, kept in ((64, 4), (None, 50)):
        optimizer = tekfac.TEKFAC(model, rank=rank)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        bases = {name: block.basis for name, block in optimizer.blocks.items()}
        assert bases["0"].input.shape == (6, 50, kept)
        assert bases["0"].output.shape == (6, 1, 1)
        assert bases["1"].input.shape == (1, 55, 55)
        optimizer.close()


# -- in the optimizer ------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_free")
@pytest.mark.parametrize(
    ("method", "warmup"),
    [*((method, False) for method in METHODS), ("KFAC", True), ("TEKFAC", True)],
)
def test_no_step_makes_more_bases_than_it_may(method: str, warmup: bool) -> None:
    model = network()
    options = {"factor_every": 10, "basis_every": 40, "interval_warmup": warmup, "lr": 1e-3}
    optimizer = getattr(tekfac, method)(model, **options)
    changed = train(model, optimizer, 1)
    for _ in range(199):
        changed += train(model, optimizer, 1)
        blocks = optimizer.blocks
        done = [blocks[name].refresh_cost for name, new in changed[-1].items() if new]
        limit = BURST * sum(block.step_cost for block in blocks.values())
        assert len(done) == 1 or sum(done) <= limit
    ages = {name: [s for s, new in enumerate(changed) if new[name]] for name in changed[0]}
    assert all(len(steps) >= 2 for steps in ages.values())
    assert any(len(set(new.values())) > 1 for new in changed[:20])  # not all at once
    if not warmup:
        # The cheapest as soon as it is due; nobody more often than that.
        assert ages["0"][:2] == [0, 40]
        assert all(b - a >= 20 for steps in ages.values() for a, b in itertools.pairwise(steps))


@pytest.mark.usefixtures("nothing_free")
@pytest.mark.parametrize("method", METHODS)
def test_short_intervals_are_kept_to_the_letter(method: str) -> None:
    model = network()
    optimizer = getattr(tekfac, method)(model, factor_every=1, basis_every=3, lr=1e-3)
    changed = train(model, optimizer, 10)
    assert [step for step, new in enumerate(changed) if all(new.values())] == [0, 3, 6, 9]
    assert not any(any(new.values()) for step, new in enumerate(changed) if step % 3)


@pytest.mark.usefixtures("nothing_free")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", METHODS)
def test_layers_in_waiting_are_trained_by_the_first_order_rule(method: str) -> None:
    model = network()
    optimizer = getattr(tekfac, method)(model, first_order=tekfac.Adam(lr=1e-2), basis_every=40)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, optimizer, 1)
    waiting = [name for name, block in optimizer.blocks.items() if block.waiting]
    assert waiting
    for name in waiting:
        change = (model.get_parameter(f"{name}.weight") - before[f"{name}.weight"]).abs()
        torch.testing.assert_close(change, torch.full_like(change, 1e-2), rtol=1e-2, atol=0)
        assert "first order until" in optimizer.treatment()[f"{name}.weight"]
    train(model, optimizer, 60)
    assert not any(block.empty for block in optimizer.blocks.values())


@pytest.mark.usefixtures("nothing_free")
@pytest.mark.parametrize(
    ("method", "steps"),
    [("TEKFAC", 1), ("TEKFAC", 3), ("TEKFAC", 45), ("KFAC", 1), ("EKFAC", 3), ("TKFAC", 45)],
)
def test_resumes_bit_for_bit_between_turns(method: str, steps: int) -> None:
    model = network()
    optimizer = getattr(tekfac, method)(model, basis_every=40, lr=1e-3, rank=10)
    train(model, optimizer, steps)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    changed = train(model, optimizer, 30)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    again = network()
    again.load_state_dict(states[0])
    fresh = getattr(tekfac, method)(again, basis_every=40, lr=1e-3, rank=10)
    fresh.load_state_dict(states[1])
    assert train(again, fresh, 30) == changed
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.usefixtures("nothing_free")
def test_states_without_a_schedule_go_on() -> None:
    model = network()
    optimizer = tekfac.TEKFAC(model, basis_every=40, interval_warmup=False)
    train(model, optimizer, 30)
    state = copy.deepcopy(optimizer.state_dict())
    del state["tekfac"]["schedule"]
    fresh = tekfac.TEKFAC(model, basis_every=40, interval_warmup=False)
    fresh.load_state_dict(state)
    changed = train(model, fresh, 60)
    assert not any(any(new.values()) for new in changed[:10])
    assert all(any(new[name] for new in changed) for name in fresh.blocks)


@pytest.mark.usefixtures("nothing_free")
def test_a_basis_made_between_statistics_keeps_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step without statistics the rescaling is carried over, whatever it was."""
    model = network()
    optimizer = tekfac.TEKFAC(model, basis_every=40, interval_warmup=False, lr=0.0)
    checked = []
    refresh = Block.refresh

    def observed(block: Block, found: list[Tensor]) -> bool:
        before = None if block.empty else float(block.fisher_trace())
        result = refresh(block, found)
        if before is not None:
            assert float(block.fisher_trace()) == pytest.approx(before, rel=1e-4)
            checked.append(block.listening)
        return result

    monkeypatch.setattr(Block, "refresh", observed)
    train(model, optimizer, 90)
    assert False in checked


@pytest.mark.usefixtures("nothing_free")
def test_dead_layers_take_no_turns() -> None:
    """A layer that no gradient reaches is not counted, and the others have theirs."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dead = nn.Linear(WIDTHS[0], 200)
            self.alive = network()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.alive(x) + 0 * self.dead(x).sum()
            return out

    model = Half()
    optimizer = tekfac.TEKFAC(model, basis_every=40)
    train(model, optimizer, 60)
    assert optimizer.blocks["dead"].empty
    assert not any(block.empty for name, block in optimizer.blocks.items() if name != "dead")
    assert "dead" not in optimizer.state_dict()["tekfac"]["schedule"]["refreshed"]
