"""The file format of stored traces: what is read is what was written, with what anyone has (tarfile, numpy) too."""

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainfit.memory.archive import read_archive, write_archive
from trainfit.memory.columns import Columns
from trainfit.memory.scaling import ScaledTrace
from trainfit.memory.shipped import archive_path
from trainfit.tracing.events import CATEGORIES, SCHEMA, Trace


def random_record(seed: int, *, tensors: int = 300, **lists: list[int]) -> dict[str, Any]:
    """A record of a trace with few kinds of tensors and any order of frees; some tensors are never freed."""
    draw = random.Random(seed)
    kinds = [[draw.randrange(2**40), *(draw.randrange(len(CATEGORIES)) for _ in range(5))] for _ in range(20)]
    rows: list[list[int]] = []
    events: list[int] = []
    live: list[int] = []
    while len(rows) < tensors:
        if live and draw.random() < 0.45:
            events.append(-live.pop(draw.randrange(len(live))))
        else:
            rows.append(draw.choice(kinds))
            events.append(len(rows))
            live.append(len(rows))
    names = [f"name {number} \N{MULTIPLICATION SIGN}" for number in range(len(CATEGORIES))]
    trace = {"schema": SCHEMA, "names": names, "tensors": rows, "events": events, "marks": [[0, "window 0"]]}
    return {"first": 1 / 3, "trace": trace, **lists, "ops": [["aten.mm", "forward", "float32", 3, 1e30, 0.1]]}


@pytest.mark.parametrize("seed", range(8))
def test_what_is_read_is_what_was_written(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    sizes = [draw.randrange(2**33) for _ in range(300)]
    records: dict[str, Any] = {
        "alone.json": random_record(seed),
        "scaled.json": random_record(seed + 1, small_bytes=sizes, passing=sorted(draw.sample(range(300), 9))),
        "nothing passes.json": random_record(seed + 2, small_bytes=[1] * 300, passing=[]),
        "a window.json": random_record(seed + 3, follows=[draw.randrange(7) for _ in range(300)]),
        "empty.json": random_record(seed, tensors=0, small_bytes=[], passing=[]),
        "laws of training.json": {"variables": [], "sizes": [], "counts": []},
    }
    path = tmp_path / "model.tar.xz"
    write_archive(path, {name: json.dumps(record) for name, record in records.items()})
    archive = read_archive(path)
    assert sorted(archive.names) == sorted(records)
    for name, record in records.items():
        assert json.loads(archive.text(name)) == record
        assert list(archive.record(name)) == list(record)
    write_archive(tmp_path / "again.tar.xz", {name: archive.text(name) for name in reversed(archive.names)})
    assert path.read_bytes() == (tmp_path / "again.tar.xz").read_bytes()


def test_numpy_and_tarfile_are_enough_to_read_one(tmp_path: Path) -> None:
    """The format is that of the docstring of `memory.archive`, decoded here without it."""
    record = random_record(3, small_bytes=list(range(300)), passing=[2, 5, 9])
    write_archive(tmp_path / "model.tar.xz", {"a.json": json.dumps(record)})
    with tarfile.open(tmp_path / "model.tar.xz") as files:
        contents = {info.name: (files.extractfile(info) or io.BytesIO()).read() for info in files}
    columns = {key.partition("/")[0]: np.load(io.BytesIO(contents[key])) for key in contents if key.endswith(".npy")}
    tensors = columns["rows"][columns["kinds"]]
    assert tensors[:, :6].tolist() == record["trace"]["tensors"]
    assert tensors[:, 6].tolist() == record["small_bytes"]
    assert np.cumsum(columns["passing"]).tolist() == [2, 5, 9]
    events: list[int] = []
    count = 0
    for age in columns["ages"].tolist():
        count += age == 0
        events.append(count if age == 0 else -(count - age + 1))
    assert events == record["trace"]["events"]


def test_an_archive_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It had every record as one JSON file."""
    text = json.dumps(random_record(4, small_bytes=[0] * 300, passing=[]))
    with tarfile.open(tmp_path / "model.tar.xz", "w:xz") as archive:
        info = tarfile.TarInfo("a.json")
        info.size = len(text.encode())
        archive.addfile(info, io.BytesIO(text.encode()))
    archive = read_archive(tmp_path / "model.tar.xz")
    assert archive.text("a.json") == text


def test_a_record_becomes_the_columns_that_its_json_gives(tmp_path: Path) -> None:
    """A trace of the package, read as arrays and as JSON."""
    old = read_archive(archive_path("rfdetr-nano"))
    name = next(name for name in old.names if name.startswith("training") and "any" in name)
    write_archive(tmp_path / "model.tar.xz", {name: old.text(name)})
    new = read_archive(tmp_path / "model.tar.xz")
    record = json.loads(old.text(name))
    from_arrays, from_json = (ScaledTrace.from_record(each) for each in (new.record(name), record))
    assert from_arrays.ops == from_json.ops
    assert np.array_equal(from_arrays.small_bytes, record["small_bytes"])
    assert np.array_equal(from_arrays.passing, record["passing"])
    assert from_arrays.trace == Trace.from_record(record["trace"])
    assert np.array_equal(Columns.of(from_arrays.trace).nbytes, from_json.columns.nbytes)
