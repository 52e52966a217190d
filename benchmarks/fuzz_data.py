"""Broken data sets by the thousand: each is named by `check-data` or can be trained on, in bounded time and memory.

    PYTHONPATH=tests python benchmarks/fuzz_data.py --cases 1600 --jobs 2 --seed 0

Prints the counts by outcome, the slowest and the largest case, and every fault; exits with 1 where there is one.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from data_corpus import cases  # pyright: ignore[reportMissingImports]
from data_trial import Outcome, trial  # pyright: ignore[reportMissingImports]


def run_share(
    share: int, jobs: int, count: int, seed: int, name: str, queue: "multiprocessing.Queue[tuple[str, Outcome] | None]"
) -> None:
    """Try every `jobs`-th case."""
    with tempfile.TemporaryDirectory() as folder:
        for n, case in enumerate(cases(count, seed=seed)):
            if n % jobs == share and name in case.name:
                queue.put((case.name, trial(case, Path(folder) / "case")))
    queue.put(None)


def main() -> int:
    """Run all cases and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1600)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="", help="only cases whose name has this in it")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[str, Outcome] | None] = context.Queue()
    shares = [
        context.Process(
            target=run_share, args=(n, arguments.jobs, arguments.cases, arguments.seed, arguments.name, queue)
        )
        for n in range(arguments.jobs)
    ]
    for share in shares:
        share.start()
    outcomes: dict[str, Outcome] = {}
    running = len(shares)
    while running:
        entry = queue.get(timeout=120)
        if entry is None:
            running -= 1
            continue
        name, outcome = entry
        outcomes[f"{len(outcomes)} {name}"] = outcome
        if len(outcomes) % 100 == 0:
            print(f"{len(outcomes)} data sets tried", file=sys.stderr, flush=True)
        if not outcome.good:
            print(f"FAULT {name}: {outcome.verdict} after {outcome.seconds:.1f} s\n{outcome.detail}", flush=True)
    for verdict, number in Counter(outcome.verdict for outcome in outcomes.values()).most_common():
        print(f"{number:6d}  {verdict}")
    slowest = max(outcomes, key={name: outcome.seconds for name, outcome in outcomes.items()}.__getitem__)
    largest = max(outcomes, key={name: outcome.peak_mib for name, outcome in outcomes.items()}.__getitem__)
    print(f"{len(outcomes)} data sets; slowest {slowest}: {outcomes[slowest].seconds:.1f} s; ", end="")
    print(f"most memory {largest}: {outcomes[largest].peak_mib} MiB with the imports")
    return int(not all(outcome.good for outcome in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
