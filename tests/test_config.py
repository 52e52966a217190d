"""Flags in a file: what `--print-config` writes, `--config` reads."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import trainfit
from conftest import run
from trainfit.cli import (
    _leaves,  # pyright: ignore[reportPrivateUsage]
    main,
)
from trainfit.cli.config import with_config


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `trainfit train` would train."""
    made: list[Any] = []

    def fit(recipe: Any, **_: Any) -> None:
        made.append(recipe)
        raise trainfit.TrainfitError("enough")

    monkeypatch.setattr("trainfit.training.fit.fit", fit)
    return made


@pytest.mark.parametrize(
    "words",
    [
        "rfdetr-nano --data sample --lr 0.01 --no-ema --epochs 3",
        "maskrcnn-r50-v2 --data sample --proposals 100 50 --short-sides 640,672 --precision bf16",
        "clip:ViT-B-32 --data pairs.csv --loss siglip --effective-batch 64",
        "rfdetr-seg-nano --data sample --lean on --stage detector --micro-batch 2",
    ],
)
def test_a_command_line_comes_back(
    words: str, recipes: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same recipe, with the same values given; a word on the command line wins over the file."""
    assert run("train", *words.split(), "--print-config") == 0
    text = capsys.readouterr().out
    (tmp_path / "train.yaml").write_text(text)
    assert len(yaml.safe_load(text)) == 1 + sum(word.startswith("--") for word in words.split())
    assert run("train", *words.split()) == 2
    assert run("train", "--config", tmp_path / "train.yaml") == 2
    assert run("train", f"--config={tmp_path / 'train.yaml'}", "--seed", 7, "--data", "other") == 2
    assert recipes[0] == recipes[1]
    assert vars(recipes[0])["_given"] == vars(recipes[1])["_given"]
    assert (recipes[2].seed, recipes[2].data) == (7, "other")


def test_every_default_may_be_uncommented(
    recipes: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "rfdetr-nano", "--data", "sample", "--print-config") == 0
    names = {leaf.name.replace("_", "-") for leaf in _leaves(["train", "rfdetr-nano"])["train"]}
    lines = re.findall(r"^# ([a-z-]+: .+)$", capsys.readouterr().out, flags=re.M)
    whole = [line for line in lines if line.split(":")[0] in names and not line.endswith("null")]
    (tmp_path / "all.yaml").write_text("\n".join([*whole, "model: rfdetr-nano", "data: sample"]))
    assert run("train", "--config", tmp_path / "all.yaml") == 2
    assert run("train", "rfdetr-nano", "--data", "sample") == 2
    assert len(whole) > 15
    assert recipes[0] == recipes[1]


def lines_of(tmp_path: Path, text: str, *words: str) -> list[str]:
    (tmp_path / "c.yaml").write_text(text)
    return with_config([*words, "--config", str(tmp_path / "c.yaml")], _leaves)


def test_forms_of_keys_and_values(tmp_path: Path) -> None:
    assert lines_of(tmp_path, "run: R\nimages: [a.jpg, b c.jpg]\nthreshold: 0.3\njson: true", "detect") == [
        *("detect", "R", "a.jpg", "b c.jpg"),
        *("--threshold", "0.3", "--json"),
    ]
    assert lines_of(tmp_path, "run: R\nimages: [a.jpg]", "detect", "S") == ["detect", "S", "a.jpg"]
    assert lines_of(tmp_path, "no-ema: true\nlean: on\nlr: 1e-4\nseed:", "train", "rfdetr-nano") == [
        *("train", "rfdetr-nano"),
        *("--no-ema", "--lean", "on", "--lr", "1e-4"),
    ]
    assert lines_of(tmp_path, "no_decode: true\ndata: sample", "check-data") == ["check-data", "sample", "--no-decode"]
    assert with_config(["plan", "rfdetr-nano"], _leaves) == ["plan", "rfdetr-nano"]


def test_a_rate_that_only_an_encoder_has_is_left_out_aloud(tmp_path: Path) -> None:
    """Version 0.1 took `lr-encoder` for every model, and said nothing by it to most."""
    notes: list[str] = []
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.1\nlr-encoder: 0.2")
    words = ["train", "timm:resnet18", "--config", str(file)]
    assert with_config(words, _leaves, notes.append) == ["train", "timm:resnet18", "--lr", "0.1"]
    assert notes == [f"--config {file}: lr-encoder says nothing to this model: left out"]
    words[1] = "rfdetr-nano"
    assert with_config(words, _leaves) == ["train", "rfdetr-nano", "--lr", "0.1", "--lr-encoder", "0.2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 0.1", "c.yaml: unknown key 'lrr'. Perhaps you meant 'lr'"),
        ("short_sides: 640", "unknown key 'short_sides'"),  # Mask R-CNN's, not RF-DETR's
        ("- a", "expected flags as `key: value`"),
        ("a: [", "is not YAML"),
        ("lr: {a: 1}", "lr must be a value, not a table"),
    ],
)
def test_faults_are_one_line(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert run("train", "rfdetr-nano", "--config", tmp_path / "c.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--config", tmp_path / "none.yaml") == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err
    assert run("plan", "--config") == 2
    assert capsys.readouterr().err == "trainfit: error: --config takes one YAML file\n"
    (tmp_path / "c.yaml").write_text("model: rfdetr-nano")
    assert run("--config", tmp_path / "c.yaml") == 2
    assert "name the command before it" in capsys.readouterr().err


def test_completion_is_a_script_for_bash(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):  # tyro's own
        main(["--tyro-print-completion", "bash"])
    script = capsys.readouterr().out
    assert "check-data" in script
    if bash := shutil.which("bash"):
        code = 'COMP_WORDS=(trainfit train --wei); COMP_CWORD=2; _tyro_trainfit; echo "${COMPREPLY[@]}"'
        shown = subprocess.run([bash, "-c", f"{script}\n{code}"], capture_output=True, text=True, check=False)
        assert shown.stdout.split() == ["--weight-decay", "--weights"], shown.stderr


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("--tyro-print-completion", "fish"), "--tyro-print-completion: 'fish' is none of bash, zsh, tcsh"),
        (("--gpu", "t4"), "trainfit has no flag --gpu before its command; trainfit --help lists the commands"),
        (("plann",), "no command 'plann'. Perhaps you meant plan"),
    ],
)
def test_what_stands_in_place_of_a_command(
    words: tuple[str, ...], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert capsys.readouterr().err == f"trainfit: error: {answer}\n"
