"""Which Fisher matrix, and how it is had from a training loop that stays as it is."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reference
import tekfac
from harness import METHODS, SideBySide, batch, flattened, mlp, pooled, relative

FISHERS = ["mc", "exact", "empirical"]
ROUNDING = 1e-10


def one_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    method: str = "TEKFAC",
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    **options: Any,
) -> tekfac.NaturalGradient:
    optimizer = getattr(tekfac, method)(model, **{"lr": 0.1, "damping": 1e-2, **options})
    loss(model(x), y).backward()
    optimizer.step()
    return optimizer


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_blocks(found: tekfac.NaturalGradient, expected: tekfac.NaturalGradient) -> None:
    assert found.blocks.keys() == expected.blocks.keys()
    for name, block in expected.blocks.items():
        assert torch.equal(found.blocks[name].dense(), block.dense()), name


# -- the labels ------------------------------------------------------------------------------------


def task(likelihood: str) -> tuple[Tensor, Tensor, Callable[[Any, Tensor], Tensor]]:
    torch.manual_seed(1)
    x, y = batch("mlp", 6)
    if likelihood == "categorical":
        return x, y, F.cross_entropy
    real = torch.rand(6, 3, dtype=torch.float64).round()
    loss = F.mse_loss if likelihood == "gaussian" else F.binary_cross_entropy_with_logits
    return x, real, loss


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_sampling_converges_to_the_expectation(likelihood: str) -> None:
    """The error shrinks as 1/√samples: by 4 for 16 times the samples."""
    x, y, loss = task(likelihood)

    def blocks(fisher: str, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(2)
        optimizer = one_step(
            mlp(), x, y, "KFAC", loss, fisher=fisher, likelihood=likelihood, **options
        )
        return {name: block.dense() for name, block in optimizer.blocks.items()}

    exact = blocks("exact")
    errors: dict[int, dict[str, float]] = {}
    for samples in (2, 32):
        squares = dict.fromkeys(exact, 0.0)
        for seed in range(30):
            found = blocks("mc", mc_samples=samples, generator=seeded(seed))
            for name, dense in exact.items():
                squares[name] += relative(found[name], dense) ** 2 / 30
        errors[samples] = {name: square**0.5 for name, square in squares.items()}
    for name in exact:
        assert 3.0 < errors[2][name] / errors[32][name] < 5.3
        assert errors[32][name] < 0.3


def test_sampling_is_unbiased_for_the_rescaled_methods() -> None:
    x, y, _ = task("categorical")
    traces: dict[str, list[float]] = {"mc": [], "exact": []}
    for fisher, count in (("mc", 100), ("exact", 1)):
        for seed in range(count):
            torch.manual_seed(2)
            optimizer = one_step(mlp(), x, y, fisher=fisher, generator=seeded(seed))
            traces[fisher].append(optimizer.blocks["0"].trace)
    found = torch.tensor(traces["mc"])
    deviation = float(found.mean()) - traces["exact"][0]
    assert abs(deviation) < 4 * float(found.std()) / 100**0.5
    assert float(found.std()) > 0


def hessian(likelihood: str, output: Tensor, variance: float) -> Tensor:
    """``E[g gᵀ]`` in closed form, of shape ``(N, C, C)``."""
    if likelihood == "categorical":
        p = output.softmax(1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if likelihood == "bernoulli":
        p = output.sigmoid()
        return torch.diag_embed(p * (1 - p))
    return torch.diag_embed(torch.full_like(output, 1 / variance))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_expectation_in_closed_form(likelihood: str) -> None:
    """A linear model's factors are the mean of ``a aᵀ`` and of the likelihood's own Hessian."""
    x, y, loss = task(likelihood)
    model = nn.Sequential(nn.Linear(5, 3)).double()
    output = model(x).detach()
    given = {
        "categorical": tekfac.Categorical(),
        "bernoulli": tekfac.Bernoulli(),
        "gaussian": tekfac.Gaussian(variance=0.3),
    }[likelihood]
    optimizer = one_step(model, x, y, "KFAC", loss, fisher="exact", likelihood=given)
    a = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], 1)
    # Of the others, each of an output's three entries is a term.
    terms = 1 if likelihood == "categorical" else 3
    expected = torch.kron(hessian(likelihood, output, 0.3).mean(0) / terms, a.T @ a / 6)
    assert relative(optimizer.blocks["0"].dense(), expected) < ROUNDING


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outputs", [(), (2,), (2, 2)], ids=str)
def test_yes_or_no_outputs_of_any_shape(outputs: tuple[int, ...], method: str) -> None:
    torch.manual_seed(1)
    x = batch("mlp", 6)[0]
    size = math.prod(outputs)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, size), Shaped(outputs)).double()
    pair = SideBySide(
        model,
        method,
        loss=F.binary_cross_entropy_with_logits,
        draws=reference.bernoulli,
        likelihood="bernoulli",
    ).step(x, torch.rand(6, *outputs).double().round())
    pair.check_parameters()
    pair.check_blocks()


class Shaped(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.shape)


def test_expectation_over_positions_in_closed_form() -> None:
    """Outputs ``(N, C, d1)``: positions are independent and their Hessians add up."""
    torch.manual_seed(1)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Conv1d(2, 3, 1, bias=False)).double()
    output = model(x).detach()
    optimizer = one_step(model, x, torch.randint(3, (4, 5)), "KFAC", fisher="exact")
    each = hessian("categorical", output.mT.flatten(0, 1), 1.0)
    a = x.mT.flatten(0, 1)
    # Ω sums over the 5 positions and Γ takes their mean; there are 5 terms, too.
    expected = torch.kron(each.mean(0) / 5, a.T @ a / 4)
    assert relative(optimizer.blocks["0"].dense(), expected) < ROUNDING


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_classes_in_the_last_dimension(fisher: str) -> None:
    """``Categorical(dim=-1)`` for ``(N, T, classes)`` is the same model as ``(N, classes, T)``."""
    torch.manual_seed(1)
    x, y = torch.randn(4, 5, 2, dtype=torch.float64), torch.randint(3, (4, 5))
    found = {}
    for dim in (1, -1):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()

        class Turned(nn.Module):
            def __init__(self, model: nn.Module, dim: int) -> None:
                super().__init__()
                self.model, self.dim = model, dim

            def forward(self, x: Tensor) -> Tensor:
                return self.model(x).movedim(-1, self.dim)

        found[dim] = one_step(
            Turned(model, dim),
            x,
            y,
            loss=lambda out, y, dim=dim: F.cross_entropy(out.movedim(dim, 1), y),
            fisher=fisher,
            likelihood=tekfac.Categorical(dim=dim),
            generator=seeded(0),
        )
    for name, block in found[1].blocks.items():
        assert relative(found[-1].blocks[name].dense(), block.dense()) < ROUNDING


class Positions(nn.Module):
    """Position by position, but for a mean over them that every position sees."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.first, self.second, self.mixed = nn.Linear(2, 4), nn.Linear(4, 3), mixed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.mixed:
            h = h + h.mean(1, keepdim=True)
        return self.second(h.tanh()).mT


