"""Readers: real data sets against pycocotools and recorded counts, every layout, and every error a user can repair."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.read import read_dataset, require_no_errors
from trainfit.tasks.detection.samples import DetectionDataset, ImageRecord

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the real data set {name} is not beside this checkout")
    return folder


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)


def coco_json(file: Path, names: list[str], **changes: Any) -> None:
    """A COCO file of 40 x 30 images with one object each; `changes` replace whole keys."""
    document: dict[str, Any] = {
        "images": [{"id": n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(names)],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": 7, "bbox": [5, 6, 10 + n, 8]} for n in range(len(names))
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document | changes))


def voc_xml(file: Path, *objects: tuple[str, float, float, float, float], size: tuple[int, int] = (40, 30)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(
        f"<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in objects
    )
    file.write_text(f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{body}</annotation>")


def yolo(root: Path, label: str, data: str = "names: [cat, dog]\ntrain: images/train\nval: images/val\n") -> Path:
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text(data)
    for split in ("train", "val"):
        picture(root / "images" / split / "a.png")
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        (root / "labels" / split / "a.txt").write_text(label)
    return root


def as_written(mask: Any) -> Any:
    """A record's mask as COCO writes it: polygons as lists."""
    return [polygon.tolist() for polygon in mask] if isinstance(mask, tuple) else mask


def only(dataset: DetectionDataset, split: str = "train") -> ImageRecord:
    (record,) = dataset.splits[split]
    return record


def kinds(dataset: DetectionDataset) -> Counter[str]:
    return Counter(finding.kind for finding in dataset.findings)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_is_what_pycocotools_reads(split: str) -> None:
    root = shared("coco_mini_cc")
    dataset = read_dataset(root)
    oracle = COCO(str(root / "annotations" / f"instances_{split}2017.json"))
    records = dataset.splits[split]
    assert [record.id for record in records] == oracle.getImgIds()
    assert sum(len(record.classes) for record in records) == {"train": 333, "val": 213}[split]
    assert sum(int(record.crowd.sum()) for record in records) == {"train": 5, "val": 2}[split]
    assert dataset.category_ids == tuple(oracle.getCatIds())
    for record in records:
        entry = oracle.loadImgs([record.id])[0]
        assert (record.path.name, record.width, record.height) == (entry["file_name"], entry["width"], entry["height"])
        annotations = oracle.loadAnns(oracle.getAnnIds([record.id]))
        assert record.object_ids.tolist() == [a["id"] for a in annotations]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
        np.testing.assert_array_equal(record.boxes, np.array(corners, np.float64).reshape(-1, 4))
        assert [dataset.classes[index] for index in record.classes] == [
            oracle.loadCats([a["category_id"]])[0]["name"] for a in annotations
        ]
        assert record.crowd.tolist() == [bool(a["iscrowd"]) for a in annotations]
        assert record.areas.tolist() == [a["area"] for a in annotations]
        assert [as_written(s) for s in record.segmentations] == [a["segmentation"] for a in annotations]


def test_fruits_nuts_is_one_json_whose_val_is_held_out() -> None:
    root = shared("fruits_nuts")
    dataset = read_dataset(root)
    assert dataset.classes == ("date", "fig", "hazelnut")
    assert {split: len(records) for split, records in dataset.splits.items()} == {"train": 16, "val": 2}
    assert sum(len(r.classes) for records in dataset.splits.values() for r in records) == 165
    assert [f.kind for f in dataset.findings] == ["val held out"]
    paths = [[r.path.name for r in read_dataset(root, seed=seed).splits["val"]] for seed in (0, 0, 1, 2)]
    assert paths[0] == paths[1]
    assert len({tuple(names) for names in paths}) > 1
    assert len(read_dataset(root, val_fraction=0.5).splits["val"]) == 9
    assert len(read_dataset(root, val_fraction=0.01).splits["val"]) == 1
    alone = read_dataset(root / "trainval.json")
    assert [r.path for r in alone.splits["train"]] == [r.path for r in dataset.splits["train"]]


