"""Flags and cards of other makers: one line with ours."""

import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from conftest import run
from trainfit.cli.foreign_flags import ANSWERS
from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import all_gpus, find_gpu, refuse_other_accelerators
from trainfit.models.family import families
from trainfit.process import users_line
from trainfit.training.recipe import recipe_type
from trainfit.values import flag


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ("--batch-size", 8),
            "--batch-size: images of one forward are --micro-batch 8, images of an optimizer step --eff",
        ),
        (
            ("--batch_size=8",),
            "--batch-size: images of one forward are --micro-batch 8, images of an optimizer step --eff",
        ),
        (("--grad-accum-steps", 4), "--grad-accum-steps: that is --accumulation 4"),
        (("--imgsz", 640), "--imgsz: the size of the input is --resolution 640"),
        (("--classes", "car"), "--classes: to train on some of the classes give --only-classes car"),
        (("--device", "0"), "--device 0: choose GPUs by CUDA_VISIBLE_DEVICES=0 trainfit train ..."),
        (("--device", "cuda:1"), "--device cuda:1: choose GPUs by CUDA_VISIBLE_DEVICES=1 trainfit train ..."),
        (
            ("--device", "0,1"),
            "--device 0,1: choose GPUs by CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc-per-node 2 -m trainfit train",
        ),
        (("--device", "mps"), "--device mps: trainfit trains on NVIDIA GPUs (cuda) and on the CPU"),
    ],
)
def test_flags(words: tuple[object, ...], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "rfdetr-nano", "--data", "sample", *words) == 2
    assert capsys.readouterr().err.startswith(f"trainfit: error: {answer}")


def test_other_commands_keep_their_classes(capsys: pytest.CaptureFixture[str]) -> None:
    """`predict --classes 80` is a number of classes; its refusal is of the card."""
    assert run("predict", "rfdetr-nano", "--classes", 3, "--gpu", "nothing") == 2
    assert "is not in the catalogue" in capsys.readouterr().err


def test_no_flag_of_ours_is_refused() -> None:
    own = {flag(name) for each in families().values() for name in get_type_hints(recipe_type(each.setting))}
    assert own & ANSWERS.keys() == {"--classes"}  # a field that the data determine, and no flag


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("apple m2", "Apple has another allocator"),
        ("M4 Max", "Apple has another allocator"),
        ("tpu v4", "Google TPU has another allocator"),
        ("ROCm", "name the card: MI100"),
        ("colab", "is a service with several GPUs"),
    ],
)
def test_accelerators_of_others(name: str, words: str) -> None:
    with pytest.raises(TrainfitError, match=words):
        find_gpu(name)


def test_no_card_of_the_catalogue_is_refused() -> None:
    for gpu in all_gpus():
        for name in (gpu.name, *gpu.aliases):
            refuse_other_accelerators(name)


def test_an_error_names_the_user_s_line(tmp_path: Path) -> None:
    """Of a traceback that ends in an installed package: the last line that is the user's."""
    script = tmp_path / "mine.py"
    script.write_text("import yaml\n\ndef load(text):\n    return yaml.safe_load(text)\n\nload('{')\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert users_line(done.stderr) == f"{script}, line 4"
    assert users_line('Traceback\n  File "/x/site-packages/torch/a.py", line 3, in f\nError') == ""
