"""What the theory says of the four approximations, checked on the package's own blocks."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
import tekfac
from harness import (
    METHODS,
    NETWORKS,
    RESCALED,
    TOLERANCE,
    TRACED,
    SideBySide,
    batch,
    mlp,
    relative,
)
from reference import Trace
from tekfac.curvature.blocks import Block

ROUNDING = 1e-10
FISHERS = ["empirical", "exact"]


class Transposed(nn.Module):
    """From ``(N, T, classes)`` to the ``(N, classes, T)`` of `F.cross_entropy`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


KINDS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (mlp(), torch.randn(6, 5)),
    "tokens": lambda: (
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), Transposed()),
        torch.randn(6, 4, 5),
    ),
    "conv1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2), nn.Tanh(), nn.Conv1d(4, 3, 2)),
        torch.randn(6, 2, 8),
    ),
    "conv2d": lambda: (NETWORKS["pooled"](), torch.randn(6, 2, 6, 6)),
    "grouped": lambda: (NETWORKS["flattened"](), torch.randn(6, 2, 6, 6)),
    "conv3d": lambda: (
        nn.Sequential(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        torch.randn(6, 2, 3, 3, 3),
    ),
}


@functools.cache
def measured(
    kind: str, method: str, fisher: str = "exact"
) -> tuple[SideBySide, dict[str, list[reference.Batch]]]:
    """Blocks after one batch of a network of this kind, and the batch example by example.

    Nothing moves, as the learning rate is zero; so that several tests may look at the same.
    """
    torch.manual_seed(5)
    model, x = KINDS[kind]()
    model, x = model.double(), x.double()
    y = torch.randint(3, (len(x), *model(x).shape[2:]))
    pair = SideBySide(model, method, fisher=fisher, lr=0.0).step(x, y)
    return pair, reference.measure(pair.slow.model, x, y, pair.draws)


def true_block(groups: list[reference.Batch]) -> Tensor:
    return torch.block_diag(*(group.fisher for group in groups))


# -- traces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", RESCALED)
def test_rescaling_sums_to_the_trace_of_fisher(method: str, kind: str, fisher: str) -> None:
    """``sum(S) = sum(Λ) = E‖D‖² = tr F``, whatever the layer."""
    pair, truth = measured(kind, method, fisher)
    for name, block in pair.fast.blocks.items():
        norms = sum(
            float((g.weight * g.gradients.square().sum((1, 2))).sum()) / g.terms
            for g in truth[name]
        )
        assert norms == pytest.approx(float(true_block(truth[name]).trace()), rel=ROUNDING)
        assert float(block.eigenvalues.sum()) == pytest.approx(norms, rel=ROUNDING)
        assert block.trace == pytest.approx(norms, rel=ROUNDING)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_tkfac_keeps_its_trace(kind: str, fisher: str) -> None:
    """``tr(δ Φ ⊗ Ψ) = δ = E[tr Ω tr Γ]``, which is ``tr F`` with one position."""
    pair, truth = measured(kind, "TKFAC", fisher)
    for name, block in pair.fast.blocks.items():
        delta = 0.0
        for group in truth[name]:
            tr_omega, tr_gamma = (torch.einsum("nii->n", m) for m in (group.omega, group.gamma))
            delta += float((tr_omega * tr_gamma).sum()) / group.terms
        assert block.trace == pytest.approx(delta, rel=ROUNDING)
        assert float(block.dense().trace()) == pytest.approx(delta, rel=ROUNDING)
        if truth[name][0].inputs.shape[1] == 1:
            assert delta == pytest.approx(float(true_block(truth[name]).trace()), rel=ROUNDING)


def test_kfac_keeps_the_trace_only_of_uncorrelated_norms() -> None:
    torch.manual_seed(5)
    x, y = batch("mlp", 6)
    for inputs, kept in ((F.normalize(x), True), (x, False)):
        model = nn.Sequential(nn.Linear(5, 3)).double()
        pair = SideBySide(model, "KFAC", lr=0.0).step(inputs, y)
        truth = reference.measure(pair.slow.model, inputs, y, pair.draws)["0"]
        error = abs(pair.fast.blocks["0"].trace / float(true_block(truth).trace()) - 1)
        assert (error < ROUNDING) == kept


