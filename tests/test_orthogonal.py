"""Orthogonalized steps, against singular value decompositions in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reference
import tekfac
from harness import METHODS, NETWORKS, SideBySide, batch
from tekfac.optimizer import orthogonal
from tekfac.optimizer.orthogonal import orthogonalized

SHAPES = [(1, 8, 20), (3, 20, 8), (2, 16, 16), (4, 1, 9), (1, 12, 1)]


def spread(shape: tuple[int, int, int]) -> Tensor:
    """Matrices whose singular values are spread over two decades."""
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return u @ torch.diag_embed(torch.logspace(0, -2, s.shape[-1]).expand_as(s).double()) @ v


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_vectors_stay_and_singular_values_become_alike(
    shape: tuple[int, int, int], size: float
) -> None:
    torch.manual_seed(0)
    matrix = spread(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.mT @ orthogonalized({"layer": matrix * size})["layer"] @ v.mT
    values = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(values), rtol=0, atol=1e-9)
    assert (values.amax(dim=1) / values.amin(dim=1)).max() < 2
    # All the matrix: nothing is left outside its own singular vectors.
    torch.testing.assert_close(
        found.square().sum(dim=(1, 2)), torch.full((shape[0],), float(shape[1] * shape[2])).double()
    )


def test_layers_of_one_shape_are_made_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = {"a": (1, 4, 6), "b": (3, 4, 6), "c": (1, 6, 4), "d": (1, 4, 6)}
    matrices = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    calls = []
    polar = orthogonal._polar
    monkeypatch.setattr(
        orthogonal, "_polar", lambda joined: calls.append(len(joined)) or polar(joined)
    )
    found = orthogonalized(matrices)
    assert sorted(calls) == [1, 5]
    for name, matrix in matrices.items():
        torch.testing.assert_close(found[name], reference.orthogonal(matrix), rtol=1e-9, atol=1e-9)


def test_nothing_stays_nothing() -> None:
    assert not orthogonalized({"layer": torch.zeros(2, 3, 4)})["layer"].any()


@pytest.mark.parametrize("fast", [False, True])
def test_in_float32(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orthogonal, "multiplies_bfloat16", lambda device: fast)
    torch.manual_seed(0)
    matrix = spread((2, 30, 50))
    found = orthogonalized({"layer": matrix.float()})["layer"]
    expected = reference.orthogonal(matrix)
    assert found.dtype == torch.float32
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    assert error < (0.05 if fast else 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0, "rms_clip": None},
        {"momentum": 0.9, "rms_clip": 1.0},
        {"momentum": 0.9, "rms_clip": 0.2, "nesterov": True, "power": 0.5, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_against_the_reference(method: str, network: str, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    pair = SideBySide(
        NETWORKS[network](), method, orthogonalize=True, lr=1e-2, damping=reference.Mean(0.3),
        **options,
    )  # fmt: skip
    for _ in range(3):
        pair.step(*batch(network, 6))
        pair.check_parameters()


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.table(x)))
        return result


def changes(model: nn.Module, params: Any = None, **options: Any) -> dict[str, Tensor]:
    """What one step does to each parameter; ``params`` gives groups of a model."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    if params is not None:
        options["params"] = params(model)
    optimizer = tekfac.TEKFAC(model, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = torch.randint(7, (20,)), torch.randint(3, (20,))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_tables_and_first_order_parameters_move_as_before() -> None:
    torch.manual_seed(0)
    model = Tagger().double()
    plain, orthogonal = changes(model), changes(model, orthogonalize=True)
    for name in ("table.weight", "norm.weight", "norm.bias"):
        assert plain[name].any()
        assert torch.equal(plain[name], orthogonal[name]), name
    whole = torch.cat([orthogonal["head.weight"], orthogonal["head.bias"][:, None]], dim=1)
    # Three logits, whose mean no step changes: two singular values.
    first, second, third = torch.linalg.svdvals(whole)
    assert first / second < 2
    assert third < 1e-9 * first
    torch.testing.assert_close(whole.square().mean().sqrt(), torch.tensor(5e-3).double())


def test_a_group_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain, orthogonal = changes(model), changes(model, orthogonalize=True)
    mixed = changes(
        model,
        params=lambda copied: [
            {"params": [*copied[0].parameters(), *copied[3].parameters()]},
            {"params": copied[1].parameters(), "orthogonalize": True},
        ],
    )
    assert not torch.equal(plain["3.weight"], orthogonal["3.weight"])
    for name, change in mixed.items():
        expected = orthogonal if name.startswith("1") else plain
        torch.testing.assert_close(change, expected[name])


def test_states_from_before_it_go_on_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = tekfac.TEKFAC(model)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["orthogonalize"]
    other = tekfac.TEKFAC(copy.deepcopy(model), orthogonalize=True)
    other.load_state_dict(state)
    assert other.param_groups[0]["orthogonalize"] is False


def test_a_state_has_it() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    other = tekfac.TEKFAC(copy.deepcopy(model))
    other.load_state_dict(tekfac.TEKFAC(model, orthogonalize=True).state_dict())
    assert other.param_groups[0]["orthogonalize"] is True


def test_a_bound_that_it_would_undo_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    words = "^kl_clip=0.001 bounds natural gradients, of whose length orthogonalized steps keep"
    with pytest.raises(ValueError, match=words):
        tekfac.TEKFAC(model, kl_clip=1e-3, orthogonalize=True)
    optimizer = tekfac.TEKFAC(model, kl_clip=1e-3, params=[{"params": model[0].parameters()}])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": model[1].parameters(), "orthogonalize": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", ["yes", 1])
