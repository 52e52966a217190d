"""Flags of other programs are taken as ours or answered, mistyped ones and cards of other makers answered, in a line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from conftest import run
from trainfit.cli.foreign_flags import ALIASES, ANSWERS
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
        (("--classes", "car"), "--classes: to train on some of the classes give --only-classes car"),
        (
            ("--device", "cuda:1,2"),
            "--device cuda:1,2: choose GPUs by CUDA_VISIBLE_DEVICES=1,2 torchrun --nproc-per-node 2",
        ),
        (("--device", "mps"), "--device mps: trainfit trains on NVIDIA GPUs (cuda) and on the CPU"),
        (("--dat", "x"), "trainfit train has no flag --dat. Perhaps you meant --data"),
        (("--epochs", "many"), "--epochs must be a whole number, not 'many'"),
        (("--lr", "fast"), "--lr must be a number, not 'fast'"),
        (("--epochs",), "--epochs: a value is missing behind it"),
        (("--max-steps", "few"), "--max-steps must be a whole number, not 'few'"),
        (("--drop-path", "some"), "--drop-path must be a number, not 'some'"),
        (("--checkpointing", "some"), "--checkpointing must be a whole number or one of none,all,offload, not 'some'"),
        (("--schedule", "cosin"), "--schedule must be one of 'step', 'cosine', not 'cosin'"),
        (("more", "words"), "too many words: more, words; which flag are they for?"),
    ],
)
def test_flags_that_are_answered(words: tuple[object, ...], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "rfdetr-nano", "--data", "/nowhere", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trainfit: error: {answer}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (("--grad-accum-steps", 4), {"accumulation": 4}),
        (("--batch_size=2", "--grad_accum_steps=4"), {"micro-batch": 2, "accumulation": 4}),
        (("--imgsz", 384), {"resolution": 384}),
        (("--patience", 3), {"early-stopping": 3}),
        (("--lr0", 0.01), {"lr": 0.01}),
        (("--fp16",), {"precision": "fp16"}),
        (("--gradient-checkpointing", "True"), {"checkpointing": "all"}),
        (("--use-ema",), {"ema": True}),
        (("--num-workers", 0), {"workers": 0}),
    ],
)
def test_flags_that_mean_the_same(
    words: tuple[object, ...], ours: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """What training would use of them, with a line for each on stderr."""
    assert run("train", "rfdetr-nano", "--data", "sample", *words, "--print-config") == 0
    printed = capsys.readouterr()
    assert {"model": "rfdetr-nano", "data": "sample", **ours} == yaml.safe_load(printed.out)
    assert printed.err.count("is taken as") == len(ours)


def test_the_number_of_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is put back
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    words = ("train", "rfdetr-nano", "--data", "sample", "--device", "cuda:2", "--print-config")
    assert run(*words) == 0
    assert yaml.safe_load(capsys.readouterr().out)["device"] == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    assert run(*words) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert run(*words) == 2
    assert "CUDA_VISIBLE_DEVICES shows 1 GPU, numbered from 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("trian", "rfdetr-nano"), "no command 'trian'. Perhaps you meant train"),
        (
            ("check-data", "sample", "--fromat", "coco"),
            "trainfit check-data has no flag --fromat. Perhaps you meant --format",
        ),
        (("detect",), "RUN is missing: trainfit detect RUN ..."),
        (("evaluate", "runs/a"), "--data is missing"),
        (("detect", "runs/a", "--source", "a.jpg"), "--source: images come behind the run, without a flag"),
    ],
)
def test_other_commands(words: tuple[str, ...], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trainfit: error: {answer}")
    assert error.count("\n") == 1


def test_no_words_are_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "check-exactness" in capsys.readouterr().out


def test_other_commands_keep_their_classes(capsys: pytest.CaptureFixture[str]) -> None:
    """`predict --classes 80` is a number of classes; its refusal is of the card."""
    assert run("predict", "rfdetr-nano", "--classes", 3, "--gpu", "nothing") == 2
    assert "is not in the catalogue" in capsys.readouterr().err


def test_no_flag_of_training_is_foreign() -> None:
    own = {flag(name) for each in families().values() for name in get_type_hints(recipe_type(each.setting))}
    assert own & {*ANSWERS, *ALIASES} == {"--classes"}  # a field that the data determine, and no flag
    assert {ours[0] for ours in ALIASES.values()} <= own | {"--threshold"}


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
