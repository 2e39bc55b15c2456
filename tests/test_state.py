"""What a saved, copied or closed optimizer is: the same run goes on, or a model without hooks."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import tekfac
from harness import METHODS, RESCALED, TORCH, TRACED

# The rescaling and the basis are each refreshed at steps where nothing else is due: 3 and 9, 5.
INTERVALS = {"factor_every": 2, "basis_every": 5}
FISHERS = ["mc", "generator", "empirical"]


def network(hidden: int = 3) -> nn.Sequential:
    """Convolution, batch norm and two fully-connected layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 3),
    )  # fmt: skip


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(5, 1, 4, 4, generator=generator)
        yield x, torch.randint(3, (5,), generator=generator)


BATCHES = [batch for batch, _ in zip(batches(), range(16), strict=False)]


def build(
    method: str, model: nn.Module, fisher: str = "mc", **given: Any
) -> tekfac.NaturalGradient:
    """An optimizer in which every setting that a state holds is set."""
    options: dict[str, Any] = {**INTERVALS, "factor_decay": 0.8, "kl_clip": 0.1}
    if method in RESCALED:
        options |= {"scale_every": 3, "scale_decay": 0.7}
    if method in TRACED:
        options |= {"damping": tekfac.TraceDamping(nu=0.3)}
    if method == "EKFAC":
        options |= {"damping": tekfac.FactoredDamping(0.02)}
    if method == "KFAC":
        options |= {"damping": tekfac.RelativeDamping(0.02)}
    if fisher == "generator":
        options["generator"] = torch.Generator().manual_seed(5)
    options |= {"power": 0.6, "rms_clip": 0.3, **given}
    options["fisher"] = "empirical" if fisher == "empirical" else "mc"
    first_order = tekfac.Adam(lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    return getattr(tekfac, method)(
        model, lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.1, first_order=first_order,
        **options,
    )  # fmt: skip


def build_otherwise(method: str, model: nn.Module, fisher: str) -> tekfac.NaturalGradient:
    """One in which all of them are different."""
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(99)}
    if method in RESCALED:
        options |= {"scale_every": 1, "scale_decay": 0.1}
    if method in TRACED:
        options |= {"fc_scale": 7.0}
    return getattr(tekfac, method)(
        model, lr=9.0, momentum=0.1, damping=5.0, factor_every=7, basis_every=1, factor_decay=0.2,
        fisher="empirical" if fisher == "empirical" else "mc", **options,
    )  # fmt: skip


