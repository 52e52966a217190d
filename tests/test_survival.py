"""The ladder below the halving: causes, numbers, checkpointing, going up again, dead loaders, full hosts."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import rows, run
from test_exact_gradient import Toy, make_sample, toy_objective
from test_oom import FailAt, everything, make_step
from trainfit.errors import OutOfMemory, TrainfitError
from trainfit.gpus import detect
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.step import training_step
from trainfit.step.terms import LossTerm, Objective
from trainfit.tasks.detection.sample_set import write_sample_set
from trainfit.tasks.detection.samples import Sample
from trainfit.training import fit, oom, run_folder
from trainfit.training.oom import Halving, Survivor, others_on
from trainfit.training.shortage import Ran, Survival, cause_of, shortage, stop_message, survival_line

GIB = 2**30
CPU = torch.device("cpu")


def said(*, request: float, allocated: float, cached: float, free: float, total: float, allowed: str = "") -> str:
    """What torch 2.15 says, numbers in GiB; the wording is a real message's."""
    return (
        f"CUDA out of memory. Tried to allocate {request:.2f} GiB. GPU 0 has a total capacity of {total:.2f} GiB of which "
        f"{free:.2f} GiB is free. Process 4242 has 1.00 GiB memory in use. Including non-PyTorch memory, this process has "
        f"{allocated + cached:.2f} GiB memory in use. {allowed}Of the allocated memory {allocated:.2f} GiB is allocated by "
        f"PyTorch, and {cached:.2f} GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large "
        "try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory "
        "Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
    )


SMALL = said(request=2, allocated=5.5, cached=0.4, free=1.7, total=8)
PIECES = said(request=2, allocated=4, cached=2.5, free=0.7, total=8)


# ---- numbers and causes


def test_a_real_message_is_read() -> None:
    """From pytorch issue 97432's and newer wordings: bytes, KiB, MiB; private pools; a limit on the process."""
    short = shortage(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB of which 13.44 MiB is "
        "free. 4.00 GiB allowed; Of the allocated memory 3.80 GiB is allocated by PyTorch, with 12.00 MiB allocated in "
        "private pools (e.g., CUDA Graphs), and 100.00 KiB is reserved by PyTorch but unallocated. If reserved ..."
    )
    assert short is not None
    assert short.request_bytes == 20 * 2**20
    assert short.cached_bytes == 100 * 2**10
    assert short.usable_bytes == pytest.approx(3.80 * GIB + 100 * 2**10 + 13.44 * 2**20, rel=1e-6)
    assert short.needs_bytes == pytest.approx(3.80 * GIB + 20 * 2**20 + 100 * 2**10, rel=1e-6)
    capped = shortage(said(request=2, allocated=3, cached=0, free=70, total=80, allowed="4.00 GiB allowed; "))
    assert capped is not None
    assert capped.usable_bytes == 4 * GIB
    assert shortage("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`") is None


@given(request=st.floats(0.1, 8), cached=st.floats(0, 8), grown=st.none() | st.floats(0, 8))
def test_causes(request: float, cached: float, grown: float | None) -> None:
    short = shortage(said(request=request, allocated=4, cached=cached, free=0.05, total=24))
    assert short is not None
    outside = None if grown is None else short.outside_bytes - int(grown * GIB)
    cause = cause_of(short, outside_bytes=outside)
    if short.cached_bytes >= short.request_bytes:
        assert cause == "fragmented"
    elif grown is not None and short.request_bytes <= short.free_bytes + int(grown * GIB):
        assert cause == "taken"
    else:
        assert cause == "memory"


def test_lines_say_what_why_and_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    known: dict[str, Any] = {"step": 4, "where": "window", "micro_batch": 4, "next_micro_batch": 2}
    line = survival_line(oom.survival(SMALL, CPU, **known))
    assert line == ("out of memory at step 5 (window, micro-batch 4): micro-batch now 2; needs 7.90 GiB, 7.60 usable")
    again: dict[str, Any] = known | {"next_micro_batch": 4}
    line = survival_line(oom.survival(PIECES, CPU, **again))
    assert "tried again; needs 8.50 GiB, 7.20 usable, fragmented, PYTORCH_ALLOC_CONF=expandable_segments:True" in line
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128,expandable_segments:True")
    assert survival_line(oom.survival(PIECES, CPU, **again)).endswith("fragmented")
    numbers = {"needs": 3.0 * GIB, "usable": 2.0 * GIB}
    line = survival_line(oom.survival(None, CPU, agreed=numbers, **known))
    assert line.endswith("micro-batch now 2; needs 3.00 GiB, 2.00 usable, on another rank")


