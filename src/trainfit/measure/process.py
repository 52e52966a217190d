"""Starting a trial in a clean process, and what became of it. Imports no torch."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError


def run_trial(request: Mapping[str, Any], *, gpu_uuid: str | None) -> dict[str, Any]:
    """The record that `measure.trial` writes for `request`; a process that died has "died" as outcome, and no figures.

    The process sees the one GPU, or none. It is ended, whatever happens here.

    Raises:
        TrainfitError: the setting cannot be built.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu_uuid or ""}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer, log = (Path(folder) / name for name in ("request.json", "answer.json", "log"))
        asked.write_text(json.dumps({**request, "path": sys.path}))
        command = [sys.executable, "-m", "trainfit.measure.trial", str(asked), str(answer)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            process.wait()
        finally:
            process.kill()
            process.wait()
        if not answer.exists():
            return {
                "outcome": "died",
                "message": last_words(process.returncode, log),
                **dict.fromkeys(("peak", "speed", "end")),
            }
        found = json.loads(answer.read_text())
    if found["outcome"] == "refused":
        raise TrainfitError(found["message"])
    return found


def last_words(code: int, log: Path) -> str:
    """Exit status or signal of a process that gave no answer, and the last line it wrote."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
    if code == -signal.SIGKILL:
        return "killed: the machine's own memory may have run out"
    return f"exit status {code}: {lines[-1]}"


def context_bytes(free_before_bytes: int, reading: Mapping[str, Any] | None) -> int | None:
    """What a process holds of the device beside the caching allocator's memory: right while nobody else uses more or less."""
    if reading is None:
        return None
    return free_before_bytes - reading["device_free_bytes"] - reading["reserved_bytes"]
