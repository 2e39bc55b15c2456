"""The numbers of the paper, arXiv 2011.13609, to be put beside one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """Mean and standard deviation of the test accuracy of three runs, in per cent."""

    mean: float
    deviation: float


def _row(*values: float) -> dict[str, Accuracy]:
    """Means and deviations in turn, in the order of table 3's columns."""
    methods = ("sgd", "adam", "ekfac", "tkfac", "tekfac")
    pairs = zip(values[::2], values[1::2], strict=True)
    return {name: Accuracy(*pair) for name, pair in zip(methods, pairs, strict=True)}


# Table 3: tasks by data set and network, then optimizers.
TABLE_3: Mapping[str, Mapping[str, Accuracy]] = {
    "svhn-vgg16": _row(94.98, 0.09, 95.80, 0.11, 95.87, 0.13, 95.75, 0.21, 95.93, 0.16),
    "svhn-resnet20": _row(95.78, 0.15, 95.93, 0.12, 95.16, 0.07, 96.20, 0.39, 96.45, 0.14),
    "cifar10-vgg16": _row(91.19, 0.15, 92.21, 0.14, 92.67, 0.22, 92.83, 0.13, 93.35, 0.17),
    "cifar10-resnet20": _row(92.79, 0.14, 93.22, 0.18, 92.66, 0.17, 94.38, 0.04, 94.56, 0.12),
    "cifar100-vgg16": _row(67.29, 0.28, 69.47, 0.25, 70.41, 0.26, 70.82, 0.12, 71.37, 0.18),
    "cifar100-resnet20": _row(72.94, 0.11, 73.70, 0.18, 73.98, 0.21, 76.73, 0.18, 77.04, 0.15),
}

# Table 4: TEKFAC on one task, with one of its settings varied from `TABLE_4_CENTRE`.
TABLE_4_TASK = "cifar100-resnet20"
TABLE_4_CENTRE: Mapping[str, float] = {"lr": 1e-3, "nu": 1e-2}
TABLE_4: Mapping[str, Mapping[float, Accuracy]] = {
    "nu": {
        1e-4: Accuracy(76.81, 0.28),
        1e-3: Accuracy(76.65, 0.12),
        1e-2: Accuracy(77.04, 0.15),
        1e-1: Accuracy(76.71, 0.17),
        1.0: Accuracy(76.03, 0.26),
        10.0: Accuracy(74.74, 0.11),
        100.0: Accuracy(73.68, 0.09),
    },
    "lr": {
        1e-4: Accuracy(76.38, 0.15),
        1e-3: Accuracy(77.04, 0.15),
        1e-2: Accuracy(76.08, 0.14),
        1e-1: Accuracy(72.47, 0.23),
    },
}
