"""Curves, confusion matrix and pictures of an evaluation, and `trainfit detect` on images, folders and videos."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image

import trainfit
from conftest import run
from trainfit.reports.graphics_html import graphics_html
from trainfit.tasks.charts import write_graphics
from trainfit.tasks.detection import comparison
from trainfit.tasks.detection.coco_ap import Detections
from trainfit.tasks.detection.masks import encode_masks
from trainfit.tasks.detection.matching import RECALLS, Matching
from trainfit.tasks.detection.metric import DetectionMetric
from trainfit.tasks.detection.samples import ImageDetections, ImageRecord
from trainfit.tasks.drawing import draw_objects
from trainfit.tasks.graphics import Matrix, Plot
from trainfit.tasks.media import find_media, read_frames
from trainfit.tasks.palette import color
from trainfit.training import detecting, inference

CLASSES = ("cat", "dog", "bird")


def random_image(
    rng: np.random.Generator, number: int, path: Path = Path("none.png")
) -> tuple[ImageRecord, Detections]:
    """Objects, and detections of which most are near one; a crowd now and then."""
    objects = int(rng.integers(0, 6))
    corner = rng.uniform(0, 60, (objects, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 30, (objects, 2))], 1)
    labels = rng.integers(0, 3, objects)
    crowd = rng.random(objects) < 0.15
    near = boxes[rng.integers(0, objects, 8)] + rng.normal(0, 2.5, (8, 4)) if objects else np.zeros((0, 4))
    far = rng.uniform(0, 40, (4, 2))
    found = np.concatenate([near, np.concatenate([far, far + 20], 1)])
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    record = ImageRecord(
        id=number,
        path=path,
        width=96,
        height=96,
        boxes=boxes,
        classes=labels.astype(np.int64),
        crowd=crowd,
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        segmentations=(None,) * objects,
        object_ids=np.arange(objects),
    )
    scores = rng.permutation(np.linspace(0.02, 0.98, len(found)))
    detections = Detections(image_id=number, boxes=found, scores=scores, classes=rng.integers(0, 3, len(found)))
    return record, detections


def matched(pairs: list[tuple[ImageRecord, Detections]]) -> Matching:
    matching = Matching(CLASSES, 100)
    for record, found in pairs:
        matching.add(record, found)
    return matching


@pytest.mark.parametrize("seed", range(4))
def test_the_area_under_the_curve_is_cocos(seed: int) -> None:
    """Mean precision at 101 recalls is AP50 of the COCO evaluation (faster-coco-eval), crowds included."""
    rng = np.random.default_rng(seed)
    pairs = [random_image(rng, number) for number in range(1, 40)]
    metric = DetectionMetric([record for record, _ in pairs], CLASSES, masks=False, max_detections=100)
    for record, found in pairs[:-3]:  # images without detections have objects all the same
        tensors: dict[str, Any] = {
            name: torch.from_numpy(getattr(found, name)) for name in ("boxes", "scores", "classes")
        }
        metric.add([ImageDetections(image_id=record.id, **tensors)])
    evaluation = metric.result()
    curves = metric.matching.curves()
    for c, name in enumerate(CLASSES):
        (ap50,) = [row.ap50 for row in evaluation.details["bbox"].per_class if row.name == name]
        assert np.mean(curves.precision(c)) == pytest.approx(ap50, abs=1e-9)
    plots = [graphic for graphic in evaluation.graphics if isinstance(graphic, Plot)]
    assert [plot.name for plot in plots] == ["precision-recall", "f1"]
    assert f"AP50 {100 * (evaluation.figures['bbox AP50'] or 0):.1f}" in plots[0].lines[0][0]


def test_f1_counts_what_has_the_score() -> None:
    rng = np.random.default_rng(7)
    pairs = [random_image(rng, number) for number in range(1, 30)]
    curves = matched(pairs).curves()
    for place in (5, 30, 50, 77):
        sure = [
            (r, Detections(image_id=r.id, boxes=d.boxes[k], scores=d.scores[k], classes=d.classes[k]))
            for r, d in pairs
            for k in [d.scores >= RECALLS[place]]
        ]
        part = matched(sure).curves()
        for c in range(3):
            detections = int((part.labels == c).sum())
            right = int(part.hits[part.labels == c].sum())
            assert curves.f1(c)[place] == pytest.approx(2 * right / (detections + part.objects[c]))


def test_the_confusion_matrix_is_supervisions() -> None:
    supervision: Any = pytest.importorskip("supervision")
    rng = np.random.default_rng(3)
    total = np.zeros((4, 4), np.int64)
    pairs: list[tuple[ImageRecord, Detections]] = []
    for number in range(1, 60):
        record, found = random_image(rng, number)
        record.crowd[:] = False  # supervision knows no crowds
        pairs.append((record, found))
        predictions = np.column_stack([found.boxes, found.classes, found.scores]).astype(np.float32)
        targets = np.column_stack([record.boxes, record.classes]).astype(np.float32)
        total += supervision.ConfusionMatrix.evaluate_detection_batch(predictions, targets, 3, 0.5, 0.5)
    matching = matched(pairs)
    assert (matching.confusion == total).all()
    (matrix,) = [graphic for graphic in matching.graphics() if isinstance(graphic, Matrix)]
    assert matrix.rows == (*CLASSES, "no object")
    assert np.array_equal(matrix.values, total)


def test_many_classes_share_a_row() -> None:
    matching = Matching(tuple(f"class {i}" for i in range(80)), 100)
    matching.objects[:] = np.arange(80)
    matching.confusion[:] = np.arange(81)[:, None]
    (matrix,) = [graphic for graphic in matching.graphics() if isinstance(graphic, Matrix)]
    assert len(matrix.rows) == 27
    assert "class 79" in matrix.rows
    assert "others" in matrix.rows
    assert sum(map(sum, matrix.values)) == matching.confusion.sum()


def test_pictures_and_curves_are_files_and_parts_of_a_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pairs: list[tuple[ImageRecord, Detections]] = []
    for number in range(1, 5):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)).save(path)
        pairs.append(random_image(rng, number, path))
    matching = matched(pairs)
    pictures = [comparison.picture(n, r, d, CLASSES, masks=False) for n, (r, d) in enumerate(pairs, 1)]
    (tmp_path / "4.png").unlink()  # gone since
    notes: list[str] = []
    write_graphics([*pictures, *matching.graphics()], tmp_path / "out", notes.append)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["confusion.png", "f1.png", "precision-recall.png", "val-1.png", "val-2.png", "val-3.png"]
    assert notes == [f"val-4: {tmp_path / '4.png'}: no such file; replace the file or take it out of the data set"]
    page = graphics_html(tmp_path / "out")
    assert page.count("data:image/jpeg;base64") == 3
    assert page.count("<polyline") == 8  # the mean and three classes, twice
    assert "Confusion matrix" in page
    assert graphics_html(tmp_path) == ""


def test_masks_are_drawn_in_the_colour_of_their_class() -> None:
    image = Image.new("RGB", (80, 60), (0, 0, 0))
    mask = np.zeros((60, 80), np.bool_)
    mask[20:40, 20:40] = True
    drawn = np.array(draw_objects(image, [(10, 15, 60, 50)], ["cat 0.9"], [color(3)], [mask]))
    assert np.allclose(drawn[35, 30], 0.45 * np.array(color(3)), atol=1)
    assert tuple(drawn[50, 30]) == color(3)  # the box
    assert tuple(drawn[45, 70]) == (0, 0, 0)
    assert len({color(number) for number in range(200)}) == 200


# trainfit detect


def write_video(path: Path, frames: int = 6) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = np.full((48, 64, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two images, a damaged one and a video, and a model that detects one box with a mask in everything."""

    def outputs(_: Any, paths: list[Path], *, micro_batch: int) -> list[ImageDetections]:
        assert len(paths) <= micro_batch
        masks = torch.zeros(2, 48, 64, dtype=torch.bool)
        masks[0, 10:20, 10:30] = True
        boxes = torch.tensor([[10.0, 10.0, 30.0, 20.0], [0.0, 0.0, 5.0, 5.0]])
        found: dict[str, Any] = {"boxes": boxes, "scores": torch.tensor([0.9, 0.2]), "classes": torch.tensor([1, 0])}
        return [ImageDetections(image_id=n, masks=encode_masks(masks), **found) for n in range(len(paths))]

    setting = SimpleNamespace(family=SimpleNamespace(task="detection"))
    loaded = SimpleNamespace(workload=SimpleNamespace(setting=setting, classes=("cat", "dog")), remarks=())

    def load_model(*_: Any, **__: Any) -> Any:
        return loaded

    monkeypatch.setattr(inference, "load_model", load_model)
    monkeypatch.setattr(detecting, "infer", outputs)
    folder = tmp_path / "files"
    (folder / "more").mkdir(parents=True)
    for name in ("b.jpg", "a.png", "more/a.png"):
        Image.new("RGB", (64, 48), (90, 90, 90)).save(folder / name)
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no picture")
    write_video(folder / "c.mp4")
    return folder


