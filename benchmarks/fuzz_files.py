"""Damaged and foreign checkpoints, plans, recipes, states, logs and caches, made from real ones, handed to trainfit.

    python benchmarks/fuzz_files.py --cases 400 --seed 0

Each case runs in a process of its own with a limit of time and memory. It holds if trainfit accepts the file or ends
with one line that names the fault; it fails with a traceback, after 30 s, or where the process grows by more than 2 GiB.
"""

import argparse
import importlib
import os
import random
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from trainfit.tasks.detection.sample_set import write_sample_set

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from file_corpus import KINDS, PREDICT, TINY, Originals  # pyright: ignore[reportMissingImports]
from file_trial import run_limited  # pyright: ignore[reportMissingImports]

IMPORTED_ONCE = ("training.fit", "models.rfdetr.workload", "models.rfdetr.weights_file", "cli.arguments", "cli.detect")
"""Modules that are slow to import, and that a case's process inherits."""


def make_originals(folder: Path, *, with_cache: bool) -> Originals:
    """Train, plan and trace once."""
    for name in IMPORTED_ONCE:
        importlib.import_module(f"trainfit.{name}")
    data = write_sample_set(folder / "data", train=8, val=2)
    originals = Originals(run=folder / "run", data=data, plan=folder / "plan.json", cache=folder / "cache")
    train = ["train", "rfdetr-nano", "--data", str(data), *TINY, "--max-steps", "2", "--out", str(originals.run)]
    plan = ["plan", "rfdetr-nano", "--gpu", "T4", "--micro-batch", "2", "--out", str(originals.plan)]
    for arguments in (train, plan, *([PREDICT] if with_cache else [])):
        originals.cache.mkdir(exist_ok=True)
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(originals.cache)
        outcome = run_limited(arguments, scratch, limit_s=600.0)
        assert outcome.verdict == "accepted", outcome.output
    return originals


def run_cases(
    originals: Originals, folder: Path, *, cases: int, seed: int, kinds: Sequence[str]
) -> Counter[tuple[str, str]]:
    """Run damaged files of each kind by its share; prints the cases that fail. Returns (kind, verdict) -> number."""
    counts: Counter[tuple[str, str]] = Counter()
    whole = sum(KINDS[kind][0] for kind in kinds)
    for kind in kinds:
        share, make = KINDS[kind]
        for number in range(max(1, round(cases * share / whole))):
            name = f"{seed}/{kind}/{number}"
            rng = random.Random(zlib.crc32(name.encode()))
            place = folder / f"{kind}-{number}"
            place.mkdir()
            arguments = make(originals, place, rng)
            outcome = run_limited(arguments, place)
            counts[kind, outcome.verdict] += 1
            if outcome.verdict not in ("accepted", "named"):
                print(f"{name}: {outcome.verdict} after {outcome.seconds:.1f} s: {' '.join(arguments)}")
                print("    " + "\n    ".join(outcome.output.strip().splitlines()[-6:]), flush=True)
            shutil.rmtree(place)
    return counts


def run() -> int:
    """Parse the command line, run the cases, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        originals = make_originals(folder, with_cache="cache" in options.kinds)
        counts = run_cases(originals, folder, cases=options.cases, seed=options.seed, kinds=options.kinds)
    for (kind, verdict), number in sorted(counts.items()):
        print(f"{kind:<10}{verdict:<12}{number}")
    bad = sum(number for (_, verdict), number in counts.items() if verdict not in ("accepted", "named"))
    print(f"{sum(counts.values())} cases, {bad} failed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(run())
