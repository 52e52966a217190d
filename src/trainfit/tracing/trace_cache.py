"""Traces of settings, read from the disk or made by a tracing process. Imports no torch, so that a stored trace loads fast.

A trace is stored under what differs from the defaults of its setting, and with the value of every knob and its
`Provenance`. A new knob with a default leaves its name as it is; a changed default or changed code makes it invalid.
"""

import gzip
import hashlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import trainfit
from trainfit.errors import TrainfitError
from trainfit.files import cache_folder, read_bytes
from trainfit.models.family import families, registering_modules
from trainfit.models.setting import Setting
from trainfit.process import end_running
from trainfit.tracing import client
from trainfit.tracing.provenance import TRACER, Provenance, installed_versions, provenance
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.user_code import require_named

SCHEMA = 2
LARGEST_TEXT_BYTES = 1 << 30
"""Limit of a stored text, decompressed. The largest trace of a built-in model has about 30 MB; more means a damaged file."""
DAMAGE = (EOFError, ValueError, LookupError, TypeError, AttributeError, zlib.error, RecursionError, TrainfitError)
"""Exceptions of reading and parsing a damaged file, besides gzip's OSError without an errno."""
T = TypeVar("T")
_FUNCTION = {"training": "build_step", "evaluation": "build_eval_step"}


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """What a trace depends on, besides installed software."""

    setting: Setting
    """The setting that is traced."""
    part: Literal["training", "evaluation"]
    """evaluation: one training window, then an evaluation micro-batch."""
    capability: tuple[int, int]
    """CUDA compute capability of the card."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda: fake tensors; cpu: the step really runs here, with the CPU's kernels: slow, and needs the memory."""
    samples: int | None = None
    """Samples of the window, where its last micro-batch is smaller; None: micro-batch times accumulation."""

    @property
    def name(self) -> str:
        """The values that differ from the defaults; two requests for one model have the same name if they are equal."""
        values: dict[str, Any] = {"capability": "{}.{}".format(*self.capability)}
        if self.device != "cuda":
            values["device"] = self.device
        if self.samples is not None:
            values["samples"] = self.samples
        for knob in fields(self.setting):
            value = getattr(self.setting, knob.name)
            if knob.name != "model" and value != knob.default:
                values[knob.name] = value
        return " ".join([self.part, *(f"{key}={values[key]}" for key in sorted(values))])

    def to_json(self) -> dict[str, Any]:
        """The request in the form that the tracing process reads (`tracing.client.run`)."""
        module = "build" if self.samples is None else "coupled_step"
        samples = {} if self.samples is None else {"samples": self.samples}
        return {
            "factory": f"trainfit.models.{module}:{_FUNCTION[self.part]}",
            "kwargs": {"setting": self.setting.to_json(), **samples},
            "target": {"capability": self.capability, "fused_attention": True},
            "device": self.device,
            "steps": 2,
        }


def get_trace(request: TraceRequest, *, cache: bool = True) -> StoredTrace:
    """The trace of a request: from the disk if it is stored and `cache` is set, else traced (seconds) and stored.

    Raises:
        TrainfitError: the step cannot be built or traced, or the trace cannot be stored.
    """
    # The code of a user's own model may have changed, and nothing here would detect that.
    if not cache or not request.setting.family.cacheable:
        return StoredTrace.from_json(_traced(request))
    path = cache_path(request)
    trace = read_stored(path, partial(_valid_trace, request))
    if trace is None:
        record = json.loads(_traced(request))
        trace = StoredTrace.from_record(record)
        store(path, with_provenance(request, record))
    return trace


def _valid_trace(request: TraceRequest, text: str) -> StoredTrace | None:
    record = content_if_valid(request, text)
    return None if record is None else StoredTrace.from_record(record)


def get_traces(requests: Iterable[TraceRequest], *, cache: bool = True) -> tuple[StoredTrace, ...]:
    """`get_trace` of each request; missing traces are made two at a time."""
    with ThreadPoolExecutor(2) as pool:
        try:
            return tuple(pool.map(partial(get_trace, cache=cache), requests))
        except KeyboardInterrupt:  # the pool waits for its threads, and the threads wait for their processes
            end_running()
            raise


def trace_both(requests: Iterable[TraceRequest]) -> tuple[tuple[StoredTrace, StoredTrace], ...]:
    """Traces of training and of evaluation for each request of evaluation, made two requests at a time and not stored: the two
    share the building of the model and the first window, which takes a fork.
    """
    with ThreadPoolExecutor(2) as pool:
        try:
            texts = tuple(pool.map(partial(_traced, both=True), requests))
        except KeyboardInterrupt:
            end_running()
            raise
    records = map(json.loads, texts)
    return tuple(
        (StoredTrace.from_record(each["training"]), StoredTrace.from_record(each["evaluation"])) for each in records
    )


