"""A data set, held whole as tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tekfac.errors import InputError

# Splits are part of a data set, not of a run: with one split for all seeds no run is tested on
# images that another run was trained on.
SPLIT_SEED = 0

# Images whose channels are averaged in one go, so that no copy of them all in float64 is made.
CHUNK = 1000

Pixels = NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True)
class Dataset:
    """Images and labels for training and testing.

    Attributes:
        name: a short name, fit for a file name.
        x_train, x_test: images, N×C×H×W, uint8 or float32, as the source has them: a quarter of
            the memory for most, and what augmentation works on.
        y_train, y_test: int64 labels, N, from 0 to ``classes - 1``.
        classes: the number of classes.
        mean, deviation: of the training images' channels, float32, C×1×1; of a constant channel
            the deviation is set to 1.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    mean: Tensor
    deviation: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def to(self, device: str) -> Dataset:
        """The same data on another device."""
        return replace(
            self,
            x_train=self.x_train.to(device),
            y_train=self.y_train.to(device),
            x_test=self.x_test.to(device),
            y_test=self.y_test.to(device),
            mean=self.mean.to(device),
            deviation=self.deviation.to(device),
        )

    def standardised(self, images: Tensor) -> Tensor:
        """Images as a network takes them: float32, minus ``mean``, over ``deviation``."""
        return (images - self.mean) / self.deviation

    def first(self, count: int) -> Dataset:
        """The same data with the first ``count`` training images only.

        Test images, classes, mean and deviation stay as they are, so that the task does.

        Raises:
            InputError: if there are not so many.
        """
        if count > len(self.y_train):
            raise InputError(
                f"--limit-train {count} is more than the {len(self.y_train)} training images "
                f"of {self.name}"
            )
        return replace(self, x_train=self.x_train[:count], y_train=self.y_train[:count])

    def hold_out(self, count: int) -> Dataset:
        """The same data with ``count`` training images in place of the test images.

        They are drawn with a fixed seed: data may come in order, class by class. Classes, mean and
        deviation stay as they are, so that the task does.

        Raises:
            InputError: if none would be left to train on.
        """
        total = len(self.y_train)
        if count >= total:
            raise InputError(
                f"--hold-out {count} leaves nothing to train on: there are {total} training images"
            )
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        test, train = torch.randperm(total, generator=generator).split([count, total - count])
        return replace(
            self,
            x_train=self.x_train[train],
            y_train=self.y_train[train],
            x_test=self.x_train[test],
            y_test=self.y_train[test],
        )

    def digest(self) -> str:
        """A fingerprint of all images and labels, by which a changed file is found out."""
        state = hashlib.blake2b(digest_size=16)
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            state.update(str(tuple(tensor.shape)).encode())
            state.update(tensor.cpu().contiguous().numpy().data)
        return state.hexdigest()


def assemble(
    name: str,
    x_train: Pixels,
    y_train: NDArray[np.int64],
    x_test: Pixels,
    y_test: NDArray[np.int64],
    classes: int,
) -> Dataset:
    """The data set of these arrays: images N×C×H×W, labels from 0, N."""
    images = torch.from_numpy(np.ascontiguousarray(x_train))
    mean, deviation = _channel_moments(images)
    return Dataset(
        name=name,
        x_train=images,
        y_train=torch.from_numpy(y_train.astype(np.int64)),
        x_test=torch.from_numpy(np.ascontiguousarray(x_test)),
        y_test=torch.from_numpy(y_test.astype(np.int64)),
        classes=classes,
        mean=mean,
        deviation=deviation,
    )


def _channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, as ``Dataset`` has them."""
    count, channels, height, width = images.shape
    pixels = count * height * width
    mean = torch.zeros(channels, 1, 1, dtype=torch.float64)
    variance = torch.zeros_like(mean)
    for chunk in images.split(CHUNK):
        mean += chunk.double().sum(dim=(0, 2, 3)).view_as(mean) / pixels
    for chunk in images.split(CHUNK):
        squares = (chunk.double() - mean).square_()
        variance += squares.sum(dim=(0, 2, 3)).view_as(mean) / pixels
    # Of a constant channel rounding may leave a variance that is not quite zero.
    constant = (images.amin(dim=(0, 2, 3)) == images.amax(dim=(0, 2, 3))).view_as(mean)
    deviation = torch.where(constant, 1.0, variance.sqrt())
    return mean.float(), deviation.float()
