"""A model of network and device: from counts to seconds.

Nothing here is measured. A rank's step is the sum of

- the model's passes and the statistics' products, at the device's rate for large products, and
  preconditioning at that for float32;
- decompositions, each with a time to start and a low rate: as long as the rank takes that has most
  of them;
- messages, one after the other: bytes over the slowest link on the way, and a time for each hop, of
  which a sum has ``2 log₂ n`` (a tree), all others ``n − 1`` (a chain, or a ring).

The gradients' sum runs beside the backward pass: only what is longer is waited for. What moves
memory alone (updates, norms) is left out of all rows alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.ranks.counted import Message


@dataclass(frozen=True)
class Machine:
    """Rates: of an H100, in nodes of eight with a link of 400 Gb/s for each.

    Attributes:
        products: operations a second in large products of bfloat16, two for a multiplication.
        precise: in float32.
        decomposing: in eigendecompositions.
        starting: seconds of one that is small.
        node: ranks in a node.
        inside: bytes a second that a rank sends within its node.
        between: that a node sends to others.
        hop: seconds from rank to rank.
    """

    products: float = 3e14
    precise: float = 4e13
    decomposing: float = 5e11
    starting: float = 2e-3
    node: int = 8
    inside: float = 3.5e11
    between: float = 3.2e11
    hop: float = 3e-6

    def sending(self, messages: Iterable[Message]) -> float:
        """Seconds that messages take, one after the other."""
        return sum(map(self._one, messages))

    def _one(self, message: Message) -> float:
        n = message.ranks
        rate = self.inside if n <= self.node else min(self.inside, self.between)
        hops = n - 1 if message.kind != "allreduce" else 2 * math.log2(n)
        size = message.size if message.kind == "broadcast" else message.wire
        return size / rate + hops * self.hop

    def multiplying(self, multiplications: float) -> float:
        """Seconds of large products."""
        return 2 * multiplications / self.products

    def preconditioning(self, multiplications: float) -> float:
        """Seconds of products in float32."""
        return 2 * multiplications / self.precise

    def decompositions(self, count: int, multiplications: float) -> float:
        """Seconds of so many, with so many multiplications together."""
        return count * self.starting + 2 * multiplications / self.decomposing
