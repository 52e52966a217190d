"""Out-of-memory messages of public issues, logs and snapshots are explained; the oracles are what a person reads in them."""

import io
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import trainfit
from conftest import run
from trainfit.errors import TrainfitError
from trainfit.explaining import knobs
from trainfit.explaining.explain import explain_bytes
from trainfit.explaining.growth import judge
from trainfit.explaining.message import find_messages
from trainfit.explaining.places import place_of
from trainfit.explaining.snapshot import read_snapshot
from trainfit.memory.allocator import replay
from trainfit.memory.shipped import why_unused
from trainfit.reports.memory_viewer import to_snapshot
from trainfit.tracing.events import TensorInfo, Trace

ROOT = Path(__file__).parents[1]
MIB = 2**20
MESSAGES = json.loads((ROOT / "tests" / "oom_messages.json").read_text())

LAST = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which "
    "1.00 GiB is free. Including non-PyTorch memory, this process has 6.90 GiB memory in use. Of the allocated memory 6.00 GiB "
    "is allocated by PyTorch, and 0.40 GiB is reserved by PyTorch but unallocated."
)
TRACEBACK = f"""epoch 3
Traceback (most recent call last):
  File "/home/me/train.py", line 90, in <module>
    main()
  File "/home/me/train.py", line 61, in main
    loss.backward()
  File "/opt/lib/python3.11/site-packages/torch/_tensor.py", line 581, in backward
    torch.autograd.backward(
  File "/opt/lib/python3.11/site-packages/torch/autograd/__init__.py", line 347, in backward
    _engine_run_backward(
{LAST}
"""


@pytest.mark.parametrize("row", MESSAGES, ids=lambda row: row["issue"])
def test_a_message_of_a_public_issue(row: dict[str, str]) -> None:
    (found,) = find_messages(row["message"])
    assert found.kind == row["kind"]


def test_there_are_twenty_and_every_kind_of_shortage() -> None:
    kinds = Counter(row["kind"] for row in MESSAGES)
    assert sum(kinds.values()) >= 20
    assert {
        "shortage",
        "fragmentation",
        "one tensor too large",
        "other processes",
        "limit",
        "host memory",
    } <= kinds.keys()


def test_the_place_and_the_phase_of_a_traceback() -> None:
    (found,) = find_messages(TRACEBACK + TRACEBACK)
    assert found.where == "/home/me/train.py:61, in main: loss.backward()"
    assert found.operator.startswith("/opt/lib/python3.11/site-packages/torch/autograd/__init__.py:347")
    assert (found.phase, found.kind) == ("backward", "shortage")
    assert (found.request_bytes, found.total_bytes, found.free_bytes) == (2 << 30, 8 << 30, 1 << 30)
    assert found.cached_bytes == int(0.4 * 2**30)
    assert found.others_bytes == (8 << 30) - (1 << 30) - int(6.9 * 2**30)


@pytest.mark.parametrize(
    ("series", "verdict"),
    [
        ([1000 + 10 * k for k in range(40)], "leak"),
        ([1000 + 10 * k + k % 3 for k in range(40)], "leak"),
        ([1000] * 5 + [1600] * 12 + [1900] * 23, "larger input"),
        ([1000, 1400, 1500, 1550, *[1560] * 20, 1570, *[1570] * 10], "larger input"),
        ([1000] * 40, "steady"),
        ([1000, 1200, 1300], "too short"),
    ],
)
def test_growth(series: list[int], verdict: str) -> None:
    assert judge([value * MIB for value in series]).verdict == verdict


@pytest.mark.parametrize(
    "line",
    [
        "eta: 1:02:03  iter: {n}  total_loss: 1.2  lr: 0.01  max_mem: {mib}M",
        "Epoch: [0]  [{n}/100]  loss: 1.2 time: 0.2  data: 0.01  max mem: {mib}",
        "mmengine - INFO - Epoch(train) [1][{n}/99]  lr: 1e-4  memory: {mib}  loss: 1.2",
        '{{"step": {n}, "loss": 1.2, "reserved_bytes": {nbytes}}}',
    ],
)
def test_figures_of_known_logs(line: str) -> None:
    text = "\n".join(line.format(n=n, mib=2000 + 20 * n, nbytes=(2000 + 20 * n) * MIB) for n in range(30))
    growth = explain_bytes(text.encode(), "log").growth
    assert growth is not None
    assert (growth.verdict, growth.first_bytes, growth.figures) == ("leak", 2000 * MIB, 30)


def entry(action: str, addr: int, size: int, line: int = 0) -> dict[str, Any]:
    frames = [
        {"filename": "ATen/empty.cpp", "name": "at::empty", "line": 3},
        {"filename": "/home/me/train.py", "name": "step", "line": line},
    ]
    return {"action": action, "addr": addr, "size": size, "stream": 0, "frames": frames if line else []}


