"""Every kind of layer, every shape and circumstance of one, against `reference`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
import tekfac
from harness import METHODS, TOLERANCE, SideBySide, batch, flattened, mlp, relative
from reference import Trace


class Net(nn.Module):
    """A layer under test, and a small head that looks at each of its outputs in another way."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.layer, self.head = layer.double(), nn.Linear(4, 3).double()
        self.register_buffer("view", torch.randn(self.layer(x)[0].numel(), 4).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh().flatten(1) @ self.view)


def check(model: nn.Module, x: Tensor, method: str, fisher: str, **options: Any) -> SideBySide:
    """Factors, rescaling and step of a model's layers are the reference's."""
    pair = SideBySide(model, method, fisher=fisher, **options)
    pair.step(x, torch.randint(3, (len(x),)))
    pair.check_parameters()
    pair.check_blocks()
    return pair


def check_layer(layer: nn.Module, x: Tensor, fisher: str = "exact") -> None:
    """KFAC's and TKFAC's blocks are the factors, TEKFAC's the basis and Λ."""
    model = Net(layer, x)
    for method in ("KFAC", "TKFAC", "TEKFAC"):
        pair = check(copy.deepcopy(model), x, method, fisher)
    if fisher == "exact":
        groups = reference.measure(model, x, torch.zeros(len(x)), reference.categorical)["layer"]
        norms = sum(float(g.weight @ g.gradients.square().sum((1, 2))) / len(x) for g in groups)
        total = float(pair.fast.blocks["layer"].eigenvalues.sum())
        assert total == pytest.approx(norms, rel=TOLERANCE)


# -- fully-connected layers ------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_linear(leading: tuple[int, ...], bias: bool, fisher: str) -> None:
    torch.manual_seed(0)
    check_layer(nn.Linear(4, 3, bias=bias), torch.randn(5, *leading, 4).double(), fisher)


def test_linear_subclass_that_is_still_linear() -> None:
    class Named(nn.Linear):
        pass

    torch.manual_seed(0)
    check_layer(Named(4, 3), torch.randn(5, 4).double())


# -- convolutions ----------------------------------------------------------------------------------

SPATIAL = {1: (9,), 2: (6, 7), 3: (4, 3, 4)}
LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def check_convolution(dims: int, channels: int = 4, outputs: int = 4, **options: Any) -> None:
    torch.manual_seed(0)
    options = {"kernel_size": 2, **options}
    layer = LAYERS[dims](channels, outputs, **options)
    check_layer(layer, torch.randn(3, channels, *SPATIAL[dims]).double())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", LAYERS)
def test_convolution_groups(dims: int, groups: int, bias: bool) -> None:
    check_convolution(dims, groups=groups, bias=bias)


# torch has no strided convolution with padding="same".
STRIDES_AND_PADDINGS = [
    (stride, padding)
    for stride in (1, 2, 3)
    for padding in (0, 1, 2, "valid", "same")
    if padding != "same" or stride == 1
]


@pytest.mark.parametrize(("stride", "padding"), STRIDES_AND_PADDINGS)
@pytest.mark.parametrize("dims", LAYERS)
def test_convolution_stride_and_padding(dims: int, stride: int, padding: int | str) -> None:
    # A kernel of 2 with "same" makes one side's padding larger than the other's.
    kernel = 2 if padding == "same" else 3
    check_convolution(dims, 2, 2, kernel_size=kernel, padding=padding, stride=stride)


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", LAYERS)
def test_convolution_padding_modes(dims: int, mode: str, padding: int | str) -> None:
    check_convolution(dims, 2, 2, padding_mode=mode, padding=padding)


@pytest.mark.parametrize("padding", [0, 2, "same"])
@pytest.mark.parametrize("dims", LAYERS)
def test_convolution_dilation(dims: int, padding: int | str) -> None:
    check_convolution(dims, 2, 2, dilation=2, padding=padding)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 1), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 3)},
        {"kernel_size": (1, 4), "stride": (3, 1), "padding": (1, 2), "padding_mode": "circular"},
        {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 1), "padding_mode": "reflect"},
        {"kernel_size": (2, 2), "stride": (2, 1), "padding": (0, 1), "groups": 2, "outputs": 6},
        {"kernel_size": (2, 5), "padding": (1, 2), "dilation": (2, 1), "groups": 4},
        {
            "kernel_size": (3, 2),
            "stride": (2, 1),
            "padding": (1, 2),
            "dilation": (1, 3),
            "groups": 4,
        },
    ],
    ids=str,
)
def test_convolution_with_different_axes(options: dict[str, Any]) -> None:
    check_convolution(2, **options)


