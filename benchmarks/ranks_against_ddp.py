"""Two gloo ranks of trainfit's step against DistributedDataParallel: same model, images, optimizer and machine.

    python benchmarks/ranks_against_ddp.py [--resolution 128] [--groups 4] [--rounds 15] [--images 2]

Accumulation 1: each rank runs one micro-batch a step. Both loops compute upstream's losses with autocast off, clip, and step
the same fused AdamW; DDP gets the rank's mean loss, so its numbers differ slightly, not its work. It reduces through
`DistributedDataParallel` with its defaults, and `gradient_as_bucket_view=True` as a third column, its leanest setting.
Rounds are interleaved, and a round of each begins behind a barrier. Prints the ratio of the medians of wall time, and the
spread of the rounds' own ratios.

Measured on 25 November 2026 on two cores that other programs used too (load 8), 128 px, 4 groups, 10 rounds:
ours / ddp = 1.040 of the medians (half of the rounds 0.923 to 1.167), ours / ddp views = 0.999 (0.918 to 1.070).
"""

import argparse
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from step_overhead import CPU, make
from trainfit.models.rfdetr.data import to_batch, to_targets
from trainfit.step.training_step import TrainingStep

CLIP = 0.1


def ours(options: argparse.Namespace, rank: int) -> Callable[[], object]:
    """The step that trainfit trains with, without EMA, which DDP has none of."""
    workload, model, optimizer, window = make(options.resolution, options.groups)
    step = TrainingStep(model=model, objective=workload.objective, optimizer=optimizer, device=CPU, clip_norm=CLIP)
    share = window[rank::2][: options.images]
    return lambda: step.run(share, micro_batch=options.images, step=0)


def ddp(options: argparse.Namespace, rank: int, **settings: Any) -> Callable[[], object]:
    """What one writes by hand over upstream's model and criterion."""
    workload, model, optimizer, window = make(options.resolution, options.groups)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, **settings)
    like, weights, share = next(model.parameters()), workload.criterion.weight_dict, window[rank::2][: options.images]

    def run() -> None:
        targets = to_targets(share, like)
        outputs = wrapped(to_batch(share, (options.resolution, options.resolution), like), targets)
        losses = workload.criterion(outputs, targets)
        torch.stack([losses[k] * w for k, w in weights.items() if k in losses]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return run


def alone(options: argparse.Namespace, rank: int) -> Callable[[], object]:
    """The same loop without any exchange: what both spend on computing."""
    workload, model, optimizer, window = make(options.resolution, options.groups)
    like, weights, share = next(model.parameters()), workload.criterion.weight_dict, window[rank::2][: options.images]

    def run() -> None:
        targets = to_targets(share, like)
        losses = workload.criterion(model(to_batch(share, (options.resolution,) * 2, like), targets), targets)
        torch.stack([losses[k] * w for k, w in weights.items() if k in losses]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(rank: int, options: argparse.Namespace, port: int) -> None:
    """Time every loop on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    loops = {
        "ours": ours(options, rank),
        "ddp": ddp(options, rank),
        "ddp views": ddp(options, rank, gradient_as_bucket_view=True),
        "alone": alone(options, rank),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(options.rounds + 2):
        names = list(loops) if round_ % 2 else list(reversed(loops))
        for name in names:
            dist.barrier()
            started = time.perf_counter()
            loops[name]()
            dist.barrier()
            if round_ > 1:  # the first ones warm up: DDP makes its buckets anew, we learn their order
                times[name].append(time.perf_counter() - started)
    if rank == 0:
        report(times)
    dist.destroy_process_group()


def report(times: dict[str, list[float]]) -> None:
    """Print medians and ratios."""
    for name, own in times.items():
        print(f"{name:10} {1e3 * statistics.median(own):8.1f} ms a step ({1e3 * min(own):.1f} to {1e3 * max(own):.1f})")
    for other in ("ddp", "ddp views"):
        ratios = sorted(a / b for a, b in zip(times["ours"], times[other], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        medians = statistics.median(times["ours"]) / statistics.median(times[other])
        print(
            f"ours / {other} = {medians:.3f} of the medians; {statistics.median(ratios):.3f} median of the rounds, half of "
            f"them {low:.3f} to {high:.3f}, all {ratios[0]:.3f} to {ratios[-1]:.3f}"
        )


def main() -> None:
    """Measure on two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=2, help="images a rank")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(measure, (options, port), nprocs=2, start_method="spawn")


if __name__ == "__main__":
    main()
