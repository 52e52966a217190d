"""Time of one window against open_clip's own accumulation at equal effective batch: a ratio in one run.

    python benchmarks/clip_window_time.py [--rounds 3] [--accumulation 2 4 8] [--cases towers loss]

Upstream's side is `open_clip_train.train.train_one_epoch` of the installed wheel (`--accum-freq A`). Both start from decoded
pixels, both step AdamW; rounds alternate, and times are those of the processor on one thread, so that a busy machine counts
little. `towers`: a small CLIP whose towers take nearly all of the time, so that the ratio tends to (4 - 1/A) / 4. `loss`: towers
that cost little beside a loss over 2,048 pairs, which upstream takes A times and trainfit once.
"""

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trainfit.models.clip.architecture import build_model
from trainfit.models.clip.data import Pair
from trainfit.models.clip.losses import Choices, make_objective
from trainfit.models.workload import OptimizerSettings, all_parameters
from trainfit.step.optimizer import make_optimizer
from trainfit.step.training_step import TrainingStep

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
cases: Any = importlib.import_module("clip_cases")

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "towers": (
        128,
        {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 48, "layers": 3, "width": 128, "head_width": 64, "patch_size": 8},
            "text_cfg": {"context_length": 32, "vocab_size": 1000, "width": 64, "heads": 2, "layers": 3},
        },
    ),
    "loss": (
        2048,
        {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
            "text_cfg": {"context_length": 8, "vocab_size": 1000, "width": 64, "heads": 2, "layers": 1},
        },
    ),
}
"""Name -> (pairs in a window, architecture)."""


def window_of(pairs: int, config: dict[str, Any]) -> list[Pair]:
    g = torch.Generator().manual_seed(0)
    side, length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    return [
        Pair(
            image=torch.randint(0, 256, (3, side, side), generator=g, dtype=torch.uint8),
            text=torch.randint(1, 1000, (length,), generator=g),
        )
        for _ in range(pairs)
    ]


def compare(name: str, accumulation: int, rounds: int) -> None:
    pairs, config = CASES[name]
    micro_batch, window = pairs // accumulation, window_of(pairs, config)
    with tempfile.TemporaryDirectory() as folder:
        model = cases.register(Path(folder), f"{name}-{accumulation}", config)
        ours, theirs = build_model(model), build_model(model)
    groups = all_parameters(ours, OptimizerSettings())
    step = TrainingStep(
        model=ours,
        objective=make_objective(Choices()),
        optimizer=make_optimizer("adamw-foreach", groups),
        device=torch.device("cpu"),
        clip_norm=0.0,
    )
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, foreach=True)
    seconds: dict[str, list[float]] = {"ours": [], "upstream": []}
    parts = cases.prepared(window, micro_batch, torch.float32)
    for number in range(rounds + 1):
        for who in seconds:
            began = time.process_time()
            if who == "ours":
                step.run(window, micro_batch=micro_batch, step=number)
            else:
                cases.upstream_epoch(theirs, parts, accumulation=accumulation, optimizer=optimizer)
            if number:  # the first round is warm-up
                seconds[who].append(time.process_time() - began)
    medians = {who: statistics.median(found) for who, found in seconds.items()}
    ratios = [mine / other for mine, other in zip(*seconds.values(), strict=True)]
    print(
        f"{name:7} A = {accumulation}, {pairs} pairs: ours {medians['ours']:.2f} s, upstream {medians['upstream']:.2f} s, "
        f"ratio {medians['ours'] / medians['upstream']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.cases:
        for accumulation in arguments.accumulation:
            compare(name, accumulation, arguments.rounds)


if __name__ == "__main__":
    main()
