"""Joining the processes that torchrun starts."""

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from trainfit.errors import TrainfitError


@contextmanager
def process_group(device: str) -> Generator[torch.device]:
    """The device of this process; joins the others first if torchrun started it (`WORLD_SIZE` in the environment).

    Collectives of CPU tensors go by gloo in every run, so that agreeing on counts never waits for the GPU.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ:
        yield chosen
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU.

    Raises:
        TrainfitError: `cuda` without a GPU for this rank.
    """
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise TrainfitError(
            f"process {local_rank} has no GPU ({gpus} found): use --nproc-per-node {gpus} or --device cpu"
        )
    return torch.device("cuda", local_rank)
