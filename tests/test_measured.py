"""What is measured (docs/fisher.md): which terms count, of which outputs, in which backward passes.

The truth is the dense Fisher matrix of `test_uses`, made by autograd from single examples.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from test_uses import EXACT, dense_fisher

torch.set_num_threads(1)

Run = Callable[[nn.Module], Tensor]


def build(model: nn.Module, **options: Any) -> tekfac.EKFAC:
    """Everything in every step, exactly, and nothing moves."""
    return tekfac.EKFAC(model.double(), scale_every=1, scale_examples=None, **{**EXACT, **options})


def traces(model: nn.Module, run: Run, **options: Any) -> dict[str, float]:
    optimizer = build(copy.deepcopy(model), **options)
    run(optimizer.model).backward()
    optimizer.step()
    return {name: block.trace for name, block in optimizer.blocks.items() if not block.empty}


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def labels(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def near(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    assert found == {name: pytest.approx(value, rel=1e-9) for name, value in expected.items()}


# -- a mean over the terms that count --------------------------------------------------------------


def test_flat_and_padded_and_left_out_tokens_are_the_same_mean() -> None:
    model, x, y = network(), seeded(3, 4, 4), labels(3, 4)
    whole = traces(model, lambda m: F.cross_entropy(m(x).flatten(0, 1), y.flatten()))
    near(traces(model, lambda m: F.cross_entropy(m(x.flatten(0, 1)), y.flatten())), whole)
    near(traces(model, lambda m: F.cross_entropy(m(x).mT, y)), whole)  # classes second

    padded = torch.cat([x, seeded(3, 12, 4, seed=5)], 1)
    ignored = torch.cat([y, torch.full((3, 12), -100)], 1)
    near(
        traces(model, lambda m: F.cross_entropy(m(padded).flatten(0, 1), ignored.flatten())), whole
    )

    more = torch.cat([x, seeded(2, 4, 4, seed=6)])
    kept = torch.tensor([True] * 3 + [False] * 2)
    near(traces(model, lambda m: F.cross_entropy(m(more)[kept].flatten(0, 1), y.flatten())), whole)

    twice = x.repeat(1, 2, 1)
    near(
        traces(model, lambda m: F.cross_entropy(m(twice).flatten(0, 1), y.repeat(1, 2).flatten())),
        whole,
    )


@pytest.mark.parametrize("method", ["KFAC", "EKFAC", "TKFAC", "TEKFAC"])
def test_padding_stays_out_of_the_input_factor(method: str) -> None:
    """All of a block, not its trace alone, is as if the padding was not there."""
    model, x, y = network(), seeded(3, 4, 4), labels(3, 4)
    padded = torch.cat([x, 30 * seeded(3, 12, 4, seed=5)], 1)
    ignored = torch.cat([y, torch.full((3, 12), -100)], 1)
    found = []
    for inputs, targets in ((x, y), (padded, ignored)):
        options = {**EXACT, "damping": 1e-2}
        optimizer = getattr(tekfac, method)(copy.deepcopy(model), **options)
        F.cross_entropy(optimizer.model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        found.append([block.dense() for block in optimizer.blocks.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_examples_for_a_loss_that_sums_their_terms() -> None:
    model, x, y = network(), seeded(3, 4, 4), labels(3, 4)

    def run(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x).flatten(0, 1), y.flatten())

    terms, examples = traces(model, run), traces(model, run, mean_over="examples")
    near(examples, {name: 4 * trace for name, trace in terms.items()})


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_each_entry_is_a_term(likelihood: str) -> None:
    """Their truth in closed form: the Hessian of the mean loss PyTorch has, by autograd."""
    model, x = network(), seeded(6, 4)

    def loss(m: nn.Module) -> Tensor:
        if likelihood == "bernoulli":
            target = torch.rand(6, 3, generator=torch.Generator().manual_seed(2)).double()
            return F.binary_cross_entropy_with_logits(m(x), target)
        return F.mse_loss(m(x), m(x).detach() + 1) / 2

    found = traces(model, loss, likelihood=likelihood)
    weight = model[2].weight
    hidden = model[:2](x).detach()

    def of_last(w: Tensor) -> Tensor:
        outputs = F.linear(hidden, w, model[2].bias)
        if likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(outputs, outputs.detach().sigmoid())
        return F.mse_loss(outputs, outputs.detach()) / 2

    hessian = torch.autograd.functional.hessian(of_last, weight.detach())
    trace = float(torch.einsum("ijij->", hessian))
    bias = torch.autograd.functional.hessian(
        lambda b: of_last_bias(model, hidden, b, likelihood), model[2].bias.detach()
    )
    assert found["2"] == pytest.approx(trace + float(bias.trace()), rel=1e-9)


def of_last_bias(model: nn.Sequential, hidden: Tensor, bias: Tensor, likelihood: str) -> Tensor:
    outputs = F.linear(hidden, model[2].weight.detach(), bias)
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(outputs, outputs.detach().sigmoid())
    return F.mse_loss(outputs, outputs.detach()) / 2


def test_a_micro_batch_without_terms_is_as_if_it_was_not_there() -> None:
    model, x, y = network(), seeded(6, 4), labels(6)
    none = torch.full((6,), -100)
    found = []
    for parts in ([(x, y)], [(x, y), (x, none)], [(x, none), (x, y)]):
        optimizer = build(copy.deepcopy(model))
        for inputs, targets in parts:
            F.cross_entropy(optimizer.model(inputs), targets, reduction="sum").backward()
        optimizer.step()
        found.append({name: block.trace for name, block in optimizer.blocks.items()})
    near(found[1], found[0])
    near(found[2], found[0])


# -- which dimension holds the classes, and what is no softmax -------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 5, 3), (4, 3, 2, 5), (4, 3, 3)])
def test_the_classes_dimension_is_that_along_which_the_gradient_sums_to_zero(
    shape: tuple[int, ...],
) -> None:
    output = seeded(*shape).requires_grad_()
    for dim in range(1, len(shape)):
        target = labels(*(n for i, n in enumerate(shape) if i != dim), classes=shape[dim])
        loss = F.cross_entropy(output.movedim(dim, 1), target)
        (gradient,) = torch.autograd.grad(loss, output)
        fitted = tekfac.Categorical().fitted(output.detach(), gradient)
        assert fitted.dim == dim - len(shape)


def test_a_model_of_log_probabilities() -> None:
    model, x, y = network(), seeded(6, 4), labels(6)
    whole = traces(model, lambda m: F.cross_entropy(m(x), y))
    model.append(nn.LogSoftmax(1))
    near(traces(model, lambda m: F.nll_loss(m(x), y)), whole)


def test_what_is_no_softmax_is_refused() -> None:
    x, y = seeded(6, 4), labels(6)
    for model, loss, words in (
        (network(), lambda out: F.mse_loss(out, F.one_hot(y, 3).double()), "along no dimension"),
        (
            nn.Sequential(*network(), nn.Softmax(1)),
            lambda out: F.nll_loss(out.log(), y),
            "holds probabilities; return logits",
        ),
    ):
        optimizer = build(model)
        with pytest.raises(ValueError, match=words):
            loss(optimizer.model(x)).backward()
    optimizer = build(network(1))
    with pytest.raises(ValueError, match='for one logit give likelihood="bernoulli"'):
        optimizer.model(x)
    # Who says what it is is believed.
    optimizer = build(network(), likelihood=tekfac.Categorical(dim=1))
    (F.cross_entropy(optimizer.model(x), y) + optimizer.model(x).square().mean()).backward()
    optimizer.step()


class Similar(nn.Module):
    """How far one view's features point along another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Linear(4, 5).double()
        self.others = seeded(6, 5, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x).tanh() @ self.others.T