def get_both(
    training: TraceRequest, evaluation: TraceRequest, *, cache: bool = True
) -> tuple[StoredTrace, StoredTrace]:
    """`get_trace` of the training and of the evaluation of one setting, made in one run where neither is stored."""
    stores = cache and training.setting.family.cacheable
    if sys.platform != "linux" or training.device != "cuda" or (stores and any(map(is_stored, (training, evaluation)))):
        one, other = get_traces((training, evaluation), cache=cache)
        return one, other
    record = json.loads(_traced(evaluation, both=True))
    for request in (training, evaluation) if stores else ():
        store(cache_path(request), with_provenance(request, record[request.part]))
    return StoredTrace.from_record(record["training"]), StoredTrace.from_record(record["evaluation"])


def prepare_tracing(setting: Setting) -> None:
    """Start the process that will trace the setting, and return at once."""
    client.prepare(_own_modules(setting))


def is_stored(request: TraceRequest) -> bool:
    """Whether the trace of a request is in the cache."""
    return cache_path(request).exists()


def cache_path(request: TraceRequest) -> Path:
    """Where the request's trace is stored; the name depends on the versions of the packages that are installed."""
    model = request.setting.model
    text = json.dumps([SCHEMA, model, request.name, packages_of(request.setting)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    readable = re.sub("[^A-Za-z0-9.-]+", "-", f"{model}-{request.part}")[:80]
    return cache_folder() / "traces" / f"{readable}-{digest}.json.gz"


def with_provenance(request: TraceRequest, content: object, *modules: str) -> str:
    """JSON of `content`, which was made for a request, with its setting and provenance.

    `modules` are those that processed it after the tracing.
    """
    origin = made_with(request.setting, *modules).to_record()
    record = {"setting": request.setting.to_json(), "made_with": origin, "content": content}
    return json.dumps(record, separators=(",", ":"))


def content_if_valid(request: TraceRequest, text: str) -> Any:
    """The content given to `with_provenance`; None if it was made for another value of a knob, or by other code."""
    record = json.loads(text)
    if not has_values(request.setting, record["setting"]):
        return None
    changed = any(Provenance.from_record(record["made_with"]).changes())
    return None if changed else record["content"]


def has_values(setting: Setting, recorded: Mapping[str, Any]) -> bool:
    """Whether a setting has the recorded values. Knobs that are newer than the record are ignored: those that are not at
    their default are in the request's name.
    """
    values = json.loads(json.dumps(setting.to_json()))
    return all(name in values and values[name] == value for name, value in recorded.items())


def made_with(setting: Setting, *modules: str) -> Provenance:
    """The provenance of a trace of this setting that is made by this installation."""
    family = setting.family
    prepares = (family.prepare_trace.partition(":")[0],) if family.prepare_trace else ()
    return provenance(_packages(setting), (*TRACER, family.workload, *prepares, *modules))


@cache
def versions() -> dict[str, str]:
    """Versions of torch and of every family's packages; for trainfit, a digest of the code that builds and traces steps."""
    installed: dict[str, str] = {}
    for name in ("torch", "torchvision", *(each for family in families().values() for each in family.packages)):
        installed |= {dist.name: dist.version for dist in metadata.distributions(name=name)}
    source = Path(trainfit.__file__).parent
    files: list[Path] = []
    for folder in ("models", "step", "tracing", "tasks"):
        files += (source / folder).rglob("*.py")
    files.sort()
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {**installed, "trainfit": digest}


def _traced(request: TraceRequest, *, both: bool = False) -> str:
    """The text that a tracing process wrote (`worker`)."""
    family = request.setting.family
    model = request.setting.model
    if not family.cacheable and ":" in model:
        require_named(model)
    own = {"prepare": family.prepare_trace, "families": registering_modules(), "both": both}
    return client.run(request.to_json() | own, model, _own_modules(request.setting))


def _own_modules(setting: Setting) -> tuple[str, ...]:
    """What the tracing process imports once for all traces of the setting's family: nothing of a user's."""
    workload = setting.family.workload
    return (workload,) if workload.startswith("trainfit.") else ()


def packages_of(setting: Setting) -> dict[str, str]:
    """Installed versions of the packages that a family's steps run."""
    return installed_versions(_packages(setting))


def _packages(setting: Setting) -> tuple[str, ...]:
    return ("torch", *setting.family.packages, *setting.family.packages_for(setting))


def read_stored(path: Path, parse: Callable[[str], T]) -> T | None:
    """Parse what `store` wrote; None if there is no file.

    A damaged file is removed with a warning in the log, so that it is made again.

    Raises:
        TrainfitError: the file exists and cannot be read.
    """
    try:
        return parse(_decompressed(read_bytes(path)))
    except FileNotFoundError:
        return None
    except gzip.BadGzipFile as error:
        reason = str(error)
    except OSError as error:
        raise TrainfitError(f"{path}: cannot be read ({error.strerror}); remove it or use --no-cache") from error
    except DAMAGE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
    logging.getLogger(__name__).warning("%s is damaged (%.100s): removed, and made again", path, reason)
    path.unlink(missing_ok=True)
    return None


def _decompressed(data: bytes) -> str:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        text = file.read(LARGEST_TEXT_BYTES + 1)
    if not 0 < len(text) <= LARGEST_TEXT_BYTES:
        raise ValueError("empty" if not text else "too large")
    return text.decode()


def store(path: Path, text: str) -> None:
    """Write the text atomically: several processes may trace the same setting."""
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