def test_a_folder_a_pattern_and_a_video(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results as lines, JSON, COCO's file, pictures and a video; a damaged file of a folder is noted."""
    words = ("--draw", tmp_path / "drawn", "--out", tmp_path / "all.json", "--coco", tmp_path / "coco.json")
    assert run("detect", "RUN", files, f"{files}/more/*.png", "--every", 2, *words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"{files / 'a.png'}  dog  0.900  [10.0, 10.0, 30.0, 20.0]"
    assert [line.split("  ")[0] for line in out.splitlines()[2:5]] == ["frame 0", "frame 2", "frame 4"]
    assert len(out.splitlines()) == 6
    assert f"left out: {files / 'bad.jpg'}" in err
    rows = json.loads((tmp_path / "all.json").read_text())["detections"]
    assert [row.get("frame") for row in rows] == [None, None, 0, 2, 4, None]
    assert rows[3]["time_s"] == 0.4
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a-2.png", "a.png", "b.png", "c.mp4"]
    (drawn,) = find_media([tmp_path / "drawn" / "c.mp4"], print)
    assert len(list(read_frames(drawn))) == 3
    coco: Any = COCO(str(tmp_path / "coco.json"))
    annotations = coco.loadAnns(coco.getAnnIds())
    assert [row["category_id"] for row in annotations] == [2] * 6
    assert [round(row["area"]) for row in annotations] == [200] * 6
    assert coco.annToMask(annotations[0])[15, 20] == 1
    assert [image["width"] for image in coco.loadImgs(coco.getImgIds())] == [64] * 6
    assert run("detect", "RUN", files, "--out", tmp_path / "all.json") == 2  # never overwritten without --force
    assert "exists; choose another name or use --force" in capsys.readouterr().err
    assert run("detect", "RUN", files / "a.png", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["detections"]) == 1
    assert len(trainfit.detect("RUN", [files / "c.mp4"], every=3)) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.jpg", "nothing.jpg: missing image: no such file"),
        ("bad.jpg", "bad.jpg: unreadable image"),
        ("empty", "no image and no video in"),
        ("*.tif", "no image and no video in"),
        ("bad.mp4", "bad.mp4: unreadable video"),
        ("notes.txt", "notes.txt: unreadable image"),
    ],
)
def test_paths_are_checked_before_the_model_is_loaded(
    name: str, message: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "empty").mkdir()
    (files / "bad.mp4").write_bytes(b"no video")

    def load_model(*_: Any, **__: Any) -> Any:
        pytest.fail("loaded")

    monkeypatch.setattr(inference, "load_model", load_model)
    assert run("detect", "RUN", files / name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_result_that_is_broken_off_leaves_no_file(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(detecting, "infer", broken)
    assert run("detect", "RUN", files / "a.png", "--out", tmp_path / "a.json", "--coco", tmp_path / "c.json") == 130
    assert not list(tmp_path.glob("*.json*"))
    assert not list(tmp_path.glob(".*"))
