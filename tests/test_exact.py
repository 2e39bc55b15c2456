"""The first step of each method against dense solves with the blocks of `reference`."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
import tekfac
from harness import (
    CONVOLUTIONAL,
    METHODS,
    NETWORKS,
    RESCALED,
    TOLERANCE,
    TRACED,
    SideBySide,
    batch,
    relative,
)
from reference import Factored, Relative, Trace

FISHERS = ["empirical", "exact"]
# One ν that every trace is above, and one that none is.
TRACE_DAMPINGS = [Trace(1e-6), Trace(1e3)]


def problem(network: str, bias: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return NETWORKS[network](bias), batch(network, 6)


@functools.cache
def measured(network: str, bias: bool, fisher: str) -> dict[str, list[reference.Batch]]:
    """What is measured in the first step, whatever the method makes of it."""
    model, (x, y) = problem(network, bias)
    empirical = reference.empirical(F.cross_entropy)
    draws = {"exact": reference.categorical, "empirical": empirical}[fisher]
    return reference.measure(model, x, y, draws)


def first_step(
    network: str, method: str, *, bias: bool = True, fisher: str = "exact", **options: object
) -> SideBySide:
    model, data = problem(network, bias)
    pair = SideBySide(model, method, fisher=fisher, **options)
    return pair.step(*data, measured(network, bias, fisher))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_constant_damping(method: str, network: str, fisher: str, bias: bool) -> None:
    first_step(network, method, fisher=fisher, bias=bias, damping=1e-2).check_parameters()


@pytest.mark.parametrize("damping", [1e-8, 10.0])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_extreme_damping(method: str, network: str, damping: float) -> None:
    first_step(network, method, damping=damping).check_parameters()


@pytest.mark.parametrize("damping", TRACE_DAMPINGS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", TRACED)
def test_trace_damping(method: str, network: str, fisher: str, bias: bool, damping: Trace) -> None:
    first_step(network, method, fisher=fisher, bias=bias, damping=damping).check_parameters()


@pytest.mark.parametrize("damping", [Factored(1e-6), Factored(1e-2), Factored(10.0)], ids=str)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_factored_damping(method: str, network: str, fisher: str, damping: Factored) -> None:
    pair = first_step(network, method, fisher=fisher, damping=damping)
    pair.check_parameters()
    for name, block in pair.fast.blocks.items():
        damped = torch.block_diag(*pair.slow.damped(name))
        assert block.damping == pytest.approx(damping.damping)
        assert relative(block.dense(damped=True), damped) < TOLERANCE
    # Changed, it holds at once, with the same statistics.
    pair.slow.damping = Factored(0.3)
    pair.fast.param_groups[0]["damping"] = tekfac.FactoredDamping(0.3)
    for name, block in pair.fast.blocks.items():
        damped = torch.block_diag(*pair.slow.damped(name))
        assert relative(block.dense(damped=True), damped) < TOLERANCE


def test_factored_damping_is_what_methods_without_rescaling_have_anyway() -> None:
    for method in ("KFAC", "TKFAC"):
        number, rule = (first_step("pooled", method, damping=d) for d in (1e-2, Factored(1e-2)))
        for p, q in zip(number.model.parameters(), rule.model.parameters(), strict=True):
            assert torch.equal(p, q)


def with_long_rows(network: str) -> nn.Module:
    """A first layer whose weight's rows are far longer than 1, and others that are shorter."""
    torch.manual_seed(3)
    model = NETWORKS[network]()
    layers = [module for module in model if hasattr(module, "weight")]
    with torch.no_grad():
        for layer, norm in zip(layers, [3.0, 0.5, 1.5, 0.1], strict=False):
            layer.weight.mul_(norm / layer.weight.flatten(1).norm(dim=1).mean())
    return model


