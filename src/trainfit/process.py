"""Starting a Python process of one's own, and what became of it. Imports no torch."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def ask(module: str, request: Mapping[str, Any], **environment: str) -> tuple[str | None, str]:
    """What `python -m MODULE REQUEST ANSWER` wrote to ANSWER, the request in a file with this process's module path.

    If it wrote none: None, and its exit status or signal with the last line it printed. It is ended, whatever happens here.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer, log = (Path(folder) / name for name in ("request.json", "answer.json", "log"))
        asked.write_text(json.dumps({**request, "path": sys.path}))
        command = [sys.executable, "-m", module, str(asked), str(answer)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | environment
            )
        try:
            process.wait()
        finally:
            process.kill()
            process.wait()
        return (answer.read_text(), "") if answer.exists() else (None, last_words(process.returncode, log))


def last_words(code: int, log: Path) -> str:
    """Exit status or signal of a process that gave no answer, and the last line it wrote."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
    if code == -signal.SIGKILL:
        return "killed: the machine's own memory may have run out"
    return f"exit status {code}: {lines[-1]}"
