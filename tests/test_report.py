"""`trainfit report` on runs written by hand, going on, cut short, and on a real one."""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import run
from trainfit.cli import main
from trainfit.errors import TrainfitError
from trainfit.reports.run_html import run_html
from trainfit.reports.run_report import read_run, run_json, run_text
from trainfit.reports.svg import ticks
from trainfit.tasks.detection.sample_set import write_sample_set

GIB = 2**30
BEGAN = 1_700_000_000.0


def metrics() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "step": s,
            "epoch": 0,
            "loss": 11.0 - s,
            "gradient_norm": 1.0,
            "lr": 1e-4 if s < 6 else 1e-5,
            "size": 64,
            "images": 16,
        }
        for s in range(1, 11)
    ]
    rows.insert(5, {"step": 5, "epoch": 0, "bbox_ap": 0.31, "bbox_ap50": 0.5, "bbox_ap75": 0.2})
    rows.append({"step": 10, "epoch": 1, "bbox_ap": 0.25, "bbox_ap50": 0.45, "bbox_ap75": 0.1})
    return rows


def reading(step: int, **changes: Any) -> dict[str, Any]:
    """One flush of one window on a GPU: 2 s, half of it waiting."""
    row = {"time": BEGAN + 10 + 2 * step, "step": step, "memory_bytes": 6 * GIB, "images_per_s": 8.0, "wait_share": 0.5}
    row |= {"windows": 1, "images": 16, "elapsed_s": 2.0, "waited_s": 1.0, "compute_s": 0.9, "load_s": 3.0}
    row |= {"gpu_utilization": 0.6, "gpu_power_w": 120.0, "gpu_memory_used_bytes": 7 * GIB}
    return row | {"allocated_bytes": 5 * GIB, "reserved_bytes": 6 * GIB, "alloc_retries": 2, "ooms": 1} | changes


OOM = {
    "step": 3,
    "event": "oom",
    "where": "window",
    "micro_batch": 4,
    "next_micro_batch": 2,
    "cause": "short",
    "checkpointing": False,
    "needs_bytes": 8 * GIB,
    "usable_bytes": int(7.5 * GIB),
    "hint": "",
    "message": "CUDA out of memory. <Tried>",
}
END = {
    "step": 10,
    "event": "end",
    "interrupted": False,
    "noise": "gradient noise scale not told: no reason",
    "time": BEGAN + 40,
}


def telemetry() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "time": BEGAN,
            "step": 0,
            "event": "start",
            "start_s": 10.0,
            "workers": 2,
            "total_steps": 10,
            "effective_batch": 16,
        },
        *(reading(step) for step in range(1, 11)),
        {"time": BEGAN + 35, "step": 10, "event": "pause", "paused_s": 5.0},
        {
            "time": BEGAN + 35,
            "step": 10,
            "event": "loader",
            "line": "loader bound: 50 % waiting; 4 workers would do (now 2)",
        },
    ]
    rows.insert(4, {"time": BEGAN + 16, **OOM})
    rows += [{"time": BEGAN + 36, "step": s, "event": "noise", "trace": 80.0, "square": 2.0} for s in range(1, 7)]
    return [*rows, END]


def write(folder: Path, told: Sequence[dict[str, Any]] | None = None, tail: str = "", plan: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({"model": "rfdetr-nano"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()) + tail)
    lines = [json.dumps(row) + "\n" for row in (telemetry() if told is None else told)]
    (folder / "telemetry.jsonl").write_text("".join(lines) + tail)
    if plan:
        predicted = {
            "allocated_bytes": 5 * GIB,
            "reserved_bytes": int(6.3 * GIB),
            "images_per_s": 9.0,
            "calibrated": True,
        }
        (folder / "plan.json").write_text(json.dumps({"schema": 1, "predicted": predicted}))
    return folder


TEXT = """\
rfdetr-nano, runs/a: finished, 10 of 10 steps.
loss        10 -> 1 (mean of the first and of the last 1 window)
evaluation  step 10: bbox AP 25.0, bbox AP50 45.0; best AP 31.0 at step 5
rate        0.0001 -> 1e-05
speed       8 images/s; predicted 9
time        0:35: 26 % compute, 29 % waiting for data, 14 % evaluation and saving, 29 % start, 3 % other
loader      loader bound: 50 % waiting; 4 workers would do (now 2)
memory      6.00 GiB reserved, 5.00 allocated at most; predicted 6.30 (+5.0 %) and 5.00; 2 allocator retries
GPU         60 % of the time busy, 120 W, 7.00 GiB in use by all processes (medians)
batch       gradient noise scale about 40 (40 to 40 over 6 windows): effective batch 16 is below it, a larger one would need fewer steps (a hint only)
out of memory  step 4 (window, micro-batch 4): micro-batch now 2; needs 8.00 GiB, 7.50 usable
"""  # noqa: E501


def test_the_report_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("runs/a"))
    assert run("report", "runs/a") == 0
    assert capsys.readouterr().out == TEXT


