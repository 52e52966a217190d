"""Verdicts at their exact limits, the trace cache, and the command, with one real trace of a small network."""

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from test_profile import make_trace
from trainfit import cli
from trainfit.gpus.catalogue import MIB, Gpu, find_gpu, gpu_with_memory
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.predict import allocator_room, assess, trace_requests
from trainfit.models.setting import Setting, make_setting
from trainfit.tracing import trace_cache
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest, cache_path, get_both, get_traces

STORED = StoredTrace(trace=make_trace(), ops=())
SMALL = ("predict", "timm:resnet10t", "--resolution", "64", "--micro-batch", "2", "--gpu", "RTX 3060")


def card(memory_bytes: int) -> Gpu:
    """An RTX 3090 with another measured total."""
    return replace(find_gpu("RTX 3090"), memory_bytes=memory_bytes)


def verdict(memory_bytes: int, config: AllocatorConfig) -> str:
    return assess(STORED, card(memory_bytes), config).verdict


@pytest.mark.parametrize("expandable", [False, True])
def test_verdicts_at_exact_limits(expandable: bool) -> None:
    """Fits from the top of the need on, tight below; a page below its low end does not fit. What is taken is another number."""
    config = AllocatorConfig(expandable_segments=expandable)
    ample = assess(STORED, card(2**40), config)
    needs = ample.needs
    assert needs.low_bytes < needs.high_bytes
    assert verdict(needs.high_bytes, config) == "fits"
    assert verdict(needs.high_bytes - 1, config) == "tight"
    assert verdict(needs.low_bytes, config) == "tight"
    assert ample.takes.low_bytes <= ample.takes_bytes <= ample.takes.high_bytes
    short = assess(STORED, card(needs.low_bytes - 24 * MIB), config)
    assert short.verdict == "does not fit"
    assert short.oom is not None
    assert short.needs == needs  # what it would need, though it never got it


def test_fraction_limits_the_allocator_alone() -> None:
    """Half a card for PyTorch: the context comes on top (pytorch CUDACachingAllocator, setMemoryFraction)."""
    half = AllocatorConfig(per_process_memory_fraction=0.5)
    room = allocator_room(card(4096 * MIB), half)
    assert room.low_bytes == room.high_bytes == 2048 * MIB
    assert allocator_room(card(4096 * MIB), AllocatorConfig()).low_bytes == (4096 - 390) * MIB


def test_nominal_memory_pays_the_driver() -> None:
    room = allocator_room(gpu_with_memory("8GiB"), AllocatorConfig())
    assert room.high_bytes == (8192 - 300 - 16) * MIB
    assert room.low_bytes == (8192 - 600 - 576) * MIB


