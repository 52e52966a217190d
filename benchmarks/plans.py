"""Plans beside what the field recommends: by our own prediction, where do the published tables waste memory or run out?

    python benchmarks/plans.py sources   # the two guides' tables, regenerated for today's models: results/source_tables.md
    python benchmarks/plans.py grid      # 12 cards x 8 models against the recommended settings: results/plans.md
    python benchmarks/plans.py time      # seconds to an answer: shipped, cached, cold

The guides: Roboflow's batch-size heuristic for RF-DETR (effective batch 16), and the memory guide of RT-DETR-Seg (effective
batch 8, a GTX 1650 Ti). Cells are predictions; nothing here was measured on a GPU.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from trainfit.gpus.catalogue import GIB, Gpu, find_gpu
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.predict import process_budget
from trainfit.memory.priced import Pricer
from trainfit.models.setting import Setting
from trainfit.planning.knobs import cuts
from trainfit.planning.make import make_plan, precision_for
from trainfit.planning.plan import Plan
from trainfit.step.names import Checkpointing

RESULTS = Path(__file__).parent / "results"
HEURISTIC: Sequence[tuple[str, int, int, Checkpointing]] = (
    ("RTX 3070", 1, 16, "all"),
    ("RTX 3060", 2, 8, "all"),
    ("T4", 4, 4, "none"),
    ("RTX 3090", 8, 2, "none"),
    ("RTX 4090", 8, 2, "none"),
    ("A100 40GB", 16, 1, "none"),
    ("A100 80GB", 16, 1, "none"),
)
"""(card, micro-batch, accumulation, checkpointing), for any size of RF-DETR."""
GUIDE: Sequence[tuple[str, str, str, int, int, bool]] = (
    ("GTX 1650 Ti", "nano", "detector", 2, 4, False),
    ("GTX 1650 Ti", "nano", "masks", 1, 8, False),
    ("GTX 1650 Ti", "nano", "single", 1, 8, False),
    ("RTX 2060", "nano", "detector", 4, 2, True),
    ("RTX 2060", "nano", "masks", 2, 4, True),
    ("RTX 2070", "small", "detector", 4, 2, True),
    ("RTX 2070", "small", "masks", 2, 4, True),
    ("RTX 4090", "base", "detector", 8, 1, True),
    ("RTX 4090", "base", "masks", 4, 2, True),
)
"""(card, size, stage, micro-batch, accumulation, multi-scale)."""
CARDS = (
    "GTX 1650", "RTX 2060", "RTX 2070", "RTX 3070", "RTX 3060", "T4", "RTX 4060 Ti 16GB", "RTX 3090", "RTX 4090",
    "L40S", "A100 40GB", "A100 80GB",
)  # fmt: skip
MODELS = (
    "rfdetr-nano", "rfdetr-small", "rfdetr-medium", "rfdetr-large", "rfdetr-seg-nano", "rfdetr-seg-medium",
    "maskrcnn-r50-v1", "maskrcnn-r50-v2",
)  # fmt: skip


class Rival:
    """A recommended setting, priced like a plan's candidates."""

    def __init__(self, setting: Setting, gpu: Gpu, effective_batch: int) -> None:
        """Price it on the card."""
        setting = replace(setting, precision=precision_for(setting, gpu))
        pricer = Pricer(gpu=gpu)
        needs = pricer.needs(setting)
        self.needs_bytes = needs.high_bytes
        self.low_bytes = needs.low_bytes
        self.budget_bytes = process_budget(gpu, AllocatorConfig()).low_bytes
        self.images_per_s = (
            effective_batch / pricer.seconds(setting, cuts(effective_batch, setting.micro_batch)).seconds
        )

    def words(self) -> str:
        """What it leaves or lacks."""
        spare = (self.budget_bytes - self.needs_bytes) / GIB
        lacks = (self.low_bytes - self.budget_bytes) / GIB
        if lacks > 0:
            return f"runs out: lacks {lacks:.1f} to {-spare:.1f} GiB"
        return f"leaves {spare:.1f} GiB unused" if spare >= 0 else f"may run out: lacks up to {-spare:.1f} GiB"


def chosen(plan: Plan) -> str:
    """The plan's choice in a cell."""
    if plan.chosen is None:
        return f"nothing fits; the least is {plan.smallest.needs.high_bytes / GIB:.1f} GiB"
    setting = plan.chosen.setting
    again = "" if setting.checkpointing in ("none", 0) else f", {setting.checkpointing} blocks again"
    host = ", EMA on host" if setting.ema_on_host else ""
    return (
        f"{setting.micro_batch} x {setting.accumulation}{again}{host}, {plan.chosen.needs.high_bytes / GIB:.1f} of "
        f"{plan.budget.low_bytes / GIB:.1f} GiB"
    )


def faster(plan: Plan, rival: Rival) -> str:
    """Speed of the plan over the rival's, if that fits."""
    if plan.chosen is None or plan.chosen.images_per_s is None:
        return "-"
    return f"{plan.chosen.images_per_s / rival.images_per_s:.2f}x"


