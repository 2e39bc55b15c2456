"""What a run is to do, complete and fixed: the content of a run folder's ``config.json``."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from tekfac import data, networks
from tekfac.data import DATA_DIR, DOWNLOADS, NAMED, Dataset
from tekfac.errors import InputError
from tekfac.runs import optimizers
from tekfac.runs.options import Option, flag
from tekfac.runs.schedules import Schedule

# Types that layers may compute in. The range of bfloat16 is float32's; that of float16 is so small
# that the loss must be scaled.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# In help, what the defaults of augment and width are.
AUGMENTED = " and ".join(name for name, each in DOWNLOADS.items() if each.augment)
WIDTHS = ", ".join(f"{each.width} for {name}" for name, each in networks.NETWORKS.items())


@dataclass(frozen=True)
class Config:
    """A run's configuration. Two runs of one configuration give the same numbers.

    Attributes:
        data: a name of ``data.NAMED``, or the path of an ``.npz`` file or image folder
            (recorded as an absolute path, so that a run can be resumed from anywhere).
        image_size: height and width for the pictures of an image folder; None for other data.
        data_dir: the folder of torchvision's data sets (recorded as an absolute path); None for
            other data.
        limit_train: the number of training images, the first ones, to which a reduced run is
            limited; None for all.
        hold_out: the number of training images, drawn at random but the same for all seeds, that
            are not trained on and stand in for the test images, which then nothing is evaluated
            on; None for a run on all, tested on the test images.
        augment: whether training images are cropped and flipped at random; None takes what the
            paper does with the data set, and is recorded as that.
        network: a name of ``networks.NETWORKS``.
        width: the network's width; None takes its default, and is recorded as that.
        optimizer: a name of ``optimizers.METHODS``.
        settings: the optimizer's settings; those left out take the method's defaults, and are
            recorded with the values that they took.
        epochs, batch_size: 1 or more. The last batch of an epoch may be smaller.
        schedule: the learning rate's schedule.
        seed: fixes initial weights, data order, augmentation and sampled labels.
        device: where torch is to compute, e.g. ``"cpu"`` or ``"cuda"``.
        precision: a name of ``PRECISIONS``: what layers compute in, by ``torch.autocast``.
            Parameters, and the optimizer's state, are float32 in any case. With ``"fp16"`` the
            loss is scaled for the backward pass, and steps with infinite gradients are skipped.
        compile: whether training steps use ``torch.compile``'s form of the network.
        tensorboard: whether the metrics are written to TensorBoard's event files, too.
        threads: CPU threads for torch. Sums come out differently in their last bits with another
            number, so that it is part of what makes a run repeatable.

    Raises:
        InputError: if a value cannot be used, before anything is loaded or written.
    """

    data: Annotated[
        str,
        Option(
            f"{', '.join(NAMED)}, an .npz file (x_train, y_train, x_test, y_test), or a "
            "folder of pictures."
        ),
    ] = "digits"
    image_size: Annotated[
        int | None,
        Option("Pixels to which an image folder's pictures are resized.", default="32"),
    ] = None
    data_dir: Annotated[
        str | None,
        Option(
            f"Folder of {', '.join(DOWNLOADS)}, which are downloaded into it if they are not "
            "there.",
            default=f"{DATA_DIR}",
        ),
    ] = None
    limit_train: Annotated[int | None, Option("Train on the first so many images only.")] = None
    hold_out: Annotated[
        int | None,
        Option(
            "Do not train on so many of the training images, and test on them in place of the "
            "test images."
        ),
    ] = None
    augment: Annotated[
        bool | None,
        Option(
            "Train on random crops (4 pixels of padding) and horizontal flips.",
            default=f"as the paper, for {AUGMENTED}",
        ),
    ] = None
    network: Annotated[str, Option(f"{', '.join(networks.NETWORKS)}.")] = "cnn"
    width: Annotated[
        int | None,
        Option(
            "Channels of the network's first convolutions, or an mlp's hidden units; deeper ones "
            "are in proportion.",
            default=WIDTHS,
        ),
    ] = None
    optimizer: str = "tekfac"
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: Annotated[int, Option()] = 12
    batch_size: Annotated[int, Option()] = 64
    schedule: Schedule = field(default_factory=Schedule)
    seed: Annotated[
        int, Option("Fixes initial weights, data order, augmentation and sampled labels.")
    ] = 0
    device: Annotated[str, Option("cpu, cuda, ...", default="cuda if there is one")] = "cpu"
    precision: Annotated[
        str,
        Option(
            f"{', '.join(PRECISIONS)}: what layers compute in; parameters are float32 in any "
            "case, and fp16 has its loss scaled."
        ),
    ] = "fp32"
    compile: Annotated[bool, Option("Train with torch.compile's form of the network.")] = False
    tensorboard: Annotated[
        bool, Option("Write TensorBoard's event files, too, into run folders.")
    ] = False
    threads: Annotated[int, Option("CPU threads.", default="torch's, 1 for digits")] = 1

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "image_size",
            "limit_train",
            "hold_out",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flag(name)} must be 1 or more, got {value}")
        _check_device(self.device)
        if self.precision not in PRECISIONS:
            raise InputError(
                f"--precision {self.precision!r} is unknown; there is: {', '.join(PRECISIONS)}"
            )
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "--tensorboard: the package tensorboard is not installed: "
                "pip install 'tekfac[tensorboard]'"
            )
        # Frozen as the instance is, these are its first values, not changes.
        object.__setattr__(self, "data", data.canonical_source(self.data))
        object.__setattr__(self, "data_dir", data.canonical_data_dir(self.data, self.data_dir))
        if self.augment is None:
            object.__setattr__(self, "augment", data.augments(self.data))
        object.__setattr__(self, "width", networks.resolve_width(self.network, self.width))
        object.__setattr__(self, "settings", optimizers.resolve(self.optimizer, self.settings))
        if self.precision == "fp16":
            _check_half_precision(self.device)
            if self.settings.get("fisher") == "empirical":
                raise InputError(
                    "--precision fp16 scales the loss, and --fisher empirical would measure the "
                    "scaled one: take --fisher mc or exact, or --precision bf16"
                )

    @property
    def name(self) -> str:
        """A short name, fit for a folder."""
        source = data.source_name(self.data)
        return f"{source}-{self.network}-{self.optimizer}-seed{self.seed}"

    @property
    def tested_on(self) -> str:
        """What the numbers of a test are about, in a word: ``"test"`` or ``"held-out"`` images."""
        return "test" if self.hold_out is None else "held-out"

    def load_data(self) -> Dataset:
        """The data set, downloaded if need be, with as many training images as are wanted.

        Raises:
            InputError: if the data cannot be read or had, or do not fit together.
        """
        images = data.load(self.data, self.image_size, self.data_dir)
        if self.limit_train is not None:
            images = images.first(self.limit_train)
        return images if self.hold_out is None else images.hold_out(self.hold_out)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The configuration that ``to_dict`` gave, in which settings may have been text once.

        Raises:
            InputError: if a name is unknown or a value cannot be used.
        """
        try:
            parts = {
                "schedule": Schedule(**values["schedule"]),
                "settings": optimizers.read_settings(values.get("settings", {})),
            }
            return cls(**{**values, **parts})
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a run's configuration: {error}") from error


def default_device() -> str:
    """``"cuda"`` where there is one, or else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_threads(source: str) -> int:
    """Torch's own choice, but one for the embedded data sets.

    On images so small a step takes milliseconds, and threads spend more on waiting for one another
    than they save; on a machine busy with other work ten times as much.
    """
    return 1 if source in data.EMBEDDED else torch.get_num_threads()


def _check_half_precision(device: str) -> None:
    """Raise if a layer cannot be trained in float16 there: torch lacks kernels for some CPUs."""
    image = torch.zeros(1, 1, 3, 3, device=device, requires_grad=True)
    kernel = torch.zeros(1, 1, 3, 3, device=device)
    try:
        with torch.autocast(torch.device(device).type, torch.float16):
            torch.conv2d(image, kernel).sum().backward()
    except RuntimeError as error:
        raise InputError(
            f"--precision fp16: torch cannot train in it on {device} of this machine "
            f"({str(error).splitlines()[0]}); use --device cuda, or --precision bf16 or fp32"
        ) from error


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"--device {device!r} is no device of torch, e.g. cpu, cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch finds no CUDA device on this machine; use cpu")