def test_bccd_reports_its_two_zero_size_boxes() -> None:
    dataset = read_dataset(shared("bccd"))
    assert {split: len(records) for split, records in dataset.splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert dataset.classes == ("Platelets", "RBC", "WBC")
    counts = Counter(int(i) for records in dataset.splits.values() for r in records for i in r.classes)
    assert counts == {0: 361, 1: 4155 - 2, 2: 372}
    assert sorted(f.where for f in dataset.findings) == [
        "Annotations/BloodImage_00338.xml object 13",
        "Annotations/BloodImage_00343.xml object 4",
    ]
    assert {(f.severity, f.kind) for f in dataset.findings} == {("skipped", "zero-size box")}


@pytest.mark.parametrize(
    ("annotations", "folder"),
    [
        ("{}/_annotations.coco.json", "{}"),
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/{}.json", "images/{}"),
        ("annotations/instances_{}.json", "images"),
        ("{}.json", "images"),
        ("coco_{}.json", "."),
    ],
)
def test_coco_layouts(tmp_path: Path, annotations: str, folder: str) -> None:
    for split, name in (("train", "a.png"), ("val", "b.png")):
        picture(tmp_path / folder.format(split) / name)
        coco_json(tmp_path / annotations.format(split), [name])
    (tmp_path / "annotations").mkdir(exist_ok=True)
    for other in ("captions_train2017", "person_keypoints_val2017"):
        (tmp_path / "annotations" / f"{other}.json").write_text("{}")
    dataset = read_dataset(tmp_path)
    assert (dataset.classes, dataset.category_ids) == (("cat", "dog"), (7, 9))
    assert only(dataset).path == tmp_path / folder.format("train") / "a.png"
    assert only(dataset, "val").path == tmp_path / folder.format("val") / "b.png"
    assert only(dataset).boxes.tolist() == [[5, 6, 15, 14]]
    assert not dataset.findings


@pytest.mark.parametrize("named", ["images/x/a.png", "x/a.png", "a.png", "elsewhere/a.png", "images\\x\\a.png"])
def test_coco_file_names_may_carry_folders(tmp_path: Path, named: str) -> None:
    place = tmp_path / "images" / ("" if named in ("a.png", "elsewhere/a.png") else "x") / "a.png"
    picture(place)
    picture(tmp_path / "images" / "b.png")
    coco_json(tmp_path / "labels.json", [named, "images/b.png"])
    records = [record for split in read_dataset(tmp_path).splits.values() for record in split]
    assert {record.path for record in records} == {place, tmp_path / "images" / "b.png"}


def test_roboflow_parent_category_is_dropped(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 7, "name": "cat", "supercategory": "animals"},
        {"id": 9, "name": "dog", "supercategory": "animals"},
    ]
    for split in ("train", "valid", "test"):
        picture(tmp_path / split / f"{split}.jpg")
        coco_json(tmp_path / split / "_annotations.coco.json", [f"{split}.jpg"], categories=categories)
    dataset = read_dataset(tmp_path)
    assert set(dataset.splits) == {"train", "val", "test"}
    assert (dataset.classes, dataset.category_ids) == (("cat", "dog"), (7, 9))
    assert kinds(dataset) == {"parent category": 1}
    used = [{"id": 1, "image_id": 0, "category_id": 0, "bbox": [1, 1, 5, 5]}]
    coco_json(tmp_path / "test" / "_annotations.coco.json", ["test.jpg"], categories=categories, annotations=used)
    assert read_dataset(tmp_path).classes == ("animals", "cat", "dog")


@pytest.mark.parametrize(
    "other",
    [[{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}], [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}]],
)
def test_classes_that_differ_by_split_are_an_error(tmp_path: Path, other: list[dict[str, Any]]) -> None:
    for split, changes in (("train", {}), ("valid", {"categories": other})):
        picture(tmp_path / split / f"{split}.png")
        coco_json(tmp_path / split / "_annotations.coco.json", [f"{split}.png"], **changes)
    dataset = read_dataset(tmp_path)
    assert {f.kind for f in dataset.findings if f.severity == "error"} == {"classes differ by split"}
    with pytest.raises(TrainfitError, match=r"valid/_annotations\.coco\.json category .*export all splits together"):
        require_no_errors(dataset)


