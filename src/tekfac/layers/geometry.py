"""Where a convolution reads its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """Which entries of its input a convolution multiplies.

    Padding is with zeros: a module that pads otherwise does so before it convolves.

    Args:
        stride: along each axis.
        padding: entries before and behind each axis.
        dilation: along each axis.
        groups: of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def plain(cls, axes: int, groups: int = 1) -> Geometry:
        """Each patch once, nothing around them."""
        return cls((1,) * axes, (0,) * axes, (1,) * axes, groups)

    @classmethod
    def of(cls, module: Any) -> Geometry:
        """That of a convolution module, as far as zeros are what it pads with."""
        padding = module.padding
        if module.padding_mode != "zeros" or padding == "valid":
            padding = (0,) * len(module.kernel_size)
        elif padding == "same":
            sizes = zip(module.dilation, module.kernel_size, strict=True)
            padding = tuple(d * (k - 1) // 2 for d, k in sizes)
        return cls(tuple(module.stride), tuple(padding), tuple(module.dilation), int(module.groups))
