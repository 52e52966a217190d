"""How soon `plan` and `predict` answer for a data set, and how near laws come to traces.

    python benchmarks/seconds.py data FOLDER...       # seconds of built-in models for data sets, and whether torch was imported
    python benchmarks/seconds.py held-out NUMBER FILE # random points that no law was found from, against traces (kept in the
                                                      # cache): a line each in FILE, half a minute a point; started again it goes on
    python benchmarks/seconds.py older NUMBER FILE    # the same points in fp16 on a T4, which has other kernels
    python benchmarks/seconds.py windows NUMBER FILE  # the same of CLIP's windows: any micro-batch, accumulation and recompute
    python benchmarks/seconds.py again FILE           # the same points with the package as it is now, against the traces of then
    python benchmarks/seconds.py report FILE          # of the points in FILE: shares that are equal, and errors
    python benchmarks/seconds.py size                 # of what comes with the package

Results: benchmarks/README.md.
"""

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainfit.gpus.catalogue import find_gpu
from trainfit.memory import shipped
from trainfit.memory.columns import ColumnTrace
from trainfit.memory.predict import needed
from trainfit.memory.priced import Pricer
from trainfit.memory.quick_replay import QuickReplay
from trainfit.models.family import family_of
from trainfit.models.rfdetr.family import PUBLISHED
from trainfit.models.setting import Setting, make_setting, setting_from_json
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import get_trace

CODE = """
import sys
from trainfit.cli import main
try:
    main()
except SystemExit as end:
    sys.exit(100 if "torch" in sys.modules else end.code)
"""
"""What the command `trainfit` runs; `main` always ends by SystemExit."""
WITH_TORCH = 100
"""Exit status of `CODE` where torch was imported."""
MEMORY = "8GiB"


def models(task: str = "detection") -> list[str]:
    """Those of a task that the package has traces of."""
    found = sorted(path.name.removesuffix(".tar.xz") for path in shipped.shipped_folder().glob("*.tar.xz"))
    return [name for name in found if family_of(name)[0].task == task]


def run(*arguments: str) -> tuple[float, float, str]:
    """Wall and CPU seconds of a command in a process of its own, and whether it imported torch, or failed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, check=False, timeout=600)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ends = {0: "no torch", WITH_TORCH: "torch imported"}
    return wall, cpu, ends.get(done.returncode, f"FAILED with exit status {done.returncode}")


def data(folders: list[str]) -> None:
    """A line for each model, data set and command."""
    for model in models():
        for folder in folders:
            for command, own in (("predict", ("--gpu", "RTX 3060")), ("plan", ("--memory", MEMORY, "--no-cache"))):
                wall, cpu, ended = run(command, model, "--data", folder, "--allow-outside", *own)
                print(
                    f"{model:20} {Path(folder).name:14} {command:8} {wall:6.1f} s, CPU {cpu:5.1f} s, {ended}",
                    flush=True,
                )


def point(number: int) -> Setting:
    """The point of a number: a model, and what a data set or a user may choose."""
    draw = random.Random(number)
    model = draw.choice(models())
    knobs: dict[str, Any] = {"checkpointing": draw.choice(("none", "all"))}
    knobs |= {"classes": draw.randint(1, 400), "objects_per_image": draw.randint(1, 250)}
    if "-seg-" in model and draw.random() < 0.3:
        knobs["stage"] = "masks"
    if model in PUBLISHED:
        knobs |= drawn_size(draw, model)
    else:
        knobs["canvas"] = (800, draw.randint(800, 1333))
    return make_setting(model, precision="bf16", accumulation=2, micro_batch=draw.choice((1, 2, 3, 5, 6, 8)), **knobs)


def older_point(number: int) -> Setting:
    """The point of a number for a card below capability 8.0."""
    return replace(point(number), precision="fp16")


def drawn_size(draw: random.Random, model: str) -> dict[str, Any]:
    """Of half of the points a size of their own: with one size instead of several, or at another resolution, or both."""
    published = PUBLISHED[model]
    blocks = published.resolution // published.block
    knobs: dict[str, Any] = {"multi_scale": draw.random() < 0.75}
    if draw.random() < 0.35:
        knobs["resolution"] = published.block * draw.randint(round(0.6 * blocks), round(1.3 * blocks))
    return knobs


def window_point(number: int) -> Setting:
    """The point of a number: a model whose window is one loss, for either kind of card, and a cut of the window."""
    draw = random.Random(number)
    return make_setting(
        draw.choice(models("pairs")),
        precision=draw.choice(("bf16", "fp16")),
        checkpointing=draw.choice(("none", "all")),
        micro_batch=draw.choice((1, 2, 5, 16, 37, 64, 100, 160, 200, 256)),
        accumulation=draw.choice((1, 2, 3, 4, 6)),
    )


def compared(setting: Setting, number: int) -> dict[str, Any]:
    """What the package answers at the point of a number, and what a trace made now says."""
    pricer = pricer_of(setting)
    row: dict[str, Any] = {"number": number, "setting": setting.to_json(), "covered": pricer.answers(setting)}
    if not row["covered"]:
        return row
    true = get_trace(replace(pricer.request(setting, "training"), setting=setting))
    return row | errors(pricer, setting, figures(pricer, true))


def pricer_of(setting: Setting) -> Pricer:
    """A pricer of a card that has the setting's precision."""
    return Pricer(gpu=find_gpu("T4" if setting.precision == "fp16" else "A100"), cache=False)


