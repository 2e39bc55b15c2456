"""Well-known data sets through torchvision, which downloads them and verifies their checksums.

It takes seconds to import, and is when a data set is asked for.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray

from tekfac.errors import InputError

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]

# Any of these from torchvision: no network, a download whose checksum is wrong (RuntimeError), or
# files that are there but are not what they are called (all that its readers raise).
UNAVAILABLE = (
    URLError,
    HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
)


@dataclass(frozen=True)
class Download:
    """A data set that torchvision has.

    Attributes:
        read: gives the training (True) or test (False) part that is or is to be put in a folder:
            uint8 images, N×C×H×W, and int64 labels, N.
        classes: the number of classes.
        augment: whether the paper trains on random crops and flips of it.
        urls: gives where its files are to be had.
        folder: where in the data folder they belong, as they are.
    """

    read: Callable[[Path, bool], Part]
    classes: int
    augment: bool
    urls: Callable[[], Sequence[str]]
    folder: str = ""


def _dataset(name: str) -> Any:
    """A class of torchvision's."""
    from torchvision import datasets

    return getattr(datasets, name)


def _cifar(name: str, classes: int) -> Download:
    def read(root: Path, train: bool) -> Part:
        part = _dataset(name)(root, train=train, download=True)
        return np.moveaxis(part.data, -1, 1), np.array(part.targets, dtype=np.int64)

    return Download(read, classes, True, lambda: [_dataset(name).url])


def _svhn() -> Download:
    def read(root: Path, train: bool) -> Part:
        part = _dataset("SVHN")(root, split="train" if train else "test", download=True)
        return part.data, part.labels

    def urls() -> list[str]:
        return [_dataset("SVHN").split_list[part][0] for part in ("train", "test")]

    return Download(read, 10, False, urls)


def _mnist(name: str) -> Download:
    def read(root: Path, train: bool) -> Part:
        part = _dataset(name)(root, train=train, download=True)
        return part.data[:, None].numpy(), part.targets.numpy()

    def urls() -> list[str]:
        files = _dataset(name)
        return [files.mirrors[0] + file for file, _ in files.resources]

    return Download(read, 10, False, urls, f"{name}/raw")


DOWNLOADS: dict[str, Download] = {
    "cifar10": _cifar("CIFAR10", 10),
    "cifar100": _cifar("CIFAR100", 100),
    "svhn": _svhn(),
    "mnist": _mnist("MNIST"),
    "fashion-mnist": _mnist("FashionMNIST"),
}


def read(name: str, root: Path) -> tuple[Part, Part]:
    """The training and the test part of a data set, downloaded into ``root`` if not there yet.

    Raises:
        InputError: if it is not there and cannot be downloaded, or what is there or was downloaded
            is damaged; the message says how to put the files there by hand.
        OSError: if the folder cannot be read or written, with a file's or its name.
    """
    source = DOWNLOADS[name]
    try:
        train, test = source.read(root, True), source.read(root, False)
        for images, labels in (train, test):
            if len(images) != len(labels):
                raise ValueError(f"{len(images)} images but {len(labels)} labels")
    except UNAVAILABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"--data {name} can be neither read from {root} nor downloaded ({reason}). By hand: "
            f"download {' '.join(source.urls())} and put what you get, as it is, into "
            f"{root / source.folder}; delete files unpacked from it earlier, if there are any"
        ) from error
    except OSError as error:
        # A full disk is reported without saying for which file.
        raise OSError(error.errno, error.strerror, error.filename or str(root)) from error
    return train, test