def test_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file for whatever changes the trace; the same for what does not."""
    setting, gpu = make_setting(model="timm:resnet10t"), find_gpu("RTX 3090")

    def path(setting: Setting = setting, gpu: Gpu = gpu) -> Path:
        return cache_path(trace_requests(setting, gpu)[0])

    assert path() == path(gpu=find_gpu("RTX 3060")) == path(replace(setting, eval_micro_batch=9))
    others = [
        path(replace(setting, micro_batch=2)),
        path(gpu=find_gpu("T4")),
        cache_path(trace_requests(setting, gpu)[1]),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(trace_cache, "SCHEMA", 0)
        others.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(trace_cache, "packages_of", lambda _: {"torch": "2.11"})  # pyright: ignore[reportUnknownLambdaType]
        others.append(path())
    assert len({path(), *others}) == 6


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds both traces of SMALL, really traced."""
    folder = tmp_path_factory.mktemp("traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        with pytest.raises(SystemExit, match="0"):
            cli.main([*SMALL, "--json"])
    return folder


@pytest.fixture
def no_tracing(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setenv("XDG_CACHE_HOME", str(stored))
    monkeypatch.setattr(subprocess, "Popen", refuse)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str, object]:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return out, err, end.value.code


def test_traces_of_training_and_evaluation_made_in_one_run_are_those_made_alone() -> None:
    """Of a model with batch statistics, whose evaluation differs from training in more than its gradients."""
    setting = make_setting("timm:resnet10t", resolution=64, micro_batch=2, accumulation=2)
    requests = trace_requests(setting, find_gpu("RTX 3060"))
    assert get_both(*requests, cache=False) == get_traces(requests, cache=False)


@pytest.mark.usefixtures("no_tracing")
def test_stored_trace_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    """And says what timm's own model holds."""
    model = pytest.importorskip("timm").create_model("resnet10t", num_classes=80)
    out, _, code = run(capsys, *SMALL, "--json")
    record: Mapping[str, Any] = json.loads(out)
    assert code == 0
    assert record["verdict"] == "fits"
    held = dict(zip(record["categories"], record["training"]["profile"]["peak"]["category_bytes"], strict=True))
    assert held["parameters"] == 4 * sum(p.numel() for p in model.parameters())
    assert held["optimizer state"] - 2 * held["parameters"] == 4 * len(list(model.parameters()))  # its step counters
    assert record["evaluation"]["profile"]["peak"]["phase"] == "forward"


@pytest.mark.usefixtures("no_tracing")
def test_other_setting_is_traced() -> None:
    with pytest.raises(AssertionError, match="traced again"):
        cli.main([*SMALL, "--accumulation", "2"])
    with pytest.raises(AssertionError, match="traced again"):
        cli.main([*SMALL, "--no-cache"])


@pytest.mark.usefixtures("no_tracing")
def test_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Written once, overwritten with --force only."""
    html, snapshot = tmp_path / "p.html", tmp_path / "p.pickle"
    arguments = (*SMALL, "--html", str(html), "--snapshot", str(snapshot))
    out, err, code = run(capsys, *arguments)
    assert code == 0
    assert out.startswith("timm:resnet10t, micro-batch 2, on RTX 3060: fits. It needs ")
    assert err == f"wrote {html}\nwrote {snapshot}\n"
    assert html.read_text().startswith("<!doctype html>")
    assert pickle.loads(snapshot.read_bytes())["device_traces"][0][0]["action"] == "snapshot"
    assert run(capsys, *arguments)[1:] == (
        f"trainfit: error: {html} exists; choose another name or use --force\n",
        2,
    )
    assert run(capsys, *arguments, "--force")[2] == 0


def test_stored_trace_needs_no_torch(stored: Path) -> None:
    code = (
        "import subprocess, sys, trainfit.cli.predict as p; from trainfit.models.setting import make_setting; "
        "from trainfit.memory.native_loop import native_function; native_function(); subprocess.Popen = None; "
        "s = make_setting(model='timm:resnet10t', resolution=64, micro_batch=2); "
        "p.predict(p.PredictFlags(setting=s, gpu='RTX 3060'), set()); assert 'torch' not in sys.modules"
    )
    environment = {"XDG_CACHE_HOME": str(stored), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("timm:resnet10t", "--gpu", "RTX 3099"), "GPU 'RTX 3099' is not in the catalogue. Perhaps you meant RTX 30"),
        (("rf-detr nanno", "--gpu", "3060"), "no model named 'rf-detr nanno'. Perhaps you meant rfdetr-nano."),
        (("rfdetr-nano",), "which card? give --gpu NAME or --memory 8GiB"),
        (("rfdetr-nano", "--gpu", "3060", "--micro-batch", "0"), "--micro-batch must be at least 1, not 0"),
        (("rfdetr-nano", "--memory", "8 apples"), "--memory '8 apples' is not a memory size"),
    ],
)
def test_errors_in_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err, code = run(capsys, "predict", *arguments)
    assert (out, code) == ("", 2)
    assert err.startswith(f"trainfit: error: {message}")
    assert err.count("\n") == 1


def test_own_models_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their code may have changed: a stored trace is not even looked for."""
    (tmp_path / "mine.py").write_text("def task(): ...\n")
    monkeypatch.chdir(tmp_path)
    request = TraceRequest(setting=make_setting(model="mine:task"), part="training", capability=(8, 6))
    path = cache_path(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not a trace")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(AssertionError, match="traced again"):
        trace_cache.get_trace(request)


def test_optimizer_state_bytes() -> None:
    """AdamW keeps two float32 a parameter; bitsandbytes' 8-bit one two bytes and two scales for every 256 values.

    Tensors of fewer than 4096 values stay in 32 bits (bitsandbytes optim/optimizer.py, `min_8bit_size`).
    """
    import timm

    model = timm.create_model("resnet10t", num_classes=make_setting(model="timm:resnet10t").classes)
    sizes = [p.numel() for p in model.parameters()]
    expected = {
        "adamw-fused": sum(8 * n for n in sizes),
        "adamw-8bit": sum(8 * n if n < 4096 else 2 * n + 8 * -(-n // 256) for n in sizes),
    }
    for optimizer, state_bytes in expected.items():
        setting = make_setting(model="timm:resnet10t", resolution=64, micro_batch=2, precision="fp32", ema=False)
        request = trace_requests(replace(setting, optimizer=optimizer), find_gpu("RTX 3060"))[0]  # pyright: ignore[reportArgumentType]
        tensors = trace_cache.get_trace(request, cache=False).trace.tensors
        traced = sum(t.nbytes for t in tensors if t.category == "optimizer state")
        # Besides: a step count of four bytes a tensor, or 8-bit's two tables of 256 float32.
        assert state_bytes <= traced <= state_bytes + max(4 * len(sizes), 2 * 1024 * 2)