def test_similarities_compared_along_both_dimensions() -> None:
    model, x, pairs = Similar(), seeded(6, 4), torch.arange(6)

    def run(m: nn.Module) -> Tensor:
        similar = m(x)
        return (F.cross_entropy(similar, pairs) + F.cross_entropy(similar.T, pairs)) / 2

    with pytest.raises(ValueError, match=r"compared along both .*Categorical\(dim=-1\)"):
        traces(model, run)
    found = traces(model, run, likelihood=tekfac.Categorical(dim=-1))
    truth = dense_fisher([model(row[None]) for row in x], list(model.tower.parameters()))
    assert found["tower"] == pytest.approx(float(truth.trace()), rel=1e-9)


@pytest.mark.parametrize(("masked", "counted"), [(None, 40), (False, 40), (True, 4)])
def test_an_advantage_of_zero_is_not_a_mask(masked: bool | None, counted: int) -> None:
    model, x, action = network(), seeded(40, 4), labels(40)
    advantage = seeded(40, seed=3)
    advantage[4:] = 0

    def run(m: nn.Module) -> Tensor:
        log_p = m(x).log_softmax(1)[torch.arange(40), action]
        return -(log_p * advantage).mean()

    found = traces(model, run, likelihood=tekfac.Categorical(masked=masked))
    truth = dense_fisher([model(row[None]) for row in x[:counted]], list(model[0].parameters()))
    assert found["0"] == pytest.approx(float(truth.trace()), rel=1e-9)


