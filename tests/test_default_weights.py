"""What training starts from where nothing is said; nothing is downloaded here."""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import run
from trainfit.models.family import family_of
from trainfit.models.setting import make_setting
from trainfit.training.recipe import make_recipe
from trainfit.training.setup import with_weights


@pytest.mark.parametrize(
    ("model", "knobs", "published"),
    [
        ("rfdetr-nano", {}, True),
        ("rfdetr-seg-medium", {"groups": 4}, True),
        ("rfdetr-seg-medium", {"stage": "detector"}, False),  # the file has a mask head
        ("rfdetr-nano", {"num_queries": 400}, False),  # the file has fewer
        ("rtdetr-seg-nano", {}, False),
        ("rtdetr-seg-nano", {"stage": "detector"}, True),
        ("maskrcnn-r50-v2", {}, True),
        ("maskrcnn-r101-v1", {}, False),
        ("maskrcnn-r50-v1", {"norm": "group"}, False),
        ("timm:resnet18", {}, True),
        ("timm:no_such_model", {}, False),
        ("clip:ViT-B-32", {}, False),
    ],
)
def test_published_weights_are_the_default(
    model: str, knobs: dict[str, Any], published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert family_of(model)[0].published(make_setting(model, **knobs)) == published
    monkeypatch.delenv("TRAINFIT_WEIGHTS")
    recipe = make_recipe(model, data="sample", **knobs)
    assert with_weights(recipe).weights == ("pretrained" if published else "random")
    assert with_weights(make_recipe(model, data="sample", weights="random", **knobs)).weights == "random"


def test_the_environment_has_another_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINFIT_WEIGHTS", "mine.pth")
    assert with_weights(make_recipe("rfdetr-nano", data="sample")).weights == "mine.pth"


def test_without_a_network_a_line_says_where_the_file_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The connection is refused: the place that the line names is where upstream's file is looked for."""
    monkeypatch.delenv("TRAINFIT_WEIGHTS")

    def refuse(*_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("trainfit.models.rfdetr.interop.download_pretrain_weights", refuse)
    words = ("train", "rfdetr-nano", "--data", "sample", "--device", "cpu", "--out", tmp_path / "run")
    assert run(*words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("trainfit: error: could not download rf-detr-nano.pth (ConnectionError): put the file at /")
    assert last.endswith("rf-detr-nano.pth, name it with --weights FILE, or start from nothing with --weights random")


def test_without_a_network_nothing_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub's client would try each file five times, and say so each time."""
    monkeypatch.delenv("TRAINFIT_WEIGHTS")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for split in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "data" / split).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / split / "0.png")

    def no_address(*_: object, **_named: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_address)
    monkeypatch.setattr("trainfit.models.hub.getproxies", dict)
    constants = import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    began = time.monotonic()
    rest = ("--data", tmp_path / "data", "--device", "cpu", "--micro-batch", 1, "--out", tmp_path / "run")
    assert run("train", "timm:resnet10t", *rest) == 2
    (line,) = (each for each in capsys.readouterr().err.splitlines() if not each.startswith("starting"))
    place = "https://huggingface.co/timm/resnet10t.c3_in1k"
    assert line.startswith(f"trainfit: error: could not download model.safetensors from {place} (")
    assert line.endswith(
        "): get it on another machine and name it with --weights FILE, or start from nothing with --weights random"
    )
    assert time.monotonic() - began < 20
    assert constants.HF_HUB_OFFLINE is before
