"""The file format of a model's stored traces: a tar file, compressed by xz, of JSON records and of columns of numbers.

`NAME.json` is a record. Where it has null instead of the numbers of a trace, these are in files that `numpy.load` reads:

- `rows/NAME.npy`: the distinct tensors, a row each, in the order in which they first appear: the six numbers of
  `Trace.to_record`, then those that the record has for each tensor (`PER_TENSOR`, where it has them, in that order).
- `kinds/NAME.npy`: for each tensor of the trace its index in `rows`.
- `ages/NAME.npy`: for each event 0 where the next tensor is allocated, else n: the n-th newest tensor is freed (1: the newest).
- `passing/NAME.npy`: `ScaledTrace.passing`, each number less the one before it.

A layer has the kinds and ages of the layer before it, which xz finds: an archive takes a tenth of the room of one that has the
numbers as JSON, which earlier versions wrote and this one reads, too. `Archive.text` gives a record as JSON again.
"""

import io
import json
import lzma
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PER_TENSOR = ("small_bytes", "follows")
"""Lists of a record with a number for each tensor of its trace."""
PASSING = "passing"
FIELDS = 6
"""Numbers of a tensor in `Trace.to_record`."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The files of an archive, which are parsed when they are asked for."""

    files: Mapping[str, bytes]
    """Path in the archive -> content."""

    @property
    def names(self) -> list[str]:
        """Names of the records."""
        return [name for name in self.files if name.endswith(".json")]

    def record(self, name: str) -> dict[str, Any]:
        """A record: its trace's tensors as an array of `FIELDS` columns, its other long lists as arrays of integers."""
        record = json.loads(self.files[name])
        if f"rows/{name}.npy" not in self.files:
            return record
        rows = self._numbers("rows", name)[self._numbers("kinds", name)]
        per_tensor = [key for key in PER_TENSOR if key in record]
        record["trace"] |= {"tensors": rows[:, :FIELDS], "events": _events(self._numbers("ages", name))}
        record |= {key: rows[:, FIELDS + index] for index, key in enumerate(per_tensor)}
        if PASSING in record:
            record[PASSING] = np.cumsum(self._numbers(PASSING, name))
        return record

    def text(self, name: str) -> str:
        """A record as JSON, as it was when the archive was written."""
        if f"rows/{name}.npy" not in self.files:
            return self.files[name].decode()
        return json.dumps(self.record(name), separators=(",", ":"), default=lambda array: array.tolist())

    def _numbers(self, column: str, name: str) -> NDArray[np.int64]:
        return np.load(io.BytesIO(self.files[f"{column}/{name}.npy"]), allow_pickle=False).astype(np.int64)


def read_archive(path: Path) -> Archive:
    """Unpack an archive. Raises OSError, lzma.LZMAError or tarfile.TarError where it is damaged."""
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(path.read_bytes()))) as archive:
        members = ((info.name, archive.extractfile(info)) for info in archive if info.isfile())
        return Archive(files={name: file.read() for name, file in members if file is not None})


def write_archive(path: Path, entries: Mapping[str, str]) -> None:
    """Write an archive of records as JSON, with the same bytes for the same entries."""
    files: dict[str, bytes] = {}
    for name, text in entries.items():
        record = json.loads(text)
        columns = _columns(record) if isinstance(record.get("trace"), dict) else {}
        files |= {f"{column}/{name}.npy": _file(numbers) for column, numbers in columns.items()}
        files[name] = json.dumps(record, separators=(",", ":")).encode() if columns else text.encode()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))
    path.write_bytes(lzma.compress(data.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def _columns(record: dict[str, Any]) -> dict[str, NDArray[np.int64]]:
    """Take the numbers of a trace out of its record."""
    trace = record["trace"]
    events = np.array(trace["events"], dtype=np.int64)
    tensors = [np.array(trace["tensors"], dtype=np.int64).reshape(-1, FIELDS)]
    tensors += [np.array(record[key], dtype=np.int64).reshape(-1, 1) for key in PER_TENSOR if key in record]
    rows, first, kinds = np.unique(np.hstack(tensors), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    columns = {"rows": rows[order], "kinds": np.argsort(order)[kinds.ravel()], "ages": _ages(events)}
    assert np.array_equal(_events(columns["ages"]), events), "tensors are not numbered as they are allocated"
    trace |= {"tensors": None, "events": None}
    record |= {key: None for key in PER_TENSOR if key in record}
    if PASSING in record:
        columns[PASSING] = np.diff(np.array(record[PASSING], dtype=np.int64), prepend=0)
        record[PASSING] = None
    return columns


def _ages(events: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(events > 0, 0, np.cumsum(events > 0) + events + 1)


def _events(ages: NDArray[np.int64]) -> NDArray[np.int64]:
    count = np.cumsum(ages == 0)
    return np.where(ages == 0, count, ages - count - 1)


def _file(numbers: NDArray[np.int64]) -> bytes:
    """An array of the smallest integers that hold it, a column of a matrix after the other, as `numpy.save` writes it."""
    most = int(numbers.max(initial=0))
    small = "<u2" if most < 1 << 16 else "<u4"
    file = io.BytesIO()
    np.save(
        file, np.asfortranarray(numbers.astype(small if numbers.ndim == 1 and numbers.min(initial=0) >= 0 else "<i8"))
    )
    return file.getvalue()
