"""What is done with an output between the model and the loss: said, where the gradient shows it."""

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
from test_measured import labels, network, seeded, traces
from test_uses import dense_fisher

torch.set_num_threads(1)


def warned_of(model: nn.Module, run: Callable[[nn.Module], Tensor], **options: Any) -> list[str]:
    optimizer = tekfac.TEKFAC(model, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model).backward()
        optimizer.step()
    return [str(warning.message) for warning in caught]


def clear(classes: int = 4) -> nn.Sequential:
    """A network that is rather sure of what it says."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes)).double()
    with torch.no_grad():
        model[2].weight *= 3
    return model


SHARES = torch.rand(8, 4, generator=torch.Generator().manual_seed(4)).double().softmax(1)
CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 0.2, 1.0]).double()
OUTSIDE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "divided": (lambda z: F.cross_entropy(z / 4, labels(8, classes=4)), "divided by 4"),
    "in place": (lambda z: F.cross_entropy(z.mul_(2), labels(8, classes=4)), "divided by 0.5"),
    "masked": (
        lambda z: F.cross_entropy(z.masked_fill(torch.arange(4) == 3, -1e9), labels(8)),
        "are left out",
    ),
    "a part": (lambda z: F.cross_entropy(z[:, :3], labels(8)), "are left out"),
}
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda z: F.cross_entropy(z, labels(8, classes=4)),
    "ignored": lambda z: F.cross_entropy(z, labels(8, classes=4).where(torch.arange(8) > 2, -100)),
    "smoothed": lambda z: F.cross_entropy(z, labels(8, classes=4), label_smoothing=0.1),
    "weighted": lambda z: F.cross_entropy(
        z, labels(8, classes=4), weight=CLASS_WEIGHTS.to(z.dtype)
    ),
    "both": lambda z: F.cross_entropy(
        z, labels(8, classes=4), weight=CLASS_WEIGHTS.to(z.dtype), label_smoothing=0.1
    ),
    "soft": lambda z: F.cross_entropy(z, SHARES),
    "distilled": lambda z: F.kl_div(z.log_softmax(1), SHARES, reduction="batchmean"),
    "likelihoods": lambda z: F.nll_loss(z.log_softmax(1), labels(8, classes=4)),
    "advantages": lambda z: (
        F.cross_entropy(z, labels(8, classes=4), reduction="none") * torch.linspace(-1, 2, 8)
    ).mean(),
    "focal": lambda z: (
        -((1 - z.softmax(1)) ** 2 * z.log_softmax(1) * F.one_hot(labels(8, classes=4), 4)).mean()
    ),
    "scaled": lambda z: 1e4 * F.cross_entropy(z, labels(8, classes=4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_is_done_with_logits_outside_is_said(kind: str, dtype: torch.dtype) -> None:
    loss, words = OUTSIDE[kind]
    x = seeded(8, 4).to(dtype)
    found = warned_of(clear().to(dtype), lambda m: loss(m(x)))
    assert len(found) == 1
    assert "is no cross entropy of the model's output of shape (8, 4) itself" in found[0]
    assert words in found[0]
    # Nothing is judged where it is said what the output is.
    assert not warned_of(
        clear().to(dtype), lambda m: loss(m(x)), likelihood=tekfac.Categorical(dim=1)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
def test_losses_that_are_known_are_not_doubted(kind: str, dtype: torch.dtype) -> None:
    x, loss = seeded(8, 4).to(dtype), KNOWN[kind]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert not warned_of(clear().to(dtype), lambda m: loss(m(x).to(wide)).to(wide))
    if kind == "likelihoods":
        model = nn.Sequential(*clear(), nn.LogSoftmax(1)).to(dtype)
        assert not warned_of(model, lambda m: F.nll_loss(m(x), labels(8, classes=4)))


def test_a_mean_over_positions_outside_is_said() -> None:
    x = seeded(8, 3, 4)
    loss: Callable[[nn.Module], Tensor] = lambda m: F.cross_entropy(m(x).mean(1), labels(8))  # noqa: E731
    (words,) = warned_of(clear(3), loss)
    assert "the same all along dimension 1" in words


@pytest.mark.parametrize(
    ("made", "places"),
    [
        (lambda z: z[..., :3], 1),
        (lambda z: z.mean(1), 3),
        (lambda z: z[:, -1], 3),
    ],
)
def test_a_part_of_an_output_and_a_mean_in_output(
    made: Callable[[Tensor], Tensor], places: int
) -> None:
    """No dimension but the second can hold the classes."""
    model, x, y = clear(), seeded(6, places, 4), labels(6)
    x = x[:, 0] if places == 1 else x
    found = traces(model, lambda m: F.cross_entropy(made(m(x)), y), output=made)
    for name, trace in found.items():
        rows = [made(model(row[None])) for row in x]
        truth = float(dense_fisher(rows, list(model[int(name)].parameters())).trace())
        assert trace == pytest.approx(truth, rel=1e-9)


def test_one_example_without_a_batch_dimension() -> None:
    model, x, y = network(), seeded(4), labels(6)[1]
    with pytest.raises(ValueError, match=r"of a single one give output=lambda logits"):
        traces(model, lambda m: F.cross_entropy(m(x), y))
    found = traces(model, lambda m: F.cross_entropy(m(x), y), output=lambda logits: logits[None])
    for name, trace in found.items():
        truth = dense_fisher([model(x)[None]], list(model[int(name)].parameters()))
        assert trace == pytest.approx(float(truth.trace()), rel=1e-9)


def test_a_student_that_is_its_teacher_still() -> None:
    """What there is of a gradient is rounding: nothing to judge the output by, for a step."""
    model = clear().float()
    teacher, x = copy.deepcopy(model), seeded(8, 4).float()
    optimizer = tekfac.TEKFAC(model)
    measured = []
    for step in range(3):
        with torch.no_grad():
            shares = teacher(x + 0.01 * step).softmax(1)
        optimizer.zero_grad()
        F.kl_div(model(x).log_softmax(1), shares, reduction="batchmean").backward()
        optimizer.step()
        measured.append(optimizer.summary().share_measured)
    assert measured[1:] == [1.0, 1.0]


def test_frames_of_a_length_that_soft_targets_leave_out() -> None:
    """Of three classes a soft target's gradient may look like an advantage's by chance."""
    torch.manual_seed(0)
    lengths = torch.tensor([8, 7, 6, 8, 5, 8])
    model, x = clear(3), seeded(6, 8, 4)
    targets = torch.tensor([[1, 2], [2, 1], [1, 1], [2, 2], [1, 2], [2, 1]])

    def run(m: nn.Module) -> Tensor:
        frames = m(x).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(frames, targets, lengths, torch.full((6,), 2))

    found = traces(model, run)
    rows = [model(each[None])[0, :length] for each, length in zip(x, lengths, strict=True)]
    for name, trace in found.items():
        truth = dense_fisher(rows, list(model[int(name)].parameters()))
        assert trace == pytest.approx(float(truth.trace()), rel=1e-9)


# -- features and log-probabilities, which are no logits -------------------------------------------


def features() -> nn.Sequential:
    """An encoder that ends in a layer norm: each of its rows sums to zero."""
    return nn.Sequential(*clear(), nn.LayerNorm(4).double())


COMPARED: dict[str, Callable[[Tensor], Tensor]] = {
    "triplets": lambda z: F.triplet_margin_loss(z[:3], z[3:6], z[5:8], margin=5.0),
    "cosines": lambda z: F.mse_loss(F.cosine_similarity(z[:4], z[4:]), torch.zeros(4).double()),
    "contrast": lambda z: F.cross_entropy(F.normalize(z[:4]) @ F.normalize(z[4:]).T, labels(4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", COMPARED)
def test_features_that_are_compared_are_no_logits(kind: str, dtype: torch.dtype) -> None:
    """Their gradients sum to zero because they do themselves, and not for a softmax."""
    x, loss = seeded(8, 4).to(dtype), COMPARED[kind]
    with pytest.raises(ValueError, match=r"but so does the output itself, .* in the model, or in"):
        warned_of(features().to(dtype), lambda m: loss(m(x).double()))


def test_logits_that_sum_to_zero_are_logits() -> None:
    """As those of a last layer that was zero once, and trained by a cross entropy's gradient."""
    model, x, y = clear(), seeded(8, 4), labels(8, classes=4)
    with torch.no_grad():
        model[2].weight -= model[2].weight.mean(0)
        model[2].bias -= model[2].bias.mean()
    found = traces(model, lambda m: F.cross_entropy(m(x), y))
    for name, trace in found.items():
        rows = [model(row[None]) for row in x]
        truth = float(dense_fisher(rows, list(model[int(name)].parameters())).trace())
        assert trace == pytest.approx(truth, rel=1e-9)