def ignoring() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(4, 5, 2, dtype=torch.float64), torch.randint(3, (4, 5))
    y[0, 1:], y[1, 2], y[3, :2] = -100, -100, -100
    return x, y


@pytest.mark.parametrize("method", METHODS)
def test_ignored_positions_have_no_labels(method: str) -> None:
    x, y = ignoring()
    pair = SideBySide(Positions(mixed=True), method).step(x, y)
    pair.check_parameters()
    pair.check_blocks()


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_ignored_positions_contribute_nothing(fisher: str) -> None:
    """What is at a position that the loss ignores does not change the trace."""
    x, y = ignoring()
    traces = []
    for size in (1.0, 30.0):
        torch.manual_seed(2)
        filled = torch.where((y == -100)[:, :, None], size * x, x)
        optimizer = one_step(
            Positions(mixed=False), filled, y, fisher=fisher, generator=seeded(3), mc_samples=2
        )
        traces.append([block.trace for block in optimizer.blocks.values()])
    assert traces[0] == pytest.approx(traces[1], rel=ROUNDING)


# -- random numbers --------------------------------------------------------------------------------


def test_sampling_follows_its_generator() -> None:
    torch.manual_seed(1)
    x, y = batch("mlp", 6)

    def drawn(seed: int, noise: int) -> tekfac.NaturalGradient:
        torch.manual_seed(2)
        model = mlp()
        torch.manual_seed(noise)
        return one_step(model, x, y, generator=seeded(seed))

    assert_same_blocks(drawn(0, noise=3), drawn(0, noise=4))
    first, second = drawn(0, noise=3).blocks["0"].dense(), drawn(1, noise=3).blocks["0"].dense()
    assert relative(second, first) > 1e-3


