"""Models that `fully_shard` divides among ranks, against one process with all batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint as recomputed

import tekfac
from processes import outcomes, together
from ranked import (
    DIVIDED,
    TOLERANCE,
    Batch,
    OfTheOutput,
    alone,
    centrally,
    close,
    cross_entropy,
    data_of,
    network_of,
    options_of,
    parameters,
    shards,
    train,
    whole,
    with_missing,
    wrapping,
)

pytestmark = DIVIDED

SECONDS = 120.0
STEPS = 10


def mesh_of(rows: int) -> DeviceMesh:
    """All ranks, the parameters once in each of so many rows."""
    ranks = dist.get_world_size()
    if rows == 1:
        return init_device_mesh("cpu", (ranks,))
    return init_device_mesh("cpu", (rows, ranks // rows), mesh_dim_names=("copies", "parts"))


def divided(
    model: nn.Module, rows: int = 1, each: bool = True, by: str = "fully_shard", **options: Any
) -> nn.Module:
    """The model, its layers' parameters gathered one after the other or all at once."""
    mesh = mesh_of(rows)
    for part in model.children() if each else ():
        if any(True for _ in part.parameters()):
            wrapping(by)(part, mesh=mesh, **options)
    return wrapping(by)(model, mesh=mesh, **options)  # type: ignore[no-any-return]


def on_ranks(
    network: str,
    method: str,
    data: Sequence[Batch],
    sizes: Sequence[int],
    way: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    model = divided(network_of(network), **way)
    optimizer = getattr(tekfac, method)(model, **options_of(method, **options))
    train(model, model, optimizer, [[part] for part in shards(data, sizes)[dist.get_rank()]])
    return whole(model)


def check(
    ranks: int, network: str, method: str, sizes: Sequence[int], way: dict[str, Any], **options: Any
) -> None:
    data = data_of(network, sum(sizes), STEPS)
    placement = options.pop("placement", "auto")
    expected = alone(network, method, data, sizes, **options)
    options["placement"] = placement
    results = together(ranks, on_ranks, network, method, data, sizes, way, options, seconds=SECONDS)
    for found in results:
        close(found, expected, TOLERANCE)
        assert all(torch.equal(value, results[0][name]) for name, value in found.items())


@pytest.mark.parametrize("method", ["KFAC", "TEKFAC"])
def test_as_one_process(method: str) -> None:
    """The last layer has 3 rows: a rank has one of them, the other two."""
    check(2, "mlp", method, [29, 19], {"reshard_after_forward": True}, placement="sharded")


@pytest.mark.parametrize("method", ["TEKFAC", pytest.param("EKFAC", marks=pytest.mark.slow)])
def test_copies(method: str) -> None:
    """What `DistributedDataParallel` does, done by what divides models."""
    wrapping("replicate")
    check(2, "mlp", method, [29, 19], {"by": "replicate"}, placement="sharded")


@pytest.mark.parametrize(
    ("method", "ranks", "rows"),
    [("TEKFAC", 2, 1), pytest.param("KFAC", 4, 2, marks=pytest.mark.slow)],
)
def test_labels_that_do_not_depend_on_ranks(method: str, ranks: int, rows: int) -> None:
    likelihood = OfTheOutput(dim=1)
    check(ranks, "mlp", method, [12] * ranks, {"rows": rows}, fisher="mc", likelihood=likelihood)


# Of two of these with all their values; `test_ranks` has the methods with all that goes with them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "network", "fisher", "placement"),
    [
        ("KFAC", "mlp", "exact", "replicated"),
        ("KFAC", "flattened", "empirical", "sharded"),
        ("EKFAC", "mlp", "empirical", "sharded"),
        ("EKFAC", "flattened", "exact", "replicated"),
        ("TKFAC", "flattened", "exact", "sharded"),
        ("TKFAC", "mlp", "empirical", "replicated"),
        ("TEKFAC", "flattened", "empirical", "replicated"),
        ("TEKFAC", "mlp", "exact", "sharded"),
    ],
)
def test_as_one_process_in_all_methods(
    network: str, method: str, fisher: str, placement: str
) -> None:
    check(2, network, method, [24, 24], {"each": False}, placement=placement, fisher=fisher)


