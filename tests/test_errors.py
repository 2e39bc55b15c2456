"""What is said to a user who gives something that can't work: what was wrong, with the value."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tekfac
from harness import METHODS, RESCALED, TRACED

NAN, INF = float("nan"), float("inf")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2))


def backward(model: Callable[[Tensor], Tensor]) -> None:
    F.cross_entropy(model(torch.randn(5, 4)), torch.randint(2, (5,))).backward()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def make(method: str, *args: Any, **options: Any) -> tekfac.NaturalGradient:
    return getattr(tekfac, method)(*args, **options)


# -- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (lambda: network().parameters(), "generator"),
        (lambda: list(network().parameters()), "list"),
        (lambda: None, "NoneType"),
    ],
)
def test_parameters_instead_of_a_model(method: str, given: Callable[[], Any], kind: str) -> None:
    message = (
        rf"^{method} needs the model itself, not its parameters, to see what its layers see: "
        rf"{method}\(model, lr=\.\.\.\); got {kind} \(to a framework that makes optimizers from a "
        r"class, give one that is made\)$"
    )
    with pytest.raises(TypeError, match=message):
        make(method, given(), lr=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [nn.Sequential(nn.LayerNorm(3)), nn.ReLU()])
def test_no_supported_layer(method: str, model: nn.Module) -> None:
    message = (
        rf"^{method} found no layer that it supports in {type(model).__name__} \(matrices that "
        r"rows are multiplied by, embeddings, convolutions\): use a torch\.optim optimizer for "
        r"this model$"
    )
    with pytest.raises(ValueError, match=message):
        make(method, model)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"params": [{"params": []}]},
        {"exclude": ["0"], "params": [{"params": []}]},
    ],
)
def test_no_layer_left_to_train(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no layer that TEKFAC supports .* has a parameter to"):
        make("TEKFAC", network(), **options)


def test_everything_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="all are frozen, left out or not in the parameter groups"):
        make("KFAC", model)
    assert hooks(model) == 0


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    message = (
        r"^parameter 'weight' of module '1' has no shape yet: run one batch through a lazy model "
        r"before making its optimizer$"
    )
    with pytest.raises(ValueError, match=message):
        make("TEKFAC", model)
    model(torch.randn(5, 4))
    assert set(make("TEKFAC", model).blocks) == {"0", "1"}


# -- settings --------------------------------------------------------------------------------------

NOT_FINITE = "must be finite and not negative, got"
BAD_NUMBERS = [
    *(("lr", value, f"^lr {NOT_FINITE} {value}$") for value in (-1.0, NAN, INF)),
    *(("weight_decay", v, f"^weight_decay {NOT_FINITE} {v}$") for v in (-0.1, NAN, INF)),
    *(("momentum", v, rf"^momentum must be in \[0, 1\), got {v}$") for v in (1, 1.5, -0.1, NAN)),
    *(
        ("damping", v, f"^damping must be positive and finite, got {v}$")
        for v in (0, -1e-3, NAN, INF)
    ),
    ("damping", "small", r"^damping must be a positive float.*, got str: 'small'$"),
    ("damping", True, r"^damping must be a positive float.*, got bool: True$"),
    ("damping", None, r"^damping must be a positive float.*, got NoneType: None$"),
    *(
        ("power", v, f"^power must be above 0 and at most 1, got {v}$")
        for v in (0, -0.5, 1.5, NAN, INF)
    ),
    *(
        ("factor_decay", v, rf"^factor_decay must be in \[0, 1\), got {v}$")
        for v in (-0.1, 1, 2.0, NAN)
    ),
    *(
        ("kl_clip", v, f"^kl_clip must be positive and finite, got {v}$")
        for v in (0, -1.0, NAN, INF)
    ),
    *(
        (name, value, rf"^{name} must be a whole number of at least 1, got {value}$")
        for name in ("factor_every", "basis_every", "mc_samples")
        for value in (0, -1, 1.5, True, None)
    ),
    ("fisher", "mcc", r"""^fisher must be "mc", "exact" or "empirical", got 'mcc'$"""),
    (
        "likelihood",
        "poisson",
        r"^likelihood must be one of 'categorical', 'bernoulli', 'gaussian', got 'poisson'$",
    ),
    ("likelihood", 3, r"^likelihood must be a name or a tekfac likelihood such as .*, got 3$"),
    ("loss_reduction", "none", r"""^loss_reduction must be "mean" or "sum", got 'none'$"""),
    ("exclude", ["1x"], r"^exclude names no module of the model: '1x' \(it has '0', '1', '2', '3'"),
    ("exclude", [3], r"^exclude takes module names and nn.Module classes, got int: 3$"),
    ("exclude", "0", r"^exclude takes a list of module names and nn.Module classes, got '0'$"),
    ("exclude", nn.Linear, r"^exclude takes a list of .*, got <class 'torch\.nn\..*Linear'>$"),
    ("params", torch.ones(3), r"^params takes a list of parameter groups: \[\{'params': "),
    ("params", {"params": []}, r"^params takes a list of parameter groups"),
    ("params", 3, r"^params takes a list of parameter groups"),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "value", "message"), BAD_NUMBERS)
def test_bad_settings(method: str, name: str, value: Any, message: str) -> None:
    model = network()
    with pytest.raises((ValueError, TypeError), match=message):
        make(method, model, **{name: value})
    assert hooks(model) == 0


@pytest.mark.parametrize("method", RESCALED)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            ("scale_every", v, rf"^scale_every must be a whole number of at least 1, got {v}$")
            for v in (0, -1, 1.5, True)
        ),
        *(
            ("scale_decay", v, rf"^scale_decay must be in \[0, 1\), got {v}$")
            for v in (-0.1, 1, NAN)
        ),
    ],
)
def test_bad_rescaling_settings(method: str, name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(method, network(), **{name: value})


@pytest.mark.parametrize("method", TRACED)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("automatic", r"""^fc_scale must be "auto" or a positive number, got 'automatic'$"""),
        (0, r"^fc_scale must be positive and finite, got 0$"),
        (-1.0, r"^fc_scale must be positive and finite, got -1.0$"),
        (NAN, r"^fc_scale must be positive and finite, got nan$"),
    ],
)
def test_bad_fc_scale(method: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(method, network(), fc_scale=value)


@pytest.mark.parametrize("method", ["KFAC", "EKFAC"])
def test_trace_damping_where_there_is_none(method: str) -> None:
    message = (
        rf"^{method} has no trace damping \(the paper defines it for TKFAC and TEKFAC\): give "
        r"damping as a positive float, e\.g\. damping=1e-3$"
    )
    with pytest.raises(ValueError, match=message):
        make(method, network(), damping=tekfac.TraceDamping())
    model = network()
    groups = [{"params": model.parameters(), "damping": tekfac.TraceDamping()}]
    with pytest.raises(ValueError, match=message):
        make(method, model, params=groups)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((m, "fc_scale") for m in ("KFAC", "EKFAC")),
        *((m, n) for m in ("KFAC", "TKFAC") for n in ("scale_every", "scale_decay")),
        *((m, "dampening") for m in METHODS),
    ],
)
def test_settings_that_a_method_does_not_have(method: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        make(method, network(), **{name: 1})


@pytest.mark.parametrize("nu", [0, -1.0, NAN, INF])
def test_bad_nu(nu: float) -> None:
    message = f"^TraceDamping's nu must be positive and finite, got {nu}$"
    with pytest.raises(ValueError, match=message):
        tekfac.TraceDamping(nu=nu)


@pytest.mark.parametrize("damping", [0, -1.0, NAN, INF])
@pytest.mark.parametrize("rule", [tekfac.FactoredDamping, tekfac.RelativeDamping])
def test_bad_damping_of_a_rule(rule: Callable[[float], object], damping: float) -> None:
    message = f"^{rule.__name__}'s damping must be positive and finite, got {damping}$"
    with pytest.raises(ValueError, match=message):
        rule(damping)


@pytest.mark.parametrize("variance", [0, -1.0, NAN, INF])
def test_bad_variance(variance: float) -> None:
    message = f"^Gaussian's variance must be positive and finite, got {variance}$"
    with pytest.raises(ValueError, match=message):
        tekfac.Gaussian(variance=variance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, f"^Adam's lr {NOT_FINITE} -1.0$"),
        ({"lr": NAN}, f"^Adam's lr {NOT_FINITE} nan$"),
        ({"eps": -1e-8}, f"^Adam's eps {NOT_FINITE} -1e-08$"),
        ({"weight_decay": INF}, f"^Adam's weight_decay {NOT_FINITE} inf$"),
        ({"betas": (0.9, 1.0)}, r"^Adam's betas must be in \[0, 1\), got 1.0$"),
        ({"betas": (NAN, 0.9)}, r"^Adam's betas must be in \[0, 1\), got nan$"),
    ],
)
def test_bad_first_order_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tekfac.Adam(**options)


# -- parameter groups ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": -1.0}, f"^lr {NOT_FINITE} -1.0$"),
        ({"weight_decay": NAN}, f"^weight_decay {NOT_FINITE} nan$"),
        ({"damping": 0.0}, "^damping must be positive and finite, got 0.0$"),
        ({"power": 2.0}, "^power must be above 0 and at most 1, got 2.0$"),
        ({"momentum": 1.0}, r"^momentum must be in \[0, 1\), got 1.0$"),
    ],
)
def test_bad_group_settings(group: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        make("TEKFAC", model, params=[{"params": model.parameters(), **group}])

    model[0].requires_grad_(False)
    optimizer = make("TEKFAC", model)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model[0].parameters(), **group})
    assert optimizer.state_dict()["param_groups"] == before
    assert set(optimizer.blocks) == {"3"}


def test_groups_that_overlap_or_are_none() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = make("TEKFAC", model)
    model[0].requires_grad_(True)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        # The layer's parameters are new, the norm's are not: neither may go in.
        optimizer.add_param_group({"params": [*model[0].parameters(), *model[2].parameters()]})
    with pytest.raises(TypeError, match=r"^a parameter group is a dict with 'params', got \[Para"):
        optimizer.add_param_group(list(model[0].parameters()))
    with pytest.raises(
        TypeError, match=r"^a parameter group is a dict with 'params', got \{'lr': 1"
    ):
        optimizer.add_param_group({"lr": 1.0})
    assert optimizer.state_dict()["param_groups"] == before
    assert set(optimizer.blocks) == {"3"}
    optimizer.add_param_group({"params": model[0].parameters()})
    assert set(optimizer.blocks) == {"0", "3"}


def test_the_other_half_of_a_layer() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    optimizer = make("TEKFAC", model)
    assert optimizer.blocks["0"].shape == (3, 4)
    model[0].bias.requires_grad_(True)
    message = (
        r"^layer '0' already has a block that does not cover this parameter of shape \(3,\): make "
        r"a new optimizer to change which of a layer's parameters are trained$"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [model[0].bias]})
    assert len(optimizer.param_groups) == 1


def test_add_param_group_after_close() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = make("TEKFAC", model)
    optimizer.close()
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="this TEKFAC optimizer is closed"):
        optimizer.add_param_group({"params": model[0].parameters()})
    assert hooks(model) == 0


# -- outputs and inputs ----------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model whose output is made into something else."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = network()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.inner(x))


FITS = r"; give likelihood=, or output= to pick the right tensor$"


@pytest.mark.parametrize(
    ("likelihood", "change", "message"),
    [
        ("categorical", lambda out: out.argmax(1),
         r"^the categorical likelihood needs logits of shape \(N, classes, \.\.\.\), got an output "
         rf"of shape \(5,\) and dtype torch\.int64{FITS}"),
        ("categorical", lambda out: out[:, 0],
         rf"^the categorical likelihood needs .*, got an output of shape \(5,\) .*float32 "
         r'\(one logit for each example is likelihood="bernoulli"; for all logits of a '
         r"single one give "
         r"output=lambda logits: logits\[None\]; of a flow's log-probabilities no label can be "
         rf'drawn: fisher="empirical"\){FITS}'),
        ("categorical", lambda out: out.mean(),
         rf"^the categorical likelihood needs .*, got an output of shape \(\) .*{FITS}"),
        (tekfac.Categorical(dim=-1), lambda out: out[:, 0],
         r"^the categorical likelihood needs .*, got an output of shape \(5,\)"),
        (tekfac.Categorical(dim=2), lambda out: out,
         r"^Categorical\(dim=2\): an output of shape \(5, 2\) has no such class dimension after"),
        (tekfac.Categorical(dim=0), lambda out: out,
         r"^Categorical\(dim=0\): an output of shape \(5, 2\) has no such class dimension after"),
        ("bernoulli", lambda out: (out > 0),
         r"^the bernoulli likelihood needs logits of shape \(N, \.\.\.\), got an output of shape "
         rf"\(5, 2\) and dtype torch\.bool{FITS}"),
        ("gaussian", lambda out: out.mean(),
         r"^the gaussian likelihood needs means of shape \(N, \.\.\.\), got .* of shape \(\) and"),
        ("categorical", lambda out: ("nothing", 3),
         r"^the model returned tuple, neither a tensor nor something with logits in it: "
         r"give output=, .* e\.g\. output=lambda result: result\[0\]$"),
        ("categorical", lambda out: {"logits": 3}, r"^the model returned dict, neither"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_outputs_that_a_likelihood_can_not_be_applied_to(
    fisher: str, likelihood: Any, change: Callable[[Tensor], Any], message: str
) -> None:
    model = Wrapped(change)
    optimizer = make("TEKFAC", model, fisher=fisher, likelihood=likelihood)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(5, 4))
    model.eval()
    model(torch.randn(5, 4))  # evaluation may do as it likes
    assert optimizer.counters["steps"] == 0


def test_output_that_is_no_tensor() -> None:
    model = Wrapped(lambda out: (out, out))
    make("TEKFAC", model, output=lambda result: result[0])
    model(torch.randn(5, 4))


@pytest.mark.parametrize("method", METHODS)
def test_input_that_changes_width(method: str) -> None:
    model = network()
    optimizer = make(method, model, factor_every=1)
    backward(model)
    optimizer.step()
    model[0].weight = nn.Parameter(torch.randn(3, 7))
    message = (
        r"^layer '0' has a weight of shape \(3, 7\) now, but its curvature block was built "
        r"for \(3, 4\): make a new optimizer after a layer's parameters have changed shape$"
    )
    with pytest.raises(ValueError, match=message):
        model(torch.randn(5, 7))


def test_convolution_input_that_changes_width() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    optimizer = make("TEKFAC", model)
    model[0].weight = nn.Parameter(torch.randn(3, 5, 2, 2))
    with pytest.raises(ValueError, match=r"layer '0' .* \(3, 5, 2, 2\) now, .* for \(3, 2, 2, 2\)"):
        model(torch.randn(4, 5, 6, 6))
    optimizer.close()
    model(torch.randn(4, 5, 6, 6))


# -- steps -----------------------------------------------------------------------------------------

NO_STATISTICS = (
    r"^step\(\) found gradients, but no statistics could be taken: call the model itself "
    r"\(Sequential\.__call__, the module given to {}\) or modules in it, and backward\(\) of a "
    r"loss that is made of what they return$"
)


def test_a_loss_of_another_tensor_than_output_gives() -> None:
    """As CLIP's loss is of the one of two transposed matrices of similarities."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            similar = self.layer(x)
            return {"rows": similar, "columns": similar.T.contiguous()}

    both = Both()
    optimizer = make("TEKFAC", both, output=lambda result: result["columns"])
    F.cross_entropy(both(torch.randn(3, 2))["rows"], torch.arange(3)).backward()
    with pytest.raises(RuntimeError, match=r"they return, and of the tensor that output= gives$"):
        optimizer.step()


