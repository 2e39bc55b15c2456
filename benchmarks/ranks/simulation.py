"""One rank of many, on the CPU: what it sends, multiplies and holds, by the package's own code.

A network of full width takes a few steps on a tiny batch as the first of so many ranks: what is
sent, who makes which basis and who holds what does not depend on the batch. What statistics
multiply does: blocks take them once more from samples of full size, without numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tekfac
from benchmarks.ranks.counted import Counter, Message, parallel, pretended, undecomposed
from tekfac.curvature.blocks import Block
from tekfac.layers import Sample
from tekfac.ranks.placement import divided
from tekfac.ranks.ranks import Ranks

# Statistics, and bases, in steps of their own: step 0 has both, 1 neither, 2 and 3 one of them.
EVERY = {"factor_every": 2, "scale_every": 2, "basis_every": 3}
KINDS = {1: "quiet", 2: "statistics", 3: "bases"}


def added(total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """Operations of a product of matrices that is added to others."""
    return 2 * left[0] * left[1] * left[2] * right[2]


def operations() -> FlopCounterMode:
    """Torch's counter, and what that leaves out: products added up in place."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added})


@dataclass(frozen=True)
class Network:
    """What is trained.

    Attributes:
        name: for people.
        make: gives it, with random weights.
        batch: gives inputs and targets; True for those of a rank's whole batch.
        examples: in a rank's batch.
        batch_words: what that is.
        logits: of what it returns.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[bool], tuple[Tensor, Tensor]]
    examples: int
    batch_words: str
    logits: Callable[[Any], Tensor] = lambda output: output

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The mean over all terms."""
        return F.cross_entropy(self.logits(model(x)).flatten(0, -2), y.flatten())


def resnet50() -> Network:
    """ResNet-50 on images of 224×224."""
    from torchvision.models import resnet50 as make

    def batch(whole: bool) -> tuple[Tensor, Tensor]:
        count, side = (32, 224) if whole else (2, 64)
        return torch.randn(count, 3, side, side), torch.zeros(count, dtype=torch.long)

    return Network("ResNet-50", make, batch, 32, "32 images of 224×224")


def gpt2() -> Network:
    """GPT-2 small on sequences of 1024 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> nn.Module:
        return GPT2LMHeadModel(GPT2Config(attn_implementation="eager"))

    def batch(whole: bool) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros((8, 1024) if whole else (2, 8), dtype=torch.long)
        return tokens, tokens

    return Network("GPT-2 small", make, batch, 8, "8 × 1024 tokens", lambda output: output.logits)


NETWORKS = {"resnet50": resnet50, "gpt2": gpt2}


@dataclass(frozen=True)
class Work:
    """What a layer takes of one rank, in multiplications, and its curvature state.

    Attributes:
        widths: ``(d_in, d_out)`` of its matrix.
        forward: of the model's forward pass through it.
        statistics: one measurement, by the number of ranks.
        bases: a new basis.
        decompositions: eigendecompositions in it.
        preconditioning: of one gradient.
        held: bytes between steps where the layer is held.
    """

    widths: tuple[int, int]
    forward: int
    statistics: Mapping[int, int]
    bases: int
    decompositions: int
    preconditioning: int
    held: int


@dataclass(frozen=True)
class Plain:
    """What the network takes without any curvature.

    Attributes:
        forward: multiplications of a forward pass.
        backward: of a backward pass.
        outputs: of one for the gradients of the layers' outputs alone.
        parameters: their number.
    """

    forward: int
    backward: int
    outputs: int
    parameters: int


@dataclass(frozen=True)
class Told:
    """What one rank says in steps of each kind, and how work and state are divided.

    Attributes:
        gradients: the model's own messages in a step, those of `DistributedDataParallel`.
        said: the optimizer's, by the kind of step.
        homes: for each layer, its place in each unit.
        makers: for each layer, which rank makes its basis.
        unit: ranks that hold the state together.
        elsewhere: bytes that a rank keeps of a layer that it does not hold.
    """

    gradients: Sequence[Message]
    said: Mapping[str, Sequence[Message]]
    homes: Mapping[str, int]
    makers: Mapping[str, int]
    unit: int
    elsewhere: Mapping[str, int]


def optimizer_of(method: str, model: nn.Module, options: Mapping[str, Any]) -> Any:
    """One whose steps are of one kind each."""
    make = getattr(tekfac, method)
    every = {key: value for key, value in EVERY.items() if key != "scale_every"}
    if issubclass(make, tekfac.EKFAC):
        every = EVERY
    # Steps that change nothing: gradients of made-up eigenvectors are no use.
    return make(model, lr=1e-12, interval_warmup=False, **every, **options)


def ask(network: Network, method: str, ranks: int, options: Mapping[str, Any]) -> Told:
    """Take a step of each kind as the first of so many ranks."""
    torch.manual_seed(0)
    with pretended(ranks) as counter, undecomposed():
        model = parallel(network.make())
        optimizer = optimizer_of(method, model, options)
        return steps(network, model, optimizer, counter)


def steps(network: Network, model: nn.Module, optimizer: Any, counter: Counter) -> Told:
    """What is said in a step of each kind, after a first one."""
    x, y = network.batch(False)
    said, gradients, makers = {}, [], []

    def noted(*args: Any) -> list[int]:
        makers[:] = divided(*args)
        return makers

    for number in range(4):
        counter.take()
        optimizer.zero_grad()
        network.loss(model, x, y).backward()
        gradients = counter.take()
        with mock.patch("tekfac.optimizer.household.divided", noted):
            optimizer.step()
        if number in KINDS:
            said[KINDS[number]] = counter.take()
    blocks, household = optimizer.blocks, optimizer._household
    return Told(
        gradients,
        said,
        dict(household.homes),
        dict(zip(blocks, makers, strict=True)),
        household.unit.count,
        {
            name: bytes_elsewhere(block) if household.divided else 0
            for name, block in blocks.items()
        },
    )


def bytes_elsewhere(block: Block) -> int:
    """What stays of a block's state where it is not held, which it is not after this."""
    block.hold(False)
    block.factors.input.release()
    block.factors.output.release()
    block.release()
    return bytes_of(block)


