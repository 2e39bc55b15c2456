"""Several processes train one model that `fully_shard` divides among them, and save and resume.

    torchrun --nproc-per-node 2 examples/fsdp.py --steps 60 --checkpoint run.pt

The optimizer gets the model after `fully_shard`; everything else is as with any optimizer. A run
that finds its checkpoint goes on from it, with as many processes as there are then.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tekfac

BATCH = 64  # of all ranks together


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Points on a plane, and which of three arms of a spiral each is on."""
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(3, (BATCH,), generator=generator)
    radius = torch.rand(BATCH, generator=generator)
    noise = 0.1 * torch.randn(BATCH, generator=generator)
    angle = 4 * radius + 2.0944 * y + noise
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


def main() -> None:
    """Train for some steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--placement", default="sharded")
    options = parser.parse_args()

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)
    ).to(device)
    mesh = init_device_mesh(device.type, (ranks,))
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = tekfac.TEKFAC(model, lr=1e-2, placement=options.placement)

    first = 0
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if options.checkpoint is not None and options.checkpoint.exists():
        # Every rank loads all of it, and keeps what it holds.
        saved = torch.load(options.checkpoint, map_location=device)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        first = saved["step"]

    for step in range(first, options.steps):
        x, y = (part.to(device)[rank::ranks] for part in batch_of(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {mean.item() / ranks:.4f}")

    if options.checkpoint is not None:
        # All ranks ask: each has a part of everything.
        states = get_state_dict(model, optimizer, options=whole)
        if rank == 0:
            saved = {"model": states[0], "optimizer": states[1], "step": options.steps}
            torch.save(saved, options.checkpoint)
    # One that leaves first may end the others' threads under their hands.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