def test_it_is_true_or_false_or_none(value: Any) -> None:
    words = f"^orthogonalize must be True, False or None, got {value!r}$"
    with pytest.raises(TypeError, match=words):
        tekfac.TEKFAC(nn.Linear(4, 3), orthogonalize=value)


class Pooled(nn.Module):
    """A layer of 8×7 (with its bias) that sees tokens, and one that sees their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.tokens(x).tanh().mean(dim=1))
        return result


def pooled(number: int, **options: Any) -> tuple[Pooled, tekfac.TEKFAC]:
    """After a step on 4 examples of so many tokens."""
    torch.manual_seed(0)
    model = Pooled().double()
    optimizer = tekfac.TEKFAC(model, **options)
    one_more(model, optimizer, number)
    return model, optimizer


def one_more(model: nn.Module, optimizer: tekfac.TEKFAC, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, number, 6, generator=generator).double()
    y = torch.randint(3, (4,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def matrix_of(layer: nn.Linear) -> Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().clone()


# 5 · 7² (2 · 8 + 7) multiplications for the step, 3 · rows · 7 · 8 for the passes: a third of these
# are as many at 100.6 rows.
@pytest.mark.parametrize("clip", [0.01, 100.0])
@pytest.mark.parametrize(("number", "chosen"), [(25, False), (26, True)])
def test_where_nothing_is_said_rows_decide(number: int, chosen: bool, clip: float) -> None:
    plain, _ = pooled(number, momentum=0.4, rms_clip=clip, orthogonalize=False)
    found, _ = pooled(number, momentum=0.4, rms_clip=clip)
    assert torch.equal(found.head.weight, plain.head.weight)
    torch.manual_seed(0)
    start = matrix_of(Pooled().double().tokens)
    short, step = start - matrix_of(plain.tokens), start - matrix_of(found.tokens)
    size = short.square().mean().sqrt()
    # At most twice as long, which the higher bound allows, and no longer than the lower one.
    assert (2 * size < 5e-3 * clip) == (clip == 100.0)
    polar = reference.orthogonal(short[None])[0] * (2 * size).clamp_max(5e-3 * clip)
    torch.testing.assert_close(step, polar if chosen else short, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.1},
        {"damping": tekfac.MeanDamping(0.3)},
        {"momentum": 0.0},
        {"rms_clip": None},
        {"kl_clip": 1e-3},
        {"damping": tekfac.AgreementDamping(0.1, maximum=0.3)},
    ],
    ids=str,
)
def test_where_nothing_is_said_and_there_is_nothing_to_go_by(options: dict[str, Any]) -> None:
    found, _ = pooled(40, **options)
    expected, _ = pooled(40, orthogonalize=False, **options)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_where_nothing_is_said_and_steps_agree() -> None:
    """One batch, again and again: full batches of a loss without noise."""
    torch.manual_seed(0)
    model = Pooled().double()
    optimizer = tekfac.TEKFAC(model, basis_every=10, fisher="exact", lr=1e-4)
    block = optimizer.blocks["tokens"]
    one_more(model, optimizer, 40)
    assert block.orthogonal
    for _ in range(50):
        one_more(model, optimizer, 40)
    [group] = optimizer.param_groups
    assert group["agreement"] > 0.9
    assert group["damping"].ratio < 0.3
    assert not block.orthogonal
    group["agreement"] = 0.0
    assert not block.orthogonal, "not before damping has risen again"
    for agreement, expected in ((0.0, True), (0.4, True), (0.6, False)):
        group |= {"agreement": agreement, "damping": tekfac.AgreementDamping()}
        assert block.orthogonal == expected


def test_a_state_knows_where_nothing_was_said() -> None:
    model, optimizer = pooled(40)
    torch.manual_seed(1)
    resumed = Pooled().double()
    resumed.load_state_dict(model.state_dict())
    other = tekfac.TEKFAC(resumed)
    other.load_state_dict(optimizer.state_dict())
    assert other.blocks["tokens"].orthogonal
    for seed in (40, 41):
        one_more(model, optimizer, seed)
        one_more(resumed, other, seed)
        assert all(map(torch.equal, model.parameters(), resumed.parameters()))
