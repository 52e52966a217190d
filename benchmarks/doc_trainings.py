"""Run every `trainfit train` command of README.md and docs/, one step each on small sizes, on the CPU.

python benchmarks/doc_trainings.py [--seconds 900] [--only timm]

Commands that need what is not here (several GPUs, weights from a network, a Detectron2 file, a plan or a run of an earlier
command) are listed with the reason. What a command says stays; sizes, data, weights and steps are added behind it.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
STEPS = [
    "--max-steps",
    "1",
    "--eval-every",
    "0",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--effective-batch",
    "2",
    "--micro-batch",
    "2",
]
SMALL = {
    "rfdetr": ["--resolution", "96", "--groups", "1", "--num-queries", "20", "--no-multi-scale"],
    "maskrcnn": ["--resolution", "64", "--max-size", "64"],
    "fasterrcnn": ["--resolution", "64", "--max-size", "64"],
    "timm": ["--resolution", "32"],
}
TAKEN_OUT = [
    "--data",
    "--weights",
    "--epochs",
    "--out",
    "--effective-batch",
    "--micro-batch",
    "--accumulation",
    "--max-steps",
    "--resolution",
]
PLACEHOLDERS = {"MODEL", "RUN", "FILE", "TEXT", "N", "...", "rtdetr-seg-S", "S"}
LEFT_OUT = {
    "--help": "prints alone",
    "--weights DET": "the run of another command",
    "torchrun": "several processes",
    "--plan": "the plan of another command",
    "--resume": "the run of another command",
    "--detectron2": "a file of Detectron2's",
    "--config": "a file of the reader's",
    "--print-config": "prints alone",
    "--track": "a tracker's package",
    "--tensorboard": "a tracker's package",
    "clip:": "pairs of images and texts",
    "mine": "a function of the reader's",
    "adamw-8bit": "a GPU",
}


def commands() -> list[str]:
    """Lines of the documents' code that train, without comments, each once."""
    lines: dict[str, None] = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, flags=re.DOTALL)
        inline = [
            code for code in re.findall(r"`(trainfit train [^`]+)`", text) if not PLACEHOLDERS & set(shlex.split(code))
        ]
        for block in [*blocks, *inline]:
            for line in block.replace("\\\n", " ").splitlines():
                line = line.partition("  #")[0].partition(" # ")[0].strip()
                if re.match(r"(\w+=\S+ )*(torchrun .*-m )?trainfit train", line):
                    lines[line] = None
    return list(lines)


def run(command: str, folder: Path, data: dict[str, Path], number: int) -> tuple[bool, str]:
    """Whether the command ran, and its last line."""
    words = shlex.split(command)[2:]
    family = next((name for name in SMALL if any(word.startswith(name) for word in words)), "rfdetr")
    for flag in TAKEN_OUT:
        if flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    own = data["timm" if family == "timm" else "rfdetr"]
    steps = [*STEPS, "--data", str(own), "--weights", "random", "--out", str(folder / f"run-{number}")]
    call = [sys.executable, "-m", "trainfit", "train", *words, *steps, *SMALL[family]]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def main() -> int:
    """Run them until the time is over; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--only", default="", help="a part of the commands to run; all unless given")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    from PIL import Image

    from trainfit.tasks.detection.sample_set import write_sample_set

    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = {"rfdetr": write_sample_set(folder / "set", train=4, val=2), "timm": folder / "classes"}
        for split in ("train", "val"):
            for label in ("car", "bus"):
                (folder / "classes" / split / label).mkdir(parents=True)
                for n in range(2):
                    Image.new("RGB", (40, 40), (40 * n, 90, 160)).save(folder / "classes" / split / label / f"{n}.png")
        for number, command in enumerate(each for each in commands() if arguments.only in each):
            reason = next((why for mark, why in LEFT_OUT.items() if mark in command), None)
            if reason is None and time.monotonic() > end:
                reason = "no time left"
            if reason is not None:
                print(f"left out ({reason}): {command}", flush=True)
                continue
            began = time.monotonic()
            right, line = run(command, folder, data, number)
            failed += not right
            print(f"{'ran' if right else 'FAILED'} in {time.monotonic() - began:.0f} s: {command}", flush=True)
            if not right:
                print(f"  {line}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
