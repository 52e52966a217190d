"""The whole loop learns: eight images of the sample set from random initialisation."""

import importlib.util
from pathlib import Path
from typing import Any

from trainfit.training.fit import fit

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "overfit.py"


def load_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("overfit", BENCHMARK)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_eight_images_are_over_fitted(tmp_path: Path) -> None:
    """About a minute on two cores; `benchmarks/overfit.py` goes on to AP50 1.0."""
    benchmark = load_benchmark()
    summary = fit(benchmark.recipe(benchmark.eight_images(tmp_path), tmp_path / "run", steps=45))
    assert summary.evaluation is not None
    ap50 = summary.evaluation.details["bbox"].ap50
    assert ap50 is not None
    assert ap50 >= 0.5