def test_the_process_that_took_the_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    process = detect.GpuProcess(pid=77, name="blender", used_bytes=3 * GIB)

    class Card:
        uuid = "GPU-ab-cd"
        processes = (process, detect.GpuProcess(pid=78, name=None, used_bytes=None))

    class Other:
        uuid = "GPU-ef"
        processes = (detect.GpuProcess(pid=1, name="wrong card", used_bytes=GIB),)

    class Properties:
        uuid = "ab-cd"

    monkeypatch.setattr(oom, "detect_gpus", lambda: (Other, Card))

    def properties(_device: torch.device) -> type[Properties]:
        return Properties

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    cuda = torch.device("cuda", 0)
    assert others_on(cuda) == "blender (pid 77) 3.00 GiB, a process (pid 78) 0.00 GiB"
    assert others_on(CPU) == ""
    event = oom.survival(
        SMALL, cuda, outside_bytes=0, step=0, where="window", micro_batch=1, next_micro_batch=0
    )  # 0.4 GiB are outside torch now: with them it would have fitted
    assert event.cause == "taken"
    assert "another process took memory, blender (pid 77) 3.00 GiB" in survival_line(event)
    assert "(other processes: blender (pid 77) 3.00 GiB" in stop_message(event, None)

    def no_nvml() -> tuple[()]:
        raise TrainfitError("finding GPUs needs nvidia-ml-py")

    monkeypatch.setattr(oom, "detect_gpus", no_nvml)
    assert others_on(cuda) == ""


def test_the_stop_says_what_fits() -> None:
    event = Survival(
        step=4000, where="window", micro_batch=1, next_micro_batch=0, cause="memory", needs_bytes=int(7.9 * GIB),
        usable_bytes=int(7.6 * GIB) + 1,
    )  # fmt: skip
    ran = Ran(canvas=(448, 512), micro_batch=3, reserved_bytes=int(6.4 * GIB))
    assert stop_message(event, ran).startswith(
        "one image does not fit the memory at step 4001 (window): needs 7.90 GiB, 7.60 usable; "
        "micro-batch 3 fits at 6.40 with 512 x 448 px: lower the resolution"
    )


# ---- the ladder


