"""A run by several ranks against one by one process, in float64: the same numbers, to rounding."""

from __future__ import annotations

import copy
import functools
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from command import assert_identical
from processes import outcomes, together
from tekfac import networks
from tekfac.data import Dataset, load
from tekfac.runs.config import Config
from tekfac.runs.ranks import Group
from tekfac.runs.training import Training, Watcher

# Intervals that divide neither an epoch's 4 batches nor one another.
INTERVALS = {"factor_every": 3, "basis_every": 5}
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"nesterov": True, "weight_decay": 1e-3},
    "adam": {"weight_decay": 1e-3},
    "kfac": {"damping": 0.1, "fisher": "exact", **INTERVALS},
    "ekfac": {"damping": 0.1, "fisher": "empirical", "scale_every": 2, **INTERVALS},
    "tkfac": {"nu": 0.1, "fisher": "exact", **INTERVALS},
    "tekfac": {"damping": 0.1, "fisher": "exact", "scale_every": 2, **INTERVALS},
    "soap": {},
    "muon": {},
}
# In less than float64, or with steps that rounding may turn.
COARSE = ("soap", "muon")
EPOCHS = 2
# More images than the network has inputs: of fewer, eigenvectors are in part a matter of rounding.
BATCH = 120
# Ranks import the program first, which takes most of it.
SECONDS = 300


def data(images: int) -> Dataset:
    """The first digits, in float64."""
    digits = load("digits")
    return replace(
        digits,
        x_train=digits.x_train[:images].double(),
        y_train=digits.y_train[:images],
        x_test=digits.x_test[:100].double(),
        y_test=digits.y_test[:100],
        mean=digits.mean.double(),
        deviation=digits.deviation.double(),
    )


def group() -> Group:
    """Ranks all of which make their calls by themselves, with no orders."""
    return Group(dist.group.WORLD, None, dist.HashStore())


def trained(
    several: bool, images: int, options: dict[str, Any]
) -> tuple[list[Any], dict[str, Tensor]]:
    """Metrics and weights after some epochs."""
    torch.set_default_dtype(torch.float64)
    try:
        defaults: dict[str, Any] = {"network": "mlp", "width": 12, "batch_size": BATCH}
        config = Config(**{**defaults, **options})
        training = Training(config, data(images), *([group()] if several else []))
        for _ in range(EPOCHS):
            training.run_epoch(Watcher())
        state = training.state_dict()["network"]
        history = [{**asdict(m), "seconds": 0} for m in training.history]
        return history, {name: each.clone() for name, each in state.items()}
    finally:
        torch.set_default_dtype(torch.float32)


# The last batch: one image, which one rank has; or 90, of which ranks have 23, 23, 22 and 22.
@pytest.mark.parametrize(
    ("optimizer", "count", "images"),
    [*((optimizer, 2, 361) for optimizer in SETTINGS), ("sgd", 4, 450), ("ekfac", 4, 450)],
)
def test_ranks_train_as_one_process(optimizer: str, count: int, images: int) -> None:
    options = {"optimizer": optimizer, "settings": SETTINGS[optimizer]}
    expected, expected_weights = trained(False, images, options)
    results = together(count, trained, True, images, options, seconds=SECONDS)
    history, weights = results[0]
    for other, others in results:
        assert history == other
        assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    if optimizer in COARSE:
        losses = [[epoch["train_loss"] for epoch in each] for each in (history, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        return
    for here, there in zip(history, expected, strict=True):
        assert here == pytest.approx(there, rel=1e-9)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-8, atol=1e-9)


def with_state(state: dict[str, Any]) -> dict[str, Any]:
    """What later epochs depend on, but the seconds of the earlier ones."""
    return {**state, "history": [{**each, "seconds": 0} for each in state["history"]]}


def continued(epochs: tuple[int, ...]) -> dict[str, Any]:
    """The state of a run in several parts; the network draws, and has buffers."""

    def small(image_shape: tuple[int, int, int], classes: int, width: int) -> nn.Module:
        layers = [nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(36 * width, classes))

    networks.NETWORKS["small"] = networks.Network(small, width=4)
    settings = {"fisher": "mc", "scale_every": 2, **INTERVALS}
    options = {"network": "small", "batch_size": 40, "augment": True}
    config = Config(optimizer="tekfac", settings=settings, **options)
    state: dict[str, Any] | None = None
    for count in epochs:
        torch.manual_seed(count)
        training = Training(config, load("digits").first(121), group())
        if state is not None:  # rank 0's, as it is that of the checkpoint
            box = [state]
            dist.broadcast_object_list(box, src=0)
            training.load_state_dict(box[0])
        for _ in range(count):
            training.run_epoch(Watcher())
        state = copy.deepcopy(training.state_dict())
    assert state is not None
    return with_state(state)


def test_ranks_continue_exactly() -> None:
    whole, parts = (together(2, continued, each, seconds=SECONDS) for each in ((3,), (1, 2)))
    assert_identical(whole[0], parts[0])
    for other in (whole[1], parts[1]):
        assert_identical(whole[0]["network"], other["network"])


def apart() -> None:
    """Rank 1's weights change by themselves."""
    config = Config(network="mlp", optimizer="sgd")
    training = Training(config, load("digits").first(121), group())
    if dist.get_rank() == 1:
        next(training.network.parameters()).data[0, 0] += 1
    training.run_epoch(Watcher())


def test_networks_that_come_apart_are_found_out() -> None:
    for result in outcomes(2, apart, seconds=SECONDS):
        assert "InputError: the ranks' networks have come apart: ranks must be the" in str(result)


def refused(**options: Any) -> None:
    config = Config(**{"network": "mlp", "optimizer": "sgd", **options})
    Training(config, load("digits").first(121), group())


def test_batches_smaller_than_the_ranks_are_refused() -> None:
    message = "2 ranks cannot share batches of 1 images: give torchrun a smaller --nproc-per-node"
    for result in outcomes(2, functools.partial(refused, batch_size=1), seconds=SECONDS):
        assert f"InputError: {message}" in str(result)


def test_shares_are_all_of_a_batch() -> None:
    for size in range(12):
        parts = [list(range(size))[group_of(number, 5).share(size)] for number in range(5)]
        assert [each for part in parts for each in part] == list(range(size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def group_of(number: int, count: int) -> Group:
    ranks = Group.__new__(Group)
    ranks.number, ranks.count = number, count
    return ranks
