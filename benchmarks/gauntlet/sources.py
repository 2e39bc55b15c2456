"""Where examples come from: files and data sets that the user names, and what Python brings."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tekfac.data import Dataset, canonical_source, load, source_name
from tekfac.errors import InputError

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
FALLBACK = "digits"
HELD_OUT_CHARACTERS = 20_000


@dataclass(frozen=True)
class Sources:
    """All data of the gauntlet, read when first asked for.

    Args:
        images: for ``mnist`` and ``cifar10`` what ``tekfac train --data`` takes: a file's path, or
            the name of a data set to be downloaded. Of one that is missing, scikit-learn's digits
            take the place, enlarged.
        cache: a folder for what tasks need made once, such as a network to fine-tune.

    Raises:
        InputError: for another name, or a file that is not there.
    """

    images: Mapping[str, str]
    cache: Path
    _read: dict[str, Dataset] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, source in self.images.items():
            if name not in SHAPES:
                raise InputError(f"--data {name}=: there is {', '.join(SHAPES)}")
            canonical_source(source)

    def words(self, name: str) -> str:
        """Where images of this name come from."""
        if name in self.images:
            return source_name(self.images[name])
        return f"scikit-learn's digits, enlarged, in place of {name}"

    def dataset(self, name: str) -> Dataset:
        """Images of this name.

        Raises:
            InputError: if they cannot be read, or are of another size.
        """
        if name not in self._read:
            data = load(self.images.get(name, FALLBACK))
            if name not in self.images:
                data = _enlarged(data, SHAPES[name])
            if data.image_shape != SHAPES[name] or data.classes != 10:
                raise InputError(
                    f"--data {name}={self.images[name]}: {name} has ten classes of images of "
                    f"{SHAPES[name]} (channels, height, width), this has {data.classes} of "
                    f"{data.image_shape}"
                )
            self._read[name] = data
        return self._read[name]

    @cached_property
    def text(self) -> Text:
        """The reference that ``help()`` of this Python shows."""
        return Text(_documentation())


class Text:
    """A text as numbers of characters, in three parts.

    Attributes:
        characters: how many different ones there are.
        train, search, final: the parts, int64.
    """

    def __init__(self, text: str) -> None:
        alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
        numbers = torch.tensor([alphabet[character] for character in text])
        self.characters = len(alphabet)
        held_out = min(HELD_OUT_CHARACTERS, len(text) // 10)
        parts = numbers.split([len(text) - 2 * held_out, held_out, held_out])
        self.train, self.search, self.final = parts


def _documentation() -> str:
    """Its topics' paragraphs, each of which occurs once: several topics have some in common."""
    topics = pydoc_data.topics.topics
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))
    return text.encode("ascii", "replace").decode()


def _enlarged(data: Dataset, shape: tuple[int, int, int]) -> Dataset:
    channels, height, width = shape

    def enlarge(images: Tensor) -> Tensor:
        large = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
        # From 0 to 16 as 8×8 pixels; other images are from 0 to 255.
        return (large * (255 / 16)).expand(-1, channels, -1, -1).contiguous()

    train, test = enlarge(data.x_train), enlarge(data.x_test)
    mean, deviation = train.mean(), train.std()
    return replace(
        data,
        x_train=train,
        x_test=test,
        mean=mean.expand(channels, 1, 1),
        deviation=deviation.expand(channels, 1, 1),
    )
