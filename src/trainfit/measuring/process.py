"""Starting a trial in a clean process, and what became of it. Imports no torch."""

import json
from collections.abc import Mapping
from typing import Any

from trainfit import process
from trainfit.errors import TrainfitError


def run_trial(request: Mapping[str, Any], *, gpu_uuid: str | None) -> dict[str, Any]:
    """The record that `measure.trial` writes for `request`; a process that died has "died" as outcome, and no figures.

    The process sees the one GPU, or none.

    Raises:
        TrainfitError: the setting cannot be built.
    """
    text, last_words = process.ask("trainfit.measuring.trial", request, CUDA_VISIBLE_DEVICES=gpu_uuid or "")
    if text is None:
        return {"outcome": "died", "message": last_words, **dict.fromkeys(("peak", "speed", "end"))}
    found = json.loads(text)
    if found["outcome"] == "refused":
        raise TrainfitError(found["message"])
    return found


def context_bytes(free_before_bytes: int, reading: Mapping[str, Any] | None) -> int | None:
    """What a process holds of the device beside the caching allocator's memory: right while nobody else uses more or less."""
    if reading is None:
        return None
    return free_before_bytes - reading["device_free_bytes"] - reading["reserved_bytes"]