# -- nearness to F ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rescaled", "plain"), [("EKFAC", "KFAC"), ("TEKFAC", "TKFAC")])
def test_theorem_3_1(rescaled: str, plain: str, kind: str, fisher: str) -> None:
    """The rescaling is the best diagonal in its basis: ``‖F − F_TEKFAC‖ ≤ ‖F − F_TKFAC‖``."""
    near, truth = measured(kind, rescaled, fisher)
    far, _ = measured(kind, plain, fisher)
    for name in truth:
        block = true_block(truth[name])
        distance = {
            method: float((pair.fast.blocks[name].dense() - block).norm())
            for method, pair in ((rescaled, near), (plain, far))
        }
        assert distance[rescaled] < distance[plain]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", RESCALED)
def test_the_rescaling_is_the_diagonal_of_fisher_in_the_basis(method: str, kind: str) -> None:
    """The error of the best diagonal is orthogonal to the block: ``⟨F − F̂, F̂⟩ = 0``."""
    pair, truth = measured(kind, method)
    for name, block in pair.fast.blocks.items():
        dense = block.dense()
        error = true_block(truth[name]) - dense
        assert abs(float((error * dense).sum())) < ROUNDING * float(dense.square().sum())


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_one_example_with_one_position_is_exact(method: str, fisher: str) -> None:
    torch.manual_seed(5)
    x, y = batch("mlp", 1)
    pair = SideBySide(mlp(), method, fisher=fisher, lr=0.0).step(x, y)
    truth = reference.measure(pair.slow.model, x, y, pair.draws)
    for name, block in pair.fast.blocks.items():
        assert relative(block.dense(), true_block(truth[name])) < ROUNDING


@pytest.mark.parametrize("fisher", FISHERS)
def test_tkfac_factors_are_the_partial_traces_of_fisher(fisher: str) -> None:
    """``δΦ = E[DᵀD]`` and ``δΨ = E[DDᵀ]`` with one position."""
    pair, truth = measured("linear", "TKFAC", fisher)
    for name, block in pair.fast.blocks.items():
        (group,) = truth[name]
        d, examples = group.gradients, group.terms
        over_outputs = torch.einsum("m,mki,mkj->ij", group.weight, d, d) / examples
        over_inputs = torch.einsum("m,mik,mjk->ij", group.weight, d, d) / examples
        # δΦ and δΨ are what is left of δ Ψ ⊗ Φ when the other factor is traced out.
        four = block.dense().reshape(*block.shape, *block.shape)
        assert relative(torch.einsum("kikj->ij", four), over_outputs) < ROUNDING
        assert relative(torch.einsum("ikjk->ij", four), over_inputs) < ROUNDING


@pytest.mark.parametrize("method", METHODS)
def test_a_fisher_block_of_ones_preconditions_by_nothing(method: str) -> None:
    """Orthonormal inputs and a unit Gaussian: ``F = I``, and so is its inverse without damping.

    The Gaussian has 12 terms here, three entries of four examples.
    """
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x = math.sqrt(12) * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    optimizer = getattr(tekfac, method)(
        model, lr=1e-3, momentum=0.0, fisher="exact", likelihood="gaussian", damping=1e-30,
        rms_clip=None,
    )  # fmt: skip
    before = model[0].weight.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert relative(before - model[0].weight, 1e-3 * model[0].weight.grad) < ROUNDING
    v = torch.randn(3, 4, dtype=torch.float64)
    assert relative(optimizer.blocks["0"].inverse_matvec(v), v) < ROUNDING


# -- what must not matter --------------------------------------------------------------------------