def test_sampling_without_a_generator_follows_the_global_seed() -> None:
    torch.manual_seed(1)
    x, y = batch("mlp", 6)
    start = mlp().state_dict()

    def drawn(seed: int) -> tekfac.NaturalGradient:
        torch.manual_seed(seed)
        model = mlp()
        model.load_state_dict(start)
        return one_step(model, x, y)

    assert_same_blocks(drawn(0), drawn(0))
    assert relative(drawn(1).blocks["0"].dense(), drawn(0).blocks["0"].dense()) > 1e-3


@pytest.mark.parametrize("fisher", FISHERS)
def test_the_users_random_stream_and_gradients_are_untouched(fisher: str) -> None:
    """Dropout masks and ``.grad`` are bit by bit what they are without the optimizer."""
    torch.manual_seed(1)
    x, y = batch("mlp", 6)
    seen = {}
    for watched in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(
            nn.Linear(5, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.ReLU(True), nn.Linear(8, 3)
        ).double()
        gradients = []
        if watched:
            still = {"lr": 0.0, "first_order": tekfac.Adam(lr=0.0)}
            optimizer = tekfac.TEKFAC(model, **still, fisher=fisher, factor_every=1)
        for _ in range(3):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            gradients += [p.grad.clone() for p in model.parameters()]
            if watched:
                optimizer.step()
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.sign() * 0.3 + p.grad)
        seen[watched] = (gradients, torch.get_rng_state())
    for found, expected in zip(seen[True][0], seen[False][0], strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(seen[True][1], seen[False][1])


@pytest.mark.parametrize("fisher", FISHERS)
def test_parameters_get_one_gradient_per_backward(fisher: str) -> None:
    """The extra backward passes end at layer outputs: no weight gradient is computed in them."""
    torch.manual_seed(1)
    x, y = batch("flattened", 4)
    model = flattened()
    count = dict.fromkeys(dict(model.named_parameters()), 0)
    for name, p in model.named_parameters():
        p.register_hook(lambda _, name=name: count.update({name: count[name] + 1}))
    one_step(model, x, y, fisher=fisher, mc_samples=3)
    assert set(count.values()) == {1}


# -- finding the output ----------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = mlp(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda out: SimpleNamespace(logits=out, other=1), None),
        (lambda out: {"scores": [out]}, lambda result: result["scores"][0]),
        (lambda out: (out.sum(), out), lambda result: result[1]),
    ],
    ids=["logits", "dict", "tuple"],
)
@pytest.mark.parametrize("fisher", FISHERS)
def test_output_inside_an_object(
    fisher: str, wrap: Callable[[Tensor], Any], output: Callable[[Any], Tensor] | None
) -> None:
    torch.manual_seed(1)
    x, y = batch("mlp", 6)
    find = output or (lambda result: result.logits)
    found = []
    for how, pick, given in ((wrap, find, output), (lambda t: t, lambda t: t, None)):
        torch.manual_seed(2)
        found.append(
            one_step(
                Wrapped(how),
                x,
                y,
                loss=lambda out, y, pick=pick: F.cross_entropy(pick(out), y),
                fisher=fisher,
                output=given,
                generator=seeded(0),
            )
        )
    assert_same_blocks(found[0], found[1])


# -- what is kept, and when ------------------------------------------------------------------------


def unseen(model: nn.Module, x: Tensor, context: str) -> None:
    """A forward pass that is not for training; in eval mode the input's gradient is asked for."""
    if context == "eval":
        model.eval()
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(model(leaf).square().sum(), leaf)
        model.train()
    else:
        with torch.no_grad() if context == "no_grad" else torch.inference_mode():
            model(x)


