"""Models whose layers several ranks multiply together, against one process that does alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

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
    whole,
    wrapping,
)
from tekfac.curvature.linalg import eigh
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


# -- attention, and what rounding decides ----------------------------------------------------------


class Attention(nn.Module):
    """A block of a transformer, whose heads are divided among ranks."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, classes)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        q, k, v = (layer(h).unflatten(-1, (-1, 4)) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bshd,bthd->bhst", q, k).softmax(-1)
        h = h + self.o(torch.einsum("bhst,bthd->bshd", weights, v).flatten(2))
        return self.head(h + self.down(self.up(h).tanh()))


HEADS = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
HEADS |= {name: RowwiseParallel() for name in ("o", "down")}

Choose = Callable[[Tensor], Tensor]


def settled(free: Tensor) -> Tensor:
    """The basis of a subspace that is nearest to some directions, whichever it was given by."""
    some = torch.randn(free.shape, generator=torch.Generator().manual_seed(3), dtype=free.dtype)
    return torch.linalg.qr(free @ (free.mT @ some)).Q


def turned(free: Tensor) -> Tensor:
    """Another basis of a subspace."""
    some = torch.randn(free.shape[1], free.shape[1], dtype=free.dtype)
    return free @ torch.linalg.qr(some).Q


def choosing(choose: Choose, matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """`eigh`, with another choice of the eigenvectors that have the eigenvalue zero."""
    found = eigh(matrix)
    assert found is not None
    values, vectors = found[0], found[1].clone()
    for own, columns in zip(values, vectors, strict=True):
        free = int((own < 1e-12 * own.max()).sum())
        columns[:, :free] = choose(columns[:, :free])
    return values, vectors


def attending(method: str, classes: int, choose: Choose | None) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model = Attention(classes).double()
    if dist.is_initialized():
        parallelize_module(model, mesh_of(1)["tensor"], HEADS)
    optimizer = getattr(tekfac, method)(model, **options_of(method))
    found = eigh if choose is None else partial(choosing, choose)
    with mock.patch("tekfac.curvature.moments.eigh", found):
        for x, _ in batches(24, 7):
            optimizer.zero_grad()
            loss_of(model(x), x % classes).backward()
            optimizer.step()
    return whole(model)


@pytest.mark.parametrize(
    ("method", "classes", "choose"),
    [("TEKFAC", 12, None), ("TEKFAC", 5, settled), pytest.param("EKFAC", 12, None, marks=SLOW)],
)
def test_attention(method: str, classes: int, choose: Choose | None) -> None:
    """Fewer classes than a layer is wide leave directions without any gradient of the first batch.

    Which basis they have is up to rounding: one is chosen for all.
    """
    expected = attending(method, classes, choose)
    for found in together(2, attending, method, classes, choose, seconds=SECONDS):
        close(found, expected, TOLERANCE)


def test_a_basis_that_rounding_chooses_is_no_fault_of_ranks() -> None:
    """One process differs from itself as much, and where all directions have gradients does not."""
    for classes, least, most in ((5, 1e-6, 1e-2), (12, 0.0, TOLERANCE)):
        one, other = (attending("TEKFAC", classes, choose) for choose in (None, turned))
        far = max(float((other[name] - one[name]).norm() / one[name].norm()) for name in one)
        assert least <= far < most


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


def trained(folder: Path, first: bool) -> dict[str, Tensor]:
    """A half of a training, in which the second goes on from what the first has saved."""
    model = network()
    if dist.is_initialized():
        parallelize_module(model, mesh_of(1)["tensor"], PLANS["all"])
    optimizer = tekfac.TEKFAC(model, **options_of("TEKFAC", placement="sharded"))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if not first:
        states = torch.load(folder / "states.pt", weights_only=True)
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
            torch.save(states, folder / "states.pt")
    return whole(model)


def test_states_fit_one_process_and_back(tmp_path: Path) -> None:
    expected = alone("TEKFAC", 6, steps=6)
    together(2, trained, tmp_path, True, seconds=SECONDS)
    close(trained(tmp_path, False), expected, TOLERANCE)
    trained(tmp_path, True)
    for found in together(2, trained, tmp_path, False, seconds=SECONDS):
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
