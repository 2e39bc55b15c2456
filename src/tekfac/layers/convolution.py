"""Convolutions, and their inputs as patches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from tekfac.layers.geometry import Geometry
from tekfac.layers.layer import Form, Layer
from tekfac.layers.sample import Call
from tekfac.numerics import squares, wide

# With fewer entries side by side, to copy patch by patch takes longer than entry by entry.
RUN = 4

CONV_WEIGHT: dict[int, Callable[..., Tensor]] = {
    1: conv1d_weight,
    2: conv2d_weight,
    3: conv3d_weight,
}


class ConvLayer(Layer):
    """A convolution: a fully-connected layer applied to the patch at each output position.

    A transposed convolution is one, too: with its gradient in place of the input.

    Attributes:
        geometry: as its module has it; of single calls see `at`.
    """

    def __init__(
        self,
        name: str,
        full: Tensor,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        geometry: Geometry | None = None,
    ) -> None:
        self.kernel = tuple(full.shape[2:])
        self.geometry = geometry or Geometry.plain(len(self.kernel))
        self.groups = self.geometry.groups
        super().__init__(name, full, weight, bias)

    @property
    def form(self) -> Form:
        return super().form._replace(convolved=self.groups)

    def at(self, call: Call) -> ConvLayer:
        if call.geometry in (None, self.geometry):
            return self
        found = copy.copy(self)
        found.geometry = call.geometry
        return found

    def check_input(self, x: Tensor) -> None:
        width = x.shape[-1 - len(self.kernel)] // self.groups
        columns = self.d_in - (self.bias is not None)
        self._check_width(x, width, columns // math.prod(self.kernel))

    def _columns(self, weight: Tensor) -> Tensor:
        return weight.movedim(1, -1)

    def _weight(self, columns: Tensor) -> Tensor:
        shape = self.full.shape
        return columns.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    @property
    def storable(self) -> bool:
        return math.prod(self.kernel) > 1 and self.full.is_contiguous()

    def aligned(self, vectors: Tensor) -> Tensor:
        if not self.as_stored:
            return vectors
        groups, _, k = vectors.shape
        count = self.d_in - (self.bias is not None)
        patches = vectors[:, :count].view(groups, *self.kernel, -1, k)
        weights = patches.movedim(-2, 1).reshape(groups, count, k)
        return torch.cat([weights, vectors[:, count:]], 1) if self.bias is not None else weights

    def _gradients(self, call: Call, examples: int, first: int, last: int) -> Tensor:
        x, g = call.a, call.g
        if x is None:
            return super()._gradients(call, examples, first, last)
        # A group of channels for each row: its weight's gradient, without any patch.
        per = len(g) // examples
        dtype = self._read_as(x, g)
        x, g = (part[first * per : last * per].to(dtype) for part in (x, g))
        rows = len(g)
        found = CONV_WEIGHT[len(self.kernel)](
            x.reshape(1, -1, *x.shape[2:]),
            (rows * len(self.full), *self.full.shape[1:]),
            g.reshape(1, -1, *g.shape[2:]),
            self.geometry.stride,
            self.geometry.padding,
            self.geometry.dilation,
            rows * self.groups,
        )
        parts = [self._columns(found).flatten(1)]
        if self.bias is not None:
            sums = g.flatten(2).sum(dim=2).view(-1, 1)
            parts.append(sums if call.biased else torch.zeros_like(sums))
        gradients = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return gradients.view(-1, per, self.groups, self.d_out, self.d_in).sum(dim=1).movedim(0, 2)

    def _fill(self, target: Tensor, x: Tensor, seen: Tensor | None) -> None:
        if seen is not None and 4 * target.numel() <= x.numel():
            self._fill_few(target, x, seen)
            return
        x = self._padded(x.to(target.dtype))
        if seen is None:
            self._fill_all(target, x)
            return
        # Channels last, so that every kernel position is copied in contiguous runs of channels.
        padded = x.movedim(1, -1).contiguous()
        sizes = self._sizes(padded.shape[1:-1])
        # Numbers of positions to numbers of pixels, where the kernel's first entry lies.
        pixels = padded.flatten(0, -2)
        corner, *places = _unravelled(seen, (len(x), *sizes))
        for place, full, stride in zip(
            places, padded.shape[1:-1], self.geometry.stride, strict=True
        ):
            corner = corner * full + place * stride
        target = target.view(self.groups, len(seen), math.prod(self.kernel), -1)
        for number, offsets in enumerate(self._offsets()):
            shift = 0
            for offset, full in zip(offsets, padded.shape[1:-1], strict=True):
                shift = shift * full + offset
            found = pixels.index_select(0, corner + shift)
            target[..., number, :].copy_(found.unflatten(-1, (self.groups, -1)).movedim(-2, 0))

    def _fill_all(self, target: Tensor, padded: Tensor) -> None:
        """The same of all positions, as a view of the input that shows each patch in its place."""
        channels = padded.shape[1] // self.groups
        pixels = padded.movedim(1, -1)
        if channels > 1 and math.prod(self.kernel) > 1:
            # Entries that lie side by side in a patch then do so in the input.
            pixels = pixels.contiguous()
        row, *along, channel = pixels.stride()
        geometry = self.geometry
        patches = pixels.as_strided(
            (
                self.groups,
                len(pixels),
                *self._sizes(pixels.shape[1:-1]),
                *self.kernel,
                channels,
            ),
            (
                channels * channel,
                row,
                *(step * each for step, each in zip(geometry.stride, along, strict=True)),
                *(step * each for step, each in zip(geometry.dilation, along, strict=True)),
                channel,
            ),
        )
        target = target.view(patches.shape)
        if channels * self.kernel[-1] >= RUN:
            target.copy_(patches)
            return
        for entry in product(*map(range, self.kernel)):
            place: tuple[Any, ...] = (..., *entry, slice(None))
            target[place].copy_(patches[place])

    def _fill_few(self, target: Tensor, x: Tensor, seen: Tensor) -> None:
        """The same where less is read than there is: no copy of all is made first."""
        full = self._padded_size(x)
        example, *places = _unravelled(seen, (len(x), *self._sizes(full)))
        pixels = x.movedim(1, -1)
        # `_offsets`, made where they are used: the device need not wait for the host.
        kernel = self.kernel
        entries = _unravelled(torch.arange(math.prod(kernel), device=x.device), kernel)
        index, inside = [example[:, None]], torch.ones((), dtype=torch.bool, device=x.device)
        for place, stride, entry, dilation, first, size in zip(
            places,
            self.geometry.stride,
            entries,
            self.geometry.dilation,
            self.geometry.padding,
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
        geometry = self.geometry
        return product(
            *(
                range(0, size * dilation, dilation)
                for size, dilation in zip(self.kernel, geometry.dilation, strict=True)
            )
        )

    def _sizes(self, padded: Sequence[int]) -> list[int]:
        """Positions along each axis of an input of this size, padding included."""
        geometry = self.geometry
        return [
            (full - (size - 1) * dilation - 1) // stride + 1
            for full, size, stride, dilation in zip(
                padded, self.kernel, geometry.stride, geometry.dilation, strict=True
            )
        ]

    def _norms(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.groups, -1))
        norms = squares(grouped).sum(dim=2, dtype=wide(x.dtype))
        full = self._padded_size(x)
        axes = zip(full, self._sizes(full), self.geometry.padding, range(len(full)), strict=True)
        for length, size, padding, axis in reversed(list(axes)):
            # How many patches an entry is in, along this axis.
            counts = norms.new_zeros(length)
            kernel, stride = self.kernel[axis], self.geometry.stride[axis]
            for offset in range(
                0, kernel * self.geometry.dilation[axis], self.geometry.dilation[axis]
            ):
                counts[offset : offset + (size - 1) * stride + 1 : stride] += 1
            norms = norms @ counts[padding : length - padding]
        return norms.mT

    def _outputs(self, g: Tensor) -> Tensor:
        rows: Tensor = g.flatten(2).unflatten(1, (self.groups, -1))
        return rows.permute(1, 0, 3, 2)

    def _padded_size(self, x: Tensor) -> list[int]:
        padding = self.geometry.padding
        return [size + 2 * each for size, each in zip(x.shape[2:], padding, strict=True)]

    def _padded(self, x: Tensor) -> Tensor:
        # F.pad counts from the last dimension.
        pad = [entries for each in reversed(self.geometry.padding) for entries in (each, each)]
        return F.pad(x, pad) if any(pad) else x


def _unravelled(numbers: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Indices for each dimension: ``torch.unravel_index``, which would wait for the device."""
    indices = []
    for size in reversed(shape):
        indices.append(numbers % size)
        numbers = numbers // size
    return indices[::-1]
