"""The files that a run writes. Each is replaced as a whole: a kill or a full disk leaves the previous version."""

import json
import zipfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch

from trainfit.errors import TrainfitError
from trainfit.files import require_regular
from trainfit.step import ranks
from trainfit.training.lock import locked
from trainfit.training.run_files import METRICS, RECIPE, TELEMETRY, read_rows
from trainfit.training.saved_state import from_early_version
from trainfit.weights import (
    BEST,
    LAST,
    UNREADABLE,
    first_line,
    load_weights,
    save_weights,
    without_warnings,
    write_atomically,
)

__all__ = ["BEST", "LAST", "METRICS", "RECIPE", "TELEMETRY", "load_weights", "save_weights", "write_atomically"]

STATE = "state.pt"
PREVIOUS = "state.previous.pt"
DAMAGED = "state.damaged.pt"


@contextmanager
def opened(out: Path | None, model: str, *, resume: bool) -> Generator[Path]:
    """The run folder, on every rank; made, proved writable and locked by rank 0 for as long as the context lasts.

    Without `out` it is runs/MODEL-1 or the next number that is free.

    Raises:
        TrainfitError: it holds another run, is in use by another process, or cannot be written.
    """
    with ExitStack() as resources:

        def prepare() -> str:
            folder = _made(out, model)
            resources.enter_context(locked(folder))
            if not resume and (folder / RECIPE).exists():
                raise TrainfitError(
                    f"{folder} already holds a run: go on with --resume {folder}, or choose another --out"
                )
            return str(folder)

        yield Path(ranks.from_first_rank(prepare))


def _made(out: Path | None, model: str) -> Path:
    try:
        if out is None:
            return _new_folder(Path("runs"), model)
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        where = out or Path("runs").resolve()
        raise TrainfitError(f"--out {where} cannot be written ({error.strerror}): choose another folder") from error
    return out


def _new_folder(parent: Path, model: str) -> Path:
    """Make MODEL-1 or the next number that is free: two runs that start at once get two folders."""
    parent.mkdir(exist_ok=True)
    name = model.replace(":", "-") if "/" not in model else Path(model).stem  # a model may be a file
    for number in count(1):
        folder = parent / f"{name}-{number}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """Events of this name in the run's telemetry, in order, without name and time."""
    rows, _ = read_rows(folder / TELEMETRY)
    return [
        {key: value for key, value in row.items() if key not in ("event", "time")}
        for row in rows
        if row.get("event") == name
    ]


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_atomically` does."""
    write_atomically(path, lambda target: target.write_text(text))


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Training state: tensors and plain values only, so that it loads with `weights_only`.

    The state that was there before is kept as `PREVIOUS`.
    """

    def write(target: Path) -> None:
        with target.open("wb") as file:
            torch.save(dict(state), file)

    write_atomically(path, write, keep=path.with_name(PREVIOUS))


def load_state(path: Path, check: Callable[[Mapping[str, Any]], None] | None = None) -> dict[str, Any]:
    """Read what `save_state` wrote; `check` raises ValueError for a state that nothing can go on from.

    Raises:
        TrainfitError: the file is damaged, or `check` refuses it.
    """
    try:
        require_regular(path)
        _require_checksums(path)
        with without_warnings():
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError("not a saved state")
        state = from_early_version(cast(dict[str, Any], state))
        if check is not None:
            check(state)
        return state
    except UNREADABLE as error:
        way_out = f"start anew with --weights {path.parent / LAST}"
        raise TrainfitError(f"{path} is damaged ({first_line(error)}): {way_out}") from error


def _require_checksums(path: Path) -> None:
    """Raise an error of `UNREADABLE` unless the archive's checksums hold; torch.load does not compare them."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def has_state(folder: Path | None) -> bool:
    """Whether a run folder has a saved state, whole or not: a resume then needs no other weights."""
    return folder is not None and any((folder / name).exists() for name in (STATE, PREVIOUS))


def usable_state(folder: Path, check: Callable[[Mapping[str, Any]], None] | None = None) -> tuple[str | None, str]:
    """The file name of the newest state that is whole and passes `check`, and a remark ("" if there is nothing to say).

    A damaged state is renamed, so that the next save does not put it in the place of the previous one.

    Raises:
        TrainfitError: there is a state, and none is whole.
    """
    newest = folder / STATE
    previous = folder / PREVIOUS
    if not newest.exists():
        lost = f"{STATE} is missing: going on from {PREVIOUS}"
        return (
            (PREVIOUS, lost)
            if previous.exists()
            else (None, f"{folder} has no saved state yet: starting from its beginning")
        )
    try:
        load_state(newest, check)
    except TrainfitError as error:
        if not previous.exists():
            raise
        load_state(previous, check)
        newest.replace(folder / DAMAGED)
        return PREVIOUS, f"{error}, or as now: the previous state is used, and the damaged one kept as {DAMAGED}"
    return STATE, ""


def heal(path: Path) -> int:
    """Rewrite a JSON-lines file without its damaged lines; return their number."""
    rows, bad = read_rows(path)
    if bad:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return bad


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
        rows, self.dropped = read_rows(path)
        kept = "".join(json.dumps(row) + "\n" for row in rows if stays(row))
        if path.exists() and path.read_bytes() != kept.encode():
            write_text(path, kept)

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