@pytest.mark.parametrize("damping", [Relative(1e-6), Relative(1e-2), Relative(10.0)], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_relative_damping(method: str, network: str, damping: Relative) -> None:
    pair = SideBySide(with_long_rows(network), method, damping=damping).step(*batch(network, 6))
    pair.check_parameters()
    pair.check_blocks()
    dampings = [block.damping for block in pair.fast.blocks.values()]
    assert min(dampings) < 0.2 * damping.damping
    assert max(dampings) == pytest.approx(damping.damping)


@pytest.mark.parametrize("method", METHODS)
def test_relative_damping_stays_as_it_is_between_statistics(method: str) -> None:
    every = {"factor_every": 3, "basis_every": 3} | (
        {"scale_every": 3} if method in RESCALED else {}
    )
    pair = SideBySide(with_long_rows("pooled"), method, damping=Relative(0.1), lr=0.05, **every)
    for _ in range(5):
        pair.step(*batch("pooled", 6))
        pair.check_parameters()
        pair.check_blocks()


@pytest.mark.parametrize("method", METHODS)
def test_relative_damping_leaves_relative_steps_as_they_are(method: str) -> None:
    """In front of a norm layer a weight ``c`` times as long takes steps ``c`` times as long."""
    steps = []
    for scale in (1.0, 7.0):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-12), nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 3),
        ).double()  # fmt: skip
        weight = model[0].weight
        with torch.no_grad():
            weight.mul_(3 * scale / weight.flatten(1).norm(dim=1).mean())
        before = weight.detach().clone()
        damping = tekfac.RelativeDamping(0.03)
        optimizer = getattr(tekfac, method)(
            model, lr=0.1, damping=damping, fisher="exact", rms_clip=None
        )
        x, y = batch("pooled", 6)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        steps.append((weight.detach() - before) / scale)
        # Damping and curvature both have a say.
        values = optimizer.blocks["0"].eigenvalues
        assert values.max() > optimizer.blocks["0"].damping > values.min()
    assert relative(steps[1], steps[0]) < TOLERANCE


def test_layers_that_start_from_zero_can_leave_it() -> None:
    torch.manual_seed(3)
    model = NETWORKS["mlp"]()
    nn.init.zeros_(model[-1].weight)
    optimizer = tekfac.TEKFAC(model, damping=tekfac.RelativeDamping(1e-2))
    x, y = batch("mlp", 6)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.blocks["4"].damping == pytest.approx(1e-2)
    assert model[-1].weight.abs().min() > 0


