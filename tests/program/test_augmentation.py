"""Random crops and flips: what they may do, how often, and that a seed fixes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tekfac.data.augmentation import PADDING, crop_and_flip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def candidates(image: Tensor) -> list[Tensor]:
    """All that may become of an image, one by one: 9 × 9 crops, plain and mirrored."""
    _, height, width = image.shape
    padded = F.pad(image, (PADDING,) * 4)
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * PADDING + 1)
        for left in range(2 * PADDING + 1)
    ]
    return [*crops, *(crop.flip(2) for crop in crops)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_crop_occurs_and_nothing_else(dtype: torch.dtype) -> None:
    image = torch.randint(1, 256, (3, 6, 5), generator=generator(1)).to(dtype)
    images = image.expand(5000, -1, -1, -1)
    found = crop_and_flip(images, generator())
    assert found.dtype == dtype
    counts = [int((found == each).flatten(1).all(dim=1).sum()) for each in candidates(image)]
    assert sum(counts) == 5000
    # 31 are expected of each; 4 deviations are 22.
    assert min(counts) > 5
    assert max(counts) < 60


def test_each_image_is_drawn_for_itself_and_stays_itself() -> None:
    images = torch.randint(1, 256, (40, 1, 8, 8), generator=generator(1), dtype=torch.uint8)
    before = images.clone()
    found = crop_and_flip(images, generator())
    assert torch.equal(images, before)
    which = [
        next(i for i, each in enumerate(candidates(image)) if torch.equal(each, crop))
        for image, crop in zip(images, found, strict=True)
    ]
    assert len(set(which)) > 20


def test_seed_fixes_the_draws() -> None:
    images = torch.randint(256, (40, 3, 8, 8), generator=generator(1), dtype=torch.uint8)
    assert torch.equal(crop_and_flip(images, generator()), crop_and_flip(images, generator()))
    assert not torch.equal(crop_and_flip(images, generator()), crop_and_flip(images, generator(2)))
