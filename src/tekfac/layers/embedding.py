"""Embeddings: tables whose rows are looked up."""

from __future__ import annotations

from torch import Tensor

from tekfac.layers.linear import LinearLayer


class EmbeddingLayer(LinearLayer):
    """A table that is only looked up: a fully-connected layer whose inputs are one-hot rows.

    No such row is made, and no per-example gradient, which would be as wide as the table has
    entries: `chunks` gives the numbers of the entries that were looked up, -1 for padding.
    """

    looked_up = True

    @property
    def product_width(self) -> int:
        return 0

    def looked_up_rows(self, entries: Tensor, count: int, weights: Tensor | None) -> Tensor:
        return entries

    def check_input(self, x: Tensor) -> None:
        """Of numbers of entries there is no width to be wrong."""

    def _inputs(
        self,
        x: Tensor | None,
        like: Tensor,
        seen: Tensor | None,
        live: Tensor | None,
        biased: bool,
    ) -> Tensor:
        assert x is not None
        entries = (x if seen is None else x[seen]).view(like.shape[:3])
        return entries if live is None else entries.where(live, -1)

    def _norms(self, x: Tensor) -> Tensor:
        return (x >= 0)[None]
