"""Fit the efficiencies of `timing.roofline` to the timm models that `timm_rtx3090.py` does not test, and judge them there.

    python benchmarks/timm_fit.py

Least absolute logarithm of predicted over measured, no coefficient negative (iterated, reweighted NNLS). A row of the
counts goes to its arithmetic or to its bytes, whichever is the longer at the coefficients so far.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from timm_rtx3090 import GPU, Record, load, ordered, traced
from trainfit.gpus.catalogue import find_gpu
from trainfit.timing.roofline import RTX_3090, WIDE_GROUP, Efficiency, matrix_rate, step_seconds

UNROLLED = "sequencer2d"
"""Models with recurrent layers, which a trace unrolls: not fitted on, but tested as all others are."""
NAMES = ("flops", "memory", "narrow_groups", "wide_groups", "kernel_s")


def features(record: Record, efficiency: Efficiency) -> list[float]:
    """Seconds at published rates by class of work, and kernels: the multiples of the coefficients in NAMES."""
    sums = dict.fromkeys(NAMES, 0.0)
    for row in record.ops:
        _, grouped, width = row.op.partition(".grouped")
        memory = ("narrow_groups" if int(width) < WIDE_GROUP else "wide_groups") if grouped else "memory"
        arithmetic_s = row.flops / matrix_rate(row, GPU)[0]
        memory_s = row.bytes / (GPU.bandwidth_bytes_per_s or 0)
        if arithmetic_s * efficiency.flops > memory_s * getattr(efficiency, memory):
            sums["flops"] += arithmetic_s
        else:
            sums[memory] += memory_s
        sums["kernel_s"] += row.count
    return list(sums.values())


def fit(records: Sequence[Record]) -> Efficiency:
    """The efficiencies that make the absolute logarithms of the ratios least in sum."""
    efficiency = RTX_3090
    measured = np.array([record.measured_s for record in records])
    for _ in range(10):
        rows = np.array([features(record, efficiency) for record in records]) / measured[:, None]
        weights, found = np.ones(len(rows)), np.zeros(len(NAMES))
        for _ in range(50):
            found, _ = nnls(rows * weights[:, None], weights)
            ratio = rows @ found
            weights = 1 / np.sqrt(ratio * np.maximum(np.abs(np.log(ratio)), 0.02))
        efficiency = replace(efficiency, **dict(zip(NAMES, found.tolist(), strict=True)))
    return efficiency


def judge(name: str, records: Sequence[Record], efficiency: Efficiency) -> None:
    """Print the errors of a set of models."""
    predicted = np.array([step_seconds(record.ops, GPU, efficiency=efficiency).seconds for record in records])
    measured = np.array([record.measured_s for record in records])
    batch = np.array([record.batch for record in records])
    error = np.abs(predicted / measured - 1)
    print(f"{name} ({len(records)}): median {np.median(error):.1%}, mean {error.mean():.1%}", end="")
    print(f"; pairs by time an image in order: {ordered(predicted / batch, measured / batch):.1%}")


def other_cards() -> None:
    """Print ResNet-50 at 256 images under float16 autocast on cards that nothing was fitted on.

    Measured: one GPU, pytorch-21.03 container, NVIDIA DeepLearningExamples,
    `PyTorch/Classification/ConvNets/resnet50v1.5/README.md`.
    """
    ops = traced({"model": "resnet50", "train_img_size": "224"}, 256)[0].ops
    for card, measured in (("A100 80GB", 2470), ("V100 16GB", 1200)):
        predicted = 256 / step_seconds(ops, find_gpu(card)).seconds
        print(f"{card}: {predicted:.0f} images/s, measured {measured} ({predicted / measured - 1:+.0%})")


def main() -> None:
    """Fit on the others, judge on both; then on half of all, twenty times, judged on the other half; then other cards."""
    tested, others, fresh, _ = load()
    others = [record for record in others if not record.model.startswith(UNROLLED)]
    efficiency = fit(others)
    print(efficiency)
    judge("fitted on", others, efficiency)
    judge("tested", tested, efficiency)
    judge("fresh", fresh, efficiency)
    everything = np.array([*tested, *others, *fresh], dtype=object)
    medians: list[float] = []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(everything))
        half = len(order) // 2
        efficiency = fit(everything[order[:half]].tolist())
        rest: list[Record] = everything[order[half:]].tolist()
        errors = [abs(step_seconds(r.ops, GPU, efficiency=efficiency).seconds / r.measured_s - 1) for r in rest]
        medians.append(float(np.median(errors)))
    print(f"20 random halves: held-out median error {np.mean(medians):.1%} ({min(medians):.1%} to {max(medians):.1%})")
    other_cards()


if __name__ == "__main__":
    main()
