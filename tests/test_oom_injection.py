"""Errors at random operators of a window and its evaluation; the run of 200 + 200 is benchmarks/oom_injection.py."""

from pathlib import Path

import pytest

from oom_points import FAMILIES, Injector, outcomes


@pytest.mark.parametrize(("name", "points"), [("clip", 60), ("rfdetr", 4)])
def test_errors_anywhere_change_nothing(name: str, points: int, tmp_path: Path) -> None:
    found = outcomes(Injector(FAMILIES[name](tmp_path)), points, seed=1)
    assert all(outcome.error == 0 for outcome in found if not outcome.split)
    assert all(outcome.error <= 1e-12 for outcome in found if outcome.split)
    assert any(outcome.split and outcome.error > 0 for outcome in found)  # another cut, another order of sums
    if name == "clip":
        assert {outcome.where for outcome in found} == {"window", "update", "evaluation"}
