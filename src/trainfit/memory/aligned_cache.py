"""Keeps traces that were made from several in the cache: of any micro-batch (`scaled_traces`), of any window (`composed`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from trainfit.tracing.trace_cache import (
    TraceRequest,
    cache_path,
    content_if_valid,
    read_stored,
    store,
    with_provenance,
)


class Aligned(Protocol):
    """What is kept."""

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...


T = TypeVar("T", bound=Aligned)


@dataclass(frozen=True, kw_only=True)
class AlignedCache(Generic[T]):
    """The cache of one kind. Also kept is that traces cannot be aligned: None."""

    name: str
    """Of the kind, in files and their names."""
    code: str
    """The module that makes these traces of others."""
    from_record: Callable[[Mapping[str, Any]], T]
    """Reads what `to_record` gave."""

    def path(self, request: TraceRequest) -> Path:
        """Where the trace of a request is kept."""
        return cache_path(request).with_suffix(f".{self.name}.gz")

    def read(self, request: TraceRequest) -> tuple[T | None] | None:
        """(None,) where it is known that the traces cannot be aligned; None: there is no valid one."""
        return read_stored(self.path(request), partial(self._parsed, request))

    def store(self, made: Mapping[TraceRequest, T | None]) -> None:
        """Keep what was made for each request."""
        for request, trace in made.items():
            record = {self.name: trace.to_record() if trace else None}
            store(self.path(request), with_provenance(request, record, self.code))

    def _parsed(self, request: TraceRequest, text: str) -> tuple[T | None] | None:
        record = content_if_valid(request, text)
        if record is None:
            return None
        return (None if record[self.name] is None else self.from_record(record[self.name]),)