def test_step_without_a_forward_through_the_model() -> None:
    model = network()
    optimizer = make("TEKFAC", model)
    backward(lambda x: F.linear(x, model[0].weight) @ model[3].weight.T)  # no module is called
    with pytest.raises(RuntimeError, match=NO_STATISTICS.format("TEKFAC")):
        optimizer.step()

    model = network()
    optimizer = make("TEKFAC", model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=NO_STATISTICS.format("TEKFAC")):
        optimizer.step()


def test_step_without_gradients_changes_nothing() -> None:
    model = network()
    optimizer = make("TEKFAC", model, weight_decay=0.5)
    before = copy.deepcopy(model)
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    optimizer = make("TEKFAC", model)
    F.cross_entropy(model(torch.tensor([0, 1])), torch.tensor([0, 1])).backward()
    message = r"^TEKFAC does not support sparse gradients: give embeddings sparse=False$"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "ask",
    [
        lambda block: block.trace,
        lambda block: block.damping,
        lambda block: block.eigenvalues,
        lambda block: block.dense(),
        lambda block: block.matvec(torch.ones(15)),
        lambda block: block.inverse_matvec(torch.ones(15)),
    ],
)
def test_blocks_before_the_first_step(method: str, ask: Callable[[Any], Any]) -> None:
    block = make(method, network()).blocks["0"]
    assert block.empty
    assert (block.name, block.shape, block.groups) == ("0", (3, 5), 1)
    message = (
        r"^block '0' has no curvature yet: it comes with the first step\(\) whose backward pass "
        r"reaches the layer$"
    )
    with pytest.raises(RuntimeError, match=message):
        ask(block)


