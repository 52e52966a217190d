"""Traces of the built-in models that come with the package, so that a plan or a prediction of them needs no tracing.

`shipped/MODEL.tar.xz` has the traces of one model (`memory.archive` has the format), the setting of each, and laws
(`memory.laws`) that take them to the objects and classes of any data set, and of some models to other sizes of the image;
`made_with.json` says what the traces of each model were made with. `scripts/traces` makes all of these.

In an installed release the code is that which made the traces. In a checkout where it was edited since, or with another
version of torch or of the model's package, a shipped trace could answer for a step that is no longer so: it is not
used, the step is traced here (`why_unused` says so in a line), and `scripts/traces --confirm` compares fresh traces
with the shipped ones and makes them valid for the edited code where they are equal.
"""

import json
import lzma
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from trainfit.errors import TrainfitError
from trainfit.memory.archive import Archive, read_archive
from trainfit.memory.laws import Laws
from trainfit.models.setting import Setting
from trainfit.tracing.provenance import Provenance
from trainfit.tracing.trace_cache import DAMAGE, TraceRequest, has_values

SETTINGS = "settings.json"
"""Entry of an archive: name of an entry -> setting of its trace."""
MADE_WITH = "made_with.json"
SAME_LAWS = frozenset({"accumulation", "checkpointing", "precision"})
"""Knobs whose traces have the laws of others: sizes that follow data are those of heads and losses."""
NAMED_CHANGES = 3
"""Changed files that a message names."""
T = TypeVar("T")


def shipped_folder() -> Path:
    """The folder of the package that holds them."""
    return Path(str(resources.files("trainfit.memory").joinpath("shipped")))


def archive_path(model: str) -> Path:
    """The archive of a model's traces: its name, with a hyphen for a colon, which not every file system takes."""
    return shipped_folder() / f"{model.replace(':', '-')}.tar.xz"


def entry_name(request: TraceRequest, *, alone: bool = False) -> str:
    """Name in the archive: of the trace that is scaled to any micro-batch, or of that of micro-batch 1 `alone`."""
    return f"{request.name}, {'micro-batch 1' if alone else 'any micro-batch'}.json"


def is_shipped(request: TraceRequest, *, alone: bool = False) -> bool:
    """Whether the package has a valid trace for a request."""
    path = archive_path(request.setting.model)
    if not path.exists() or changes(request.setting.model):
        return False
    recorded = _settings(path).get(entry_name(request, alone=alone))
    return recorded is not None and has_values(request.setting, recorded)


def shipped(request: TraceRequest, parse: Callable[[Mapping[str, Any]], T], *, alone: bool = False) -> T | None:
    """The trace that the package has for a request, parsed; None where it has no valid one.

    Raises:
        TrainfitError: a file of the package is damaged.
    """
    if not is_shipped(request, alone=alone):
        return None
    path = archive_path(request.setting.model)
    try:
        return parse(_archive(path).record(entry_name(request, alone=alone)))
    except DAMAGE as error:
        raise _damaged(path, error) from error


def laws_name(request: TraceRequest, *, alone: bool = False) -> str:
    """Name in the archive of the laws that take traces of a request's kind to other values of knobs.

    It has the knobs of the trace that differ from the defaults, but for those that leave the laws as they are.
    """
    part, *values = request.name.split(" ")
    kind = " ".join([part, *(value for value in values if value.partition("=")[0] not in SAME_LAWS)])
    return f"laws of {kind}, {'micro-batch 1' if alone else 'any micro-batch'}.json"


def image_laws_name(part: str, *, alone: bool = False) -> str:
    """Name in the archive of the laws that take all traces of a part to other sizes of the image."""
    return f"image laws of {part}, {'micro-batch 1' if alone else 'any micro-batch'}.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the package answers a request from."""

    request: TraceRequest
    """Its trace is there."""
    laws: tuple[Laws, ...]
    """Take it to `values`; none: it is what was asked for."""
    values: Mapping[str, int]
    """Knob, or declared number -> the value that was asked for."""