def train(
    model: nn.Module,
    optimizer: tekfac.NaturalGradient,
    steps: range,
    scheduler: CosineAnnealingLR | None = None,
) -> None:
    for step in steps:
        x, y = BATCHES[step]
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(found: Any, expected: Any) -> bool:
    """Equality of nested containers of tensors and numbers, bit for bit."""
    if isinstance(expected, Tensor):
        return torch.equal(found, expected) and found.dtype == expected.dtype
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (dict, list, tuple)):
        for value in nested.values() if isinstance(nested, dict) else nested:
            yield from tensors(value)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def count_backward(module: nn.Module) -> list[Tensor]:
    """A list that gets longer with each backward pass through this module."""
    seen: list[Tensor] = []

    def listen(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(seen.append)

    module.register_forward_hook(listen)
    return seen


def through_file(value: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


# -- state_dict and load_state_dict ----------------------------------------------------------------


# At every step with each method, labels in turns.
@pytest.mark.parametrize(
    ("method", "fisher", "steps"),
    [
        (method, FISHERS[(i + steps) % 3], steps)
        for i, method in enumerate(METHODS)
        for steps in range(1, 8)
    ],
)
def test_resumed_run_is_the_uninterrupted_one(method: str, fisher: str, steps: int) -> None:
    model = network()
    optimizer = build(method, model, fisher)
    scheduler = CosineAnnealingLR(optimizer, T_max=14)
    train(model, optimizer, range(steps), scheduler)
    saved = through_file(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        weights_only=True,
    )
    train(model, optimizer, range(steps, 2 * steps), scheduler)

    resumed = network()
    nn.init.zeros_(resumed[-1].weight)
    other = build_otherwise(method, resumed, fisher)
    other_scheduler = CosineAnnealingLR(other, T_max=99)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    other_scheduler.load_state_dict(saved["scheduler"])
    train(resumed, other, range(steps, 2 * steps), other_scheduler)

    assert same(resumed.state_dict(), model.state_dict())
    assert same(other.state_dict(), optimizer.state_dict())
    for name, block in optimizer.blocks.items():
        assert other.blocks[name].trace == block.trace
        assert other.blocks[name].damping == block.damping
        assert torch.equal(other.blocks[name].eigenvalues, block.eigenvalues)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_before_the_first_step(method: str) -> None:
    model, resumed = network(), network()
    optimizer, other = build(method, model), build_otherwise(method, resumed, "mc")
    other.load_state_dict(through_file(optimizer.state_dict(), weights_only=True))
    train(model, optimizer, range(4))
    train(resumed, other, range(4))
    assert same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_resumed_while_a_layer_gets_no_gradient(method: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.gated = nn.Linear(16, 3), nn.Linear(16, 3)
            self.gate = 0.0

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.body(x) + self.gate * self.gated(x)

    model, resumed = Gated(), Gated()
    optimizer, other = (getattr(tekfac, method)(m, factor_every=4) for m in (model, resumed))
    train(model, optimizer, range(1))
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for step in range(1, 6):
        model.gate = resumed.gate = float(step >= 2)
        train(model, optimizer, range(step, step + 1))
        train(resumed, other, range(step, step + 1))
        assert optimizer.blocks["gated"].empty == other.blocks["gated"].empty == (step < 4)
    assert same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_resumed_with_square_matrices_the_other_way_round(method: str) -> None:
    class Turned(nn.Module):
        """As GPT-2's ``Conv1D``: inputs stand to the left of the weight."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    x, y = torch.randn(8, 4), torch.arange(8) % 4

    def go(model: nn.Module, optimizer: tekfac.NaturalGradient) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    model, other = Turned(), Turned()
    optimizer = getattr(tekfac, method)(model)
    go(model, optimizer)
    resumed = getattr(tekfac, method)(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(optimizer.state_dict(), weights_only=True))
    go(model, optimizer)
    go(other, resumed)
    assert torch.equal(model.weight, other.weight)
    assert same(optimizer.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_in_lower_precision(method: str, dtype: torch.dtype) -> None:
    model, resumed = network().double(), network().to(dtype)
    optimizer, other = build(method, model), build(method, resumed)
    train(model, optimizer, range(3))
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(resumed, other, range(3, 6))
    for name, block in other.blocks.items():
        assert block.eigenvalues.dtype == torch.float32, name
    for p in resumed.parameters():
        assert p.isfinite().all()


def test_resumed_groups_keep_their_own_settings() -> None:
    def grouped(model: nn.Module, factor: float) -> tekfac.TEKFAC:
        first = {"params": model[0].parameters(), "lr": 0.1 * factor, "damping": 0.2 * factor}
        rest = {"params": model[1:].parameters(), "momentum": 0.5, "weight_decay": 0.1 * factor}
        rest["power"] = 0.5 * factor
        return tekfac.TEKFAC(model, **INTERVALS, params=[first, rest])

    model, resumed = network(), network()
    optimizer, other = grouped(model, 1), grouped(resumed, 0.5)
    train(model, optimizer, range(3))
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["damping"] == 0.2
    assert other.blocks["0"].damping == pytest.approx(0.2)
    train(model, optimizer, range(3, 7))
    train(resumed, other, range(3, 7))
    assert same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_state_from_before_there_were_powers(method: str) -> None:
    """It goes on as it was, with the power that there was, whatever the optimizer was made with."""
    model, resumed = network(), network()
    optimizer = build(method, model, power=1.0)
    train(model, optimizer, range(3))
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["power"]
    resumed.load_state_dict(model.state_dict())
    other = build(method, resumed, power=0.5)
    other.load_state_dict(old)
    train(model, optimizer, range(3, 7))
    train(resumed, other, range(3, 7))
    assert same(resumed.state_dict(), model.state_dict())


def test_a_changed_setting_of_a_loaded_group_counts() -> None:
    model = network()
    optimizer = build("KFAC", model)
    train(model, optimizer, range(1))
    other = build("KFAC", network())
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["damping"] = 0.7
    assert other.blocks["0"].damping == pytest.approx(0.7)


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_state_shares_no_tensors(method: str) -> None:
    model, resumed = network(), network()
    optimizer, other = build(method, model), build(method, resumed)
    train(model, optimizer, range(3))
    other.load_state_dict(optimizer.state_dict())
    states = optimizer.state_dict(), other.state_dict()
    theirs, ours = ({t.data_ptr() for t in tensors(state)} for state in states)
    assert theirs
    assert not theirs & ours
    before = copy.deepcopy(optimizer.state_dict())
    train(resumed, other, range(3, 6))
    assert same(optimizer.state_dict(), before)


def test_the_state_dict_is_left_as_it_was() -> None:
    model = network()
    optimizer = build("TEKFAC", model)
    train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    build("TEKFAC", network()).load_state_dict(state)
    assert same(state, kept)


def of_another_method() -> dict[str, Any]:
    model = network()
    optimizer = build("EKFAC", model)
    train(model, optimizer, range(2))
    return optimizer.state_dict()


def of_another_width() -> dict[str, Any]:
    model = network(hidden=4)
    optimizer = build("TEKFAC", model)
    train(model, optimizer, range(2))
    return optimizer.state_dict()


def of_fewer_layers() -> dict[str, Any]:
    model = network()
    optimizer = tekfac.TEKFAC(model, exclude=["4"])
    train(model, optimizer, range(2))
    return optimizer.state_dict()


def of_other_groups() -> dict[str, Any]:
    model = network()
    groups = [{"params": model[:4].parameters()}, {"params": model[4:].parameters()}]
    optimizer = tekfac.TEKFAC(model, params=groups)
    train(model, optimizer, range(2))
    return optimizer.state_dict()


def of_another_order() -> dict[str, Any]:
    model = network()
    backwards = [{"params": list(model.parameters())[::-1]}]
    optimizer = tekfac.TEKFAC(model, momentum=0.0, params=backwards)
    train(model, optimizer, range(2))
    return optimizer.state_dict()


def of_torch() -> dict[str, Any]:
    return torch.optim.SGD(network().parameters(), momentum=0.9).state_dict()


MISFITS: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (of_another_method, r"^this is a state of EKFAC, not of TEKFAC$"),
    (of_another_width, r"another architecture: layer '4' has a block of shape \(4, 9\) there, "
                       r"\(3, 9\) here"),
    (of_fewer_layers, r"layer '4' has a block of shape none there, \(3, 9\) here"),
    (of_other_groups, r"parameter groups of \[4, 4\] parameters, this optimizer of \[8\]"),
    (of_another_order, r"in another order: those of layer '0' are numbers \[7, 6\] there, "
                       r"\[0, 1\] here; make the parameter groups in the same way"),
    (of_torch, r"not made by a tekfac optimizer: it has no entry 'tekfac', only "
               r"\['param_groups', 'state'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "message"), MISFITS)
def test_a_state_that_does_not_fit_changes_nothing(
    source: Callable[[], dict[str, Any]], message: str
) -> None:
    model = network()
    optimizer = build("TEKFAC", model)
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(source())
    assert same(optimizer.state_dict(), before)

    untouched = network()
    reference = build("TEKFAC", untouched)
    train(untouched, reference, range(6))
    train(model, optimizer, range(2, 6))
    assert same(model.state_dict(), untouched.state_dict())


def test_a_state_of_other_first_order_parameters_changes_nothing() -> None:
    def normalised(width: int) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Unflatten(1, (-1, width)),
                             nn.LayerNorm(width), nn.Flatten(), nn.Linear(4, 3))  # fmt: skip

    model, another = normalised(4), normalised(2)
    optimizer, other = tekfac.TEKFAC(model), tekfac.TEKFAC(another)
    train(model, optimizer, range(2))
    train(another, other, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    message = r"another architecture: parameter 2 has shape \(2,\) there, \(4,\) here"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    assert same(optimizer.state_dict(), before)


# -- copies ----------------------------------------------------------------------------------------

Pair = tuple[nn.Module, tekfac.NaturalGradient]


def deepcopied(model: nn.Module, optimizer: tekfac.NaturalGradient) -> Pair:
    return copy.deepcopy((model, optimizer))


def deepcopied_alone(model: nn.Module, optimizer: tekfac.NaturalGradient) -> Pair:
    optimizer = copy.deepcopy(optimizer)
    return optimizer.model, optimizer


def pickled(model: nn.Module, optimizer: tekfac.NaturalGradient) -> Pair:
    return pickle.loads(pickle.dumps((model, optimizer)))


def pickled_in_reverse(model: nn.Module, optimizer: tekfac.NaturalGradient) -> Pair:
    optimizer, model = pickle.loads(pickle.dumps((optimizer, model)))
    return model, optimizer


def saved(model: nn.Module, optimizer: tekfac.NaturalGradient) -> Pair:
    return through_file((model, optimizer), weights_only=False)


COPIES = [deepcopied, deepcopied_alone, pickled, pickled_in_reverse, saved]


@pytest.mark.parametrize(
    ("method", "fisher", "scheduled"),
    [
        *((method, "mc", False) for method in METHODS),
        ("TEKFAC", "generator", True),
        ("TEKFAC", "empirical", True),
    ],
)
@pytest.mark.parametrize("make_copy", COPIES)
def test_a_copy_goes_on_by_itself(
    make_copy: Callable[[nn.Module, tekfac.NaturalGradient], Pair],
    method: str,
    fisher: str,
    scheduled: bool,
) -> None:
    model = network()
    optimizer = build(method, model, fisher)
    scheduler = CosineAnnealingLR(optimizer, T_max=14) if scheduled else None
    train(model, optimizer, range(3), scheduler)
    count = hooks(model)

    twin, other = make_copy(model, optimizer)
    assert other.model is twin
    assert hooks(model) == hooks(twin) == count
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(twin, other, range(3, 8))
    assert same((model.state_dict(), optimizer.state_dict()), before)
    train(model, optimizer, range(3, 8))
    assert same(twin.state_dict(), model.state_dict())
    assert same(other.state_dict(), optimizer.state_dict())

    other.close()
    assert hooks(twin) == 0
    assert hooks(model) == count


@pytest.mark.parametrize("make_copy", COPIES)
def test_a_copy_of_a_closed_optimizer_is_closed(
    make_copy: Callable[[nn.Module, tekfac.NaturalGradient], Pair],
) -> None:
    model = network()
    optimizer = build("KFAC", model)
    train(model, optimizer, range(1))
    optimizer.close()
    twin, other = make_copy(model, optimizer)
    assert hooks(model) == hooks(twin) == 0
    with pytest.raises(RuntimeError, match="closed"):
        other.step()


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: through_file(model, weights_only=False)]
)
def test_a_copy_of_the_model_alone_is_not_listened_to(
    make_copy: Callable[[nn.Module], nn.Module],
) -> None:
    model, untouched = network(), network()
    optimizer, reference = build("TEKFAC", model), build("TEKFAC", untouched)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        train(untouched, reference, range(step, step + 1))
        twin = make_copy(model)
        backward_passes = count_backward(twin[2])
        optimizer.zero_grad()
        F.cross_entropy(twin(BATCHES[9][0]), BATCHES[9][1]).backward()
        assert len(backward_passes) == 1
    assert same(optimizer.state_dict(), reference.state_dict())

    twin = make_copy(model)
    own = build("TEKFAC", twin)
    twin(BATCHES[9][0])
    assert hooks(twin) == hooks(model)
    own.close()
    assert hooks(twin) == 0


def test_close_leaves_no_trace_in_the_model() -> None:
    model = network()
    optimizer = build("TEKFAC", model)
    assert hooks(model) > 0
    train(model, optimizer, range(2))
    optimizer.close()
    optimizer.close()
    assert hooks(model) == 0
    assert b"tekfac" not in pickle.dumps(model)
    assert b"tekfac" not in pickle.dumps(copy.deepcopy(model))


@pytest.mark.skipif(
    TORCH < (2, 7),
    reason="torch 2.6 exports no model with hooks: close() the optimizer first",
)
def test_a_model_in_training_is_exported() -> None:
    model, x = network(), BATCHES[0][0]
    optimizer = build("TEKFAC", model)
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            expected = model(x)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
        assert torch.equal(torch.export.export(model, (x,), strict=True).module()(x), expected)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("error", category=torch.jit.TracerWarning)
            assert torch.equal(torch.jit.trace(model, x)(x), expected)
            with pytest.raises(AttributeError, match=r"torch\.jit\.script can't compile the hooks"):
                torch.jit.script(model)
        train(model.train(), optimizer, range(2))
    optimizer.close()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        torch.jit.script(model)


def test_close_leaves_other_hooks_alone() -> None:
    model = network()
    optimizer = build("TEKFAC", model)
    seen: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(module))
    optimizer.close()
    model(BATCHES[0][0])
    assert seen == [model[0]]
    assert hooks(model) == 1


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks_go_with_the_optimizer(fisher: str, scheduled: bool) -> None:
    model = network()
    optimizer = build("TEKFAC", model, fisher)
    scheduler = CosineAnnealingLR(optimizer, T_max=14) if scheduled else None
    x, y = BATCHES[0]
    loss = F.cross_entropy(model(x), y)  # kept, with its graph, as in most loops
    loss.backward()
    optimizer.step()
    gc.disable()
    try:
        del optimizer, scheduler
        assert hooks(model) == 0
    finally:
        gc.enable()
    assert loss.grad_fn is not None


def test_an_error_in_evaluation_keeps_nothing_alive() -> None:
    def go() -> weakref.ref[Any]:
        model = nn.Sequential(nn.Linear(4, 1))  # one logit is none of a categorical likelihood
        optimizer = build("TEKFAC", model)
        model.eval()(torch.randn(2, 4))
        return weakref.ref(optimizer)

    optimizer = go()
    gc.collect()
    assert optimizer() is None


def test_a_closed_optimizer_does_not_step() -> None:
    model = network()
    optimizer = build("TEKFAC", model)
    train(model, optimizer, range(2))
    optimizer.close()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    F.cross_entropy(model(BATCHES[2][0]), BATCHES[2][1]).backward()
    parameters = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="this TEKFAC optimizer is closed: its hooks were"):
        optimizer.step()
    assert same(optimizer.state_dict(), before[1])
    assert same([p.detach() for p in model.parameters()], parameters)
