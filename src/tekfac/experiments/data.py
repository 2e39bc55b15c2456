"""Image data sets, held whole as tensors: named ones, ``.npz`` files, image folders."""

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

from tekfac.experiments import downloads
from tekfac.experiments.downloads import DOWNLOADS
from tekfac.experiments.errors import InputError

# Splits are part of a data set, not of a run: with one split for all seeds no run is tested on
# images that another run was trained on.
SPLIT_SEED = 0
DIGITS_TEST_IMAGES = 500
FOLDER_TEST_FRACTION = 0.2

# Where data sets to be downloaded are kept, unless the user says.
DATA_DIR = Path("data")

# Images whose channels are averaged in one go, so that no copy of them all in float64 is made.
CHUNK = 1000

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

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


def canonical_source(source: str) -> str:
    """``source`` as a run records it: a registered name, or an absolute path that exists.

    Raises:
        InputError: if it is neither.
    """
    if source in NAMED:
        return source
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"--data {source!r}: no such file or folder, and no data set of that name "
            f"(there is: {', '.join(NAMED)})"
        )
    if path.is_file() and path.suffix != ".npz":
        raise InputError(f"--data {source!r}: a file of data must be an .npz file")
    return str(path.resolve())


def source_name(source: str) -> str:
    """The short name of the data set at ``source``, which need not be loaded yet."""
    return source if source in NAMED else Path(source).stem


def canonical_data_dir(source: str, data_dir: str | None) -> str | None:
    """``data_dir`` as a run records it: an absolute path, or None for data that need none.

    Raises:
        InputError: if it is given for such data.
    """
    if source in DOWNLOADS:
        return str((DATA_DIR if data_dir is None else Path(data_dir).expanduser()).resolve())
    if data_dir is not None:
        raise InputError(f"--data-dir is for {', '.join(DOWNLOADS)}; --data {source} needs none")
    return None


def augments(source: str) -> bool:
    """Whether training images are cropped and flipped where the user does not say: for CIFAR."""
    return source in DOWNLOADS and DOWNLOADS[source].augment


def load(source: str, image_size: int | None = None, data_dir: str | None = None) -> Dataset:
    """Load a data set.

    Args:
        source: a name of ``NAMED``, or the path of an ``.npz`` file or of an image folder.
        image_size: height and width to which the pictures of an image folder are resized, 32 when
            None; other data keep their size and take None only.
        data_dir: the folder of torchvision's data sets, into which they are downloaded if they are
            not there; ``data`` when None. Other data take None only.

    Raises:
        InputError: if the data cannot be read or do not fit together.
    """
    source = canonical_source(source)
    data_dir = canonical_data_dir(source, data_dir)
    if Path(source).is_dir() and source not in NAMED:
        return load_image_folder(Path(source), 32 if image_size is None else image_size)
    if image_size is not None:
        raise InputError("--image-size is for image folders only: other data keep their size")
    if data_dir is not None:
        return load_download(source, Path(data_dir))
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


def load_download(name: str, data_dir: Path) -> Dataset:
    """One of torchvision's data sets, downloaded into ``data_dir`` if it is not there.

    Raises:
        InputError: if it can be neither read nor downloaded; the message says what to do by hand.
    """
    (x_train, y_train), (x_test, y_test) = downloads.read(name, data_dir)
    return _assemble(name, x_train, y_train, x_test, y_test, DOWNLOADS[name].classes)


EMBEDDED: dict[str, Callable[[], Dataset]] = {"digits": load_digits_dataset}
NAMED = (*EMBEDDED, *DOWNLOADS)


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
    x_train: Pixels,
    y_train: NDArray[np.int64],
    x_test: Pixels,
    y_test: NDArray[np.int64],
    classes: int,
) -> Dataset:
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
