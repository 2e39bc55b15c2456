"""Statistics of a part of a batch: which part, that it stands for the whole, and when it is used.

Truth is torch's own ``F.unfold`` and autograd's per-example gradients, in float64.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from tekfac.curvature import blocks, sampling
from tekfac.layers import Layer, Rows, Sample, layer_of

METHODS = ("KFAC", "EKFAC", "TKFAC", "TEKFAC")
RESCALED = ("EKFAC", "TEKFAC")
TOLERANCE = 1e-10


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small layers be sampled, too."""
    monkeypatch.setattr(sampling, "SMALL", 0)


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """``(N, T, columns)`` in the order (kernel, channel) that blocks use, and a 1 for the bias."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    unfolded = F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)
    by_channel = unfolded.unflatten(1, (module.in_channels, -1))
    rows = by_channel.transpose(1, 2).flatten(1, 2).mT
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=2)


def wanted(rows: Tensor, stride: int) -> Tensor:
    """Of ``(N, T, d)`` every ``stride``-th position, example ``n`` beginning at ``n``."""
    n, positions, _ = rows.shape
    picked = [
        rows[i, [(i + stride * k) % positions for k in range(max(1, positions // stride))]]
        for i in range(n)
    ]
    return torch.stack(picked)


@pytest.mark.parametrize("stride", [2, 3, 7, 35, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": 2, "stride": 2},
        {"dilation": 2, "padding": (1, 2)},
        {"stride": (1, 2)},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_convolutions_read_every_so_many_positions(options: dict[str, Any], stride: int) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 4, 3, **options).double()
    x = torch.randn(5, 3, 7, 9, dtype=torch.float64)
    output = module(x)
    g = torch.randn_like(output)
    # What was multiplied is padded already where the padding is not of zeros.
    sample = Sample([output.grad_fn._saved_input], [g], examples=5)
    found = list(layer_of(module).chunks(sample, stride))
    read = torch.cat([rows.a[0] for rows in found])
    torch.testing.assert_close(read, wanted(patches(module, x), stride))
    gradients = torch.cat([rows.g[0] for rows in found])
    torch.testing.assert_close(gradients, wanted(g.flatten(2).mT, stride))
    norms = [torch.cat([rows.norms()[side][0] for rows in found]) for side in (0, 1)]
    torch.testing.assert_close(norms[0], patches(module, x).square().sum((1, 2)))
    torch.testing.assert_close(norms[1], g.square().sum((1, 2, 3)))


def test_groups_and_other_dimensions_read_the_same_positions_as_the_whole() -> None:
    torch.manual_seed(0)
    for module, shape in (
        (nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 5, 6)),
        (nn.Conv1d(4, 6, 3, groups=2, stride=2), (3, 4, 11)),
        (nn.Conv3d(2, 3, 2, padding=1), (3, 2, 3, 4, 2)),
        (nn.Linear(4, 3), (3, 9, 4)),
        (nn.Linear(4, 3), (3, 2, 5, 4)),
    ):
        module.double()
        x = torch.randn(*shape, dtype=torch.float64)
        layer, sample = layer_of(module), Sample([x], [torch.randn_like(module(x))], examples=3)
        (whole,), (part,) = layer.chunks(sample), layer.chunks(sample, 4)
        assert part.positions == whole.a.shape[2]
        a_norms, g_norms = part.norms()
        torch.testing.assert_close(g_norms, whole.g.square().sum((2, 3)))
        torch.testing.assert_close(a_norms, whole.a.square().sum((2, 3)))
        for group in range(layer.groups):
            torch.testing.assert_close(part.a[group], wanted(whole.a[group], 4))
            torch.testing.assert_close(part.g[group], wanted(whole.g[group], 4))


def test_rows_of_k_per_example_and_several_calls_are_positions_to_choose_from() -> None:
    torch.manual_seed(0)
    for module, shape in ((nn.Linear(4, 3), (6, 4)), (nn.Conv2d(2, 3, 2), (6, 2, 3, 4))):
        module.double()
        x = [torch.randn(*shape, dtype=torch.float64) for _ in range(2)]
        g = [torch.randn_like(module(each)) for each in x]
        layer = layer_of(module)
        (first,) = layer.chunks(Sample(x[:1], g[:1], examples=2))
        (second,) = layer.chunks(Sample(x[1:], g[1:], examples=2))
        (part,) = layer.chunks(Sample(x, g, examples=2), 3)
        for name in ("a", "g"):
            calls = (getattr(first, name)[0], getattr(second, name)[0])
            expected = torch.cat([wanted(rows, 3) for rows in calls], dim=1)
            torch.testing.assert_close(getattr(part, name)[0], expected)
        for norms, one, other in zip(part.norms(), first.norms(), second.norms(), strict=True):
            torch.testing.assert_close(norms, one + other)
        assert part.positions == first.positions + second.positions


@pytest.mark.parametrize("method", METHODS)
def test_sampled_factors_of_equal_examples_are_those_of_the_whole_batch(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal examples begin at different positions and together see all: nothing is lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    model.double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64).expand(8, -1, -1, -1).contiguous()
    y = torch.zeros(8, dtype=torch.long)
    found: dict[int | None, Any] = {}
    for stride in (8, None):
        monkeypatch.setattr(
            blocks, "factor_reading", lambda *_, stride=stride: sampling.Reading(8, stride or 1)
        )
        optimizer = getattr(tekfac, method)(model, lr=0.0, fisher="empirical")
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found[stride] = optimizer.blocks["0"].factors.state_dict()
        optimizer.close()
    for name, value in found[None].items():
        torch.testing.assert_close(found[8][name], value, rtol=TOLERANCE, atol=1e-14)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("every", "asked"), [(10, 2), (9, 3)])  # half of 3, rounded up
@pytest.mark.parametrize("method", METHODS)
def test_sampled_factors_are_moments_of_the_positions_read(
    method: str, every: int, asked: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 3))
    model.double()
    x, y = torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    optimizer = getattr(tekfac, method)(
        model, lr=0.0, fisher="empirical", factor_every=every, factor_rows=asked
    )
    out = model[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model[1:](out), y, reduction="sum"), out)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

    stride = round(5 * 16 / (2 * 19))
    assert stride == 2
    a, g = patches(model[0], x), g.flatten(2).mT
    trace_omega, trace_gamma = a.square().sum((1, 2)), g.square().sum((1, 2)) / 16  # of all
    a, g = wanted(a, stride), wanted(g, stride)
    omega = torch.einsum("nti,ntj->nij", a, a) * 16 / a.shape[1]
    gamma = torch.einsum("nti,ntj->nij", g, g) / g.shape[1]
    if method in ("KFAC", "EKFAC"):
        expected = {"input": omega.mean(0), "output": gamma.mean(0)}
    else:
        delta = (trace_omega * trace_gamma).mean()
        expected = {
            "input": (trace_gamma[:, None, None] * omega).mean(0) / delta,
            "output": (trace_omega[:, None, None] * gamma).mean(0) / delta,
            "delta": delta,
        }
    state = optimizer.blocks["0"].factors.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name][0], value, rtol=TOLERANCE, atol=1e-14)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("every", "asked"), [(10, 4), (1, 7)])  # half of 7, rounded up
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", RESCALED)
def test_the_rescaling_is_measured_on_the_first_examples(
    method: str, fisher: str, steps: int, every: int, asked: int
) -> None:
    """``sum(S) = E‖D_n‖²`` over them; with a second step, in a basis that stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).double()
    x, y = torch.randn(7, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    optimizer = getattr(tekfac, method)(
        model, lr=0.0, fisher=fisher, scale_examples=asked, scale_every=every, scale_decay=0.0
    )
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    expected = {"0": 0.0, "3": 0.0}
    for image, label in zip(x[:4], y[:4], strict=True):
        log_p = F.log_softmax(model(image[None])[0], dim=0)
        for k in range(3):
            weight = float(log_p[k].detach().exp()) if fisher == "exact" else float(k == label)
            for name in expected:
                parameters = list(model.get_submodule(name).parameters())
                grads = torch.autograd.grad(log_p[k], parameters, retain_graph=True)
                expected[name] += weight * sum(float(g.square().sum()) for g in grads) / 4
    for name, value in expected.items():
        assert float(optimizer.blocks[name].scale.sum()) == pytest.approx(value, rel=TOLERANCE)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("method", METHODS)
def test_where_it_is_faster_float32_is_multiplied_as_bfloat16(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to three digits, and nothing worse; asked for all, or in float64, it is exact."""
    monkeypatch.setattr(sampling, "multiplies_bfloat16", lambda device: True)
    torch.manual_seed(0)
    start = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 3)
    )
    x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    def state(dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        model = copy.deepcopy(start).to(dtype)
        optimizer = getattr(tekfac, method)(model, lr=0.0, fisher="empirical", **options)
        for _ in range(2):  # the second time in a basis that is there
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(dtype)), y).backward()
            optimizer.step()
        found: dict[str, Tensor] = optimizer.blocks["0"].factors.state_dict()
        if method in RESCALED:
            found["sum of the rescaling"] = optimizer.blocks["0"].scale.sum()
        return {name: value.double() for name, value in found.items()}

    whole: dict[str, Any] = {"factor_rows": None}
    if method in RESCALED:
        whole["scale_examples"] = None
    # So many that all of this little batch is read.
    exact = state(torch.float64, factor_rows=1000)
    rounded = state(torch.float32, factor_rows=1000)
    for name, value in exact.items():
        errors = (
            (rounded[name] - value).norm() / value.norm(),
            (state(torch.float32, **whole)[name] - value).norm() / value.norm(),
        )
        assert 1e-5 < errors[0] < 1e-2 or name == "delta", name
        assert errors[1] < 1e-5, name


def test_accumulated_batches_are_sampled_each() -> None:
    """Micro-batches of different sizes: every one gives its first examples, all count alike."""
    layer = layer_of(nn.Linear(3, 2))
    sample = Sample([torch.zeros(10, 3)], [torch.zeros(10, 2)], examples=10)
    head = sample.head(4, copied=True)
    assert (head.examples, len(head.inputs[0]), len(head.gradients[0])) == (4, 4, 4)
    # What waits for its basis does not keep the whole batch in memory.
    assert head.inputs[0].untyped_storage().nbytes() == 4 * 3 * 4
    assert sample.head(10) is sample
    # k rows of each example stay together.
    assert len(Sample([None], [torch.zeros(30, 2)], examples=10).head(4).gradients[0]) == 12
    assert layer.positions(Sample([None], [torch.zeros(30, 2)], examples=10)) == 3


@pytest.mark.parametrize(
    ("channels", "size", "stride", "examples"),
    [
        (16, 32, 113, 32),  # 131,072 positions for 145 columns
        (32, 16, 14, 32),  # 32,768 for 289
        (64, 8, 2, 32),  # 8,192 for 577
        (512, 2, 1, 32),  # 512 for 4,609: fewer than wanted
        (4, 8, 1, 128),  # little work
    ],
)
def test_what_is_read_of_a_batch_of_128(
    channels: int, size: int, stride: int, examples: int
) -> None:
    layer = layer_of(nn.Conv2d(channels, channels, 3, padding=1))
    images = torch.zeros(1, channels, size, size).expand(128, -1, -1, -1)
    sample = Sample([images], [images], examples=128)
    assert sampling.factor_reading(layer, sample, 8).stride == stride
    assert sampling.factor_reading(layer, sample, None) == sampling.Reading(128)
    assert sampling.scale_reading(layer, sample, 32).examples == examples
    assert sampling.scale_reading(layer, sample, None) == sampling.Reading(128)


def test_a_small_network_is_measured_whole() -> None:
    """The embedded default task: exact statistics, whatever the defaults say."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10)
    ).double()
    x, y = torch.randn(64, 1, 8, 8, dtype=torch.float64), torch.randint(10, (64,))
    traces = []
    for options in ({}, {"factor_rows": None, "scale_examples": None}):
        optimizer = tekfac.TEKFAC(model, lr=0.0, fisher="empirical", **options)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        traces.append([block.dense() for block in (optimizer.blocks["0"],)])
        optimizer.close()
    torch.testing.assert_close(traces[0], traces[1], rtol=0, atol=0)


@pytest.mark.parametrize("value", [0, -1, 2.5, math.inf, True])
@pytest.mark.parametrize("name", ["factor_rows", "scale_examples"])
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got"):
        tekfac.TEKFAC(nn.Linear(2, 2), **{name: value})


@pytest.mark.parametrize("method", RESCALED)
def test_rows_that_factors_and_rescaling_both_read_are_made_once(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    rows = Layer._rows

    def counted(layer: Layer, *how: Any) -> Rows:
        made.append(layer.name)
        return rows(layer, *how)

    monkeypatch.setattr(Layer, "_rows", counted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    every = {"factor_every": 1, "scale_every": 1, "basis_every": 2}
    optimizer = getattr(tekfac, method)(model, **every)
    for expected in (["3", "0", "0", "3"], ["3", "0"]):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(5, 2, 3, 3)), torch.arange(5) % 3).backward()
        # What waits for a basis keeps none: patches are many times the input.
        waiting = [part for block in optimizer.blocks.values() for part, _ in block._pending]
        assert all(part.rows is None for part in waiting)
        optimizer.step()
        assert made == expected
        made.clear()
