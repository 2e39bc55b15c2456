"""The training loop, the same for every optimizer, and its resumable run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from tekfac import networks
from tekfac.data import Dataset
from tekfac.data.augmentation import crop_and_flip
from tekfac.errors import Diverged, InputError
from tekfac.runs import optimizers
from tekfac.runs.config import PRECISIONS, Config
from tekfac.runs.folder import RunFolder
from tekfac.runs.metrics import EpochMetrics, History
from tekfac.runs.ranks import Ranks, current, lost

EVALUATION_BATCH = 1000
# Apart from the sampled labels', whose generator has the same seed: or else one draw would follow
# from the other.
AUGMENTATION_SEED = 0x9E3779B9

ALONE = Ranks()


@dataclass(frozen=True)
class BatchProgress:
    """How far an epoch is: batches done, and loss and accuracy over them."""

    epoch: int
    batch: int
    batches: int
    loss: float
    accuracy: float
    seconds: float


class Watcher:
    """Is told how a run gets on. This one takes no notice; subclasses show it to the user."""

    def on_start(self, config: Config, history: History, batches: int) -> None:
        """Training is about to go on after the epochs in ``history``, of ``batches`` each."""

    def on_batch(self, progress: BatchProgress) -> None:
        """A batch is done."""

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is done and its checkpoint written."""


