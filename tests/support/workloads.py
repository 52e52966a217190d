"""Workloads as several tests make them."""

from collections.abc import Mapping
from typing import Any

from trainfit.models.build import build_trainable
from trainfit.models.setting import make_setting


def make_workload(model: str, classes: tuple[str, ...], knobs: Mapping[str, Any]) -> Any:
    """The workload of a model for these classes and knobs."""
    return build_trainable(make_setting(model, **knobs), classes)
