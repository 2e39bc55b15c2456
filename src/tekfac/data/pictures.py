"""Data sets in folders of pictures, one for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from sklearn.model_selection import train_test_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as images

from tekfac.data.dataset import SPLIT_SEED, Dataset, assemble
from tekfac.errors import InputError

TEST_FRACTION = 0.2


def load_image_folder(path: Path, image_size: int) -> Dataset:
    """Read a folder of pictures, one subfolder per class, as RGB of one size.

    With subfolders ``train`` and ``test``, each holding the class folders, these are the two
    parts; otherwise a fifth of each class's pictures, drawn with a fixed seed, is for testing.

    Raises:
        InputError: if there are fewer than two classes, a class has no picture, a class occurs in
            ``test`` only, or a picture cannot be read.
    """
    if (path / "train").is_dir() and (path / "test").is_dir():
        x_train, y_train, classes = _read_pictures(path / "train", image_size)
        x_test, y_test, test_classes = _read_pictures(path / "test", image_size)
        if unknown := sorted(set(test_classes) - set(classes)):
            raise InputError(
                f"{path}: test holds classes that train does not: {', '.join(unknown)}"
            )
        index = np.array([classes.index(name) for name in test_classes])
        return assemble(path.name, x_train, y_train, x_test, index[y_test], len(classes))
    xs, ys, classes = _read_pictures(path, image_size)
    counts = np.bincount(ys, minlength=len(classes))
    if counts.min() < 2:
        raise InputError(
            f"{path}: class {classes[int(counts.argmin())]!r} has a single picture; at least two "
            "are needed, one to train on and one to test (or give train/ and test/ subfolders)"
        )
    x_train, x_test, y_train, y_test = train_test_split(
        xs,
        ys,
        test_size=max(len(classes), round(TEST_FRACTION * len(ys))),
        random_state=SPLIT_SEED,
        stratify=ys,
    )
    return assemble(path.name, x_train, y_train, x_test, y_test, len(classes))


def _read_pictures(
    path: Path, image_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no pictures in class folders ({error})") from error
    if len(folder.classes) < 2:
        raise InputError(
            f"{path}: needs a subfolder of pictures for each of two classes or more, "
            f"found only {folder.classes[0]!r}"
        )
    xs = np.empty((len(folder), 3, image_size, image_size), dtype=np.uint8)
    for i, (file, _) in enumerate(folder.samples):
        try:
            picture = folder.loader(file)
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{file}: not a readable picture ({error})") from error
        xs[i] = images.pil_to_tensor(images.resize(picture, [image_size, image_size])).numpy()
    return xs, np.array(folder.targets, dtype=np.int64), folder.classes
