"""How soon `plan` and `predict` answer for a data set, and how near laws come to traces.

    python benchmarks/seconds.py data FOLDER...       # seconds of built-in models for data sets, and whether torch was imported
    python benchmarks/seconds.py held-out [NUMBER]    # random points that no law was found from: sizes, peaks, memory needs
    python benchmarks/seconds.py size                 # of what comes with the package

Results: benchmarks/README.md.
"""

import random
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from trainfit.gpus.catalogue import find_gpu
from trainfit.memory import shipped
from trainfit.memory.predict import needed
from trainfit.memory.priced import Pricer
from trainfit.memory.scaling import peak_bytes
from trainfit.models.setting import make_setting
from trainfit.tracing.trace_cache import get_trace

CODE = "import sys; from trainfit.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
MEMORY = "8GiB"


def models() -> list[str]:
    """Those that the package answers for any data."""
    return sorted(path.name.removesuffix(".tar.xz") for path in shipped.shipped_folder().glob("*.tar.xz"))


def run(*arguments: str) -> tuple[float, float, bool]:
    """Wall and CPU seconds of a command in a process of its own, and whether it imported torch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, check=False, timeout=600)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, done.returncode != 0


def data(folders: list[str]) -> None:
    """A line for each model, data set and command."""
    for model in models():
        for folder in folders:
            for command, own in (("predict", ("--gpu", "RTX 3060")), ("plan", ("--memory", MEMORY, "--no-cache"))):
                wall, cpu, torch = run(command, model, "--data", folder, "--allow-outside", *own)
                imported = "torch imported" if torch else "no torch"
                print(
                    f"{model:20} {Path(folder).name:14} {command:8} {wall:6.1f} s, CPU {cpu:5.1f} s, {imported}",
                    flush=True,
                )


def held_out(number: int) -> None:
    """Points at random: what the package answers against a trace made now."""
    draw = random.Random(0)
    pricer = Pricer(gpu=find_gpu("A100"), cache=False)
    for _ in range(number):
        objects = draw.randint(1, 250)
        setting = make_setting(
            draw.choice([model for model in models() if model.startswith("rfdetr")]),
            precision="bf16",
            accumulation=2,
            micro_batch=draw.choice((1, 2, 3, 5, 6, 8)),
            classes=draw.randint(1, 400),
            objects_per_image=objects,
            checkpointing=draw.choice(("none", "all")),
        )
        if not pricer.answers(setting):
            print(f"{setting.model}: not covered: {setting}", flush=True)
            continue
        made = pricer.trace(setting, "training")
        exact = replace(pricer.request(setting, "training"), setting=setting)
        true = get_trace(exact, cache=False)
        differ = sum(a.nbytes != b.nbytes for a, b in zip(made.trace.tensors, true.trace.tensors, strict=False))
        alike = made.trace.events == true.trace.events
        peaks = peak_bytes(made.trace) / peak_bytes(true.trace) - 1
        low, high = (needed(each, pricer.gpu, pricer.config) for each in (made, true))
        needs = low.high_bytes / high.high_bytes - 1
        knobs = f"{setting.micro_batch} x {objects} objects, {setting.classes} classes, {setting.checkpointing}"
        print(
            f"{setting.model}, {knobs}: {differ} sizes differ, events {'equal' if alike else 'differ'}, "
            f"peak {peaks:+.3%}, needs {needs:+.3%}",
            flush=True,
        )


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
        held_out(int(arguments[0]) if arguments else 20)
    elif command == "size":
        size()
    else:
        raise SystemExit(__doc__)
