"""What ranks send one another, counted where torch hands it to a backend.

In a process group of torch's "fake" backend one process is a rank of any number of them: it calls
what that rank would call, and nothing is sent. What it would have heard is made up, so that the
code under test goes on as if it had: the shapes of what is sent do not depend on values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Message:
    """One collective.

    Attributes:
        kind: "allreduce", "broadcast", "allgather" or "alltoall".
        ranks: how many take part.
        size: bytes of the tensor that each rank puts in (of a broadcast, its source); of
            "alltoall" those for others, or from them if these are more.
        root: who sends, numbered within the group; None where all do.
    """

    kind: str
    ranks: int
    size: int
    root: int | None = None

    @property
    def wire(self) -> float:
        """Bytes that a rank sends on, and receives, in a ring; of a chain the ranks' mean.

        Of "alltoall" those of this rank.
        """
        n = self.ranks
        parts = {
            "allreduce": 2 * (n - 1) / n,
            "broadcast": (n - 1) / n,
            "allgather": n - 1,
            "alltoall": 1,
        }
        return parts[self.kind] * self.size


class Counter(TorchDispatchMode):
    """Notes all collectives of this process, those of `DistributedDataParallel` included.

    Args:
        pretend: whether nobody answers, so that what others would broadcast has to be made up.
    """

    def __init__(self, pretend: bool = False) -> None:
        super().__init__()
        self.pretend = pretend
        self.messages: list[Message] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = args
        if self.pretend and func.namespace == "c10d" and "alltoall_base" in func.__name__:
            # The fake backend refuses to give something to whoever sends nothing.
            none = [0] * len(args[3])
            given = (args[0][:0], args[1][:0], args[2], none, none, *args[5:])
        result = func(*given, **(kwargs or {}))
        if func.namespace == "c10d" and func.__name__ != "barrier.default":
            self._note(func.__name__.split(".")[0].strip("_"), args)
        return result

    def _note(self, name: str, args: Sequence[Any]) -> None:
        place, root = {
            "allreduce": (1, None),
            "broadcast": (1, 2),
            "allgather": (2, None),
            "allgather_base": (2, None),
            "alltoall_base": (2, None),
        }[name]
        group = dist.ProcessGroup.unbox(args[place])
        source = None if root is None else int(args[root])
        heard = name == "broadcast" or name.endswith("_base")
        if self.pretend and heard and source != group.rank():
            for each in _tensors(args[0]):
                each.fill_(1)
        sent = _tensors(args[place - 1])
        size = sum(each.numel() * each.element_size() for each in sent)
        if name == "alltoall_base":
            size = (
                exchanged(args[place + 1], args[place + 2], group.rank()) * sent[0].element_size()
            )
        self.messages.append(Message(name.removesuffix("_base"), group.size(), size, source))

    def take(self) -> list[Message]:
        """What was noted since this was asked last."""
        taken, self.messages = self.messages, []
        return taken


def exchanged(received: Sequence[int], sent: Sequence[int], rank: int) -> int:
    """Entries for others, or from them if these are more, of those by rank."""
    return max(sum(sent) - sent[rank], sum(received) - received[rank])


def _tensors(given: Any) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


@contextmanager
def pretended(ranks: int) -> Iterator[Counter]:
    """This process as the first of so many ranks; of one rank, without any group."""
    if ranks == 1:
        yield Counter()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with Counter(pretend=True) as counter:
            yield counter
    finally:
        dist.destroy_process_group()


def told(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What `DistributedDataParallel` does with a bucket of gradients; the backend has no answer."""
    buffer = bucket.buffer()
    dist.all_reduce(buffer)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


def parallel(model: torch.nn.Module) -> torch.nn.Module:
    """The model, wrapped if this process is one of several."""
    if not dist.is_initialized():
        return model
    wrapped = DistributedDataParallel(model)
    if dist.get_backend() == "fake":
        wrapped.register_comm_hook(None, lambda _, bucket: told(bucket))
    return wrapped


@contextmanager
def undecomposed() -> Iterator[None]:
    """Have eigenvectors be any, of the right shapes: what is sent does not depend on them."""

    def whole(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(matrix[..., 0]), torch.eye(matrix.shape[-1]).expand_as(matrix)

    def leading(product: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(product[:, 0]), probe

    with (
        mock.patch("tekfac.curvature.moments.eigh", whole),
        mock.patch("tekfac.curvature.moments.leading", leading),
    ):
        yield
