"""Lean mask losses and matching of RF-DETR against upstream's criterion: the same numbers, in what time and memory?

    python benchmarks/lean_masks.py cases [200]   # differences over random cases
    python benchmarks/lean_masks.py cost          # seconds and peak bytes of losses and backward, on this CPU

`cases` draws 1 to 3 images of 0 to 200 objects, of which crowds are dropped, in all stages, with and without small pieces, in
float32 and float64. `cost` interleaves the two.
"""

import importlib
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trainfit.models.rfdetr import lean_losses, lean_matching

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
mask_cases: Any = importlib.import_module("mask_cases")

CROWDS = 0.05
"""Share of the objects that are crowds."""
SIZES = (("rfdetr-seg-nano", 100, 312, 4), ("rfdetr-seg-medium", 200, 432, 5))
"""(model, queries, resolution, decoder layers)."""


def cases(count: int) -> None:
    """Print the largest differences over random cases."""
    print(f"{'dtype':9}{'pieces':9}{'cases':>6}{'losses equal':>14}{'loss':>10}{'gradient':>10}{'matches':>9}")
    whole = (lean_losses.PIECE, lean_matching.PIECE)
    for dtype in (torch.float32, torch.float64):
        for pieces in ("default", "small"):
            lean_losses.PIECE, lean_matching.PIECE = whole if pieces == "default" else (2**13, 2**11)
            rng = random.Random(len(pieces))
            rows = [_difference(rng, seed, dtype) for seed in range(-(-count // 4))]
            losses = [loss for row in rows for loss in row[0]]
            equal = f"{sum(loss == 0 for loss in losses)}/{len(losses)}"
            worst = f"{max(losses):>10.1e}{max(row[1] for row in rows):>10.1e}"
            matches = "equal" if all(row[2] for row in rows) else "DIFFER"
            print(f"{str(dtype)[6:]:9}{pieces:9}{len(rows):>6}{equal:>14}{worst}{matches:>9}", flush=True)


def _difference(rng: random.Random, seed: int, dtype: torch.dtype) -> tuple[list[float], float, bool]:
    """Relative differences of the losses, the largest of a gradient, and whether the matches are equal."""
    drawn = [rng.choice((0, rng.randint(1, 20), rng.randint(21, 200))) for _ in range(rng.randint(1, 3))]
    objects = [sum(rng.random() >= CROWDS for _ in range(count)) for count in drawn]
    case = mask_cases.make_case(
        seed,
        objects,
        queries=rng.choice((20, 100)),
        groups=rng.choice((1, 4)),
        side=rng.choice((48, 96, 120)),
        dtype=dtype,
        stage=rng.choice(("single", "masks")),
    )
    with mask_cases.float64_points():
        a, b = (mask_cases.run(case, lean=lean, seed=seed) for lean in (False, True))
    losses = [mask_cases.relative(loss, b.losses[name]) for name, loss in a.losses.items()]
    pairs = zip(a.gradients, b.gradients, strict=True)
    gradient = max(mask_cases.relative(x, y) for x, y in pairs if x is not None)
    return losses, gradient, all(torch.equal(x, y) for x, y in zip(a.matches, b.matches, strict=True))


def cost(rounds: int = 3) -> None:
    """Print seconds and peak MiB of losses and backward, upstream's and lean."""
    torch.set_num_threads(1)
    print(
        f"{'shapes of':20}{'objects':>8}{'upstream s':>12}{'lean s':>8}{'ratio':>7}{'upstream MiB':>14}{'lean MiB':>10}{'ratio':>7}"
    )
    for model, queries, side, layers in SIZES:
        for objects in (10, 100):
            case = mask_cases.make_case(
                0, (objects,), queries=queries, groups=13, side=side, channels=256, layers=layers
            )
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for number in range(2 * rounds):
                start = time.perf_counter()
                mask_cases.run(case, lean=number % 2 == 1)
                seconds[number % 2 == 1].append(time.perf_counter() - start)
            theirs, ours = (median(seconds[lean]) for lean in (False, True))
            before, after = (mask_cases.peak_bytes(case, lean=lean) / 2**20 for lean in (False, True))
            print(f"{model:20}{objects:>8}{theirs:>12.2f}{ours:>8.2f}{ours / theirs:>7.2f}", end="")
            print(f"{before:>14.0f}{after:>10.0f}{after / before:>7.2f}", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["cases", *count]:
            cases(int(count[0]) if count else 200)
        case ["cost"]:
            cost()
        case _:
            print(__doc__)
