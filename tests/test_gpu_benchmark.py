"""The suite for a GPU and its comparison, as far as no GPU is needed: names, records, a dry run, and figures by hand."""

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from test_profile import OPS, make_trace
from trainfit.models.family import family_of
from trainfit.models.setting import make_setting
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import get_traces

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"
MEASURED = sorted((ROOT / "benchmarks" / "measured").glob("*.json"))
TINY = "timm-resnet10t-r64-b2-fp32"
MIB = 2**20
H200_MIB = 143156


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name: str) -> Any:
    return importlib.import_module(name)


def suite() -> tuple[Any, ...]:
    return module("settings").SUITE


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_suite_is_large_and_its_names_are_its_own() -> None:
    names = [case.name for case in suite()]
    assert len(names) >= 100
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)  # file names


def test_suite_covers_what_it_is_for() -> None:
    cases = suite()
    first = {case.setting.family.name for case in cases[:6]}
    assert first == {"rfdetr", "maskrcnn", "clip", "classifier", "custom"}
    assert {case.card_gib for case in cases} == {None, 4, 6, 8, 12, 16, 24}
    assert {case.setting.precision for case in cases} == {"fp32", "bf16", "fp16"}
    assert {case.setting.optimizer for case in cases} == {"adamw-fused", "adamw-foreach", "sgd"}
    assert {case.part for case in cases} == {"training", "evaluation"}


def test_cases_survive_json() -> None:
    kind = module("settings").Case
    assert [kind.from_json(json.loads(json.dumps(case.to_json()))) for case in suite()] == list(suite())


def test_every_model_exists() -> None:
    import open_clip
    import timm

    for name in {case.setting.model for case in suite()}:
        assert family_of(name)[1] == name
        kind, _, rest = name.partition(":")
        if kind == "timm":
            assert timm.is_model(rest)
        elif kind == "clip":
            assert rest in open_clip.list_models()
        elif rest:
            from trainfit.models.custom.workload import load_task

            load_task(make_setting(model=name))  # raises for a function that is not there


