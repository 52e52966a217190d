"""The first five minutes: twelve commands that a new user types, one after the other, in an empty folder, timed.

    python benchmarks/first_five_minutes.py [--write]

Each must succeed. `--write` keeps the table in results/first_five_minutes.md.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trainfit.tasks.detection.sample_set import write_sample_set

RESULT = Path(__file__).parent / "results" / "first_five_minutes.md"
COMMANDS = (
    "trainfit --help",
    'trainfit plan rfdetr-nano --gpu "rtx 3060"',
    "trainfit plan rfdetr-nano --memory 8GiB --data pictures --out plan.json --html plan.html --svg plan.svg",
    'trainfit predict rfdetr-nano --gpu "rtx 3060" --micro-batch 4',
    "trainfit check-data pictures",
    "trainfit train rfdetr-nano --data pictures --resolution 96 --epochs 1 --effective-batch 8 --groups 2 "
    "--weights random --print-config",
    "trainfit train --config train.yaml",
    "trainfit report runs/rfdetr-nano-1 --html run.html",
    "trainfit evaluate runs/rfdetr-nano-1 --data pictures --pictures evaluated",
    "trainfit detect runs/rfdetr-nano-1 pictures/valid --threshold 0.1 --draw drawn --coco found.json",
    "trainfit train --resume runs/rfdetr-nano-1 --epochs 2",
    "trainfit export runs/rfdetr-nano-1",
)


def first_line(text: str) -> str:
    """What a command says first, cut for a table."""
    line = next((each for each in text.splitlines() if each.strip()), "")
    return line.strip()[:90].replace("|", "/")


def main() -> None:
    """Run them, and print what each took and said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    rows: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_sample_set(folder / "pictures", train=16, val=4)
        for command in COMMANDS:
            words = [sys.executable, "-m", *shlex.split(command)]
            start = time.monotonic()
            done = subprocess.run(
                words, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "100"}
            )
            seconds = time.monotonic() - start
            if done.returncode != 0:
                sys.exit(f"{command}: exit code {done.returncode}\n{done.stderr[-2000:]}")
            if "--print-config" in words:
                (folder / "train.yaml").write_text(done.stdout)
            rows.append(f"| `{command}` | {seconds:.1f} | {first_line(done.stdout or done.stderr)} |")
            print(rows[-1], flush=True)
    total = time.monotonic() - began
    head = "| command | seconds | its first line |\n|---|---|---|"
    text = f"{head}\n" + "\n".join(rows) + f"\n\n{len(rows)} commands, all succeeded, {total:.0f} s in all.\n"
    print(text.splitlines()[-1])
    if write:
        RESULT.write_text(f"Made by `benchmarks/first_five_minutes.py --write`, on two CPU cores.\n\n{text}")
        print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
