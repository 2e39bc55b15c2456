"""Time and memory per step against SGD with momentum.

    python -m benchmarks.step --model resnet20 --width 16 --against adam,tekfac,soap,shampoo,muon
    python -m benchmarks.step --model vgg16 --against tekfac --intervals 10/10/200
    python -m benchmarks.step --model resnet20 --width 16 --against tekfac --profile

Blocks of steps of each optimizer follow one another in one process, so that a machine whose speed
drifts slows all of them alike; what counts are ratios to the neighbouring block of SGD. The clock
starts after the warm-up and by default stops after one interval of the eigenbases, so that the mean
over all steps, beside the median of blocks, holds a refresh's whole share, wherever it fell.
Peak memory is that of the warm-up's steps, in a process of its own for each optimizer.
``--profile`` takes one step of each kind apart instead.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import multiprocessing
import pkgutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import tekfac
from tekfac import networks
from tekfac.errors import InputError
from tekfac.runs import optimizers
from tekfac.runs.config import PRECISIONS

NATURAL = {m.__name__.lower(): m for m in (tekfac.KFAC, tekfac.EKFAC, tekfac.TKFAC, tekfac.TEKFAC)}
NAMES = (*optimizers.METHODS, "shampoo")
# Small, for one batch is fitted over and over, and only time counts.
LR = 1e-5


def build(name: str, network: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """An optimizer with its own defaults, but for intervals."""
    if name in NATURAL:
        factor, scale, basis = options.intervals
        every = {"factor_every": factor, "scale_every": scale, "basis_every": basis}
        known = inspect.signature(NATURAL[name]).parameters
        # Of a run in full swing: intervals as given from the first step.
        given = {"lr": LR, **every, "interval_warmup": False, **dict(options.set)}
        return NATURAL[name](network, **{key: given[key] for key in given if key in known})
    if name == "shampoo":
        import pytorch_optimizer

        # Its plain Shampoo takes zeros for inverse roots until the first refresh.
        return pytorch_optimizer.ScalableShampoo(
            network.parameters(),
            lr=LR,
            start_preconditioning_step=options.peer_every,
            preconditioning_compute_steps=options.peer_every,
            use_svd=options.device == "cpu",  # a third of its Schur-Newton iteration's time there
        )
    given = {"lr": LR}
    if name == "soap":
        given["precondition_frequency"] = options.peer_every
    settings = optimizers.resolve(name, given)
    optimizer = optimizers.build(name, network, settings, torch.Generator(options.device))
    if name == "soap" and options.compile:
        import heavyball

        heavyball.utils.compile_mode = "default"
    return optimizer


class Contender:
    """A network with its optimizer, on one fixed batch."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.x = torch.randn(options.batch, 3, 32, 32).to(options.device, memory_format=layout)
        self.y = torch.randint(10, (options.batch,), device=options.device)
        self.network = networks.build(options.model, (3, 32, 32), 10, options.width)
        self.network.to(options.device).to(memory_format=layout)
        self.precision = PRECISIONS[options.precision]
        self.optimizer = build(name, self.network, options)
        compiled = options.compile_networks
        self.forward = torch.compile(self.network) if compiled else self.network
        self.times: list[list[float]] = []

    def step(self) -> float:
        """One training step; its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        lower = self.precision != torch.float32
        with torch.autocast(self.x.device.type, self.precision, enabled=lower):
            loss = F.cross_entropy(self.forward(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def steps(self, steps: int) -> list[float]:
        """Some training steps; the seconds of each."""
        if isinstance(self.optimizer, tuple(NATURAL.values())):
            return [self.step() for _ in range(steps)]
        # Compilers stand aside in the whole process before a step that measures.
        with torch.compiler.set_stance("default"):
            return [self.step() for _ in range(steps)]

    def block(self, steps: int) -> None:
        """Time some steps."""
        self.times.append(self.steps(steps))


def peak_memory(name: str, options: argparse.Namespace) -> float:
    """MiB that training takes at its peak, beyond what the process has with all code loaded."""
    torch.set_num_threads(options.threads)
    # The compiler's own memory is not the optimizer's.
    options.compile = options.compile_networks = False
    # Much is imported, or set up, on its first use.
    Contender(name, argparse.Namespace(**{**vars(options), **TINY})).step()
    if options.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = _resident("VmRSS")
    contender = Contender(name, options)
    for _ in range(options.warmup):
        contender.step()
    peak = torch.cuda.max_memory_allocated() if options.device != "cpu" else _resident("VmHWM")
    return (peak - before) / 2**20


TINY = {"model": "cnn", "width": 1, "batch": 2}


def _resident(entry: str) -> int:
    """Bytes, now or at most so far, by Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))


