"""Out-of-memory errors at random operators of a window and an evaluation, survived: is anything different afterwards?

    python benchmarks/oom_injection.py [--points 200] [--families rfdetr clip] [--seed 0]

Tiny models in float64 on the CPU (tests/oom_points.py). Every other error is one that a smaller micro-batch answers; the
rest are answered by the same cut once more, and then parameters, averages and optimizer state must be equal bit for bit.
Differences are over what the undisturbed window moved them by.
That no sample is lost or seen twice is checked at every point. About 5 s (RF-DETR) and 0.2 s (CLIP) a point.
"""

import argparse
import gc
import importlib
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
points: Any = importlib.import_module("oom_points")


def main() -> int:
    """Inject, print a table; 1 if anything differs by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--families", nargs="+", choices=sorted(points.FAMILIES), default=["rfdetr", "clip"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    gc.freeze()  # each survival collects garbage, which would go through all that was imported
    worst = 0.0
    print("family   where       cut afterwards  errors  equal bit for bit  largest relative difference")
    for name in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            found = points.outcomes(
                points.Injector(points.FAMILIES[name](Path(folder))), arguments.points, arguments.seed
            )
        rows: dict[tuple[str, bool], list[Any]] = defaultdict(list)
        for outcome in found:
            rows[outcome.where, outcome.split].append(outcome)
        for (where, split), row in sorted(rows.items()):
            largest = max(outcome.error for outcome in row)
            equal = sum(outcome.error == 0 for outcome in row)
            print(f"{name:9}{where:12}{'halved' if split else 'the same':16}{len(row):6}{equal:19}{largest:29.1e}")
            worst = max(worst, largest if split else 0.0 if equal == len(row) else 1.0)
    print("as it must be" if worst <= 1e-12 else "NOT as it must be")
    return int(worst > 1e-12)


if __name__ == "__main__":
    sys.exit(main())
