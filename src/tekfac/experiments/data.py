"""Image data sets, held whole as tensors: the embedded digits, ``.npz`` files, image folders."""

from __future__ import annotations

import hashlib
import lzma
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as images

from tekfac.experiments.errors import InputError

# Splits are part of a data set, not of a run: with one split for all seeds no run is tested on
# images that another run was trained on.
SPLIT_SEED = 0
DIGITS_TEST_IMAGES = 500
FOLDER_TEST_FRACTION = 0.2

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """Images and labels for training and testing.

    Attributes:
        name: a short name, fit for a file name.
        x_train, x_test: float32 images, N×C×H×W, standardised by the training images' mean and
            standard deviation per channel.
        y_train, y_test: int64 labels, N, from 0 to ``classes - 1``.
        classes: the number of classes.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

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
        )

    def digest(self) -> str:
        """A fingerprint of all images and labels, by which a changed file is found out."""
        state = hashlib.blake2b(digest_size=16)
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            state.update(str(tuple(tensor.shape)).encode())
            state.update(tensor.cpu().contiguous().numpy().data)
        return state.hexdigest()


def canonical_source(source: str) -> str:
    """``source`` as a run records it: a registered name, or an absolute path that exists.

    Raises:
        InputError: if it is neither.
    """
    if source in EMBEDDED:
        return source
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"--data {source!r}: no such file or folder, and no data set of that name "
            f"(there is: {', '.join(sorted(EMBEDDED))})"
        )
    if path.is_file() and path.suffix != ".npz":
        raise InputError(f"--data {source!r}: a file of data must be an .npz file")
    return str(path.resolve())


def source_name(source: str) -> str:
    """The short name of the data set at ``source``, which need not be loaded yet."""
    return source if source in EMBEDDED else Path(source).stem


def load(source: str, image_size: int | None = None) -> Dataset:
    """Load a data set.

    Args:
        source: ``"digits"``, the path of an ``.npz`` file, or of an image folder.
        image_size: height and width to which the pictures of an image folder are resized, 32 when
            None; other data keep their size and take None only.

    Raises:
        InputError: if the data cannot be read or do not fit together.
    """
    source = canonical_source(source)
    if Path(source).is_dir() and source not in EMBEDDED:
        return load_image_folder(Path(source), 32 if image_size is None else image_size)
    if image_size is not None:
        raise InputError("--image-size is for image folders only: other data keep their size")
    return EMBEDDED[source]() if source in EMBEDDED else load_npz(Path(source))


def load_digits_dataset() -> Dataset:
    """Scikit-learn's 1797 handwritten digits, 8×8 grey: 1297 to train on, 500 to test."""
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.images[:, None].astype(np.float32),
        digits.target,
        test_size=DIGITS_TEST_IMAGES,
        random_state=SPLIT_SEED,
        stratify=digits.target,
    )
    return _assemble("digits", x_train, y_train, x_test, y_test, classes=10)


EMBEDDED: dict[str, Callable[[], Dataset]] = {"digits": load_digits_dataset}


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
    return _assemble(path.stem, images_train, labels_train, images_test, labels_test, classes)


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
        return _assemble(path.name, x_train, y_train, x_test, index[y_test], len(classes))
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
        test_size=max(len(classes), round(FOLDER_TEST_FRACTION * len(ys))),
        random_state=SPLIT_SEED,
        stratify=ys,
    )
    return _assemble(path.name, x_train, y_train, x_test, y_test, len(classes))


def _assemble(
    name: str,
    x_train: NDArray[np.float32],
    y_train: NDArray[np.int64],
    x_test: NDArray[np.float32],
    y_test: NDArray[np.int64],
    classes: int,
) -> Dataset:
    mean = x_train.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    deviation = x_train.std(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    deviation[deviation == 0] = 1.0

    def standardised(xs: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy((xs - mean.astype(np.float32)) / deviation.astype(np.float32))

    return Dataset(
        name=name,
        x_train=standardised(x_train),
        y_train=torch.from_numpy(y_train.astype(np.int64)),
        x_test=standardised(x_test),
        y_test=torch.from_numpy(y_test.astype(np.int64)),
        classes=classes,
    )


def _read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        archive = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: holds a single array; write it with numpy.savez")
    arrays: dict[str, NDArray[np.generic]] = {}
    with archive:
        if missing := [key for key in NPZ_KEYS if key not in archive.files]:
            raise InputError(
                f"{path}: {', '.join(missing)} missing; the file holds "
                f"{', '.join(archive.files) or 'nothing'}, needed are {', '.join(NPZ_KEYS)}"
            )
        for key in NPZ_KEYS:
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


def _check_images(path: Path, key: str, xs: NDArray[np.generic]) -> NDArray[np.float32]:
    """Images as float32 N×C×H×W."""
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
    with np.errstate(over="ignore"):
        pixels: NDArray[np.float32] = xs.astype(np.float32)
    if not np.isfinite(pixels).all():
        bad = int((~np.isfinite(pixels)).reshape(len(pixels), -1).any(axis=1).argmax())
        raise InputError(f"{path}: {key} has pixels that are nan or infinite, first in image {bad}")
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


def _read_pictures(
    path: Path, image_size: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no pictures in class folders ({error})") from error
    if len(folder.classes) < 2:
        raise InputError(
            f"{path}: needs a subfolder of pictures for each of two classes or more, "
            f"found only {folder.classes[0]!r}"
        )
    xs = np.empty((len(folder), 3, image_size, image_size), dtype=np.float32)
    for i, (file, _) in enumerate(folder.samples):
        try:
            picture = folder.loader(file)
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{file}: not a readable picture ({error})") from error
        xs[i] = images.pil_to_tensor(images.resize(picture, [image_size, image_size])).numpy()
    return xs, np.array(folder.targets, dtype=np.int64), folder.classes
