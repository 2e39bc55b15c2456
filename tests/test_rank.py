"""Wide factors by their leading eigenvectors and one remainder.

Truth is dense float64 algebra on per-example gradients, and the whole basis where nothing is lost.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from tekfac.curvature import moments
from tekfac.curvature.linalg import completed, leading, orthonormal
from tekfac.curvature.statistics import overlap

METHODS = ("KFAC", "EKFAC", "TKFAC", "TEKFAC")
RESCALED = ("EKFAC", "TEKFAC")
RANK = 8


class Tokens(nn.Module):
    """A layer from ``d_in`` to ``d_out`` on ``T`` tokens, whose mean is classified."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d_in, d_out)
        self.head = nn.Linear(d_out, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x).tanh().mean(1))
        return out


# (d_in without the bias, d_out, tokens): one side wide or both, one position or more.
SHAPES = [(39, 5, 1), (39, 5, 2), (5, 40, 1), (5, 40, 3), (26, 25, 1), (26, 25, 2)]


def problem(d_in: int, d_out: int, tokens: int, examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Tokens(d_in, d_out).double()
    x = torch.randn(examples, tokens, d_in, dtype=torch.float64)
    return model, x, torch.arange(examples) % 3


def stepped(method: str, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
    options = {"fisher": "empirical", "lr": 0.0, **options}
    optimizer = getattr(tekfac, method)(model, **options)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``D_n``, ``(N, d_out, d_in)``."""
    found = []
    for image, label in zip(x, y, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        weight, bias = torch.autograd.grad(loss, list(model.layer.parameters()))
        found.append(torch.cat([weight, bias[:, None]], 1))
    return torch.stack(found)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_lost_if_the_rank_is_enough(method: str, shape: tuple[int, int, int]) -> None:
    """Statistics of few examples have few eigenvectors: the same block, damped and not."""
    examples = 4 if shape[2] < 3 else 2
    model, x, y = problem(*shape, examples)
    cut = stepped(method, model, x, y, rank=RANK).blocks["layer"]
    whole = stepped(method, copy.deepcopy(model), x, y, rank=None).blocks["layer"]
    sides = (cut.basis.input, cut.basis.output), (whole.basis.input, whole.basis.output)
    assert [u.shape for u in sides[0]] != [u.shape for u in sides[1]]
    close(cut.dense(), whole.dense())
    close(cut.dense(damped=True), whole.dense(damped=True))
    v = torch.randn(whole.shape, dtype=torch.float64)
    close(cut.matvec(v), whole.matvec(v))
    close(cut.inverse_matvec(v), whole.inverse_matvec(v))
    assert cut.trace == pytest.approx(whole.trace)
    assert cut.damping == pytest.approx(whole.damping)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_products_are_those_of_the_dense_block(method: str, shape: tuple[int, int, int]) -> None:
    model, x, y = problem(*shape, 40)
    block = stepped(method, model, x, y, rank=RANK).blocks["layer"]
    v = torch.randn(block.shape, dtype=torch.float64)
    close(block.matvec(v).flatten(), block.dense() @ v.flatten())
    damped = block.dense(damped=True)
    close(damped @ block.inverse_matvec(v).flatten(), v.flatten())
    assert block.eigenvalues.shape == block.shape
    close(block.eigenvalues.flatten().sort()[0], torch.linalg.eigvalsh(block.dense()), 1e-6)


@pytest.mark.parametrize("power", [0.75, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_powers_are_those_of_the_dense_block(
    method: str, shape: tuple[int, int, int], power: float
) -> None:
    model, x, y = problem(*shape, 40)
    block = stepped(method, model, x, y, rank=RANK, power=power).blocks["layer"]
    v = torch.randn(block.shape, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(block.dense(damped=True))
    expected = vectors @ (values**-power * (vectors.T @ v.flatten()))
    close(block.inverse_matvec(v).flatten(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_trace_is_kept(method: str, shape: tuple[int, int, int]) -> None:
    model, x, y = problem(*shape, 40)
    cut = stepped(method, model, x, y, rank=RANK).blocks["layer"]
    whole = stepped(method, copy.deepcopy(model), x, y, rank=None).blocks["layer"]
    assert cut.trace == pytest.approx(whole.trace)
    if method in RESCALED:
        assert cut.trace == pytest.approx(float(per_example(model, x, y).square().sum()) / 40)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", RESCALED)
def test_the_rescaling_is_the_second_moment_in_the_basis(
    method: str, shape: tuple[int, int, int]
) -> None:
    """Directions beyond the rank get the mean of theirs."""
    model, x, y = problem(*shape, 40)
    block = stepped(method, model, x, y, rank=RANK).blocks["layer"]
    u_in, u_out = (completed(u)[0] for u in (block.basis.input, block.basis.output))
    expected = (u_out.T @ per_example(model, x, y) @ u_in).square().mean(0)
    if block.basis.input.shape[2] == RANK:
        expected[:, RANK:] = expected[:, RANK:].mean(1, keepdim=True)
    if block.basis.output.shape[2] == RANK:
        expected[RANK:] = expected[RANK:].mean(0, keepdim=True)
    close(block.eigenvalues, expected)


# Either side and both with each method, one position and more with each side.
@pytest.mark.parametrize(
    ("method", "shape"),
    [
        (method, SHAPES[n])
        for methods, shapes in ((("KFAC", "TEKFAC"), (0, 3, 4)), (("EKFAC", "TKFAC"), (1, 2, 5)))
        for method in methods
        for n in shapes
    ],
)
def test_every_refresh_comes_nearer_to_the_leading_eigenvectors(
    method: str, shape: tuple[int, int, int]
) -> None:
    """The same batch again and again: subspace iteration from the last basis."""
    model, x, y = problem(*shape, 40)
    every = {"factor_every": 1, "basis_every": 1, "factor_decay": 0.0}
    optimizer = getattr(tekfac, method)(model, lr=0.0, fisher="empirical", rank=RANK, **every)
    whole = stepped(method, copy.deepcopy(model), x, y, rank=None).blocks["layer"].basis
    errors = []
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        basis = optimizer.blocks["layer"].basis
        error = 0.0
        for side in ("input", "output"):
            kept, full = getattr(basis, f"{side}_values")[0], getattr(whole, f"{side}_values")[0]
            if len(kept) < len(full):
                top = full[-RANK:]
                error += float((kept[:RANK] - top).norm() / top.norm())
                rest = float(full.sum() - kept[:RANK].sum()) / (len(full) - RANK)
                assert float(kept[RANK]) == pytest.approx(rest, rel=1e-5, abs=1e-12)
        errors.append(error)
    assert errors[-1] < 1e-3
    assert errors[-1] <= errors[0] + 1e-9


def test_another_basis_carries_the_diagonal_over() -> None:
    """`overlap`: the diagonal, in the new basis, of the matrix the old one stands for."""
    torch.manual_seed(0)
    d = 12
    for kept, kept_new in ((12, 12), (4, 12), (12, 5), (4, 4), (4, 5)):
        old, new = (
            torch.linalg.qr(torch.randn(1, d, k, dtype=torch.float64)).Q for k in (kept, kept_new)
        )
        values = torch.rand(kept + (kept < d), dtype=torch.float64)
        spread = torch.cat([values[:kept], values[-1].expand(d - kept)])
        whole = completed(old)[0]
        dense = whole @ torch.diag(spread) @ whole.T
        expected = (completed(new)[0].T @ dense @ completed(new)[0]).diagonal()
        if kept_new < d:
            expected = torch.cat([expected[:kept_new], expected[kept_new:].mean()[None]])
        torch.testing.assert_close(values @ overlap(old, new)[0], expected)


@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_for_bit(method: str) -> None:
    model, x, y = problem(39, 30, 2, 12)
    options = {"rank": RANK, "factor_every": 2, "basis_every": 3, "lr": 1e-3, "fisher": "mc"}

    def train(network: nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

    optimizer = getattr(tekfac, method)(model, **options)
    train(model, optimizer, 4)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    train(model, optimizer, 5)
    saved.seek(0)
    again, _, _ = problem(39, 30, 2, 12)
    for rank in (RANK, None):  # the state's own rank goes on, whatever the new optimizer's
        states = torch.load(saved, weights_only=True)
        saved.seek(0)
        again.load_state_dict(states[0])
        fresh = getattr(tekfac, method)(again, **{**options, "rank": rank})
        fresh.load_state_dict(states[1])
        train(again, fresh, 5)
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q)
        fresh.close()


def test_a_failed_refresh_of_one_side_leaves_both(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem(39, 5, 2, 12)
    optimizer = stepped("TEKFAC", model, x, y, rank=RANK, factor_every=1, basis_every=1)
    block = optimizer.blocks["layer"]
    before = block.basis.input.clone()
    monkeypatch.setattr(moments, "eigh", lambda matrix: None)  # that of the narrow side
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(RuntimeWarning, match="no eigendecomposition of layer 'layer'"):
        optimizer.step()
    assert optimizer.counters["failed_decompositions"] == 1
    for kept in (block.basis.input, block.factors.input.probe):
        assert torch.equal(kept, before)


def test_memory_is_that_of_the_rank() -> None:
    """Nothing of the size of the whole factor is kept."""
    model, x, y = problem(199, 30, 2, 12)
    optimizer = stepped("TEKFAC", model, x, y, rank=RANK)
    state = optimizer.state_dict()["state"]
    sizes = [v.numel() for own in state.values() for v in own.values() if isinstance(v, Tensor)]
    assert max(sizes) == 30 * 199  # momentum


def test_leading_eigenvectors() -> None:
    torch.manual_seed(0)
    root = torch.randn(3, 50, 6, dtype=torch.float64)
    matrix = root @ root.mT
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        probe = orthonormal(3, 50, 10, matrix.to(dtype))
        torch.testing.assert_close(probe.mT @ probe, torch.eye(10, dtype=dtype).expand(3, -1, -1))
        found = leading(matrix.to(dtype) @ probe, probe)
        assert found is not None
        values, vectors = found
        expected = torch.linalg.eigvalsh(matrix)[:, -6:].to(dtype)
        torch.testing.assert_close(values[:, -6:], expected, rtol=tolerance, atol=0)
        rebuilt = (vectors[..., -6:] * values[:, None, -6:]) @ vectors[..., -6:].mT
        assert float((rebuilt - matrix).norm() / matrix.norm()) < tolerance
    assert leading(matrix * float("nan") @ probe.double(), probe.double()) is None
    nothing = leading(torch.zeros(1, 50, 10), orthonormal(1, 50, 10, torch.zeros(())))
    assert nothing is not None
    assert float(nothing[0].max()) < 1e-12
    assert bool(torch.isfinite(nothing[1]).all())


@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_bad_rank(value: Any) -> None:
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, got"):
        tekfac.KFAC(nn.Linear(2, 2), rank=value)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("groups", "bias"), [(1, True), (2, False)])
@pytest.mark.parametrize("method", METHODS)
def test_steps_of_a_kernel_are_the_same_however_it_is_stored(
    method: str, groups: int, bias: bool, memory: torch.memory_format
) -> None:
    """Where few eigenvectors are kept, those are put in the order of the weight's entries."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5 * groups, 25 * groups, (1, 5), groups=groups, bias=bias)
    head = nn.Linear(25 * groups, 3).requires_grad_(False)
    model = nn.Sequential(conv, nn.Flatten(), nn.Tanh(), head).double().to(memory_format=memory)
    x, y = torch.randn(3, 5 * groups, 1, 5, dtype=torch.float64), torch.arange(3)
    options: dict[str, Any] = {"momentum": 0.0, "rms_clip": None}
    whole = stepped(method, copy.deepcopy(model), x, y, rank=None, **options).blocks["0"]
    before = [p.detach().clone() for p in conv.parameters()]
    optimizer = stepped(method, model, x, y, rank=RANK, lr=0.1, **options)
    block = optimizer.blocks["0"]
    assert block.basis.input.shape[2] == RANK
    assert block.layer.as_stored == (memory == torch.contiguous_format)
    assert not whole.layer.as_stored
    if groups == 1:
        close(block.dense(damped=True), whole.dense(damped=True))

    def matrix(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(25 * groups, -1) for part in parts], 1)

    moved = [p.detach() - old for p, old in zip(conv.parameters(), before, strict=True)]
    gradient = matrix([p.grad for p in conv.parameters() if p.grad is not None])
    close(-matrix(moved) / 0.1, whole.inverse_matvec(gradient))
    v = torch.randn(block.shape, dtype=torch.float64)
    close(block.matvec(v), whole.matvec(v))
    # The order may change while training goes on, and does not belong to the state.
    state = copy.deepcopy(optimizer.state_dict())
    other = torch.contiguous_format if memory == torch.channels_last else torch.channels_last
    model.to(memory_format=other)
    close(block.matvec(v), whole.matvec(v))
    optimizer.load_state_dict(state)
    assert block.layer.as_stored == (other == torch.contiguous_format)
    close(block.matvec(v), whole.matvec(v))
