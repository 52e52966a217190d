"""The loader under the limits of a container: a small /dev/shm and few open files, with a large effective batch and masks.

python benchmarks/loader_limits.py DATA [EFFECTIVE_BATCH]    needs root for `unshare` and `mount`; prints a line a case.

DATA is a COCO set of one JSON beside `images/` (fruits_nuts), repeated until an epoch has two windows. Each case loads two windows
as RF-DETR Seg Nano trains on them (312 px) with 4 loader processes. It shows the last line printed and the longest silence.
"""

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
from trainfit.tasks.detection.read import read_dataset
from trainfit.training.loader import WindowPlan, training_loader
records = read_dataset(sys.argv[1]).splits["train"]
plan = WindowPlan(images=len(records), effective_batch=int(sys.argv[2]), sizes=(312,), seed=0)
decode, note = partial(make_sample, masks=True), partial(print, flush=True)
for window in training_loader(records, decode, plan, steps=range(2), augment=True, workers=4, note=note):
    masks = sum(len(sample.masks) for sample in window)
    print(f"a window of {len(window)} images with {masks} masks", flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended."""

    code: int
    took_s: float
    silent_s: float
    """The longest time without output, that until the first line (imports, data set, a whole window) included."""
    last: str


def main(data: str, effective_batch: str) -> None:
    """Run every case."""
    with tempfile.TemporaryDirectory() as folder:
        repeat(Path(data), Path(folder), 2 * int(effective_batch))
        run_cases(folder, effective_batch)


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


def run_cases(data: str, effective_batch: str) -> None:
    """Load two windows under each limit."""
    for name, (shm_mib, files) in CASES.items():
        outcome = watched(limited([sys.executable, "-c", LOAD, data, effective_batch], shm_mib, files))
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
                if not chunk:
                    break
    if silent_s > SILENCE_S:
        process.kill()
    lines = text.decode(errors="replace").replace("\r", "\n").strip().splitlines() or [""]
    return Outcome(code=process.wait(), took_s=time.monotonic() - began, silent_s=silent_s, last=lines[-1])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "256")
