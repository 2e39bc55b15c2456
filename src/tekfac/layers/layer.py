"""Layer kinds: how a weight is seen as the matrix ``W`` of the paper.

Every kind turns what was multiplied with its weight into inputs ``a`` ``(G, N, T, d_in)`` and
output gradients ``g`` ``(G, N, T, d_out)``, and its parameters' gradients into a matrix
``(G, d_out, d_in)`` and back. ``G`` is 1 but for grouped convolutions: their groups share nothing,
so each is a layer of its own with its own block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tekfac.layers.sample import Call, Rows, Sample, by_example, side_by_side
from tekfac.numerics import square_norms, undivided, wide

# Entries of a layer's inputs made at once (4 MiB in float32, near a core's cache): examples are
# gone through in chunks, so that no patch matrix is ever held whole.
CHUNK_ENTRIES = 2**20

# Fewer rows than this, and adding a chunk to a wide layer's sums costs more than computing it.
CHUNK_ROWS = 1024


class Form(NamedTuple):
    """How a layer's weight is used.

    Args:
        bias: whether its bias is added to what the weight makes.
        looked_up: whether it is looked up, and never multiplied.
        turned: whether the parameter is ``Wᵀ``.
        convolved: in how many groups of channels it is convolved; 0 for none.
        stacked: whether its first dimension counts matrices.
        order: in which order its dimensions make a matrix, as `Order.code`.
    """

    bias: int
    looked_up: int = 0
    turned: int = 0
    convolved: int = 0
    stacked: int = 0
    order: int = 0


class Layer(ABC):
    """A layer as a matrix: ``W`` has one column more with a bias, which sees the constant input 1.

    Args:
        name: the layer's name in the model.
        full: its weight, trained or not.
        weight: the same, or None if it is not trained: the block then covers the bias alone.
        bias: its bias, or None if there is none or it is not trained.

    Attributes:
        groups: ``G``.
        d_in: columns per group, the bias's included.
        d_out: rows per group.
        looked_up: whether inputs are one-hot rows, known by the numbers of their entries.
        apart: whether groups see rows of their own, some more than others.
        as_stored: whether `matrix` has its columns in the order in which the weight is stored, and
            not in that of inputs: a gradient is then what it is, and no copy of it.
    """

    groups: int = 1
    d_in: int
    d_out: int
    looked_up: bool = False
    apart: bool = False
    as_stored: bool = False

    def __init__(
        self,
        name: str,
        full: Tensor,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
    ) -> None:
        self.name, self.full, self.weight, self.bias = name, full, weight, bias
        self._measure()

    def _measure(self) -> None:
        """Set the sizes."""
        self.d_out = self.full.shape[0] // self.groups
        columns = math.prod(self.full.shape[1:]) if self.weight is not None else 0
        self.d_in = columns + (self.bias is not None)

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
        """Mean squared norm of the weight's rows, 0-dimensional."""
        norm = undivided(torch.linalg.vector_norm(self.full.detach(), dtype=self.dtype))
        return norm.square() / (self.groups * self.d_out)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of ``W``: all groups' rows, and columns."""
        return (self.groups * self.d_out, self.d_in)

    @property
    def product_width(self) -> int:
        """Columns that a product with an input goes through; none where inputs are looked up."""
        return self.d_in

    def without_bias(self) -> None:
        """Cover the weight alone from now on: the bias is not added to what the weight makes."""
        self.bias = None
        self._measure()

    @property
    def form(self) -> Form:
        """How the layer is used, as far as that is seen at its first use."""
        return Form(self.bias is not None, self.looked_up)

    def at(self, call: Call) -> Layer:
        """The layer as one call of it had it."""
        return self

    def resemble(
        self, shape: tuple[int, int], parameters: int, transposed: bool | None = None
    ) -> None:
        """Be as a layer with this matrix and so many parameters, if that is a matter of its use.

        Args:
            shape: the matrix's.
            parameters: their number.
            transposed: whether the parameter is the matrix's transpose; None to judge by ``shape``.
        """
        if parameters == 1 and self.weight is not None and self.bias is not None:
            self.without_bias()

    def matrix(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Weight and bias (or their gradients) as ``(G, d_out, d_in)``; a missing one counts as 0.

        Columns are in the order of inputs, or as they are stored (`as_stored`).
        """
        columns = []
        if self.weight is not None:
            part = _zeros(self.weight) if weight is None else weight
            found = self._plain_columns(part) if self.as_stored else self._columns(part)
            columns.append(found.reshape(self.groups, self.d_out, -1))
        if self.bias is not None:
            part = _zeros(self.bias) if bias is None else bias
            columns.append(part.reshape(self.groups, self.d_out, 1))
        whole = torch.cat(columns, dim=2) if len(columns) > 1 else columns[0]
        return whole.to(self.dtype)

    def matrix_of(self, values: Mapping[Tensor, Tensor]) -> Tensor:
        """As `matrix`, what there is for each of `parameters`."""
        weight, bias = self.weight, self.bias
        return self.matrix(
            None if weight is None else values.get(weight),
            None if bias is None else values.get(bias),
        )

    @property
    def storable(self) -> bool:
        """Whether the weight is stored with its columns in another order than that of inputs."""
        return False

    def aligned(self, vectors: Tensor) -> Tensor:
        """Vectors of input space, ``(G, d_in, k)``, with entries in the order of `matrix`."""
        return vectors

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `matrix`: one tensor for each of `parameters`, in its shape."""
        flat = matrix.reshape(self.shape)
        parts = []
        if self.weight is not None:
            columns = flat[:, : self.d_in - (self.bias is not None)]
            parts.append(self._plain_weight(columns) if self.as_stored else self._weight(columns))
        if self.bias is not None:
            parts.append(flat[:, -1].reshape(self.bias.shape))
        return parts

    def from_vector(self, vector: Tensor) -> Tensor:
        """A vector in the order of ``cat([W.flatten(1), bias[:, None]], 1)`` as `matrix`."""
        flat = vector.reshape(self.shape)
        weight = bias = None
        if self.weight is not None:
            columns = flat[:, : self.d_in - (self.bias is not None)]
            weight = self._plain_weight(columns)
        if self.bias is not None:
            bias = flat[:, -1]
        return self.matrix(weight, bias)

    def to_vector(self, matrix: Tensor) -> Tensor:
        """The inverse of `from_vector`, of shape `shape`."""
        parts = self.split(matrix)
        flat = [part.reshape(self.shape[0], -1) for part in parts]
        if self.weight is not None:
            flat[0] = self._plain_columns(parts[0])
        return torch.cat(flat, dim=1)

    def chunks(
        self, sample: Sample, stride: int = 1, dtype: torch.dtype | None = None
    ) -> Iterator[Rows]:
        """A sample as rows, a few examples at a time.

        Several calls of one layer are further positions of the same examples.

        Args:
            sample: what to go through.
            stride: read every ``stride``-th position only, one at least. Each example begins at
                another position, so that all are seen in a batch.
            dtype: what to give; None for bfloat16 if both came so, else `dtype`.
        """
        calls, examples = sample.calls, sample.examples
        positions = self.positions(sample)
        read = max(1, positions // stride)
        entries = max(1, self.groups * read * max(self.d_in, self.d_out))
        how = self, stride, dtype
        if sample.rows is not None and sample.rows[0] == how:
            yield sample.rows[1]
            return
        for span in _spans(examples, max(CHUNK_ENTRIES // entries, CHUNK_ROWS // read)):
            parts = [self.at(call)._rows(call, examples, *span, stride, dtype) for call in calls]
            rows = parts[0] if len(parts) == 1 else side_by_side(parts)
            if span == (0, examples):
                sample.rows = how, rows
            yield rows

    def gradients(self, sample: Sample) -> Iterator[Tensor]:
        """A sample's per-example gradients ``D_n``, ``(G, d_out, n, d_in)``, a few at a time.

        Examples, and the type, are those of `chunks`.
        """
        calls, examples = sample.calls, sample.examples
        seen = (
            part.numel() // max(1, examples)
            for call in calls
            for part in (call.a, call.g)
            if part is not None
        )
        entries = max(1, self.groups * self.d_in * self.d_out, *seen)
        for span in _spans(examples, CHUNK_ENTRIES // entries):
            parts = [self.at(call)._gradients(call, examples, *span) for call in calls]
            yield parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)

    def positions(self, sample: Sample) -> int:
        """Positions of an example, in all calls of the layer together."""
        rows = sum(call.g.numel() for call in sample.calls) // (self.groups * self.d_out)
        return rows // sample.examples

    def _gradients(self, call: Call, examples: int, first: int, last: int) -> Tensor:
        rows = self._rows(call, examples, first, last, 1, None)
        return (rows.g.mT @ rows.a).transpose(1, 2)

    def _read_as(self, *sides: Tensor | None) -> torch.dtype:
        """bfloat16 if both sides came so, else `dtype`."""
        lower = all(side is None or side.dtype == torch.bfloat16 for side in sides)
        return torch.bfloat16 if lower else self.dtype

    def _rows(
        self,
        call: Call,
        examples: int,
        first: int,
        last: int,
        stride: int,
        dtype: torch.dtype | None,
    ) -> Rows:
        x, g = call.a, call.g
        per = len(g) // examples
        span, n = slice(first * per, last * per), last - first
        whole = self._outputs(g[span]).reshape(self.groups, n, -1, self.d_out)
        rows, positions = whole, whole.shape[2]
        counts = None if call.live is None else by_example(call.live[span], n)
        live = None if counts is None else counts.repeat_interleave(positions // per, dim=2)
        read = positions if stride == 1 else max(1, positions // stride)
        seen, shown = None, live
        if read < positions:
            start = torch.arange(first, last, device=g.device)[:, None]
            within = (start + stride * torch.arange(read, device=g.device)) % positions
            rows = rows[:, torch.arange(n, device=g.device)[:, None], within]
            seen = (within + positions * (start - first)).flatten()
            shown = None if live is None else live.gather(2, within.expand(len(live), -1, -1))
        rows = rows.to(self._read_as(x, g) if dtype is None else dtype)
        a = self._inputs(None if x is None else x[span], rows, seen, shown, call.biased)
        counted = None if live is None else live.sum(dim=2).to(self.dtype)

        def norms() -> tuple[Tensor, Tensor]:
            g_norms = square_norms(whole)
            a_norms = torch.zeros_like(g_norms)
            if x is not None:
                each = self._norms(x[span]).view(self.groups, n, -1)
                if counts is not None:
                    each = each * counts
                a_norms += each.sum(dim=2)
            if self.bias is not None and call.biased:
                a_norms += positions if counted is None else counted
            return a_norms, g_norms

        drawn = (True, False) if call.swapped else (False, True)
        return Rows(a, rows, positions, norms, counted, drawn)

    def _inputs(
        self,
        x: Tensor | None,
        like: Tensor,
        seen: Tensor | None,
        live: Tensor | None,
        biased: bool,
    ) -> Tensor:
        """Inputs as rows ``(G, n, T', d_in)``.

        Args:
            x: those of ``n`` examples as they came.
            like: the other side's rows.
            seen: as of `_fill`.
            live: which of the rows count, ``(1 or G, n, T')``; None for all.
            biased: whether the bias was added to what the weight made of them.
        """
        a = like.new_empty(*like.shape[:3], self.d_in)
        if x is not None:
            columns = self.d_in - (self.bias is not None)
            self._fill(a[..., :columns], x, seen)
        if self.bias is not None:
            a[..., -1] = 1 if biased else 0
        if live is not None:
            a *= live[..., None]
        return a

    def _columns(self, weight: Tensor) -> Tensor:
        """The weight with its rows first and its columns in the order of `_fill`."""
        return weight

    def _weight(self, columns: Tensor) -> Tensor:
        """The inverse of `_columns`, in the weight's shape."""
        return columns.reshape(self.full.shape)

    def _plain_weight(self, columns: Tensor) -> Tensor:
        """The weight, in its shape, that has these columns in the order of its own."""
        return columns.reshape(self.full.shape)

    def _plain_columns(self, weight: Tensor) -> Tensor:
        """The inverse of `_plain_weight`."""
        return weight.reshape(self.shape[0], -1)

    @abstractmethod
    def check_input(self, x: Tensor) -> None:
        """Raise if this input does not fit the matrix that the block was built for.

        Raises:
            ValueError: naming the layer and both widths.
        """

    def _check_width(self, x: Tensor, width: int, expected: int) -> None:
        if self.weight is not None and width != expected:
            raise ValueError(
                f"layer {self.name!r} got an input of shape {tuple(x.shape)}, width {width}, but "
                f"its curvature block was built for width {expected}: make a new optimizer after a "
                "layer's parameters have changed shape"
            )

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


def _zeros(like: Tensor) -> Tensor:
    """Zeros for all of it, of which a rank may have a part."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
