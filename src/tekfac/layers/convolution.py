"""Convolutions, and their inputs as patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from tekfac.layers.layer import Layer
from tekfac.layers.registry import register
from tekfac.numerics import squares, wide

CONV_WEIGHT: dict[int, Callable[..., Tensor]] = {
    1: conv1d_weight,
    2: conv2d_weight,
    3: conv3d_weight,
}


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvLayer(Layer):
    """A convolution: a fully-connected layer applied to the patch at each output position."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    def _groups(self) -> int:
        return self.module.groups

    def batched(self, x: Tensor) -> Tensor:
        return x[None] if x.dim() == 1 + len(self.module.kernel_size) else x

    def _width(self, x: Tensor) -> int:
        return x.shape[-1 - len(self.module.kernel_size)] // self.groups

    def _expected_width(self) -> int:
        return (self.d_in - (self.bias is not None)) // math.prod(self.module.kernel_size)

    def _columns(self, weight: Tensor) -> Tensor:
        return weight.movedim(1, -1)

    def _weight(self, columns: Tensor) -> Tensor:
        assert self.weight is not None
        shape = self.weight.shape
        return columns.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def _gradients(
        self, x: Tensor | None, g: Tensor, examples: int, first: int, last: int
    ) -> Tensor:
        if x is None:
            return super()._gradients(x, g, examples, first, last)
        # A group of channels for each row: its weight's gradient, without any patch.
        per = len(g) // examples
        dtype = self._read_as(x, g)
        x, g = (part[first * per : last * per].to(dtype) for part in (x, g))
        rows = len(g)
        sides = self._padding()
        padding = [before for before, _ in sides]
        if self.module.padding_mode != "zeros" or any(before != after for before, after in sides):
            x, padding = self._padded(x), [0] * len(sides)
        assert self.weight is not None
        found = CONV_WEIGHT[len(padding)](
            x.reshape(1, -1, *x.shape[2:]),
            (rows * len(self.weight), *self.weight.shape[1:]),
            g.reshape(1, -1, *g.shape[2:]),
            self.module.stride,
            padding,
            self.module.dilation,
            rows * self.groups,
        )
        parts = [self._columns(found).flatten(1)]
        if self.bias is not None:
            parts.append(g.flatten(2).sum(dim=2).view(-1, 1))
        gradients = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return gradients.view(-1, per, self.groups, self.d_out, self.d_in).sum(dim=1).movedim(0, 2)

    def _fill(self, target: Tensor, x: Tensor, seen: Tensor | None) -> None:
        if seen is not None and 4 * target.numel() <= x.numel():
            self._fill_few(target, x, seen)
            return
        # Channels last, so that every kernel position is copied in contiguous runs of channels.
        padded = self._padded(x.to(target.dtype)).movedim(1, -1).contiguous()
        sizes = self._sizes(padded.shape[1:-1])
        shape = (len(x), *sizes)
        if seen is not None:
            # Numbers of positions to numbers of pixels, where the kernel's first entry lies.
            pixels = padded.flatten(0, -2)
            corner, *places = _unravelled(seen, shape)
            for place, full, stride in zip(
                places, padded.shape[1:-1], self.module.stride, strict=True
            ):
                corner = corner * full + place * stride
            shape = (len(seen),)
        target = target.view(self.groups, *shape, math.prod(self.module.kernel_size), -1)
        for number, offsets in enumerate(self._offsets()):
            if seen is None:
                window = [slice(None)]
                window += (
                    slice(offset, offset + (size - 1) * stride + 1, stride)
                    for offset, size, stride in zip(offsets, sizes, self.module.stride, strict=True)
                )
                found = padded[tuple(window)]
            else:
                shift = 0
                for offset, full in zip(offsets, padded.shape[1:-1], strict=True):
                    shift = shift * full + offset
                found = pixels.index_select(0, corner + shift)
            target[..., number, :].copy_(found.unflatten(-1, (self.groups, -1)).movedim(-2, 0))

    def _fill_few(self, target: Tensor, x: Tensor, seen: Tensor) -> None:
        """The same where less is read than there is: no copy of all is made first."""
        zeros = self.module.padding_mode == "zeros"
        before = [first if zeros else 0 for first, _ in self._padding()]
        full = self._padded_size(x)
        example, *places = _unravelled(seen, (len(x), *self._sizes(full)))
        pixels = (x if zeros else self._padded(x)).movedim(1, -1)
        # `_offsets`, made where they are used: the device need not wait for the host.
        kernel = self.module.kernel_size
        entries = _unravelled(torch.arange(math.prod(kernel), device=x.device), kernel)
        index, inside = [example[:, None]], torch.ones((), dtype=torch.bool, device=x.device)
        for place, stride, entry, dilation, first, size in zip(
            places,
            self.module.stride,
            entries,
            self.module.dilation,
            before,
            pixels.shape[1:-1],
            strict=True,
        ):
            wanted = (place * stride - first)[:, None] + entry * dilation
            index.append(wanted.clamp(0, size - 1))
            inside = inside & (index[-1] == wanted)
        found = torch.where(inside[..., None], pixels[tuple(index)], 0)
        target = target.view(self.groups, *inside.shape, -1)
        target.copy_(found.unflatten(-1, (self.groups, -1)).movedim(-2, 0))

    def _offsets(self) -> Iterator[tuple[int, ...]]:
        """Where the kernel's entries lie from its first."""
        module = self.module
        return product(
            *(
                range(0, size * dilation, dilation)
                for size, dilation in zip(module.kernel_size, module.dilation, strict=True)
            )
        )

    def _sizes(self, padded: Sequence[int]) -> list[int]:
        """Positions along each axis of an input of this size, padding included."""
        module = self.module
        return [
            (full - (size - 1) * dilation - 1) // stride + 1
            for full, size, stride, dilation in zip(
                padded, module.kernel_size, module.stride, module.dilation, strict=True
            )
        ]

    def _norms(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.groups, -1))
        norms = squares(grouped).sum(dim=2, dtype=wide(x.dtype))
        zeros = self.module.padding_mode == "zeros"
        norms = norms if zeros else self._padded(norms)
        full = self._padded_size(x)
        axes = zip(full, self._sizes(full), self._padding(), range(len(full)), strict=True)
        for length, size, (before, after), axis in reversed(list(axes)):
            # How many patches an entry is in, along this axis.
            counts = norms.new_zeros(length)
            kernel, stride = self.module.kernel_size[axis], self.module.stride[axis]
            for offset in range(0, kernel * self.module.dilation[axis], self.module.dilation[axis]):
                counts[offset : offset + (size - 1) * stride + 1 : stride] += 1
            norms = norms @ (counts[before : length - after] if zeros else counts)
        return norms.mT

    def _outputs(self, g: Tensor) -> Tensor:
        rows: Tensor = g.flatten(2).unflatten(1, (self.groups, -1))
        return rows.permute(1, 0, 3, 2)

    def _padding(self) -> list[tuple[int, int]]:
        """Entries added before and behind each axis."""
        module = self.module
        if module.padding == "same":
            totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        if isinstance(module.padding, str):
            return [(0, 0)] * len(module.kernel_size)
        return [(before, before) for before in module.padding]

    def _padded_size(self, x: Tensor) -> list[int]:
        return [size + sum(pair) for size, pair in zip(x.shape[2:], self._padding(), strict=True)]

    def _padded(self, x: Tensor) -> Tensor:
        # F.pad counts from the last dimension.
        pad = [entries for pair in reversed(self._padding()) for entries in pair]
        mode = self.module.padding_mode
        return F.pad(x, pad, mode="constant" if mode == "zeros" else mode) if any(pad) else x


def _unravelled(numbers: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Indices for each dimension: ``torch.unravel_index``, which would wait for the device."""
    indices = []
    for size in reversed(shape):
        indices.append(numbers % size)
        numbers = numbers // size
    return indices[::-1]