def blocks_of(
    network: str,
    method: str,
    fisher: str,
    train: Callable[[nn.Module, tekfac.NaturalGradient], None],
    **options: object,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Blocks and parameters of a fixed network after what ``train`` does and one step."""
    torch.manual_seed(7)
    model = NETWORKS[network]()
    optimizer = getattr(tekfac, method)(
        model, lr=0.1, momentum=0.0, fisher=fisher, damping=1e-2, **options
    )
    train(model, optimizer)
    optimizer.step()
    dense = {name: block.dense() for name, block in optimizer.blocks.items()}
    return dense, {name: p.detach().contiguous() for name, p in model.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative(found[name], expected[name]) < ROUNDING, name


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches(method: str, network: str, fisher: str) -> None:
    torch.manual_seed(2)
    x, y = batch(network, 6)

    def at_once(model: nn.Module, _: object) -> None:
        F.cross_entropy(model(x), y).backward()

    def in_parts(sizes: tuple[int, ...], model: nn.Module, _: object) -> None:
        for part, labels in zip(x.split(sizes), y.split(sizes), strict=True):
            (F.cross_entropy(model(part), labels) * len(part) / len(x)).backward()

    def forward_first(sizes: tuple[int, ...], model: nn.Module, _: object) -> None:
        """All forward passes, then one backward pass through all of them."""
        losses = [
            F.cross_entropy(model(part), labels, reduction="sum")
            for part, labels in zip(x.split(sizes), y.split(sizes), strict=True)
        ]
        (sum(losses) / len(x)).backward()

    whole = blocks_of(network, method, fisher, at_once)
    for sizes, train in itertools.product(((3, 3), (1, 4, 1)), (in_parts, forward_first)):
        found = blocks_of(network, method, fisher, functools.partial(train, sizes))
        for each, expected in zip(found, whole, strict=True):
            assert_equal(each, expected)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_over_several_steps(method: str, fisher: str) -> None:
    """Also where a step refreshes the basis, takes only one kind of statistics, or none."""
    torch.manual_seed(2)
    batches = [replay_batch("small_convolution") for _ in range(6)]
    every = {"factor_every": 2, "basis_every": 4}
    if method in RESCALED:
        every["scale_every"] = 3
    found = []
    for sizes in ((20,), (4, 16), (7, 7, 6)):
        torch.manual_seed(7)
        model = small_convolution()
        optimizer = getattr(tekfac, method)(model, lr=0.05, damping=0.1, fisher=fisher, **every)
        for x, y in batches:
            optimizer.zero_grad()
            for part, labels in zip(x.split(sizes), y.split(sizes), strict=True):
                (F.cross_entropy(model(part), labels) * len(part) / len(x)).backward()
            optimizer.step()
        found.append({name: p.detach() for name, p in model.named_parameters()})
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@pytest.mark.parametrize("fisher", ["mc", *FISHERS])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_reduction(method: str, network: str, fisher: str) -> None:
    """Neither a factor of N nor one of N² comes with the user's ``reduction``."""
    torch.manual_seed(2)
    x, y = batch(network, 6)
    found = {
        reduction: blocks_of(
            network,
            method,
            fisher,
            lambda model, _, reduction=reduction: F.cross_entropy(
                model(x), y, reduction=reduction
            ).backward(),
            loss_reduction=reduction,
        )[0]
        for reduction in ("mean", "sum")
    }
    assert_equal(found["sum"], found["mean"])


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_loss_scale_and_shape_do_not_matter_to_the_model_fisher(fisher: str) -> None:
    """Another loss, of another size, on the same output: the same F."""
    torch.manual_seed(2)
    x, y = batch("mlp", 6)
    plain, other = (
        blocks_of("mlp", "TEKFAC", fisher, train)[0]
        for train in (
            lambda model, _: F.cross_entropy(model(x), y).backward(),
            lambda model, _: (1e3 * F.multi_margin_loss(model(x), y, margin=9.0)).backward(),
        )
    )
    assert_equal(other, plain)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("network", ["flattened", "pooled"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_format(method: str, network: str, fisher: str) -> None:
    torch.manual_seed(2)
    x, y = batch(network, 6)

    def plain(model: nn.Module, _: object) -> None:
        F.cross_entropy(model(x), y).backward()

    def channels_last(model: nn.Module, _: object) -> None:
        model.to(memory_format=torch.channels_last)
        F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y).backward()
        assert not model[0].weight.is_contiguous()

    for found, expected in zip(
        blocks_of(network, method, fisher, channels_last),
        blocks_of(network, method, fisher, plain),
        strict=True,
    ):
        assert_equal(found, expected)


# -- over time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "small_convolution"])
@pytest.mark.parametrize("method", RESCALED)
def test_carrying_the_rescaling_over(method: str, network: str) -> None:
    """At a refresh without new rescaling: ``Λ' = (R_out∘R_out)ᵀ Λ (R_in∘R_in)``, ``R = Uᵀ U'``."""
    pair = replayed(method, network, steps=2, factor_every=1, scale_every=5, basis_every=2)
    old = {name: diagonal_blocks(block) for name, block in pair.fast.blocks.items()}
    bases = {name: [bases_of(b) for b in blocks] for name, blocks in pair.slow.blocks.items()}
    pair.step(*replay_batch(network))
    for name, block in pair.fast.blocks.items():
        for group, found in enumerate(diagonal_blocks(block)):
            u_in, u_out = bases[name][group]
            new_in, new_out = bases_of(pair.slow.blocks[name][group])
            r_in, r_out = u_in.T @ new_in, u_out.T @ new_out
            assert r_in.square().max(1).values.min() < 1 - 1e-6  # the basis has turned

            basis = torch.kron(u_out, u_in)
            scale = (basis.T @ old[name][group] @ basis).diagonal()
            carried = r_out.square().T @ scale.reshape(len(u_out), len(u_in)) @ r_in.square()
            new = torch.kron(new_out, new_in)
            assert relative(found, new @ torch.diag(carried.flatten()) @ new.T) < TOLERANCE
            # It is the diagonal, in the new basis, of the old matrix, and keeps its trace.
            diagonal = (new.T @ old[name][group] @ new).diagonal()
            assert relative(carried.flatten(), diagonal) < ROUNDING
            assert float(found.trace()) == pytest.approx(float(scale.sum()), rel=ROUNDING)


def diagonal_blocks(block: Block) -> list[Tensor]:
    """A layer's block, group by group."""
    dense = block.dense()
    size = len(dense) // block.groups
    return [dense[i : i + size, i : i + size] for i in range(0, len(dense), size)]


def bases_of(block: reference.Block) -> tuple[Tensor, Tensor]:
    u_in, u_out = (torch.linalg.eigh(factor).eigenvectors for factor in block.spectra)
    return u_in, u_out


def small_convolution() -> nn.Sequential:
    """Few enough inputs that no factor of a batch of 20 has an arbitrary basis of a null space."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 2, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(8, 3),
    ).double()  # fmt: skip


def replay_batch(network: str) -> tuple[Tensor, Tensor]:
    examples = 20
    shape = (5,) if network == "mlp" else (2, 5, 5)
    return torch.randn(examples, *shape).double(), torch.randint(3, (examples,))


def replayed(method: str, network: str, steps: int, **options: object) -> SideBySide:
    torch.manual_seed(11)
    model = mlp() if network == "mlp" else small_convolution()
    pair = SideBySide(
        model,
        method,
        **{"lr": 0.05, "damping": 0.1, "factor_decay": 0.7, **options},
    )
    for _ in range(steps):
        pair.step(*replay_batch(network))
    return pair


INTERVALS = [(1, 1, 1), (1, 1, 3), (2, 3, 4), (3, 2, 2), (2, 1, 3)]


# All intervals with each method, the two networks in turns.
@pytest.mark.parametrize(
    ("method", "network", "every"),
    [
        (method, ("mlp", "small_convolution")[(i + j) % 2], every)
        for i, method in enumerate(METHODS)
        for j, every in enumerate(INTERVALS)
    ],
    ids=str,
)
def test_replay(method: str, network: str, every: tuple[int, int, int]) -> None:
    """Several steps, with intervals that meet in all ways, follow the reference."""
    options: dict[str, object] = {"factor_every": every[0], "basis_every": every[2]}
    if method in RESCALED:
        options |= {"scale_every": every[1], "scale_decay": 0.6}
    # One label per example, not three.
    options["fisher"] = "empirical"
    pair = replayed(method, network, steps=1, **options)
    for _ in range(6):
        pair.step(*replay_batch(network))
        pair.check_parameters()
        pair.check_blocks()


@pytest.mark.parametrize("method", TRACED)
def test_replay_with_trace_damping_and_automatic_scale(method: str) -> None:
    """λ and β follow the running traces."""
    pair = replayed(
        method,
        "small_convolution",
        steps=5,
        damping=Trace(1e-2),
        fc_scale="auto",
        factor_every=2,
        basis_every=3,
    )
    pair.check_parameters()
    pair.check_blocks()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_replay_with_momentum_and_decay(method: str, nesterov: bool) -> None:
    pair = replayed(method, "mlp", steps=5, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    pair.check_parameters()


def test_running_averages_keep_the_trace_of_the_factors_at_one() -> None:
    """``tr(δ Φ ⊗ Ψ) = δ`` after any number of batches of very different size."""
    torch.manual_seed(11)
    pair = SideBySide(mlp(), "TKFAC", lr=0.0, factor_decay=0.5)
    deltas = []
    for size in (1.0, 10.0, 0.1):
        x, y = replay_batch("mlp")
        pair.step(x * size, y)
        block = pair.fast.blocks["0"]
        assert float(block.dense().trace()) == pytest.approx(block.trace, rel=ROUNDING)
        deltas.append(block.trace)
    assert all(a != b for a, b in pairwise(deltas))
