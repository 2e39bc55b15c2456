"""Some of all ranks train a model together, and others another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tekfac
from harness import NETWORKS
from processes import together
from ranked import (
    DIVIDED,
    TOLERANCE,
    Batch,
    close,
    data_of,
    options_of,
    shards,
    train,
    whole,
)

SECONDS = 120.0


def of_pair(number: int) -> tuple[Any, list[Batch]]:
    """The model and the batches of one of two pairs, which have nothing in common."""
    data = data_of("mlp", 24, 20)[number::2]
    torch.manual_seed(number)
    return NETWORKS["mlp"](), data


def in_pairs(way: str, placement: str) -> dict[str, Tensor]:
    """Ranks 0 and 2 are a pair, ranks 1 and 3 another."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "models"))["data"]
    model, data = of_pair(dist.get_rank() % 2)
    called, options = model, options_of("TEKFAC", placement=placement)
    mine = shards(data, [12, 12])[mesh.get_local_rank()]
    if way == "fully_shard":
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
    elif way == "tensor parallelism":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        options["process_group"], mine = mesh, data
    else:
        called = DistributedDataParallel(model, process_group=mesh.get_group())
        if way != "the wrapper's":
            options["process_group"] = mesh if way == "a mesh" else mesh.get_group()
    given = called if way == "the wrapper's" else model
    train(model, called, tekfac.TEKFAC(given, **options), [[part] for part in mine])
    return whole(model)


@pytest.mark.parametrize(
    ("way", "placement"),
    [
        ("the wrapper's", "replicated"),
        ("a group", "sharded"),
        ("a mesh", "sharded"),
        pytest.param("fully_shard", "sharded", marks=DIVIDED),
        ("tensor parallelism", "sharded"),
    ],
)
def test_pairs_train_models_of_their_own(way: str, placement: str) -> None:
    expected = []
    for number in (0, 1):
        model, data = of_pair(number)
        optimizer = tekfac.TEKFAC(model, **options_of("TEKFAC"))
        expected.append(train(model, model, optimizer, [[part] for part in data]))
    for rank, found in enumerate(together(4, in_pairs, way, placement, seconds=SECONDS)):
        close(found, expected[rank % 2], TOLERANCE)
