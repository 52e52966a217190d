"""Runs a trial in a clean process. Imports no torch."""

import json
from collections.abc import Mapping
from typing import Any

from trainfit import process
from trainfit.errors import TrainfitError


def run_trial(request: Mapping[str, Any], *, gpu_uuid: str | None) -> dict[str, Any]:
    """The record that `measuring.trial` writes for `request`; if the process died, its outcome is "died", without figures.

    Only this GPU is visible to the process, or none.

    Raises:
        TrainfitError: the setting cannot be built.
    """
    text, last_words = process.ask("trainfit.measuring.trial", request, CUDA_VISIBLE_DEVICES=gpu_uuid or "")
    if text is None:
        return {"outcome": "died", "message": last_words, **dict.fromkeys(("peak", "speed", "end"))}
    record = json.loads(text)
    if record["outcome"] == "refused":
        raise TrainfitError(record["message"])
    return record


def context_bytes(free_before_bytes: int, reading: Mapping[str, Any] | None) -> int | None:
    """A process's device memory besides its allocator's; correct if no other process allocates or frees meanwhile."""
    if reading is None:
        return None
    return free_before_bytes - reading["device_free_bytes"] - reading["reserved_bytes"]