@pytest.mark.parametrize("method", METHODS)
def test_vectors_of_the_wrong_shape(method: str) -> None:
    model = network()
    optimizer = make(method, model)
    backward(model)
    optimizer.step()
    block = optimizer.blocks["0"]
    for product in (block.matvec, block.inverse_matvec):
        for shape in [(3, 5), (15,)]:
            assert product(torch.ones(shape)).shape == shape
        for shape, words in [((5, 3), r"\(5, 3\)"), ((14,), r"\(14,\)"), ((1, 15), r"\(1, 15\)")]:
            message = rf"^block '0' takes vectors of shape \(3, 5\) or \(15,\), got {words}$"
            with pytest.raises(ValueError, match=message):
                product(torch.ones(shape))


def test_dense_of_a_large_block() -> None:
    model = nn.Sequential(nn.Linear(100, 100))
    optimizer = make("TEKFAC", model)
    F.cross_entropy(model(torch.randn(3, 100)), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    message = (
        r"^block '0' has 10100 rows; dense\(\) makes matrices of up to 8192 rows: use matvec or "
        r"inverse_matvec$"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.blocks["0"].dense()


def test_a_block_of_no_layer_and_blocks_are_read_only() -> None:
    optimizer = make("TEKFAC", network())
    with pytest.raises(KeyError, match="fc1"):
        optimizer.blocks["fc1"]
    with pytest.raises(TypeError, match="does not support item assignment"):
        optimizer.blocks["fc1"] = optimizer.blocks["0"]
    optimizer.counters["steps"] = 5
    assert optimizer.counters["steps"] == 0
