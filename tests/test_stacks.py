"""Blocks of one shape preconditioned together: as each by itself, in fewer operations."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tekfac
from harness import METHODS, TRACED
from tekfac.curvature import approximation


def network(depth: int = 3, width: int = 4) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=2), nn.Tanh()]
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * width, 3)).double()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    while True:
        x = torch.randn(60, 4, 3, 3, generator=generator, dtype=torch.float64)
        yield x, torch.randint(3, (60,), generator=generator)


def train(optimizer: Any, steps: int, skip: int = 0) -> list[Tensor]:
    for number, (x, y) in zip(range(skip + steps), batches(), strict=False):
        if number >= skip:
            optimizer.zero_grad()
            F.cross_entropy(optimizer.model(x), y).backward()
            optimizer.step()
    return list(optimizer.model.parameters())


def build(method: str, model: nn.Module, **options: Any) -> Any:
    # What rounding does differently in a stack grows where steps are orthogonalized.
    own = {"factor_every": 2, "basis_every": 4, "orthogonalize": False, **options}
    return getattr(tekfac, method)(model, lr=0.05, fisher="empirical", **own)


def bases(optimizer: Any) -> list[Tensor]:
    return [block.basis.input for block in optimizer.blocks.values()]


def storages(tensors: list[Tensor]) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


def check_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"power": 0.5}, {"kl_clip": 1e-3}, {"orthogonalize": True}, {"storage": torch.float32}],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_each_by_itself(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = network()
    stacked = build(method, copy.deepcopy(model), **options)
    found = train(stacked, 7)
    # Two kinds of convolutions, and the last layer.
    assert storages(bases(stacked)) == 3
    monkeypatch.setattr(approximation, "STACKED", 0)
    alone = build(method, model, **options)
    expected = train(alone, 7)
    assert storages(bases(alone)) == 7
    check_near(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_their_own(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block has its group's learning rate and damping, and follows their changes."""

    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        model = network()
        rule: Any = tekfac.TraceDamping(0.1) if method in TRACED else tekfac.FactoredDamping(0.1)
        groups = [
            {"params": model[0].parameters(), "lr": 0.2},
            {"params": model[2].parameters(), "damping": 1.0, "power": 0.5},
            {"params": model[4].parameters(), "damping": rule},
            {"params": [p for layer in list(model)[5:] for p in layer.parameters()]},
        ]
        optimizer = build(method, model, params=groups, interval_warmup=False)
        train(optimizer, 2)
        optimizer.param_groups[1]["damping"] = tekfac.FactoredDamping(0.3)
        optimizer.param_groups[2]["damping"] = tekfac.RelativeDamping(0.3)
        return train(optimizer, 3, skip=2)

    found = trained()
    monkeypatch.setattr(approximation, "STACKED", 0)
    check_near(found, trained())


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_come_and_go(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer frozen for a while leaves its stack and comes back."""

    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        model = network()
        optimizer = build(method, model)
        train(optimizer, 3)
        model[0].requires_grad_(False)
        train(optimizer, 3, skip=3)
        model[0].requires_grad_(True)
        return train(optimizer, 3, skip=6)

    found = trained()
    monkeypatch.setattr(approximation, "STACKED", 0)
    check_near(found, trained())


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_run_goes_on_from_a_state_or_a_copy(how: str) -> None:
    torch.manual_seed(0)
    optimizer = build("TEKFAC", network())
    train(optimizer, 3)
    if how == "state_dict":
        other = build("TEKFAC", copy.deepcopy(optimizer.model))
        other.load_state_dict(optimizer.state_dict())
    elif how == "deepcopy":
        other = copy.deepcopy(optimizer)
    else:
        other = pickle.loads(pickle.dumps(optimizer))
    assert storages(bases(other)) == 7
    expected = [p.clone() for p in train(optimizer, 4, skip=3)]
    for p, q in zip(train(other, 4, skip=3), expected, strict=True):
        assert torch.equal(p, q)


def test_a_pickle_holds_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for limit in (approximation.STACKED, 0):
        monkeypatch.setattr(approximation, "STACKED", limit)
        torch.manual_seed(0)
        optimizer = build("TEKFAC", network())
        train(optimizer, 1)
        sizes.append(len(pickle.dumps(optimizer)))
    assert sizes[0] < 1.01 * sizes[1]


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_products_do_not_grow_with_the_number_of_equal_layers(method: str) -> None:
    products = []
    for depth in (2, 6):
        torch.manual_seed(0)
        optimizer = build(method, network(depth), interval_warmup=False)
        train(optimizer, 1)
        x, y = next(batches())
        optimizer.zero_grad()
        F.cross_entropy(optimizer.model(x), y).backward()
        with Counted() as counted:
            optimizer.step()
        products.append(counted.counts["bmm"] + counted.counts["mm"])
    # Two kinds of convolutions and the last layer; four products rotate and rotate back.
    assert products == [12, 12]


def test_large_truncated_and_special_blocks_stay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(tekfac.methods.tekfac.TEKFACBlock):
        def precondition(self, matrix: Tensor) -> Tensor:
            return super().precondition(matrix)

    class SpecialTEKFAC(tekfac.TEKFAC):
        make_block = Special

    torch.manual_seed(0)
    special = SpecialTEKFAC(network(), fisher="empirical")
    truncated = build("TEKFAC", network(), rank=4)
    for optimizer in (special, truncated):
        train(optimizer, 1)
        assert storages(bases(optimizer)) == 7
    assert truncated.blocks["0"].basis.input.shape[2] == 4
