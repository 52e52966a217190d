"""Damaged trace caches are removed, reported, and made again; damaged files of the package are named."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory import scaled_traces, shipped
from trainfit.memory.priced import Pricer
from trainfit.models.setting import make_setting
from trainfit.tracing import trace_cache
from trainfit.tracing.events import Trace
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest

REQUEST = TraceRequest(setting=make_setting(model="timm:resnet18"), part="training", capability=(8, 0))
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "garbage": lambda _: b"not a gzip file at all",
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :],
    "no text": lambda _: gzip.compress(b""),
    "not JSON": lambda _: gzip.compress(b"{"),
    "other JSON": lambda _: gzip.compress(b'{"trace": 3}'),
    "not UTF-8": lambda _: gzip.compress(b"\xff\xfe"),
}


@pytest.fixture
def tracings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TraceRequest]:
    """The requests that a stand-in for the tracing process was given; the cache is empty."""
    asked: list[TraceRequest] = []

    def traced(request: TraceRequest) -> str:
        asked.append(request)
        return StoredTrace(trace=Trace(tensors=(), events=(), marks=()), ops=(), blocks=7).to_json()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trace_cache, "_traced", traced)
    return asked


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_trace_is_made_anew_and_reported_once(
    damage: str, tracings: list[TraceRequest], caplog: pytest.LogCaptureFixture
) -> None:
    path = trace_cache.cache_path(REQUEST)
    whole = trace_cache.get_trace(REQUEST)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert trace_cache.get_trace(REQUEST) == whole
    assert trace_cache.get_trace(REQUEST) == whole
    assert len(tracings) == 2  # the first, and the one that replaces the damaged file
    assert [str(path) in line and "made again" in line for line in caplog.messages] == [True]


def test_an_empty_scaled_trace_does_not_read_as_one_that_cannot_be_scaled(
    tracings: list[TraceRequest], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[TraceRequest] = []

    def cannot_be_scaled(request: TraceRequest, *, cache: bool) -> dict[TraceRequest, None]:
        assert cache
        made.append(request)
        return {request: None}

    monkeypatch.setattr(scaled_traces, "make_scaled", cannot_be_scaled)
    path = scaled_traces.KEPT.path(REQUEST)
    for content in (None, gzip.compress(b""), b""):
        if content is not None:
            path.write_bytes(content)
        assert scaled_traces.scaled_traces_of(REQUEST, cache=True, note=print) == {REQUEST: None}
        assert scaled_traces.scaled_traces_of(REQUEST, cache=True, note=print) == {REQUEST: None}
    assert len(made) == 3
    assert len(caplog.messages) == 2
    assert not tracings


def test_a_cache_that_cannot_be_read_is_named(tracings: list[TraceRequest]) -> None:
    path = trace_cache.cache_path(REQUEST)
    path.mkdir(parents=True)
    with pytest.raises(TrainfitError, match=r"cannot be read .*--no-cache") as caught:
        trace_cache.get_trace(REQUEST)
    assert str(path) in str(caught.value)
    assert not tracings


@pytest.mark.parametrize("damage", [b"", b"\xfd7zXZ\x00 cut", b"garbage"])
def test_a_damaged_file_of_the_package_is_named(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting(model="rfdetr-nano", precision="bf16")
    folder = tmp_path / "shipped"
    shutil.copytree(shipped.shipped_folder(), folder)
    monkeypatch.setattr(shipped, "shipped_folder", lambda: folder)
    pricer = Pricer(gpu=find_gpu("A100"))
    request = pricer.request(setting, "training")
    assert shipped.is_shipped(request)
    (folder / "rfdetr-nano.tar.xz").write_bytes(damage)
    shipped.forget()
    try:
        with pytest.raises(TrainfitError, match=r"is damaged .*reinstall it with pip") as caught:
            pricer.blocks(setting)
    finally:
        shipped.forget()
    assert str(folder / "rfdetr-nano.tar.xz") in str(caught.value)
