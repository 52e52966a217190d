"""Early stopping, and the floor of the cosine schedule."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import rows, run
from trainfit.training.best import Best
from trainfit.training.recipe import make_recipe
from trainfit.training.schedule import lr_factor

MODEL = "timm:test_resnet"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise: with a rate of 0 the accuracy never changes."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return folder


def last_step(folder: Path) -> int:
    return max(row["step"] for row in rows(folder))


def test_it_ends_and_a_resume_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first evaluation is the best, so `--early-stopping 2` ends after epoch 3; resumed, it has ended already; with 4 it
    goes on to epoch 5. An evaluation every two epochs ends it after epoch 4 (the best is of epoch 2).
    """
    words = ("train", MODEL, "--data", data, "--resolution", 32, "--device", "cpu", "--workers", 0, "--lr", 0)
    words += ("--weights", "random", "--effective-batch", 6, "--epochs", 9, "--weight-decay", 0)
    out = tmp_path / "run"
    assert run(*words, "--early-stopping", 2, "--out", out) == 0
    printed = capsys.readouterr()
    assert "stopped early: no better evaluation for 2 epochs (the best is of step 1)" in printed.err
    assert last_step(out) == 3
    assert (out / "best-timm.safetensors").exists()
    assert run("train", "--resume", out) == 0
    assert "is finished: 3 steps" in capsys.readouterr().out
    assert last_step(out) == 3
    assert run("train", "--resume", out, "--early-stopping", 4) == 0
    assert last_step(out) == 5
    other = tmp_path / "other"
    assert run(*words, "--early-stopping", 2, "--eval-every", 2, "--out", other) == 0
    assert last_step(other) == 4


def test_patience_counts_from_the_best_evaluation() -> None:
    best = Best()
    assert best.stale_epochs(100, 10) == 0
    assert best.take(0.5, 10) == (True, True)
    assert best.take(0.5, 20) == (False, False)
    assert best.stale_epochs(40, 10) == 3
    assert best.take(0.6, 40) == (True, True)
    assert best.stale_epochs(40, 10) == 0


def test_without_a_score_the_last_weights_are_the_best_and_nothing_ends() -> None:
    best = Best()
    for step in (10, 20, 30):
        assert best.take(None, step) == (False, True)
    assert best.stale_epochs(60, 10) == 0


def test_the_cosine_ends_at_its_floor() -> None:
    recipe = make_recipe("rfdetr-nano", data="sample", schedule="cosine", lr_min_factor=0.1)
    factors = [lr_factor(step, recipe, steps_per_epoch=10, total_steps=100) for step in range(101)]
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
