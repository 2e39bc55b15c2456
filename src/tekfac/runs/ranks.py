"""The processes that train a network together, as ``torchrun`` starts them; called *ranks*.

Rank 0 leads: it alone runs the command, looks at files, and writes and prints. It tells the others
what of a training comes next, and they do the same at the same time, each with its shard of every
batch. So whatever runs trainings one after the other needs to know nothing of ranks.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tekfac.errors import Diverged, InputError

# For what ranks do at the same time: one that takes so much longer than another is taken for lost.
TIMEOUT = timedelta(minutes=10)
# For what rank 0 does meanwhile: it loads data, waits for a lock, asks the user. That a process
# has ended is noticed at once in any case.
PATIENCE = timedelta(days=7)


class Ranks:
    """One process alone.

    Attributes:
        number: which of the ranks this is.
        count: how many there are.
    """

    number: int = 0
    count: int = 1

    def alone(self) -> Ranks:
        """This rank, for what it does without the others."""
        return self

    def check(self, device: str, batch: int) -> None:
        """Raise if ranks cannot train so.

        Args:
            device: where torch is to compute.
            batch: images in a full batch.

        Raises:
            InputError: if there are more ranks than images or GPUs.
        """

    def share(self, size: int) -> slice:
        """This rank's part of a batch of so many images; empty where there are too few."""
        return slice(0, size)

    def parallel(self, network: nn.Module) -> nn.Module:
        """What is called in the network's place, so that its gradients are those of all ranks."""
        return network

    def weigh(self, share: float) -> None:
        """Tell how much of the batch the next gradient is about; the shares add up to 1."""

    def totals(self, numbers: Tensor) -> list[float]:
        """Numbers, each added up over all ranks."""
        totals: list[float] = numbers.tolist()
        return totals

    def reseed(self, seed: int, epoch: int) -> None:
        """Let each rank draw numbers of its own, in an epoch the same in every run.

        One process goes on with those that it draws anyway.
        """

    def align(self, network: nn.Module) -> None:
        """Give all ranks the buffers of rank 0, once they are known to have its parameters.

        Raises:
            InputError: if they do not.
        """

    @contextmanager
    def announced(self, order: Any) -> Iterator[None]:
        """What is done inside the others do too, at rank 0's order; on them, nothing is told.

        They are ready for the next order afterwards, and also if it ends in `Diverged`, which it
        then does on all ranks.
        """
        yield

    def hear(self) -> Any:
        """Rank 0's next order; None when there is none any more."""
        return None

    def sends(self, key: str) -> bool:
        """Whether rank 0 has to send what has this name: others hold on to the last such thing."""
        return False

    def first_to(self, what: str) -> bool:
        """Whether this is the first rank, since they were started, that asks this."""
        return True


class Group(Ranks):
    """A process group.

    Args:
        group: torch's, for what ranks do at the same time.
        orders: one of the same ranks for what rank 0 has them do; None for a rank by itself.
        store: what all of them can look at.
    """

    def __init__(self, group: Any, orders: Any, store: Any) -> None:
        self.number, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._orders, self._store = group, orders, store
        self._alone: Group | None = None
        self._weight = 1.0
        self._sent: str | None = None
        self._busy = False

    def alone(self) -> Ranks:
        if self._alone is None:
            own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            self._alone = Group(own, None, self._store)
        return self._alone

    def check(self, device: str, batch: int) -> None:
        if batch < self.count:
            raise InputError(
                f"{self.count} ranks cannot share batches of {batch} images: give torchrun a "
                f"smaller --nproc-per-node, or a larger --batch-size"
            )
        where = torch.device(device)
        if where.type not in ("cpu", "cuda"):
            raise InputError(f"--device {device}: several ranks train on cpu or cuda only")
        if where.type == "cpu" or self.count == 1:
            return
        if where.index is not None:
            raise InputError(
                f"--device {device} is one device for {self.count} ranks: give cuda, and each "
                "rank takes one of its machine's"
            )
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if local > torch.cuda.device_count():
            raise InputError(
                f"--device cuda: this machine has {torch.cuda.device_count()} GPUs for {local} "
                "ranks: give torchrun a smaller --nproc-per-node, or --device cpu"
            )

    def share(self, size: int) -> slice:
        # Parts differ by one image at most, and the first ones are the larger ones.
        part, more = divmod(size, self.count)
        first = self.number * part + min(self.number, more)
        return slice(first, first + part + (self.number < more))

    def parallel(self, network: nn.Module) -> nn.Module:
        parallel = DistributedDataParallel(network, process_group=self._group)
        # In place of the mean of ranks' gradients, in which images of a smaller share weigh more.
        parallel.register_comm_hook(None, lambda state, bucket: self._added(bucket))
        return parallel

    def _added(self, bucket: Any) -> Any:
        work = dist.all_reduce(bucket.buffer().mul_(self._weight), group=self._group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda done: done.value()[0])

    def weigh(self, share: float) -> None:
        self._weight = share

    def totals(self, numbers: Tensor) -> list[float]:
        dist.all_reduce(numbers, group=self._group)
        return super().totals(numbers)

    def reseed(self, seed: int, epoch: int) -> None:
        if self.count > 1:
            text = f"{seed} {epoch} {self.number}".encode()
            mixed = hashlib.blake2b(text, digest_size=7).digest()
            torch.manual_seed(int.from_bytes(mixed, "big"))

    def align(self, network: nn.Module) -> None:
        bits = [p.detach().flatten().view(torch.int32).sum() for p in network.parameters()]
        own = torch.stack(bits)
        extremes = torch.stack([own, -own])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, self._group)
        if not torch.equal(extremes[0], -extremes[1]):
            raise InputError(
                "the ranks' networks have come apart: ranks must be the same kind of processor, "
                "with the same version of torch"
            )
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0, group=self._group)

    @contextmanager
    def announced(self, order: Any) -> Iterator[None]:
        if self._orders is None or self.number:
            yield
            return
        self._busy = True
        self._tell(order)
        try:
            yield
        except Diverged:
            self._busy = False
            raise
        self._busy = False

    def sends(self, key: str) -> bool:
        new = key != self._sent
        self._sent = key
        return new

    def _tell(self, order: Any) -> None:
        dist.broadcast_object_list([order], src=0, group=self._orders)

    def hear(self) -> Any:
        box = [None]
        dist.broadcast_object_list(box, src=0, group=self._orders)
        return box[0]

    def first_to(self, what: str) -> bool:
        try:
            return bool(self._store.add(what, 1) == 1)
        except RuntimeError:  # whoever kept the store is gone: better twice than not at all
            return True

    def leave(self) -> None:
        """End together with the others, unless they are in the middle of something."""
        if self._busy:
            return
        if self.number == 0:
            self._tell(None)
        # One that leaves first may end the others' threads under their hands.
        dist.barrier(self._orders)
        dist.destroy_process_group()