@pytest.mark.parametrize("context", ["eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_other_forward_passes_are_not_captured(fisher: str, context: str) -> None:
    torch.manual_seed(1)
    x, y = batch("mlp", 6)
    found = []
    for disturbed in (True, False):
        torch.manual_seed(2)
        model = mlp()
        optimizer = tekfac.TEKFAC(model, fisher=fisher, generator=seeded(0))
        other = torch.randn(9, 5, dtype=torch.float64)
        kept = weakref.ref(other)
        if disturbed:
            unseen(model, other, context)
        del other
        assert kept() is None
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(optimizer)
    assert_same_blocks(found[0], found[1])


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_forward_pass_between_forward_and_backward_is_not_mixed_up(fisher: str) -> None:
    """An evaluation while a training graph waits for its backward pass changes nothing."""
    torch.manual_seed(1)
    x, y = batch("mlp", 6)
    found = []
    for disturbed in (True, False):
        torch.manual_seed(2)
        model = mlp()
        optimizer = tekfac.TEKFAC(model, fisher=fisher, generator=seeded(0))
        loss = F.cross_entropy(model(x), y)
        if disturbed:
            for context in ("eval", "no_grad", "inference_mode"):
                unseen(model, x[:2], context)
            model(x[:1])  # a training graph that is dropped
        loss.backward()
        optimizer.step()
        found.append(optimizer)
    assert_same_blocks(found[0], found[1])


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_two_losses_of_one_output_are_one_batch(fisher: str) -> None:
    """Two backward passes through one graph do not count its examples twice."""
    torch.manual_seed(1)
    x, y = batch("mlp", 6)
    found = []
    for separately in (True, False):
        torch.manual_seed(2)
        model = mlp()
        # The second loss is no softmax's: the user says what the output means.
        likelihood = tekfac.Categorical(dim=1)
        optimizer = tekfac.TEKFAC(model, fisher=fisher, likelihood=likelihood, generator=seeded(0))
        output = model(x)
        losses = F.cross_entropy(output, y), output.square().mean()
        if separately:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        else:
            (losses[0] + losses[1]).backward()
        optimizer.step()
        found.append(optimizer)
    assert_same_blocks(found[0], found[1])


@pytest.fixture
def young_heap() -> Iterator[None]:
    """What there was before the test is not searched: with all packages it takes half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


UNUSUAL = 37
"""A batch size by which a batch's tensors are known among all tensors of the process."""


def last_is_activation() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus()).double()


@pytest.mark.usefixtures("young_heap")
@pytest.mark.parametrize("make", [mlp, last_is_activation])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fisher", FISHERS)
def test_nothing_is_kept_alive(fisher: str, backward: bool, make: Callable[[], nn.Module]) -> None:
    """A graph that is dropped goes at once, and after a step nothing is left of its batch."""
    torch.manual_seed(1)
    model = make()
    hidden: list[weakref.ref[Tensor]] = []
    model[0].register_forward_hook(lambda *args: hidden.append(weakref.ref(args[2])))
    optimizer = tekfac.TEKFAC(model, fisher=fisher, factor_every=1, scale_every=1)
    for _ in range(2):
        x, y = batch("mlp", UNUSUAL)
        output = model(x)
        kept = [weakref.ref(x), weakref.ref(output), *hidden]
        if backward:
            F.cross_entropy(output, y).backward()
            optimizer.step()
        del x, y, output
        assert all(tensor() is None for tensor in kept)
        sizes = [o.shape for o in gc.get_objects() if type(o) is Tensor]
        assert not [size for size in sizes if size[:1] == (UNUSUAL,)]


@pytest.mark.usefixtures("young_heap")
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_forward_pass_that_fails_leaves_nothing(fisher: str) -> None:
    """As after running out of memory: the batch is freed, and the next one is a batch like any."""
    torch.manual_seed(1)
    x, y = batch("mlp", 6)
    found = []
    for failing in (True, False):
        torch.manual_seed(2)
        model = mlp()
        optimizer = tekfac.TEKFAC(model, fisher=fisher, generator=seeded(0))
        large = torch.randn(UNUSUAL, 5, dtype=torch.float64)
        if failing:
            handle = model[2].register_forward_pre_hook(refuse)
            with pytest.raises(MemoryError):
                model(large)
            handle.remove()
        kept = weakref.ref(large)
        del large
        gc.collect()
        assert kept() is None
        sizes = [o.shape for o in gc.get_objects() if type(o) is Tensor]
        assert not [size for size in sizes if size[:1] == (UNUSUAL,)]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(optimizer)
    assert_same_blocks(found[0], found[1])


def refuse(module: nn.Module, args: Any) -> None:
    raise MemoryError("too large")


@pytest.mark.parametrize("fisher", FISHERS)
def test_steps_without_statistics_run_no_extra_backward(fisher: str) -> None:
    """Between two intervals the backward pass through an activation runs once, as without us."""
    torch.manual_seed(1)
    model = mlp()
    optimizer = tekfac.TEKFAC(model, fisher=fisher, factor_every=3, scale_every=3, mc_samples=2)
    passes = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda _: seen.append(1))

    model[1].register_forward_hook(watch)
    for _ in range(5):
        x, y = batch("mlp", 6)
        seen: list[int] = []
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        passes.append(len(seen))
    extra = {"mc": 2, "exact": 3, "empirical": 0}[fisher]
    assert passes == [1 + extra, 1, 1, 1 + extra, 1]