class Training:
    """All that changes as a run goes on: network, optimizer, schedule, generators, history.

    Seeds torch's global generator and sets its number of threads, so that one process should have
    one run at a time.

    Args:
        config: what to do.
        data: the data set that ``config.data`` names.
        ranks: who trains; all of them make, and call, the same. What a batch comes to is what one
            process would have, but that each rank's batch norm sees its own shard.

    Raises:
        InputError: if the network or the optimizer cannot be built so, or ranks cannot share it.
    """

    def __init__(self, config: Config, data: Dataset, ranks: Ranks = ALONE) -> None:
        ranks.check(config.device, config.batch_size)
        torch.set_num_threads(config.threads)
        if torch.device(config.device).type == "cuda":
            # cuDNN's fastest kernels may add up in another order each time.
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        self.config = config
        self._ranks = ranks
        self.history: list[EpochMetrics] = []
        self._batches = math.ceil(len(data.y_train) / config.batch_size)
        torch.manual_seed(config.seed)
        # Built on the CPU: the same seed then means the same weights on every device.
        self.network = networks.build(config.network, data.image_shape, data.classes, config.width)
        layout = _layout(self.network)
        self._data = _laid_out(data.to(config.device), layout)
        self.network.to(config.device).to(memory_format=layout)
        parallel = ranks.parallel(self.network)
        # A form for each size of batch, full or last: one for all sizes would come into use at some
        # time of a session, and a resumed run then differ in its last bits.
        self._called: Callable[[Tensor], Any] = parallel
        self._refusals: tuple[type[Exception], ...] = ()
        if config.compile:
            from torch._dynamo.exc import TorchDynamoException  # takes seconds

            self._called = torch.compile(parallel, dynamic=False)
            self._refusals = (TorchDynamoException,)
        self._order = torch.Generator().manual_seed(config.seed)
        self._augmentation = torch.Generator(config.device)
        self._augmentation.manual_seed(config.seed + AUGMENTATION_SEED)
        self.optimizer = optimizers.build(
            config.optimizer,
            parallel,
            config.settings,
            torch.Generator(config.device).manual_seed(config.seed),
        )
        self._scaler = torch.amp.GradScaler(
            torch.device(config.device).type, enabled=config.precision == "fp16"
        )
        self._scheduler = LambdaLR(
            self.optimizer,
            lambda step: config.schedule.factor(step, self._batches, config.epochs),
        )

    @property
    def batches(self) -> int:
        """Batches, and so optimizer steps, in an epoch."""
        return self._batches

    def run_epoch(self, watcher: Watcher) -> EpochMetrics:
        """Train for one epoch, evaluate, and add the metrics to the history.

        Raises:
            Diverged: if a batch's loss or the test loss is not finite; the history is as it was.
            InputError: if ranks' networks are not the same any more.
        """
        with self._ranks.announced(Order.EPOCH):
            return self._run_epoch(watcher)

    def _run_epoch(self, watcher: Watcher) -> EpochMetrics:
        before = self.history[-1].seconds if self.history else 0.0
        start = time.perf_counter()
        train_loss, train_accuracy, lr = self._train_epoch(watcher, clock_zero=start - before)
        seconds = before + time.perf_counter() - start
        self._ranks.align(self.network)
        with self._autocast():
            test_loss, test_accuracy = evaluate(self.network, self._data, self._ranks)
        epoch = len(self.history) + 1
        if not math.isfinite(test_loss):
            raise Diverged(f"the test loss became {test_loss} in epoch {epoch}")
        metrics = EpochMetrics(
            epoch=epoch,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            lr=lr,
            seconds=seconds,
        )
        self.history.append(metrics)
        return metrics

    def _train_epoch(self, watcher: Watcher, clock_zero: float) -> tuple[float, float, float]:
        epoch = len(self.history) + 1
        images, labels = self._data.x_train, self._data.y_train
        order = torch.randperm(len(labels), generator=self._order).to(labels.device)
        self._ranks.reseed(self.config.seed, epoch)
        self.network.train()
        seen, loss_sum, correct_sum, lr = 0, 0.0, 0.0, 0.0
        for batch, index in enumerate(order.split(self.config.batch_size), start=1):
            part = self._ranks.share(len(index))
            x, y = images[index[part]], labels[index[part]]
            if self.config.augment:
                x = crop_and_flip(x, self._augmentation, len(index), part)
            share = len(y) / len(index)
            self._ranks.weigh(share)
            self.optimizer.zero_grad()
            with self._autocast():
                output = self._forward(self._data.standardised(x))
                # The mean over no image is no number, but all ranks have to go backward.
                loss = F.cross_entropy(output, y) if len(y) else output.sum()
            self._scaler.scale(loss).backward()
            # One transfer from the device, not two.
            mean_loss, correct = self._ranks.totals(
                torch.stack([share * loss.detach(), _correct(output, y)])
            )
            if not math.isfinite(mean_loss):
                raise Diverged(
                    f"the training loss became {mean_loss} in epoch {epoch}, batch {batch}"
                )
            lr = self.optimizer.param_groups[0]["lr"]
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self._scheduler.step()
            seen += len(index)
            loss_sum += mean_loss * len(index)
            correct_sum += correct
            watcher.on_batch(
                BatchProgress(
                    epoch=epoch,
                    batch=batch,
                    batches=self._batches,
                    loss=loss_sum / seen,
                    accuracy=correct_sum / seen,
                    seconds=time.perf_counter() - clock_zero,
                )
            )
        if labels.is_cuda:
            torch.cuda.synchronize(labels.device)
        return loss_sum / seen, correct_sum / seen, lr

    def _forward(self, x: Tensor) -> Tensor:
        try:
            output: Tensor = self._called(x)
        except self._refusals as error:
            reason = " ".join(str(error).split("\n")[:2]).strip()
            raise InputError(
                f"--compile: torch cannot compile {self.config.network} here ({reason}): begin a "
                "new run without it"
            ) from error
        return output

    def _autocast(self) -> torch.autocast:
        """Layers compute in the configuration's precision; parameters stay in float32."""
        precision = PRECISIONS[self.config.precision]
        device = torch.device(self.config.device).type
        return torch.autocast(device, precision, enabled=precision != torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing needs, as plain values and tensors; all ranks must ask.

        Rank 0's will do for all: in what they draw, the others follow from it.
        """
        with self._ranks.announced(Order.STATE):
            return self._state_dict()

    def _state_dict(self) -> dict[str, Any]:
        device = torch.device(self.config.device)
        return {
            "history": [asdict(metrics) for metrics in self.history],
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "order_rng": self._order.get_state(),
            "augmentation_rng": self._augmentation.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same configuration and data."""
        self.history = [EpochMetrics(**metrics) for metrics in state["history"]]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        self._order.set_state(state["order_rng"])
        self._augmentation.set_state(state["augmentation_rng"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], torch.device(self.config.device))


class Order(Enum):
    """What rank 0 has the others do with the training that they have begun."""

    EPOCH = "an epoch"
    STATE = "its state"


@dataclass(frozen=True)
class Beginning:
    """What all ranks begin a training with.

    Attributes:
        config: what to do.
        path: the run's folder, for messages: rank 0 alone looks into it.
        checkpoint: what to go on from; None for the start.
        data: the data set; None where the ranks have it from the training before.
    """

    config: Config
    path: Path
    checkpoint: dict[str, Any] | None
    data: Dataset | None

    def training(self, data: Dataset, ranks: Ranks) -> Training:
        """The training with these data.

        Raises:
            InputError: if the parts cannot be built, or the checkpoint does not fit.
        """
        training = Training(self.config, data, ranks)
        if self.checkpoint is not None:
            try:
                training.load_state_dict(self.checkpoint)
            except (KeyError, ValueError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and lost(error):
                    raise
                raise InputError(
                    f"the checkpoint in {self.path} does not fit its configuration: {error}"
                ) from error
        return training


def follow(ranks: Ranks) -> None:
    """Do, as another rank than 0, what rank 0 says, until it says no more.

    Raises:
        InputError: where rank 0 has the same error, or ought to.
    """
    data: Dataset | None = None
    training: Training | None = None
    while (order := ranks.hear()) is not None:
        with suppress(Diverged):
            if isinstance(order, Beginning):
                data, training = order.data or data, None
                assert data is not None
                training = order.training(data, ranks)
                continue
            assert training is not None
            if order is Order.EPOCH:
                training.run_epoch(Watcher())
            else:
                training.state_dict()


def check(config: Config, data: Dataset) -> None:
    """Raise what building a run would raise, before anything of it is written.

    Raises:
        InputError: if the network or the optimizer cannot be built so, or ranks cannot share it.
    """
    ranks = current()
    ranks.check(config.device, config.batch_size)
    Training(config, data, ranks.alone())


def fit(folder: RunFolder, data: Dataset, watcher: Watcher, epochs: int | None = None) -> History:
    """Carry a run through to its end, from the start or from its checkpoint.

    After each epoch the checkpoint and ``metrics.csv`` are replaced, and TensorBoard's files, if
    the run has any, added to. The curves are drawn at the end, also when training ends early by an
    error or an interruption. A finished run is left as it is.

    Args:
        folder: the run.
        data: the data set that its configuration names.
        watcher: is told how the run gets on; ``on_start`` is not called for a finished run.
        epochs: a new number of epochs, or None to leave it.

    Returns:
        The metrics of all epochs.

    Raises:
        InputError: if the parts cannot be built or compiled, the checkpoint does not fit, or the
            number of epochs cannot be changed.
        Diverged: if the training loss is not finite; the last epoch's checkpoint stays.
    """
    digest = data.digest()
    checkpoint = folder.load_checkpoint()
    history = [] if checkpoint is None else [EpochMetrics(**m) for m in checkpoint["history"]]
    if checkpoint is not None and checkpoint["data_digest"] != digest:
        raise InputError(
            f"the data {folder.config.data} are not those that the run in {folder.path} began "
            "with: put them back, or begin a new run"
        )
    if epochs is not None:
        folder.set_epochs(epochs, done=len(history))
    try:
        if len(history) < folder.config.epochs:
            training = _begun(folder, data, digest, checkpoint)
            history = training.history
            watcher.on_start(folder.config, history, training.batches)
            if checkpoint is None:
                folder.save_checkpoint({"data_digest": digest, **training.state_dict()})
            while len(history) < folder.config.epochs:
                metrics = training.run_epoch(watcher)
                folder.save_checkpoint({"data_digest": digest, **training.state_dict()})
                folder.save_metrics(history)
                folder.save_events(history)
                watcher.on_epoch(metrics)
    finally:
        folder.save_curves(history)
    folder.save_metrics(history)
    folder.save_events(history)
    return history


def _layout(network: nn.Module) -> torch.memory_format:
    """How a network's kernels and images lie in memory: each pixel's channels side by side.

    Convolutions are faster so, in bfloat16 up to twice. Not where channels are no multiple of 8:
    1×1 convolutions with a stride then write past their memory in torch's backward pass (2.14.1,
    on processors without AVX-512), and end the process.
    """
    convolutions = (each for each in network.modules() if isinstance(each, nn.Conv2d))
    whole = all(each.out_channels % 8 == 0 for each in convolutions)
    return torch.channels_last if whole else torch.contiguous_format


def _laid_out(data: Dataset, layout: torch.memory_format) -> Dataset:
    """The same images; batches of them lie in memory as they do."""
    return replace(
        data,
        x_train=data.x_train.contiguous(memory_format=layout),
        x_test=data.x_test.contiguous(memory_format=layout),
    )


def _begun(
    folder: RunFolder, data: Dataset, digest: str, checkpoint: dict[str, Any] | None
) -> Training:
    """The training in a folder, begun by all ranks."""
    ranks = current()
    sent = data if ranks.sends(digest) else None
    beginning = Beginning(folder.config, folder.path, checkpoint, sent)
    with ranks.announced(beginning):
        return beginning.training(data, ranks)


@torch.no_grad()
def evaluate(network: nn.Module, data: Dataset, ranks: Ranks = ALONE) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on the test images in evaluation mode, which is left on.

    Ranks take batches in turn.
    """
    network.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    batches = list(
        zip(data.x_test.split(EVALUATION_BATCH), data.y_test.split(EVALUATION_BATCH), strict=True)
    )
    for x, y in batches[ranks.number :: ranks.count]:
        output = network(data.standardised(x))
        loss = F.cross_entropy(output, y, reduction="sum")
        sums += torch.stack([loss, _correct(output, y)]).cpu()
    loss_sum, correct_sum = ranks.totals(sums)
    return loss_sum / len(data.y_test), correct_sum / len(data.y_test)


def _correct(output: Tensor, labels: Tensor) -> Tensor:
    # Not in the output's type, which may be too coarse to count in.
    return (output.detach().argmax(dim=1) == labels).sum().float()
