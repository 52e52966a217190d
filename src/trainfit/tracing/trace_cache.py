"""Traces of settings: from the disk, or from a process that makes one. Imports no torch, so a stored one comes at once."""

import gzip
import hashlib
import io
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import trainfit
from trainfit.cache import cache_folder
from trainfit.errors import TrainfitError
from trainfit.models.family import registering_modules
from trainfit.models.setting import Setting
from trainfit.process import end_running
from trainfit.tracing import worker
from trainfit.tracing.stored_trace import StoredTrace

SCHEMA = 1
LARGEST_TEXT_BYTES = 1 << 30
"""Of a stored text, decompressed. The largest trace of a built-in model has some 30 MB; more is damage."""
DAMAGE = (EOFError, ValueError, LookupError, TypeError, AttributeError, zlib.error, RecursionError, TrainfitError)
"""What reading and parsing raise for a file that is not what `store` wrote, besides gzip's OSError without a number."""
PACKAGES = ("torch", "torchvision", "rfdetr", "timm", "open_clip_torch")
T = TypeVar("T")
_FACTORY = {
    "training": "trainfit.models.build:build_step",
    "evaluation": "trainfit.models.build:build_eval_step",
}


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """What a trace depends on, besides installed software."""

    setting: Setting
    part: Literal["training", "evaluation"]
    """evaluation: one training window, then an evaluation micro-batch."""
    capability: tuple[int, int]
    """CUDA compute capability of the card."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda: fake tensors; cpu: the step really runs here, with the CPU's kernels: slow, and needs the memory."""

    def to_json(self) -> dict[str, Any]:
        """As the tracing process reads it (`tracing.worker.run`)."""
        return {
            "factory": _FACTORY[self.part],
            "kwargs": {"setting": self.setting.to_json()},
            "target": {"capability": self.capability, "fused_attention": True},
            "device": self.device,
            "steps": 2,
        }


def get_trace(request: TraceRequest, *, cache: bool = True) -> StoredTrace:
    """The trace of a request, from the disk if it is there and `cache` is set, else traced (seconds) and stored.

    Raises:
        TrainfitError: the step cannot be built or traced, or the trace cannot be stored.
    """
    # The code of a user's own model may have changed, and nothing here would notice.
    if not cache or not request.setting.family.cacheable:
        return StoredTrace.from_json(_traced(request))
    path = cache_path(request)
    found = stored(path, StoredTrace.from_json)
    if found is None:
        text = _traced(request)
        store(path, text)
        found = StoredTrace.from_json(text)
    return found


def get_traces(requests: Iterable[TraceRequest], *, cache: bool = True) -> tuple[StoredTrace, ...]:
    """`get_trace` of each; those that are missing are traced two at a time."""
    with ThreadPoolExecutor(2) as pool:
        try:
            return tuple(pool.map(partial(get_trace, cache=cache), requests))
        except KeyboardInterrupt:  # the pool waits for its threads, and they for their processes
            end_running()
            raise


def is_stored(request: TraceRequest) -> bool:
    """Whether its trace need not be made."""
    return cache_path(request).exists()


def cache_path(request: TraceRequest, *, versioned: bool = True) -> Path:
    """Where the request's trace is stored; the name depends on what is installed, if `versioned`."""
    text = json.dumps([SCHEMA, request.to_json(), versions() if versioned else None], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_folder() / "traces" / f"{name}.json.gz"


@cache
def versions() -> dict[str, str]:
    """Versions of what a step is made from; of trainfit, a digest of the code that builds and traces it."""
    found = {dist.name: dist.version for name in PACKAGES for dist in metadata.distributions(name=name)}
    source = Path(trainfit.__file__).parent
    files = sorted(file for room in ("models", "step", "tracing", "tasks") for file in (source / room).rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {**found, "trainfit": digest}


def _traced(request: TraceRequest) -> str:
    """The answer of a tracing process, as `StoredTrace.to_json` wrote it."""
    family = request.setting.family
    own = {"prepare": family.prepare_trace, "families": registering_modules()}
    return worker.run(request.to_json() | own, request.setting.model)


def packages_of(setting: Setting) -> dict[str, str]:
    """Installed versions of what a built-in family's steps are made from; of torch, the part that is not a patch."""
    found = versions()
    wanted = ("torch", *setting.family.packages)
    return {name: ".".join(found.get(name, "").split(".")[: 2 if name == "torch" else 3]) for name in wanted}


def kernel_class(capability: tuple[int, int] | None) -> tuple[int, int]:
    """The compute capability that stands for all whose kernels are chosen alike (`fake_cuda.attention_kernel`).

    None (AMD, or a card of which only the memory is known) counts as 8.0.
    """
    if capability is None:
        return (8, 0)
    if capability in ((9, 0), (10, 0)):
        return capability
    if capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return (8, 6)
    return (8, 0) if capability >= (8, 0) else (7, 5) if capability >= (7, 0) else (6, 1)


def stored(path: Path, parse: Callable[[str], T]) -> T | None:
    """What `store` wrote, parsed; None where there is nothing.

    A damaged file is removed with a warning in the log, so that it is made anew.

    Raises:
        TrainfitError: the file exists and cannot be read.
    """
    try:
        return parse(_decompressed(path.read_bytes()))
    except FileNotFoundError:
        return None
    except gzip.BadGzipFile as error:
        reason = str(error)
    except OSError as error:
        raise TrainfitError(f"{path}: cannot be read ({error.strerror}); remove it or use --no-cache") from error
    except DAMAGE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
    logging.getLogger(__name__).warning("%s is damaged (%.100s): removed, and made anew", path, reason)
    path.unlink(missing_ok=True)
    return None


def _decompressed(data: bytes) -> str:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        text = file.read(LARGEST_TEXT_BYTES + 1)
    if not 0 < len(text) <= LARGEST_TEXT_BYTES:
        raise ValueError("empty" if not text else "too large")
    return text.decode()


def store(path: Path, text: str) -> None:
    """Whole or not at all: several processes may trace the same setting."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(gzip.compress(text.encode(), compresslevel=1))
        Path(name).replace(path)
    except OSError as error:
        raise TrainfitError(
            f"{path.parent}: cannot be written ({error.strerror}); set XDG_CACHE_HOME or use --no-cache"
        ) from error
