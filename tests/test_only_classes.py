"""A data set cut down to some of its classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import run
from trainfit.errors import TrainfitError
from trainfit.models.setting import make_setting
from trainfit.planning.dataset import setting_on_data
from trainfit.tasks.class_filter import with_classes
from trainfit.tasks.detection.sample_set import write_sample_set
from trainfit.tasks.task import task_of


def test_detection_against_the_file_s_own_annotations() -> None:
    """Every object of the two classes is there with its box and its mask, and no other; all images stay."""
    task = task_of("detection")
    whole = task.read("sample")
    wanted = ("star", "circle")
    cut = with_classes(task, whole, " star,circle ")
    assert cut.classes == tuple(name for name in whole.classes if name in wanted)
    for split, records in whole.splits.items():
        assert len(cut.splits[split]) == len(records)
        for before, after in zip(records, cut.splits[split], strict=True):
            names = [whole.classes[row] for row in before.classes]
            kept = [place for place, name in enumerate(names) if name in wanted]
            assert [cut.classes[row] for row in after.classes] == [names[place] for place in kept]
            assert np.array_equal(after.boxes, before.boxes[kept])
            assert after.object_ids.tolist() == before.object_ids[kept].tolist()
            assert len(after.segmentations) == len(after.areas) == len(after.crowd) == len(kept)
            assert all(one is before.segmentations[place] for one, place in zip(after.segmentations, kept, strict=True))
    ids = dict(zip(whole.classes, whole.category_ids, strict=True))
    assert cut.category_ids == tuple(ids[name] for name in cut.classes)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / "0.png")
    return tmp_path / "data"


def test_images_of_other_classes_are_left_out(folders: Path) -> None:
    task = task_of("classes")
    cut = with_classes(task, task.read(str(folders)), "cat,ant")
    assert cut.classes == ("ant", "cat")
    assert [(record.path.parent.name, record.label) for record in cut.splits["train"]] == [("ant", 0), ("cat", 1)]


@pytest.mark.parametrize(
    ("wanted", "words"), [("cat,bea", "no class 'bea'. Perhaps you meant bee"), ("dog", "It has ant")]
)
def test_no_such_class(folders: Path, wanted: str, words: str) -> None:
    task = task_of("classes")
    with pytest.raises(TrainfitError, match=words):
        with_classes(task, task.read(str(folders)), wanted)


def test_data_without_classes() -> None:
    dataset: Any = type("Dataset", (), {"classes": ()})()
    with pytest.raises(TrainfitError, match="no classes to choose from"):
        with_classes(task_of("pairs"), dataset, "cat")
    assert with_classes(task_of("pairs"), dataset, "") is dataset


def test_training_and_evaluation(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = (
        "--resolution",
        32,
        "--device",
        "cpu",
        "--workers",
        0,
        "--effective-batch",
        2,
        "--epochs",
        1,
        "--weights",
        "random",
    )
    assert run("train", "timm:test_resnet", "--data", folders, *words, "--only-classes", "ant,cat", "--out", out) == 0
    assert "2 classes" in capsys.readouterr().err
    assert run("evaluate", out, "--data", folders, "--only-classes", "cat,ant", "--device", "cpu") == 0
    printed = capsys.readouterr()
    assert "ant" in printed.out
    assert "bee" not in printed.out + printed.err


def test_the_page_of_samples_has_an_image_s_class(folders: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("check-data", folders, "--show", page, "--model", "timm:test_resnet", "--samples", 2) == 0
    text = page.read_text()
    assert text.count("<image ") == 8
    assert ": ant<" in text


def test_plan_and_predict_are_for_these_classes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their number and their fullest image; the command that is printed trains on them."""
    whole = task_of("detection").read("sample")
    stars = [int((record.classes == whole.classes.index("star")).sum()) for record in whole.splits["train"]]
    setting, dataset = setting_on_data(make_setting("rfdetr-nano"), "sample", allow_outside=False, only_classes="star")
    assert dataset is not None
    assert setting.classes == 1
    assert setting.to_json()["objects_per_image"] == max(stars)
    assert run("predict", "rfdetr-nano", "--memory", "8GiB", "--only-classes", "star") == 2
    assert "--only-classes chooses classes of a data set: give --data too" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    write_sample_set(tmp_path / "my data", train=4, val=2)
    words = ("--memory", "8GiB", "--data", "my data", "--only-classes", "star")
    assert run("plan", "rfdetr-nano", *words, "--out", "plan.json") == 0
    assert "train rfdetr-nano --data 'my data'" in capsys.readouterr().out
    assert json.loads(Path("plan.json").read_text())["knobs"]["only_classes"] == "star"
