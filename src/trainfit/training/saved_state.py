"""Checks what a saved state must contain, once when it is read, so that training can rely on it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch


def require_state(state: Mapping[str, Any]) -> None:
    """Refuse what `fit` does not save: a part that is missing or of another kind.

    Raises:
        ValueError: with the name of the first such part.
    """
    for name, holds in _PARTS.items():
        if name not in state:
            raise ValueError(f"it has no {name}")
        if not holds(state[name]):
            raise ValueError(f"its {name} has a value that trainfit does not save")


def from_early_version(state: dict[str, Any]) -> dict[str, Any]:
    """A state of the first versions under today's names: the best score was "ap", a pending evaluation "owed", and the ladder
    of `training.oom.Survivor` had private names. They trained in one process, and did not count skipped windows.
    """
    if "owed" not in state:
        return state
    others = {name: value for name, value in state.items() if name != "owed"}
    best = state.get("best")
    ladder = state.get("survivor")
    if isinstance(best, dict) and "ap" in best:
        others["best"] = {"score": best["ap"], "step": best.get("step")}
    if isinstance(ladder, dict):
        ladder = cast(dict[Any, Any], ladder)
        others["survivor"] = {str(name).removeprefix("_"): int(value) for name, value in ladder.items()}
    return {"skipped_windows": 0, "world_size": 1, **others, "pending_evaluation": state["owed"]}


def require_like(saved: Any, own: Any, name: str) -> None:
    """Refuse a saved value whose structure differs from our own: keys, lengths, types, and shapes of tensors.

    Keys of `saved` that `own` lacks are let through.

    Raises:
        ValueError: with the place of the first difference, which begins with `name`.
    """
    if isinstance(own, Mapping):
        _require(isinstance(saved, Mapping), name)
        for key, value in cast(Mapping[Any, Any], own).items():
            _require(key in saved, f"{name}.{key}")
            require_like(saved[key], value, f"{name}.{key}")
    elif isinstance(own, list | tuple):
        ours = cast(Sequence[Any], own)
        _require(isinstance(saved, list | tuple) and len(saved) == len(ours), name)
        for index, value in enumerate(ours):
            require_like(saved[index], value, f"{name}.{index}")
    elif isinstance(own, torch.Tensor):
        _require(isinstance(saved, torch.Tensor) and saved.shape == own.shape, name)
        _require(saved.is_floating_point() == own.is_floating_point(), name)
    elif _is_number(own):
        _require(_is_number(saved) and math.isfinite(saved), name)
    else:
        _require(type(saved) is type(own), name)


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"{name} is missing or of another shape or type")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in cast(dict[Any, Any], value).items()
    )


def _is_best(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"score", "step"}:
        return False
    best = cast(dict[str, Any], value)
    score = best["score"]
    return (score is None or (_is_number(score) and math.isfinite(score))) and (
        best["step"] is None or _is_count(best["step"])
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in cast(list[Any], value))


def _is_ladder(value: Any) -> bool:
    """Form of what `training.oom.Survivor.state` returns."""
    names = {"asked", "micro_batch", "checkpointing", "larger", "may_rise", "quiet", "same_again"}
    if not isinstance(value, dict) or value.keys() != names:
        return False
    ladder = cast(dict[str, Any], value)
    return all(map(_is_count, ladder.values())) and 1 <= ladder["micro_batch"] <= ladder["asked"]


_PARTS: Mapping[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "model": _is_weights,
    "ema": lambda value: value is None or _is_weights(value),
    "optimizer": _is_mapping,
    "scaler": _is_mapping,
    "best": _is_best,
    "skipped": _is_names,
    "survivor": _is_ladder,
    "skipped_windows": _is_count,
    "pending_evaluation": _is_flag,
    "world_size": _is_positive,
}
