"""Data sets in ``.npz`` files of NumPy."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tekfac.data.dataset import Dataset, Pixels, assemble
from tekfac.errors import InputError

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path) -> Dataset:
    """Read ``x_train, y_train, x_test, y_test`` from an ``.npz`` file.

    Images are uint8 or float, N×H×W (grey) or N×H×W×C; labels are integers from 0, N. Pickled
    objects are never loaded.

    Raises:
        InputError: if anything about the file or its arrays is not so.
    """
    arrays = _read_npz(path)
    images_train = _check_images(path, "x_train", arrays["x_train"])
    images_test = _check_images(path, "x_test", arrays["x_test"])
    labels_train = _check_labels(path, "y_train", arrays["y_train"])
    labels_test = _check_labels(path, "y_test", arrays["y_test"])
    for split, xs, ys in (
        ("train", images_train, labels_train),
        ("test", images_test, labels_test),
    ):
        if len(xs) != len(ys):
            raise InputError(
                f"{path}: x_{split} has {len(xs)} images but y_{split} has {len(ys)} labels"
            )
    if images_train.shape[1:] != images_test.shape[1:]:
        raise InputError(
            f"{path}: images of x_train and x_test differ in shape (channels, height, width): "
            f"{images_train.shape[1:]} and {images_test.shape[1:]}"
        )
    classes = int(labels_train.max()) + 1
    if labels_test.max() >= classes:
        raise InputError(
            f"{path}: y_test has label {labels_test.max()}, but the labels of y_train end at "
            f"{classes - 1}: a class without training images cannot be learnt"
        )
    return assemble(path.stem, images_train, labels_train, images_test, labels_test, classes)


def _read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        archive = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: holds a single array; write it with numpy.savez")
    arrays: dict[str, NDArray[np.generic]] = {}
    with archive:
        if missing := [key for key in KEYS if key not in archive.files]:
            raise InputError(
                f"{path}: {', '.join(missing)} missing; the file holds "
                f"{', '.join(archive.files) or 'nothing'}, needed are {', '.join(KEYS)}"
            )
        for key in KEYS:
            try:
                arrays[key] = archive[key]
            except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
                hint = (
                    "it holds Python objects; save a plain array of numbers"
                    if "allow_pickle" in str(error)
                    else f"the file is damaged ({error})"
                )
                raise InputError(f"{path}: {key} cannot be read: {hint}") from error
    return arrays


def _check_images(path: Path, key: str, xs: NDArray[np.generic]) -> Pixels:
    """Images as N×C×H×W, uint8 if they are that, or else float32."""
    if xs.ndim not in (3, 4):
        raise InputError(f"{path}: {key} must be N×H×W or N×H×W×C, but has shape {xs.shape}")
    if 0 in xs.shape:
        raise InputError(f"{path}: {key} is empty, shape {xs.shape}")
    if xs.ndim == 4 and xs.shape[1] in (1, 3) and xs.shape[3] > 4:
        raise InputError(
            f"{path}: {key} has shape {xs.shape}, which looks like N×C×H×W: put channels last, "
            "e.g. with numpy.moveaxis(x, 1, -1)"
        )
    if xs.dtype != np.uint8 and not np.issubdtype(xs.dtype, np.floating):
        raise InputError(f"{path}: {key} must be uint8 or float, but is {xs.dtype}")
    if xs.dtype == np.uint8:
        return _channels_first(xs.astype(np.uint8, copy=False))
    with np.errstate(over="ignore"):
        pixels = xs.astype(np.float32)
    if not np.isfinite(pixels).all():
        bad = int((~np.isfinite(pixels)).reshape(len(pixels), -1).any(axis=1).argmax())
        raise InputError(f"{path}: {key} has pixels that are nan or infinite, first in image {bad}")
    return _channels_first(pixels)


def _channels_first(pixels: Pixels) -> Pixels:
    """N×H×W or N×H×W×C as N×C×H×W."""
    return pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, -1, 1)


def _check_labels(path: Path, key: str, ys: NDArray[np.generic]) -> NDArray[np.int64]:
    if ys.ndim != 1:
        raise InputError(f"{path}: {key} must have one label per image, but has shape {ys.shape}")
    if not np.issubdtype(ys.dtype, np.integer):
        raise InputError(f"{path}: {key} must hold integers, but is {ys.dtype}")
    labels: NDArray[np.int64] = ys.astype(np.int64)
    if len(labels) and labels.min() < 0:
        raise InputError(f"{path}: {key} has a negative label, {labels.min()}; labels count from 0")
    return labels
