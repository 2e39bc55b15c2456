"""What torchrun does, over and over in one process, with ranks that need not import torch first.

Its agent, rendezvous, store and restarts are torch's; but ranks are forked from a process that has
imported all, where torchrun starts each as a program of its own.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# That a command has ended by then is a part of every test that starts ranks.
SECONDS = 240


class Agent:
    """A process that launches ranks; it has its own forked when it first does."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,
        )
        atexit.register(self.end)

    def launch(
        self,
        count: int,
        *arguments: str,
        restarts: int = 0,
        program: str = "",
        nodes: int = 1,
        meeting: Sequence[str] = ("localhost:0", "alone"),
    ) -> tuple[int, str, str]:
        """Status, output and errors of the command by so many ranks.

        Args:
            count: how many.
            arguments: the command's.
            restarts: as torchrun's.
            program: lines that each rank runs first.
            nodes: how many agents launch so many ranks each, all of which must be asked.
            meeting: where these meet, and under which name.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            told = [str(Path.cwd()), folder, count, restarts, program, arguments, nodes, *meeting]
            self._process.stdin.write(json.dumps(told) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], SECONDS)[0]:
                self.end()
                raise TimeoutError(f"it took more than {SECONDS} seconds")
            status = self._process.stdout.readline()
            found = [Path(folder, name) for name in ("output", "errors")]
            output, errors = (each.read_text() if each.exists() else "" for each in found)
        if not status:
            raise ChildProcessError("the agent ended")
        return int(status), output, errors

    def end(self) -> None:
        """End it, and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


_agents: list[Agent] = []


def launch(count: int, *arguments: str, **options: Any) -> tuple[int, str, str]:
    """`Agent.launch` of one that there is, or else of a new one."""
    agent = _agents.pop() if _agents else Agent()
    try:
        found = agent.launch(count, *arguments, **options)
    except BaseException:
        agent.end()
        raise
    _agents.append(agent)
    return found


def launch_on(
    nodes: int, count: int, *arguments: str, **options: Any
) -> list[tuple[int, str, str]]:
    """The same by agents of so many machines, all of which are this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    options |= {"nodes": nodes, "meeting": (endpoint, uuid.uuid4().hex)}
    with ThreadPoolExecutor(nodes) as threads:
        asked = [threads.submit(launch, count, *arguments, **options) for _ in range(nodes)]
        return [each.result() for each in asked]


def rank(folder: str, program: str, arguments: list[str]) -> None:
    """One of the ranks."""
    for descriptor, name in ((1, "output"), (2, "errors")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, descriptor)
    from tekfac.cli import main

    sys.argv = ["tekfac", *arguments]
    exec(program, {})
    main()


def serve() -> None:
    """Launch what is told, a line each, and tell the status."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The last two are what every rank would import by itself.
    multiprocessing.set_forkserver_preload(["tekfac.cli.app", "torch._dynamo", "sklearn.datasets"])
    for line in sys.stdin:
        here, folder, count, restarts, program, arguments, nodes, *meeting = json.loads(line)
        os.chdir(here)
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=count,
            max_restarts=restarts,
            run_id=meeting[1],
            rdzv_backend="c10d",
            rdzv_endpoint=meeting[0],
            start_method="forkserver",
        )
        status = 0
        try:
            elastic_launch(config, rank)(folder, program, arguments)
        except ChildFailedError:
            status = 1
        os.chdir("/")
        print(status, flush=True)


if __name__ == "__main__":
    serve()
