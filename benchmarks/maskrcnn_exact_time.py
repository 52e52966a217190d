"""Extra time of Mask R-CNN's exact gradient (R1) over per-micro-batch means (R2), a ratio in one run.

    python benchmarks/maskrcnn_exact_time.py [--resolution 320] [--rounds 5] [--device cpu|cuda]

R50-FPN v1 with random weights, windows of 1, 2 and 4 micro-batches of one image, the published 512 regions an image, 10
objects. Rounds of both alternate, so that a busy machine disturbs both; the median of the rounds' ratios is printed. Both
are padded to the same canvas: all images have one size.
"""

import argparse
import statistics
import time

import torch

from trainfit.models.images import crowded_sample
from trainfit.models.maskrcnn.family import MaskRcnnSetting
from trainfit.models.maskrcnn.losses import make_objective
from trainfit.models.maskrcnn.model import build_model
from trainfit.step.terms import Objective
from trainfit.step.window import accumulate, cut
from trainfit.tasks.detection.samples import Sample


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accumulations", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model = build_model(MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=arguments.resolution), classes=80)
    model.to(device)
    height, width = arguments.resolution, arguments.resolution * 4 // 3
    sample = crowded_sample(height, width, objects=10, classes=80, masks=True)
    objectives = {name: make_objective(name) for name in ("R1", "R2")}
    print(f"{height} x {width} pixels on {device}, {torch.get_num_threads()} thread(s)")
    print("accumulation  R2 s a window  R1 over R2 (median)  least  most")
    for accumulation in arguments.accumulations:
        window = [sample] * accumulation
        seconds(model, objectives["R1"], window, device)  # the first is slower
        ratios: list[float] = []
        plain: list[float] = []
        for number in range(arguments.rounds):
            order = ("R1", "R2") if number % 2 else ("R2", "R1")
            taken = {name: seconds(model, objectives[name], window, device) for name in order}
            ratios.append(taken["R1"] / taken["R2"])
            plain.append(taken["R2"])
        middle = statistics.median(ratios)
        print(
            f"{accumulation:12}{statistics.median(plain):15.2f}{middle:21.3f}{min(ratios):7.3f}{max(ratios):6.3f}",
            flush=True,
        )


def seconds(model: torch.nn.Module, objective: Objective, window: list[Sample], device: torch.device) -> float:
    """Process time of a window's gradient on the CPU, clock time on a GPU."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    accumulate(model, objective, cut(window, 1), device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    main()
