"""Layer kinds: how a module is seen as the matrix ``W`` of the paper.

Every kind turns what a layer saw into inputs ``a`` ``(G, N, T, d_in)`` and output gradients ``g``
``(G, N, T, d_out)``, and its parameters' gradients into a matrix ``(G, d_out, d_in)`` and back.
``G`` is 1 but for grouped convolutions: their groups share nothing, so each is a layer of its own
with its own block.

A new kind is a subclass of `Layer` decorated with ``@register(ItsModule)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from tekfac.statistics import square_norms, squares, wide

# Entries of a layer's inputs made at once (4 MiB in float32, near a core's cache): examples are
# gone through in chunks, so that no patch matrix is ever held whole.
CHUNK_ENTRIES = 2**20

# Fewer rows than this, and adding a chunk to a wide layer's sums costs more than computing it.
CHUNK_ROWS = 1024


@dataclass
class Sample:
    """What one layer saw in one forward and backward pass, for one draw of the labels.

    Args:
        inputs: the layer's inputs, batch dimension first, one per call of the layer in this pass;
            None where they do not matter (frozen weight).
        gradients: ``d(-log p)/d`` output, one per call, in the shape of the layer's output.
        examples: number of examples ``N``.
        first: whether this is the first draw of the labels in this pass: its inputs are new.
    """

    inputs: list[Tensor | None]
    gradients: list[Tensor]
    examples: int
    first: bool = True

    def head(self, examples: int, *, copied: bool = False) -> Sample:
        """The first so many examples; copied, if they are to be kept without the rest."""
        if examples == self.examples:
            return self

        def rows(values: Tensor) -> Tensor:
            part = values[: -(-len(values) * examples // self.examples)]
            return part.clone() if copied else part

        return Sample(
            [None if x is None else rows(x) for x in self.inputs],
            [rows(g) for g in self.gradients],
            examples,
            self.first,
        )


@dataclass
class Rows:
    """A few examples of a sample as matrices of rows.

    Args:
        a: inputs, ``(G, n, T', d_in)``: at all ``T`` positions, or at some that stand for all.
        g: output gradients at the same positions, ``(G, n, T', d_out)``.
        positions: ``T``.
        norms: gives ``Σ_t ‖a_nt‖²`` and ``Σ_t ‖g_nt‖²`` over all of them, ``(G, n)`` each: not
            every reader needs them.
    """

    a: Tensor
    g: Tensor
    positions: int
    norms: Callable[[], tuple[Tensor, Tensor]]


class Layer(ABC):
    """A layer as a matrix: ``W`` has one column more with a bias, which sees the constant input 1.

    Args:
        name: the module's name in the model.
        module: the module.
        weight: its weight, or None if that is not trained: the block then covers the bias alone.
        bias: its bias, or None if there is none or it is not trained.

    Attributes:
        groups: ``G``.
        d_in: columns per group, the bias's included.
        d_out: rows per group.
    """

    groups: int
    d_in: int
    d_out: int

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
    ) -> None:
        self.name, self.module, self.weight, self.bias = name, module, weight, bias
        self.groups = self._groups()
        full: Tensor = module.weight  # type: ignore[assignment]
        self.d_out = full.shape[0] // self.groups
        self.d_in = (weight[0].numel() if weight is not None else 0) + (bias is not None)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the block covers, weight first."""
        return [p for p in (self.weight, self.bias) if p is not None]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of estimates: the parameters' own, float32 at least."""
        return wide(self.parameters[0].dtype)

    @property
    def row_norm(self) -> Tensor:
        """Mean squared norm of the rows of the module's weight, 0-dimensional."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        norm: Tensor = torch.linalg.vector_norm(weight.detach(), dtype=self.dtype)
        return norm.square() / len(weight)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of ``W``: all groups' rows, and columns."""
        return (self.groups * self.d_out, self.d_in)

    def matrix(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Weight and bias (or their gradients) as ``(G, d_out, d_in)``; a missing one counts as 0.

        Columns are in the order that the layer kind finds best for its inputs.
        """
        columns = []
        if self.weight is not None:
            part = torch.zeros_like(self.weight) if weight is None else weight
            columns.append(self._columns(part).reshape(self.groups, self.d_out, -1))
        if self.bias is not None:
            part = torch.zeros_like(self.bias) if bias is None else bias
            columns.append(part.reshape(self.groups, self.d_out, 1))
        whole = torch.cat(columns, dim=2) if len(columns) > 1 else columns[0]
        return whole.to(self.dtype)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `matrix`: one tensor for each of `parameters`, in its shape."""
        flat = matrix.reshape(self.shape)
        parts = []
        if self.weight is not None:
            parts.append(self._weight(flat[:, : self.weight[0].numel()]))
        if self.bias is not None:
            parts.append(flat[:, -1].reshape(self.bias.shape))
        return parts

    def from_vector(self, vector: Tensor) -> Tensor:
        """A vector in the order of ``cat([weight.flatten(1), bias[:, None]], 1)`` as `matrix`."""
        flat = vector.reshape(self.shape)
        weight = bias = None
        if self.weight is not None:
            weight = flat[:, : self.weight[0].numel()].reshape(self.weight.shape)
        if self.bias is not None:
            bias = flat[:, -1]
        return self.matrix(weight, bias)

    def to_vector(self, matrix: Tensor) -> Tensor:
        """The inverse of `from_vector`, of shape `shape`."""
        parts = [part.reshape(self.shape[0], -1) for part in self.split(matrix)]
        return torch.cat(parts, dim=1)

    def check_input(self, x: Tensor) -> None:
        """Raise if this input does not fit the matrix that the block was built for.

        Raises:
            ValueError: naming the layer and both widths.
        """
        width, expected = self._width(x), self._expected_width()
        if self.weight is not None and width != expected:
            raise ValueError(
                f"layer {self.name!r} got an input of shape {tuple(x.shape)}, width {width}, but "
                f"its curvature block was built for width {expected}: make a new optimizer after a "
                "layer's parameters have changed shape"
            )

    def positions(self, sample: Sample) -> int:
        """Positions of an example, in all calls of the layer together."""
        rows = sum(g.numel() for g in sample.gradients) // (self.groups * self.d_out)
        return rows // sample.examples

    def chunks(
        self, sample: Sample, stride: int = 1, dtype: torch.dtype | None = None
    ) -> Iterator[Rows]:
        """A sample as rows, a few examples at a time.

        Several calls of one layer are further positions of the same examples. A leading dimension
        of ``k N`` holds ``k`` positions of each of ``N`` examples; one that ``N`` does not divide
        holds examples of its own.

        Args:
            sample: what to go through.
            stride: read every ``stride``-th position only, one at least. Each example begins at
                another position, so that all are seen in a batch.
            dtype: what to give; None for bfloat16 if both came so, else `dtype`.
        """
        for calls, examples in self._together(sample):
            positions = sum(g[0].numel() for _, g in calls if len(g)) // (self.groups * self.d_out)
            read = max(1, positions // stride)
            entries = max(1, self.groups * read * max(self.d_in, self.d_out))
            for span in _spans(examples, max(CHUNK_ENTRIES // entries, CHUNK_ROWS // read)):
                parts = [self._rows(x, g, examples, *span, stride, dtype) for x, g in calls]
                yield parts[0] if len(parts) == 1 else _side_by_side(parts)

    def gradients(self, sample: Sample) -> Iterator[Tensor]:
        """A sample's per-example gradients ``D_n``, ``(G, d_out, n, d_in)``, a few at a time.

        Examples, and the type, are those of `chunks`.
        """
        for calls, examples in self._together(sample):
            seen = (
                part.numel() // max(1, examples)
                for call in calls
                for part in call
                if part is not None
            )
            entries = max(1, self.groups * self.d_in * self.d_out, *seen)
            for span in _spans(examples, CHUNK_ENTRIES // entries):
                parts = [self._gradients(x, g, examples, *span) for x, g in calls]
                yield parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)

    def _together(self, sample: Sample) -> list[tuple[list[tuple[Tensor | None, Tensor]], int]]:
        """Calls that saw the same examples, and the number of these."""
        calls = list(zip(sample.inputs, sample.gradients, strict=True))
        if all(len(g) % sample.examples == 0 for _, g in calls):
            return [(calls, sample.examples)]
        return [([call], len(call[1])) for call in calls]

    def _gradients(
        self, x: Tensor | None, g: Tensor, examples: int, first: int, last: int
    ) -> Tensor:
        rows = self._rows(x, g, examples, first, last, 1, None)
        return (rows.g.mT @ rows.a).transpose(1, 2)

    def _read_as(self, x: Tensor | None, g: Tensor) -> torch.dtype:
        """bfloat16 if both came so, else `dtype`."""
        lower = g.dtype == torch.bfloat16 and (x is None or x.dtype == torch.bfloat16)
        return torch.bfloat16 if lower else self.dtype

    def _rows(
        self,
        x: Tensor | None,
        g: Tensor,
        examples: int,
        first: int,
        last: int,
        stride: int,
        dtype: torch.dtype | None,
    ) -> Rows:
        per = len(g) // examples
        span, n = slice(first * per, last * per), last - first
        whole = self._outputs(g[span]).reshape(self.groups, n, -1, self.d_out)
        rows, positions = whole, whole.shape[2]
        read = positions if stride == 1 else max(1, positions // stride)
        seen = None
        if read < positions:
            start = torch.arange(first, last, device=g.device)[:, None]
            within = (start + stride * torch.arange(read, device=g.device)) % positions
            rows = rows[:, torch.arange(n, device=g.device)[:, None], within]
            seen = (within + positions * (start - first)).flatten()
        rows = rows.to(self._read_as(x, g) if dtype is None else dtype)
        a = rows.new_empty(self.groups, n, read, self.d_in)
        if x is not None:
            columns = self.d_in - (self.bias is not None)
            self._fill(a[..., :columns], x[span], seen)
        if self.bias is not None:
            a[..., -1] = 1

        def norms() -> tuple[Tensor, Tensor]:
            g_norms = square_norms(whole)
            a_norms = torch.zeros_like(g_norms)
            if x is not None:
                a_norms += self._norms(x[span]).view(self.groups, n, -1).sum(dim=2)
            if self.bias is not None:
                a_norms += positions
            return a_norms, g_norms

        return Rows(a, rows, positions, norms)

    def _groups(self) -> int:
        return 1

    @abstractmethod
    def batched(self, x: Tensor) -> Tensor:
        """An input or output with its batch dimension first, added if it was left out."""

    @abstractmethod
    def _width(self, x: Tensor) -> int:
        """The part of the input's shape that the weight fixes."""

    @abstractmethod
    def _expected_width(self) -> int:
        """What `_width` must be."""

    def _columns(self, weight: Tensor) -> Tensor:
        """The weight with its columns in the order of `_fill`."""
        return weight

    def _weight(self, columns: Tensor) -> Tensor:
        """The inverse of `_columns`, in the weight's shape."""
        assert self.weight is not None
        return columns.reshape(self.weight.shape)

    @abstractmethod
    def _fill(self, target: Tensor, x: Tensor, seen: Tensor | None) -> None:
        """Write the inputs ``(R, ...)`` into ``target``, ``(G, n, T, d_in without the bias)``.

        Args:
            target: where to, in any type.
            x: the layer's inputs.
            seen: numbers of the positions wanted, counted through all ``R``; None for all.
        """

    @abstractmethod
    def _norms(self, x: Tensor) -> Tensor:
        """``(R, ...)`` to ``(G, R)``: square norms of the inputs, summed over all positions."""

    @abstractmethod
    def _outputs(self, g: Tensor) -> Tensor:
        """``(R, ...)`` to ``(G, R, T, d_out)``."""


def _spans(examples: int, step: int) -> Iterator[tuple[int, int]]:
    """From which to which example each of several steps goes."""
    for first in range(0, examples, max(1, step)):
        yield first, min(first + max(1, step), examples)


def _side_by_side(parts: list[Rows]) -> Rows:
    """Several calls of a layer: further positions of the same examples."""

    def norms() -> tuple[Tensor, Tensor]:
        a_norms, g_norms = zip(*(part.norms() for part in parts), strict=True)
        return torch.stack(a_norms).sum(dim=0), torch.stack(g_norms).sum(dim=0)

    return Rows(
        torch.cat([part.a for part in parts], dim=2),
        torch.cat([part.g for part in parts], dim=2),
        sum(part.positions for part in parts),
        norms,
    )


_KINDS: dict[Callable[..., object], type[Layer]] = {}


def register(*modules: type[nn.Module]) -> Callable[[type[Layer]], type[Layer]]:
    """Make a `Layer` subclass the kind of these module classes.

    A subclass of one of them counts too, as long as it does not bring a ``forward`` of its own.
    """

    def add(kind: type[Layer]) -> type[Layer]:
        for module in modules:
            _KINDS[module.forward] = kind
        return kind

    return add


def kind_of(module: nn.Module) -> type[Layer] | None:
    """The layer kind of a module, None if it has none."""
    return _KINDS.get(type(module).forward)


@register(nn.Linear)
class LinearLayer(Layer):
    """A fully-connected layer; leading dimensions after the first are positions."""

    def batched(self, x: Tensor) -> Tensor:
        return x[None] if x.dim() == 1 else x

    def _width(self, x: Tensor) -> int:
        return x.shape[-1]

    def _expected_width(self) -> int:
        return self.d_in - (self.bias is not None)

    def _fill(self, target: Tensor, x: Tensor, seen: Tensor | None) -> None:
        rows = x.reshape(-1, x.shape[-1])
        target.copy_((rows if seen is None else rows[seen]).view(target.shape))

    def _norms(self, x: Tensor) -> Tensor:
        return square_norms(self._outputs(x))

    def _outputs(self, g: Tensor) -> Tensor:
        return g.reshape(1, g.shape[0], -1, g.shape[-1])


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
                window = tuple(
                    slice(offset, offset + (size - 1) * stride + 1, stride)
                    for offset, size, stride in zip(offsets, sizes, self.module.stride, strict=True)
                )
                found = padded[(slice(None), *window)]
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


@dataclass
class Assignment:
    """Which parameters belong to layers, and why the others do not.

    Args:
        modules: modules with a layer kind, by name.
        owner: the name in ``modules`` for each parameter of such a module.
        reasons: for every other parameter of the model, why the first-order rule trains it.
    """

    modules: dict[str, nn.Module]
    owner: dict[nn.Parameter, str]
    reasons: dict[nn.Parameter, str]


def assign(model: nn.Module, exclude: Sequence[str | type[nn.Module]]) -> Assignment:
    """Find a model's layers.

    Args:
        model: the model.
        exclude: module names (with all that is inside them) and module classes to leave out.

    Raises:
        ValueError: for a name that is no module's, and for a parameter without a shape yet.
        TypeError: for an entry that is neither a name nor a module class, and for no list of them.
    """
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise TypeError(
            f"exclude takes a list of module names and nn.Module classes, got {exclude!r}"
        )
    names = dict(model.named_modules())
    for entry in exclude:
        if isinstance(entry, str):
            if entry not in names:
                known = ", ".join(repr(name) for name in names if name)
                raise ValueError(
                    f"exclude names no module of the model: {entry!r} (it has {known})"
                )
        elif not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise TypeError(
                "exclude takes module names and nn.Module classes, got "
                f"{type(entry).__name__}: {entry!r}"
            )
    types = tuple(entry for entry in exclude if isinstance(entry, type))
    prefixes = tuple(entry for entry in exclude if isinstance(entry, str))

    uses: dict[nn.Parameter, int] = {}
    for module in names.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[parameter] = uses.get(parameter, 0) + 1

    bypassed = {
        child
        for module in names.values()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    result = Assignment({}, {}, {})
    for name, module in names.items():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        if not own:
            continue
        for key, parameter in own.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"parameter {key!r} of module {name!r} has no shape yet: run one batch through "
                    "a lazy model before making its optimizer"
                )
        if isinstance(module, types) or any(
            name == prefix or name.startswith(prefix + ".") or prefix == "" for prefix in prefixes
        ):
            reason = "left out by exclude"
        elif any(uses[p] > 1 for p in own.values()):
            reason = "shared between modules"
        elif kind_of(module) is None or "weight" not in own:
            reason = f"{type(module).__name__} has no curvature block"
        elif module in bypassed:
            reason = "MultiheadAttention uses its weight without calling it"
        else:
            result.modules[name] = module
            result.owner.update(dict.fromkeys(own.values(), name))
            continue
        for parameter in own.values():
            result.reasons.setdefault(parameter, reason)
    return result
