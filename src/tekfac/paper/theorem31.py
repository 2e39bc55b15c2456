"""Theorem 3.1 in numbers: how near the four approximations are to the Fisher matrix of a network.

While a small network trains on the digits, every layer's exact Fisher block is built from
per-example Jacobians, and compared with what each method makes of the same batch. The theorem says
that TEKFAC is never further from it than TKFAC; EKFAC and KFAC stand beside them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

import tekfac
from tekfac.data import Dataset
from tekfac.runs.config import Config
from tekfac.runs.files import markdown, write_csv, write_figure, write_text
from tekfac.runs.plots import DPI
from tekfac.runs.training import Training, Watcher

METHODS: dict[str, Callable[[nn.Module], tekfac.NaturalGradient]] = {
    "KFAC": lambda network: tekfac.KFAC(network, lr=0, momentum=0, fisher="exact"),
    "EKFAC": lambda network: tekfac.EKFAC(network, lr=0, momentum=0, fisher="exact"),
    "TKFAC": lambda network: tekfac.TKFAC(network, lr=0, momentum=0, fisher="exact", fc_scale=1),
    "TEKFAC": lambda network: tekfac.TEKFAC(network, lr=0, momentum=0, fisher="exact", fc_scale=1),
}


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        epochs: epochs of training; measured before the first and after each.
        examples: training images in the batch on which everything is measured.
        width: of the network ``cnn``.
    """

    epochs: int
    examples: int
    width: int


SCALES = {"smoke": Scale(1, 32, 2), "small": Scale(12, 256, 8), "full": Scale(24, 1024, 12)}


@dataclass(frozen=True)
class Distance:
    """One method on one layer at one time.

    Attributes:
        epoch: epochs of training before the measurement.
        layer: the layer's name and kind.
        method: KFAC, EKFAC, TKFAC or TEKFAC.
        error: ``‖F − F̂‖_F / ‖F‖_F``.
        trace: ``tr F̂ / tr F``.
    """

    epoch: int
    layer: str
    method: str
    error: float
    trace: float


def fisher_block(network: nn.Module, layer: str, x: Tensor) -> Tensor:
    """A layer's Fisher block from per-example Jacobians of the logits, expectation over all labels.

    Args:
        network: gives logits ``(N, classes)``.
        layer: the name of a layer with a weight and a bias.
        x: images, ``(N, ...)``.

    Returns:
        ``(P, P)`` for the layer's ``P`` parameters, in the order of
        ``torch.cat([weight.flatten(1), bias[:, None]], 1).flatten()``.
    """
    module = network.get_submodule(layer)
    weight = module.get_parameter("weight").detach()
    bias = module.get_parameter("bias").detach()
    columns = weight[0].numel()

    def logits(matrix: Tensor, image: Tensor) -> Tensor:
        parameters = {
            f"{layer}.weight": matrix[:, :columns].reshape(weight.shape),
            f"{layer}.bias": matrix[:, columns],
        }
        output: Tensor = functional_call(network, parameters, (image[None],))
        return output[0]

    matrix = torch.cat([weight.flatten(1), bias[:, None]], dim=1)
    jacobian: Tensor = vmap(jacrev(logits), in_dims=(None, 0))(matrix, x).flatten(2)
    with torch.no_grad():
        p = F.softmax(network(x), dim=1)
    scores = p.sqrt()[:, :, None] * (torch.eye(p.shape[1]) - p[:, None])
    gradients: Tensor = (scores @ jacobian).flatten(0, 1)
    return gradients.mT @ gradients / len(x)


def measure(network: nn.Module, x: Tensor, y: Tensor, epoch: int) -> list[Distance]:
    """Distances of all methods on all layers, on one batch."""
    optimizers = {}
    for name, make in METHODS.items():
        own = copy.deepcopy(network)
        optimizers[name] = make(own)
        F.cross_entropy(own(x), y).backward()
        optimizers[name].step()
    result = []
    network = copy.deepcopy(network).requires_grad_(False)
    for layer, block in optimizers["KFAC"].blocks.items():
        fisher = fisher_block(network, layer, x)
        kind = type(network.get_submodule(layer)).__name__
        for name, optimizer in optimizers.items():
            estimate = optimizer.blocks[layer].dense()
            result.append(
                Distance(
                    epoch=epoch,
                    layer=f"{kind} {block.shape[0]}×{block.shape[1]}",
                    method=name,
                    error=float((fisher - estimate).norm() / fisher.norm()),
                    trace=float(estimate.trace() / fisher.trace()),
                )
            )
    return result


