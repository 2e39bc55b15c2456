"""States of divided models, and of those that every rank has whole, where others go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import tekfac
from harness import METHODS
from processes import together
from ranked import (
    DIVIDED,
    TOLERANCE,
    Batch,
    close,
    data_of,
    network_of,
    options_of,
    taken_over,
    train,
    whole,
)
from test_fsdp import SECONDS, Mixed, both, divided

pytestmark = DIVIDED

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def network_and_optimizer(placement: str, rows: int) -> tuple[nn.Module, tekfac.TEKFAC, int, int]:
    """With several ranks divided in so many rows, or with 0 of them whole on each."""
    torch.manual_seed(7)
    model: nn.Module = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    rank, ranks = 0, 1
    if dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        model = divided(model, rows) if rows else DistributedDataParallel(model)
    options = options_of("TEKFAC", placement=placement, rank=1)
    return model, tekfac.TEKFAC(model, **options), rank, ranks


def steps(
    model: nn.Module, optimizer: tekfac.TEKFAC, data: Sequence[Batch], rank: int, ranks: int
) -> dict[str, Tensor]:
    mine = [[(x.chunk(ranks)[rank], y.chunk(ranks)[rank])] for x, y in data]
    found = train(model, model, optimizer, mine)
    return whole(model) if dist.is_initialized() else found


def saving(folder: Path, placement: str, rows: int) -> None:
    """Train halfway and save in two ways: whole by rank 0, and all ranks their parts."""
    model, optimizer, rank, ranks = network_and_optimizer(placement, rows)
    steps(model, optimizer, data_of("mlp", 12)[:3], rank, ranks)
    states = [f(model, *of, options=FULL) for f, of in _getters(optimizer)]
    if rank == 0:
        torch.save(states, folder / "whole.pt")
    parts = [f(model, *of) for f, of in _getters(optimizer)]
    checkpoint.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder / "parts")


def _getters(optimizer: tekfac.TEKFAC) -> list[tuple[Any, tuple[Any, ...]]]:
    return [(get_model_state_dict, ()), (get_optimizer_state_dict, (optimizer,))]


def resuming(folder: Path, placement: str, rows: int, way: str) -> dict[str, Tensor]:
    """The other half."""
    model, optimizer, rank, ranks = network_and_optimizer(placement, rows)
    if way == "parts":
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        checkpoint.load(state, checkpoint_id=folder / "parts")
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=way == "rank 0's")
        states = [{}, {}]
        if way != "rank 0's" or rank == 0:
            states = torch.load(folder / "whole.pt", weights_only=True)
        set_model_state_dict(model, states[0], options=options)
        if way == "plain":
            optimizer.load_state_dict(states[1])
        else:
            set_optimizer_state_dict(model, optimizer, states[1], options=options)
    return steps(model, optimizer, data_of("mlp", 12)[3:], rank, ranks)


def several(
    folder: Path, placement: str, rows: int, ways: Sequence[str]
) -> list[dict[str, Tensor]]:
    return [resuming(folder, placement, rows, way) for way in ways]


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_states_fit_any_number_of_ranks(placement: str, tmp_path: Path) -> None:
    """Saved by four, in two copies; gone on with by two, and by one alone, in all ways."""
    model, optimizer, *place = network_and_optimizer("auto", 1)
    expected = steps(model, optimizer, data_of("mlp", 12), *place)
    together(4, saving, tmp_path, placement, 2, seconds=SECONDS)
    ways = ["whole", "rank 0's", "parts", "plain"]
    for runs in together(2, several, tmp_path, placement, 1, ways, seconds=SECONDS):
        for found in runs:
            close(found, expected, TOLERANCE)
    for way in ("whole", "parts", "plain"):
        close(resuming(tmp_path, placement, 1, way), expected, TOLERANCE)


def hop(folder: Path, number: int, rows: int) -> dict[str, Tensor]:
    """Two steps of a training that goes on where others have left it, and leaves it to others."""
    model, optimizer, rank, ranks = network_and_optimizer("sharded", rows)

    with taken_over(folder, number, model, optimizer):
        steps(model, optimizer, data_of("mlp", 12, 12)[2 * number : 2 * number + 2], rank, ranks)
    return whole(getattr(model, "module", model))


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_training_that_changes_hands(rows: int, tmp_path: Path) -> None:
    """Of four ranks, two, one, two, three, and four again, with two steps each."""
    model, optimizer, *place = network_and_optimizer("auto", 1)
    expected = steps(model, optimizer, data_of("mlp", 12, 12), *place)
    for number, ranks in enumerate((4, 2, 1, 2, 3, 4)):
        args = (tmp_path, number, rows if ranks % 2 == 0 else min(rows, 1))
        results = together(ranks, hop, *args, seconds=SECONDS) if ranks > 1 else [hop(*args)]
        for found in results:
            assert all(torch.equal(value, results[0][name]) for name, value in found.items())
    close(results[0], expected, TOLERANCE)


def parts_alone() -> str:
    """What is said of a state in parts where the model is whole."""
    model, optimizer, *_ = network_and_optimizer("auto", 1)
    steps(model, optimizer, data_of("mlp", 8)[:1], 0, 1)
    state = optimizer.state_dict()
    plain = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)
    )
    try:
        tekfac.TEKFAC(plain.double(), rank=1).load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def test_a_state_in_parts_fits_the_same_parts_only() -> None:
    for told in together(2, parts_alone, seconds=SECONDS):
        assert "is divided among ranks in another way than the model" in told


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_blank_estimates_have_the_form_of_real_ones(
    method: str, storage: torch.dtype | None
) -> None:
    """What `torch.distributed.checkpoint` loads into, of a block that was not measured yet."""
    model = Mixed()
    optimizer = getattr(tekfac, method)(model, rank=2, storage=storage)
    both(model(torch.randint(7, (12, 4))), torch.randint(3, (12,))).backward()
    optimizer.step()
    assert "table" in optimizer.blocks
    for block in optimizer.blocks.values():
        real, blank = block.state_dict(), block.blank()
        assert real.keys() - blank.keys() == {"row_norm", "silent", "positions"}
        for name, value in blank.items():
            assert (value.shape, value.dtype) == (real[name].shape, real[name].dtype), name
            assert not value.any()


def test_a_state_that_lost_estimates_is_told() -> None:
    model = network_of("mlp")
    optimizer = tekfac.TEKFAC(model, **options_of("TEKFAC"))
    train(model, model, optimizer, [[each] for each in data_of("mlp", 8, 1)])
    state = optimizer.state_dict()
    del state["state"][0]["block.factor.input"]
    with pytest.raises(ValueError, match="lost what layer '0' had learnt"):
        tekfac.TEKFAC(network_of("mlp")).load_state_dict(state)
