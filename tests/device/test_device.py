"""What may be different on a GPU: exactness, resuming, waiting, mixed precision, trouble."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tekfac
from harness import METHODS, NETWORKS, RESCALED, TRACED, SideBySide, batch
from tekfac import RelativeDamping, TraceDamping
from tekfac.curvature import sampling

FISHERS = ["mc", "exact", "empirical"]
NoWaiting = Callable[[], AbstractContextManager[None]]


class Tokens(nn.Module):
    """Layers that see several positions of an example, an embedding, and a matrix that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 8)
        self.places = nn.Parameter(0.1 * torch.randn(5, 8))
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(torch.tanh(self.words(x) + self.places)))
        return found.transpose(1, 2)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip


KINDS = {"convolutional": convolutional, "tokens": Tokens}


def network(kind: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().to(device)


def batches(kind: str, device: torch.device, steps: range) -> list[tuple[Tensor, Tensor]]:
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        if kind == "tokens":
            x = torch.randint(6, (4, 5), generator=generator)
            found.append((x.to(device), (x + 1).remainder(6).to(device)))
        else:
            x = torch.randn(6, 2, 6, 6, generator=generator)
            found.append((x.to(device), torch.randint(3, (6,), generator=generator).to(device)))
    return found


def build(method: str, model: nn.Module, **options: Any) -> Any:
    every = {"factor_every": 2, "basis_every": 100, "interval_warmup": False}
    if method in RESCALED:
        every["scale_every"] = 3
    generator = torch.Generator().manual_seed(1)
    # Orthogonalized steps, in low precision where there is any, are alike to few digits.
    given = {"lr": 0.01, "orthogonalize": False, "generator": generator, **every, **options}
    return getattr(tekfac, method)(model, **given)


def train(
    model: nn.Module,
    optimizer: Any,
    data: list[tuple[Tensor, Tensor]],
    parts: int = 1,
    autocast: torch.dtype | None = None,
) -> list[Tensor]:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        for some_x, some_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            lower = nullcontext() if autocast is None else torch.autocast(x.device.type, autocast)
            with lower:
                loss = F.cross_entropy(model(some_x), some_y)
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def learnt(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all that the optimizer has learnt, on the CPU."""
    for name, p in model.named_parameters():
        yield name, p.detach().cpu()
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            yield f"{key}.{name}", torch.as_tensor(value).cpu()


def finite(model: nn.Module, optimizer: Any) -> bool:
    return all(bool(value.isfinite().all()) for _, value in learnt(model, optimizer))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("method", METHODS)
def test_exact_in_float64(method: str, kind: str, fisher: str, device: torch.device) -> None:
    """The package on the device, the dense matrices on the CPU."""
    torch.manual_seed(0)
    model = NETWORKS[kind]()
    options = {"lr": 0.05, "momentum": 0.9, "orthogonalize": fisher == "empirical"}
    pair = SideBySide(copy.deepcopy(model).to(device), method, fisher=fisher, twin=model, **options)
    for _ in range(3):
        pair.step(*batch(kind, 5))
    pair.check_parameters()
    pair.check_blocks()
    assert {block.basis.input.device for block in pair.fast.blocks.values()} == {device}


@pytest.mark.parametrize("rank", [512, 2])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", METHODS)
def test_the_steps_are_those_on_the_cpu(
    method: str, kind: str, rank: int, device: torch.device
) -> None:
    """In float32, with the same labels drawn; small layers of one shape go together."""
    found = []
    for where in (device, torch.device("cpu")):
        model = network(kind, where)
        optimizer = build(method, model, basis_every=3, rank=rank, weight_decay=0.1)
        train(model, optimizer, batches(kind, where, range(6)))
        found.append([p.detach().cpu() for p in model.parameters()])
        assert optimizer.counters["steps"] == 6
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("much_work", [False, True])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", METHODS)
def test_only_a_refresh_of_the_basis_waits(
    method: str,
    kind: str,
    fisher: str,
    much_work: bool,
    device: torch.device,
    no_waiting: NoWaiting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"nesterov": True, "weight_decay": 0.1, "kl_clip": 1e-3}
    options["damping"] = TraceDamping() if method in TRACED else RelativeDamping(1e-2)
    if much_work:
        options |= {"kl_clip": None, "orthogonalize": True}
        monkeypatch.setattr(sampling, "SMALL", 0)
        monkeypatch.setattr(sampling, "multiplies_bfloat16", lambda device: True)
        options |= {"factor_rows": 1, "rank": 3, "storage": torch.bfloat16}
    model = network(kind, device)
    optimizer = build(method, model, fisher=fisher, **options)
    data = batches(kind, device, range(7))
    train(model, optimizer, data[:1])
    with no_waiting():
        train(model, optimizer, data[1:])
    assert optimizer.counters["steps"] == 7
    assert finite(model, optimizer)


def test_the_check_for_waiting_finds_it(device: torch.device, no_waiting: NoWaiting) -> None:
    number = torch.ones((), device=device)
    with pytest.raises((RuntimeError, AssertionError)), no_waiting():
        number.item()


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_batches(method: str, device: torch.device) -> None:
    found = []
    for where in (device, torch.device("cpu")):
        model = network("convolutional", where).eval()
        optimizer = build(method, model, fisher="exact", basis_every=2)
        train(model, optimizer, batches("convolutional", where, range(4)), parts=2)
        found.append([p.detach().cpu() for p in model.parameters()])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("storage", [None, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_exactly(
    method: str, storage: torch.dtype | None, moved: bool, device: torch.device
) -> None:
    """Also from a state that went through the CPU's memory."""
    if moved and device.type == "twin":
        pytest.skip("torch.save knows nothing of a device that is not there")
    data = batches("convolutional", device, range(7))
    model = network("convolutional", device)
    optimizer = build(method, model, basis_every=4, storage=storage, rank=3)
    train(model, optimizer, data[:3])
    kept = [copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())]
    if moved:
        file = io.BytesIO()
        torch.save(kept, file)
        file.seek(0)
        kept = torch.load(file, map_location="cpu", weights_only=True)
    other = network("convolutional", device)
    other.load_state_dict(kept[0])
    resumed = build(method, other, basis_every=4, storage=storage, rank=3)
    resumed.load_state_dict(kept[1])
    for each, by in ((model, optimizer), (other, resumed)):
        train(each, by, data[3:])
    for (name, value), (_, same) in zip(
        learnt(model, optimizer), learnt(other, resumed), strict=True
    ):
        assert torch.equal(value, same), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, fisher: str, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "twin" or (dtype == torch.float16 and device.type == "cpu"):
        pytest.skip("float16 is for GPUs, and nothing is cast on a device that is not there")
    model = network("convolutional", device)
    optimizer = build(method, model, fisher=fisher, basis_every=3)
    data = batches("convolutional", device, range(1)) * 12
    losses = train(model, optimizer, data, autocast=dtype)
    assert optimizer.counters["skipped_steps"] == optimizer.counters["skipped_statistics"] == 0
    assert finite(model, optimizer)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_gradscaler(method: str, device: torch.device) -> None:
    if device.type == "twin":
        pytest.skip("torch scales no gradients of devices that it does not know")
    lower = torch.float16 if device.type == "cuda" else torch.bfloat16
    model = network("convolutional", device)
    optimizer = build(method, model, basis_every=3)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    data = batches("convolutional", device, range(6))
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        with torch.autocast(device.type, lower):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if step == 3:
            p = next(model.parameters())
            assert p.grad is not None
            p.grad.view(-1)[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert optimizer.counters["steps"] == 5
    assert finite(model, optimizer)


@pytest.mark.parametrize("method", METHODS)
def test_storage(method: str, device: torch.device) -> None:
    sizes = []
    for storage in (None, torch.bfloat16):
        model = network("convolutional", device)
        optimizer = build(method, model, storage=storage, basis_every=3)
        data = batches("convolutional", device, range(1)) * 6
        losses = train(model, optimizer, data)
        assert losses[-1] < losses[0]
        held = [
            value
            for state in optimizer.state_dict()["state"].values()
            for name, value in state.items()
            if name.startswith(("block.factor", "block.basis", "block.scale"))
        ]
        assert {value.device for value in held} == {device}
        sizes.append(sum(value.numel() * value.element_size() for value in held))
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_is_not_finite_changes_nothing(
    method: str, fisher: str, value: float, device: torch.device, no_waiting: NoWaiting
) -> None:
    model = network("convolutional", device)
    optimizer = build(method, model, fisher=fisher, weight_decay=0.1)
    data = batches("convolutional", device, range(4))
    train(model, optimizer, data[:2])
    before = dict(learnt(model, optimizer))
    # One with factors due, and one with the rescaling.
    spoilt = [(x.clone().fill_(value), y) for x, y in data[2:]]
    with no_waiting():
        train(model, optimizer, spoilt)
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert optimizer.counters["skipped_steps"] == 2
    for name, each in learnt(model, optimizer):
        assert torch.equal(each, before[name]), name


def adapted(where: torch.device) -> list[float]:
    """Ratios that damping went by, and the last one that it came to."""
    model = network("convolutional", where)
    rule = tekfac.AdaptiveDamping(every=2)
    optimizer = build("TEKFAC", model, fisher="exact", rms_clip=None, damping=rule)
    ratios: list[float] = []
    drawn: list[float] = []
    for x, y in batches("convolutional", where, range(4)):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            drawn.append(torch.rand(1, device=where).item())
            return loss

        optimizer.step(closure)
        ratios.append(optimizer.reduction_ratio)
    if where.type != "twin":
        # In every second step it is called twice, with the same random numbers.
        assert drawn[1] == drawn[2]
        assert len(set(drawn)) == 4
    assert model[1].num_batches_tracked == 4
    return [*ratios[1:], optimizer.param_groups[0]["damping"].ratio]


def test_adaptive_damping(device: torch.device) -> None:
    """The same comparisons as on the CPU; the device's generator and buffers are left alone."""
    found = adapted(device)
    assert found == pytest.approx(adapted(torch.device("cpu")), rel=1e-2)
    assert found[-1] != 0.3


def test_a_generator_on_the_device(device: torch.device, no_waiting: NoWaiting) -> None:
    if device.type == "twin":
        pytest.skip("there is no generator on a device that is not there")
    model = network("convolutional", device)
    generator = torch.Generator(device).manual_seed(0)
    optimizer = build("TEKFAC", model, generator=generator)
    data = batches("convolutional", device, range(4))
    train(model, optimizer, data[:1])
    with no_waiting():
        train(model, optimizer, data[1:])
    other = network("convolutional", device)
    resumed = build("TEKFAC", other, generator=torch.Generator(device))
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.fisher.generator.get_state(), generator.get_state())


def test_a_compiled_network(device: torch.device) -> None:
    if device.type == "twin":
        pytest.skip("there is no compiler for a device that is not there")
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    found = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend=backend)):
        model = network("convolutional", device)
        optimizer = build("TEKFAC", model, basis_every=4)
        forward = wrap(model)
        losses = []
        for x, y in batches("convolutional", device, range(6)):
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().cpu())
        found.append(torch.stack(losses))
        optimizer.close()
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=2e-4)