@pytest.mark.parametrize("position", ["one", "many"])
@pytest.mark.parametrize("channels", [(2, 9), (9, 2), (4, 4)], ids=str)
def test_convolution_few_and_many_positions(channels: tuple[int, int], position: str) -> None:
    """Whichever order of rotating and summing is cheaper, the result is the same."""
    kernel = SPATIAL[1][0] if position == "one" else 1
    check_convolution(1, *channels, kernel_size=kernel)


# -- circumstances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_activations_in_place(method: str, fisher: str) -> None:
    """What overwrites a layer's output is no part of the layer."""

    def make(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(inplace), nn.Conv2d(3, 2, 2), nn.LeakyReLU(0.2, inplace),
            nn.Flatten(), nn.Linear(18, 4), nn.ELU(inplace=inplace), nn.Linear(4, 3),
        ).double()  # fmt: skip

    check(make(True), batch("pooled", 4)[0], method, fisher, twin=make(False))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_weight_or_bias(method: str, frozen: str, fisher: str) -> None:
    torch.manual_seed(0)
    model = flattened()
    for index in (0, 2, 5):
        getattr(model[index], frozen).requires_grad_(False)
    x, y = batch("flattened", 6)
    pair = SideBySide(model, method, fisher=fisher).step(x, y)
    pair.check_blocks()
    for index in (0, 2, 5):
        block, layer = pair.fast.blocks[str(index)], model[index]
        width = 1 if frozen == "weight" else layer.weight[0].numel()
        assert block.shape == (len(layer.weight), width)
        assert torch.equal(getattr(layer, frozen), pair.start[f"{index}.{frozen}"])
        other = "bias" if frozen == "weight" else "weight"
        name = f"{index}.{other}"
        change = getattr(layer, other) - pair.start[name]
        expected = pair.slow.model.get_parameter(name) - pair.start[name]
        assert relative(change, expected) < TOLERANCE