@pytest.mark.parametrize("damping", [1e-2, Trace(1e-2), Factored(1e-2)], ids=str)
@pytest.mark.parametrize("fc_scale", [3.0, 0.5, "auto"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", TRACED)
def test_fully_connected_scale(
    method: str, network: str, fc_scale: float | str, damping: float | Trace | Factored
) -> None:
    torch.manual_seed(3)
    model = NETWORKS[network]()
    with torch.no_grad():
        # A steep last layer gives the layers below it traces larger than its own: β > 1.
        model[-1].weight.mul_(8.0)
    pair = SideBySide(model, method, damping=damping, fc_scale=fc_scale).step(*batch(network, 6))
    pair.check_parameters()
    pair.check_blocks()
    betas = {name: pair.slow.beta(name) for name in pair.slow.blocks}
    if network == "mlp":
        assert set(betas.values()) == {1.0}
    elif fc_scale == "auto":
        assert max(betas.values()) > 3.0


class Attentive(nn.Module):
    """Convolutions with a layer of tokens among them, as a diffusion model's attention is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3)
        self.tokens, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh())
        tokens = x.flatten(2).mT
        # Far smaller a trace than the convolutions': nearly all goes past it.
        x = tokens + 1e-3 * self.tokens(tokens)
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.mark.parametrize("method", TRACED)
def test_scale_is_the_ends_alone(method: str) -> None:
    """β is for what follows convolutions, not for layers of positions among them."""
    torch.manual_seed(0)
    model = Attentive().double()
    with torch.no_grad():
        model.head.weight.mul_(8.0)
    x, y = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randint(4, (5,))
    optimizer = getattr(tekfac, method)(model, lr=0, fisher="exact")
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

    def trace(layer: nn.Module) -> float:
        total = 0.0
        for example in x:
            log_p = model(example[None]).log_softmax(1)[0]
            for one in log_p:
                grads = torch.autograd.grad(one, [*layer.parameters()], retain_graph=True)
                total += one.exp().item() * sum(grad.square().sum().item() for grad in grads)
        return total / len(x)

    mean = (trace(model.first) + trace(model.second)) / 2
    assert mean / trace(model.tokens) > 100
    assert float(optimizer.blocks["tokens"].fc_scale) == 1
    if method == "TEKFAC":  # whose traces are exact
        expected = mean / trace(model.head)
        assert expected > 1.5
        assert float(optimizer.blocks["head"].fc_scale) == pytest.approx(expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_blocks(method: str, network: str, bias: bool) -> None:
    pair = first_step(network, method, bias=bias)
    pair.check_blocks()
    for name, block in pair.fast.blocks.items():
        layer = pair.slow.layers[name]
        inputs = layer.weight[0].numel() + bias
        assert block.name == name
        assert block.shape == (len(layer.weight), inputs)
        assert block.groups == len(pair.slow.blocks[name])

        dense = pair.slow.dense(name)
        assert block.eigenvalues.shape == block.shape
        expected = torch.linalg.eigvalsh(dense)
        assert relative(block.eigenvalues.flatten().sort().values, expected) < TOLERANCE

        damped = torch.block_diag(*pair.slow.damped(name))
        v = torch.randn(len(dense), dtype=torch.float64)
        assert relative(block.matvec(v), dense @ v) < TOLERANCE
        assert relative(block.inverse_matvec(v), torch.linalg.solve(damped, v)) < TOLERANCE
        for apply in (block.matvec, block.inverse_matvec):
            assert torch.equal(apply(v.reshape(block.shape)), apply(v).reshape(block.shape))


POWERS = [1.0, 0.75, 0.5]
POWER_DAMPINGS = [1e-2, Factored(1e-3), Relative(1e-3)]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("damping", [1e-6, *POWER_DAMPINGS], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_power(method: str, network: str, damping: object, power: float) -> None:
    """Steps and products against the power of the dense damped matrix."""
    pair = first_step(network, method, damping=damping, power=power)
    pair.check_parameters()
    for name, block in pair.fast.blocks.items():
        damped = torch.block_diag(*pair.slow.damped(name))
        v = torch.randn(len(damped), dtype=torch.float64)
        expected = reference.divided(damped, v, power)
        assert relative(block.inverse_matvec(v), expected) < TOLERANCE
        assert relative(block.inverse_matvec(v.reshape(block.shape)).flatten(), expected) < (
            TOLERANCE
        )
        assert relative(block.dense(damped=True), damped) < TOLERANCE  # not of the power


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("damping", TRACE_DAMPINGS, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", TRACED)
def test_power_with_trace_damping(method: str, network: str, damping: Trace, power: float) -> None:
    first_step(network, method, damping=damping, power=power).check_parameters()


@pytest.mark.parametrize("method", ["KFAC", "TKFAC"])
def test_power_of_factors(method: str) -> None:
    """Of a Kronecker product it is the product of the damped factors' powers."""
    pair = first_step("mlp", method, damping=1e-2, power=0.5)
    for name, (block,) in pair.slow.blocks.items():
        a, g = block.pair
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        v = torch.randn(len(g), len(a), dtype=torch.float64)
        roots = []
        for factor, more in ((g, 0.1 / pi), (a, 0.1 * pi)):
            values, vectors = torch.linalg.eigh(factor + more * torch.eye(len(factor)))
            roots.append(vectors @ torch.diag(values**-0.5) @ vectors.T)
        expected = roots[0] @ v @ roots[1]
        assert relative(pair.fast.blocks[name].inverse_matvec(v), expected) < TOLERANCE


@pytest.mark.parametrize("network", CONVOLUTIONAL)
@pytest.mark.parametrize("method", METHODS)
def test_gaussian_convolutions_are_not_a_special_case(method: str, network: str) -> None:
    """Regression in a convolutional network: another likelihood, another loss, the same rules."""
    torch.manual_seed(3)
    x, _ = batch(network, 5)
    SideBySide(
        NETWORKS[network](),
        method,
        loss=lambda out, y: (out - y).square().sum(1).mean(),
        draws=reference.gaussian(0.5),
        likelihood=tekfac.Gaussian(variance=0.5),
    ).step(x, torch.randn(5, 3, dtype=torch.float64)).check_parameters()
