"""What watching a run costs: a step whose micro-batch gradients are measured for the noise scale, and the journal.

    python benchmarks/watch_overhead.py [--resolution 64] [--rounds 15]

Steps of RF-DETR Nano with and without the watch alternate, so that a noisy machine slows both alike. Prints the ratio
of the medians with the spread of the rounds, the same shared out over the windows that are not watched, and the time
that the journal and the clock take of a window.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from trainfit.models.rfdetr.family import RfDetrKnobs
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.models.workload import OptimizerSettings
from trainfit.step.optimizer import make_adamw
from trainfit.step.training_step import StepResult, TrainingStep
from trainfit.tasks.detection.read import read_dataset
from trainfit.training.journal import Journal
from trainfit.training.loader import Loaded
from trainfit.training.noise_watch import EVERY, NoiseWatch
from trainfit.training.telemetry import Silent

CPU = torch.device("cpu")


def journal_s(result: StepResult, windows: int = 200) -> float:
    """Seconds that noting a window takes, its share of the clock included."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(
            Path(folder),
            after_step=0,
            pending_evaluation=False,
            total_steps=windows,
            steps_per_epoch=windows,
            device=CPU,
            began=time.perf_counter(),
            workers=0,
            effective_batch=4,
            trackers=(),
            show=Silent(),
        )
        item = Loaded()
        item.load_s = 0.0
        started = time.perf_counter()
        for step, _ in enumerate(journal.clock.fetch([item] * windows), start=1):
            journal.window(result, step=step, lr=1e-4, size=64)
        seconds = (time.perf_counter() - started) / windows
        journal.close(windows, interrupted=False, unseen=None)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = read_dataset("sample")
    workload = RfDetr("rfdetr-nano", data.classes, RfDetrKnobs(resolution=given.resolution, groups=1, num_queries=30))
    model = workload.build()
    optimizer = make_adamw(workload.parameter_groups(model, OptimizerSettings()))
    step = TrainingStep(model=model, objective=workload.objective, optimizer=optimizer, device=CPU)
    decode, generator = workload.decoder(), torch.Generator()
    records = data.splits["train"][:4]
    window = [decode(r, size=given.resolution, augment=frozenset(), generator=generator) for r in records]
    watch = NoiseWatch(step)
    result = step.run(window, micro_batch=2, step=0)
    seconds: dict[int, list[float]] = {0: [], EVERY - 1: []}
    for _ in range(given.rounds):
        for number, times in seconds.items():
            started = time.perf_counter()
            with watch.window(number):
                result = step.run(window, micro_batch=2, step=0)
            watch.sample(result, disturbed=False)
            times.append(time.perf_counter() - started)
    plain, watched = seconds.values()
    ratios = sorted(b / a for a, b in zip(plain, watched, strict=True))
    ratio = statistics.median(watched) / statistics.median(plain)
    print(
        f"step {statistics.median(plain):.3f} s; watched {ratio:.3f} times (rounds {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    print(f"one window in {EVERY} is watched: {100 * (ratio - 1) / EVERY:+.2f} % of all")
    share = journal_s(result) / statistics.median(plain)
    print(
        f"journal and clock: {1000 * share * statistics.median(plain):.2f} ms a window, {100 * share:.2f} % of this step"
    )


if __name__ == "__main__":
    main()
