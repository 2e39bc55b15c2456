"""Functions run by processes forked from one that has imported torch: by ranks, or by themselves.

Ranks are several at once, of one gloo group, and have a time limit.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import debug

SECONDS = 60.0

# What each would import by itself, some of it when it makes its first optimizer. The program, and
# what reads the digits, may be missing.
PRELOADED = ["torch", "torch.distributed", "tekfac", "torch._dynamo", "torch.distributed.fsdp"]
PRELOADED += ["tekfac.cli.app", "tekfac.runs.training", "sklearn.datasets"]

Work = Callable[..., Any]


class Failed(AssertionError):
    """A rank raised."""


class Died(Failed):
    """A rank's process is no more."""


def forking() -> ForkServerContext:
    """Importing torch takes longer than most of what processes are for here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Started:
    """A process that runs a function, as `subprocess.Popen` is one that runs a program."""

    def __init__(self, work: Work, *args: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._folder.name, name)) for name in ("output", "errors")]
        arguments = (self._files, work, args)
        self._process = forking().Process(target=_alone, args=arguments, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Output and errors, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"it took more than {timeout} seconds")
        output, errors = (Path(name).read_text() for name in self._files)
        return output, errors


def _alone(files: list[str], work: Work, args: tuple[Any, ...]) -> None:
    for descriptor, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    torch.set_num_threads(1)
    work(*args)


class Crew:
    """Processes that wait for work."""

    def __init__(self, count: int) -> None:
        context = forking()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, count), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, work: Work, args: tuple[Any, ...], seconds: float) -> list[Any]:
        """What each rank's ``work(*args)`` gives; an exception stands for itself."""
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes:
                pipe.send((work, args, str(Path(folder, "store")), seconds))
            end = time.monotonic() + seconds
            results = []
            for rank, pipe in enumerate(self.pipes):
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    gave = [repr(each) for each in results if isinstance(each, Exception)]
                    said = f"; before it: {', '.join(gave)}" if gave else ""
                    raise TimeoutError(f"rank {rank} took more than {seconds} seconds{said}")
                try:
                    results.append(pipe.recv())
                except EOFError:
                    results.append(Died("it died"))
            return results

    def end(self) -> None:
        """End the processes, whatever they are at."""
        for process in self.processes:
            process.kill()
            process.join()


_crews: dict[int, Crew] = {}


def together(count: int, work: Work, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """What ``work(*args)`` gives on each of several ranks.

    Raises:
        Failed: if it raises on any, with what it raised.
        TimeoutError: if one does not come to an end.
    """
    results = outcomes(count, work, *args, seconds=seconds)
    for rank, result in enumerate(results):
        if isinstance(result, Failed):
            raise Failed(f"rank {rank}: {result}")
    return results


def outcomes(count: int, work: Work, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """The same, with a `Failed` in place of what a rank gives that raises."""
    if not _crews:
        atexit.register(_end)
    crew = _crews.pop(count, None) or Crew(count)
    try:
        results = crew.run(work, args, seconds)
    except (TimeoutError, ConnectionError):
        crew.end()
        raise
    failed = sum(isinstance(result, Failed) for result in results)
    if 0 < failed < count or any(isinstance(result, Died) for result in results):
        crew.end()  # somebody may be in the middle of something
    else:
        _crews[count] = crew
    return results


def _end() -> None:
    for crew in _crews.values():
        crew.end()


def _serve(pipe: Connection, rank: int, count: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    while True:
        try:
            work, args, store, seconds = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=seconds / 2),
        )
        try:
            result = work(*args)
            dist.barrier()  # one that leaves first may end the others' threads under their hands
        except Exception as error:
            result = Failed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        dist.destroy_process_group()
        # It has groups' names, which other groups get next. Older versions keep none to clear.
        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()
        pipe.send(result)
