"""Tables, files and a picture of what ranks take."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.ranks.counted import Message
from benchmarks.ranks.model import Machine
from benchmarks.ranks.simulation import KINDS, Plain, Told, Work

FACTOR_EVERY, BASIS_EVERY = 10, 100
GRADIENTS, EVERYWHERE = "SGD", "each makes all bases"


@dataclass(frozen=True)
class Row:
    """A network trained by so many ranks in one way.

    Attributes:
        sent: bytes that a rank sends, and receives, beside the gradients' sum, by kind of step.
        messages: collectives, likewise.
        sent_each: bytes in a step, on average over an interval of the bases.
        statistics: multiplications of a rank in a measurement, those of its extra pass included.
        bases: of the rank that has most of them in a refresh of all, and their mean.
        preconditioning: of the rank that has most of it in every step.
        state: bytes of curvature state, of the fullest rank and the emptiest.
        seconds: of a step on average, by the model, for each machine.
    """

    network: str
    method: str
    ranks: int
    placement: str
    sent: dict[str, float]
    messages: dict[str, int]
    sent_each: float
    statistics: int
    bases: tuple[int, float]
    preconditioning: int
    state: tuple[int, int]
    seconds: dict[str, float]


def each_step(by_kind: Mapping[str, float]) -> float:
    """The mean over an interval of the bases of what steps of each kind take."""
    quiet = by_kind["quiet"]
    statistics = (by_kind["statistics"] - quiet) / FACTOR_EVERY
    return quiet + statistics + (by_kind["bases"] - quiet) / BASIS_EVERY


def plain_row(
    network: str, plain: Plain, ranks: int, gradients: Sequence[Message], machines: Machines
) -> Row:
    """The network with SGD."""
    none: dict[str, int] = dict.fromkeys(KINDS.values(), 0)
    seconds = {name: _passes(machine, plain, gradients) for name, machine in machines.items()}
    return Row(
        network, "", ranks, GRADIENTS, {**none}, none, 0, 0, (0, 0.0), 0, (0, 0), seconds
    )  # fmt: skip


Machines = Mapping[str, Machine]


def _passes(machine: Machine, plain: Plain, gradients: Sequence[Message]) -> float:
    backward = machine.multiplying(plain.backward)
    return machine.multiplying(plain.forward) + max(backward, machine.sending(gradients))


def row(
    network: str,
    method: str,
    ranks: int,
    placement: str,
    plain: Plain,
    works: Mapping[str, Work],
    told: Told,
    machines: Machines,
) -> Row:
    """The network with an optimizer of this package.

    With `EVERYWHERE` for its placement, every rank makes all bases itself.
    """
    alone = placement == EVERYWHERE
    said = {**told.said, "bases": told.said["quiet"]} if alone else told.said
    load: Counter[int] = Counter()
    count: Counter[int] = Counter()
    for name, maker in told.makers.items():
        load[0 if alone else maker] += works[name].bases
        count[0 if alone else maker] += works[name].decompositions
    precondition: Counter[int] = Counter()
    state = [sum(told.elsewhere.values())] * told.unit
    for name, home in told.homes.items():
        precondition[home] += works[name].preconditioning
        state[home] += works[name].held - told.elsewhere[name]
    statistics = plain.outputs + sum(work.statistics[ranks] for work in works.values())
    seconds = {}
    for name, machine in machines.items():
        sending = {kind: machine.sending(messages) for kind, messages in said.items()}
        making = max(machine.decompositions(count[rank], load[rank]) for rank in load)
        seconds[name] = (
            _passes(machine, plain, told.gradients)
            + machine.preconditioning(max(precondition.values()))
            + machine.multiplying(statistics) / FACTOR_EVERY
            + making / BASIS_EVERY
            + each_step(sending)
        )
    sent = {kind: sum(message.wire for message in each) for kind, each in said.items()}
    mean = sum(load.values()) / (1 if alone else ranks)
    return Row(
        network,
        method,
        ranks,
        placement,
        sent,
        {kind: len(each) for kind, each in said.items()},
        each_step(sent),
        statistics,
        (max(load.values()), mean),
        max(precondition.values()),
        (max(state), min(state)),
        seconds,
    )


def table(rows: Sequence[Row], machines: Sequence[str]) -> str:
    """Rows of one network, in Markdown."""
    head = [
        "ranks",
        "placement",
        "sent in a step: quiet, with statistics, with all bases (MB)",
        "collectives",
        "sent in a step, mean (MB)",
        "statistics (10⁹)",
        "bases (10⁹), busiest / mean",
        "preconditioning (10⁹)",
        "state, fullest, emptiest (MiB)",
        *(f"step, {name} (ms)" for name in machines),
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    for each in rows:
        busiest, mean = each.bases
        cells = [str(each.ranks), each.placement]
        if each.placement == GRADIENTS:
            cells += [""] * 7
        else:
            cells += [
                ", ".join(f"{each.sent[kind] / 1e6:.1f}" for kind in KINDS.values()),
                ", ".join(str(each.messages[kind]) for kind in KINDS.values()),
                f"{each.sent_each / 1e6:.1f}",
                f"{each.statistics / 1e9:.0f}",
                f"{busiest / 1e9:.3g} / {mean / 1e9:.2g} = {busiest / mean:.1f}",
                f"{each.preconditioning / 1e9:.2g}",
                f"{each.state[0] / 2**20:.1f}, {each.state[1] / 2**20:.1f}",
            ]
        lines.append(_line([*cells, *(f"{1e3 * each.seconds[name]:.1f}" for name in machines)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(rows: Sequence[Row], text: str, folder: Path) -> None:
    """``ranks.md``, ``ranks.csv``, ``ranks.json`` and ``ranks.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ranks.md").write_text(text)
    packed = [asdict(each) for each in rows]
    (folder / "ranks.json").write_text(json.dumps(packed, indent=1) + "\n")
    flat = [_flat(each) for each in packed]
    with (folder / "ranks.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    picture(rows).savefig(folder / "ranks.png")


def _flat(packed: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in packed.items():
        parts: Mapping[object, object] = {}
        if isinstance(value, Mapping):
            parts = value
        elif isinstance(value, tuple):
            parts = dict(zip(("most", "mean" if key == "bases" else "least"), value, strict=True))
        flat |= {f"{key} {name}": each for name, each in parts.items()} or {key: value}
    return flat


def picture(rows: Sequence[Row]) -> Figure:
    """Seconds, bytes sent and bytes held against the number of ranks, a column for each network."""
    networks = list(dict.fromkeys(each.network for each in rows))
    figure = Figure(figsize=(4.6 * len(networks), 9), dpi=110, layout="constrained")
    axes = figure.subplots(3, len(networks), sharex=True, squeeze=False)
    machine = next(iter(rows[0].seconds))
    styles = dict(zip(dict.fromkeys(each.placement for each in rows), STYLES, strict=False))
    for column, network in enumerate(networks):
        for placement, style in styles.items():
            own = [e for e in rows if (e.network, e.placement) == (network, placement)]
            ranks = [each.ranks for each in own]
            drawn = {**style, "markersize": 5, "label": placement}
            axes[0, column].plot(ranks, [1e3 * each.seconds[machine] for each in own], **drawn)
            if placement == GRADIENTS:
                continue
            axes[1, column].plot(ranks, [each.sent_each / 1e6 for each in own], **drawn)
            axes[2, column].plot(ranks, [each.state[0] / 2**20 for each in own], **drawn)
        axes[0, column].set_title(network)
        axes[2, column].set_xlabel("ranks")
    axes[0, 0].set_ylabel(f"step, modelled (ms)\n{machine}")
    axes[1, 0].set_ylabel("sent by a rank in a step, mean (MB),\nbeside the gradients")
    axes[2, 0].set_ylabel("curvature state of the fullest rank (MiB)")
    for each in axes.flat:
        each.set_xscale("log", base=2)
        ticks = sorted({row.ranks for row in rows})
        each.set_xticks(ticks, [str(tick) for tick in ticks])
        each.set_ylim(bottom=0)
        each.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return figure


STYLES = (
    {"color": "black", "linestyle": ":", "marker": "."},
    {"color": "C0", "linestyle": "-", "marker": "o"},
    {"color": "C3", "linestyle": "--", "marker": "x"},
    {"color": "C2", "linestyle": "-", "marker": "s"},
    {"color": "C1", "linestyle": "-", "marker": "^"},
)