def test_dry_run_is_recorded_and_not_repeated(tmp_path: Path) -> None:
    arguments = ("--out", str(tmp_path), "--device", "cpu", "--only", TINY)
    done = run("measure.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "CPU time" in done.stdout
    line = (tmp_path / "cases.jsonl").read_text()
    (record,) = json.loads((tmp_path / "measured.json").read_text())["records"]
    assert record == json.loads(line)
    assert record["outcome"] == "ran"
    assert record["peak"] is None  # a CPU's memory is not a GPU's
    assert record["machine"]["device"] == "cpu"
    assert "CPU" in record["machine"]["note"]
    rates = sorted(2 / window["seconds"] for window in record["windows"][3:])
    assert record["speed"]["slowest"] == pytest.approx(rates[0])
    assert rates[0] <= record["speed"]["images_per_s"] <= rates[-1]

    again = run("measure.py", *arguments)
    assert "0 measured now, none left" in again.stdout
    assert (tmp_path / "cases.jsonl").read_text() == line
    assert module("compare").comparable([record]) == []


def test_a_rehearsal_goes_from_end_to_end(tmp_path: Path) -> None:
    """Every call of CUDA answered by a stand-in: a case, single operators, an allocator's log, and the comparison."""
    common = ("--out", str(tmp_path), "--rehearse", "--only", TINY, "kernels")
    done = run("measure.py", *common, "--snapshot", TINY)
    assert done.returncode == 0, done.stderr
    assert "3 measured now, none left" in done.stdout, done.stdout
    records = {r["name"]: r for r in json.loads((tmp_path / "measured.json").read_text())["records"]}
    assert set(records) == {TINY, "kernels"}
    record = records[TINY]
    assert record["outcome"] == "ran", record
    assert record["peak"]["reserved_bytes"] > record["peak"]["allocated_bytes"] > record["peak"]["requested_bytes"] > 0
    assert record["context_bytes"]["end"] == 500 * MIB
    assert record["machine"]["stand_in"]
    assert all("error" not in sample for sample in records["kernels"]["kernels"]), records["kernels"]
    assert (tmp_path / f"{TINY}.pickle.gz").exists()

    compare = module("compare")
    assert compare.comparable([record]) == []  # never taken for a measurement
    (kept,) = compare.comparable([record], rehearsed=True)
    row = compare.judge(kept, StoredTrace(trace=make_trace(), ops=OPS))
    assert TINY in compare.table([row])


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    measure = module("measure")
    measure.keep(tmp_path, {"name": "a", "outcome": "ran"})
    with (tmp_path / "cases.jsonl").open("a") as file:
        file.write('{"name": "b", "outc')
    assert set(measure.records(tmp_path)) == {"a"}
    measure.keep(tmp_path, {"name": "c", "outcome": "ran"})
    assert set(measure.records(tmp_path)) == {"a", "c"}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run("measure.py", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["no NVIDIA GPU on this machine: nothing was measured"]


def test_without_measurements_it_says_so(tmp_path: Path) -> None:
    done = run("compare.py", "--measured", str(tmp_path))
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert "no measurements" in done.stdout


def a_record(reserved_mib: int, outcome: str = "ran", card_gib: int | None = None) -> dict[str, Any]:
    case = module("settings").Case(setting=make_setting(model="timm:resnet50", micro_batch=4), card_gib=card_gib)
    return {
        "name": case.name,
        "case": case.to_json(),
        "outcome": outcome,
        "machine": {"device": "cuda", "card": "NVIDIA H200", "total_bytes": H200_MIB * MIB},
        "peak": {"allocated_bytes": 900 * MIB, "reserved_bytes": reserved_mib * MIB},
        "context_bytes": {"end": 400 * MIB},
        "speed": {"images_per_s": 100.0},
    }


def test_comparison_by_hand() -> None:
    """Tensors peak at 64 + 128 + 32 + 400 + 200 + 64 + 100 MiB; forward and backward have a 32 MiB cuBLAS workspace each."""
    compare = module("compare")
    stored = StoredTrace(trace=make_trace(), ops=OPS)
    row = compare.judge(a_record(1100), stored)
    assert row.predicted_bytes == (988 + 64) * MIB
    assert row.error == pytest.approx(1052 / 1100 - 1)
    assert row.needed_bytes == 1300 * MIB
    assert row.verdict == "fits"
    assert not row.wrong
    assert compare.judge(a_record(1100, "out of memory"), stored).wrong
    refused = compare.judge(a_record(1100, card_gib=1), stored)  # less 1 GiB: nothing is left
    assert refused.verdict == "does not fit"
    assert refused.wrong

    text = compare.table([row, refused])
    assert "WRONG" in text
    assert "1/2" in text
    drawing = ET.fromstring(compare.picture([row]))
    circles = [e for e in drawing.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2  # the run, and the legend
    low = compare.judge(a_record(2000), stored)
    assert low.error < -0.05
    assert low.held_bytes == 2400 * MIB


@pytest.mark.skipif(not MEASURED, reason="no measurement is committed yet")
@pytest.mark.parametrize("file", MEASURED, ids=lambda path: path.stem)
def test_predictions_hold_where_measured(file: Path) -> None:
    """Two classifiers of each file, the quickest to trace; `compare.py` judges all cases."""
    compare = module("compare")
    measured = compare.comparable(json.loads(file.read_text())["records"])
    assert measured
    chosen = [r for r in measured if r["case"]["setting"]["model"].startswith("timm:")][:2]
    for record, trace in zip(chosen, get_traces(map(compare.request, chosen)), strict=True):
        row = compare.judge(record, trace)
        assert not row.wrong, row
        assert not row.ran or row.high_error >= -0.05, row