@pytest.mark.slow
@pytest.mark.parametrize("reshard", [False, 2])
def test_parameters_that_stay_whole(reshard: bool | int) -> None:
    """After the forward pass, or on half of the ranks together."""
    check(4, "mlp", "TEKFAC", [12] * 4, {"reshard_after_forward": reshard})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "fisher", "method", "rows"),
    [
        ("replicated", "exact", "KFAC", 1),
        ("replicated", "empirical", "TEKFAC", 2),
        ("sharded", "exact", "TEKFAC", 2),
        ("sharded", "empirical", "KFAC", 1),
        (0.5, "empirical", "KFAC", 2),
        (0.5, "exact", "TEKFAC", 1),
    ],
)
def test_four_ranks(fisher: str, method: str, rows: int, placement: str | float) -> None:
    """A quarter on each, one of them without a part of the last layer; or two copies in halves."""
    sizes = [13, 11, 17, 7] if fisher == "exact" else [12] * 4
    way = {"rows": rows, "reshard_after_forward": True}
    check(4, "mlp", method, sizes, way, placement=placement, fisher=fisher)


# -- what a model and a loop may be ----------------------------------------------------------------


class Mixed(nn.Module):
    """An embedding, a convolution, a norm, a free parameter, a part recomputed, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.body = nn.Linear(5, 7)
        self.first, self.second = nn.Linear(7, 3), nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(self.conv(self.table(x).movedim(1, 2)).tanh().movedim(1, 2))
        h = recomputed(lambda h: self.body(h).tanh(), h, use_reentrant=False).mean(1)
        return self.first(h) * self.scale, self.second(h)


def both(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return cross_entropy(outputs[0], y) + cross_entropy(outputs[1], (y + 1) % 3)


def with_everything(synchronised: bool, bound: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Gradients of two batches, clipped, and all that bounds a step."""
    torch.manual_seed(5)
    model: Any = Mixed().double()
    rank, ranks = 0, 1
    if dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        divided(model)
    optimizer = tekfac.TEKFAC(
        model,
        **options_of("TEKFAC", damping=tekfac.RelativeDamping(1e-2), lr=0.02),
        **bound,
        weight_decay=0.01,
    )
    torch.manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for last in (False, True):
            x, y = torch.randint(7, (12, 4)), torch.randint(3, (12,))
            if ranks > 1 and not synchronised:
                model.set_requires_gradient_sync(last)
            (both(model(x.chunk(ranks)[rank]), y.chunk(ranks)[rank]) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    with torch.no_grad():
        model(x)  # now the parameters are whole
    treatment = str(optimizer.treatment())
    return (parameters(model) if ranks == 1 else whole(model)), treatment


@pytest.mark.parametrize(
    ("synchronised", "bound"), [(True, {"kl_clip": 1e-3}), (False, {"orthogonalize": True})]
)
def test_with_everything(synchronised: bool, bound: dict[str, Any]) -> None:
    expected, treatment = with_everything(True, bound)
    for found, told in together(2, with_everything, synchronised, bound, seconds=SECONDS):
        close(found, expected, TOLERANCE)
        assert told.replace("FSDP", "") == treatment  # classes have other names


class Tokens(nn.Module):
    """A table, whose weight may be the head's, and a layer between."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.table(x)).tanh().mean(1))


def in_a_way(way: str) -> tuple[dict[str, Tensor], list[str]]:
    """Parameters after training, and the layers that have a curvature."""

    def made() -> nn.Module:
        torch.manual_seed(5)
        return Tokens(tied=way == "tied").double()

    rank, ranks = (dist.get_rank(), 2) if dist.is_initialized() else (0, 1)
    model: Any = made()
    if way == "frozen":
        model.table.requires_grad_(False)
        model.body.bias.requires_grad_(False)
    called = model
    if ranks > 1:
        mesh, options = mesh_of(1), {}
        if way == "columns":
            options["shard_placement_fn"] = lambda p: Shard(1) if p.dim() > 1 else None
        if way == "on meta":
            with torch.device("meta"):
                model = called = Tokens(tied=False).double()
        if way == "compiled parts":
            model.body.compile(backend="aot_eager")
        fully_shard(model.body, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
        if way == "on meta":
            model.to_empty(device="cpu")
            whole_state = StateDictOptions(full_state_dict=True)
            set_model_state_dict(model, made().state_dict(), options=whole_state)
        if way == "compiled":
            called = torch.compile(model, backend="aot_eager")
    optimizer = tekfac.TEKFAC(called, **options_of("TEKFAC"))
    torch.manual_seed(1)
    data = [(torch.randint(7, (24, 3)), torch.randint(7, (24,))) for _ in range(STEPS)]
    mine = [[(x.chunk(ranks)[rank], y.chunk(ranks)[rank])] for x, y in data]
    train(called, called, optimizer, mine)
    return whole(model), [name for name, block in optimizer.blocks.items() if not block.empty]


@pytest.mark.parametrize(
    "way", ["tied", "frozen", "columns", "on meta", "compiled parts", "compiled"]
)
def test_what_models_may_be(way: str) -> None:
    expected, names = in_a_way(way)
    for found, seen in together(2, in_a_way, way, seconds=SECONDS):
        close(found, expected, TOLERANCE)
        assert seen == names


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_ranks_without_terms(fisher: str) -> None:
    """They make fewer passes of their own than the others, who do not wait for them there."""
    sizes = [13, 4]
    data = with_missing(data_of("mlp", sum(sizes)), sizes)
    expected = centrally(network_of("mlp"), "TEKFAC", fisher, data, sizes)
    way, options = {"reshard_after_forward": True}, {"fisher": fisher}
    args = ("mlp", "TEKFAC", data, sizes, way, options)
    for found in together(2, on_ranks, *args, seconds=SECONDS):
        close(found, expected, TOLERANCE)


def test_a_rank_with_an_empty_batch() -> None:
    data, sizes = data_of("mlp", 12), [12, 0]
    expected = centrally(network_of("mlp"), "TEKFAC", "exact", data, sizes)
    args = ("mlp", "TEKFAC", data, sizes, {}, {})
    for found in together(2, on_ranks, *args, seconds=SECONDS):
        close(found, expected, TOLERANCE)


def in_precision(policy: MixedPrecisionPolicy, dtype: torch.dtype) -> dict[str, Tensor]:
    """Trained as the policy says; the model keeps its parameters in this type."""
    model = network_of("mlp").to(dtype)
    inner = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype)
    for part in model.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh_of(1), mp_policy=inner)
    fully_shard(model, mesh=mesh_of(1), mp_policy=policy)
    optimizer = tekfac.TEKFAC(model, **options_of("TEKFAC"))
    data = [(x.to(dtype), y) for x, y in data_of("mlp", 48)]
    train(model, model, optimizer, [[part] for part in shards(data, [24, 24])[dist.get_rank()]])
    assert {block.factors.input.value.dtype for block in optimizer.blocks.values()} == {dtype}  # type: ignore
    return whole(model)


@pytest.mark.parametrize(
    ("low", "high", "tolerance"),
    [(torch.float32, torch.float64, 1e-5), (torch.bfloat16, torch.float32, 0.05)],
)
def test_mixed_precision(low: torch.dtype, high: torch.dtype, tolerance: float) -> None:
    """Layers run in a narrower type; what is kept is in that of the parameters."""
    policy = MixedPrecisionPolicy(low, high, output_dtype=high)
    expected = alone("mlp", "TEKFAC", data_of("mlp", 48), [24, 24])
    for found in together(2, in_precision, policy, high, seconds=SECONDS):
        close(found, expected, tolerance)


def with_a_bad_gradient() -> tuple[bool, int, str]:
    """Rank 1 has no finite input in step 1."""
    model = divided(network_of("mlp"))
    optimizer = tekfac.KFAC(model, **options_of("KFAC"))
    told = []
    for number, (x, y) in enumerate(data_of("mlp", 8, 2)):
        before = whole(model)
        optimizer.zero_grad()
        bad = float("nan") if number == 1 and dist.get_rank() == 1 else 1.0
        cross_entropy(model(bad * x), y).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += [str(each.message) for each in caught if "not finite" in str(each.message)]
    same = all(torch.equal(value, before[name]) for name, value in whole(model).items())
    return same, optimizer.counters["skipped_steps"], " ".join(told)


def test_a_bad_gradient_is_bad_everywhere() -> None:
    for same, skipped, told in together(2, with_a_bad_gradient, seconds=SECONDS):
        assert (same, skipped) == (True, 1)
        assert "the gradient of '0.weight' is not finite" in told


def with_copies(different: bool) -> None:
    """Two copies of a model, each in two parts, which are to have the same values."""
    model = network_of("mlp")
    if different:
        with torch.no_grad():
            model[2].weight[-1] += dist.get_rank() // 2  # type: ignore[index]
    divided(model, 2)
    optimizer = tekfac.TEKFAC(model, **options_of("TEKFAC"))
    train(model, model, optimizer, [[each] for each in data_of("mlp", 8, 1)])


def test_copies_with_other_values() -> None:
    together(4, with_copies, False, seconds=SECONDS)
    for result in outcomes(4, with_copies, True, seconds=SECONDS):
        assert "ValueError: ranks differ in the values of their parameters" in str(result)
        assert "rank 2 has 2.weight: values of sum" in str(result)


def adaptively(placement: str) -> tuple[list[float], dict[str, Tensor]]:
    """The ratios that damping goes by, which only some ranks can tell parts of."""
    model = network_of("mlp")
    rank, ranks = 0, 1
    if dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        divided(model)
    damping = tekfac.AdaptiveDamping(every=1)
    optimizer = tekfac.TEKFAC(model, **options_of("TEKFAC", damping=damping, placement=placement))
    ratios = []
    for x, y in data_of("mlp", 12):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x.chunk(ranks)[rank]), y.chunk(ranks)[rank])
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        assert optimizer.reduction_ratio is not None
        ratios.append(optimizer.reduction_ratio)
    return ratios, (parameters(model) if ranks == 1 else whole(model))


def test_adaptive_damping() -> None:
    expected, trained = adaptively("auto")
    for ratios, found in together(2, adaptively, "sharded", seconds=SECONDS):
        assert ratios == pytest.approx(expected, rel=1e-7)
        close(found, trained, TOLERANCE)


# -- what is sent ----------------------------------------------------------------------------------


def sent(placement: str) -> list[int]:
    """Entries that go out in each exchange of a step without statistics."""
    model = divided(network_of("mlp"))
    optimizer = tekfac.KFAC(model, **options_of("KFAC", placement=placement))
    x, y = data_of("mlp", 8, 1)[0]
    real, log = dist.all_to_all_single, []

    def noted(output: Tensor, input: Tensor, *args: Any) -> Any:
        log.append(len(input))
        return real(output, input, *args)

    dist.all_to_all_single = noted
    try:
        train(model, model, optimizer, [[(x, y)]] * 2)
    finally:
        dist.all_to_all_single = real
    return log[len(log) // 2 :]


def test_gradients_go_to_those_who_hold_blocks() -> None:
    """And to nobody else, and what these make of them comes back in parts."""
    size = sum(p.numel() for p in network_of("mlp").parameters())
    there, back = (sum(each) for each in zip(*together(2, sent, "sharded"), strict=True))
    assert there == back == size
    [everywhere] = (sum(each) for each in zip(*together(2, sent, "replicated"), strict=True))
    assert everywhere == 2 * size


# -- who trains it, and what is refused ------------------------------------------------------------


def groups() -> list[str]:
    """With a group or a mesh given, and what is said of others."""
    ranks, told = dist.get_world_size(), []
    data = data_of("mlp", 8, 1)
    mesh = init_device_mesh("cpu", (ranks,))
    for rows, given in (
        (1, dist.group.WORLD),
        (1, mesh),
        (2, dist.group.WORLD),
        (2, mesh_of(2)),
        (1, dist.new_subgroups(1)[0]),
    ):
        model = divided(network_of("mlp"), rows)
        try:
            optimizer = tekfac.KFAC(model, **options_of("KFAC", process_group=given))
        except ValueError as error:
            told.append(str(error))
            continue
        train(model, model, optimizer, [[each] for each in data])
        told.append(str(float(sum(p.square().sum() for p in whole(model).values()))))
    return told


def test_groups_that_are_given() -> None:
    for told in together(2, groups, seconds=SECONDS):
        expected = float(told[0])
        assert [float(each) for each in told[:4]] == pytest.approx([expected] * 4)
        assert "but fully_shard divides the model's parameters among [0, 1]" in told[4]


def refused(way: str) -> None:
    with torch.device("meta" if way == "meta" else "cpu"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if way == "afterwards":
        optimizer = tekfac.TEKFAC(model)
        divided(model)
        cross_entropy(model(torch.ones(2, 4)), torch.arange(2)).backward()
        optimizer.step()
    elif way == "the older one":
        tekfac.TEKFAC(FullyShardedDataParallel(model, device_id=torch.device("cpu")))
    else:
        fully_shard(model[1] if way == "in part" else model, mesh=mesh_of(1))
        tekfac.TEKFAC(model)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("in part", "NotImplementedError: parameter '0.weight' is whole on every rank"),
        ("meta", "kept on meta, not cpu (make the optimizer after to_empty())"),
        (
            "afterwards",
            "RuntimeError: parameters '0.weight', '0.bias', '1.weight' and others were ",
        ),
    ],
)
def test_what_is_refused(way: str, words: str) -> None:
    for result in outcomes(2, refused, way, seconds=SECONDS):
        assert words in str(result)
