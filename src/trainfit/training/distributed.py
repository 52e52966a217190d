"""Joins the processes that torchrun starts into a process group."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from trainfit.errors import TrainfitError
from trainfit.step.ranks import LostRankError, collective

TIMEOUT = timedelta(minutes=10)
"""Time that a collective waits for a rank that still runs but does not answer. A rank that ended is noticed at once."""


@contextmanager
def process_group(device: str) -> Generator[torch.device]:
    """The device of this process; joins the others first if torchrun started it (`WORLD_SIZE` in the environment).

    Collectives of CPU tensors go by gloo in every run, so that agreeing on counts never waits for the GPU. NCCL's
    communicator and its buffers are made here, while the GPU is empty, and not by the first collective, at the peak of
    the first window.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ:
        yield chosen
        return
    if chosen.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=chosen)
        with collective():
            dist.all_reduce(torch.zeros(1, device=chosen))  # connects the channels, which allocates their buffers
            torch.cuda.synchronize(chosen)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield chosen
    except LostRankError:
        if chosen.type == "cuda":  # a collective that waits for the lost rank on the GPU would never end
            dist.distributed_c10d._abort_process_group()  # pyright: ignore[reportPrivateUsage]
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_device(device: str, local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU.

    Raises:
        TrainfitError: `cuda` without a GPU for this rank.
    """
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    if not gpus:
        raise TrainfitError("--device cuda: torch finds no GPU here; --device cpu trains on the CPU")
    if local_rank >= gpus:
        raise TrainfitError(
            f"process {local_rank} has no GPU ({gpus} found): use --nproc-per-node {gpus} or --device cpu"
        )
    return torch.device("cuda", local_rank)