def bytes_of(block: Block) -> int:
    """What is here of a block's state."""
    return sum(
        0 if value.is_meta else value.numel() * value.element_size()
        for value in block.state_dict().values()
    )


def plain(network: Network, layers: int) -> Plain:
    """Count the model's own passes.

    Args:
        network: the network.
        layers: multiplications of a forward pass in layers with a block: in a backward pass, their
            weights' gradients take as many.
    """
    with FakeTensorMode(), operations() as flops:
        model = network.make()
        loss = network.loss(model, *network.batch(True))
        forward = flops.get_total_flops() // 2
        loss.backward()
        backward = flops.get_total_flops() // 2 - forward
    parameters = sum(p.numel() for p in model.parameters())
    return Plain(forward, backward, backward - layers, parameters)


def seen(network: Network, names: Sequence[str]) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Shapes of layers' inputs and outputs in a rank's whole batch."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    with FakeTensorMode():
        model = network.make()
        for name in names:

            def note(_: nn.Module, given: Any, made: Tensor, name: str = name) -> None:
                shapes[name] = given[0].shape, made.shape

            model.get_submodule(name).register_forward_hook(note)
        model(network.batch(True)[0])
    return shapes


def works(network: Network, method: str, counts: Sequence[int], **options: Any) -> dict[str, Work]:
    """What each layer takes, by its name, of each of so many ranks."""
    torch.manual_seed(0)
    with undecomposed():
        model = network.make()
        optimizer = optimizer_of(method, model, options)
        x, y = network.batch(False)
        network.loss(model, x, y).backward()
        optimizer.step()
    optimizer.factor_every = optimizer.scale_every = 10  # shorter intervals read half as much
    shapes = seen(network, list(optimizer.blocks))
    dues, ranks = {}, Ranks()
    for ranks.batches in counts:
        dues[ranks.batches] = replace(optimizer._intervals().due(0, ranks), late=False)
    found: dict[object, Work] = {}
    result = {}
    for name, block in optimizer.blocks.items():
        key = (*shapes[name], block.kept, block.groups, type(block.layer))
        if key not in found:
            found[key] = work_of(block, shapes[name], network.examples, dues)
        result[name] = found[key]
    return result


def work_of(
    block: Block, shapes: tuple[torch.Size, torch.Size], examples: int, dues: Mapping[int, Any]
) -> Work:
    """What a layer takes that sees so much."""
    statistics, layer = {}, block.layer
    d_in, d_out = widths = layer.d_in, layer.d_out
    # Positions are looked up once, for all examples alike.
    examples = min(examples, shapes[1][0])
    for count, due in dues.items():
        block.discard()
        block.due = due
        with (
            torch.no_grad(),
            mock.patch("tekfac.curvature.sampling.multiplies_bfloat16", return_value=True),
            FakeTensorMode(allow_non_fake_inputs=True),
            operations() as flops,
        ):
            x, g = (torch.empty(shape) for shape in shapes)
            if layer.looked_up:
                x, g = x.flatten().long(), g.flatten(0, -2)
            block.observe(Sample([x], [g], examples=examples))
            statistics[count] = flops.get_total_flops() // 2
        block.discard()
    with torch.no_grad(), operations() as flops:
        block.precondition(torch.zeros(block.groups, d_out, d_in))
    rows = shapes[1].numel() // (block.groups * d_out)
    return Work(
        widths,
        block.groups * rows * layer.product_width * d_out,
        statistics,
        block.groups * sum(map(eigenvectors, widths, block.kept)),
        sum(k > 0 for k in block.kept),
        flops.get_total_flops() // 2,
        bytes_of(block),
    )


def eigenvectors(d: int, k: int) -> int:
    """Multiplications of all eigenvectors of a ``d × d`` matrix, or the leading ``k``.

    ``9 d³`` operations are a symmetric decomposition's (Golub and Van Loan, 8.3); `linalg.leading`
    has three products of ``d × k`` matrices and a triangular solve besides, of ``k × k`` ones.
    """
    return 9 * d**3 // 2 if k == d else 7 * k * k * d // 2 + 9 * k**3 // 2
