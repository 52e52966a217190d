"""Augmentation: what words mean, boxes and masks against torchvision, the same samples for the same seed."""

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from conftest import run
from trainfit.errors import TrainfitError
from trainfit.models.images import crowded_sample
from trainfit.models.rfdetr.data import make_sample
from trainfit.tasks.augment import OWN, Augmentation, parse
from trainfit.tasks.detection.read import read_dataset
from trainfit.tasks.detection.samples import ImageRecord, Sample
from trainfit.tasks.transforms import augmented
from trainfit.training.loader import Loaded, WindowPlan, training_loader


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(height: int = 48, width: int = 64) -> Sample:
    return crowded_sample(height, width, objects=9, classes=5, masks=True)


def test_words() -> None:
    assert parse("default") == Augmentation(own=OWN)
    assert parse("none") == Augmentation()
    assert parse("no-flip") == Augmentation(own=frozenset({"crop"}))
    assert (
        parse("none,flip,colour")
        == parse("none, flip, color")
        == replace(parse("none,flip"), colour=0.2, saturation=True)
    )
    assert parse("mine:f") == Augmentation(function="mine:f")
    assert parse("default,mine:f") == Augmentation(own=OWN, function="mine:f")
    assert parse("aerial,no-scale").turns
    assert not parse("medical").own


def test_what_a_family_does_not_draw_itself_is_drawn_after_decoding() -> None:
    """Mask R-CNN flips, CLIP crops: texts say left and right, so presets do not mirror its images."""
    assert parse("default", frozenset({"crop"})) == Augmentation(own=frozenset({"crop"}))
    assert parse("aerial", frozenset({"crop"})).own == {"crop"}
    assert not parse("aerial", frozenset({"crop"})).turns
    assert parse("default,flip", frozenset({"crop"})) == Augmentation(own=frozenset({"crop"}), flip=True)
    assert parse("default,crop", frozenset({"flip"})) == Augmentation(own=frozenset({"flip"}), crop=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("aereal", "Perhaps you meant aerial"),
        ("default,no-flop", "Perhaps you meant no-flip"),
        ("flip,none", "'none' is not an augmentation"),
        ("a:b,c:d", "one function"),
    ],
)
def test_what_is_no_augmentation(text: str, words: str) -> None:
    with pytest.raises(TrainfitError, match=words):
        parse(text)


def as_torchvision(given: Sample) -> dict[str, Any]:
    """Torchvision's own types, made here by hand."""
    height, width = given.image.shape[1:]
    boxes: Any = tv_tensors.BoundingBoxes(given.boxes, format="XYXY", canvas_size=(height, width))  # pyright: ignore
    assert given.masks is not None
    return {"image": tv_tensors.Image(given.image), "boxes": boxes, "masks": tv_tensors.Mask(given.masks)}


