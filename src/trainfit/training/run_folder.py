"""What a run leaves on disk. Every file is replaced whole: a kill or a full disk leaves the previous one."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from trainfit.errors import TrainfitError
from trainfit.step.attempt import is_out_of_memory
from trainfit.training.run_files import METRICS, RECIPE, TELEMETRY

STATE = "state.pt"
LAST = "last.safetensors"
BEST = "best.safetensors"
UPSTREAM = "best-rfdetr.pth"


def prepare(out: Path | None, model: str, *, resume: bool) -> Path:
    """Make the run folder, runs/MODEL-1 or the next number that is free unless given; prove that it can be written.

    Raises:
        TrainfitError: it holds another run, or cannot be written.
    """
    if out is None:
        out = next(path for n in count(1) if not (path := Path("runs") / f"{model}-{n}").exists())
    if not resume and (out / RECIPE).exists():
        raise TrainfitError(f"{out} already holds a run: go on with --resume {out}, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise TrainfitError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from error
    return out


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, flush it to the disk, then take its name.

    Raises:
        TrainfitError: the disk is full or cannot be written; the previous file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        # torch and safetensors wrap the operating system's error
        temporary.unlink(missing_ok=True)
        kept = "the previous one is intact" if path.exists() else "there is no previous one"
        reason = _system_reason(error)
        raise TrainfitError(f"could not save {path} ({reason}); {kept}: free space and go on with --resume") from error


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the run's telemetry says of events of this name, in order, without name and time."""
    path = folder / TELEMETRY
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if f'"event": "{name}"' in line and line.endswith("}")]
    return [{key: value for key, value in row.items() if key not in ("event", "time")} for row in rows]


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_atomically` does."""
    write_atomically(path, lambda target: target.write_text(text))


def _system_reason(error: BaseException) -> str:
    """The operating system's words, which torch and safetensors bury under their own; else the first line of theirs."""
    inner: BaseException | None = error
    if is_out_of_memory(error):
        return "host memory is full"
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return str(error).splitlines()[0]


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with what `models.registry.from_metadata` needs."""

    def write(target: Path) -> None:
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        safetensors.torch.save_file(tensors, target, metadata=dict(metadata))

    write_atomically(path, write)


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `save_weights` wrote.

    Raises:
        TrainfitError: the file cannot be read as safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TrainfitError(f"{path}: not a readable safetensors file ({error})") from error


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Training state: tensors and plain values only, so that it loads with `weights_only`."""

    def write(target: Path) -> None:
        with target.open("wb") as file:
            torch.save(dict(state), file)

    write_atomically(path, write)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        TrainfitError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise TrainfitError(f"{path} is damaged ({reason}): start anew with --weights {path.parent / LAST}") from error


class Metrics:
    """A run folder's `METRICS`: an append-only JSON-lines file that can be cut back to a step."""

    def __init__(self, folder: Path, *, keep_through: int, pending_evaluation: bool = False) -> None:
        """Open it without the lines that a resumed run writes again.

        These are the lines of steps after `keep_through` and, with `pending_evaluation`, the evaluation's after that step.
        """

        def stays(row: Mapping[str, Any]) -> bool:
            again = pending_evaluation and row["step"] == keep_through and "loss" not in row
            return row["step"] <= keep_through and not again

        self.path = path = folder / METRICS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and stays(json.loads(line))]
        if kept != lines:
            write_text(path, "".join(kept))

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; each has a `step`.

        Raises:
            TrainfitError: the disk is full.
        """
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise TrainfitError(
                f"could not write {self.path} ({error.strerror}): free space and go on with --resume"
            ) from error