def source(request: TraceRequest, *, alone: bool = False) -> Source | None:
    """None: the package has no valid trace, or its laws do not reach so far."""
    if is_shipped(request, alone=alone):
        return Source(request=request, laws=(), values={})
    path = archive_path(request.setting.model)
    if not path.exists() or changes(request.setting.model):
        return None
    for name, laws in _laws(path).items():
        taken = _source(request, (name, laws), (), alone=alone)
        if taken is not None:
            return taken
    image = _image_laws(path, image_laws_name(request.part, alone=alone))
    if image is None:
        return None
    sources = (_source(request, named, (image,), alone=alone) for named in _laws(path).items())
    return next((each for each in sources if each is not None), None)


def is_resized(request: TraceRequest) -> bool:
    """Whether the package answers a request from a trace of another size of the image."""
    origin = source(request)
    return origin is not None and any(laws.move_image(origin.values) for laws in origin.laws)


def _source(request: TraceRequest, named: tuple[str, Laws], further: tuple[Laws, ...], *, alone: bool) -> Source | None:
    """The trace of a request with laws by their name in the archive, and `further` ones, where they reach it."""
    name, laws = named
    all_laws = (laws, *further)
    knobs: dict[str, Any] = {}
    values: dict[str, int] = {}
    for each in all_laws:
        knobs |= each.knobs()
        values |= each.values(request.setting)
    base = replace(request, setting=replace(request.setting, **knobs))
    holds = all(each.hold(values) for each in all_laws)
    if name != laws_name(base, alone=alone) or not holds or not is_shipped(base, alone=alone):
        return None
    return Source(request=base, laws=all_laws, values=values)


def changes(model: str) -> tuple[str, ...]:
    """What has changed since a model's traces were made, in words; empty: they are valid. Looked at once, until `forget`."""
    return _changes(shipped_folder() / MADE_WITH, model)


def why_unused(setting: Setting) -> str | None:
    """A line for a user whose model's shipped traces are not valid here; None where they are, or where there are none."""
    changed = changes(setting.model) if archive_path(setting.model).exists() else ()
    if not changed:
        return None
    more = f" and {len(changed) - NAMED_CHANGES} more" if len(changed) > NAMED_CHANGES else ""
    which = ", ".join(changed[:NAMED_CHANGES])
    return f"the traces of {setting.model} that come with trainfit were made with other versions of {which}{more}: not used"


def texts(path: Path) -> dict[str, str]:
    """Name -> JSON of an archive's records.

    Raises:
        TrainfitError: it is damaged.
    """
    opened = _archive(path)
    return {name: opened.text(name) for name in opened.names}


@cache
def _archive(path: Path) -> Archive:
    try:
        return read_archive(path)
    except (OSError, lzma.LZMAError, tarfile.TarError, *DAMAGE) as error:
        raise _damaged(path, error) from error


@cache
def _laws(path: Path) -> dict[str, Laws]:
    try:
        opened = _archive(path)
        return {name: Laws.from_record(opened.record(name)) for name in opened.names if name.startswith("laws ")}
    except DAMAGE as error:
        raise _damaged(path, error) from error


@cache
def _image_laws(path: Path, name: str) -> Laws | None:
    try:
        opened = _archive(path)
        return Laws.from_record(opened.record(name)) if name in opened.names else None
    except DAMAGE as error:
        raise _damaged(path, error) from error


def forget() -> None:
    """Read the files anew from now on."""
    for cached in (_archive, _laws, _image_laws, _settings, _made_with, _changes):
        cached.cache_clear()


@cache
def _changes(path: Path, model: str) -> tuple[str, ...]:
    record = _made_with(path)
    return tuple(record[model].changes()) if model in record else ("all",)


@cache
def _made_with(path: Path) -> dict[str, Provenance]:
    try:
        record = json.loads(path.read_text()) if path.exists() else {}
        return {name: Provenance.from_record(each) for name, each in record.items()}
    except DAMAGE as error:
        raise _damaged(path, error) from error


@cache
def _settings(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return _archive(path).record(SETTINGS)
    except DAMAGE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> TrainfitError:
    return TrainfitError(
        f"{path}, a file of the installed package, is damaged ({type(error).__name__}): "
        "reinstall it with pip install --force-reinstall --no-deps trainfit"
    )