_current = Ranks()


def current() -> Ranks:
    """The ranks that this process is one of."""
    return _current


def launched() -> bool:
    """Whether ``torchrun`` started this process, and may start it again with the same options."""
    return dist.is_available() and dist.is_torchelastic_launched()


def follows() -> bool:
    """Whether this process is another rank than 0 of several."""
    return launched() and int(os.environ["RANK"]) > 0


def join() -> Ranks:
    """Meet the other ranks, if ``torchrun`` started several; all must, and stay until `leave`.

    Raises:
        InputError: if not all come within the time limit.
    """
    global _current
    if isinstance(_current, Group) or not launched() or os.environ["WORLD_SIZE"] == "1":
        return _current
    # Not in every build of torch.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    local = int(os.environ["LOCAL_RANK"])
    # Ranks speak of small things on the CPU, and of gradients where these are.
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
    try:
        kept, number, count = next(rendezvous("env://", timeout=TIMEOUT))
        store = PrefixStore(_meeting(kept, number, count), kept)
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=TIMEOUT
        )
        orders = dist.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise InputError(f"the ranks did not meet: {first_words(error)}") from error
    _current = Group(dist.group.WORLD, orders, store)
    return _current


def _meeting(store: Any, number: int, count: int) -> str:
    """A name that the ranks started now have in common, and those before them had not.

    ``torchrun`` keeps its store when it starts ranks again, and in it addresses of those that are
    gone, which others would try to reach. So rank 0 answers each rank under a name that only this
    process has, until all have understood.

    Raises:
        InputError: if a rank is missing after the time limit.
    """
    own = uuid.uuid4().hex
    if number:
        store.set(f"rank {number}", own)
        name = str(store.get(own).decode())
        store.set(f"{name} {number}", "")
        return name
    answered: dict[int, str] = {}
    missing = list(range(1, count))
    end = time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"rank {other}"]):
                asks = store.get(f"rank {other}").decode()
                if asks != answered.get(other):
                    store.set(asks, own)
                    answered[other] = asks
        missing = [other for other in missing if not store.check([f"{own} {other}"])]
        if time.monotonic() > end:
            raise InputError(f"the ranks did not meet: of {count}, there is no rank {missing[0]}")
        time.sleep(0.02)
    return own


def leave() -> None:
    """End together with the other ranks, if there are any, and they are still there."""
    with suppress(InputError, RuntimeError):
        ranks = join()
        if isinstance(ranks, Group):
            ranks.leave()


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another rank ended or did not answer."""
    return isinstance(_current, Group) and (
        isinstance(error, dist.DistError) or "gloo" in str(error)
    )


def first_words(error: BaseException) -> str:
    """What an error says first, without the place in torch's code."""
    text = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
    return text.partition("] ")[2] or text if text.startswith("[") else text


def ignore_interrupts() -> None:
    """Leave Ctrl-C to rank 0, which ends what all are at in good order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
