"""Models whose layers several ranks multiply together, against one process that does alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

import tekfac
from processes import outcomes, together
from ranked import (
    TOLERANCE,
    close,
    cross_entropy,
    options_of,
    parameters,
    shards,
    taken_over,
    whole,
    wrapping,
)
from tekfac.ranks.layout import Grid
from tekfac.ranks.ranks import Group, Ranks

SLOW = pytest.mark.slow
SECONDS = 120.0
STEPS = 10
TOKENS, CLASSES = 13, 5


class Network(nn.Module):
    """Tokens, a block with a residual connection, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.head(self.norm(h + self.down(self.up(h).tanh())))


# Layers alone; all that there is, with parts of sequences between layers.
PLANS: dict[str, dict[str, Any]] = {
    "block": {"up": ColwiseParallel(), "down": RowwiseParallel()},
    "all": {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


def network() -> nn.Module:
    torch.manual_seed(2)
    return Network().double()


def batches(examples: int, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [
        (torch.randint(TOKENS, (examples, 4)), torch.randint(CLASSES, (examples, 4)))
        for _ in range(steps)
    ]


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(output.flatten(0, 1), y.flatten())


def alone(method: str, examples: int, steps: int = STEPS, **options: Any) -> dict[str, Tensor]:
    model = network()
    optimizer = getattr(tekfac, method)(model, **options_of(method, **options))
    for x, y in batches(examples, steps):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    return parameters(model)


def mesh_of(*rows: int) -> DeviceMesh:
    """All ranks: so many rows, or in several dimensions, of ranks that see the same batches."""
    shape = (*rows, dist.get_world_size() // math.prod(rows))
    return init_device_mesh(
        "cpu", shape, mesh_dim_names=("copies", "data", "tensor")[-len(shape) :]
    )


def averaged(model: nn.Module, mesh: DeviceMesh) -> None:
    """What a loop does where copies of such a model see batches of their own."""
    for p in model.parameters():
        if isinstance(p.grad, DTensor):
            p.grad = p.grad.redistribute(p.device_mesh, p.placements)
            dist.all_reduce(p.grad.to_local(), dist.ReduceOp.AVG, mesh.get_group("data"))
        else:
            dist.all_reduce(p.grad, dist.ReduceOp.AVG, mesh.get_group("data"))


def on_ranks(
    method: str, plan: str, shape: Sequence[int], around: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    mesh, rows = mesh_of(*shape), math.prod(shape)
    model = parallelize_module(network(), mesh["tensor"], PLANS[plan])
    if around:
        for part in (*model.children(), model):
            wrapping(around)(part, mesh=mesh[("copies", "data")[-len(shape) :]])
    optimizer = getattr(tekfac, method)(model, **options_of(method, **options))
    row = dist.get_rank() // mesh["tensor"].size()
    for x, y in shards(batches(6 * rows), [6] * rows)[row]:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        if rows > 1 and not around:
            averaged(model, mesh)
        optimizer.step()
    assert not any(block.empty for block in optimizer.blocks.values())
    return whole(model)


def check(
    ranks: int,
    method: str,
    plan: str,
    shape: Sequence[int] = (1,),
    around: str = "",
    **options: Any,
) -> None:
    placement = options.pop("placement", "auto")
    expected = alone(method, 6 * math.prod(shape), **options)
    options["placement"] = placement
    results = together(ranks, on_ranks, method, plan, shape, around, options, seconds=SECONDS)
    for found in results:
        close(found, expected, TOLERANCE)
        assert all(torch.equal(value, results[0][name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("method", "fisher", "plan"),
    [
        ("KFAC", "exact", "block"),
        ("EKFAC", "empirical", "all"),
        ("TKFAC", "empirical", "block"),
        ("TEKFAC", "exact", "all"),
        *(
            pytest.param(method, fisher, plan, marks=SLOW)
            for method, fisher, plan in (
                ("KFAC", "empirical", "all"),
                ("EKFAC", "exact", "block"),
                ("TKFAC", "exact", "all"),
                ("TEKFAC", "empirical", "block"),
            )
        ),
    ],
)
def test_as_one_process(method: str, fisher: str, plan: str) -> None:
    check(2, method, plan, fisher=fisher, placement="sharded" if plan == "all" else "auto")


def test_orthogonalized() -> None:
    """The polar factor is that of the whole layer's momentum."""
    check(2, "TEKFAC", "block", fisher="exact", orthogonalize=True)


def test_positions_taken_for_one() -> None:
    """Where ranks have parts of a sequence, the mean is that of all of it."""
    check(2, "TKFAC", "all", fisher="exact", weight_sharing="reduce")


@pytest.mark.parametrize(
    ("method", "fisher", "plan", "around"),
    [
        ("TEKFAC", "exact", "all", "fully_shard"),
        ("EKFAC", "empirical", "all", "replicate"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                ("KFAC", "empirical", "block", ""),
                ("KFAC", "exact", "all", "fully_shard"),
                ("EKFAC", "exact", "all", ""),
                ("EKFAC", "empirical", "block", "fully_shard"),
                ("TKFAC", "exact", "block", ""),
                ("TKFAC", "empirical", "all", "fully_shard"),
                ("TEKFAC", "empirical", "all", ""),
                ("TEKFAC", "exact", "block", "replicate"),
            )
        ),
    ],
)
def test_with_batches_of_their_own(method: str, fisher: str, plan: str, around: str) -> None:
    """Two rows of two ranks: each row sees half of the batch, and has copies or parts."""
    if around:
        wrapping(around)
    placement = "sharded" if plan == "all" else 0.5
    check(4, method, plan, (2,), around, fisher=fisher, placement=placement)


@pytest.mark.parametrize(
    ("method", "fisher", "plan", "shape", "ranks"),
    [
        ("TEKFAC", "empirical", "all", (2, 1), 4),
        pytest.param("TKFAC", "exact", "block", (1, 2), 4, marks=SLOW),
        pytest.param("TEKFAC", "exact", "all", (2, 2), 8, marks=SLOW),
    ],
)
def test_copies_in_parts_around(
    method: str, fisher: str, plan: str, shape: tuple[int, int], ranks: int
) -> None:
    """HSDP: copies, each in parts, of layers that two ranks multiply together."""
    check(ranks, method, plan, shape, "fully_shard", fisher=fisher, placement="sharded")


def test_parts_where_copies_are_divided_twice() -> None:
    """HSDP around: two copies, each cut by the last dimension first, and that by the middle one."""
    places = [(a, b, c) for a in range(2) for b in range(2) for c in range(2)]
    grid = Grid((2, 2, 2), places, first=0, parallel=True)
    p = SimpleNamespace(placements=(Replicate(), Shard(0), Shard(0)))
    parts = [part.tolist() for part in grid.parts(p, torch.arange(7))]
    assert parts == [[0, 1], [4, 5], [2, 3], [6]] * 2
    assert grid.count(p) == 4
    assert [grid.batch(number) for number in (0, 1, 2, 7)] == [(0, 4), (0, 4), (1, 4), (3, 4)]
    assert grid.lane(6) == [6, 7]
    assert grid.same_copy(p, 0, 3)
    assert not grid.same_copy(p, 0, 4)
    # What is whole along the last dimension, everybody has from itself.
    norm = SimpleNamespace(placements=(Replicate(), Shard(0)))
    assert [part.tolist() for part in grid.parts(norm, torch.arange(3))][:4] == [
        [0, 1], [0, 1], [2], [2]
    ]  # fmt: skip
    assert not grid.same_copy(norm, 0, 1)


# -- what a loop may do ----------------------------------------------------------------------------


class Recomputed(nn.Module):
    """A layer that runs again in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self.inner, x, use_reentrant=False)


def with_everything() -> tuple[dict[str, Tensor], list[float]]:
    """Two batches before a step, clipping, a part recomputed, logits in parts, damping adapted."""
    model: Any = network()
    model.up = Recomputed(model.up)
    logits: Any = nullcontext
    if dist.is_initialized():
        plan = PLANS["all"] | {
            "up.inner": PLANS["all"]["up"],
            "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        }
        del plan["up"]
        parallelize_module(model, mesh_of(1)["tensor"], plan)
        logits = loss_parallel
    damping = tekfac.AdaptiveDamping(every=2)
    options = options_of("TEKFAC", damping=damping, weight_decay=0.01, kl_clip=1e-3)
    optimizer = tekfac.TEKFAC(model, **options)
    data, ratios = batches(8, 8), []
    for number in range(0, len(data), 2):

        def closure(parts: Any = data[number : number + 2]) -> float:
            optimizer.zero_grad()
            total = 0.0
            for x, y in parts:
                with logits():
                    loss: Any = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 2
                    loss.backward()
                total += float((loss.full_tensor() if isinstance(loss, DTensor) else loss).detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return total

        optimizer.step(closure)
        ratios.append(optimizer.reduction_ratio)
    return whole(model), [each for each in ratios if each is not None]


def test_with_everything() -> None:
    expected, ratios = with_everything()
    for found, told in together(2, with_everything, seconds=SECONDS):
        close(found, expected, TOLERANCE)
        assert told == pytest.approx(ratios, rel=1e-6)


def with_drawn_labels() -> tuple[dict[str, Tensor], set[str]]:
    """And the layers whose statistics this rank has taken."""
    model = network()
    if dist.is_initialized():
        parallelize_module(model, mesh_of(1)["tensor"], PLANS["block"])
    optimizer = tekfac.KFAC(model, **options_of("KFAC", fisher="mc"))
    seen = set()
    for x, y in batches(6, 3):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        seen |= {name for name, block in optimizer.blocks.items() if block.pending}
        optimizer.step()
    return whole(model), seen


def test_ranks_that_see_the_same_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And divide among themselves what is to be made of it."""
    monkeypatch.setattr(Ranks, "reseed", Group.reseed)
    expected, layers = with_drawn_labels()
    (found, own), (others, theirs) = together(2, with_drawn_labels, seconds=SECONDS)
    close(found, expected, TOLERANCE)
    close(others, expected, TOLERANCE)
    assert own | theirs == layers == {"table", "up", "down", "head"}
    assert not own & theirs
    assert len(own) == len(theirs)


# -- states ----------------------------------------------------------------------------------------


def hop(folder: Path, number: int, rows: int, tensor: bool) -> dict[str, Tensor]:
    """Two steps of a training that goes on where others have left it, and leaves it to others."""
    model, row = network(), 0
    if dist.is_initialized():
        mesh = mesh_of(rows)
        if tensor:
            parallelize_module(model, mesh["tensor"], PLANS["all"])
        for part in (*model.children(), model) if rows > 1 else ():
            fully_shard(part, mesh=mesh["data"])
        row = mesh.get_local_rank("data")
    optimizer = tekfac.TEKFAC(model, **options_of("TEKFAC", placement="sharded", momentum=0.9))

    with taken_over(folder, number, model, optimizer):
        for x, y in shards(batches(12), [12 // rows] * rows)[row][2 * number : 2 * number + 2]:
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
    return whole(model)


# Ranks, rows of them, and whether the ranks of a row multiply together.
HANDS = [(2, 1, True), (1, 1, False), (4, 2, True), (2, 2, False), (2, 1, True)]


def test_a_training_that_changes_hands(tmp_path: Path) -> None:
    """Saved in parts, and gone on with by others, divided in another way or not at all."""
    expected = alone("TEKFAC", 12, momentum=0.9)
    for number, (ranks, rows, tensor) in enumerate(HANDS):
        args = (tmp_path, number, rows, tensor)
        results = together(ranks, hop, *args, seconds=SECONDS) if ranks > 1 else [hop(*args)]
    for found in results:
        close(found, expected, TOLERANCE)


def from_one_file(path: Path) -> dict[str, Tensor]:
    """Whole states that rank 0 has, whoever saved them."""
    model = network()
    if dist.is_initialized():
        parallelize_module(model, mesh_of(1)["tensor"], PLANS["all"])
    optimizer = tekfac.TEKFAC(model, **options_of("TEKFAC", placement="sharded"))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    first = not path.exists()
    if not first:
        states = torch.load(path, weights_only=True)
        set_model_state_dict(model, states[0], options=full)
        set_optimizer_state_dict(model, optimizer, states[1], options=full)
    for x, y in batches(6, 6)[: 3 if first else None][0 if first else 3 :]:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    if first:
        model_state = get_model_state_dict(model, options=full)
        states = [model_state, get_optimizer_state_dict(model, optimizer, options=full)]
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(states, path)
    return whole(model)


def test_states_fit_one_process_and_back(tmp_path: Path) -> None:
    expected = alone("TEKFAC", 6, steps=6)
    paths = tmp_path / "theirs", tmp_path / "ours"
    together(2, from_one_file, paths[0], seconds=SECONDS)
    close(from_one_file(paths[0]), expected, TOLERANCE)
    from_one_file(paths[1])
    for found in together(2, from_one_file, paths[1], seconds=SECONDS):
        close(found, expected, TOLERANCE)


# -- what is refused -------------------------------------------------------------------------------


def different(what: str) -> None:
    model = network()
    head = ColwiseParallel(output_layouts=Shard(-1)) if what == "parts" else ColwiseParallel()
    plan = PLANS["block"] | ({"head": head} if what == "parts" else {})
    parallelize_module(model, mesh_of(1)["tensor"], plan)
    optimizer = tekfac.KFAC(model)
    x, _ = batches(6)[dist.get_rank() if what == "batches" else 0]
    output = model(x)
    loss_of(output, torch.zeros(6, 4, dtype=torch.long)).backward()
    optimizer.step()


@pytest.mark.parametrize("what", ["batches", "parts"])
def test_ranks_that_return_different_outputs(what: str) -> None:
    for result in outcomes(2, different, what, seconds=SECONDS):
        assert "RuntimeError: ranks [0, 1] have parts of the same parameters" in str(result)
        assert "output_layouts=Replicate()" in str(result)


def refused(way: str) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if way == "two dimensions":
        grid = mesh_of(1)
        weight = distribute_tensor(model[0].weight.detach(), grid, [Replicate(), Shard(0)])
        model[0].weight = nn.Parameter(weight)
        tekfac.TEKFAC(model)
    elif way == "some ranks":
        parallelize_module(model[0], mesh_of(1)["tensor"], ColwiseParallel())
        tekfac.TEKFAC(model, process_group=dist.new_subgroups(1)[0])
    elif way == "DistributedDataParallel":
        mesh = mesh_of(2)
        parallelize_module(model[0], mesh["tensor"], ColwiseParallel())
        parallel = DistributedDataParallel(model, device_mesh=mesh["data"])
        parallel(torch.zeros(2, 4))  # after which it has no such parameters any more
        tekfac.TEKFAC(parallel)
    else:
        fully_shard(model[1], mesh=mesh_of(2)["data"])
        parallelize_module(model[0], mesh_of(2)["tensor"], ColwiseParallel())
        tekfac.TEKFAC(model)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (
            "two dimensions",
            "NotImplementedError: parameter '0.weight' is a DTensor with placements",
        ),
        ("some ranks", "process_group takes the group of all ranks that train it together"),
        ("DistributedDataParallel", "Have copies of the model by fully_shard(model, mesh=...)"),
        ("in part", "fully_shard has not made"),
    ],
)
def test_what_is_refused(way: str, words: str) -> None:
    for result in outcomes(2, refused, way, seconds=SECONDS):
        assert words in str(result)
