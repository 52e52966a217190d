"""One training step against a plain loop over upstream's model and criterion at the same setting.

    python benchmarks/step_overhead.py [--resolution 128] [--rounds 7]

Both loops train the same model on the same four images, two at a time, with clip, AdamW and EMA; rounds alternate, so
that a noisy machine slows both alike. Prints the ratio of the medians with its spread, and each loop's own peak memory.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rfdetr.utilities.tensors import NestedTensor

from trainfit.models.images import IMAGENET_MEAN, IMAGENET_STD
from trainfit.models.rfdetr.data import to_targets
from trainfit.models.rfdetr.family import RfDetrKnobs
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.models.workload import OptimizerSettings
from trainfit.step.training_step import TrainingStep
from trainfit.step.window import cut
from trainfit.tasks.detection.read import read_dataset
from trainfit.tasks.detection.samples import Sample

MICRO_BATCH = 2
CPU = torch.device("cpu")


def make(resolution: int, groups: int) -> tuple[RfDetr, torch.nn.Module, torch.optim.AdamW, list[Sample]]:
    """Workload, model, optimizer and four samples."""
    data = read_dataset("sample")
    torch.manual_seed(0)
    workload = RfDetr("rfdetr-nano", data.classes, RfDetrKnobs(resolution=resolution, groups=groups))
    model = workload.build()
    optimizer = torch.optim.AdamW(workload.parameter_groups(model, OptimizerSettings()), fused=True)
    decode = workload.decoder()
    window = [
        decode(r, size=resolution, augment=frozenset(), generator=torch.Generator()) for r in data.splits["train"][4:8]
    ]
    return workload, model, optimizer, window


def ours(resolution: int, groups: int) -> Callable[[], object]:
    """The step that trainfit trains with."""
    workload, model, optimizer, window = make(resolution, groups)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    step = TrainingStep(model=model, objective=workload.objective, optimizer=optimizer, device=CPU, ema=ema)
    return lambda: step.run(window, micro_batch=MICRO_BATCH, step=0)


def plain(resolution: int, groups: int) -> Callable[[], object]:
    """What one writes by hand over upstream's model and criterion: mean of micro-batch losses."""
    workload, model, optimizer, window = make(resolution, groups)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    like, weights, parts = next(model.parameters()), workload.criterion.weight_dict, cut(window, MICRO_BATCH)

    def run() -> None:
        for part in parts:
            images = (torch.stack([s.image for s in part]).float() / 255 - mean) / std
            mask = torch.zeros(images.shape[0], resolution, resolution, dtype=torch.bool)
            targets = to_targets(part, like)
            losses = workload.criterion(model(NestedTensor(images, mask, no_padding=True), targets), targets)
            total = torch.stack([losses[k] * w for k, w in weights.items() if k in losses]).sum()
            (total / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for averaged, value in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
                averaged.copy_(0.99 * averaged + 0.01 * value)

    return run


LOOPS = {"ours": ours, "plain": plain}


def peak_mib(which: str, resolution: int, groups: int) -> float:
    """Peak resident memory of a process that runs three steps of one loop."""
    command = [sys.executable, "-W", "ignore", __file__, "--only", which]
    command += ["--resolution", str(resolution), "--groups", str(groups)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=sorted(LOOPS))
    arguments = parser.parse_args()
    resolution, groups = arguments.resolution, arguments.groups
    if arguments.only:
        run = LOOPS[arguments.only](resolution, groups)
        for _ in range(3):
            run()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    loops = {name: loop(resolution, groups) for name, loop in LOOPS.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(arguments.rounds + 1):
        for name, run in loops.items():
            started = time.process_time()
            run()
            if round_:  # the first one warms up
                times[name].append(time.process_time() - started)
    ratios = [a / b for a, b in zip(times["ours"], times["plain"], strict=True)]
    ratio = statistics.median(times["ours"]) / statistics.median(times["plain"])
    print(f"CPU time a step: ours / plain = {ratio:.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})")
    peaks = {name: peak_mib(name, resolution, groups) for name in LOOPS}
    print(f"peak memory: ours {peaks['ours']:.0f} MiB, plain {peaks['plain']:.0f} MiB")


if __name__ == "__main__":
    main()