def test_weighted_classes_with_a_mask_are_no_advantages() -> None:
    model, x, y = network(), seeded(40, 4), labels(40)
    y[10:] = -100
    weight = torch.tensor([1.0, 2.0, 0.5]).double()
    found = traces(model, lambda m: F.cross_entropy(m(x), y, weight))
    truth = dense_fisher([model(row[None]) for row in x[:10]], list(model[0].parameters()))
    assert found["0"] == pytest.approx(float(truth.trace()), rel=1e-9)


# -- which backward passes count -------------------------------------------------------------------


def train(model: nn.Module, spoil: Callable[[nn.Module], None]) -> dict[str, float]:
    optimizer = build(model, lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        spoil(model)
        F.cross_entropy(model(seeded(6, 4, seed=step)), labels(6)).backward()
        optimizer.step()
    return {name: block.trace for name, block in optimizer.blocks.items()}


def attack(model: nn.Module) -> None:
    x = seeded(6, 4, seed=9).requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), labels(6)), x)


def own_gradients(model: nn.Module) -> None:
    loss = F.cross_entropy(model(seeded(6, 4, seed=9)), labels(6))
    torch.autograd.grad(loss, list(model.parameters()))


def abandoned(model: nn.Module) -> None:
    F.cross_entropy(model(seeded(6, 4, seed=9)), labels(6)).backward()
    model.zero_grad()


def zeroed(model: nn.Module) -> None:
    F.cross_entropy(model(seeded(6, 4, seed=9)), labels(6)).backward()
    model.zero_grad(set_to_none=False)


def dropped(model: nn.Module) -> None:
    F.cross_entropy(model(torch.full((6, 4), torch.nan).double()), labels(6)).backward()
    for p in model.parameters():
        p.grad = None


def evaluated(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(seeded(6, 4, seed=9))
    model(seeded(6, 4, seed=9))  # whoever forgets no_grad
    model.train()


@pytest.mark.parametrize(
    "spoil",
    [attack, own_gradients, abandoned, zeroed, dropped, evaluated],
    ids=lambda f: f.__name__,
)
def test_only_what_is_left_in_grad_counts(spoil: Callable[[nn.Module], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(train(network(), spoil), train(network(), lambda model: None))


def test_two_forward_passes_and_one_backward_are_one_batch() -> None:
    model, x, y = network(), seeded(6, 4), labels(6)
    whole = traces(model, lambda m: F.cross_entropy(m(x), y))

    def parts(m: nn.Module) -> Tensor:
        halves = [F.cross_entropy(m(x[i::2]), y[i::2]) for i in range(2)]
        return (halves[0] + halves[1]) / 2

    near(traces(model, parts), whole)


def test_training_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = build(model.eval())
    x, y = seeded(6, 4), labels(6)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    truth = dense_fisher([model(row[None]) for row in x], list(model[0].parameters()))
    assert optimizer.blocks["0"].trace == pytest.approx(float(truth.trace()), rel=1e-9)


def test_hooks_can_tell_our_pass_from_the_users() -> None:
    model = network()
    seen = []
    model[1].register_full_backward_hook(lambda *_: seen.append(tekfac.measuring()))
    optimizer = tekfac.TEKFAC(model)
    with pytest.warns(RuntimeWarning, match="backward hooks on '1' run once more .*measuring"):
        loss = F.cross_entropy(model(seeded(6, 4)), labels(6))
    loss.backward()
    optimizer.step()
    assert seen == [True, False]
    assert not tekfac.measuring()


def test_what_was_multiplied_and_not_what_became_of_it() -> None:
    """Autocast casts: the model may change its own tensor afterwards."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.changes = network(), False

        def forward(self, x: Tensor) -> Tensor:
            h = x.clone()
            out = self.layers(h)
            if self.changes:
                h += 100
            return out

    x, y = seeded(6, 4).float(), labels(6)
    found = []
    for changes in (False, True):
        model = InPlace().float()
        model.changes = changes
        optimizer = tekfac.KFAC(model, fisher="exact", lr=0.0, factor_rows=None)
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(optimizer.blocks["layers.0"].trace)
    assert found[0] == found[1]


# -- several outputs, and the way of the loss ------------------------------------------------------


class Heads(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 5)
        self.form = form
        self.double()

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x).tanh()
        return self.form(self.one(h), self.two(h))


def truth_of_heads(model: Heads, x: Tensor) -> dict[str, float]:
    """The sum of both heads' own matrices, each the mean of its own terms."""
    total = dict.fromkeys(("trunk", "one", "two"), 0.0)
    for head in ("one", "two"):

        def logits(row: Tensor, head: str = head) -> Tensor:
            return getattr(model, head)(model.trunk(row[None]).tanh())

        for name in total:
            parameters = list(getattr(model, name).parameters())
            total[name] += float(dense_fisher([logits(row) for row in x], parameters).trace())
    return total


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda a, b: (a, b), None),
        (lambda a, b: {"a": a, "b": b, "size": 3}, None),
        (lambda a, b: [b, a], None),
        (lambda a, b: {"deep": (a, b)}, lambda result: result["deep"]),
    ],
)
def test_two_heads(form: Callable[[Tensor, Tensor], Any], output: Any) -> None:
    model, x = Heads(form), seeded(6, 4)
    one, two = labels(6), labels(6, classes=5)

    def run(m: nn.Module) -> Tensor:
        result = m(x) if output is None else output(m(x))
        found = result.values() if isinstance(result, dict) else result
        heads = {part.shape[1]: part for part in found if isinstance(part, Tensor)}
        return F.cross_entropy(heads[3], one) + F.cross_entropy(heads[5], two)

    near(traces(model, run, output=output), truth_of_heads(model, x))


