"""A family and a task that no file of the package names: written into a folder, registered, and used by the commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainfit.weights import load_weights

SOURCE = Path(__file__).parent / "support" / "toy"
PACKAGE = Path(__file__).parents[1] / "src"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the family's modules, and with red and blue images in `data`."""
    folder = tmp_path_factory.mktemp("toy")
    for file in SOURCE.glob("*.py"):
        shutil.copy(file, folder)
    random = np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 4)):
        for name, channel in (("blue", 2), ("red", 0)):
            place = folder / "data" / split / name
            place.mkdir(parents=True)
            for number in range(images):
                pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def environment(home: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "PYTHONPATH")},
        "PYTHONPATH": f"{PACKAGE}:{home}",
        "TRAINFIT_FAMILIES": "toy_family",
        "XDG_CACHE_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def trainfit(home: Path, *words: object) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "trainfit", *map(str, words)]
    done = subprocess.run(
        command, cwd=home, env=environment(home), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_check_data(home: Path) -> None:
    text = trainfit(home, "check-data", "data", "--task", "toy_task")
    assert text.splitlines()[2:4] == ["           train       val", "images        24         8"]
    found = json.loads(trainfit(home, "check-data", "data", "--task", "toy_task", "--json"))
    assert found == {"schema": 1, "splits": {"train": 24, "val": 8}, "findings": []}


def parameter_bytes(width: int) -> int:
    """Of three 3 x 3 convolutions, their norms, and the linear layer for two classes, in float32."""
    convolutions = sum(9 * channels * width + width for channels in (3, width, width))
    return 4 * (convolutions + 3 * 2 * width + 2 * width + 2)


def test_no_file_of_the_package_names_it() -> None:
    assert [file for file in PACKAGE.rglob("*.py") if "toy" in file.read_text().lower()] == []


def test_predict_and_plan(home: Path) -> None:
    """The knob reaches the model, the data set its number of classes, and the plan the command that trains."""
    knobs = ("--width", 64, "--micro-batch", 2)
    asked: dict[str, Any] = json.loads(
        trainfit(home, "predict", "toy", *knobs, "--memory", "8GiB", "--data", "data", "--json")
    )
    assert asked["setting"]["width"] == 64
    assert asked["setting"]["classes"] == 2
    held = asked["training"]["profile"]["peak"]["category_bytes"]
    assert held[asked["categories"].index("parameters")] == parameter_bytes(64)
    text = trainfit(home, "plan", "toy", *knobs, "--memory", "8GiB", "--effective-batch", 2, "--out", "plan.json")
    assert text.startswith("toy on 8 GiB card: micro-batch 2 x 1")
    assert json.loads((home / "plan.json").read_text())["setting"]["width"] == 64


def start(home: Path, *words: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "trainfit", *map(str, words)]
    return subprocess.Popen(command, cwd=home, env=environment(home), stderr=subprocess.DEVNULL)


def steps(folder: Path) -> int:
    """Windows that a run has written."""
    file = folder / "metrics.jsonl"
    return sum('"loss"' in line for line in file.read_text().splitlines()) if file.exists() else 0


def test_train_is_killed_resumes_and_evaluates(home: Path) -> None:
    """A run that was killed ends with the losses and the weights of one that was not; its evaluation is the run's own."""
    words = ("train", "toy", "--data", "data", "--width", 16, "--effective-batch", 8, "--epochs", 40, "--lr", 0.01)
    words += ("--workers", 0, "--device", "cpu", "--save-minutes", 0)
    trainfit(home, *words, "--out", "whole")
    process = start(home, *words, "--out", "killed")
    until = time.monotonic() + 120
    while steps(home / "killed") < 5 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 5 <= steps(home / "killed") < 120
    trainfit(home, "train", "--resume", "killed")
    files = [(home / run / "metrics.jsonl").read_text() for run in ("whole", "killed")]
    assert files[0] == files[1]
    weights = [load_weights(home / run / "last.safetensors")[0] for run in ("whole", "killed")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    last = json.loads(files[1].splitlines()[-1])
    found = json.loads(trainfit(home, "evaluate", "killed", "--data", "data", "--json"))
    assert last["accuracy"] == 1.0
    assert found == {"schema": 1, "accuracy": last["accuracy"]}