def race(options: argparse.Namespace) -> None:
    """Print a table of times and memory, and of their ratios to SGD's."""
    names = list(dict.fromkeys(["sgd", *options.against]))
    peaks = {}
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[name] = pool.submit(peak_memory, name, options).result()
    contenders = {name: Contender(name, options) for name in names}
    for contender in contenders.values():
        contender.steps(options.warmup)
    interval = options.intervals[2]
    blocks = options.blocks or math.ceil(interval / options.steps)
    for _ in range(blocks):
        for contender in contenders.values():
            contender.block(options.steps)
    base = contenders["sgd"].times
    count = blocks * options.steps
    print(
        f"{options.model}, width {options.width or networks.NETWORKS[options.model].width}, batch "
        f"{options.batch}, {options.precision}, intervals {'/'.join(map(str, options.intervals))}, "
        f"{'channels last, ' if options.channels_last else ''}"
        f"{'compiled networks, ' if options.compile_networks else ''}{options.device}, "
        f"{options.threads} threads, torch {torch.__version__}; {count} steps, which are "
        f"{count / interval:g} intervals of the bases\n"
    )
    print(
        "| optimizer | ms per step (median of blocks) | ratio to SGD (median of blocks) | "
        "ratio (mean over all steps) | slowest step / median | peak memory (MiB) | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, contender in contenders.items():
        pairs = [(sum(own), sum(sgd)) for own, sgd in zip(contender.times, base, strict=True)]
        steps = sorted(t for block in contender.times for t in block)
        print(
            f"| {name} | {1e3 * statistics.median(own for own, _ in pairs) / options.steps:.1f} | "
            f"{statistics.median(own / sgd for own, sgd in pairs):.2f} | "
            f"{sum(own for own, _ in pairs) / sum(sgd for _, sgd in pairs):.2f} | "
            f"{steps[-1] / statistics.median(steps):.1f} | "
            f"{peaks[name]:.0f} | {peaks[name] / peaks['sgd']:.2f} |"
        )


PARTS = {
    "backward pass for output gradients": "tekfac.capture.graph.go_through",
    "inputs and gradients as matrices": "tekfac.layers.layer.Layer._rows",
    "traces of the examples": "tekfac.curvature.factors.TraceRestrictedFactors.add",
    "factors": "tekfac.curvature.moments.Moment.add",
    "rescaling": "tekfac.curvature.rescaling.CorrectedBlock._add_squares",
    "basis": "tekfac.curvature.moments.Moment.eigen",
    "preconditioning": "tekfac.optimizer.update.Preconditioner.natural_gradients",
}


@contextmanager
def clocked(target: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time spent in a function, without that in other clocked ones that it calls."""
    function = pkgutil.resolve_name(target)

    def timed(*args: object, **kwargs: object) -> object:
        start, others = time.perf_counter(), sum(seconds.values())
        try:
            return function(*args, **kwargs)
        finally:
            inner = sum(seconds.values()) - others
            spent = time.perf_counter() - start - inner
            seconds[target] = seconds.get(target, 0.0) + spent

    with mock.patch(target, timed):
        yield


def profile(options: argparse.Namespace) -> None:
    """Print, for each kind of step, where its time goes: the best of several."""
    repeats = options.blocks or 5
    sgd = Contender("sgd", options)
    plain = min(sgd.step() for _ in range(repeats + 1))
    print(f"sgd: {1e3 * plain:.0f} ms per step")
    never = 1_000_000
    for name in (name for name in options.against if name in NATURAL):
        for kind, intervals in (
            ("without statistics", [never, never, never]),
            ("with statistics", [1, 1, never]),
            ("with statistics and a new basis", [1, 1, 1]),
        ):
            contender = Contender(
                name, argparse.Namespace(**{**vars(options), "intervals": intervals})
            )
            contender.step()
            best, parts = float("inf"), {}
            for _ in range(repeats):
                seconds: dict[str, float] = {}
                with ExitStack() as stack:
                    for target in PARTS.values():
                        stack.enter_context(clocked(target, seconds))
                    total = contender.step()
                if total < best:
                    best, parts = total, seconds
            print(f"{name}, {kind}: {1e3 * best:.0f} ms")
            for part, target in PARTS.items():
                if target in parts:
                    print(f"    {part}: {1e3 * parts[target]:.0f} ms")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _intervals(text: str) -> list[int]:
    counts = [_count(part) for part in text.split("/")]
    if len(counts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three counts, such as 10/10/100")
    return counts


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not any(name in inspect.signature(each).parameters for each in NATURAL.values()):
        raise argparse.ArgumentTypeError(f"no natural-gradient optimizer has {name!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, as in Python") from None


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)} unknown; there is: {', '.join(NAMES)}"
        )
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20", choices=sorted(networks.NETWORKS))
    parser.add_argument("--width", type=int, help="default: the network's own")
    parser.add_argument("--batch", type=_count, default=128)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--against", type=_names, default=["adam", "tekfac"], help="besides sgd")
    parser.add_argument(
        "--intervals", type=_intervals, default=[10, 10, 100], help="factors/rescaling/basis"
    )
    parser.add_argument(
        "--peer-every", type=_count, default=10, help="SOAP's and Shampoo's interval"
    )
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument of the natural-gradient optimizers, for those that have it",
    )
    parser.add_argument(
        "--compile", action="store_true", help="let SOAP compile, for a minute; --warmup covers it"
    )
    parser.add_argument(
        "--compile-networks", action="store_true", help="torch.compile the networks"
    )
    parser.add_argument("--warmup", type=_count, default=12, help="steps before the clock starts")
    parser.add_argument("--blocks", type=_count, help="default: as many as cover a basis interval")
    parser.add_argument("--steps", type=_count, default=10, help="per block")
    parser.add_argument("--threads", type=_count, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Race or profile."""
    parser = _parser()
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        (profile if options.profile else race)(options)
    except (InputError, ModuleNotFoundError) as error:
        parser.error(f"{error}")


if __name__ == "__main__":
    main()
