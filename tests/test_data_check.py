"""Defects: each kind made on purpose, found with file and id, and nothing left that would stop a training later."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from trainfit.cli.check_data import CheckData, check_data
from trainfit.errors import TrainfitError
from trainfit.reports.check_data import check_data_text
from trainfit.tasks.detection.admit import RawImage, RawObject, admit
from trainfit.tasks.detection.check import check_dataset, check_of
from trainfit.tasks.detection.read import read_dataset, require_no_errors
from trainfit.tasks.detection.samples import DetectionDataset, ImageRecord
from trainfit.tasks.detection.statistics import statistics
from trainfit.tasks.findings import Finding
from trainfit.tasks.images import ImageDefect, ImageHeader, read_header, read_image

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8))
SOUND = {"id": 1, "image_id": 0, "category_id": 7, "bbox": [5, 6, 10, 8]}


def coco(root: Path, *annotations: dict[str, Any] | str, **changes: Any) -> DetectionDataset:
    """Reads a set whose train split is a.png and b.png (40 x 30); annotations get ids from 1 unless they have one."""
    objects = [{"id": n, **SOUND, **a} if isinstance(a, dict) else a for n, a in enumerate(annotations, 1)]
    for n, entry in enumerate(objects, 1):
        if isinstance(entry, dict) and "id" not in annotations[n - 1]:
            entry["id"] = n
    for split, names in (("train", ["a.png", "b.png"]), ("valid", ["v.png"])):
        (root / split).mkdir(exist_ok=True)
        for name in names:
            if not (root / split / name).exists():
                NOISE.save(root / split / name)
        document: dict[str, Any] = {
            "images": [{"id": n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(names)],
            "annotations": [SOUND, SOUND | {"id": 2, "image_id": 1}],
            "categories": [{"id": 7, "name": "cat"}],
        }
        if split == "train":
            document |= {"annotations": objects or document["annotations"]} | changes
        else:
            document["annotations"] = [SOUND]
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))
    return read_dataset(root)


def found(dataset: DetectionDataset, kind: str) -> Finding:
    (finding,) = [f for f in dataset.findings if f.kind == kind]
    return finding


def images(*entries: tuple[int, str, int, int]) -> list[dict[str, Any]]:
    return [{"id": n, "file_name": name, "width": width, "height": height} for n, name, width, height in entries]


@pytest.mark.parametrize(
    ("annotation", "severity", "kind", "left"),
    [
        ({"bbox": [5, 6, 0, 8]}, "skipped", "zero-size box", None),
        ({"bbox": [5, 6, 4, -8]}, "skipped", "negative-size box", None),
        ({"bbox": [float("nan"), 6, 4, 8]}, "skipped", "box not finite", None),
        ({"bbox": [50, 6, 4, 8]}, "skipped", "box outside the image", None),
        ({"bbox": [30, 20, 15, 30]}, "mended", "box overhangs the image", [30, 20, 40, 30]),
        ({"bbox": [-0.5, 20, 41.5, 11]}, None, None, [-0.5, 20, 41, 31]),
        ({"bbox": [-1.5, 20, 10, 5]}, "mended", "box overhangs the image", [0, 20, 8.5, 25]),
        ({"bbox": [1, 2, 3]}, "skipped", "malformed annotation", None),
        ({"bbox": [1, 2, 3, "4"]}, "skipped", "malformed annotation", None),
        ({"segmentation": [1, 2, 3]}, "skipped", "malformed annotation", None),
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, "skipped", "mask of another size", None),
        ({"segmentation": [[1, 1, 5, 5]]}, "mended", "broken polygon", [5, 6, 15, 14]),
        ({"image_id": 9}, "skipped", "annotation without image", None),
        ({"category_id": 3}, "error", "unknown class", None),
        ("nonsense", "skipped", "malformed annotation", None),
        ({"iscrowd": 1, "segmentation": {"size": [30, 40], "counts": [1200]}}, "note", "crowds", [5, 6, 15, 14]),
    ],
)
def test_objects(tmp_path: Path, annotation: Any, severity: str | None, kind: str | None, left: list[float]) -> None:
    dataset = coco(tmp_path, {"image_id": 1}, annotation)
    record, _ = dataset.splits["train"]
    assert record.boxes.tolist() == ([left] if left is not None else [])
    if kind is None:
        assert not dataset.findings
        return
    finding = found(dataset, kind)
    assert finding.severity == severity
    if kind == "crowds":
        assert record.crowd.tolist() == [True]
        return
    number = "2" if isinstance(annotation, dict) else "at position 1"
    assert finding.where.startswith(f"train/_annotations.coco.json annotation {number}")
    assert all(f.kind in (kind, "image without objects") for f in dataset.findings)


def test_unknown_class_stops_training_in_one_line(tmp_path: Path) -> None:
    root = tmp_path / "yolo"
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        NOISE.save(root / "images" / split / "a.png")
    (root / "labels" / "train").mkdir(parents=True)
    lines = (
        "0 0.5 0.5 0.2 0.2",
        "3 0.5 0.5 0.2 0.2",
        "-1 0.5 0.5 0.2 0.2",
        "0.5 0 0 1 1",
        "0 1 2 3",
        "0 x 0 1 1",
        "0 nan 0 1 1",
    )
    (root / "labels" / "train" / "a.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("names: [cat]\ntrain: images/train\nval: images/val\n")
    dataset = read_dataset(root)
    assert [(f.kind, f.where[-6:]) for f in dataset.findings if f.severity != "note"] == [
        ("unknown class", "line 2"),
        ("unknown class", "line 3"),
        ("malformed label", "line 4"),
        ("malformed label", "line 5"),
        ("malformed label", "line 6"),
        ("box not finite", "line 7"),
    ]
    with pytest.raises(
        TrainfitError, match=r"^labels/train/a\.txt line 2: unknown class: class 3, .*\(and 1 more\)"
    ) as caught:
        require_no_errors(dataset)
    assert "\n" not in str(caught.value)


def test_voc_defects(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    box = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>{}</ymax></bndbox></object>"
    for name, body in (("a", box.format(9)), ("b", box.format("x")), ("c", "<oops>"), ("v", box.format(9))):
        NOISE.save(tmp_path / "JPEGImages" / f"{name}.png")
        text = f"<annotation><size><width>0</width><height>0</height></size>{body}</annotation>"
        (tmp_path / "Annotations" / f"{name}.xml").write_text(text)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("v\n")
    dataset = read_dataset(tmp_path)
    assert [(f.severity, f.kind, f.where) for f in dataset.findings if f.where[12] in "bcd"] == [
        ("skipped", "broken annotation", "Annotations/c.xml"),
        ("skipped", "missing annotation", "Annotations/d.xml"),
        ("skipped", "wrong image size", "Annotations/b.xml"),
    ]
    assert "line 1, column" in found(dataset, "broken annotation").message
    (record,) = dataset.splits["train"]
    assert (record.width, record.height) == NOISE.size  # 0 x 0 was annotated


def test_duplicate_ids_and_files(tmp_path: Path) -> None:
    other = {"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4]}
    dataset = coco(tmp_path, {"id": 1}, {"id": 1}, other)
    skipped, mended = [f for f in dataset.findings if f.kind == "duplicate annotation id"]
    assert (skipped.severity, mended.severity) == ("skipped", "mended")
    assert [r.object_ids.tolist() for r in dataset.splits["train"]] == [[1], [2]]
    twice = coco(tmp_path, images=images((0, "a.png", 40, 30), (0, "a.png", 40, 30), (1, "b.png", 40, 30)))
    assert found(twice, "duplicate image id").severity == "skipped"
    mixed = coco(tmp_path, images=images((0, "a.png", 40, 30), (0, "b.png", 40, 30), (1, "b.png", 40, 30)))
    assert found(mixed, "duplicate image id").severity == "error"
    same = coco(tmp_path, images=images((0, "a.png", 40, 30), (1, "a.png", 40, 30)))
    assert found(same, "duplicate file name").severity == "skipped"
    split = coco(tmp_path, {}, other | {"id": 2}, images=images((0, "a.png", 40, 30), (1, "a.png", 40, 30)))
    assert found(split, "duplicate file name").severity == "error"
    assert len(split.splits["train"]) == 1


def test_one_file_in_two_splits_is_noted(tmp_path: Path) -> None:
    coco(tmp_path)
    named = images((0, "../valid/v.png", 40, 30), (1, "b.png", 40, 30))
    assert "is in train and in val" in found(coco(tmp_path, images=named), "image in two splits").message


@pytest.mark.parametrize(
    ("annotated", "box", "severity"),
    [
        ((30, 40), [5, 6, 10, 8], "mended"),
        ((30, 40), [5, 22, 10, 10], "skipped"),
        ((80, 60), [5, 6, 10, 8], "skipped"),
        ((20, 15), [5, 6, 10, 8], "skipped"),
        ((0, 0), [5, 6, 10, 8], "mended"),
        (("40", None), [5, 6, 10, 8], "mended"),
    ],
)
def test_wrong_image_size(tmp_path: Path, annotated: tuple[int, int], box: list[float], severity: str) -> None:
    entries = images((0, "a.png", *annotated), (1, "b.png", 40, 30))
    dataset = coco(tmp_path, {"bbox": box}, {"image_id": 1}, images=entries)
    assert found(dataset, "wrong image size").severity == severity
    kept = [r for r in dataset.splits["train"] if r.id == 0]
    assert [(r.width, r.height) for r in kept] == ([(40, 30)] if severity == "mended" else [])
    for record in kept:
        assert read_image(record).size == (40, 30)


def test_missing_and_damaged_images_are_left_out(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "train" / "a.png").unlink()
    assert found(coco_again(tmp_path), "missing image").where.endswith("image 0")
    (tmp_path / "train" / "a.png").write_text("no image")
    dataset = coco_again(tmp_path)
    assert found(dataset, "unreadable image").severity == "skipped"
    assert found(dataset, "unreadable image").message.startswith("train/a.png: cannot identify image file; its 1 obj")
    NOISE.save(tmp_path / "train" / "a.png")
    whole = (tmp_path / "train" / "a.png").read_bytes()
    (tmp_path / "train" / "a.png").write_bytes(whole[: len(whole) // 2])
    assert found(coco_again(tmp_path), "truncated image").severity == "skipped"
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF  # the head and the end are whole: decoding alone finds it
    (tmp_path / "train" / "a.png").write_bytes(broken)
    dataset = coco_again(tmp_path)
    assert not dataset.findings
    with pytest.raises(TrainfitError, match=r"a\.png: .*replace the file"):
        read_image(dataset.splits["train"][0])
    seen: list[tuple[int, int]] = []
    checked = check_dataset(dataset, progress=lambda done, total: seen.append((done, total)))
    assert found(checked, "undecodable image").where == "train/a.png"
    assert [r.path.name for r in checked.splits["train"]] == ["b.png"]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def coco_again(root: Path) -> DetectionDataset:
    return read_dataset(root)


def exif(tag: int, value: int | str) -> Image.Exif:
    block = Image.Exif()
    block[tag] = value
    return block


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_cut_off_file_never_passes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    NOISE.save(path, exif=exif(0x010E, "text"))
    whole = path.read_bytes()
    assert isinstance(read_header(path), ImageHeader)
    path.write_bytes(whole + b"trailing bytes\0\0")
    assert read_header(path) == ImageHeader(size=(40, 30), orientation=1)
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        if isinstance(read_header(path), ImageHeader):  # then Pillow itself decodes it: only its end mark is gone
            with Image.open(path) as image:
                image.load()
                assert length > len(whole) - 16


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_orientation_is_applied_where_the_annotated_size_is_the_upright_one(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    NOISE.save(path, exif=exif(0x0112, orientation))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image.convert("RGB") if suffix != "tif" else image)
    header = read_header(path)
    assert isinstance(header, ImageHeader)
    assert header.upright == upright.size
    np.testing.assert_array_equal(np.asarray(read_image(record(path, *upright.size))), np.asarray(upright))
    if suffix == "jpg" and orientation >= 5:
        with Image.open(path) as image:
            stored = np.asarray(image)
        np.testing.assert_array_equal(np.asarray(read_image(record(path, 40, 30))), stored)
    with pytest.raises(TrainfitError, match=r"but its record says 41 x 30"):
        read_image(record(path, 41, 30))


def record(path: Path, width: int, height: int) -> ImageRecord:
    raw = RawImage(
        where="", id=0, path=path, header=ImageHeader(size=(width, height), orientation=1), size=None, objects=()
    )
    return admit([raw], path.parent, "train")[0][0]


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = np.asarray(NOISE.convert("L"))
    Image.fromarray(grey.astype(np.uint16) << 8 | 77).save(tmp_path / "16.png")
    Image.fromarray(grey).save(tmp_path / "8.png")
    palette = NOISE.quantize(8)
    palette.save(tmp_path / "p.png", transparency=bytes(range(8)))
    NOISE.convert("RGBA").save(tmp_path / "rgba.png")
    NOISE.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name, expected in (("16", grey), ("8", grey), ("p", palette.convert("RGB")), ("rgba", NOISE)):
        image = read_image(record(tmp_path / f"{name}.png", 40, 30))
        array = np.asarray(expected)
        np.testing.assert_array_equal(np.asarray(image), array if array.ndim == 3 else array[:, :, None].repeat(3, 2))
    assert read_image(record(tmp_path / "cmyk.jpg", 40, 30)).mode == "RGB"
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tif")
    assert isinstance(read_header(tmp_path / "f.tif"), ImageDefect)


coordinate = st.one_of(st.integers(-50, 90), st.floats(-1e3, 1e3), st.just(float("nan")), st.just(float("inf")))


@given(st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), max_size=8))
def test_what_is_admitted_is_usable_and_nothing_vanishes(boxes: list[tuple[float, float, float, float]]) -> None:
    objects = [RawObject(where=f"object {n}", id=n, class_index=0, box=box) for n, box in enumerate(boxes)]
    header = ImageHeader(size=(40, 30), orientation=1)
    raw = RawImage(where="image", id=5, path=Path("a.png"), header=header, size=(40, 30), objects=objects)
    (kept,), findings = admit([raw], Path(), "train")
    skipped = {f.where for f in findings if f.severity == "skipped"}
    mended = {f.where for f in findings if f.severity == "mended"}
    assert {f"object {n}" for n in kept.object_ids} | skipped == {thing.where for thing in objects}
    assert len(kept.object_ids) + len(skipped) == len(objects)
    for n, (x0, y0, x1, y1) in zip(kept.object_ids, kept.boxes, strict=True):
        assert x0 < x1
        assert y0 < y1
        assert x0 >= -1
        assert y0 >= -1
        assert x1 <= 41
        assert y1 <= 31
        assert f"object {n}" in mended or (x0, y0, x1, y1) == boxes[n]
    assert (kept.areas > 0).all()


def test_statistics_leave_crowds_out_of_objects_per_image(tmp_path: Path) -> None:
    rows = [{"image_id": 0}, {"image_id": 0, "iscrowd": 1}, {"image_id": 1}, {"image_id": 1}, {"image_id": 1}]
    entries = images((0, "a.png", 40, 30), (1, "b.png", 30, 40), (2, "c.png", 50, 20))
    coco(tmp_path)
    for name, size in (("b.png", (30, 40)), ("c.png", (50, 20))):
        Image.new("RGB", size).save(tmp_path / "train" / name)
    figures = statistics(coco(tmp_path, *rows, images=entries).splits["train"])
    assert (figures.images, figures.empty_images, figures.objects, figures.crowds) == (3, 1, 5, 1)
    assert (figures.objects_per_image_max, figures.objects_per_image_percentiles[50]) == (3, 1)
    assert figures.objects_per_image_mean == pytest.approx(4 / 3)
    assert figures.objects_per_image_histogram == ((0, 0, 1), (1, 1, 1), (2, 2, 0), (3, 4, 1))
    assert (figures.width_max, figures.height_max, figures.largest_canvas) == (50, 40, (40, 30))
    assert dict(figures.canvas_sizes) == {(40, 30): 1, (30, 40): 1, (50, 20): 1}
    assert statistics([]).objects_per_image_histogram == ()


GOLDEN = """\
ROOT: coco, 1 classes

                            train       val
