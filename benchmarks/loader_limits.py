"""The loader under the limits of a container: a small /dev/shm and few open files, with a large effective batch and masks.

    python benchmarks/loader_limits.py DATA [EFFECTIVE_BATCH] [--train] [--only TEXT]

Needs root for `unshare` and `mount`; prints a line a case. DATA is a COCO set of one JSON beside `images/` (fruits_nuts), repeated
until an epoch has two windows. Each case loads two windows as RF-DETR Seg Nano trains on them (312 px) with 4 loader processes.
With --train `trainfit train` does: one optimizer step of Seg Nano at 72 px on the CPU, its evaluation and its saving.
It shows the last line printed and the longest silence.

Measured with `fruits_nuts 256 --train` on 2 cores that some ten other processes used too: every case trained, evaluated and saved
with exit code 0, silent for at most 30 s (64 MiB), 36 s (16 MiB), 33 s (256 open files) and 35 s (both), in 104 to 146 s.
"""

import argparse
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SILENCE_S = 60
CASES = {
    "/dev/shm of 64 MiB": (64, None),
    "/dev/shm of 16 MiB": (16, None),
    "ulimit -n 256": (None, 256),
    "/dev/shm of 16 MiB, ulimit -n 256": (16, 256),
}
LOAD = """
import sys
from functools import partial
from trainfit.models.rfdetr.data import make_sample
from trainfit.tasks.augment import parse
from trainfit.tasks.detection.read import read_dataset
from trainfit.training.loader import WindowPlan, training_loader
records = read_dataset(sys.argv[1]).splits["train"]
plan = WindowPlan(images=len(records), effective_batch=int(sys.argv[2]), sizes=(312,), seed=0)
decode, note = partial(make_sample, masks=True), partial(print, flush=True)
for window in training_loader(records, decode, plan, steps=range(2), augment=parse("default"), workers=4, note=note):
    masks = sum(len(sample.masks) for sample in window)
    print(f"a window of {len(window)} images with {masks} masks", flush=True)
"""


SMALL = "--resolution 72 --no-multi-scale --groups 1 --num-queries 20 --micro-batch 16 --max-steps 1 --epochs 1 --precision fp32"
"""A model that a CPU trains on 256 images in minutes."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended."""

    code: int
    took_s: float
    silent_s: float
    """The longest time without output, that until the first line (imports, data set, a whole window) included."""
    last: str


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("effective_batch", type=int, nargs="?", default=256)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repeat(arguments.data, Path(folder), 2 * arguments.effective_batch)
        for name, limits in CASES.items():
            if arguments.only in name:
                run_case(name, limits, Path(folder), arguments.effective_batch, train=arguments.train)


def repeat(source: Path, target: Path, images: int) -> None:
    """The set `source` with copies of its images under other names and ids, until there are `images` of them or more."""
    (annotations,) = source.glob("*.json")
    document = json.loads(annotations.read_text())
    originals, objects = document["images"], document["annotations"]
    step = 1 + max(entry["id"] for entry in originals + objects)
    document |= {"images": [], "annotations": []}
    (target / "images").mkdir()
    for number in range(-(-images // len(originals))):
        shift = number * step
        for entry in originals:
            name = f"{number}-{Path(entry['file_name']).name}"
            shutil.copy(source / "images" / Path(entry["file_name"]).name, target / "images" / name)
            document["images"].append({**entry, "id": entry["id"] + shift, "file_name": name})
        for entry in objects:
            moved = {"id": entry["id"] + shift, "image_id": entry["image_id"] + shift}
            document["annotations"].append({**entry, **moved})
    (target / annotations.name).write_text(json.dumps(document))


def run_case(
    name: str, limits: tuple[int | None, int | None], data: Path, effective_batch: int, *, train: bool
) -> None:
    """Load two windows, or train on one, under the limits."""
    with tempfile.TemporaryDirectory() as out:
        python = [sys.executable, *(("-m", "trainfit", "train", "rfdetr-seg-nano") if train else ("-c", LOAD))]
        options = [
            "--data",
            data,
            "--effective-batch",
            effective_batch,
            "--workers",
            4,
            "--device",
            "cpu",
            *SMALL.split(),
        ]
        rest = [*options, "--out", f"{out}/run"] if train else [data, effective_batch]
        outcome = watched(limited([*python, *map(str, rest)], *limits))
    verdict = "silent for too long" if outcome.silent_s > SILENCE_S else f"exit code {outcome.code}"
    print(
        f"{name}: {verdict}, {outcome.took_s:.0f} s, at most {outcome.silent_s:.0f} s silent; {outcome.last}",
        flush=True,
    )


def limited(command: list[str], shm_mib: int | None, files: int | None) -> list[str]:
    """The command under the limits."""
    script = 'exec "$@"'
    if files is not None:
        script = f"ulimit -n {files}; {script}"
    if shm_mib is not None:
        script = f"mount -t tmpfs -o size={shm_mib}m tmpfs /dev/shm && {script}"
    return ["unshare", "-m", "sh", "-c", script, "sh", *command]


def watched(command: list[str]) -> Outcome:
    """Run a command; it is ended when it prints nothing for `SILENCE_S`."""
    began = heard = time.monotonic()
    silent_s, text = 0.0, b""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while silent_s <= SILENCE_S:
            ready = selector.select(1.0)
            silent_s = max(silent_s, time.monotonic() - heard)
            if ready:
                heard, chunk = time.monotonic(), os.read(process.stdout.fileno(), 65536)
                text += chunk
                print(f"{heard - began:6.1f} s  {chunk.decode(errors='replace').rstrip()}", file=sys.stderr, flush=True)
                if not chunk:
                    break
    if silent_s > SILENCE_S:
        process.kill()
    lines = text.decode(errors="replace").replace("\r", "\n").strip().splitlines() or [""]
    return Outcome(code=process.wait(), took_s=time.monotonic() - began, silent_s=silent_s, last=lines[-1])


if __name__ == "__main__":
    main()
