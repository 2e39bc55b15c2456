"""Which dimensions of a parameter a matrix counts, against the numbers that views really show."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from tekfac.layers.order import Order, Seen

SHAPES = [(2, 3), (2, 3, 4), (2, 6, 2), (3, 1, 4), (1, 6), (2, 2, 3, 2), (4, 4)]


def forms(size: int, dims: int) -> list[tuple[int, ...]]:
    """All ways to count so many entries in so many dimensions."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return [form for form in itertools.product(divisors, repeat=dims) if math.prod(form) == size]


def shown(shape: tuple[int, ...], moves: int, draw: random.Random) -> tuple[Tensor, Seen | None]:
    """A parameter's numbers after some views and copies, and what is said of them."""
    numbers, seen = torch.arange(math.prod(shape)).view(shape), Seen(shape)
    for _ in range(moves):
        if draw.random() < 0.5:
            order = draw.sample(range(numbers.dim()), numbers.dim())
            numbers = numbers.permute(order)
            assert seen.permute(order)
        else:
            form = draw.choice(forms(numbers.numel(), draw.choice([2, 3])))
            numbers = numbers.reshape(form)
            if not seen.reshape(form):
                return numbers, None
    return numbers, seen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_said_is_what_is_shown(shape: tuple[int, ...]) -> None:
    draw, known = random.Random(0), 0
    whole = torch.arange(math.prod(shape)).view(shape)
    for _ in range(600):
        numbers, seen = shown(shape, draw.randint(0, 4), draw)
        if seen is None:
            continue
        if (turned := seen.stack()) is not None:
            assert torch.equal(numbers, whole.mT if turned else whole)
        elif (found := seen.matrix()) is not None:
            turned, order = found
            matrix = order.matrix(whole)
            expected = matrix.mT if turned else matrix
            assert torch.equal(numbers, expected if numbers.dim() == 2 else expected[None])
            assert Order.of(order.code, len(shape)) == order
            assert 0 in order.dims[: order.rows]
            assert torch.equal(order.weight(matrix, shape), whole)
            known += 1
    assert known > 50


def test_a_matrix_for_each_of_a_batch() -> None:
    seen = Seen((2, 3, 4))
    assert seen.reshape((6, 4))
    assert seen.expand((5, 6, 4))
    assert seen.matrix() == (False, Order(2, (0, 1, 2)))
    other = Seen((2, 3, 4))
    assert other.permute((1, 0, 2))
    assert other.matrix() is None, "three different ones, and no stack as it is stored"
