"""COCO evaluation against pycocotools, on real annotations and on small hostile ones."""

import contextlib
import io
import json
import logging
import os
import socket
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as oracle_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trainfit.errors import TrainfitError
from trainfit.reports.tables import table_text
from trainfit.tasks.detection.coco_ap import ApResult, Detections, Evaluator, IouKind, gather_detections
from trainfit.tasks.detection.masks import encode_masks
from trainfit.tasks.detection.metric import table_of
from trainfit.tasks.detection.samples import ImageRecord, packed

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not beside this checkout")
World = dict[str, Any]
"""A COCO file as read from JSON."""


def evaluate(
    records: Sequence[ImageRecord],
    detections: Iterable[Detections],
    classes: Sequence[str],
    *,
    iou: IouKind,
    max_detections: int = 100,
) -> ApResult:
    evaluator = Evaluator(records, classes, iou=iou, max_detections=max_detections)
    for each in detections:
        evaluator.add(each)
    return evaluator.result()


def records_of(world: World) -> list[ImageRecord]:
    index = {category["id"]: number for number, category in enumerate(world["categories"])}
    by_image: dict[int, list[World]] = {image["id"]: [] for image in world["images"]}
    for annotation in world["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    records: list[ImageRecord] = []
    for image in world["images"]:
        objects = by_image[image["id"]]
        boxes = np.array([o["bbox"] for o in objects], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        records.append(
            ImageRecord(
                id=image["id"],
                path=Path(image.get("file_name", f"{image['id']}.jpg")),
                width=image["width"],
                height=image["height"],
                boxes=boxes,
                classes=np.array([index[o["category_id"]] for o in objects], np.int64),
                crowd=np.array([o.get("iscrowd", 0) for o in objects], np.bool_),
                areas=np.array([o["area"] for o in objects], np.float64),
                segmentations=tuple(packed(o.get("segmentation")) for o in objects),
                object_ids=np.array([o["id"] for o in objects], np.int64),
            )
        )
    return records


def names_of(world: World) -> list[str]:
    return [category["name"] for category in world["categories"]]


def bccd() -> World:
    """The blood cell data from its XML, by this test's own reading; the two empty boxes are skipped."""
    images: list[World] = []
    objects: list[World] = []
    names = ["Platelets", "RBC", "WBC"]
    for number, path in enumerate(sorted((DATA / "bccd" / "Annotations").glob("*.xml"))):
        root = ET.parse(path).getroot()
        images.append({"id": number, "width": 640, "height": 480})
        for item in root.iter("object"):
            x0, y0, x1, y1 = (int(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
            if x1 > x0 and y1 > y0:
                box, label = [x0, y0, x1 - x0, y1 - y0], names.index(item.findtext("name", "")) + 1
                common = {"id": len(objects) + 1, "image_id": number, "category_id": label, "iscrowd": 0}
                objects.append(common | {"bbox": box, "area": box[2] * box[3]})
    categories = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
    return {"images": images, "annotations": objects, "categories": categories}


def load(name: str) -> World:
    if name == "bccd":
        return bccd()
    files = {
        "coco train": "coco_mini_cc/annotations/instances_train2017.json",
        "coco val": "coco_mini_cc/annotations/instances_val2017.json",
        "fruits": "fruits_nuts/trainval.json",
    }
    return json.loads((DATA / files[name]).read_text())


def perturbed(world: World, iou: IouKind, seed: int) -> list[Detections]:
    """Wrong detections of each kind: moved, wrong class, twice, missing, out of nothing; many scores are equal."""
    rng = np.random.default_rng(seed)
    records, classes, detections = records_of(world), len(world["categories"]), list[Detections]()
    for record in records:
        rows: list[tuple[NDArray[np.float64], int, float, NDArray[np.uint8] | None]] = []
        for row in range(len(record.classes)):
            for _ in range(rng.choice(3, p=[0.2, 0.6, 0.2])):
                size = np.tile(record.boxes[row, 2:] - record.boxes[row, :2], 2)
                box = record.boxes[row] + rng.normal(0, float(rng.choice([0, 0.03, 0.2])), 4) * size
                box = np.concatenate([np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:]) + 1])
                label = int(record.classes[row]) if rng.random() < 0.85 else int(rng.integers(classes))
                mask = moved(record, row, rng) if iou == "segm" else None
                rows.append((box, label, round(float(rng.random()), 1), mask))
        x, y = rng.integers(0, record.width - 40), rng.integers(0, record.height - 40)
        blank = np.zeros((record.height, record.width), np.uint8)
        blank[y : y + 30, x : x + 30] = 1
        rows.append((np.array([x, y, x + 30, y + 30], np.float64), int(rng.integers(classes)), 0.95, blank))
        detections.append(
            Detections(
                image_id=record.id,
                boxes=np.array([r[0] for r in rows], np.float32),
                classes=np.array([r[1] for r in rows]),
                scores=np.array([r[2] for r in rows], np.float32),
                masks=encode_masks(torch.from_numpy(np.array([r[3] for r in rows]) > 0)) if iou == "segm" else None,
            )
        )
    return detections


def moved(record: ImageRecord, row: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    shape: Any = record.segmentations[row]
    parts: Any = oracle_mask.frPyObjects(
        list(shape) if isinstance(shape, tuple) else shape, record.height, record.width
    )
    mask: NDArray[np.uint8] = oracle_mask.decode(oracle_mask.merge(parts) if isinstance(parts, list) else parts)
    return np.roll(mask, tuple(rng.integers(-3, 4, 2)), (0, 1))


def oracle(
    world: World, detections: Sequence[Detections], iou: IouKind, max_detections: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The oracle's precision (T, R, K, A, M) and recall (T, K, A, M) at 1, 10 and `max_detections`."""
    categories = [category["id"] for category in world["categories"]]
    results: list[World] = []
    for found in detections:
        for row in range(len(found.scores)):
            x0, y0, x1, y1 = found.boxes[row].astype(np.float64).tolist()
            shape = {"bbox": [x0, y0, x1 - x0, y1 - y0]} if found.masks is None else {"segmentation": found.masks[row]}
            label = categories[int(found.classes[row])]
            results.append(
                {"image_id": found.image_id, "category_id": label, "score": float(found.scores[row])} | shape
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found_coco = COCO(), COCO()
        truth.dataset = json.loads(json.dumps(world))
        truth.createIndex()
        if results:
            found_coco = truth.loadRes(cast(Any, results))  # typed as a file name only
        run = COCOeval(truth, found_coco, iou)
        # Only the default limits are in pycocotools' own summary, so the arrays are compared.
        run.params.maxDets = [1, 10, max_detections]
        run.evaluate()
        run.accumulate()
    return run.eval["precision"], run.eval["recall"]


def mean(values: NDArray[np.float64]) -> float | None:
    return float(np.mean(values[values > -1])) if (values > -1).any() else None


def twelve(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> list[float | None]:
    whole = [precision[..., 0, 2], precision[0, ..., 0, 2], precision[5, ..., 0, 2]]
    sizes = [precision[..., area, 2] for area in (1, 2, 3)]
    recalls = [recall[..., 0, limit] for limit in (0, 1, 2)] + [recall[..., area, 2] for area in (1, 2, 3)]
    return [mean(values) for values in whole + sizes + recalls]


def ours(result: ApResult) -> list[float | None]:
    r = result
    whole = [r.ap, r.ap50, r.ap75, r.ap_small, r.ap_medium, r.ap_large]
    return [*whole, r.ar_1, r.ar_10, r.ar_max, r.ar_small, r.ar_medium, r.ar_large]


def assert_equal(a: Sequence[float | None], b: Sequence[float | None]) -> None:
    assert [x is None for x in a] == [x is None for x in b]
    np.testing.assert_allclose([x or 0 for x in a], [x or 0 for x in b], rtol=0, atol=1e-12)


def assert_as_oracle(
    world: World, detections: Sequence[Detections], iou: IouKind, max_detections: int = 100
) -> ApResult:
    precision, recall = oracle(world, detections, iou, max_detections)
    result = evaluate(records_of(world), iter(detections), names_of(world), iou=iou, max_detections=max_detections)
    assert_equal(ours(result), twelve(precision, recall))
    classes = range(len(world["categories"]))
    assert_equal([c.ap for c in result.per_class], [mean(precision[:, :, k, 0, 2]) for k in classes])
    assert_equal([c.ap50 for c in result.per_class], [mean(precision[0, :, k, 0, 2]) for k in classes])
    assert_equal([c.ar for c in result.per_class], [mean(recall[:, k, 0, 2]) for k in classes])
    return result


@needs_data
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools decodes a mask so
@pytest.mark.parametrize(
    ("name", "iou"),
    [
        ("coco train", "bbox"),
        ("coco train", "segm"),
        ("coco val", "bbox"),
        ("coco val", "segm"),
        ("fruits", "bbox"),
        ("fruits", "segm"),
        ("bccd", "bbox"),
    ],
)
def test_real_data_as_pycocotools(name: str, iou: IouKind) -> None:
    world = load(name)
    result = assert_as_oracle(world, perturbed(world, iou, seed=3), iou)
    assert result.ap is not None
    assert 0.05 < result.ap < 0.95
    crowds = sum(o["iscrowd"] for o in world["annotations"])
    assert (result.images, result.crowds) == (len(world["images"]), crowds)
    assert result.objects == len(world["annotations"]) - crowds == sum(c.objects for c in result.per_class)


@needs_data
def test_summary_of_pycocotools_itself() -> None:
    """The twelve of COCOeval.summarize, which `twelve` above restates."""
    world = load("coco val")
    detections = perturbed(world, "bbox", seed=5)
    names = [category["id"] for category in world["categories"]]
    results = [
        {"image_id": d.image_id, "category_id": names[c], "score": float(s), "bbox": [*b[:2], *(b[2:] - b[:2])]}
        for d in detections
        for b, c, s in zip(d.boxes.astype(np.float64), d.classes, d.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(DATA / "coco_mini_cc/annotations/instances_val2017.json")
        run = COCOeval(truth, truth.loadRes(cast(Any, results)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    result = evaluate(records_of(world), detections, names_of(world), iou="bbox")
    assert_equal(ours(result), [None if x == -1 else x for x in run.stats])


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, list[Detections], int]:
    """Few images on a coarse grid: equal boxes, overlaps of exactly a threshold, equal scores, crowds, empty images."""
    grid, size, label = st.integers(0, 5).map(lambda n: n * 20), st.sampled_from([20, 40, 60, 100]), st.integers(0, 2)
    box = st.tuples(grid, grid, size, size)
    world: World = {"images": [], "annotations": [], "categories": [{"id": n, "name": str(n)} for n in (4, 7, 9)]}
    detections: list[Detections] = []
    for image in range(draw(st.integers(1, 3))):
        world["images"].append({"id": image, "width": 220, "height": 220})
        for (x, y, w, h), c, crowd in draw(st.lists(st.tuples(box, label, st.sampled_from([0, 0, 0, 1])), max_size=5)):
            common = {"id": len(world["annotations"]) + 1, "image_id": image, "category_id": (4, 7, 9)[c]}
            world["annotations"].append(common | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": crowd})
        found = draw(st.lists(st.tuples(box, label, st.integers(0, 3)), max_size=14))
        if found or draw(st.booleans()):
            boxes = np.array([b for b, _, _ in found], np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            classes, scores = np.array([c for _, c, _ in found], np.int64), np.array([s / 3 for _, _, s in found])
            detections.append(Detections(image_id=image, boxes=boxes, classes=classes, scores=scores))
    return world, detections, draw(st.sampled_from([11, 100, 500]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(worlds())
def test_small_worlds_as_pycocotools(case: tuple[World, list[Detections], int]) -> None:
    world, detections, max_detections = case
    assert_as_oracle(world, detections, "bbox", max_detections)


def one_image(boxes: Sequence[Sequence[float]]) -> World:
    objects = [
        {"id": n, "image_id": 7, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, box in enumerate(boxes, 1)
    ]
    image = {"id": 7, "width": 2000, "height": 2000}
    return {"images": [image], "annotations": objects, "categories": [{"id": 1, "name": "cell"}]}


def test_limit_of_detections() -> None:
    """150 objects, each found: recall is what the limit lets through, and equal to pycocotools at every limit."""
    world = one_image([[13 * n, 0, 10, 10] for n in range(150)])
    truth = records_of(world)[0]
    scores = np.random.default_rng(0).random(150)
    found = [Detections(image_id=7, boxes=truth.boxes, classes=truth.classes, scores=scores)]
    for limit, recall in ((20, 20 / 150), (100, 100 / 150), (500, 1.0)):
        result = assert_as_oracle(world, found, "bbox", limit)
        assert (result.ar_max, result.ar_1, result.ar_10) == pytest.approx((recall, 1 / 150, 10 / 150))
    assert evaluate([truth], found, ["cell"], iou="bbox").ar_max == pytest.approx(100 / 150)
    assert evaluate([truth], found, ["cell"], iou="bbox", max_detections=4).ar_max == pytest.approx(4 / 150)


def test_nothing_found_and_nothing_to_find() -> None:
    world = one_image([[0, 0, 50, 50]])
    nothing = Detections(
        image_id=7, boxes=np.zeros((0, 4)), classes=np.zeros(0, np.int64), scores=np.zeros(0), masks=[]
    )
    for detections in ([], [nothing]):
        result = evaluate(records_of(world), detections, ["cell", "ghost"], iou="bbox")
        assert (result.ap, result.ar_max, result.ap_small, result.ap_medium) == (0, 0, None, 0)
        assert [(c.name, c.ap, c.objects) for c in result.per_class] == [("cell", 0, 1), ("ghost", None, 0)]
    world["annotations"][0]["segmentation"] = [[0, 0, 50, 0, 50, 50, 0, 50]]
    assert evaluate(records_of(world), [nothing], ["cell"], iou="segm").ap == 0
    world["annotations"] = []
    assert evaluate(records_of(world), [], ["cell"], iou="bbox").ap is None


def test_order_of_images_is_free_and_the_library_is_silent(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    world = {
        "images": [{"id": n, "width": 99, "height": 99} for n in (3, 1, 2)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [n, n, 40, 40], "area": 1600, "iscrowd": 0}
            for n in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    # All scores are equal: only the order of images decides the precision at each recall.
    boxes = {1: [0, 0, 40, 40], 2: [60, 60, 90, 90], 3: [3, 3, 43, 43]}
    found = [
        Detections(image_id=n, boxes=np.array([box], float), classes=np.array([0]), scores=np.array([0.5]))
        for n, box in boxes.items()
    ]
    results = {evaluate(records_of(world), order, ["cell"], iou="bbox") for order in (found, found[::-1])}
    assert len(results) == 1
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


def test_faults_are_named() -> None:
    world = one_image([[0, 0, 50, 50]])
    records = records_of(world)
    found = Detections(image_id=7, boxes=np.zeros((1, 4)), classes=np.array([0]), scores=np.array([0.5]), masks=[{}])
    with pytest.raises(TrainfitError, match=r"7\.jpg object 0 has no mask"):
        evaluate(records, [found], ["cell"], iou="segm")
    with pytest.raises(ValueError, match="image 7 has detections twice"):
        evaluate(records, [found, found], ["cell"], iou="bbox")
    with pytest.raises(ValueError, match="image 7 has detections but no record"):
        evaluate([], [found], ["cell"], iou="bbox")
    diverged = Detections(image_id=7, boxes=found.boxes, classes=found.classes, scores=np.array([np.nan]))
    with pytest.raises(ValueError, match="must not be NaN"):
        evaluate(records, [diverged], ["cell"], iou="bbox")


def test_masks_encode_as_pycocotools() -> None:
    masks = torch.rand(5, 37, 21, generator=torch.Generator().manual_seed(0)) > 0.7
    masks[4] = False
    expected = [oracle_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    assert [(list(r["size"]), r["counts"]) for r in encode_masks(masks)] == [(r["size"], r["counts"]) for r in expected]
    assert encode_masks(masks[:0]) == []


def gather_on_rank(rank: int, address: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    mine = [
        Detections(image_id=n, boxes=np.full((1, 4), float(rank)), classes=np.array([n]), scores=np.array([0.5]))
        for n in ((0, 2, 4) if rank == 0 else (1, 3, 0))  # a sampler repeats image 0 to fill the last batch
    ]
    got = gather_detections(iter(mine))
    rows = [[d.image_id, int(d.classes[0]), float(d.boxes[0, 0])] for d in got]
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def test_gather_over_two_processes(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    torch.multiprocessing.spawn(gather_on_rank, (address, os.fspath(tmp_path)), nprocs=2)
    expected = [[0, 0, 0.0], [2, 2, 0.0], [4, 4, 0.0], [1, 1, 1.0], [3, 3, 1.0]]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [expected, expected]


def test_gather_alone_drops_repeats() -> None:
    found = [
        Detections(image_id=n, boxes=np.zeros((0, 4)), classes=np.zeros(0, int), scores=np.zeros(0)) for n in (1, 2, 1)
    ]
    assert gather_detections(found) == found[:2]


def test_text() -> None:
    world = one_image([[0, 0, 50, 50]])
    truth = records_of(world)[0]
    found = Detections(image_id=7, boxes=truth.boxes, classes=truth.classes, scores=np.array([0.9]))
    result = evaluate([truth], [found], ["cell", "ghost"], iou="bbox")
    line = (
        "boxes: AP 1.000  AP50 1.000  AP75 1.000  small -  medium 1.000  large -  AR@100 1.000  (1 images, 1 objects)"
    )
    assert table_of(result).title == line
    assert table_text(table_of(result)).splitlines() == [
        line,
        "class     AP   AP50     AR   objects  detections",
        "cell   1.000  1.000  1.000         1           1",
        "ghost      -      -      -         0           0",
    ]
