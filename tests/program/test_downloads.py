"""Torchvision's data sets: small files in their formats, downloads from a local server, bad files.

Only torchvision's lists of URLs and checksums are replaced; its code downloads, verifies and reads.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets
from typer.testing import CliRunner

from tekfac import data
from tekfac.cli.app import app
from tekfac.data import downloads
from tekfac.errors import InputError

RNG = np.random.default_rng(0)
TRAIN, TEST = 10, 4
NOWHERE = "http://127.0.0.1:1/"


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Sets:
    """A server of small versions of the data sets, and what is in them."""

    def __init__(self, folder: Path, address: str, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.address, self.patch = folder, address, patch
        self.images = {
            name: {
                part: RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
                for part, count in (("train", TRAIN), ("test", TEST))
            }
            for name, shape in (
                ("cifar10", (3, 32, 32)),
                ("cifar100", (3, 32, 32)),
                ("svhn", (3, 32, 32)),
                ("mnist", (1, 28, 28)),
                ("fashion-mnist", (1, 28, 28)),
            )
        }
        self.labels = {
            "train": np.array([3, 0, 9, 1, 2, 0, 9, 8, 7, 1]),
            "test": np.array([0, 9, 4, 1]),
        }
        self.files: dict[str, dict[str, bytes]] = {
            "cifar10": self._cifar("cifar10", datasets.CIFAR10, "labels"),
            "cifar100": self._cifar("cifar100", datasets.CIFAR100, "fine_labels"),
            "svhn": self._svhn(),
            "mnist": self._mnist("mnist", datasets.MNIST),
            "fashion-mnist": self._mnist("fashion-mnist", datasets.FashionMNIST),
        }
        self.serve()

    def serve(self) -> None:
        """Put the files of all data sets where the URLs point."""
        for name, files in self.files.items():
            (self.folder / name).mkdir(exist_ok=True)
            for file, content in files.items():
                (self.folder / name / file).write_bytes(content)

    def url(self, name: str) -> str:
        return f"{self.address}/{name}/"

    def _cifar(self, name: str, dataset: type, key: str) -> dict[str, bytes]:
        def batch(images: np.ndarray, labels: np.ndarray) -> bytes:
            return pickle.dumps({"data": images.reshape(len(images), -1), key: labels.tolist()})

        batches = len(dataset.train_list)
        parts = zip(
            dataset.train_list,
            np.split(self.images[name]["train"], batches),
            np.split(self.labels["train"], batches),
            strict=True,
        )
        contents = {file: batch(images, labels) for (file, _), images, labels in parts}
        contents |= {
            file: batch(self.images[name]["test"], self.labels["test"])
            for file, _ in dataset.test_list
        }
        meta = dataset.meta["filename"]
        contents[meta] = pickle.dumps({dataset.meta["key"]: ["a", "b"]})
        for part in ("train_list", "test_list"):
            listed = [[file, md5(contents[file])] for file, _ in getattr(dataset, part)]
            self.patch.setattr(dataset, part, listed)
        self.patch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(contents[meta])})
        archive = tar({f"{dataset.base_folder}/{file}": c for file, c in contents.items()})
        self.patch.setattr(dataset, "tgz_md5", md5(archive))
        self.patch.setattr(dataset, "url", self.url(name) + dataset.filename)
        return {dataset.filename: archive}

    def _svhn(self) -> dict[str, bytes]:
        files, listed = {}, dict(datasets.SVHN.split_list)
        for part in ("train", "test"):
            labels = np.where(self.labels[part] == 0, 10, self.labels[part])
            buffer = io.BytesIO()
            scipy.io.savemat(
                buffer,
                {
                    "X": self.images["svhn"][part].transpose(2, 3, 1, 0),
                    "y": labels[:, None].astype(np.uint8),
                },
            )
            file = f"{part}_32x32.mat"
            files[file] = buffer.getvalue()
            listed[part] = [self.url("svhn") + file, file, md5(files[file])]
        self.patch.setattr(datasets.SVHN, "split_list", listed)
        return files

    def _mnist(self, name: str, dataset: type) -> dict[str, bytes]:
        files = {}
        for part, prefix in (("train", "train"), ("test", "t10k")):
            images, labels = self.images[name][part][:, 0], self.labels[part].astype(np.uint8)
            for file, array in (("images-idx3", images), ("labels-idx1", labels)):
                header = bytes([0, 0, 8, array.ndim])
                header += b"".join(size.to_bytes(4, "big") for size in array.shape)
                files[f"{prefix}-{file}-ubyte.gz"] = gzip.compress(header + array.tobytes())
        listed = [(file, md5(files[file])) for file, _ in dataset.resources]
        self.patch.setattr(dataset, "resources", listed)
        self.patch.setattr(dataset, "mirrors", [self.url(name)])
        return files

    def go_offline(self) -> None:
        """Let all URLs point nowhere."""
        for dataset in (datasets.CIFAR10, datasets.CIFAR100):
            self.patch.setattr(dataset, "url", NOWHERE + dataset.filename)
        for dataset in (datasets.MNIST, datasets.FashionMNIST):
            self.patch.setattr(dataset, "mirrors", [NOWHERE])
        nowhere = {k: [NOWHERE + v[1], *v[1:]] for k, v in datasets.SVHN.split_list.items()}
        self.patch.setattr(datasets.SVHN, "split_list", nowhere)

    def check(self, name: str, loaded: data.Dataset) -> None:
        """What was loaded is what was served."""
        for part, x, y in (
            ("train", loaded.x_train, loaded.y_train),
            ("test", loaded.x_test, loaded.y_test),
        ):
            assert x.dtype == torch.uint8
            np.testing.assert_array_equal(x.numpy(), self.images[name][part])
            assert y.dtype == torch.int64
            assert y.tolist() == self.labels[part].tolist()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sets]:
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Sets(folder, f"http://127.0.0.1:{server.server_port}", monkeypatch)
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", downloads.DOWNLOADS)
def test_download_then_offline(sets: Sets, name: str, tmp_path: Path) -> None:
    loaded = data.load(name, data_dir=str(tmp_path / "kept"))
    sets.check(name, loaded)
    assert loaded.name == name
    assert loaded.classes == (100 if name == "cifar100" else 10)
    sets.go_offline()
    assert data.load(name, data_dir=str(tmp_path / "kept")).digest() == loaded.digest()


@pytest.mark.parametrize("name", downloads.DOWNLOADS)
def test_offline_says_what_to_put_where_and_that_works(
    sets: Sets, name: str, tmp_path: Path
) -> None:
    sets.go_offline()
    root = tmp_path / "kept"
    with pytest.raises(InputError) as caught:
        data.load(name, data_dir=str(root))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"--data {name} can be neither read from {root} nor downloaded (")
    found = re.search(r"By hand: download (.*) and put what you get, as it is, into (.*);", message)
    assert found is not None
    folder = Path(found[2])
    folder.mkdir(parents=True, exist_ok=True)
    for url in found[1].split():
        file = url.rpartition("/")[2]
        (folder / file).write_bytes(sets.files[name][file])
    sets.check(name, data.load(name, data_dir=str(root)))


@pytest.mark.parametrize("name", downloads.DOWNLOADS)
def test_corrupted_download(sets: Sets, name: str, tmp_path: Path) -> None:
    good = sets.files[name]
    sets.files[name] = {file: content[:-3] + b"???" for file, content in good.items()}
    sets.serve()
    with pytest.raises(InputError, match=r"nor downloaded \(.*corrupted"):
        data.load(name, data_dir=str(tmp_path / "kept"))
    sets.files[name] = good
    sets.serve()
    sets.check(name, data.load(name, data_dir=str(tmp_path / "kept")))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_2"),
        ("cifar100", "cifar-100-python/test"),
        ("svhn", "test_32x32.mat"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte"),
        ("fashion-mnist", "FashionMNIST/raw/train-labels-idx1-ubyte"),
    ],
)
@pytest.mark.parametrize("damage", [lambda c: c[:-2], lambda c: c[:5], lambda c: b"no data"])
def test_damaged_files(
    sets: Sets, name: str, file: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """What a checksum watches over is fetched again; the rest cannot be read, and is named."""
    data.load(name, data_dir=str(tmp_path))
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    if "MNIST" not in file:
        sets.check(name, data.load(name, data_dir=str(tmp_path)))
        return
    with pytest.raises(InputError, match="delete files unpacked from it earlier"):
        data.load(name, data_dir=str(tmp_path))
    path.unlink()
    sets.check(name, data.load(name, data_dir=str(tmp_path)))


def test_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(root: Path, train: bool) -> downloads.Part:
        raise OSError(28, "No space left on device")

    broken = replace(downloads.DOWNLOADS["svhn"], read=full)
    monkeypatch.setitem(downloads.DOWNLOADS, "svhn", broken)
    with pytest.raises(OSError, match="No space left on device") as caught:
        data.load("svhn", data_dir=str(tmp_path))
    assert caught.value.filename == str(tmp_path)


def test_folder_for_data_that_need_none(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--data-dir is for cifar10, .*; --data digits needs none"
    ):
        data.load("digits", data_dir=str(tmp_path))


def test_training_on_downloaded_images_from_the_command_line(sets: Sets) -> None:
    options = "train --data cifar10 --data-dir kept --network resnet20 --width 2 --optimizer sgd "
    options += "--limit-train 5 --epochs 1 --device cpu --threads 1 --out run"
    result = CliRunner().invoke(app, options.split())
    assert result.exit_code == 0, result.output
    sets.go_offline()
    result = CliRunner().invoke(app, ["train", "--resume", "run", "--epochs", "2"])
    assert result.exit_code == 0, result.output
    assert "after 2 epochs; run in run" in result.output