def test_yolo_boxes_and_polygons(tmp_path: Path) -> None:
    label = "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.6 0.2 0.6 0.9 0.1 0.8\n"
    dataset = read_dataset(yolo(tmp_path, label))
    record = only(dataset)
    assert (record.width, record.height) == (40, 30)
    np.testing.assert_allclose(record.boxes, [[15, 7.5, 25, 22.5], [4, 6, 24, 27]])
    assert record.classes.tolist() == [1, 0]
    np.testing.assert_allclose(record.areas, [150, 420])
    np.testing.assert_allclose(np.array(as_written(record.segmentations[1])), [[4, 6, 24, 6, 24, 27, 4, 24]])
    assert record.segmentations[0] is None
    assert not dataset.findings


@pytest.mark.parametrize(
    "data",
    [
        "names: {0: cat, 1: dog}\nnc: 2\ntrain: ../images/train\nvalid: ../images/val\n",
        "names: [cat, dog]\npath: images\ntrain: train\nval: [val]\n",
        "names: [cat, dog]\ntrain: train.txt\nval: images/val\ntest: images/none\n",
    ],
)
def test_yolo_data_files(tmp_path: Path, data: str) -> None:
    yolo(tmp_path, "1 0.5 0.5 0.25 0.5\n", data)
    (tmp_path / "train.txt").write_text("./images/train/a.png\n")
    dataset = read_dataset(tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert only(dataset).classes.tolist() == only(dataset, "val").classes.tolist() == [1]
    assert kinds(dataset) == ({"missing split": 1} if "test" in data else {})


def test_voc_without_lists_and_with_a_label_file(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / "JPEGImages" / f"{name}.png")
        voc_xml(tmp_path / "Annotations" / f"{name}.xml", ("dog", 1, 2, 40, 30), ("ant", 3.5, 4, 9, 9))
    dataset = read_dataset(tmp_path)
    assert dataset.classes == ("ant", "dog")
    assert [len(records) for records in dataset.splits.values()] == [2, 1]
    assert dataset.splits["train"][0].boxes.tolist() == [[1, 2, 40, 30], [3.5, 4, 9, 9]]
    (difficult,) = [f for f in dataset.findings if f.kind == "difficult objects"]
    assert difficult.message.startswith("6 objects")
    (tmp_path / "labels.txt").write_text("dog\nant\n")
    assert read_dataset(tmp_path).classes == ("dog", "ant")
    (tmp_path / "labels.txt").write_text("dog\n")
    assert kinds(read_dataset(tmp_path))["unknown class"] == 3


def test_voc_trainval_alone_is_train_and_roboflow_folders_work(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / "one" / "JPEGImages" / f"{name}.jpg")
        voc_xml(tmp_path / "one" / "Annotations" / f"{name}.xml", ("dog", 1, 2, 9, 9))
    lists = tmp_path / "one" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("a 1\nb -1\nc 1\n")
    (lists / "val.txt").write_text("b\n")
    splits = read_dataset(tmp_path / "one").splits
    assert {key: [r.path.stem for r in records] for key, records in splits.items()} == {
        "train": ["a", "c"],
        "val": ["b"],
    }
    for split in ("train", "valid"):
        picture(tmp_path / "two" / split / f"{split}.jpg")
        voc_xml(tmp_path / "two" / split / f"{split}.xml", ("dog", 1, 2, 9, 9))
    splits = read_dataset(tmp_path / "two").splits
    assert {key: records[0].path.stem for key, records in splits.items()} == {"train": "train", "val": "valid"}


def test_test_is_not_taken_for_val(tmp_path: Path) -> None:
    for split, names in (("train", ["a.png", "b.png", "c.png"]), ("test", ["d.png"])):
        for name in names:
            picture(tmp_path / split / name)
        coco_json(tmp_path / split / "_annotations.coco.json", names)
    dataset = read_dataset(tmp_path)
    assert {key: len(records) for key, records in dataset.splits.items()} == {"train": 2, "val": 1, "test": 1}
    (note,) = dataset.findings
    assert (note.kind, note.severity) == ("val held out", "note")
    assert "test stays untouched" in note.message


def broken(tmp_path: Path, what: str) -> Path:
    """A folder that is broken in one way."""
    annotations = tmp_path / "annotations" / "train.json"
    picture(tmp_path / "train" / "a.png")
    coco_json(annotations, ["a.png"])
    if what == "no folder":
        return tmp_path / "nowhere"
    if what == "nothing there":
        shutil.rmtree(tmp_path / "annotations")
    elif what == "empty file":
        annotations.write_text("")
    elif what == "broken json":
        annotations.write_text('{"images": [],\n "annotations" []}')
    elif what == "not coco":
        annotations.write_text('{"images": []}')
    elif what == "no file name":
        coco_json(annotations, [], images=[{"id": 3}])
    elif what == "no images listed":
        coco_json(annotations, [])
    elif what == "no images there":
        coco_json(annotations, ["x.png", "y.png"])
    elif what == "no train":
        annotations.rename(annotations.with_name("val.json"))
    elif what == "two train files":
        coco_json(annotations.with_name("my_train.json"), ["a.png"])
    elif what == "two formats":
        yolo(tmp_path, "0 0.5 0.5 0.1 0.1")
    elif what == "one image":
        pass
    elif what == "broken yaml":
        shutil.rmtree(tmp_path / "annotations")
        (tmp_path / "data.yaml").write_text("names: [a\ntrain: x\n")
    elif what == "too few names":
        shutil.rmtree(tmp_path / "annotations")
        yolo(tmp_path, "", "names: [a]\nnc: 2\ntrain: images/train\n")
    elif what == "no train folder":
        shutil.rmtree(tmp_path / "annotations")
        yolo(tmp_path, "", "names: [a]\ntrain: nowhere\n")
    return tmp_path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", r"nowhere: no such file or folder"),
        ("nothing there", r"looked for COCO .* YOLO .* VOC .* --format"),
        ("empty file", r"train\.json: the annotation file is empty"),
        ("broken json", r"train\.json: broken JSON at line 2 column 16"),
        ("not coco", r'train\.json: not COCO: it has no list "annotations"'),
        ("no file name", r'train\.json: images\[0\] needs an integer "id" and a text "file_name"'),
        ("no images listed", r"train split lists no image"),
        ("no images there", r"no usable image: 2 x missing image; the first: annotations/train\.json image 0"),
        ("no train", r"no train split, only val"),
        ("two train files", r"two annotation files for train: .*my_train\.json and .*train\.json"),
        ("two formats", r"looks like coco and yolo; choose with --format"),
        ("one image", r"no val split, and 0\.1 of 1 images cannot be held out"),
        ("broken yaml", r"data\.yaml: broken YAML at line 2 column 6"),
        ("too few names", r"data\.yaml: `names` must be a list"),
        ("no train folder", r"data\.yaml: `train` is 'nowhere', but neither"),
    ],
)
def test_errors_are_one_line_that_names_the_file(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(TrainfitError, match=message) as caught:
        read_dataset(broken(tmp_path, what))
    assert "\n" not in str(caught.value)


def test_format_can_be_given(tmp_path: Path) -> None:
    path = broken(tmp_path, "two formats")
    assert read_dataset(path, format="yolo").format == "yolo"
    with pytest.raises(TrainfitError, match="--format coc: unknown; it is one of coco, yolo, voc"):
        read_dataset(path, format="coc")
    with pytest.raises(TrainfitError, match="not Pascal VOC"):
        read_dataset(path / "images", format="voc")
