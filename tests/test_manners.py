"""How the optimizers get along with the rest of PyTorch: schedulers, groups, scalers and models."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

import tekfac
from harness import METHODS, RESCALED

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Two layers, a norm and a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.temperature = nn.Parameter(torch.ones(3))
        self.fc2 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).tanh()) * self.temperature


def batch(step: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(step))
    return X[order[:8]], Y[order[:8]]


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    x, y = batch(step)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, optimizer, step)
        optimizer.step()


def frequent(method: str, every: int = 1) -> dict[str, Any]:
    """All intervals of a method alike."""
    names = ["factor_every", "basis_every", *(["scale_every"] if method in RESCALED else [])]
    return dict.fromkeys(names, every)


def equal(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def count_backward(module: nn.Module) -> list[Tensor]:
    """A list that gets longer with each backward pass through this module."""
    seen: list[Tensor] = []

    def listen(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(seen.append)

    module.register_forward_hook(listen)
    return seen


# -- the step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_closure(method: str) -> None:
    model, other = Network(), Network()
    optimizer, plain = (getattr(tekfac, method)(m, **frequent(method)) for m in (model, other))
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        return backward(model, optimizer, len(calls)).item()

    for step in range(1, 4):
        expected = backward(other, plain, step).item()
        plain.step()
        assert optimizer.step(closure) == expected
    assert calls == [True] * 3
    assert equal(model, other)


def test_step_without_closure_returns_none() -> None:
    model = Network()
    optimizer = tekfac.TEKFAC(model)
    backward(model, optimizer, 0)
    assert optimizer.step() is None


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_momentum_recurrence(method: str, nesterov: bool) -> None:
    model = Network().double()
    optimizer = getattr(tekfac, method)(
        model, lr=0.05, momentum=0.7, nesterov=nesterov, weight_decay=0.3, rms_clip=None,
        **frequent(method, 2),
    )  # fmt: skip
    velocity = 0.0
    for step in range(5):
        backward(model, optimizer, step)
        theta = torch.cat([model.fc1.weight, model.fc1.bias[:, None]], 1).detach().clone()
        gradient = torch.cat([model.fc1.weight.grad, model.fc1.bias.grad[:, None]], 1)
        optimizer.step()
        natural = optimizer.blocks["fc1"].inverse_matvec(gradient)
        velocity = 0.7 * velocity + natural
        direction = natural + 0.7 * velocity if nesterov else velocity
        theta = theta - 0.05 * 0.3 * theta - 0.05 * direction  # decay decoupled, lr times itself
        found = torch.cat([model.fc1.weight, model.fc1.bias[:, None]], 1)
        torch.testing.assert_close(found, theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_groups_with_their_own_settings(method: str) -> None:
    model = Network().double()
    settings = [
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2, "damping": 0.3, "nesterov": False},
        {"lr": 0.02, "momentum": 0.0, "weight_decay": 0.0, "damping": 7.0},
        {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1, "damping": 1e-3, "nesterov": True},
    ]
    members = [[model.fc1.weight], [model.fc1.bias], list(model.fc2.parameters())]
    optimizer = getattr(tekfac, method)(
        model,
        params=[{"params": p, **s} for p, s in zip(members, settings, strict=True)],
        rms_clip=None,
        **frequent(method),
    )
    velocity = [0.0, 0.0, 0.0]
    for step in range(4):
        backward(model, optimizer, step)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients = {
            name: torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            for name, layer in [("fc1", model.fc1), ("fc2", model.fc2)]
        }
        optimizer.step()
        # A block has its weight's damping, also where the bias is in another group.
        assert optimizer.blocks["fc1"].damping == pytest.approx(0.3)
        assert optimizer.blocks["fc2"].damping == pytest.approx(1e-3)
        fc1, fc2 = (optimizer.blocks[name].inverse_matvec(g) for name, g in gradients.items())
        weight2 = torch.cat([before["fc2.weight"], before["fc2.bias"][:, None]], 1)
        for i, (start, natural, found) in enumerate(
            [
                (before["fc1.weight"], fc1[:, :-1], model.fc1.weight),
                (before["fc1.bias"], fc1[:, -1], model.fc1.bias),
                (weight2, fc2, torch.cat([model.fc2.weight, model.fc2.bias[:, None]], 1)),
            ]
        ):
            s = settings[i]
            velocity[i] = s["momentum"] * velocity[i] + natural
            direction = velocity[i] if i < 2 else natural + s["momentum"] * velocity[i]
            expected = start * (1 - s["lr"] * s["weight_decay"]) - s["lr"] * direction
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        # Parameters in no group stay.
        assert torch.equal(model.temperature, before["temperature"])


@pytest.mark.parametrize("limit", [1e-4, 1e4])
@pytest.mark.parametrize("method", METHODS)
def test_kl_clip(method: str, limit: float) -> None:
    model = Network().double()
    optimizer = getattr(tekfac, method)(
        model, lr=0.1, momentum=0.0, kl_clip=limit, rms_clip=None, **frequent(method),
        params=[{"params": model.fc1.parameters(), "lr": 0.5}, {"params": model.fc2.parameters()}],
    )  # fmt: skip
    for step in range(3):
        backward(model, optimizer, step)
        before = copy.deepcopy(model)
        optimizer.step()
        naturals, inner = {}, 0.0
        for name, lr in [("fc1", 0.5), ("fc2", 0.1)]:
            layer = model.get_submodule(name)
            gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            naturals[name] = lr * optimizer.blocks[name].inverse_matvec(gradient)
            inner += lr * float((naturals[name] * gradient).sum())
        scale = min(1.0, (limit / inner) ** 0.5)
        assert (scale < 1) == (limit < 1)
        for name, natural in naturals.items():
            new, old = model.get_submodule(name), before.get_submodule(name)
            moved = torch.cat([old.weight - new.weight, (old.bias - new.bias)[:, None]], 1)
            torch.testing.assert_close(moved, scale * natural, rtol=1e-9, atol=1e-14)


def test_first_order_parameters_follow_adamw() -> None:
    model = Network()
    rule = tekfac.Adam(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    optimizer = tekfac.TEKFAC(model, first_order=rule, exclude=["fc2"])
    names = ["norm.weight", "norm.bias", "temperature", "fc2.weight", "fc2.bias"]
    twins = [nn.Parameter(model.get_parameter(name).detach().clone()) for name in names]
    adamw = torch.optim.AdamW(twins, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    for step in range(5):
        backward(model, optimizer, step)
        for name, twin in zip(names, twins, strict=True):
            twin.grad = model.get_parameter(name).grad.clone()
        if step == 3:
            optimizer.param_groups[0]["lr"] *= 0.2  # the rule's rate moves in proportion
            adamw.param_groups[0]["lr"] *= 0.2
        optimizer.step()
        adamw.step()
        for name, twin in zip(names, twins, strict=True):
            # Not to the bit: the two kernels may round otherwise, as the processor has it.
            torch.testing.assert_close(model.get_parameter(name), twin, rtol=1e-6, atol=1e-7)


def test_parameters_without_gradient_stay() -> None:
    class Branch(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).tanh())

    model = Branch()
    model.unused = nn.Linear(4, 3)
    optimizer = tekfac.TEKFAC(model, weight_decay=0.1, **frequent("TEKFAC"))
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(4))
    for name in ("unused.weight", "unused.bias", "norm.weight", "temperature"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))
    assert not torch.equal(model.fc1.weight, before.fc1.weight)
    assert optimizer.blocks["unused"].empty
    assert "until its curvature is measured" in optimizer.treatment()["unused.weight"]
    assert "until" not in optimizer.treatment()["fc1.weight"]


def test_a_branch_that_is_used_later_gets_curvature_then() -> None:
    class Late(Network):
        late = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc1(x)
            return self.fc2(self.norm(h) if self.late else h.detach())

    model = Late()
    optimizer = tekfac.TEKFAC(model, **frequent("TEKFAC", 100))
    train(model, optimizer, range(3))
    assert optimizer.blocks["fc1"].empty
    model.late = True
    train(model, optimizer, range(3, 4))
    assert not optimizer.blocks["fc1"].empty


def test_step_and_post_hooks() -> None:
    model = Network()
    optimizer = tekfac.TEKFAC(model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, range(1))
    assert seen == ["before", "after"]


# -- schedulers ------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1], total_steps=7),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=0, mode="max"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    model, other = Network(), Network()
    optimizer, replay = tekfac.TEKFAC(model, lr=0.05), tekfac.TEKFAC(other, lr=0.05)
    scheduler = SCHEDULERS[name](optimizer)
    cycled = ("lr", "momentum")
    seen = []
    for step in range(6):
        seen.append([[group[key] for key in cycled] for group in optimizer.param_groups])
        loss = backward(model, optimizer, step)
        optimizer.step()
        scheduler.step(*[loss.item()] if name == "plateau" else [])
        for group, values in zip(replay.param_groups, seen[-1], strict=True):
            group.update(zip(cycled, values, strict=True))
        backward(other, replay, step)
        replay.step()
    assert equal(model, other)
    assert len({lr for [(lr, _)] in seen}) > 1
    assert (len({momentum for [(_, momentum)] in seen}) > 1) == (name == "one cycle")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rules_rate_keeps_its_proportion(name: str) -> None:
    """What a scheduler makes of the group's rate holds for Adam's too, measured by its steps."""
    model, twin = Network(), nn.Parameter(torch.ones(3))
    optimizer = tekfac.TEKFAC(model, lr=0.05, first_order=tekfac.Adam(lr=1e-3))
    scheduler = SCHEDULERS[name](optimizer)
    adam = torch.optim.AdamW([twin], lr=1e-3, weight_decay=0.0)
    for step in range(6):
        adam.param_groups[0]["lr"] = 1e-3 * optimizer.param_groups[0]["lr"] / 0.05
        loss = backward(model, optimizer, step)
        twin.data.copy_(model.temperature)
        twin.grad = model.temperature.grad.clone()
        optimizer.step()
        adam.step()
        torch.testing.assert_close(model.temperature, twin)
        scheduler.step(*[loss.item()] if name == "plateau" else [])


def test_schedulers_see_the_groups_that_the_user_made() -> None:
    model = Network()
    groups = [
        {"params": [*model.fc1.parameters(), *model.norm.parameters()], "lr": 1e-2},
        {"params": [*model.fc2.parameters(), model.temperature], "lr": 1e-3},
    ]
    optimizer = tekfac.TEKFAC(model, params=groups)
    lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 1e-3], total_steps=10)
    lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1.0])
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 3]


@pytest.mark.parametrize("named", [False, True])
def test_parameters_with_and_without_names(named: bool) -> None:
    """Weights apart from biases, as for weight decay: the steps are those of one group."""
    model, other = Network(), Network()
    options = {"fisher": "exact", **frequent("TEKFAC")}
    plain = tekfac.TEKFAC(other, **options)
    given = list(model.named_parameters())
    parts = [[(n, p) for n, p in given if ("bias" in n) == apart] for apart in (False, True)]
    groups = [{"params": part if named else [p for _, p in part]} for part in parts]
    optimizer = tekfac.TEKFAC(model, params=groups, **options)
    train(model, optimizer, range(3))
    train(other, plain, range(3))
    assert equal(model, other)
    if named:
        assert optimizer.param_groups[0]["param_names"] == [n for n, _ in parts[0]]
        third = Network()
        train(third, tekfac.TEKFAC(third, params=third.named_parameters(), **options), range(3))
        assert equal(third, other)


def test_momentum_may_be_cycled_from_zero() -> None:
    model = Network()
    optimizer = tekfac.TEKFAC(model, momentum=0.0)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["momentum"] = 0.9
    train(model, optimizer, range(1, 3))
    assert "momentum_buffer" in optimizer.state[model.fc1.weight]


# -- which parameter is trained how ----------------------------------------------------------------


def test_treatment_and_order_of_groups() -> None:
    model = Network()
    model.fc2.bias.requires_grad_(False)
    optimizer = tekfac.TEKFAC(model, lr=0.2, first_order=tekfac.Adam(lr=0.3))
    assert [(g["lr"], g["first_order"]["lr"]) for g in optimizer.param_groups] == [(0.2, 0.3)]
    train(model, optimizer, range(1))
    assert optimizer.treatment() == {
        "temperature": "first order: Network has no curvature block",
        "fc1.weight": "TEKFAC block 'fc1'",
        "fc1.bias": "TEKFAC block 'fc1'",
        "norm.weight": "first order: LayerNorm has no curvature block",
        "norm.bias": "first order: LayerNorm has no curvature block",
        "fc2.weight": "TEKFAC block 'fc2'",
        "fc2.bias": "not trained: frozen",
    }
    assert optimizer.blocks["fc2"].shape == (3, 4)


def test_tied_weights_have_one_block() -> None:
    model = Network()
    model.tied = nn.Linear(5, 4)
    model.tied.weight = model.fc1.weight
    optimizer = tekfac.KFAC(model)
    assert set(optimizer.blocks) == {"fc1", "fc2"}
    assert optimizer.treatment()["tied.bias"] == "first order: Linear has no curvature block"


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["features.0"], {"features.2", "head"}),
        (["features"], {"head"}),
        ([nn.Conv2d], {"features.2", "head"}),
        ((nn.modules.conv._ConvNd, "head"), {"features.2"}),
    ],
)
def test_exclude(exclude: Any, left: set[str]) -> None:
    model = nn.Sequential()
    model.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
    model.features2 = nn.ReLU()
    model.head = nn.Linear(4, 3)
    optimizer = tekfac.TKFAC(model, exclude=exclude)
    assert set(optimizer.blocks) == left
    for name, treatment in optimizer.treatment().items():
        layer = name.rpartition(".")[0]
        covered = f"TKFAC block {layer!r} (first order until its curvature is measured)"
        assert treatment == (covered if layer in left else "first order: left out by exclude")
    before = copy.deepcopy(model)
    F.cross_entropy(model(torch.randn(6, 1, 4, 4)), Y[:6]).backward()
    optimizer.step()
    assert not any(map(torch.equal, before.parameters(), model.parameters()))


def test_exclude_a_name_that_begins_like_another() -> None:
    model = nn.Sequential()
    model.fc, model.fc2 = nn.Linear(5, 4), nn.Linear(4, 3)
    assert set(tekfac.KFAC(model, exclude=["fc"]).blocks) == {"fc2"}


@pytest.mark.parametrize("method", METHODS)
def test_an_unfrozen_layer_gets_a_block(method: str) -> None:
    model = Network()
    model.fc1.requires_grad_(False)
    outside = nn.Parameter(torch.ones(2))
    optimizer = getattr(tekfac, method)(model, rms_clip=None, nesterov=False, **frequent(method, 3))
    train(model, optimizer, range(2))
    assert set(optimizer.blocks) == {"fc2"}
    assert optimizer.treatment()["fc1.weight"] == "not trained: frozen"

    model.fc1.requires_grad_(True)
    assert optimizer.treatment()["fc1.weight"] == "not trained: in no group"
    optimizer.add_param_group({"params": [*model.fc1.parameters(), outside], "lr": 0.5})
    assert [(g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        (5e-3, 5), (0.5, 3),
    ]  # fmt: skip
    before = copy.deepcopy(model)
    x, y = batch(2)
    optimizer.zero_grad()
    (F.cross_entropy(model(x), y) + outside.square().sum()).backward()
    optimizer.step()
    block = optimizer.blocks["fc1"]
    gradient = torch.cat([model.fc1.weight.grad, model.fc1.bias.grad[:, None]], 1)
    moved = torch.cat(
        [before.fc1.weight - model.fc1.weight, (before.fc1.bias - model.fc1.bias)[:, None]], 1
    )
    torch.testing.assert_close(moved, 0.5 * block.inverse_matvec(gradient), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(outside.detach(), torch.full((2,), 0.999))


def test_a_group_may_be_one_parameter() -> None:
    outside = nn.Parameter(torch.ones(2))
    optimizer = tekfac.KFAC(Network())
    optimizer.add_param_group({"params": outside, "lr": 0.25, "betas": (0.5, 0.6)})
    assert optimizer.param_groups[-1]["params"] == [outside]
    assert optimizer.param_groups[-1]["lr"] == 0.25
    assert optimizer.param_groups[-1]["first_order"]["lr"] == 0.25
    assert optimizer.param_groups[-1]["first_order"]["betas"] == (0.5, 0.6)


# -- one block, and what the statistics cost -------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "fisher", "extra"),
    [
        ("KFAC", {"fisher": "mc"}, [1, 0, 0, 1, 0, 0, 1]),
        ("TKFAC", {"fisher": "mc", "mc_samples": 2}, [2, 0, 0, 2, 0, 0, 2]),
        ("EKFAC", {"fisher": "exact"}, [3, 0, 3, 3, 3, 0, 3]),
        ("TEKFAC", {"fisher": "mc"}, [1, 0, 1, 1, 1, 0, 1]),
        ("TEKFAC", {"fisher": "empirical"}, [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_only_steps_that_need_statistics_pay_for_them(
    method: str, fisher: dict[str, Any], extra: list[int]
) -> None:
    model = Network()
    options = {"factor_every": 3, "basis_every": 5}
    if method in RESCALED:
        options["scale_every"] = 2
    optimizer = getattr(tekfac, method)(model, **options, **fisher)
    seen = count_backward(model.norm)
    found = []
    for step in range(7):
        seen.clear()
        backward(model, optimizer, step)
        found.append(len(seen) - 1)
        optimizer.step()
    assert found == extra


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_zero_grad_forgets_a_dropped_backward(method: str, fisher: str) -> None:
    model, other = Network(), Network()
    optimizer, plain = (
        getattr(tekfac, method)(m, fisher=fisher, **frequent(method)) for m in (model, other)
    )
    for step in range(3):
        backward(model, optimizer, 10 + step)
        train(model, optimizer, range(step, step + 1))
        train(other, plain, range(step, step + 1))
    assert equal(model, other)


def test_an_evaluation_between_backward_and_step_changes_nothing() -> None:
    model, other = Network(), Network()
    optimizer, plain = (tekfac.TEKFAC(m, **frequent("TEKFAC")) for m in (model, other))
    for step in range(3):
        backward(model, optimizer, step)
        with torch.no_grad():
            model(X)
        model.eval()
        model(X)
        model.train()
        optimizer.step()
        train(other, plain, range(step, step + 1))
    assert equal(model, other)


# -- two optimizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_two_optimizers_do_not_disturb_each_other(fisher: str) -> None:
    alone, shared = Network(), Network()
    first = tekfac.TEKFAC(alone, fisher=fisher, **frequent("TEKFAC"))
    train(alone, first, range(4))

    first = tekfac.TEKFAC(shared, fisher=fisher, **frequent("TEKFAC"))
    second = tekfac.KFAC(shared, lr=0.0, first_order=tekfac.Adam(lr=0.0), factor_every=2)
    for step in range(4):
        backward(shared, first, step)
        first.step()
        second.step()
    assert equal(alone, shared)
    assert not second.blocks["fc1"].empty
    second.close()
    train(alone, first, range(1))  # its hooks are on the other model: nothing is seen
    hooks = sum(len(m._forward_hooks) for m in shared.modules())
    first.close()
    assert hooks == 1  # one on the model, and none on its layers
    assert sum(len(m._forward_hooks) for m in shared.modules()) == 0


def test_two_optimizers_share_a_model() -> None:
    model, other = Network(), Network()
    groups = [
        [{"params": m.fc1.parameters()}, {"params": m.fc2.parameters()}] for m in (model, other)
    ]
    options = {"fisher": "exact", **frequent("EKFAC")}
    both = tekfac.EKFAC(model, params=groups[0], **options)
    halves = [tekfac.EKFAC(other, params=[group], **options) for group in groups[1]]
    for step in range(3):
        train(model, both, range(step, step + 1))
        for half in halves:
            half.zero_grad()
        backward(other, halves[0], step)
        for half in halves:
            half.step()
    assert equal(model, other)


# -- mixed precision and compilation ---------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_grad_scaler(method: str, fisher: str) -> None:
    model, other = Network(), Network()
    optimizer, plain = (
        getattr(tekfac, method)(m, fisher=fisher, **frequent(method)) for m in (model, other)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        train(other, plain, range(step, step + 1))
    assert equal(model, other)


def test_grad_scaler_skips_infinite_gradients() -> None:
    model, other = Network(), Network()
    optimizer, plain = (
        tekfac.TEKFAC(m, fisher="exact", **frequent("TEKFAC")) for m in (model, other)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if step == 2:
            model.fc1.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            train(other, plain, range(step, step + 1))
    assert scaler.get_scale() == 2.0**9
    assert optimizer.counters["steps"] == 3
    assert equal(model, other)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, fisher: str) -> None:
    model, exact = Network(), Network()
    optimizer, wide = (
        getattr(tekfac, method)(m, lr=0.1, fisher="exact" if fisher == "mc" else fisher,
                                **frequent(method))
        for m in (model, exact)
    )  # fmt: skip
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step == 0:
            backward(exact, wide, step)
            wide.step()
            for name, block in optimizer.blocks.items():
                assert block.eigenvalues.dtype == torch.float32
                assert block.trace == pytest.approx(wide.blocks[name].trace, rel=0.05)
    assert optimizer.counters == {
        "steps": 5, "skipped_steps": 0, "skipped_statistics": 0, "failed_decompositions": 0,
    }  # fmt: skip
    with torch.no_grad():
        assert F.cross_entropy(model(X), Y) < F.cross_entropy(Network()(X), Y)


@pytest.mark.parametrize(
    ("backend", "fisher"),
    [
        ("eager", "mc"),
        pytest.param(
            "eager",
            "empirical",
        ),
        pytest.param(
            "inductor",
            "mc",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
                ),
            ],
        ),
    ],
)
def test_compiled_model(backend: str, fisher: str) -> None:
    model, other = Network(), Network()
    optimizer, plain = (
        tekfac.TEKFAC(m, fisher=fisher, **frequent("TEKFAC", 2)) for m in (model, other)
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()
    train(other, plain, range(4))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert optimizer.counters == plain.counters


def test_whole_graphs_with_evaluation_in_between() -> None:
    """``fullgraph=True`` compiles, and every step that is due to measure does."""
    torch._dynamo.reset()
    compilations: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compilations.append(graph)
        return graph.forward

    model, other = Network(), Network()
    for m, call in ((model, torch.compile(model, fullgraph=True, backend=backend)), (other, other)):
        torch.manual_seed(1)
        optimizer = tekfac.TEKFAC(m)
        for step in range(24):
            x, y = batch(step % 8)
            with torch.no_grad():
                call(x)
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
            optimizer.step()
        optimizer.close()
    assert compilations
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# -- models of other kinds -------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        return self.head(h + self.attention(h, h, h, need_weights=False)[0])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


def sequences() -> Iterator[tuple[Tensor, Tensor]]:
    """Each token is to be answered by the next number."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randint(6, (8, 5), generator=generator)
        yield x, (x + 1) % 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Attention, Transformer, Recurrent, Bag])
def test_sequence_models_train(kind: type[nn.Module], method: str) -> None:
    torch.manual_seed(0)
    model = kind()
    before = copy.deepcopy(model)
    optimizer = getattr(tekfac, method)(
        model, lr=0.03, likelihood=tekfac.Categorical(dim=-1), first_order=tekfac.Adam(lr=0.03)
    )
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in sequences():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert not caught
    assert not any(block.empty for block in optimizer.blocks.values())
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert not optimizer.blocks["head"].empty
    assert not any(map(torch.equal, model.parameters(), before.parameters()))
