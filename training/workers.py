"""Train with one or several worker processes on one machine, started by `torchrun`, which average their gradients.

On a CPU, two workers with one thread each are faster than one worker with two threads, because the layers of these
models are too small to benefit from several threads.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

# A worker may be suspended for a while (SIGSTOP) to free the machine for other work.
_PATIENCE = datetime.timedelta(hours=6)


def start(device: str, pid_folder: Path | None = None) -> int:
    """Connect to the other workers, if there are any, and return this worker's rank.

    If `pid_folder` is given, every worker writes its process id there, so that it can be suspended.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rank, world = int(os.environ.get("RANK", "0")), world_size()
    if pid_folder is not None:
        pid_folder.mkdir(parents=True, exist_ok=True)
        (pid_folder / f"worker{rank}.pid").write_text(f"{os.getpid()}\n")
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=_PATIENCE)
    return rank


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient with its mean over the workers, in a single message."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def same_for_all(value: float, device: str) -> float:
    """Return the value of rank 0, for decisions that depend on the clock."""
    if world_size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared.item())
