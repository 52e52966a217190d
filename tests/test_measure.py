"""Trials in clean processes, the search for the knee against brute force, calibration, and the report."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import run
from test_profile import OPS, make_trace
from trainfit.gpus.catalogue import GIB, MIB, find_gpu
from trainfit.gpus.detect import DetectedGpu, GpuProcess
from trainfit.measuring import bench as bench_module
from trainfit.measuring import calibration, trial
from trainfit.measuring.bench import Bench
from trainfit.measuring.calibration import calibrate, load, stored_at
from trainfit.measuring.process import context_bytes, run_trial
from trainfit.measuring.search import Measured, Predicted, forecast, knee, search
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.predict import assess
from trainfit.models.setting import make_setting
from trainfit.reports.measure import measured_json, measured_text
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest

TASKS = """
import os, signal
import torch
from trainfit.models.custom.workload import CustomTask

def make(loss):
    def sample(number):
        return torch.full((8,), float(number)), torch.zeros(1)
    return CustomTask(build_model=lambda: torch.nn.Linear(8, 1), make_sample=sample, loss=loss)

def mean(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()

def works(setting):
    return make(mean)

def full(setting):
    def loss(model, batch):
        if setting.micro_batch >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB (injected)\\nadvice")
        return mean(model, batch)
    return make(loss)

def dies(setting):
    def loss(model, batch):
        if setting.micro_batch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("shapes differ")
    return make(loss)
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with a cache of its own."""
    (tmp_path / "measured_tasks.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def predicted(reserved_bytes: int = GIB, *, images_per_s: float | None = None, verdict: Any = "fits") -> Predicted:
    return Predicted(
        verdict=verdict,
        allocated_bytes=reserved_bytes,
        reserved_low_bytes=reserved_bytes,
        reserved_high_bytes=2 * reserved_bytes,
        images_per_s=images_per_s,
    )


def measured(size: int, speed: float, *, reserved_bytes: int = GIB, said: Predicted | None = None) -> Measured:
    return Measured(
        micro_batch=size, outcome="ran", images_per_s=speed, slowest=speed, fastest=speed, windows=10,
        allocated_bytes=reserved_bytes - 64 * MIB, requested_bytes=reserved_bytes - 65 * MIB,
        reserved_bytes=reserved_bytes, context_bytes=400 * MIB, retries=0, predicted=said,
    )  # fmt: skip


def a_card(total_bytes: int = 24 * GIB) -> DetectedGpu:
    gpu = replace(find_gpu("RTX 3090"), memory_bytes=total_bytes, memory_is_nominal=False)
    return DetectedGpu(
        index=0, uuid="GPU-1", driver_name="NVIDIA GeForce RTX 3090", driver_version="580.65.06", mig=False, gpu=gpu,
        free_bytes=total_bytes, processes=(),
    )  # fmt: skip


# The knee and the search.


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({}, None),
        ({4: 10.0}, 4),
        ({1: 50.0, 2: 80.0, 4: 97.0, 8: 100.0}, 4),
        ({1: 50.0, 2: 80.0, 4: 96.9, 8: 100.0}, 8),
        ({1: 50.0, 2: 100.0, 4: 90.0, 8: 80.0}, 2),  # the largest is not always the fastest
        ({8: 100.0, 1: 100.0}, 1),
    ],
)
def test_knee(speeds: dict[int, float], expected: int | None) -> None:
    assert knee(speeds) == expected


class Card:
    """A card whose step takes `start_s` and `image_s` an image, and `image_bytes` an image of its memory."""

    def __init__(self, *, start_s: float, image_s: float, limit: int, memory_error: float, time_error: float) -> None:
        self.start_s, self.image_s, self.limit = start_s, image_s, limit
        self.memory_error, self.time_error = memory_error, time_error
        self.tried: list[int] = []

    def speed(self, size: int, start_error: float = 1.0) -> float:
        return size / (start_error * self.start_s + self.image_s * size)

    def predict(self, size: int) -> Predicted:
        needs = round(size * GIB * self.memory_error)
        verdict = "fits" if needs <= self.limit * GIB else "does not fit"
        return predicted(needs, images_per_s=self.speed(size, self.time_error), verdict=verdict)

    def trial(self, size: int) -> Measured:
        self.tried.append(size)
        if size > self.limit:
            return Measured(micro_batch=size, outcome="out of memory", message="full", predicted=self.predict(size))
        return measured(size, self.speed(size), reserved_bytes=size * GIB, said=self.predict(size))

    def search(self) -> list[Measured]:
        return list(search(self.trial, self.predict, start=1, most=512))

    def true_knee(self) -> int:
        """By brute force over all that fit."""
        return knee({size: self.speed(size) for size in (2**n for n in range(10)) if size <= self.limit}) or 0


COSTS = st.floats(min_value=0.001, max_value=1)
ERRORS = st.one_of(st.just(1.0), st.floats(min_value=0.3, max_value=0.9), st.floats(min_value=1.1, max_value=3))


@given(start_s=COSTS, image_s=COSTS, limit=st.integers(1, 512), memory_error=ERRORS, time_error=ERRORS)
def test_search_finds_the_knee_whatever_was_predicted(**values: Any) -> None:
    card = Card(**values)
    found = {row.micro_batch: row.images_per_s for row in card.search() if row.images_per_s is not None}
    assert len(card.tried) == len(set(card.tried))
    if card.predict(1).verdict == "fits":
        assert knee(found) == card.true_knee()
    else:
        assert card.tried[0] == 1  # nothing was predicted to fit: it looks all the same


@given(start_s=COSTS, image_s=COSTS, limit=st.integers(1, 512))
def test_a_right_prediction_takes_four_trials(**values: Any) -> None:
    """The largest, the knee, and its neighbours."""
    card = Card(**values, memory_error=1.0, time_error=1.0)
    card.search()
    largest = max(2**n for n in range(10) if 2**n <= card.limit)
    expected = card.true_knee()
    neighbours = (
        {expected // 2, expected, 2 * expected} - {0} if expected < largest else {expected // 2, expected} - {0}
    )
    assert set(card.tried) == {largest, *neighbours}


def test_without_prediction_it_doubles_while_that_pays() -> None:
    card = Card(start_s=1, image_s=1, limit=512, memory_error=1, time_error=1)

    def trial(size: int) -> Measured:
        return replace(card.trial(size), predicted=None)

    assert forecast(lambda _: None, 512) == (None, None)
    list(search(trial, lambda _: None, start=1, most=512))
    assert card.tried == [1, 2, 4, 8, 16, 32]  # 16/17 is within 3 % of 32/33, 8/9 is not of 16/17
    card.tried.clear()
    list(search(trial, lambda _: None, start=1, most=4))
    assert card.tried == [1, 2, 4]


def test_nothing_fits() -> None:
    card = Card(start_s=1, image_s=1, limit=0, memory_error=0.0, time_error=1)
    rows = card.search()
    assert card.tried == [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert {row.outcome for row in rows} == {"out of memory"}


# Trials.


def test_out_of_memory_is_a_result_and_the_search_goes_down(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(_: Bench, size: int) -> Predicted:
        return predicted(MIB, images_per_s=float(size))

    monkeypatch.setattr(Bench, "_predict", predict)
    lines: list[str] = []
    bench = Bench(
        setting=make_setting(model="measured_tasks:full"), card=None, windows={"most": 3, "least": 3}, show=lines.append
    )
    rows = list(bench.run())
    assert [(row.micro_batch, row.outcome) for row in rows] == [(4, "out of memory"), (2, "ran"), (1, "ran")]
    assert rows[0].message == "CUDA out of memory. Tried to allocate 1.00 GiB (injected)"
    assert all(row.windows == 3 and row.slowest <= row.images_per_s <= row.fastest for row in rows[1:])  # pyright: ignore[reportOperatorIssue]
    assert all(row.reserved_bytes is None for row in rows)  # a CPU's memory is not a GPU's
    assert lines == [f"micro-batch {size}: measuring" for size in (4, 2, 1)]
    kept = [Measured.from_json(record["row"]) for record in calibration.read(stored_at("CPU"))]
    assert kept == rows
    assert stored_at("CPU").is_relative_to(tasks)


@pytest.mark.usefixtures("tasks")
def test_a_process_that_dies_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("measure", "measured_tasks:dies", "--micro-batches", "1,2", "--device", "cpu") == 3
    out = capsys.readouterr().out
    assert "nothing ran" in out.splitlines()[0]
    assert "micro-batch 1: died: exit status 1: ValueError: shapes differ" in out
    assert "micro-batch 2: died: killed: the machine's own memory may have run out" in out


def test_command_on_the_cpu(tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU it is CPU time, and says so."""
    monkeypatch.setattr("trainfit.measuring.card.detect_gpus", lambda: ())
    arguments = ("measure", "timm:resnet10t", "--resolution", "64", "--micro-batches", "2", "--steps", "2")
    assert run(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    (row,) = record["rows"]
    assert (record["schema"], record["device"], record["gpu"], record["knee"]) == (1, "cpu", None, 2)
    assert (row["windows"], row["reserved_bytes"], row["predicted"]) == (2, None, None)
    assert row["images_per_s"] > 0
    assert record["calibration"] is None
    assert Path(record["file"]).is_relative_to(tasks)
    assert err == "micro-batch 2: measuring\n"


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rf-detr nanno",), "no model named 'rf-detr nanno'. Perhaps you meant rfdetr-nano."),
        (("measured_tasks:works", "--memory", "4GiB", "--device", "cpu"), "--memory caps the allocator of a GPU; on the CPU"),
        (("measured_tasks:works", "--micro-batches", "1,x"), "--micro-batches '1,x': write sizes of at least 1 as 1,2,4"),
        (("measured_tasks:works", "--micro-batches", "0"), "--micro-batches '0': write sizes"),
        (("measured_tasks:works", "--steps", "0"), "--steps must be at least 1, not 0"),
        (("measured_tasks:works", "--device", "cuda"), "no NVIDIA GPU to measure on; --device cpu measures the CPU's time"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainfit.measuring.card.detect_gpus", lambda: ())
    assert run("measure", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"trainfit: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("tasks")
def test_what_the_trial_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("measure", "measured_tasks:lacks", "--device", "cpu") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("trainfit: error: measured_tasks:lacks: module")


def test_ctrl_c_keeps_what_was_measured(
    tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {"images_per_s": 5.0, "slowest": 4.0, "fastest": 6.0, "windows": 3}
    answers: Iterator[Any] = iter([{"outcome": "ran", "message": None, "peak": None, "end": None, "speed": speed}])

    def stopped(*_: object, **__: object) -> Any:
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(bench_module, "run_trial", stopped)
    assert run("measure", "measured_tasks:works", "--device", "cpu", "--micro-batches", "1,2,4") == 130
    assert f"1 measured before the stop: {stored_at('CPU')}" in capsys.readouterr().err
    (record,) = calibration.read(stored_at("CPU"))
    assert record["row"]["micro_batch"] == 1
    assert stored_at("CPU").is_relative_to(tasks)


def test_an_interrupted_trial_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    def interrupt(*_: object) -> None:
        if not (tmp_path / "pid").exists():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            run_trial({}, gpu_uuid=None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


# What a GPU tells.


class FakeCuda:
    """torch.cuda as `trial` uses it: `windows[i]` is the peak reserved MiB of the build, then of each window."""

    TOTAL = 8 * GIB

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peaks_mib: list[int], fails_at: int | None = None) -> None:
        self.peaks, self.fails_at, self.resets, self.synchronized, self.runs = peaks_mib, fails_at, 0, 0, 0
        self.fraction: float | None = None
        for name in ("init", "synchronize", "memory_stats", "mem_get_info", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.cap)

    def init(self) -> None: ...

    def synchronize(self) -> None:
        self.synchronized += 1

    def cap(self, fraction: float) -> None:
        self.fraction = fraction

    def memory_stats(self) -> dict[str, int]:
        """Before the first build nothing; later the phase's own peak, and what is held on to: 100 MiB."""
        peak = ([0, *self.peaks])[min(self.resets, len(self.peaks))] * MIB
        held = 100 * MIB if self.resets else 0
        return {
            "reserved_bytes.all.peak": peak,
            "allocated_bytes.all.peak": peak // 2,
            "reserved_bytes.all.current": held,
        }

    def mem_get_info(self) -> tuple[int, int]:
        return self.TOTAL - 500 * MIB, self.TOTAL

    def reset_peak_memory_stats(self) -> None:
        self.resets += 1

    def run(self) -> None:
        self.runs += 1
        time.sleep(0.001)
        if self.runs == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def fake_trial(cuda: FakeCuda, **options: Any) -> dict[str, Any]:
    windows = trial.Windows(warm_up=2, least=2, most=2)
    return trial.run_windows(lambda: cuda, torch.device("cuda"), windows, images=8, **options)


def test_peaks_are_of_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second warm-up window is the highest here, and no timed one; the allocator's cap is a share of the whole card."""
    cuda = FakeCuda(monkeypatch, [100, 300, 900, 700, 700, 100])
    found = fake_trial(cuda, limit_bytes=2 * GIB)
    assert cuda.fraction == 0.25
    assert found["peak"]["reserved_bytes"] == 900 * MIB
    assert found["peak"]["allocated_bytes"] == 450 * MIB
    assert [row["peak_reserved_bytes"] // MIB for row in found["windows"]] == [300, 900, 700, 700]
    assert cuda.synchronized == 5  # each reading, the build's too, waits for the device
    timed = sorted(8 / row["seconds"] for row in found["windows"][2:])
    assert found["speed"] == {
        "images_per_s": pytest.approx(sum(timed) / 2), "slowest": timed[0], "fastest": timed[1], "windows": 2,
    }  # fmt: skip
    assert context_bytes(FakeCuda.TOTAL - 20 * MIB, found["end"]) == (500 - 20 - 100) * MIB


def test_peaks_up_to_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_trial(FakeCuda(monkeypatch, [100, 300, 800], fails_at=2))
    assert (found["outcome"], found["message"], found["speed"]) == ("out of memory", "CUDA out of memory.", None)
    assert found["peak"]["reserved_bytes"] == 800 * MIB


STORED = StoredTrace(trace=make_trace(), ops=OPS)


@pytest.fixture
def gpu_here(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[dict[str, Any]]]:
    """A fake RTX 3090 of so many bytes; what its trials are asked for comes back."""
    asked: list[dict[str, Any]] = []
    del tasks

    def answer(request: dict[str, Any], *, gpu_uuid: str | None) -> dict[str, Any]:
        assert gpu_uuid == "GPU-1"
        asked.append(request)
        size = request["setting"]["micro_batch"]
        speed = {"images_per_s": 10.0 * size, "slowest": 9.0 * size, "fastest": 11.0 * size, "windows": 10}
        peak = {"allocated_bytes": GIB, "requested_bytes": GIB, "reserved_bytes": 1200 * MIB, "retries": 0}
        end = {"device_free_bytes": 20 * GIB, "reserved_bytes": 1100 * MIB}
        return {"outcome": "ran", "message": None, "peak": peak, "end": end, "speed": speed}

    def traced(_: TraceRequest) -> StoredTrace:
        return STORED

    def install(total_bytes: int) -> list[dict[str, Any]]:
        monkeypatch.setattr("trainfit.measuring.card.detect_gpus", lambda: (a_card(total_bytes),))
        monkeypatch.setattr(bench_module, "detect_gpus", lambda: (a_card(total_bytes),))
        monkeypatch.setattr(bench_module, "get_trace", traced)
        monkeypatch.setattr(bench_module, "run_trial", answer)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return asked

    return install


def test_command_on_a_gpu(gpu_here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions stand beside, without the context; and calibrate what comes later."""
    gpu_here(24 * GIB)
    assert run("measure", "timm:resnet10t", "--micro-batches", "1,2", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    expected = assess(STORED, a_card().gpu, AllocatorConfig())
    assert expected.time is not None
    for size, row in zip((1, 2), record["rows"], strict=True):
        assert row["predicted"]["reserved_low_bytes"] == expected.profile.peak_reserved_bytes
        assert row["predicted"]["images_per_s"] == pytest.approx(size / expected.time.seconds)
        assert row["context_bytes"] == 4 * GIB - 1100 * MIB
    found = load("RTX 3090")
    assert found is not None
    assert record["calibration"] == json.loads(json.dumps(asdict(found)))
    assert found.rows == 2
    assert found.time_factor == pytest.approx(0.1 / expected.time.seconds)
    assert found.reserved_factors == pytest.approx((1200 * MIB / expected.profile.peak_reserved_bytes,) * 2)


def test_a_capped_process(gpu_here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The context is outside of the cap; such rows calibrate nothing; a cap that is none is refused."""
    asked = gpu_here(24 * GIB)
    assert run("measure", "timm:resnet10t", "--micro-batches", "1", "--memory", "2GiB") == 0
    assert asked[0]["limit_bytes"] == (2048 - 390) * MIB
    assert "Kernels were still chosen for the large card" in capsys.readouterr().out
    assert load("RTX 3090") is None
    for memory in ("24GiB", "256MiB"):
        assert run("measure", "timm:resnet10t", "--memory", memory) == 2
        assert capsys.readouterr().err.startswith(
            f"trainfit: error: --memory {memory}: the CUDA context takes 0.38 GiB"
        )


def test_the_cap_is_predicted_with(gpu_here: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The trace needs 988 MiB of tensors: too much for the 424 that a card of 1 GiB leaves."""
    gpu_here(24 * GIB)
    assert run("measure", "timm:resnet10t", "--micro-batches", "1", "--memory", "1GiB", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["predicted"]["verdict"] == "does not fit"


# Calibration.


@given(
    factor=st.floats(0.1, 10),
    memory=st.lists(st.floats(0.5, 2), min_size=1, max_size=8),
)
def test_calibration_finds_a_known_factor(factor: float, memory: list[float]) -> None:
    rows = [
        measured(n + 1, 100.0, reserved_bytes=round(GIB * share), said=predicted(images_per_s=100.0 * factor))
        for n, share in enumerate(memory)
    ]
    failed = Measured(micro_batch=99, outcome="out of memory", predicted=predicted(images_per_s=1.0))
    found = calibrate("RTX 3090", "580", [*rows, failed])
    assert found is not None
    assert found.time_factor == pytest.approx(factor)
    assert found.rows == len(memory)
    assert found.reserved_factors == pytest.approx((min(memory), max(memory)), rel=1e-6)


def test_calibration_is_a_median_with_its_spread() -> None:
    speeds = (50.0, 80.0, 10.0)  # where 100 images/s were predicted: 2, 1.25 and 10 times the time
    found = calibrate("T4", "580", [measured(n, s, said=predicted(images_per_s=100.0)) for n, s in enumerate(speeds)])
    assert found is not None
    assert (found.time_factor, found.time_factors) == (2.0, (1.25, 10.0))
    assert calibrate("T4", "580", [measured(1, 5.0)]) is None
    unknown = calibrate("T4", "580", [measured(1, 5.0, said=predicted())])
    assert unknown is not None
    assert (unknown.time_factor, unknown.time_factors) == (None, None)


@pytest.mark.usefixtures("tasks")
def test_load_takes_what_holds_here() -> None:
    """This torch, this code, the driver of the last line, no cap, the last of a setting's trials; cut lines are left out."""
    setting = make_setting(model="timm:resnet10t").to_json()

    def keep(speed: float, **changes: Any) -> None:
        row = asdict(measured(1, speed, said=predicted(images_per_s=100.0)))
        own = {"made_by": calibration.made_by(), "driver": "580", "setting": setting, "limit_bytes": None, "row": row}
        calibration.append(stored_at("RTX 3090"), {**own, **changes})

    assert load("RTX 3090") is None
    keep(1.0, driver="470")
    keep(25.0)
    keep(50.0)
    keep(2.0, limit_bytes=GIB)
    keep(50.0, setting={**setting, "micro_batch": 2})
    keep(3.0, made_by={**calibration.made_by(), "torch": "1.0"})
    keep(4.0, made_by={**calibration.made_by(), "code": "other"})
    with stored_at("RTX 3090").open("a") as file:
        file.write('{"made_by"')
    keep(50.0, setting={**setting, "accumulation": 2})
    found = load("RTX 3090")
    assert found is not None
    assert (found.driver, found.rows, found.time_factor, found.time_factors) == ("580", 3, 2.0, (2.0, 2.0))
    assert load("RTX 3090 Ti") is None


def test_planning_with_a_calibration_needs_no_torch() -> None:
    code = (
        "import sys, trainfit.cli.measure; from trainfit.measuring.calibration import load; "
        "assert load('T4') is None; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(calibration.TrainfitError, match=r"cannot be written .Not a directory.; set XDG_CACHE_HOME"):
        calibration.append(stored_at("T4"), {})


# The report.

GOLDEN = """\
rfdetr-nano on RTX 3090 (driver 580.65.06), torch 2.15.0: micro-batch 8 is the smallest within 3 % of the best speed, \
98 images/s (the best: 100 at 16).

micro-batch  images/s  slowest to fastest  predicted  reserved GiB      predicted  allocated GiB  predicted  context GiB
          4        80            80 to 80         75          2.00   1.90 to 3.80           1.94       1.90         0.39
          8        98            98 to 98          -          4.00              -           3.94          -         0.39
         16       100          100 to 100        110          8.00  7.60 to 15.20           7.94       7.60         0.39

micro-batch 32: out of memory: CUDA out of memory. (predicted: tight, 15.20 to 30.40 GiB reserved)

The allocator had to empty its cache, which stalls the GPU, at micro-batch 16.
Other programs were on the card: Xorg (7), a program (8). Speed and context are less sure.
The allocator was held to 10.00 GiB; 0.38 more are left to the CUDA context. Kernels were still chosen for the large card, \
at its speed: memory may be less on the small one, and its own speed is another.
Of 2 settings measured on this card: a step takes 1.02 times the predicted time (median; 0.94 to 1.10); reserved memory \
1.05 to 1.05 times the lowest predicted. Later plans for it know that.
Kept in FILE"""


def report_bench(card: DetectedGpu | None, **values: Any) -> Bench:
    return Bench(setting=make_setting(model="rfdetr-nano"), card=card, **values)


def test_report_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainfit.reports.measure.made_by", lambda: {"torch": "2.15.0", "code": ""})
    others = (GpuProcess(pid=7, name="Xorg", used_bytes=1), GpuProcess(pid=8, name=None, used_bytes=None))
    bench = report_bench(replace(a_card(), processes=others), limit_bytes=10 * GIB)

    def said(gib: float, speed: float, verdict: str = "fits") -> Predicted:
        return predicted(round(gib * GIB), images_per_s=speed, verdict=verdict)

    rows = [
        Measured(
            micro_batch=32, outcome="out of memory", message="CUDA out of memory.", predicted=said(15.2, 120, "tight")
        ),
        replace(measured(16, 100, reserved_bytes=8 * GIB, said=said(7.6, 110)), retries=3),
        measured(4, 80, reserved_bytes=2 * GIB, said=said(1.9, 75)),
        measured(8, 98, reserved_bytes=4 * GIB),
    ]
    text = measured_text(bench, rows, calibrate("RTX 3090", "580", rows))
    assert text == GOLDEN.replace("FILE", str(bench.file))
    record = json.loads(json.dumps(measured_json(bench, rows, None)))
    assert (record["knee"], record["gpu"], record["limit_bytes"]) == (8, "RTX 3090", 10 * GIB)
    assert [Measured.from_json(row) for row in record["rows"]] == rows


def test_report_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainfit.reports.measure.made_by", lambda: {"torch": "2.15.0", "code": ""})
    bench = report_bench(None)
    rows = [replace(measured(2, 2.5), slowest=2.0, fastest=2.75), measured(1, 1.25)]
    assert measured_text(bench, rows, None) == (
        "rfdetr-nano on the CPU, torch 2.15.0: micro-batch 2 is the smallest within 3 % of the best speed, 2.5 images/s; "
        "no larger one ran, and speed still grew.\n\n"
        "micro-batch  images/s  slowest to fastest\n"
        "          1      1.25        1.25 to 1.25\n"
        "          2       2.5           2 to 2.75\n\n"
        "This is CPU time: it says nothing about a GPU. Memory was not measured.\n"
        f"Kept in {bench.file}"
    )