def table(head: Sequence[str], rows: Iterator[Sequence[str]], path: Path) -> None:
    """Print and write a Markdown table, row by row."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    text = (path.read_text() + "\n") if path.exists() else ""
    path.write_text(text + "\n".join(lines) + "\n")


def heuristic_rows(models: Sequence[str]) -> Iterator[Sequence[str]]:
    """The first guide's table."""
    for name, micro_batch, accumulation, checkpointing in HEURISTIC:
        for model in models:
            gpu, base = find_gpu(name), Setting(model=model)
            wanted = replace(base, micro_batch=micro_batch, accumulation=accumulation, checkpointing=checkpointing)
            rival, plan = Rival(wanted, gpu, 16), make_plan(base, gpu)
            again = " + checkpointing" if checkpointing == "all" else ""
            yield (
                name,
                model,
                f"{micro_batch} x {accumulation}{again}",
                rival.words(),
                chosen(plan),
                faster(plan, rival),
            )


def guide_rows() -> Iterator[Sequence[str]]:
    """The second guide's table."""
    for name, size, stage, micro_batch, accumulation, multi_scale in GUIDE:
        gpu, changes = find_gpu(name), {"stage": stage, "multi_scale": multi_scale}
        base = Setting.from_json({**Setting(model=f"rtdetr-seg-{size}").to_json(), **changes})
        rival = Rival(replace(base, micro_batch=micro_batch, accumulation=accumulation), gpu, 8)
        plan = make_plan(base, gpu, effective_batch=8)
        yield (
            name,
            f"{size}, {stage}",
            f"{micro_batch} x {accumulation}",
            rival.words(),
            chosen(plan),
            faster(plan, rival),
        )


def sources() -> None:
    """Both guides."""
    path = RESULTS / "source_tables.md"
    path.write_text("Predicted, effective batch 16, then 8; 100 objects in the fullest image, 80 classes.\n")
    head = ("card", "model", "recommended", "which", "plan: micro-batch x accumulation", "speed over it")
    table(head, heuristic_rows(MODELS[:4]), path)
    table(head, guide_rows(), path)


def recommended(gpu: Gpu) -> tuple[int, Checkpointing]:
    """The first guide's micro-batch and checkpointing for a card's memory; below 8 GB the least there is."""
    size = round(gpu.nominal_memory_bytes / GIB)
    if size >= 40:
        return 16, "none"
    return (8, "none") if size >= 24 else (4, "none") if size >= 16 else (2, "all") if size >= 12 else (1, "all")


def grid_rows() -> Iterator[Sequence[str]]:
    """Every card with every model."""
    for name in CARDS:
        for model in MODELS:
            gpu, base = find_gpu(name), Setting(model=model)
            micro_batch, checkpointing = recommended(gpu)
            wanted = replace(base, micro_batch=micro_batch, accumulation=16 // micro_batch, checkpointing=checkpointing)
            rival, plan = Rival(wanted, gpu, 16), make_plan(base, gpu)
            within = plan.chosen is None or plan.chosen.needs.high_bytes <= plan.budget.low_bytes
            fits = rival.needs_bytes <= rival.budget_bytes
            speed = plan.chosen.images_per_s if plan.chosen else None
            held = not fits or (speed is not None and speed >= 0.97 * rival.images_per_s)
            yield name, model, chosen(plan), faster(plan, rival), "yes" if within else "NO", "yes" if held else "NO"


def grid() -> None:
    """12 cards, 8 models."""
    path = RESULTS / "plans.md"
    path.write_text("Predicted, effective batch 16. Recommended: Roboflow's heuristic for the card's memory.\n")
    head = ("card", "model", "plan", "speed over recommended", "within budget", "not slower than what fits")
    table(head, grid_rows(), path)


def answer() -> None:
    """Time of the whole command, five times each."""

    def seconds(times: int, cache: str, *arguments: str) -> str:
        took: list[float] = []
        for _ in range(times):
            start = time.perf_counter()
            environment: dict[str, Any] = {**os.environ, "XDG_CACHE_HOME": cache}
            command = [sys.executable, "-m", "trainfit", "plan", *arguments]
            subprocess.run(command, check=True, capture_output=True, env=environment)
            took.append(time.perf_counter() - start)
        return f"{median(took):.2f} s ({min(took):.2f} to {max(took):.2f})"

    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as kept:
        print("shipped:", seconds(5, empty, "rfdetr-nano", "--gpu", "RTX 3060"))
        other = ("rfdetr-nano", "--gpu", "RTX 3060", "--objects-per-image", "40")
        print("cold, first trace:", seconds(1, kept, *other))
        print("cached:", seconds(5, kept, *other))


if __name__ == "__main__":
    {"sources": sources, "grid": grid, "time": answer}[sys.argv[1]]()