def test_an_output_joined_of_several_is_each_of_them() -> None:
    model, x = Heads(lambda a, b: (a, b)), seeded(6, 4)

    def run(m: nn.Module) -> Tensor:
        a, b = m(x)
        return F.cross_entropy(a, labels(6)) + F.cross_entropy(b, labels(6, classes=5))

    found = traces(model, run, output=lambda result: torch.cat(result, 1))
    near(found, truth_of_heads(model, x))


def test_an_output_made_of_what_the_model_returned() -> None:
    """As a VAE's example has it: probabilities, of which output= makes logits again."""
    x, y = seeded(6, 4), labels(6, 3, classes=2).double()
    logits = network()
    plain = traces(
        logits, lambda m: F.binary_cross_entropy_with_logits(m(x), y), likelihood="bernoulli"
    )
    model = nn.Sequential(*network(), nn.Sigmoid())
    found = traces(
        model,
        lambda m: F.binary_cross_entropy(m(x), y),
        likelihood="bernoulli",
        output=torch.logit,
    )
    near(found, plain)


def test_what_an_output_is_made_of_is_no_output_itself() -> None:
    """A VAE returns its code's mean and variance too."""

    class Coded(nn.Module):
        def __init__(self, alone: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mean, self.spread, self.out = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(2, 3)
            self.alone = alone

        def forward(self, x: Tensor) -> Any:
            mean, spread = self.mean(x), self.spread(x)
            out = self.out(mean + spread.exp())
            return out if self.alone else (out, mean, spread)

    x, y = seeded(6, 4), labels(6, 3, classes=2).double()

    def run(m: nn.Module) -> Tensor:
        result = m(x)
        if m.alone:
            return F.binary_cross_entropy_with_logits(result, y)
        out, mean, spread = result
        penalty = (mean.square() + spread.exp() - spread).mean()
        return F.binary_cross_entropy_with_logits(out, y) + penalty

    found = traces(Coded(alone=False), run, likelihood="bernoulli")
    near(found, traces(Coded(alone=True), run, likelihood="bernoulli"))


def test_probabilities_in_place_of_yes_or_no_logits_get_a_word() -> None:
    model = nn.Sequential(*network(8), nn.Sigmoid())
    optimizer = build(model, likelihood="bernoulli")
    with pytest.warns(RuntimeWarning, match="lies between 0 and 1, .* takes logits"):
        F.binary_cross_entropy(model(seeded(6, 4)), labels(6, 8, classes=2).double()).backward()
    optimizer.step()


def test_each_output_has_its_likelihood() -> None:
    model, x = Heads(lambda a, b: (a, b)), seeded(6, 4)
    one, two = labels(6), seeded(6, 5, seed=4)

    def run(m: nn.Module) -> Tensor:
        a, b = m(x)
        return F.cross_entropy(a, one) + F.mse_loss(b, two) / 2

    found = traces(model, run, likelihood=["categorical", "gaussian"])
    hidden = torch.cat([model.trunk(x).tanh(), torch.ones(6, 1)], 1).detach()
    # A Gaussian's last layer: a matrix of inputs for each output, a mean over 30 entries.
    assert found["two"] == pytest.approx(float(hidden.square().sum()) * 5 / 30, rel=1e-9)
    with pytest.raises(ValueError, match="3 likelihoods were given, but the model has 2 outputs"):
        traces(model, run, likelihood=["categorical", "gaussian", "gaussian"])


class WithLoss(nn.Module):
    """As Hugging Face's models: the loss is made inside, of logits that are cast afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        logits = self.inner(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits.float()}


def test_a_loss_made_inside_of_logits_that_are_cast_afterwards() -> None:
    x, y = seeded(6, 4), labels(6)
    torch.manual_seed(0)
    found = traces(WithLoss(), lambda m: m(x, y)["loss"])
    plain = traces(network(), lambda m: F.cross_entropy(m(x), y))
    assert found["inner.0"] == pytest.approx(plain["0"], rel=1e-6)
    assert found["inner.2"] == pytest.approx(plain["2"], rel=1e-6)


def test_a_head_that_the_output_does_not_reach_is_told_of() -> None:
    model, x = Heads(lambda a, b: (a, b)).double(), seeded(6, 4)
    optimizer = build(model, output=lambda result: result[0])
    a, b = model(x)
    (F.cross_entropy(a, labels(6)) + F.cross_entropy(b, labels(6, classes=5))).backward()
    with pytest.warns(RuntimeWarning, match="no curvature of layers 'two'.*another way than the"):
        optimizer.step()


def test_a_layer_that_is_not_seen_any_more_is_told_of() -> None:
    """Gradients that somebody puts there by hand: the curvature freezes."""
    model = network()
    optimizer = tekfac.TEKFAC(model, factor_every=2, scale_every=2)
    x, y = seeded(6, 4), labels(6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if step < 3:
                loss.backward()
            else:
                for p, g in zip(
                    model.parameters(),
                    torch.autograd.grad(loss, list(model.parameters())),
                    strict=True,
                ):
                    p.grad = g
            optimizer.step()
    [warning] = caught
    assert "the curvature of layers '0', '2' stays as it was" in str(warning.message)


# -- what an optimizer says of itself --------------------------------------------------------------


def test_a_summary_tells_what_waits_from_what_was_not_measured() -> None:
    """Bases of wide layers come one after the other; a layer that did not run has nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(700, 700) for _ in range(5)], nn.Linear(700, 3))
    model.unused = nn.Linear(10, 10)
    model.forward = lambda x: nn.Sequential.forward(model[:6], x)
    optimizer = tekfac.TEKFAC(model)
    F.cross_entropy(model(torch.randn(2, 700)), labels(2)).backward()
    optimizer.step()
    found = optimizer.summary()
    waiting = {entry.name for entry in found.entries if entry.waiting}
    own = {name: block for name, block in optimizer.blocks.items() if block.empty}
    assert {"unused"} < own.keys()
    assert waiting == {f"{n}.{p}" for n in own if n != "unused" for p in ("weight", "bias")}
    total = sum(p.numel() for p in model.parameters())
    assert found.share_measured == pytest.approx(1 - 110 / total)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert found.share_waiting == pytest.approx(sum(sizes[name] for name in waiting) / total)
    assert "wait for a basis)" in str(found)
    words = optimizer.treatment()
    assert all("until the turn of its first basis" in words[name] for name in waiting)
    assert "until its curvature is measured" in words["unused.weight"]


def test_a_summary_tells_sizes_and_what_was_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    )
    optimizer = tekfac.TEKFAC(model)
    before = optimizer.summary()
    assert before.share_measured == 0
    F.cross_entropy(model(torch.randn(5, 3, 8, 8)), labels(5)).backward()
    optimizer.step()
    after = optimizer.summary()
    count = sum(p.numel() for p in model.parameters())
    assert after.share_measured == pytest.approx(1 - 16 / count)
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    assert after.state_bytes == pytest.approx(held, rel=0.02)
    blocks = {entry.block.name: entry.block for entry in before.entries if entry.block}
    assert sum(block.state_bytes for block in blocks.values()) < after.state_bytes
    text = str(optimizer)
    assert "8×28" in text
    assert "36 each" in text
    assert "first order: BatchNorm2d has no curvature block" in text
    assert f"{count:,} parameters trained" in text