def leaking() -> dict[str, Any]:
    """Twenty steps: an activation that is freed, and an output that is kept."""
    entries = [entry("segment_alloc", 0, 100 * MIB)]
    for step in range(20):
        entries += [
            entry("alloc", 50 * MIB, 9 * MIB, 7),
            entry("alloc", step * MIB, MIB, 8),
            entry("free_completed", 50 * MIB, 9 * MIB, 7),
        ]
    blocks = [
        {"size": 20 * MIB, "state": "active_allocated", "requested_size": 20 * MIB},
        {"size": 80 * MIB, "state": "inactive"},
    ]
    segment = {"device": 0, "address": 0, "total_size": 100 * MIB, "stream": 0, "blocks": blocks}
    return {"segments": [segment], "device_traces": [entries]}


def test_a_leak_in_a_snapshot_and_the_tensors_at_the_peak() -> None:
    (found,) = read_snapshot(pickle.dumps(leaking()), "x")
    assert (found.at, found.allocated_bytes, found.reserved_bytes) == ("peak", 29 * MIB, 100 * MIB)
    assert [(leak.place, leak.tensors, leak.nbytes) for leak in found.leaks] == [
        ("/home/me/train.py:8 in step", 20, 20 * MIB)
    ]
    assert [(h.place, h.nbytes, h.tensors) for h in found.holders] == [
        ("/home/me/train.py:8 in step", 20 * MIB, 20),
        ("/home/me/train.py:7 in step", 9 * MIB, 1),
    ]


def test_a_single_forward_is_no_leak() -> None:
    """Layers keep their activations, as the snapshots of public repositories show: nothing tells them from a leak."""
    entries: list[dict[str, Any]] = []
    for layer in range(32):
        entries += [
            entry("alloc", 2 * layer * MIB, MIB, 7),
            entry("alloc", 900 * MIB, MIB, 9),
            entry("free_completed", 900 * MIB, MIB, 9),
        ]
    (found,) = read_snapshot(pickle.dumps({"segments": [], "device_traces": [entries]}), "x")
    assert (found.steps, found.judges_leaks, found.leaks) == (0, False, ())


TORCH = "/opt/conda/lib/python3.10/site-packages/torch"
EVALUATED = ("??", "torch::autograd::Engine::evaluate_function(std::shared_ptr<torch::autograd::GraphTask>&)")
CALLED = ("??", "at::_ops::bmm::call(at::Tensor const&, at::Tensor const&)")
C_FRAMES = [
    ("??", "torch::unwind::unwind()"),
    ("memory_snapshot.cpp", "torch::cuda::(anonymous namespace)::gather_with_cpp()"),
    ("", "c10::cuda::CUDACachingAllocator::Native::NativeCachingAllocator::malloc(void**, signed char)"),
]
INTERPRETER = ("/usr/local/src/conda/python-3.12.3/Objects/methodobject.c", "cfunction_call")


@pytest.mark.parametrize(
    ("frames", "place"),
    [
        (
            [CALLED, INTERPRETER, (f"{TORCH}/nn/modules/linear.py", "forward"), ("/home/me/net.py", "forward")],
            "/home/me/net.py",
        ),
        ([CALLED, INTERPRETER, ("/tmp/ipykernel_114/3105878423.py", "<module>")], "/tmp/ipykernel_114/3105878423.py"),
        ([CALLED, INTERPRETER, (f"{TORCH}/optim/adam.py", "_multi_tensor_adam")], f"{TORCH}/optim/adam.py"),
        (
            [CALLED, ("??", "torch::autograd::generated::BmmBackward0::apply(std::vector<at::Tensor>&&)"), EVALUATED],
            "backward of Bmm (no Python line was recorded)",
        ),
        (
            [("accumulate_grad.cpp", "torch::autograd::AccumulateGrad::apply(std::vector<at::Tensor>&&)"), EVALUATED],
            "backward: gradients of parameters (no Python line was recorded)",
        ),
        ([EVALUATED, ("thread48.o", "execute_native_thread_routine")], "backward (no Python line was recorded)"),
        ([CALLED, INTERPRETER], "operator bmm (no Python line was recorded)"),
        ([("thread.cc", "start_thread")], ""),
    ],
)
def test_the_place_is_found_among_frames_of_c(frames: list[tuple[str, str]], place: str) -> None:
    """Frames as torch 2.3 to 2.9 recorded them in snapshots of public repositories."""
    given = [{"filename": file, "line": 0, "name": name} for file, name in (*C_FRAMES, *frames)]
    assert place_of(given).partition(" in ")[0] == place


