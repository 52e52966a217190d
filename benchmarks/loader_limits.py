"""Training under the limits of a container: a small /dev/shm and few open files, with a large effective batch and masks.

python benchmarks/loader_limits.py DATA [EFFECTIVE_BATCH]    needs root for `unshare` and `mount`; prints a line a case.

Each case trains a small segmentation model for two optimizer steps with 4 loader processes, and ends with the last line that the run
printed and the longest time in which it printed nothing.
"""

import os
import selectors
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
MODEL = ["--resolution", "96", "--groups", "1", "--num-queries", "20", "--no-multi-scale", "--device", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    code: int
    took_s: float
    silent_s: float
    """The longest time without output, the start (imports, data set) included."""
    last: str


def main(data: str, effective_batch: str) -> None:
    """Run every case."""
    for name, (shm_mib, files) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["rfdetr-seg-nano", "--data", data, "--out", str(Path(folder) / "run"), *MODEL]
            arguments += [
                "--effective-batch",
                effective_batch,
                "--micro-batch",
                "8",
                "--workers",
                "4",
                "--max-steps",
                "2",
            ]
            outcome = watched(limited([sys.executable, "-m", "trainfit", "train", *arguments], shm_mib, files))
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