images                          2         1
  without objects               1         0
objects                         2         1
  crowds                        0         0
objects per image, mean       1.0       1.0
  99th percentile             2.0       1.0
  most                          2         1
class cat                       2         1

Objects per image (crowds apart), images
        0 ████████████████████████████████████████ 1
        1 ████████████████████████████████████████ 1
        2 ████████████████████████████████████████ 1

Canvas sizes, width x height in pixels
  40 x 30: 3 images
  largest 40 x 30; widest 40, highest 30

Skipped (left out)
  zero-size box: 1
    FILE annotation 1, image a.png: box x 5 to 5, y 6 to 14; the object is left out

Mended (in memory; the files are as they were)
  box overhangs the image: 1
    FILE annotation 3, image b.png: box x 1 to 51, y 1 to 10, image 40 x 30; clipped to the image

Notes
  image without objects: 1
    FILE image 0: used as background

0 errors, 1 skipped, 1 mended, 1 note: training can use this data set
"""


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco(tmp_path, {"bbox": [5, 6, 0, 8]}, {"image_id": 1}, {"image_id": 1, "bbox": [1, 1, 50, 9]})
    assert check_data(CheckData(data=str(tmp_path))) == 0
    text = GOLDEN.replace("ROOT", str(tmp_path)).replace("FILE", "train/_annotations.coco.json")
    assert capsys.readouterr().out == text
    coco(tmp_path, {}, {"image_id": 1}, {"category_id": 5})
    assert check_data(CheckData(data=str(tmp_path), as_json=True, decode=False)) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["classes"]) == (1, [{"id": 7, "name": "cat"}])
    assert document["splits"]["train"]["objects"] == 2
    assert [f["kind"] for f in document["findings"]] == ["unknown class"]


def test_report_lists_every_finding() -> None:
    findings = tuple(Finding(severity="note", kind="k", where=f"file {n}", message="m") for n in range(2000))
    dataset = DetectionDataset(
        root=Path("r"), format="coco", classes=(), category_ids=(), splits={"train": ()}, findings=findings
    )
    lines = check_data_text(check_of(dataset)).splitlines()
    assert "  k: 2000" in lines
    assert [line for line in lines if line.startswith("    file")] == [f"    file {n}: m" for n in range(2000)]


def test_labels_in_the_wrong_place_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        NOISE.save(tmp_path / "images" / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 0.1 0.1")
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: images\n")
    assert found(read_dataset(tmp_path), "no objects").severity == "error"