def test_evaluations_of_any_task(tmp_path: Path) -> None:
    """The score and the figures that a run writes, whatever they are called; a score that is not defined is left out."""
    folder = write(tmp_path / "a")
    shown: dict[str, Any] = {"score_name": "recall", "figures": {"recall": 0.5, "top-5": None}}
    rows = [{"step": 5, "score": 0.75, **shown}, {"step": 10, "score": 0.5, **shown}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*metrics()[:5], *rows]))
    report = read_run(folder)
    assert "evaluation  step 10: recall 50.0, top-5 -; best recall 75.0 at step 5\n" in run_text(report)
    assert "Evaluation, %" in run_html(report)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "score": None, **shown}) + "\n")
    assert "evaluation  step 5: recall 50.0, top-5 -\n" in run_text(read_run(folder))


def test_json_is_the_same_as_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", write(tmp_path / "a"), "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["schema"], found["state"], found["step"], found["total_steps"]) == (1, "finished", 10, 10)
    assert found["time"] == {
        "start_s": 10.0,
        "compute_s": pytest.approx(9.0),
        "waited_s": 10.0,
        "paused_s": 5.0,
        "other_s": pytest.approx(1.0),
    }
    assert found["wait_share"] == 0.5
    assert [row["loss"] for row in found["windows"]] == [11.0 - s for s in range(1, 11)]
    assert found["ooms"][0]["needs_bytes"] == 8 * GIB
    assert found["noise"] == {"images": 40.0, "low": 40.0, "high": 40.0, "windows": 6}


def test_a_noise_scale_without_bound_is_null_in_json(tmp_path: Path) -> None:
    rows = telemetry()
    for row in rows:
        row.update({"square": -1.0} if row.get("event") == "noise" else {})
    found = run_json(read_run(write(tmp_path / "a", rows)))
    assert found["noise"]["images"] is None
    json.dumps(found, allow_nan=False)


def test_states(tmp_path: Path) -> None:
    rows = telemetry()
    going = rows[:8]  # last written at BEGAN + 22
    assert read_run(write(tmp_path / "a", going), now=BEGAN + 200).state == "going on"
    assert read_run(tmp_path / "a", now=BEGAN + 400).state == "broken off"
    assert "trainfit train --resume" in run_text(read_run(tmp_path / "a", now=BEGAN + 400))
    assert read_run(write(tmp_path / "b", [*rows[:-1], END | {"interrupted": True}])).state == "interrupted"
    assert (
        read_run(write(tmp_path / "c", [*rows[:-1], END | {"interrupted": True}, *rows[:3]]), now=BEGAN).state
        == "going on"
    )
    slow = [*going, reading(7, time=BEGAN + 2000)]  # it was silent that long before
    assert read_run(write(tmp_path / "d", slow), now=BEGAN + 5000).state == "going on"


def test_a_run_that_has_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "rfdetr-nano"}))
    assert run("report", tmp_path, "--html", tmp_path / "page.html") == 0
    assert capsys.readouterr().out == f"rfdetr-nano, {tmp_path}: not started, 0 steps.\n"
    assert "not started" in (tmp_path / "page.html").read_text()


def test_half_written_lines_are_left_out_and_told(tmp_path: Path) -> None:
    whole = read_run(write(tmp_path / "a"))
    cut = read_run(write(tmp_path / "b", tail='{"step": 11, "lo'))
    assert (whole.unreadable_lines, cut.unreadable_lines) == (0, 2)
    assert cut.windows == whole.windows
    assert "left out    2 unreadable lines" in run_text(cut)
    assert "2 unreadable lines" in run_html(cut)


def test_steps_done_twice_count_their_time_but_show_once(tmp_path: Path) -> None:
    rows = telemetry()[:-1]
    again = [*rows[:6], rows[0] | {"step": 2}, reading(3, images_per_s=4.0), *rows[6:]]
    found = read_run(write(tmp_path / "a", again))
    assert [row["step"] for row in found.readings] == list(range(1, 11))
    assert found.readings[2]["images_per_s"] == 4.0  # the run was killed after step 4, and went on after step 2
    assert found.time.start_s == 20.0
    assert found.time.waited_s == 11.0


