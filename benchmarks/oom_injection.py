"""Out-of-memory errors at operators of a window and an evaluation, survived: is anything different afterwards?

    python benchmarks/oom_injection.py [--points 200] [--families clip clip-towers siglip coca] [--scaler both]
    python benchmarks/oom_injection.py --every --families two-types overflow --optimizers adamw-fused adamw-foreach sgd adamw-8bit

Tiny models on the CPU (tests/oom_points.py), with and without the loss scaler that fp16 has. Of random points every other
error is one that a smaller micro-batch answers; the rest, and all with --every, are answered by the same cut once more, and
then parameters, EMA weights, optimizer state and loss scale must be equal bit for bit. Differences are over what the
undisturbed window moved them by. That no sample is lost or seen twice is checked at every point.
About 5 s (RF-DETR), 1 s (Mask R-CNN, a small trunk), 0.2 s (CLIP) and 0.02 s (the others) a point.
"""

import argparse
import gc
import importlib
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

from trainfit.step.names import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
points: Any = importlib.import_module("oom_points")

TOLERANCE = dict.fromkeys(("rfdetr", "maskrcnn", "clip", "clip-towers", "siglip", "coca"), 1e-12) | {
    "two-types": 1e-6,
    "overflow": 1e-6,
}
"""Relative difference after another cut, another order of sums: float64, float32."""


def main() -> int:
    """Inject, print a table; 1 if anything differs by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--every", action="store_true", help="each operator instead of random ones")
    parser.add_argument("--families", nargs="+", choices=sorted(points.FAMILIES), default=["rfdetr", "clip"])
    parser.add_argument("--optimizers", nargs="+", choices=get_args(Optimizer), default=["adamw-fused"])
    parser.add_argument("--scaler", choices=["on", "off", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scalers = {"on": [True], "off": [False], "both": [False, True]}[arguments.scaler]
    print(
        "family       optimizer      scaler  where       cut afterwards  errors  equal bit for bit  largest difference"
    )
    fine = True
    for name in arguments.families:
        for optimizer in arguments.optimizers:
            for scaler in scalers:
                fine &= inject(name, optimizer, scaler, arguments)
    print("as it must be" if fine else "NOT as it must be")
    return int(not fine)


def inject(name: str, optimizer: Optimizer, scaler: bool, arguments: argparse.Namespace) -> bool:
    """Inject into one family with one optimizer, print its rows; whether all is as it must be."""
    with tempfile.TemporaryDirectory() as folder:
        injector = points.Injector(points.FAMILIES[name](Path(folder), optimizer, scaler))
        gc.freeze()  # each survival collects garbage, which would go through all that was imported
        some = points.outcomes
        found = points.every_operator(injector) if arguments.every else some(injector, arguments.points, arguments.seed)
    rows: dict[tuple[str, bool], list[Any]] = defaultdict(list)
    for outcome in found:
        rows[outcome.where, outcome.split].append(outcome)
    fine = True
    for (where, split), row in sorted(rows.items()):
        largest = max(outcome.error for outcome in row)
        equal = sum(outcome.error == 0 for outcome in row)
        case = f"{name:13}{optimizer:15}{'on' if scaler else 'off':8}"
        print(
            f"{case}{where:12}{'halved' if split else 'the same':16}{len(row):6}{equal:19}{largest:20.1e}", flush=True
        )
        fine &= largest <= TOLERANCE[name] if split else equal == len(row)
    return fine


if __name__ == "__main__":
    sys.exit(main())
