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
from trainfit.gpus.context import ByteRange
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.columns import ColumnTrace
from trainfit.memory.predict import assess, needed, process_budget, trace_requests, with_context
from trainfit.memory.priced import Pricer
from trainfit.models.setting import Setting, make_setting, setting_from_json
from trainfit.planning.candidates import cuts
from trainfit.planning.make import make_plan, precision_for
from trainfit.planning.plan import Plan
from trainfit.step.names import Checkpointing
from trainfit.tracing.trace_cache import get_trace

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
USED: Sequence[tuple[str, int, int, float]] = (
    ("nano", 1, 256, 2.5),
    ("nano", 1, 320, 3.2),
    ("nano", 1, 384, 3.9),
    ("nano", 2, 384, 7.8),
    ("nano", 4, 384, 15.6),
    ("nano", 1, 512, 6.5),
    ("nano", 1, 640, 9.0),
    ("small", 1, 512, 7.2),
    ("base", 1, 560, 9.5),
)
"""(size, micro-batch, resolution, GB used): the second guide's figures for its GTX 1650 Ti."""
RAN = (("nano", 1, 256), ("nano", 1, 320), ("nano", 1, 384), ("nano", 2, 384), ("nano", 1, 512))
"""(size, micro-batch, resolution) of the runs among them that its text says worked, and of the two least that did not."""
EFFECTS: Sequence[tuple[str, str, dict[str, Any]]] = (
    ("multi-scale training", "5 to 10 % more", {"multi_scale": True}),
    ("no mixed precision", "43 to 67 % more", {"precision": "fp32"}),
    ("200 queries, not 300", "hardly less", {"num_queries": 200}),
    ("micro-batch 2", "100 % more", {"micro_batch": 2}),
    ("resolution 512", "78 % more", {"resolution": 512}),
    ("checkpointing", "less, 20 to 30 % slower", {"checkpointing": "all"}),
)
"""What the second guide says of a knob, beside rtdetr-seg-nano in one stage, micro-batch 1, 384 pixels, fp16."""
SPREAD: Sequence[tuple[int, int, int]] = ((1, 4, 4), (2, 4, 2), (4, 4, 1), (8, 2, 1))
"""(GPUs, micro-batch, accumulation): the first guide's."""
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
    recomputed = "" if setting.checkpointing in ("none", 0) else f", {setting.checkpointing} blocks recomputed"
    host = ", EMA on host" if setting.ema_on_host else ""
    return (
        f"{setting.micro_batch} x {setting.accumulation}{recomputed}{host}, {plan.chosen.needs.high_bytes / GIB:.1f} of "
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
            gpu, base = find_gpu(name), make_setting(model=model)
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
        base = setting_from_json({**make_setting(model=f"rtdetr-seg-{size}").to_json(), **changes})
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


def effect(pricer: Pricer, base: Setting, other: Setting) -> str:
    """What a knob changes in memory (CUDA context included) and time; counts of images do not matter."""
    settings = (base, other)
    needs = [pricer.needs(setting).high_bytes for setting in settings]
    per_image = [pricer.seconds(s, (s.micro_batch,) * s.accumulation).seconds / s.micro_batch for s in settings]
    return f"{needs[1] / needs[0] - 1:+.0%} memory, {per_image[1] / per_image[0] - 1:+.0%} time per image"


def used_rows() -> Iterator[Sequence[str]]:
    """The second guide's memory figures beside those of all three stages."""
    pricer = Pricer(gpu=find_gpu("GTX 1650 Ti"))
    for size, micro_batch, resolution, used in USED:
        stages = ("detector", "masks", "single")
        cells = (need(pricer, used_setting(size, micro_batch, resolution, stage=stage)) for stage in stages)
        yield f"{size}, {micro_batch} at {resolution}", guide_used(used), *cells


def upstream_rows() -> Iterator[Sequence[str]]:
    """What the second guide says that its card ran, and the two least that it did not, with upstream's losses in one stage."""
    pricer = Pricer(gpu=find_gpu("GTX 1650 Ti"))
    for size, micro_batch, resolution, used in USED:
        if (size, micro_batch, resolution) not in RAN:
            continue
        setting = used_setting(size, micro_batch, resolution, lean="off")
        traced, reserved = training(pricer, setting)
        takes = assess(traced, pricer.gpu, pricer.config, reserved=reserved).takes
        taken = f"{takes.low_bytes / GIB:.1f} to {takes.high_bytes / GIB:.1f}"
        yield f"{size}, {micro_batch} at {resolution}", guide_used(used), need(pricer, setting), taken


def used_setting(size: str, micro_batch: int, resolution: int, **knobs: Any) -> Setting:
    """What the second guide's card ran."""
    return make_setting(
        model=f"rtdetr-seg-{size}",
        precision="fp16",
        micro_batch=micro_batch,
        accumulation=2,
        resolution=resolution,
        multi_scale=False,
        **knobs,
    )


def guide_used(gigabytes: float) -> str:
    """The second guide's figure in GiB, with its verdict on 4 GB."""
    return f"{gigabytes * 1e9 / GIB:.1f}, {'fits' if gigabytes < 4 else 'runs out'}"


def need(pricer: Pricer, setting: Setting) -> str:
    """What training needs, with the verdict on the pricer's card."""
    needs = with_context(training(pricer, setting)[1], pricer.gpu)
    budget = process_budget(pricer.gpu, AllocatorConfig()).low_bytes
    verdict = "fits" if needs.high_bytes <= budget else "runs out" if needs.low_bytes > budget else "may run out"
    return f"{needs.low_bytes / GIB:.1f} to {needs.high_bytes / GIB:.1f}, {verdict}"


def training(pricer: Pricer, setting: Setting) -> tuple[ColumnTrace, ByteRange]:
    """The trace of training with what it needs to reserve; where it has to be traced, at the setting's micro-batch alone."""
    if pricer.known(setting):
        return pricer.columns(setting, "training"), pricer.reserved(setting)
    traced = ColumnTrace.of(get_trace(trace_requests(setting, pricer.gpu)[0]))
    return traced, needed(traced, pricer.gpu, pricer.config)


def effect_rows() -> Iterator[Sequence[str]]:
    """What the guides say that knobs do."""
    pricer = Pricer(gpu=find_gpu("GTX 1650 Ti"))
    base = make_setting(model="rtdetr-seg-nano", accumulation=2, multi_scale=False, precision="fp16")
    for knob, said, changes in EFFECTS:
        other = setting_from_json({**base.to_json(), **changes})
        yield f"{knob} (rtdetr-seg-nano)", said, effect(pricer, base, other)
    for name, micro_batch, accumulation, _ in HEURISTIC[2:4]:
        pricer = Pricer(gpu=find_gpu(name))
        for model in MODELS[:4]:
            base = make_setting(model=model, micro_batch=micro_batch, accumulation=accumulation)
            base = replace(base, precision=precision_for(base, pricer.gpu))
            said = effect(pricer, base, replace(base, checkpointing="all"))
            yield f"checkpointing ({model}, {micro_batch} on {name})", "30 to 40 % less, about 20 % slower", said


def spread_rows() -> Iterator[Sequence[str]]:
    """The first guide's table for several GPUs, beside the plan on T4s."""
    gpu = find_gpu("T4")
    for gpus, micro_batch, accumulation in SPREAD:
        for model in MODELS[:4]:
            base = make_setting(model=model)
            plan, theirs = (make_plan(base, gpu, gpus=gpus, micro_batch=b) for b in (None, micro_batch))
            rival = theirs.chosen
            assert rival is not None
            assert plan.chosen is not None
            speed = f"{(rival.seconds or 0.0) / (plan.chosen.seconds or 1.0):.2f}x"
            spare = f"leaves {(theirs.budget.low_bytes - rival.needs.high_bytes) / GIB:.1f} GiB unused"
            yield f"{gpus} x T4", model, f"{micro_batch} x {accumulation}", spare, chosen(plan), speed


def sources() -> None:
    """Both guides."""
    path = RESULTS / "source_tables.md"
    path.write_text(
        "Predicted, never measured; 100 objects in the fullest image, 80 classes. Made by benchmarks/plans.py.\n"
    )
    head = ("card", "model", "recommended", "which", "plan: micro-batch x accumulation", "speed over it")

    def title(words: str) -> None:
        path.write_text(f"{path.read_text()}\n## {words}\n")

    title("Roboflow's heuristic, effective batch 16")
    table(head, heuristic_rows(MODELS[:4]), path)
    title("The same over several GPUs")
    table(head, spread_rows(), path)
    title("The RT-DETR-Seg guide's settings, effective batch 8")
    table(head, guide_rows(), path)
    title("The RT-DETR-Seg guide's memory on a GTX 1650 Ti, GiB")
    stages = ("detector stage", "masks stage", "single stage")
    table(("size, micro-batch at resolution", "guide", *stages), used_rows(), path)
    title("The same with upstream's losses, single stage, GiB")
    table(("size, micro-batch at resolution", "guide", "needs", "takes where there is room"), upstream_rows(), path)
    title("What the guides say that a knob does")
    table(("knob", "guide", "predicted"), effect_rows(), path)


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
            gpu, base = find_gpu(name), make_setting(model=model)
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
