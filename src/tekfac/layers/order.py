"""In which order a parameter's dimensions make a matrix: heads first, say.

What is multiplied may be a parameter of several dimensions, some of which views and copies have put
in another order and counted together: `Order` says which are the matrix's rows. `Seen` follows it
through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Order(NamedTuple):
    """A parameter's dimensions as those of a matrix.

    Args:
        rows: how many of ``dims`` are its rows.
        dims: all, the rows' first.
    """

    rows: int
    dims: tuple[int, ...]

    @classmethod
    def of(cls, code: int, dims: int) -> Order:
        """The inverse of `code`, of a parameter of so many dimensions."""
        if not code:
            return cls(1, tuple(range(dims)))
        rows, *order = map(int, str(code))
        return cls(rows, tuple(order))

    @property
    def code(self) -> int:
        """It as a number, for states and other ranks; 0 where the first dimension is the rows."""
        if self == Order.of(0, len(self.dims)):
            return 0
        return int("".join(map(str, (self.rows, *self.dims))))

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a parameter of this shape."""
        sizes = [shape[dim] for dim in self.dims]
        return math.prod(sizes[: self.rows]), math.prod(sizes[self.rows :])

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter, or a gradient, as the matrix."""
        return weight.permute(self.dims).reshape(self.sizes(weight.shape))

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `matrix`, in a parameter's shape."""
        whole = matrix.reshape([shape[dim] for dim in self.dims])
        return whole.permute([self.dims.index(dim) for dim in range(len(shape))])


class Piece(NamedTuple):
    """A dimension of a parameter, or a part of one.

    Args:
        size: its length.
        step: how far apart its entries are in the parameter; 0 where one is repeated.
    """

    size: int
    step: int


class Seen:
    """A parameter as it is seen behind views and copies: of each dimension what it counts.

    Args:
        shape: the parameter's.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.dims: list[list[Piece]] = [
            [Piece(size, math.prod(shape[dim + 1 :]))] if size > 1 else []
            for dim, size in enumerate(shape)
        ]

    def permute(self, order: Sequence[int]) -> bool:
        """Put dimensions in another order."""
        self.dims = [self.dims[dim] for dim in order]
        return True

    def reshape(self, shape: Sequence[int]) -> bool:
        """Count in other dimensions; False if that is no longer followed."""
        left = [piece for dim in self.dims for piece in dim]
        dims: list[list[Piece]] = []
        for size in shape:
            own: list[Piece] = []
            while size > 1:
                if not left:
                    return False
                piece = left.pop(0)
                part = math.gcd(size, piece.size)
                if part < min(size, piece.size):
                    return False
                if part < piece.size:
                    left.insert(0, Piece(piece.size // part, piece.step))
                    piece = Piece(part, piece.step * (piece.size // part))
                last = own[-1] if own else None
                if last is not None and last.step == piece.step * piece.size:
                    own[-1] = Piece(last.size * piece.size, piece.step)
                else:
                    own.append(piece)
                size //= part
            dims.append(own)
        self.dims = dims
        return not left

    def expand(self, shape: Sequence[int]) -> bool:
        """Repeat along dimensions of one entry, or new ones in front."""
        dims: list[list[Piece]] = [[] for _ in range(len(shape) - len(self.dims))] + self.dims
        self.dims = [
            [Piece(size, 0)] if not dim and size > 1 else dim
            for dim, size in zip(dims, shape, strict=True)
        ]
        return True

    def stack(self) -> bool | None:
        """Whether a stack of matrices has them turned; None if it is not seen as one."""
        if len(self.shape) == 3:
            for turned, order in ((False, (0, 1, 2)), (True, (0, 2, 1))):
                like = Seen(self.shape)
                like.permute(order)
                if like.dims == self.dims:
                    return turned
        return None

    def matrix(self) -> tuple[bool, Order] | None:
        """Whether the matrix that is seen is turned, and the other's order; None if there is none.

        Of the two sides the rows are that with the parameter's first dimension. Of a batch of
        matrices all must be the same.
        """
        sides = self.dims
        if len(sides) == 3 and all(piece.step == 0 for piece in sides[0]):
            sides = sides[1:]
        if len(sides) != 2:
            return None
        one, other = map(self._own, sides)
        if one is None or other is None:
            return None
        for dim, size in enumerate(self.shape):
            if size == 1:
                # Anywhere: on the side that has none, or else where it was.
                side = next((each for each in (one, other) if not each), None)
                if side is None:
                    side = other if dim - 1 in other else one
                side.insert(side.index(dim - 1) + 1 if dim - 1 in side else 0, dim)
        if len(one) + len(other) != len(self.shape):
            return None
        turned = 0 in other
        rows, columns = (other, one) if turned else (one, other)
        return turned, Order(len(rows), (*rows, *columns))

    def _own(self, side: Sequence[Piece]) -> list[int] | None:
        """The parameter's dimensions that a side counts, in order; None if there is a part of one.

        Those of one entry are left out.
        """
        found: list[int] = []
        for piece in side:
            run: list[int] = []
            size, step = 1, 1
            for dim in reversed(range(len(self.shape))):
                if piece.step <= step < piece.step * piece.size and self.shape[dim] > 1:
                    run.insert(0, dim)
                    size *= self.shape[dim]
                step *= self.shape[dim]
            if size != piece.size or math.prod(self.shape[run[-1] + 1 :]) != piece.step:
                return None
            found += run
        return found
