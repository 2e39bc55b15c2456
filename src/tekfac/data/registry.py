"""Data sets by name, file or folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tekfac.data import downloads
from tekfac.data.dataset import Dataset, assemble
from tekfac.data.digits import load_digits_dataset
from tekfac.data.downloads import DOWNLOADS
from tekfac.data.npz import load_npz
from tekfac.errors import InputError

# Where data sets to be downloaded are kept, unless the user says.
DATA_DIR = Path("data")

# What comes with the program, and all data sets that have a name.
EMBEDDED: dict[str, Callable[[], Dataset]] = {"digits": load_digits_dataset}
NAMED = (*EMBEDDED, *DOWNLOADS)


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
        from tekfac.data.pictures import load_image_folder  # imports torchvision

        return load_image_folder(Path(source), 32 if image_size is None else image_size)
    if image_size is not None:
        raise InputError("--image-size is for image folders only: other data keep their size")
    if data_dir is not None:
        return load_download(source, Path(data_dir))
    return EMBEDDED[source]() if source in EMBEDDED else load_npz(Path(source))


def load_download(name: str, data_dir: Path) -> Dataset:
    """One of torchvision's data sets, downloaded into ``data_dir`` if it is not there.

    Raises:
        InputError: if it can be neither read nor downloaded; the message says what to do by hand.
    """
    (x_train, y_train), (x_test, y_test) = downloads.read(name, data_dir)
    return assemble(name, x_train, y_train, x_test, y_test, DOWNLOADS[name].classes)