def test_a_head_that_is_zero_still_has_logits() -> None:
    model, x, y = clear(), seeded(8, 4), labels(8, classes=4)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    found = traces(model, lambda m: F.cross_entropy(m(x), y, label_smoothing=0.1))
    truth = dense_fisher([model(row[None]) for row in x], list(model[2].parameters()))
    assert found["2"] == pytest.approx(float(truth.trace()), rel=1e-9)


class LabelsAlone(nn.Module):
    """Returns the log-probabilities of the data's labels and no logits, as fused heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = clear()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(self.net(x).flatten(0, 1), y.flatten(), reduction="none").view_as(y)


def test_log_probabilities_of_labels_are_no_logits() -> None:
    x, y = seeded(6, 3, 4), labels(6, 3, classes=4)

    def run(m: nn.Module) -> Tensor:
        return -m(x, y).mean()

    with pytest.raises(
        ValueError, match=r"no other label can be drawn; return the logits .* fisher="
    ):
        warned_of(LabelsAlone(), run)
    (words,) = warned_of(LabelsAlone(), run, likelihood=tekfac.Categorical(dim=-1))
    assert "not even nearly sum to zero along dimension -1" in words


# -- derivatives of an output ----------------------------------------------------------------------


def derivative(m: nn.Module, x: Tensor, graph: bool = True) -> tuple[Tensor, Tensor]:
    """A field and its derivative."""
    x = x.detach().requires_grad_()
    u = m(x)
    return u, torch.autograd.grad(u.sum(), x, create_graph=graph)[0]


def equation(m: nn.Module) -> Tensor:
    u, du = derivative(m, seeded(8, 4))
    return (du.sum(1, keepdim=True) + u).square().mean()


def equation_and_boundary(m: nn.Module) -> Tensor:
    return derivative(m, seeded(8, 4))[1].square().mean() + m(seeded(3, 4)).square().mean()


@pytest.mark.parametrize("loss", [equation, equation_and_boundary])
def test_a_loss_of_derivatives_is_told(loss: Callable[[nn.Module], Tensor]) -> None:
    (words,) = warned_of(clear(1), loss, likelihood="gaussian")
    assert "belongs into what the model returns" in words


def test_a_loss_of_derivatives_alone_is_refused() -> None:
    optimizer = tekfac.TEKFAC(clear(1), likelihood="gaussian")
    derivative(optimizer.model, seeded(8, 4))[1].square().mean().backward()
    with pytest.raises(RuntimeError, match=r"derivatives of that, .* made in the model, and retur"):
        optimizer.step()


def test_an_attack_on_the_input_is_no_loss_of_derivatives() -> None:
    y = labels(8, classes=4)

    def run(m: nn.Module) -> Tensor:
        x = seeded(8, 4).requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(m(x), y), x)
        return F.cross_entropy(m((x + 0.1 * slope.sign()).detach()), y)

    assert not warned_of(clear(), run)


def test_a_penalty_on_gradients_is_none() -> None:
    def run(m: nn.Module) -> Tensor:
        slopes = derivative(m, seeded(4, 4))[1].norm(dim=1)
        return m(seeded(8, 4)).square().mean() + (slopes - 1).square().mean()

    assert not warned_of(clear(1), run, likelihood="gaussian")


class Flow(nn.Module):
    """Returns each example's log-density."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        shift, log_scale = self.net(x[:, :2]).chunk(2, 1)
        z = x[:, 2:] * log_scale.exp() + shift
        return log_scale.sum(1) - z.square().sum(1) / 2


def test_log_densities_are_measured_by_the_data() -> None:
    x = seeded(6, 4)
    optimizer = tekfac.EKFAC(Flow())
    with pytest.raises(ValueError, match=r"of a flow's log-probabilities .* fisher=.empirical"):
        optimizer.model(x)
    model = Flow()
    found = traces(model, lambda m: -m(x).mean(), fisher="empirical")
    truth = 0.0
    for row in x:
        found_of = torch.autograd.grad(model(row[None]).sum(), list(model.parameters()))
        truth += sum(float(g.square().sum()) for g in found_of) / 6
    assert found["net"] == pytest.approx(truth, rel=1e-9)
