"""Errors at random operators of a window and its evaluation; benchmarks/oom_injection.py runs more of them."""

from pathlib import Path

import pytest

from oom_points import FAMILIES, Injector, outcomes
from trainfit.step.names import Optimizer


@pytest.mark.parametrize(
    ("name", "optimizer", "scaler", "points"),
    [
        ("clip", "adamw-fused", False, 60),
        ("clip", "adamw-foreach", True, 30),
        ("clip-towers", "adamw-fused", True, 20),
        ("coca", "sgd", True, 20),
        ("rfdetr", "adamw-fused", False, 4),
        ("maskrcnn", "adamw-fused", False, 6),
        ("two-types", "sgd", True, 60),
    ],
)
def test_errors_anywhere_change_nothing(
    name: str, optimizer: Optimizer, scaler: bool, points: int, tmp_path: Path
) -> None:
    found = outcomes(Injector(FAMILIES[name](tmp_path, optimizer, scaler)), points, seed=3)
    tolerance = 1e-12 if name != "two-types" else 1e-6  # has float32
    assert all(outcome.error == 0 for outcome in found if not outcome.split)
    assert all(outcome.error <= tolerance for outcome in found if outcome.split)
    if name not in ("rfdetr", "maskrcnn"):
        assert any(outcome.split and outcome.error > 0 for outcome in found)  # another cut, another order of sums
        assert {outcome.where for outcome in found} >= {"window", "update"}
    if points == 60:
        assert "evaluation" in {outcome.where for outcome in found}
