"""Bytes sent, multiplications and bytes held for each rank, counted; seconds, by a model.

    python -m benchmarks.ranks
    python -m benchmarks.ranks --measure

Networks of full size are trained by 1, 8, 64 and 512 ranks, of which one is there
(`benchmarks.ranks.simulation`); what it hands to its backend is counted. ``ranks.md``, its picture
and all numbers are in ``--out``. ``--measure`` takes processor seconds of one process and of two
instead, into ``measured.md`` (`benchmarks.ranks.measure`).
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from benchmarks.ranks import kaisa, measure, model, report
from benchmarks.ranks.counted import Message
from benchmarks.ranks.model import Machine
from benchmarks.ranks.simulation import KINDS, NETWORKS, Network, Told, ask, plain, works

# A node's part: what units of eight ranks hold together.
NODE = 8

# Ranks at which KAISA is compared with.
BESIDE = 64


def placements(ranks: int) -> dict[str, str | float]:
    """By their names in tables; each way of dividing the state once."""
    found: dict[str, str | float] = {"replicated": "replicated"}
    if ranks > NODE:
        found[f"1/{NODE}"] = 1 / NODE
    if ranks > 1:
        found["sharded"] = "sharded"
    return found


def rows_of(network: Network, counts: Sequence[int], machines: report.Machines) -> list[report.Row]:
    """A network with TEKFAC's defaults."""
    taken = works(network, "TEKFAC", counts)
    bare = plain(network, sum(work.forward for work in taken.values()))
    rows = []
    for ranks in counts:
        for name, placement in placements(ranks).items():
            told = ask(network, "TEKFAC", ranks, {"placement": placement})
            every = (network.name, "TEKFAC", ranks)
            if name == "replicated":
                rows.append(report.plain_row(network.name, bare, ranks, told.gradients, machines))
            rows.append(report.row(*every, name, bare, taken, told, machines))
            if name == "replicated" and ranks > 1:
                rows.append(report.row(*every, report.EVERYWHERE, bare, taken, told, machines))
            print(f"{network.name}: {ranks} ranks, {name}", flush=True)
    return rows


def beside_kaisa(network: Network, ranks: int) -> str:
    """A table of whole bases: KFAC here, and KAISA by its rules."""
    head = ["", "sent in a step: quiet, with factors, with bases (MB)", "mean (MB)", "state (MiB)"]
    lines = [" | ".join(["", *head, ""]).strip(), "| --- | --- | --- | --- |"]
    taken = works(network, "KFAC", [], rank=None)

    def add(name: str, said: dict[str, list[Message]], state: int) -> None:
        sent = {kind: sum(message.wire for message in said[kind]) for kind in KINDS.values()}
        cells = ", ".join(f"{each / 1e6:.0f}" for each in sent.values())
        each = report.each_step(sent)
        lines.append(f"| {name} | {cells} | {each / 1e6:.1f} | {state / 2**20:.0f} |")

    for name, placement in placements(ranks).items():
        told: Told = ask(network, "KFAC", ranks, {"placement": placement, "rank": None})
        held = [sum(told.elsewhere.values())] * told.unit
        for layer, home in told.homes.items():
            held[home] += taken[layer].held - told.elsewhere[layer]
        add(f"KFAC, `rank=None`, {name}", dict(told.said), max(held))
    sizes = {name: work.widths for name, work in taken.items()}
    for words, workers in (("COMM-OPT", ranks), ("an eighth", ranks // NODE), ("MEM-OPT", 1)):
        found = kaisa.rules(sizes, ranks, workers)
        add(
            f"KAISA, {words}: {workers} gradient worker{'s' * (workers > 1)}",
            dict(found.said),
            found.state,
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, model, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("results/ranks"))
    parser.add_argument("--measure", action="store_true", help="processor seconds of two processes")
    parser.add_argument("--networks", default="resnet50,gpt2", help=", ".join(NETWORKS))
    parser.add_argument("--counts", default="1,8,64,512", help="numbers of ranks")
    parser.add_argument(
        "--slow", type=float, default=1e10, help="bytes a second between nodes, the second machine"
    )
    parser.add_argument("--no-kaisa", action="store_true", help="leave out the comparison")
    for field in fields(Machine):
        kind = type(field.default)
        parser.add_argument(
            f"--{field.name}", type=kind, default=field.default, help="see model.py"
        )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.measure:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "measured.md").write_text(measure.report())
        return
    rates = {field.name: getattr(options, field.name) for field in fields(Machine)}
    machine = Machine(**rates)
    machines = {
        f"{machine.between / 1e9:.0f} GB/s": machine,
        f"{options.slow / 1e9:.0f} GB/s": Machine(**{**rates, "between": options.slow}),
    }
    counts = [int(text) for text in options.counts.split(",")]
    networks = [NETWORKS[name]() for name in options.networks.split(",")]
    rows: list[report.Row] = []
    for number, network in enumerate(networks):
        rows += rows_of(network, counts, machines)
        # What is there is written: all of it takes minutes.
        report.write(rows, page(networks[: number + 1], rows, machines, None), options.out)
    if not options.no_kaisa:
        beside = beside_kaisa(NETWORKS["resnet50"](), BESIDE)
        report.write(rows, page(networks, rows, machines, beside), options.out)


def page(
    networks: Sequence[Network],
    rows: Sequence[report.Row],
    machines: report.Machines,
    kaisa_text: str | None,
) -> str:
    """``ranks.md``."""
    parts = ["# What ranks take", INTRODUCTION, f"![{PICTURE}](ranks.png)", COLUMNS]
    for network in networks:
        own = [row for row in rows if row.network == network.name]
        parts += [
            f"## {network.name}, {network.batch_words} on each rank",
            report.table(own, list(machines)),
        ]
    if kaisa_text is not None:
        parts += [f"## ResNet-50 with whole bases, {BESIDE} ranks", kaisa_text, KAISA]
    machine = next(iter(machines.values()))
    parts += ["## The model", inspect.getdoc(model) or "", f"`{machine}`"]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
Written by `python -m benchmarks.ranks`. Bytes, collectives, multiplications and state are counted
where the package's own code, as one rank of so many, hands them over; milliseconds are a model's,
below. TEKFAC with its defaults, intervals of 10/10/100, float32."""

PICTURE = "A step's time, the bytes that a rank sends and those that it holds against ranks"

COLUMNS = f"""\
- *Sent* is what a rank sends, and receives, beside the gradients' own sum, in a ring: `2 (n − 1)/n`
  of what is summed up, `(n − 1)/n` of what is broadcast or gathered; of what is exchanged, what the
  first rank sends, which holds the costliest layer, or receives if that is more.
- *Statistics*, *bases* and *preconditioning* are multiplications: of a rank in a measurement, its
  backward pass for output gradients included; of the rank that has most when all layers get a new
  basis, and the mean of all ranks; of the rank that has most in every step.
- *{report.EVERYWHERE}*: replicated, and no basis is told.
- *1/{NODE}*: units of {NODE} ranks hold the state together. At {NODE} ranks that is *sharded*.
- Two columns of milliseconds for two networks: what a node sends to others in a second."""

KAISA = """\
KFAC of this package, and KAISA by the rules of its published code (`benchmarks/ranks/kaisa.py`), on
the same layers: intervals 10/100. An eighth: eight ranks share a copy of the state. Eigenvectors go
to those who hold the layer, in both. Here factors are sent as triangles; KAISA sends whole factors
(by default), which all ranks keep."""


if __name__ == "__main__":
    main()