class Tight:
    """An objective that fails while a forward has too many images, or too many bytes saved for backward."""

    def __init__(self, inner: Objective, *, most: int, message: str = SMALL) -> None:
        self.inner, self.most, self.message = inner, most, message
        self.tried: list[int] = []

    def objective(self) -> Objective:
        def terms(model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
            self.tried.append(len(samples))
            if len(samples) > self.most:
                raise torch.OutOfMemoryError(self.message)
            return self.inner.terms(model, samples, canvas)

        return Objective(terms=terms, counts=self.inner.counts, canvas=self.inner.canvas)


WINDOW = [make_sample(n, i) for i, n in enumerate((0, 3, 6, 2))]


def tight_step(most: int, message: str = SMALL) -> tuple[Tight, Any]:
    tight = Tight(toy_objective("targets"), most=most, message=message)
    return tight, make_step(Toy(), tight.objective())


def test_want_of_memory_wastes_no_try_and_fragmentation_takes_one() -> None:
    for message, tried in ((SMALL, [4, 2, 1, 1, 1, 1]), (PIECES, [4, 4, 2, 2, 1, 1, 1, 1])):
        tight, step = tight_step(1, message)
        Survivor(4).run(step, WINDOW, number=0)
        assert tight.tried == tried


def test_halving_starts_from_what_the_window_has() -> None:
    tight, step = tight_step(2)
    survivor = Survivor(64)
    survivor.run(step, WINDOW, number=0)
    assert tight.tried == [4, 2, 2]
    assert [(s.micro_batch, s.next_micro_batch) for s in survivor.survived] == [(64, 2)]


class Blocks(torch.nn.Module):
    """Two blocks with dropout, whose saved tensors are counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        block = [
            torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64), torch.nn.Dropout(0.5))
            for _ in range(2)
        ]
        self.blocks = torch.nn.ModuleList(block)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            images = torch.tanh(block(images))
        return images


def frugal_step(limit_bytes: int, held: list[int]) -> Any:
    """A step that has memory for so many bytes saved for backward; `held` gets those of the last forward."""
    inner = toy_objective("targets")

    def terms(model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
        held.clear()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held.append(tensor.nbytes)
            if sum(held) > limit_bytes:
                raise torch.OutOfMemoryError(SMALL)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return inner.terms(model, samples, canvas)

    return make_step(Blocks(), Objective(terms=terms, counts=inner.counts))


def test_checkpointing_comes_after_the_last_halving_and_changes_no_bit() -> None:
    held: list[int] = []
    undisturbed = frugal_step(10**9, held)
    torch.manual_seed(3)
    Survivor(1).run(undisturbed, WINDOW, number=0)
    least = sum(held)
    step = frugal_step(least - 1, held)
    survivor = Survivor(4, blocks=list(step.model.blocks))
    torch.manual_seed(3)
    survivor.run(step, WINDOW, number=0)
    assert sum(held) < least  # the same cut drew the same dropout
    assert [(s.micro_batch, s.next_micro_batch, s.checkpointing) for s in survivor.survived] == [
        (4, 2, False),
        (2, 1, False),
        (1, 1, True),
    ]
    assert "activation checkpointing switched on" in survival_line(survivor.survived[-1])
    assert all(torch.equal(a, b) for a, b in zip(everything(step), everything(undisturbed), strict=True))
    # Another process goes on from its saved state: nothing fails any more.
    again = frugal_step(least - 1, held)
    resumed = Survivor(4, blocks=list(again.model.blocks))
    resumed.load(json.loads(json.dumps(survivor.state())))
    resumed.run(again, WINDOW, number=0)
    assert (resumed.micro_batch, resumed.survived) == (1, [])
    other = Survivor(2, blocks=list(again.model.blocks))
    other.load(survivor.state())
    assert other.micro_batch == 2  # the user asked for another one


def test_the_end_of_the_ladder_has_numbers() -> None:
    step = frugal_step(0, [])
    survivor = Survivor(2, blocks=list(step.model.blocks))
    with pytest.raises(OutOfMemory, match=r"needs 7\.90 GiB, 7\.60 usable.*lower the resolution") as caught:
        survivor.run(step, WINDOW, number=6)
    assert caught.value.exit_code == 3
    assert [s.next_micro_batch for s in survivor.survived] == [1, 1, 0]
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("works", [True, False])
def test_after_a_quiet_stretch_the_larger_micro_batch_is_tried_once(works: bool) -> None:
    tight, step = tight_step(2)
    survivor = Survivor(4, quiet_windows=3)
    taken: list[int] = []
    for number in range(12):
        if number == 2:
            tight.most = 4 if works else 2
        survivor.run(step, WINDOW, number=number)
        taken.append(survivor.micro_batch)
    assert taken == ([2] * 3 + [4] * 9 if works else [2] * 12)
    assert tight.tried.count(4) == (10 if works else 2)  # once at the start, then every window or once more
    assert "tried again, once" in survival_line(survivor.survived[1])
    assert survivor.survived[1].step == 3


def test_an_update_that_cannot_be_finished_is_not_to_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    _, step = tight_step(4)

    def update(_number: int) -> torch.Tensor:
        raise torch.OutOfMemoryError(SMALL)

    monkeypatch.setattr(step, "update", update)
    survivor = Survivor(4)
    with pytest.raises(oom.HalfUpdated, match="update at step 8"):
        survivor.run(step, WINDOW, number=7)
    assert [(s.where, s.micro_batch, s.next_micro_batch) for s in survivor.survived] == [("update", 4, 4)] * 3


def test_buffers_are_copied_to_the_host_where_the_device_has_no_room() -> None:
    model = torch.nn.BatchNorm2d(3)
    with FailAt(1):
        restore = oom.snapshot(model, CPU)
    before = [buffer.clone() for buffer in model.buffers()]
    model(torch.randn(2, 3, 4, 4))
    assert not torch.equal(model.get_buffer("running_mean"), before[0])
    restore()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_halving_without_gradients_keeps_order_and_stays_small() -> None:
    sizes: list[int] = []

    def double(part: Sequence[int]) -> list[int]:
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError(SMALL)
        return [2 * n for n in part]

    survived: list[Survival] = []
    in_parts = partial(Halving(5, CPU, survived), step=9, where="evaluation")
    assert in_parts(double, range(7)) == [0, 2, 4, 6, 8, 10, 12]
    assert in_parts(double, range(2)) == [0, 2]
    assert sizes == [5, 3, 2, 2, 2, 1, 2]
    assert [(s.where, s.micro_batch, s.next_micro_batch) for s in survived] == [
        ("evaluation", 5, 3),
        ("evaluation", 3, 2),
    ]

    def never(_part: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError(SMALL)

    with pytest.raises(OutOfMemory, match=r"step 10 \(evaluation\): needs 7\.90 GiB"):
        in_parts(never, range(2))


# ---- host memory


@pytest.mark.parametrize("words", ["", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"])
def test_a_full_host_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    state, weights = tmp_path / run_folder.STATE, tmp_path / run_folder.LAST
    run_folder.save_state(state, {"step": 1})
    run_folder.save_weights(weights, {"w": torch.ones(2)}, {})

    def full(*_arguments: object, **_options: object) -> None:
        raise RuntimeError(words) if words else MemoryError

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(torch.Tensor, "cpu", full)
    for path, save in (
        (state, lambda: run_folder.save_state(state, {"step": 2})),
        (weights, lambda: run_folder.save_weights(weights, {"w": torch.zeros(2)}, {})),
    ):
        with pytest.raises(TrainfitError, match=rf"{path.name} \(host memory is full\); the previous one is intact"):
            save()
    monkeypatch.undo()
    assert run_folder.load_state(state)["step"] == 1
    assert run_folder.load_weights(weights)[0]["w"].tolist() == [1, 1]
    assert not list(tmp_path.glob("*.tmp"))


TINY: list[object] = ["--resolution", 64, "--groups", 1, "--num-queries", 20, "--no-multi-scale", "--device", "cpu"]


@pytest.fixture(scope="module")
def sample_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_set(tmp_path_factory.mktemp("set") / "sample", train=8, val=3)


def test_a_killed_loader_process_ends_the_run_with_its_state_saved(
    sample_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import multiprocessing
    import time

    handler, run_window, killed = signal.getsignal(signal.SIGCHLD), Survivor.run, []

    def run_and_kill(self: Survivor, *arguments: Any, **options: Any) -> Any:
        if options["number"] == 1:
            for process in multiprocessing.active_children():
                killed.append(process.pid)
                os.kill(process.pid or 0, signal.SIGKILL)
            time.sleep(0.2)  # the signal has come: it must not end the step here
        return run_window(self, *arguments, **options)

    monkeypatch.setattr(Survivor, "run", run_and_kill)
    arguments = ["train", "rfdetr-nano", "--data", sample_set, "--out", tmp_path / "run", *TINY]
    assert run(*arguments, "--effective-batch", 1, "--micro-batch", 1, "--workers", 1) == 2
    told = capsys.readouterr().err
    assert f"loader process {killed[0]} (exit code -9) died, most likely killed because host memory ran out" in told
    assert f"--resume {tmp_path / 'run'}" in told
    assert "Traceback" not in told
    steps = run_folder.load_state(tmp_path / "run" / run_folder.STATE)["step"]
    assert steps >= 2  # the window of the kill, and what was loaded before it
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, steps + 1))
    assert signal.getsignal(signal.SIGCHLD) is handler


# ---- a whole run


def test_a_run_that_stops_goes_on_and_tells_everything(
    sample_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, detect_all = tmp_path / "run", RfDetr.detect

    def full(*_arguments: object) -> list[Any]:
        raise torch.OutOfMemoryError(SMALL)

    forward = torch.nn.Module.__call__
    failed: list[int] = []

    def tight(self: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        if type(self).__name__ == "LWDETR" and self.training and len(arguments[0].tensors) > 1 and len(failed) < 1:
            failed.append(1)
            raise torch.OutOfMemoryError(SMALL)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", tight)
    monkeypatch.setattr(RfDetr, "detect", full)
    arguments = ["train", "rfdetr-nano", "--data", sample_set, "--out", out, "--epochs", 1, "--workers", 0, *TINY]
    assert run(*arguments, "--effective-batch", 4, "--micro-batch", 2) == 3
    told = capsys.readouterr().err
    assert "out of memory at step 1 (window, micro-batch 2): micro-batch now 1; needs 7.90 GiB, 7.60 usable" in told
    assert "step 2 (evaluation): needs 7.90 GiB, 7.60 usable" in told
    assert f"trainfit train --resume {out}" in told
    events = [json.loads(line) for line in (out / run_folder.TELEMETRY).read_text().splitlines() if '"oom"' in line]
    assert [(e["step"], e["where"], e["micro_batch"], e["next_micro_batch"]) for e in events] == [
        (0, "window", 2, 1),
        (1, "evaluation", 2, 1),
        (1, "evaluation", 1, 0),
    ]
    assert not any("bbox_ap" in row for row in rows(out))
    monkeypatch.setattr(RfDetr, "detect", detect_all)
    assert run("train", "--resume", out) == 0  # nothing is left but the evaluation that failed
    assert [row["step"] for row in rows(out)] == [1, 2, 2]
    assert "bbox_ap" in rows(out)[-1]
    printed = capsys.readouterr().out
    assert "survived    3 out-of-memory errors" in printed
    assert "out of memory at step 1 (window, micro-batch 2): micro-batch now 1" in printed


def test_an_update_that_fails_for_good_resumes_to_the_undisturbed_run(
    sample_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The half done update is not saved: the state of the step before stands, and a resume goes on from it."""
    arguments = ["train", "rfdetr-nano", "--data", sample_set, *TINY, "--optimizer", "adamw-foreach", "--workers", 0]
    arguments += ["--effective-batch", 4, "--micro-batch", 4, "--max-steps", 2, "--save-minutes", 0, "--eval-every", 0]
    sqrt = torch._foreach_sqrt  # pyright: ignore[reportPrivateUsage]
    calls: list[int] = []
    most = [10**6]

    def full(tensors: Any) -> Any:
        calls.append(1)
        if len(calls) > most[0]:
            raise torch.OutOfMemoryError(SMALL)
        return sqrt(tensors)

    monkeypatch.setattr(torch, "_foreach_sqrt", full)
    assert run(*arguments, "--out", tmp_path / "undisturbed") == 0
    most[0] = len(calls) - 1  # fails at the last unit of the second step, and whenever it is tried again
    assert most[0] > 4
    calls.clear()
    assert run(*arguments, "--out", tmp_path / "run") == 3
    assert "no memory for the optimizer's update at step 2" in capsys.readouterr().err
    assert run_folder.load_state(tmp_path / "run" / run_folder.STATE)["step"] == 1
    monkeypatch.setattr(torch, "_foreach_sqrt", sqrt)
    assert run("train", "--resume", tmp_path / "run") == 0
    states = [run_folder.load_state(tmp_path / name / run_folder.STATE) for name in ("undisturbed", "run")]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())


