"""The built-in sample set: what is drawn is what is annotated, and it survives a trip through the other formats."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from xml.etree.ElementTree import Element, ElementTree, SubElement

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.read import read_dataset
from trainfit.tasks.detection.sample_set import SHAPES, write_sample_set
from trainfit.tasks.detection.samples import DetectionDataset
from trainfit.tasks.images import read_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_set(tmp_path_factory.mktemp("sample") / "set")


def document(folder: Path, split: str) -> Mapping[str, Any]:
    return json.loads((folder / split / "_annotations.coco.json").read_text())


def test_what_it_holds(folder: Path) -> None:
    dataset = read_dataset(folder)
    train, val = dataset.splits["train"], dataset.splits["val"]
    assert (len(train), len(val), dataset.classes) == (48, 16, SHAPES)
    assert {finding.kind for finding in dataset.findings} == {"image without objects"}
    assert [len(record.classes) for record in train[:8]] == [2, 1, 4, 0, 3, 6, 2, 5]
    for record in train[:8]:
        assert all(np.ptp(record.boxes.reshape(-1, 2, 2), axis=1).max(axis=1) > 0.2 * min(record.width, record.height))
    counts = [len(record.classes) for record in (*train, *val)]
    assert (min(counts), max(counts)) == (0, 60)
    assert len({(record.width, record.height) for record in train}) >= 5
    for records in (train, val):
        assert {int(index) for record in records for index in record.classes} == {0, 1, 2, 3}


# pycocotools 2.0.11 is not yet at home with numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_cover_what_is_painted(folder: Path) -> None:
    for record in read_dataset(folder).splits["train"][:12]:
        pixels = np.asarray(read_image(record), np.int64)
        painted = np.ptp(pixels, axis=2) > 60  # shapes are colourful, the background is dull
        masks = np.zeros((len(record.classes), record.height, record.width), np.bool_)
        for n, polygons in enumerate(record.segmentations):
            (encoded,) = coco_mask.frPyObjects(cast(Any, list(polygons or ())), record.height, record.width)
            masks[n] = coco_mask.decode(encoded)
            x, y, width, height = coco_mask.toBbox(encoded)
            # 2 px: a sharp tip covers no pixel's middle
            np.testing.assert_allclose(record.boxes[n], [x, y, x + width, y + height], atol=2)
            assert record.areas[n] == pytest.approx(masks[n].sum(), rel=0.1, abs=8)
        assert (masks.sum(axis=0) <= 1).all()
        union = masks.any(axis=0)
        assert (union & painted).sum() >= 0.9 * (union | painted).sum()
        for n, index in enumerate(record.classes):
            red, green, blue = pixels[masks[n]].mean(axis=0)
            first = {0: red > 2 * max(green, blue), 1: blue > 1.5 * max(red, green), 2: green > 1.3 * max(red, blue)}
            assert first.get(int(index), min(red, green) > 2 * blue), SHAPES[index]


def test_same_seed_same_bytes_and_a_smaller_set_is_its_beginning(folder: Path, tmp_path: Path) -> None:
    small = write_sample_set(tmp_path / "a", train=10, val=2)
    for file in (f"{split}/{n:03d}.png" for split, n in [("train", 0), ("train", 9), ("valid", 1)]):
        assert (small / file).read_bytes() == (folder / file).read_bytes()
    assert document(small, "train")["annotations"] == document(folder, "train")["annotations"][: count(small)]
    other = write_sample_set(tmp_path / "b", seed=1, train=2, val=1)
    assert (other / "train" / "000.png").read_bytes() != (folder / "train" / "000.png").read_bytes()
    assert (folder / "valid" / "000.png").read_bytes() != (folder / "train" / "000.png").read_bytes()


def count(folder: Path) -> int:
    return len(document(folder, "train")["annotations"])


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(TrainfitError, match="mine: exists already; remove it"):
        write_sample_set(tmp_path / "mine")


def test_sample_is_drawn_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dataset = read_dataset("sample")
    assert (dataset.format, dataset.root.parent) == ("sample", tmp_path / "trainfit")
    assert list(dataset.root.parent.iterdir()) == [dataset.root]
    written = {file: file.stat().st_mtime_ns for file in dataset.root.rglob("*")}
    assert len(read_dataset("sample").splits["train"]) == 48
    assert read_dataset("sample", format="coco").format == "sample"  # as it lies on the disk
    assert {file: file.stat().st_mtime_ns for file in dataset.root.rglob("*")} == written


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TrainfitError, match=r"sample-v1: cannot be written .*XDG_CACHE_HOME"):
        read_dataset("sample")


def test_two_writers_leave_one_whole_set(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write_sample_set, tmp_path / "set", train=6, val=2) for _ in range(2)]
    assert [writer.result() for writer in writers] == [tmp_path / "set"] * 2
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
    assert len(list((tmp_path / "set").rglob("*.png"))) == 8


def to_yolo(source: Path, target: Path) -> None:
    """Boxes in the first image of each pair, polygons in the second."""
    for split, name in (("train", "train"), ("valid", "val")):
        (target / "images" / name).mkdir(parents=True)
        (target / "labels" / name).mkdir(parents=True)
        for image in document(source, split)["images"]:
            (target / "images" / name / image["file_name"]).symlink_to(source / split / image["file_name"])
            scale = np.array([image["width"], image["height"]], np.float64)
            lines: list[str] = []
            for a in document(source, split)["annotations"]:
                if a["image_id"] != image["id"]:
                    continue
                x, y, width, height = a["bbox"]
                values = [(x + width / 2) / scale[0], (y + height / 2) / scale[1], width / scale[0], height / scale[1]]
                if image["id"] % 2:
                    values = (np.array(a["segmentation"]).reshape(-1, 2) / scale).ravel().tolist()
                lines.append(" ".join([str(a["category_id"]), *(f"{value:.8f}" for value in values)]))
            (target / "labels" / name / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    (target / "data.yaml").write_text(f"names: {list(SHAPES)}\ntrain: images/train\nval: images/val\n")


def to_voc(source: Path, target: Path) -> None:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (target / part).mkdir(parents=True)
    for split, name in (("train", "train"), ("valid", "val")):
        stems: list[str] = []
        for image in document(source, split)["images"]:
            stem = f"{split}_{image['id']:03d}"
            stems.append(stem)
            (target / "JPEGImages" / f"{stem}.png").symlink_to(source / split / image["file_name"])
            root = Element("annotation")
            size = SubElement(root, "size")
            for key in ("width", "height"):
                SubElement(size, key).text = str(image[key])
            for a in document(source, split)["annotations"]:
                if a["image_id"] == image["id"]:
                    thing = SubElement(root, "object")
                    SubElement(thing, "name").text = SHAPES[a["category_id"]]
                    box = SubElement(thing, "bndbox")
                    x, y, width, height = a["bbox"]
                    for key, value in (("xmin", x), ("ymin", y), ("xmax", x + width), ("ymax", y + height)):
                        SubElement(box, key).text = str(value)
            ElementTree(root).write(target / "Annotations" / f"{stem}.xml")
        (target / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems))
    (target / "labels.txt").write_text("\n".join(SHAPES))


@pytest.mark.parametrize(("convert", "format"), [(to_yolo, "yolo"), (to_voc, "voc")])
def test_round_trip(tmp_path: Path, convert: Any, format: str) -> None:  # noqa: A002
    source = write_sample_set(tmp_path / "coco", train=12, val=3)
    convert(source, tmp_path / "other")
    first, second = read_dataset(source), read_dataset(tmp_path / "other", allow_outside=True)
    assert (second.format, second.classes) == (format, first.classes)
    assert {finding.severity for finding in second.findings} == {"note"}
    assert_same_objects(first, second)


def assert_same_objects(first: DetectionDataset, second: DetectionDataset) -> None:
    assert set(first.splits) == set(second.splits) == {"train", "val"}
    for split, records in first.splits.items():
        for one, two in zip(records, second.splits[split], strict=True):
            np.testing.assert_allclose(two.boxes, one.boxes, atol=1e-5)
            assert two.classes.tolist() == one.classes.tolist()
            with Image.open(two.path) as image:
                assert image.size == (two.width, two.height) == (one.width, one.height)
