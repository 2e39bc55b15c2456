"""Data sets: what good ones become, and the message for each way of being bad."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tekfac import data
from tekfac.data import dataset
from tekfac.errors import InputError

RNG = np.random.default_rng(0)


def good_arrays() -> dict[str, Any]:
    return {
        "x_train": RNG.integers(0, 256, (12, 6, 5), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": RNG.integers(0, 256, (6, 6, 5), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }


def save_npz(path: Path, **changes: Any) -> Path:
    np.savez(path, **{**good_arrays(), **changes})
    return path


def save_pictures(folder: Path, count: int, size: tuple[int, int] = (9, 7)) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_digits_are_split_the_same_way_each_time() -> None:
    digits = data.load("digits")
    assert digits.x_train.shape == (1297, 1, 8, 8)
    assert digits.x_test.shape == (500, 1, 8, 8)
    assert digits.classes == 10
    assert digits.x_train.dtype == torch.float32
    assert digits.y_train.dtype == torch.int64
    images = digits.standardised(digits.x_train)
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert digits.digest() == data.load("digits").digest()


def test_npz_grey_images_get_a_channel(tmp_path: Path) -> None:
    loaded = data.load(str(save_npz(tmp_path / "mine.npz")))
    assert loaded.name == "mine"
    assert loaded.image_shape == (1, 6, 5)
    assert loaded.classes == 3
    assert loaded.y_test.tolist() == [0, 1, 2, 0, 1, 2]


def test_npz_channels_come_first_and_are_standardised_by_the_training_images(
    tmp_path: Path,
) -> None:
    x_train = RNG.normal(3.0, 2.0, (12, 6, 5, 3))
    x_test = RNG.normal(3.0, 2.0, (6, 6, 5, 3))
    loaded = data.load(str(save_npz(tmp_path / "mine.npz", x_train=x_train, x_test=x_test)))
    assert loaded.image_shape == (3, 6, 5)
    mean, deviation = x_train.mean(axis=(0, 1, 2)), x_train.std(axis=(0, 1, 2))
    expected = np.moveaxis((x_test - mean) / deviation, -1, 1)
    found = loaded.standardised(loaded.x_test).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bytes_stay_bytes_until_they_are_standardised(tmp_path: Path) -> None:
    arrays = good_arrays()
    loaded = data.load(str(save_npz(tmp_path / "mine.npz", **arrays)))
    assert loaded.x_train.dtype == loaded.x_test.dtype == torch.uint8
    np.testing.assert_array_equal(loaded.x_test[:, 0].numpy(), arrays["x_test"])
    images = loaded.standardised(loaded.x_test)
    assert images.dtype == torch.float32
    expected = (arrays["x_test"] - arrays["x_train"].mean()) / arrays["x_train"].std()
    np.testing.assert_allclose(images[:, 0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_mean_and_deviation_are_those_of_many_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "CHUNK", 5)
    x_train = RNG.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    loaded = data.load(str(save_npz(tmp_path / "a.npz", x_train=x_train, x_test=x_train[:6])))
    np.testing.assert_allclose(loaded.mean[:, 0, 0], x_train.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(loaded.deviation[:, 0, 0], x_train.std(axis=(0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_pixels_do_not_divide_by_zero(tmp_path: Path, value: float) -> None:
    loaded = data.load(str(save_npz(tmp_path / "a.npz", x_train=np.full((12, 6, 5), value))))
    assert loaded.deviation.item() == 1.0
    assert torch.isfinite(loaded.standardised(loaded.x_test)).all()


def test_digest_tells_changed_data_apart(tmp_path: Path) -> None:
    one = data.load(str(save_npz(tmp_path / "a.npz", y_test=np.array([0, 1, 2, 0, 1, 2]))))
    other = data.load(str(save_npz(tmp_path / "a.npz", y_test=np.array([0, 1, 2, 0, 1, 1]))))
    assert one.digest() != other.digest()


BAD_ARRAYS = {
    "rank": (
        {"x_train": np.zeros((12, 30), np.uint8)},
        "x_train must be N×H×W or N×H×W×C, but has shape (12, 30)",
    ),
    "empty": (
        {"x_test": np.zeros((0, 6, 5), np.uint8)},
        "x_test is empty, shape (0, 6, 5)",
    ),
    "channels first": (
        {"x_train": np.zeros((12, 3, 6, 5), np.uint8)},
        "x_train has shape (12, 3, 6, 5), which looks like N×C×H×W: put channels last",
    ),
    "pixel type": (
        {"x_train": np.zeros((12, 6, 5), np.int32)},
        "x_train must be uint8 or float, but is int32",
    ),
    "nan": (
        {"x_test": np.where(np.arange(6)[:, None, None] == 4, np.nan, np.zeros((6, 6, 5)))},
        "x_test has pixels that are nan or infinite, first in image 4",
    ),
    "beyond float32": (
        {"x_test": np.full((6, 6, 5), 1e300)},
        "x_test has pixels that are nan or infinite, first in image 0",
    ),
    "lengths": (
        {"y_train": np.zeros(11, np.int64)},
        "x_train has 12 images but y_train has 11 labels",
    ),
    "shapes": (
        {"x_test": np.zeros((6, 6, 6), np.uint8)},
        "images of x_train and x_test differ in shape (channels, height, width): "
        "(1, 6, 5) and (1, 6, 6)",
    ),
    "label rank": (
        {"y_train": np.zeros((12, 1), np.int64)},
        "y_train must have one label per image, but has shape (12, 1)",
    ),
    "label type": (
        {"y_test": np.zeros(6)},
        "y_test must hold integers, but is float64",
    ),
    "negative label": (
        {"y_train": np.arange(12) - 1},
        "y_train has a negative label, -1; labels count from 0",
    ),
    "unknown class": (
        {"y_test": np.array([0, 1, 2, 3, 0, 1])},
        "y_test has label 3, but the labels of y_train end at 2",
    ),
    "objects": (
        {"y_test": np.array([0, 1, 2, "x", None, 1], dtype=object)},
        "y_test cannot be read: it holds Python objects",
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays(tmp_path: Path, name: str) -> None:
    changes, message = BAD_ARRAYS[name]
    path = save_npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
        data.load(str(path))


def test_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, x_train=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(
        InputError,
        match=r"bad\.npz: y_train, x_test, y_test missing; the file holds x_train, labels, needed",
    ):
        data.load(str(path))


def test_truncated_file(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "bad.npz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"bad\.npz: not a readable \.npz file"):
        data.load(str(path))


def test_damaged_member(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, **good_arrays())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("x_train.npy").header_offset + 60
    content[start : start + 40] = b"\0" * 40
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x_train cannot be read: the file is damaged"):
        data.load(str(path))


@pytest.mark.parametrize("content", [b"", b"no archive at all"])
def test_file_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.npz: not a readable \.npz file"):
        data.load(str(path))


def test_single_array_under_the_name_npz(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match=r"holds a single array; write it with numpy\.savez"):
        data.load(str(path))


def test_unknown_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder, and no data set of that name"):
        data.load(str(tmp_path / "nothing"))
    (tmp_path / "table.csv").touch()
    with pytest.raises(InputError, match=r"a file of data must be an \.npz file"):
        data.load(str(tmp_path / "table.csv"))
    with pytest.raises(InputError, match="--image-size is for image folders only"):
        data.load("digits", image_size=16)


def test_folder_with_two_parts_matches_classes_by_name(tmp_path: Path) -> None:
    for name, count in (("ant", 3), ("bee", 4), ("cat", 2)):
        save_pictures(tmp_path / "train" / name, count)
    for name, count in (("bee", 2), ("cat", 1)):
        save_pictures(tmp_path / "test" / name, count, size=(20, 20))
    loaded = data.load(str(tmp_path), image_size=8)
    assert loaded.image_shape == (3, 8, 8)
    assert loaded.y_train.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert loaded.y_test.tolist() == [1, 1, 2]


def test_folder_in_one_part_is_split_by_class(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        save_pictures(tmp_path / name, 10)
    loaded = data.load(str(tmp_path))
    assert loaded.image_shape == (3, 32, 32)
    assert loaded.y_train.bincount().tolist() == [8, 8]
    assert loaded.y_test.bincount().tolist() == [2, 2]
    assert loaded.digest() == data.load(str(tmp_path)).digest()


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pictures in class folders"):
        data.load(str(tmp_path))
    save_pictures(tmp_path / "ant", 3)
    with pytest.raises(InputError, match="for each of two classes or more, found only 'ant'"):
        data.load(str(tmp_path))
    save_pictures(tmp_path / "bee", 1)
    with pytest.raises(InputError, match="class 'bee' has a single picture"):
        data.load(str(tmp_path))
    (tmp_path / "bee" / "torn.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"torn\.png: not a readable picture"):
        data.load(str(tmp_path))


def test_folder_with_a_class_for_testing_only(tmp_path: Path) -> None:
    for name in ("train/ant", "train/bee", "test/ant", "test/cow"):
        save_pictures(tmp_path / name, 2)
    with pytest.raises(InputError, match="test holds classes that train does not: cow"):
        data.load(str(tmp_path))