def test_no_run_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none", write(tmp_path / "a") / "recipe.json"):
        assert run("report", folder) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            line
            == f"trainfit: error: {folder} is not a run folder (no recipe.json): give the folder that trainfit train wrote"
        )
    (tmp_path / "a" / "plan.json").write_text("{")
    with pytest.raises(TrainfitError, match=r"plan\.json is damaged"):
        read_run(tmp_path / "a")


def test_the_page_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Well-formed, no address of any other file, names escaped; every curve has its points; errors are marked."""
    folder, file = write(tmp_path / "a<b>"), tmp_path / "page.html"
    assert run("report", folder, "--html", file) == 0
    assert f"wrote {file}" in capsys.readouterr().err
    page = file.read_text()
    assert "http" not in page
    assert "a<b>" not in page
    assert "a&lt;b&gt;" in page
    assert "prefers-color-scheme: dark" in page
    body = ET.fromstring(page[page.index("<body>") : page.index("</html>")])
    charts = {(f.findtext("figcaption") or ""): f for f in body.iter("figure")}
    assert list(charts) == [
        "Loss",
        "Learning rate",
        "Evaluation, %",
        "Images a second",
        "Waiting for data, % of the time",
        "Peak memory, GiB",
        "GPU busy, % of the time",
        "GPU power, W",
    ]
    lines = [len((line.get("points") or "").split()) for line in charts["Loss"].iter("polyline")]
    assert lines == [10]
    assert [len((line.get("points") or "").split()) for line in charts["Peak memory, GiB"].iter("polyline")] == [
        10,
        10,
        2,
    ]
    assert all("out of memory: step 4" in (chart.findtext(".//g/title") or "") for chart in charts.values())
    assert run("report", folder, "--html", file) == 2
    assert "use --force" in capsys.readouterr().err


def test_curves_are_thinned_and_broken_where_a_loss_is_none(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    rows = [metrics()[0] | {"step": s, "loss": None if 3000 <= s < 3100 else 1.0} for s in range(1, 10_001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = run_html(read_run(folder))
    loss = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    points = [len((line.get("points") or "").split()) for line in loss.iter("polyline")]
    assert len(points) == 2 + 1  # the windows' before and after the gap, and the mean
    assert sum(points) <= 2 * 240
    assert "100 windows without a finite loss" in page


@pytest.mark.parametrize(
    ("low", "top"), [(0.0, 1e-5), (0.0, 7.3), (12.4, 12.9), (-3.0, 120.0), (0.0, 1.0), (1.0, 40_000.0)]
)
def test_ticks_are_few_round_and_inside(low: float, top: float) -> None:
    found = ticks(top, low)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= tick <= top + 1e-9 for tick in found)


def test_torch_is_not_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    script = (
        "import sys\nfrom trainfit.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "report", str(folder)], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_real_run_accounts_for_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_sample_set(tmp_path / "set", train=8, val=4), tmp_path / "run"
    tiny = ["--resolution", 64, "--groups", 1, "--num-queries", 30, "--no-multi-scale", "--workers", 0]
    command = ["train", "rfdetr-nano", "--data", data, *tiny, "--effective-batch", 4, "--micro-batch", 2, "--epochs", 1]
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in (*command, "--device", "cpu", "--out", out)])
    wall_s = time.monotonic() - began
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "windows are too few for a verdict on the loader" in printed
    assert "gradient noise scale not available: fewer than 5 windows were measured" in printed
    found = read_run(out)
    assert (found.state, found.step, found.total_steps) == ("finished", 2, 2)
    spent = found.time
    total_s = spent.start_s + spent.compute_s + spent.waited_s + spent.paused_s + spent.other_s
    assert 0.7 * wall_s < total_s <= wall_s  # the rest: imports, and the summary
    assert spent.compute_s > 0
    assert found.readings[0]["gpu_utilization"] is None
    assert found.resident_bytes is not None
    with (out / "telemetry.jsonl").open("a") as file:
        file.write('{"time": 17')  # a kill in the middle of a line
    assert read_run(out).unreadable_lines == 1
    assert run("train", "--resume", out, "--epochs", 2) == 0
    after = read_run(out)
    assert (after.state, after.step, after.unreadable_lines) == ("finished", 4, 0)  # the resume dropped the line
    assert [row["step"] for row in after.readings] == [1, 2, 3, 4]