def test_fp16_stops_after_windows_that_are_never_finite(
    sample_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The count of skipped windows survives a resume; the parameters are those before the first of them."""
    monkeypatch.setattr(fit, "MOST_SKIPPED", 4)

    def fp16(_precision: str, _device: torch.device) -> str:
        return "fp16"

    monkeypatch.setattr(fit, "resolve_precision", fp16)

    def scaler(_precision: str, device_type: str) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device_type)

    monkeypatch.setattr(training_step, "grad_scaler", scaler)
    accumulate = training_step.accumulate

    def not_a_number(*positional: Any, **options: Any) -> Any:
        losses = accumulate(*positional, **options | {"precision": "fp32"})
        for parameter in positional[0].parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
        return losses

    monkeypatch.setattr(training_step, "accumulate", not_a_number)
    out = tmp_path / "run"
    arguments = ["train", "rfdetr-nano", "--data", sample_set, *TINY, "--out", out, "--workers", 0, "--eval-every", 0]
    arguments += ["--effective-batch", 2, "--micro-batch", 2, "--save-minutes", 0, "--epochs", 2]
    assert run(*arguments, "--max-steps", 8) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "not finite in 4 windows in a row, which fp16 skipped, the last of them step 4: start a new run" in line
    assert f"--weights {out / run_folder.LAST}" in line
    saved = run_folder.load_state(out / run_folder.STATE)
    assert (saved["step"], saved["skipped_windows"]) == (3, 3)
    assert run("train", "--resume", out) == 2  # one more is enough
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