def run(scale: Scale, data: Dataset, watch: Callable[[str], None]) -> list[Distance]:
    """Train with TEKFAC, measuring before the first epoch and after each.

    Args:
        scale: how much.
        data: what to train on, and measure on the first images of.
        watch: told of each measurement.
    """
    config = Config(data="digits", network="cnn", width=scale.width, epochs=scale.epochs)
    training = Training(config, data)
    x = data.standardised(data.x_train[: scale.examples])
    y = data.y_train[: scale.examples]
    distances = measure(training.network, x, y, 0)
    for epoch in range(1, scale.epochs + 1):
        training.run_epoch(Watcher())
        training.network.train()
        distances += measure(training.network, x, y, epoch)
        watch(f"epoch {epoch} of {scale.epochs} measured")
    return distances


def save(distances: Sequence[Distance], path: Path, title: str) -> None:
    """Write ``theorem31.csv``, ``theorem31.md`` (means over time) and ``theorem31.png``."""
    path.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in dataclasses.fields(Distance)]
    write_csv(path / "theorem31.csv", names, map(dataclasses.astuple, distances))
    write_text(path / "theorem31.md", table(distances))
    write_figure(path / "theorem31.png", figure(distances, title))


def table(distances: Sequence[Distance]) -> str:
    """Each method's mean error and trace ratio over time, for every layer, in Markdown."""
    layers = list(dict.fromkeys(distance.layer for distance in distances))
    methods = list(dict.fromkeys(distance.method for distance in distances))
    rows = []
    for layer in layers:
        cells = []
        for method in methods:
            own = [d for d in distances if (d.layer, d.method) == (layer, method)]
            error = sum(d.error for d in own) / len(own)
            trace = sum(d.trace for d in own) / len(own)
            cells.append(f"{error:.3f} (trace {trace:.3f})")
        rows.append([layer, *cells])
    return markdown(["layer", *methods], rows)


def worst_ratio(distances: Sequence[Distance], better: str, worse: str) -> float:
    """The largest ratio of one method's error to another's; at most 1 if the first always wins."""
    errors: Mapping[tuple[int, str, str], float] = {
        (d.epoch, d.layer, d.method): d.error for d in distances
    }
    return max(
        error / errors[epoch, layer, worse]
        for (epoch, layer, method), error in errors.items()
        if method == better
    )


def figure(distances: Sequence[Distance], title: str) -> Figure:
    """Error and ratio of traces of each method over training, a column per layer."""
    layers = list(dict.fromkeys(d.layer for d in distances))
    methods = list(dict.fromkeys(d.method for d in distances))
    picture = Figure(figsize=(3.2 * len(layers), 6), dpi=DPI, layout="constrained")
    picture.suptitle(title)
    rows = picture.subplots(2, len(layers), sharex=True, sharey="row", squeeze=False)
    for column, layer in enumerate(layers):
        error, trace = rows[0, column], rows[1, column]
        error.set_title(layer)
        for number, method in enumerate(methods):
            own = [d for d in distances if (d.layer, d.method) == (layer, method)]
            # Thinner and thinner, as many of the lines coincide.
            width = 1.2 * (len(methods) - number)
            error.plot(
                [d.epoch for d in own], [d.error for d in own], label=method, linewidth=width
            )
            trace.plot([d.epoch for d in own], [d.trace for d in own], linewidth=width)
        trace.set_xlabel("epoch")
        trace.xaxis.set_major_locator(MaxNLocator(integer=True))
    rows[0, 0].set(ylabel="‖F − F̂‖ / ‖F‖ (Frobenius)", ylim=(0, None))
    rows[1, 0].set_ylabel("tr F̂ / tr F")
    for axes in rows.flat:
        axes.grid(alpha=0.3)
    rows[0, -1].legend()
    return picture