def test_fragmentation_at_the_error_of_a_snapshot() -> None:
    """The replay of a trace that leaves holes, as PyTorch's own reader takes it (tests/test_snapshot.py)."""
    pieces = [TensorInfo(id=n, nbytes=9 * MIB, category="activations", op="conv", module="model.py") for n in range(8)]
    large = TensorInfo(id=8, nbytes=40 * MIB, category="activations", op="cat", module="model.py")
    trace = Trace(tensors=(*pieces, large), events=(1, 2, 3, 4, 5, 6, 7, 8, -1, -3, -5, -7, 9))
    result = replay(trace, capacity_bytes=100 * MIB)
    assert result.oom is not None
    (found,) = read_snapshot(pickle.dumps(to_snapshot(trace, result)), "x")
    assert (found.at, found.request_bytes, found.allocated_bytes) == ("out of memory", 40 * MIB, 36 * MIB)
    assert (found.holders[0].place, found.holders[0].tensors) == ("model.py in conv", 4)
    assert (found.free_pieces_bytes, found.reserved_bytes) == (44 * MIB, 80 * MIB)
    assert found.fragmented


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_a_snapshot_runs_no_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainfitError, match=r"it asks for builtins.print"):
        read_snapshot(pickle.dumps({"segments": [Evil()]}), "x.pickle")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no out-of-memory message"),
        (b"all is well\n", "has no out-of-memory message"),
        (b"\x80\x04damaged", "is not a memory snapshot"),
        (pickle.dumps([1, 2]), "is not a memory snapshot"),
        (pickle.dumps({"segments": [{"device": 0}]}), "is not a memory snapshot"),
        (pickle.dumps({"segments": [], "device_traces": [[]]}), "held no GPU memory"),
    ],
)
def test_what_is_nothing_is_said_in_a_line(data: bytes, message: str) -> None:
    with pytest.raises(TrainfitError) as caught:
        explain_bytes(data, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.txt"
    log.write_text(TRACEBACK)
    monkeypatch.setattr(knobs, "predict", predicted)
    assert run("explain", log, "--model", "rfdetr-nano", "--micro-batch", 8) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "the card is full with tensors\n  asked for by   /home/me/train.py:61, in main: loss.backward() (backward)"
    )
    lines = [line.split() for line in text.splitlines() if " frees " in line]
    assert lines[0][:5] == ["--micro-batch", "4", "frees", "4.00", "GiB,"]
    assert {line[0] for line in lines} >= {"--checkpointing", "--ema-on-host", "--optimizer"}
    assert "needs up to 9.00 GiB on a 8 GiB card" in text
    assert run("explain", log, "--json") == 0
    assert json.loads(capsys.readouterr().out)["messages"][0]["kind"] == "shortage"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pickle.dumps(leaking()))))
    assert run("explain", "-") == 0
    assert "leak           20 tensors (20 MiB) of /home/me/train.py:8 in step" in capsys.readouterr().out
    assert run("explain", tmp_path) == 2
    assert run("explain", tmp_path / "nowhere") == 2
    assert run("explain", log, "--model", "rfdetr-nanno") == 2
    assert "Perhaps you meant rfdetr-nano" in capsys.readouterr().err


def test_what_each_knob_frees_is_of_stored_traces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is traced: a knob that no stored trace covers is named with the flag that prices it."""
    if reason := why_unused(trainfit.make_setting("rfdetr-nano", precision="bf16")):
        pytest.skip(reason)
    monkeypatch.setattr(subprocess, "Popen", None)
    log = tmp_path / "log.txt"
    log.write_text(LAST)
    assert run("explain", log, "--model", "rfdetr-nano", "--micro-batch", 8, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    freed = {knob["knob"]: knob for knob in result["knobs"]}
    moments = freed["--optimizer adamw-host"]["frees_bytes"]
    assert moments == pytest.approx(8 * 30.5e6, rel=0.06)  # upstream's table: 30.5 million parameters, two float32 each
    half, all_blocks = freed["--micro-batch 4"], freed["--checkpointing all"]
    assert (
        half["needs_bytes"]
        == trainfit.predict("rfdetr-nano", memory="8GiB", micro_batch=4, accumulation=2).needs.high_bytes
    )
    assert half["same_result"]
    assert all_blocks["frees_bytes"] > 2**30
    smaller = freed["--resolution 288"]
    of_smaller = trainfit.predict("rfdetr-nano", memory="8GiB", micro_batch=8, accumulation=2, resolution=288)
    assert smaller["needs_bytes"] == of_smaller.needs.high_bytes
    assert smaller["frees_bytes"] > 2**29
    assert not smaller["same_result"]
    assert "--trace prices it too" in freed["--groups 4"]["failure"]


def predicted(setting: Any, _gpu: Any) -> Any:
    """A prediction whose needs are 1 GiB, and 1 GiB an image."""
    needs = SimpleNamespace(high_bytes=(1 + setting.micro_batch) << 30)
    return SimpleNamespace(needs=needs)


def test_the_call_is_the_command() -> None:
    explanation = trainfit.explain(TRACEBACK)
    assert isinstance(explanation, trainfit.Explanation)
    assert explanation.messages[0].kind == "shortage"


def test_the_example_runs() -> None:
    command = [sys.executable, str(ROOT / "examples" / "explain_memory.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "fragmentation" in done.stdout
    assert "growth: leak" in done.stdout


def test_what_is_no_readable_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file is read without bound, and a pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(5 * 2**30)  # takes no room on the disk
    for name, message in (
        ("missing", "missing cannot be read (No such file or directory): give a log"),
        ("pipe", "pipe cannot be read (it is not a regular file): give a log"),
        ("large", "large cannot be read (it is 5368709120 bytes long, and at most 4294967296 are read)"),
        ("", f"{tmp_path} is a folder: give a log"),
        ("empty", "empty has no out-of-memory message, no memory figures, and is not a snapshot"),
    ):
        assert run("explain", tmp_path / name) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