def test_frozen_layer_has_no_block() -> None:
    torch.manual_seed(0)
    model = mlp()
    model[2].requires_grad_(False)
    x, _ = batch("mlp", 6)
    pair = SideBySide(model, "TEKFAC").step(x, torch.randint(3, (6,)))
    assert set(pair.fast.blocks) == {"0", "4"}
    assert torch.equal(model[2].weight, pair.start["2.weight"])
    pair.check_blocks()


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_channels_last(groups: int, fisher: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(3, 4, 6, 7).double()
    model = Net(layer, x)
    twin = copy.deepcopy(model)
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert model.layer(x).stride() != model.layer(x).contiguous().stride()
    check(model, x, "TEKFAC", fisher, twin=twin)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_uneven_batches(method: str, fisher: str) -> None:
    """Each batch is a mean over its own examples and counts alike in the running average."""
    torch.manual_seed(0)
    # Few enough inputs that not even one batch leaves the basis of a null space to chance.
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    pair = SideBySide(model, method, fisher=fisher, factor_decay=0.6, lr=0.1)
    for examples in (12, 7, 20, 5):
        pair.step(torch.randn(examples, 3).double(), torch.randint(3, (examples,)))
        pair.check_parameters()
        pair.check_blocks()


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_uneven_numbers_of_positions(method: str, fisher: str) -> None:
    """``Γ`` is a mean over each batch's own positions; ``Ω`` is a sum."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 3)
    ).double()
    pair = SideBySide(model, method, fisher=fisher, factor_decay=0.6, lr=0.1)
    for length in (6, 11, 3):
        pair.step(torch.randn(12, 2, length).double(), torch.randint(3, (12,)))
        pair.check_parameters()
        pair.check_blocks()


@pytest.mark.parametrize("damping", [1e-2, Trace(1e-2)], ids=str)
@pytest.mark.parametrize("method", ["TKFAC", "TEKFAC"])
def test_batch_of_one(method: str, damping: float | Trace) -> None:
    torch.manual_seed(0)
    check(flattened(), batch("flattened", 1)[0], method, "exact", damping=damping)


@pytest.mark.parametrize("network", [mlp, flattened])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(method: str, fisher: str, network: Any) -> None:
    """A batch without examples says nothing: the blocks stay as they are, nothing moves."""
    torch.manual_seed(0)
    model = network()
    x, y = batch("mlp" if network is mlp else "flattened", 5)
    optimizer = getattr(tekfac, method)(
        model, momentum=0.0, fisher=fisher, factor_every=1, basis_every=1
    )

    def step(examples: int) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x[:examples]), y[:examples], reduction="sum").backward()
        optimizer.step()

    step(5)
    dense = {name: block.dense() for name, block in optimizer.blocks.items()}
    before = copy.deepcopy(model.state_dict())
    step(0)
    for name, block in optimizer.blocks.items():
        assert relative(block.dense(), dense[name]) < TOLERANCE
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])
    step(5)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.filterwarnings("ignore:no curvature of layers")
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_empty_first_batch(method: str, fisher: str) -> None:
    torch.manual_seed(0)
    model = mlp()
    x, y = batch("mlp", 5)
    optimizer = getattr(tekfac, method)(model, fisher=fisher)
    for examples in (0, 5):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:examples]), y[:examples], reduction="sum").backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(block.trace > 0 for block in optimizer.blocks.values())


class Twice(nn.Module):
    """One layer called twice, at different numbers of positions; and one called once."""

    def __init__(self, layer: nn.Module, fold: bool) -> None:
        super().__init__()
        self.layer, self.fold, self.head = layer, fold, nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        again = h[..., :3] if self.fold else h
        h = self.layer(again).tanh()
        return self.head(h.flatten(2).mean(2) if self.fold else h)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("method", METHODS)
def test_module_called_twice(method: str, kind: str, fisher: str) -> None:
    """The second call's are further positions of the same examples."""
    torch.manual_seed(0)
    convolution = kind == "convolution"
    layer = nn.Conv1d(4, 4, 2) if convolution else nn.Linear(4, 4)
    x = torch.randn(5, 4, 6) if convolution else torch.randn(5, 4)
    pair = check(Twice(layer, fold=convolution), x.double(), method, fisher)
    positions = (
        pair.slow.layers["layer"],
        reference.measure(pair.slow.model, x.double(), torch.zeros(5).long(), pair.draws)["layer"][
            0
        ].inputs.shape[1],
    )
    assert positions[1] == (5 + 2 if convolution else 2)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_module_called_twice_with_only_one_call_in_the_loss(fisher: str) -> None:
    """A call that the output does not depend on is no position."""

    class Partly(Twice):
        def forward(self, x: Tensor) -> Tensor:
            self.unused = self.layer(2 * x).sum()
            return self.head(self.layer(x).tanh())

    torch.manual_seed(0)
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    found = []
    for cls in (Partly, Once):
        torch.manual_seed(1)
        model = cls(nn.Linear(4, 4), False)
        optimizer = tekfac.TEKFAC(model, fisher=fisher)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(optimizer.blocks["layer"].dense())
    assert torch.equal(found[0], found[1])


class Once(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh())


class Folded(nn.Module):
    """Positions moved into the batch dimension, example by example, for as long as a layer runs."""

    def __init__(self, layer: nn.Module, fold: bool) -> None:
        super().__init__()
        self.layer, self.fold, self.head = layer, fold, nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.fold else self.layer(x)
        return self.head(h.tanh().mean(1))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_positions_folded_into_the_batch(method: str, fisher: str) -> None:
    torch.manual_seed(0)
    folded = Folded(nn.Linear(4, 3), True)
    twin = copy.deepcopy(folded)
    twin.fold = False
    check(folded, torch.randn(5, 6, 4).double(), method, fisher, twin=twin)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_layer_that_is_the_whole_model(method: str, fisher: str) -> None:
    torch.manual_seed(0)
    check(nn.Linear(5, 3).double(), batch("mlp", 6)[0], method, fisher)


@pytest.mark.parametrize("entries", [1, 150])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_batches_too_large_for_one_chunk(
    method: str, fisher: str, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One example at a time, or a few, with a remainder: the sums are the same."""
    monkeypatch.setattr("tekfac.layers.layer.CHUNK_ENTRIES", entries)
    torch.manual_seed(0)
    check(flattened(), batch("flattened", 7)[0], method, fisher)
    layer = nn.Conv1d(4, 4, 2)
    check(Twice(layer, fold=True), torch.randn(5, 4, 6).double(), method, fisher)


# -- parameters of the first-order rule ------------------------------------------------------------


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> tekfac.NaturalGradient:
    """After some steps; every parameter has moved and none is nan."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = tekfac.TEKFAC(model, lr=1e-2, fisher="exact")
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert bool(p.isfinite().all()), name
        assert not torch.equal(p, before[name]), name
    return optimizer


def first_order(optimizer: tekfac.NaturalGradient) -> set[str]:
    """Names of the parameters that no block covers, by the optimizer's own account."""
    treatment = optimizer.treatment()
    named = dict(optimizer.model.named_parameters())
    assert set(treatment) == set(named)
    left = {name for name, words in treatment.items() if words.startswith("first order")}
    averaged = {p for p, state in optimizer.state.items() if "exp_avg" in state}
    assert averaged == {named[name] for name in left}
    for name in set(named) - left:
        assert any(block and f"'{block}'" in treatment[name] for block in optimizer.blocks), name
    return left


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.embed.weight
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.hidden(self.embed(x)).tanh()).mT

    torch.manual_seed(0)
    tokens = torch.randint(7, (5, 3))
    optimizer = trained(Tied(), tokens, tokens.roll(1, 1))
    assert set(optimizer.blocks) == {"hidden", "out"}
    assert not first_order(optimizer)


def test_two_layers_of_one_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    optimizer = trained(model.double(), *batch("mlp", 6))
    assert set(optimizer.blocks) == {"0", "4"}
    assert first_order(optimizer) == {"2.bias"}


def test_norms_embeddings_and_free_parameters() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
            self.scale, self.out = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)
            self.up = nn.ConvTranspose2d(3, 3, 2)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(self.norm(self.conv(x)).relu())
            return self.out(h.mean((2, 3)) * self.scale)

    torch.manual_seed(0)
    optimizer = trained(Mixed(), *batch("pooled", 6))
    assert set(optimizer.blocks) == {"conv", "out", "up"}
    expected = {"norm.weight", "norm.bias", "scale", "up.bias"}
    assert first_order(optimizer) == expected


