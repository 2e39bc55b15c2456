"""One epoch of ResNet20 of width 64 on CIFAR-10, by TEKFAC and by SGD, TF32."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tekfac
from benchmarks.gpu import networks
from benchmarks.gpu.part import Results, options_of
from tekfac.networks import build

WORDS = (
    "Batches of 128, shifted by up to 4 pixels and mirrored, learning rate falling to zero along "
    "half a cosine over the epoch. Seconds are of the wall, the first steps' share included."
)


def images(file: Path | None, tiny: bool, device: torch.device) -> tuple[str, list[Tensor]]:
    """Training images and labels, then test images and labels, and what they are."""
    if file is None:
        count = 24 if tiny else 50_000
        torch.manual_seed(0)
        x, y = torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
        found = [x, y, x[: count // 5], y[: count // 5]]
        return "random images", [tensor.to(device) for tensor in found]
    import numpy as np

    with np.load(file) as archive:
        arrays = [archive[k] for k in ("x_train", "y_train", "x_test", "y_test")]
    if tiny:
        arrays = [array[:24] for array in arrays]
    found = []
    for array in arrays:
        tensor = torch.from_numpy(array).to(device)
        if tensor.dim() == 4:
            tensor = tensor.permute(0, 3, 1, 2).float() / 255
            tensor = (tensor - 0.47) / 0.25
        else:
            tensor = tensor.long().flatten()
        found.append(tensor.contiguous())
    return file.stem, found


def augmented(x: Tensor) -> Tensor:
    """Shifted as a whole by a few pixels, and each image mirrored or not."""
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    # Numbers of the host's own: a shift read from the device would be waited for.
    i, j = torch.randint(9, (2,)).tolist()
    return F.pad(x, (4, 4, 4, 4))[:, :, i : i + 32, j : j + 32]


def main() -> None:
    """Train with each, and test."""
    options = options_of(__doc__, ("--data", {"type": Path}))
    device, tiny = options.device, options.tiny
    networks.set_precision("TF32")
    words, (x, y, test_x, test_y) = images(options.data, tiny, device)
    results = Results(options.out, f"An epoch of ResNet20-64 on {words}", device, WORDS)
    size = 8 if tiny else 128
    for name in ("SGD", "TEKFAC"):
        torch.manual_seed(0)
        network = build("resnet20", (3, 32, 32), 10, 2 if tiny else 64).to(device)
        optimizer: Any
        if name == "SGD":
            optimizer = torch.optim.SGD(
                network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
            )
        else:
            optimizer = tekfac.TEKFAC(network, lr=1e-2, weight_decay=1e-2)
        steps = len(x) // size
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.randperm(len(x), device=device)
        _wait(device)
        start = time.perf_counter()
        losses = []
        for step in range(steps):
            some = order[step * size : (step + 1) * size]
            optimizer.zero_grad()
            loss = F.cross_entropy(network(augmented(x[some])), y[some])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        _wait(device)
        seconds = time.perf_counter() - start
        network.eval()
        with torch.no_grad():
            hits = [
                (network(a).argmax(1) == b).float().sum()
                for a, b in zip(test_x.split(1000), test_y.split(1000), strict=True)
            ]
        results.add(
            "epochs",
            optimizer=name,
            seconds=seconds,
            steps=steps,
            **{"last loss": float(torch.stack(losses[-max(1, steps // 10) :]).mean())},
            **{"test accuracy (%)": 100 * float(torch.stack(hits).sum()) / len(test_y)},
            counters=str(getattr(optimizer, "counters", "")),
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
