"""What an optimizer does with each parameter of a model, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tekfac.capture.capture import Capture
from tekfac.curvature.blocks import Block
from tekfac.layers import Assignment

HEAD = ("parameter", "shape", "trained by", "W", "kept", "rows", "MiB", "refresh", "basis of step")


@dataclass(frozen=True)
class Entry:
    """A parameter, and what is done with it.

    Attributes:
        name: its name in the model.
        shape: its shape.
        treatment: by what it is trained, in words (`NaturalGradient.treatment`).
        block: the block that covers it, None for none.
        measured: whether its curvature was measured.
        waiting: whether it was, and the block's first basis is still to come: until its turn
            (docs/step.md) the first-order rule trains the parameter.
        leads: whether it is the block's first parameter, which the block's figures stand at.
        order: how rows of the layer belong to examples (docs/fisher.md), "" before it was used.
        refreshed: the step of the block's last basis, None before the first.
        own_bytes: of the parameter's state, such as momentum.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    block: Block | None
    measured: bool
    waiting: bool
    leads: bool
    order: str
    refreshed: int | None
    own_bytes: int


@dataclass(frozen=True)
class Summary:
    """A table of every parameter, and totals. Its text is for people.

    Attributes:
        method: the optimizer's name.
        entries: one for each parameter of the model.
        step: steps taken.
    """

    method: str
    entries: Sequence[Entry]
    step: int

    @property
    def share_measured(self) -> float:
        """The part of the trained parameters whose curvature was measured, 0 to 1."""
        return self._share(lambda e: e.measured)

    @property
    def share_waiting(self) -> float:
        """The part of them that was measured, and waits for its first basis."""
        return self._share(lambda e: e.waiting)

    def _share(self, of: Callable[[Entry], bool]) -> float:
        return _count(filter(of, self._trained)) / max(1, _count(self._trained))

    @property
    def _trained(self) -> list[Entry]:
        return [e for e in self.entries if not e.treatment.startswith("not trained")]

    @property
    def state_bytes(self) -> int:
        """Of all state: momentum, averages, and what blocks hold or will hold."""
        blocks = {e.block.name: e.block for e in self.entries if e.block is not None}
        return sum(e.own_bytes for e in self.entries) + sum(
            block.state_bytes for block in blocks.values()
        )

    def __str__(self) -> str:
        rows = [HEAD, *(_cells(entry) for entry in self.entries)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        rule = "─" * max(len(line) for line in lines)
        trained = _count(self._trained)
        covered = _count(e for e in self.entries if e.block is not None)
        waiting = (
            f" ({_percent(self.share_waiting)} wait for a basis)" if self.share_waiting else ""
        )
        totals = (
            f"{self.method} after {self.step} steps: {trained:,} parameters trained, "
            f"{_percent(covered / max(1, trained))} in curvature blocks, "
            f"{_percent(self.share_measured)} measured{waiting}; "
            f"state {_mebibytes(self.state_bytes)} MiB"
        )
        return "\n".join([lines[0], rule, *lines[1:], rule, totals])


def summarised(
    parameters: Iterable[tuple[str, nn.Parameter]],
    method: str,
    blocks: Mapping[str, Block],
    assignment: Assignment,
    capture: Capture | None,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
    refreshed: Mapping[str, int],
    step: int,
) -> Summary:
    """The table of an optimizer.

    Args:
        parameters: of the model, by name.
        method: the optimizer's name.
        blocks: its blocks, by name.
        assignment: which parameters belong to which layer, and why others belong to none.
        capture: what was seen; None once the optimizer is closed.
        groups: its parameter groups.
        state: of each parameter.
        refreshed: the step of each block's last basis.
        step: steps taken.
    """
    covered = {p: block for block in blocks.values() for p in block.layer.parameters}
    trained = {p for group in groups for p in group["params"]}
    strange = {} if capture is None else capture.strange
    orders = {} if capture is None else capture.orders
    entries = []
    for name, p in parameters:
        block = covered.get(p)
        owner = assignment.owner.get(p)
        order = None if block is None else orders.get(block.name)
        words = treatment_of(
            p,
            method,
            block,
            p in trained,
            owner if owner in blocks else None,
            assignment.reasons.get(p, "frozen when added"),
            strange,
        )
        entries.append(
            Entry(
                name=name,
                shape=tuple(p.shape),
                treatment=words,
                block=block,
                measured=block is not None and (block.waiting or not block.empty),
                waiting=block is not None and block.waiting,
                leads=block is not None and p is block.layer.parameters[0],
                order="" if order is None else order.kind,
                refreshed=None if block is None else refreshed.get(block.name),
                own_bytes=sum(
                    value.numel() * value.element_size()
                    for value in state.get(p, {}).values()
                    if isinstance(value, Tensor)
                ),
            )
        )
    return Summary(method, entries, step)


def _cells(entry: Entry) -> tuple[str, ...]:
    shape = "×".join(map(str, entry.shape)) or "()"
    block = entry.block
    if block is None or not entry.leads:
        words = entry.treatment if block is None else "  with it"
        return (entry.name, shape, words, "", "", "", "", "", "")
    d_out, d_in = block.layer.d_out, block.layer.d_in
    groups = f"{block.groups} × " if block.groups > 1 else ""
    kept_in, kept_out = block.kept
    rows = f"{block.positions} each" + (f", {entry.order}" if entry.order else "")
    return (
        entry.name,
        shape,
        _trained_by(entry),
        f"{groups}{d_out}×{d_in}",
        "all" if (kept_in, kept_out) == (d_in, d_out) else f"{kept_out}, {kept_in}",
        rows if entry.measured or entry.order else "",
        _mebibytes(block.state_bytes),
        f"{block.refresh_cost:.1e}",
        "" if entry.refreshed is None else str(entry.refreshed),
    )


def _trained_by(entry: Entry) -> str:
    if entry.waiting:
        return "block, waits for its basis"
    if entry.measured:
        return "block"
    known = entry.treatment.startswith("first order")
    return entry.treatment if known else "block, not measured yet"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _count(entries: Iterator[Entry] | Sequence[Entry]) -> int:
    total = 0
    for entry in entries:
        size = 1
        for length in entry.shape:
            size *= length
        total += size
    return total


def treatment_of(
    p: Tensor,
    method: str,
    block: Block | None,
    trained: bool,
    owner: str | None,
    reason: str,
    strange: Mapping[str, str],
) -> str:
    """How a parameter is trained, in words.

    Args:
        p: the parameter.
        method: the optimizer's name.
        block: what covers it, None for nothing.
        trained: whether it is in a parameter group.
        owner: the layer that it belongs to and that has a block, None for none.
        reason: why it has no block, if it belongs to no layer.
        strange: for layers, what uses their weights in a way that is not known.
    """
    if block is not None and block.name in strange:
        return f"first order: used by {strange[block.name]}, which is no product known here"
    if block is not None:
        later = ""
        if block.waiting:
            later = " (measured; first order until the turn of its first basis)"
        elif block.empty:
            later = " (first order until its curvature is measured)"
        return f"{method} block {block.name!r}{later}"
    if not trained:
        return "not trained: " + ("in no group" if p.requires_grad else "frozen")
    if owner is not None:
        return f"first order: not added to what the weight of layer {owner!r} itself makes"
    return f"first order: {reason}"
