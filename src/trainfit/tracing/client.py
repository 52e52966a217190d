"""Asks a tracing process for a trace. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.tracing import server

IMPORTS = ("trainfit.tracing.trace", "trainfit.tracing.selftest", "trainfit.models.build")
"""Modules that every trace needs."""


def prepare(modules: Sequence[str] = ()) -> None:
    """Start the tracing process and return at once: `run` will be called with these modules."""
    server.prepare((*IMPORTS, *modules))


def run(request: Mapping[str, Any], name: str, modules: Sequence[str] = ()) -> str:
    """The JSON of a StoredTrace for `request` (see `TraceRequest.to_json`), made in a separate process. Needs no torch.

    `modules` are imported before, once for several requests; none of a user's own, whose code may change.

    Raises:
        TrainfitError: the step cannot be built or traced, or the process died; `name` is what was traced.
    """
    # One thread: a trace computes almost nothing, and spinning threads slow down a busy machine.
    text, last_words = server.answer(request, (*IMPORTS, *modules))
    if text is None:
        raise TrainfitError(f"tracing {name}: {last_words}")
    if text.startswith('{"error"'):
        raise TrainfitError(json.loads(text)["error"])
    return text
