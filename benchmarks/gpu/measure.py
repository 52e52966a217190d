"""Measure memory and speed of training steps on this machine's first GPU; each case is a process of its own.

    python benchmarks/gpu/measure.py --out DIR [--only NAME ...] [--seconds 540] [--snapshot NAME ...]

DIR/cases.jsonl gets a line after each case and DIR/measured.json the whole; what is in the former is not measured again.
`--device cpu --only NAME` tries a case on the CPU: its time, no memory. README.md says how to carry this to a machine.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"
sys.path.insert(0, str(SOURCE))  # a bare machine has trainfit's source, not trainfit installed

from settings import SUITE  # noqa: E402

from trainfit.measuring.calibration import append, read  # noqa: E402
from trainfit.measuring.process import context_bytes  # noqa: E402
from trainfit.process import last_words  # noqa: E402

KERNELS = "kernels"
"""The name under which single operators are sampled, see kernels.py."""
REHEARSAL = "TRAINFIT_GPU_REHEARSAL"
"""The variable that tells a case's process."""
CASE_S, LEAST_S, POLL_S = 90, 15, 0.01
"""A case is stopped after `CASE_S` and none begins in the last `LEAST_S`; between looks at the device's memory."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """The first GPU as NVML sees it."""

    nvml: Any
    handle: Any

    def memory(self) -> Any:
        """Total, reserved, free and used bytes of the device, whoever uses them."""
        return self.nvml.nvmlDeviceGetMemoryInfo(self.handle, version=self.nvml.nvmlMemory_v2)

    def to_json(self) -> dict[str, Any]:
        """What it was before the first case."""
        memory = self.memory()
        return {
            "name": self.nvml.nvmlDeviceGetName(self.handle),
            "driver": self.nvml.nvmlSystemGetDriverVersion(),
            "total_bytes": memory.total,
            "driver_reserved_bytes": memory.reserved,
            "used_bytes": memory.used,
        }


def first_card() -> Card | None:
    """None where there is no driver or no card."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        sys.exit("measuring needs nvidia-ml-py: pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
        return Card(nvml=nvml, handle=nvml.nvmlDeviceGetHandleByIndex(0))
    except nvml.NVMLError:
        return None


@dataclass(kw_only=True)
class Worker:
    """A process that has begun to import, and waits for `measure`. It is ended, whatever happens, by `close`."""

    name: str
    device: str
    history: Path | None = None
    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def __post_init__(self) -> None:
        """Start it."""
        case = next((case for case in SUITE if case.name == self.name), None)
        self.answer, self.log = Path(self.folder.name) / "answer.json", Path(self.folder.name) / "log"
        environment = {key: value for key, value in os.environ.items() if key != "PYTORCH_ALLOC_CONF"} | {
            "PYTORCH_CUDA_ALLOC_CONF": case.alloc_conf if case else "",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH")))),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # NVML's
            "CUDA_VISIBLE_DEVICES": "0",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(HERE / "one_case.py"), self.name, self.device, str(self.answer)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(self.history or "")], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
            )

    def measure(self, card: Card | None, limit_s: float) -> dict[str, Any] | None:
        """Let it go on, and watch the device; None if it took longer than `limit_s`."""
        before, peak = (card.memory(), 0) if card else (None, 0)
        assert self.process.stdin is not None
        start = time.monotonic()
        if self.process.poll() is None:
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
        while self.process.poll() is None:
            if time.monotonic() - start > limit_s:
                return None
            peak = max(peak, card.memory().used) if card else 0
            time.sleep(POLL_S)
        record = json.loads(self.answer.read_text()) if self.answer.exists() else self._failed()
        record["wall_s"] = round(time.monotonic() - start, 2)
        if before is not None:
            record["device"] = {"free_bytes": before.free, "peak_used_bytes": peak - before.used}
            record["context_bytes"] = {
                at: context_bytes(before.free, record.get(at)) for at in ("begin", "built", "end")
            }
        return record

    def _failed(self) -> dict[str, Any]:
        message = last_words(self.process.returncode, self.log)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return {"schema": 1, "name": self.name, "outcome": "error", "message": message, "log": lines[-15:]}

    def close(self) -> None:
        """End it if it still runs."""
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