@pytest.mark.parametrize("method", METHODS)
def test_norm_layers_leave_blocks_right(method: str) -> None:
    """LayerNorm keeps examples apart, so the reference can follow the layers around it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = batch("mlp", 6)
    SideBySide(model, method).step(x, y).check_blocks()


@pytest.mark.parametrize("exclude", [("0",), ("4", "0")], ids=str)
def test_excluded_layers(exclude: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    pair = SideBySide(mlp(), "TEKFAC", exclude=exclude).step(*batch("mlp", 6))
    assert set(pair.fast.blocks) == {"0", "2", "4"} - set(exclude)
    pair.check_blocks()
    assert first_order(pair.fast) == {f"{i}.{p}" for i in exclude for p in ("weight", "bias")}


def test_excluded_types() -> None:
    torch.manual_seed(0)
    optimizer = tekfac.TEKFAC(flattened(), exclude=(nn.Linear,))
    assert set(optimizer.blocks) == {"0", "2"}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_multihead_attention_trains(fisher: str, batch_first: bool) -> None:
    """Its projections do not all run as modules: whatever rule they get, all parameters move."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
            self.out = nn.Linear(8, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            h = h if batch_first else h.transpose(0, 1)
            h = h + self.attention(h, h, h, need_weights=False)[0]
            h = h if batch_first else h.transpose(0, 1)
            return self.out(h.mean(1))

    torch.manual_seed(0)
    model = Attending()
    x, y = torch.randn(16, 4, 5).double(), torch.randint(3, (16,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = tekfac.TEKFAC(model, lr=2e-2, fisher=fisher)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert set(optimizer.treatment()) == set(before)
    assert {"embed", "out"} <= set(optimizer.blocks)


def test_transformer_encoder_layer_trains() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.encode(x)).mT

    torch.manual_seed(0)
    x, y = torch.randn(6, 4, 8), torch.randint(3, (6, 4))
    optimizer = trained(Encoder(), x, y)
    assert {"encode.linear1", "encode.linear2", "out"} <= set(optimizer.blocks)
