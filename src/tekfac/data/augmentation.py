"""Random changes of training images, a whole batch at once, on the device where it lies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = 4


def crop_and_flip(
    images: Tensor,
    generator: torch.Generator,
    batch: int | None = None,
    part: slice = slice(None),
) -> Tensor:
    """Each image shifted by up to 4 pixels both ways and, for one in two, mirrored.

    What is moved in from outside is zero, black for pixels from 0 to 255: crops of the size of the
    image out of the image with 4 pixels of padding, as the paper has them.

    Args:
        images: N×C×H×W, of any type; not changed.
        generator: draws the shifts and the mirrorings; on the images' device.
        batch, part: how many images the batch has that these are a part of, and which one: as much
            is drawn for any part of it. By default they are all of it.

    Returns:
        Images of the same shape, type and device.
    """
    count, _, height, width = images.shape
    drawn = count if batch is None else batch

    def draw(high: int) -> Tensor:
        return torch.randint(high, (drawn,), generator=generator, device=images.device)[part]

    top, left, mirrored = draw(2 * PADDING + 1), draw(2 * PADDING + 1), draw(2).bool()
    padded = F.pad(images, (PADDING,) * 4)
    # A view of all crops, N×C×top×left×H×W, of which one per image is copied.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    crops = windows[torch.arange(count, device=images.device), :, top, left]
    return torch.where(mirrored[:, None, None, None], crops.flip(3), crops)