# -- checkpointing ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """The middle of `flattened` or `pooled` is computed again in the backward pass."""

    def __init__(self, net: nn.Sequential, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[:2](x)
        if self.reentrant is None:
            h = self.net[2:5](h)
        else:
            h = checkpoint(self.net[2:5], h, use_reentrant=self.reentrant)
        return self.net[5:](h)


@pytest.mark.parametrize("make", [flattened, pooled])
@pytest.mark.parametrize("fisher", FISHERS)
def test_non_reentrant_checkpointing(fisher: str, make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(1)
    x, y = batch("pooled", 5)
    found, parameters = [], []
    for reentrant in (False, None):
        torch.manual_seed(2)
        model = Checkpointed(make(), reentrant)
        found.append(one_step(model, x, y, fisher=fisher, generator=seeded(0)))
        parameters.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert len(found[0].blocks) == len(found[1].blocks) > 2
    assert_same_blocks(found[0], found[1])
    assert torch.equal(parameters[0], parameters[1])


@pytest.mark.parametrize("fisher", FISHERS)
def test_reentrant_checkpointing_is_refused(fisher: str) -> None:
    torch.manual_seed(1)
    x, y = batch("flattened", 5)
    with pytest.raises(RuntimeError, match=r"reentrant.*use_reentrant=False"):
        one_step(Checkpointed(flattened(), reentrant=True), x, y, fisher=fisher)


# -- company ---------------------------------------------------------------------------------------


class Extended(nn.Module):
    """A model around a model, each of which an optimizer may be given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Conv1d(3, 3, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("fishers", [(a, b) for a in FISHERS for b in FISHERS], ids="-".join)
def test_two_optimizers(fishers: tuple[str, str], nested: bool) -> None:
    """Each of two optimizers (on one model, or on a model and a part of it) is as if alone."""
    torch.manual_seed(1)
    x, y = torch.randn(6, 2, 2, dtype=torch.float64), torch.randint(3, (6, 2))

    def run(present: tuple[bool, bool]) -> list[tekfac.NaturalGradient | None]:
        torch.manual_seed(2)
        model = Extended(Positions(mixed=True))
        parts = (model, model.inner if nested else model)
        methods = (tekfac.TEKFAC, tekfac.KFAC)
        optimizers = [
            method(
                part,
                lr=0.0,
                fisher=fisher,
                likelihood=tekfac.Categorical(dim=1),
                generator=seeded(4),
                factor_every=1,
            )
            if here
            else None
            for method, part, fisher, here in zip(methods, parts, fishers, present, strict=True)
        ]
        for size in (6, 4):
            model.zero_grad()
            F.cross_entropy(model(x[:size]), y[:size]).backward()
            for optimizer in optimizers:
                if optimizer is not None:
                    optimizer.step()
        return optimizers

    both, first, second = run((True, True)), run((True, False)), run((False, True))
    assert None not in (both[0], both[1], first[0], second[1])
    assert_same_blocks(both[0], first[0])
    assert_same_blocks(both[1], second[1])


def test_a_closed_optimizer_leaves_the_other_at_work() -> None:
    torch.manual_seed(1)
    x, y = batch("mlp", 6)
    found = []
    for accompanied in (True, False):
        torch.manual_seed(2)
        model = mlp()
        optimizer = tekfac.TEKFAC(model, fisher="exact")
        if accompanied:
            tekfac.KFAC(model, fisher="exact").close()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(optimizer)
    assert_same_blocks(found[0], found[1])


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_per_example_gradients_by_torch_func_are_left_alone(fisher: str) -> None:
    """``vmap(grad(...))`` through a model whose optimizer listens works, and counts as nothing."""
    model = mlp()
    optimizer = tekfac.TEKFAC(model, fisher=fisher)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, (image[None],))
        return F.cross_entropy(output, label[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    optimizer.close()
    assert all(block.empty for block in optimizer.blocks.values())
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name, p in model.named_parameters():
            assert torch.allclose(found[name][i], p.grad, atol=1e-12)
