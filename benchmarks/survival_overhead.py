"""What surviving costs where memory never runs out: the `Survivor` against the bare step, on RF-DETR.

    python benchmarks/survival_overhead.py [--resolution 128] [--groups 4] [--rounds 9]

Rounds alternate, so that a noisy machine slows both alike; CPU time, window of four images in micro-batches of two. Then
what the `Survivor` adds (a snapshot of random numbers and buffers) and the agreement of two gloo ranks after each window
are timed alone and set beside the step: these figures have no noise of the step in them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from step_overhead import CPU, MICRO_BATCH, make
from trainfit.step import ranks
from trainfit.step.ema import ema_copy
from trainfit.step.training_step import TrainingStep
from trainfit.training.oom import Survivor, snapshot

AGREED = ("failed", "stop", "save")
REPEATS = 300


def cpu_s(action: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    action()
    return time.process_time() - started


def agreement(rank: int, folder: str) -> None:
    """Time one agreement between two ranks; rank 0 writes the median in seconds."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    seconds: list[float] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        ranks.sum_over_ranks(dict.fromkeys(AGREED, 0.0))
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        Path(folder, "median").write_text(str(statistics.median(seconds)))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    workload, model, optimizer, window = make(arguments.resolution, arguments.groups)
    step = TrainingStep(model=model, objective=workload.objective, optimizer=optimizer, device=CPU, ema=ema_copy(model))
    survivor = Survivor(MICRO_BATCH)
    times: dict[str, list[float]] = {"bare": [], "surviving": []}
    for round_ in range(arguments.rounds + 1):
        bare = cpu_s(lambda: step.run(window, micro_batch=MICRO_BATCH, step=0))
        surviving = cpu_s(lambda: survivor.run(step, window, number=0))
        if round_:  # the first one warms up
            times["bare"].append(bare)
            times["surviving"].append(surviving)
    ratios = sorted(a / b for a, b in zip(times["surviving"], times["bare"], strict=True))
    median_s = statistics.median(times["bare"])
    print(
        f"CPU time a step: surviving / bare = {statistics.median(ratios):.4f} median of {len(ratios)} rounds "
        f"({ratios[0]:.4f} to {ratios[-1]:.4f}); bare step {median_s:.3f} s"
    )
    added: list[float] = []
    for _ in range(REPEATS):
        added.append(cpu_s(lambda: snapshot(model, CPU)))
    alone = statistics.median(added)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(agreement, (folder,), nprocs=2, start_method="spawn")
        two = float(Path(folder, "median").read_text())
    print(f"what it adds, alone: {alone * 1e6:.0f} us = {alone / median_s:.4%} of the step")
    print(f"agreement of two gloo ranks: {two * 1e6:.0f} us = {two / median_s:.4%} of the step")


if __name__ == "__main__":
    main()