def figures(pricer: Pricer, traced: StoredTrace | ColumnTrace) -> dict[str, int]:
    """Bytes: peak of the tensors, peak that the allocator reserves, and the top of what training needs."""
    replay = QuickReplay(ColumnTrace.of(traced).columns, pricer.config)
    return {
        "allocated": replay.peak_requested_bytes,
        "reserved": replay.peak_reserved_bytes,
        "needs": needed(traced, pricer.gpu, pricer.config).high_bytes,
    }


def errors(pricer: Pricer, setting: Setting, true: dict[str, int]) -> dict[str, Any]:
    """Of what the package answers, as a share of what a trace says, and the latter. "answer" is the top of the need as a plan takes
    it, with the room for a trace that is "moved" to another size of the image.
    """
    made = figures(pricer, pricer.columns(setting, "training"))
    shares = {name: made[name] / true[name] - 1 for name in true}
    answer = pricer.reserved(setting).high_bytes / true["needs"] - 1
    moved = shipped.is_resized(pricer.request(setting, "training"))
    return shares | {"answer": answer, "moved": moved, "true": true}


def again(path: Path) -> None:
    """What the package answers now at the points in a file, against the traces that were made then, or now where it did not
    answer then.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    with path.with_suffix(".part").open("w") as file:
        for row in rows:
            setting = setting_from_json(row["setting"])
            if "true" in row:
                row |= errors(pricer_of(setting), setting, row["true"])
            else:
                row = compared(setting, row["number"])
            print(json.dumps(row), file=file, flush=True)
    path.with_suffix(".part").replace(path)
    report(path)


def held_out(number: int, path: Path, point: Callable[[int], Setting]) -> None:
    """Points that are not yet in a file, two at a time."""
    done = {json.loads(line)["number"] for line in path.read_text().splitlines()} if path.exists() else set[int]()
    with path.open("a") as file, ThreadPoolExecutor(2) as pool:
        numbers = [each for each in range(number) if each not in done]
        for row in pool.map(compared, map(point, numbers), numbers):
            print(json.dumps(row), file=file, flush=True)
            print(f"{row['number']}: {row['setting']['model']}, {row.get('needs', 'not covered')}", flush=True)
    report(path)


def report(path: Path) -> None:
    """Shares and errors of the points in a file, at the size of the image that was traced and at others."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    covered = [row for row in rows if row["covered"]]
    print(f"{len(rows)} points, {len(covered)} covered")
    for title, moved in (("at the traced size of the image", False), ("at another", True)):
        there = [row for row in covered if row["moved"] == moved]
        print(f"{len(there)} {title}")
        for name in ("allocated", "reserved", "needs", "answer") if there else ():
            shares = sorted(row[name] for row in there)
            low = sum(share < -0.005 for share in shares)
            equal = sum(share == 0 for share in shares)
            print(f"  {name}: {equal} equal, {shares[0]:+.3%} to {shares[-1]:+.3%}, {low} too low by more than 0.5 %")


def size() -> None:
    """Bytes of each file that comes with the package."""
    files = sorted(shipped.shipped_folder().iterdir())
    for file in files:
        print(f"{file.name:28} {file.stat().st_size:9,}")
    print(f"{'in all':28} {sum(file.stat().st_size for file in files):9,}")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["size"]
    if command == "data":
        data(arguments)
    elif command == "held-out":
        held_out(int(arguments[0]), Path(arguments[1]), point)
    elif command == "older":
        held_out(int(arguments[0]), Path(arguments[1]), older_point)
    elif command == "windows":
        held_out(int(arguments[0]), Path(arguments[1]), window_point)
    elif command == "again":
        again(Path(arguments[0]))
    elif command == "report":
        report(Path(arguments[0]))
    elif command == "size":
        size()
    else:
        raise SystemExit(__doc__)