def records(out: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by name; of a case that was measured again, the last. A line that was cut off is left out."""
    return {record["name"]: record for record in read(out / "cases.jsonl")}


def keep(out: Path, record: dict[str, Any]) -> None:
    """Append in one write, then renew the file of the whole run."""
    append(out / "cases.jsonl", record)
    whole = out / "measured.json.new"
    whole.write_text(json.dumps({"schema": 1, "records": list(records(out).values())}, indent=0))
    whole.replace(out / "measured.json")


def run(names: Sequence[tuple[str, Path | None]], device: str, card: Card | None, out: Path, seconds: float) -> int:
    """Measure (case, file for its snapshot); how many were done. While one runs, the next imports."""
    machine = card.to_json() if card else None
    deadline = time.monotonic() + seconds
    done = 0
    with ExitStack() as workers:

        def start(number: int) -> Worker | None:
            if number == len(names):
                return None
            worker = Worker(name=names[number][0], device=device, history=names[number][1])
            workers.callback(worker.close)
            return worker

        following = start(0)
        while following is not None and (left_s := deadline - time.monotonic()) > LEAST_S:
            worker, following = following, start(done + 1)
            record = worker.measure(card, min(CASE_S, left_s))
            if record is None and left_s < CASE_S:
                break
            record = record or {"schema": 1, "name": worker.name, "outcome": "error", "message": f"over {CASE_S} s"}
            done += 1
            print(f"{done:4} {worker.name:60}{_said(record)}", flush=True)
            if worker.history is None:
                keep(out, record | {"card": machine, "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
            worker.close()
    return done


def _said(record: dict[str, Any]) -> str:
    peak, speed = record.get("peak"), record.get("speed")
    memory = f"{peak['reserved_bytes'] / 2**30:9.2f} GiB reserved" if peak else ""
    rate = f"{speed['images_per_s']:10.1f} images/s" if speed else ""
    cpu = " (CPU time)" if record.get("machine", {}).get("device") == "cpu" else ""
    outcome = "" if record["outcome"] == "ran" else f"  {record['outcome']}: {record['message']}"
    return f"{memory}{rate}{cpu}{outcome}"


def main(argv: list[str]) -> int:
    """Measure what is not there yet; the exit code is 2 where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what was measured")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases")
    parser.add_argument("--seconds", type=float, default=540, help="in all")
    parser.add_argument(
        "--snapshot", nargs="+", default=[], metavar="NAME", help="allocator's log of a build and 2 windows"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="without a GPU: every call of CUDA answered by a stand-in, to find faults",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    arguments = parser.parse_args(argv)
    known = [KERNELS, *(case.name for case in SUITE)]
    if arguments.list:
        print(*known, sep="\n")
        return 0
    if unknown := [name for name in (*(arguments.only or ()), *arguments.snapshot) if name not in known]:
        parser.error(f"no case named {', '.join(unknown)}; --list prints the names")
    cpu = arguments.device == "cpu"
    if cpu and (not arguments.only or KERNELS in arguments.only or arguments.snapshot):
        parser.error("--device cpu is a dry run of the cases in --only")
    if arguments.rehearse:
        os.environ[REHEARSAL] = "1"
        sys.path.insert(0, str(HERE / "stand_in"))
    card = None if cpu else first_card()
    if card is None and not cpu:
        print("no NVIDIA GPU on this machine: nothing was measured", file=sys.stderr)
        return 2
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    there = {name for name, record in records(out).items() if record["outcome"] != "error"}
    wanted = [name for name in known if name not in there and (not arguments.only or name in arguments.only)]
    logs = [(name, path) for name in arguments.snapshot if not (path := out / f"{name}.pickle.gz").exists()]
    todo = [*logs, *((name, None) for name in wanted)]
    done = run(todo, arguments.device, card, out, arguments.seconds)
    left = f"{len(todo) - done} left for the same command again" if done < len(todo) else "none left"
    print(f"{done} measured now, {left}: {out / 'measured.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