@pytest.mark.parametrize("augmentation", [Augmentation(flip=True), Augmentation(turns=True), parse("none,scale,crop")])
def test_boxes_frame_their_masks(augmentation: Augmentation) -> None:
    """Masks of `crowded_sample` fill their boxes: whatever is drawn, each box still frames its mask, to the pixel that
    resampling rounds.
    """
    given = sample(64, 64)
    changed = 0
    for seed in range(20):
        found = augmented(given, augmentation, seeded(seed))
        assert found.image.shape == given.image.shape
        assert found.masks.shape == (len(found.boxes), 64, 64)
        assert len(found.classes) == len(found.boxes)
        changed += not torch.equal(found.image, given.image)
        for mask, box in zip(found.masks, found.boxes, strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            if len(rows):
                framed = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                assert (framed - box).abs().max() <= 2
    assert changed >= 5


def test_turns_are_torchvision_s() -> None:
    """Every result is one of the eight that torchvision's flips and quarter turns make of the sample."""
    given = sample(40, 40)
    truth = as_torchvision(given)
    possible: list[dict[str, Any]] = []
    for quarters in range(4):
        turned = {name: functional.rotate(value, 90.0 * quarters) for name, value in truth.items()}
        possible += [turned, {name: functional.vertical_flip(value) for name, value in turned.items()}]
    seen: set[int] = set()
    for seed in range(40):
        found = augmented(given, Augmentation(turns=True), seeded(seed))
        same = [i for i, each in enumerate(possible) if torch.equal(each["image"], found.image)]
        assert len(same) == 1
        expected = possible[same[0]]
        assert torch.equal(expected["masks"], found.masks)
        torch.testing.assert_close(expected["boxes"].as_subclass(torch.Tensor), found.boxes)
        seen.add(same[0])
    assert len(seen) == 8


def test_an_oblong_image_keeps_its_size() -> None:
    given = sample(40, 60)
    assert all(augmented(given, parse("aerial"), seeded(k)).image.shape == (3, 40, 60) for k in range(8))


@pytest.fixture(scope="module")
def record() -> ImageRecord:
    return max(read_dataset("sample").splits["train"], key=lambda each: len(each.classes))


def test_the_decoder_s_flip_is_torchvision_s(record: ImageRecord) -> None:
    """Crop left out: a mirrored sample is torchvision's mirror image of the one that is not."""
    plain = make_sample(record, size=96, augment=frozenset(), masks=True, generator=seeded())
    mirrored = {name: functional.horizontal_flip(value) for name, value in as_torchvision(plain).items()}
    flips = 0
    for seed in range(12):
        found = make_sample(record, size=96, augment=parse("no-crop").own, masks=True, generator=seeded(seed))
        if torch.equal(found.image, plain.image):
            continue
        flips += 1
        assert found.masks is not None
        assert torch.equal(found.image, mirrored["image"])
        assert torch.equal(found.masks, mirrored["masks"])
        torch.testing.assert_close(found.boxes, mirrored["boxes"].as_subclass(torch.Tensor))
    assert 2 <= flips <= 10


def test_global_random_numbers_are_left_as_they_were() -> None:
    """Training's own random numbers do not depend on what is augmented."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    wanted = torch.rand(()), random.random(), np.random.random()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    augmented(sample(), parse("aerial"), seeded(3))
    assert (torch.rand(()), random.random(), np.random.random()) == wanted


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_augmentation.py").write_text(
        "import random\n"
        "from torchvision.transforms import v2\n"
        "noisy = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.GaussianBlur(3)])\n"
        "flips = v2.RandomHorizontalFlip(1.0)\n"
        "def brighter(values):\n"
        "    values['image'] = (values['image'].float() * random.random()).to(values['image'].dtype)\n"
        "    return values\n"
        "def breaks(values):\n"
        "    return {'image': values['image'] / values['nothing']}\n"
        "def shrinks(values):\n"
        "    return {**values, 'image': values['image'][:, ::2]}\n"
        "number = 3\n"
    )
    yield tmp_path
    sys.modules.pop("own_augmentation", None)
    from trainfit.tasks.transforms import user_transform

    user_transform.cache_clear()


@pytest.mark.usefixtures("mine")
def test_a_user_s_transform_of_torchvision() -> None:
    given = sample()
    found = augmented(given, parse("own_augmentation:flips"), seeded())
    expected = v2.RandomHorizontalFlip(1.0)(as_torchvision(given))
    assert torch.equal(found.image, expected["image"])
    assert torch.equal(found.masks, expected["masks"])
    torch.testing.assert_close(found.boxes, expected["boxes"].as_subclass(torch.Tensor))


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_augmentation:breaks", r"failed: KeyError: 'nothing' \(own_augmentation.py, line 9\)"),
        ("own_augmentation:shrinks", r"returned an image .* must stay torch.uint8 \(3, 48, 64\)"),
        ("own_augmentation:number", "is a int"),
        ("own_augmentation:missing", "has no attribute 'missing'"),
        ("no_such_module:f", "run in the folder that holds no_such_module.py"),
    ],
)
def test_a_user_s_transform_that_fails(name: str, words: str) -> None:
    with pytest.raises(TrainfitError, match=words):
        augmented(sample(), parse(name), seeded())


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("text", ["aerial", "light,own_augmentation:brighter"])
def test_windows_are_the_same_whoever_makes_them_and_after_a_resume(text: str) -> None:
    """Loader processes, one process, and a run that begins at a later step give the same samples."""
    records = read_dataset("sample").splits["train"]
    plan = WindowPlan(images=len(records), effective_batch=3, sizes=(64,), seed=7)

    def decode(record: Any, **options: Any) -> Sample:
        return make_sample(record, masks=False, **options)

    def windows(first: int, workers: int) -> list[Loaded]:
        steps = range(first, 4)
        return list(training_loader(records, decode, plan, steps=steps, augment=parse(text), workers=workers))

    whole, forked, resumed = windows(0, 0), windows(0, 2), windows(2, 0)
    for one, other in [*zip(whole, forked, strict=True), *zip(whole[2:], resumed, strict=True)]:
        for ours, theirs in zip(one, other, strict=True):
            assert torch.equal(ours.image, theirs.image)
            assert torch.equal(ours.boxes, theirs.boxes)


@pytest.mark.usefixtures("mine")
def test_a_failing_transform_ends_training_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """It is no damaged image, which would be left out; with and without loader processes."""
    words = ("train", "rfdetr-nano", "--data", "sample", "--resolution", 32, "--no-multi-scale", "--groups", 1)
    words += ("--num-queries", 8, "--effective-batch", 2, "--max-steps", 1, "--weights", "random", "--device", "cpu")
    for workers in (0, 1):
        assert run(*words, "--augment", "own_augmentation:breaks", "--workers", workers) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(
            "trainfit: error: --augment own_augmentation:breaks failed: KeyError: 'nothing' (own_aug"
        )
