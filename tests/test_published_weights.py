"""Published checkpoints mean here what they mean upstream: files, and what they are compared with, are upstream's own."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from rfdetr.assets.coco_classes import COCO_CLASSES
from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.models import build_criterion_from_config, build_model_from_config
from rfdetr.models.weights import load_pretrain_weights

from conftest import run
from trainfit.errors import TrainfitError
from trainfit.models.rfdetr.family import RfDetrKnobs
from trainfit.models.rfdetr.interop import starting_rows
from trainfit.models.rfdetr.weights_file import read_weights
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.tasks.detection.class_names import positions

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # upstream's remarks on random weights

SIDE = 64
NAMES = tuple(COCO_CLASSES.values())


def upstream_model(**changes: Any) -> tuple[Any, Any]:
    """Upstream's Nano for 64 px with the 91 rows of a published head, every weight random, and its configuration."""
    config = RFDETRNanoConfig(pretrain_weights=None, device="cpu", resolution=SIDE, num_classes=90, **changes)
    torch.manual_seed(0)
    model: Any = build_model_from_config(config.model_copy(update={"pretrain_weights": "none"}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, config


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with all 13 groups of 300 queries, and its file as published ones are: `args` without class names."""
    model, config = upstream_model()
    path = tmp_path_factory.mktemp("published") / "nano.pth"
    torch.save({"model": model.state_dict(), "args": published_args(config)}, path)
    return model, path


def published_args(config: Any) -> dict[str, Any]:
    names = ("num_classes", "num_queries", "group_detr", "num_select", "patch_size", "segmentation_head", "resolution")
    return {name: getattr(config, name) for name in names}


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    different = [key for key, value in ours.state_dict().items() if not torch.equal(value, expected[key])]
    assert not different


@pytest.mark.parametrize(
    ("groups", "queries", "with_args"),
    [(4, 300, True), (13, 100, True), (4, 100, True), (13, 300, True), (4, 100, False)],
)
def test_queries_and_groups_load_as_by_upstreams_loader(
    published: tuple[Any, Path], tmp_path: Path, groups: int, queries: int, with_args: bool
) -> None:
    path = published[1]
    if not with_args:
        path = tmp_path / "bare.pth"
        torch.save({"model": published[0].state_dict()}, path)
    # Classes that COCO has not: the heads then are upstream's too.
    workload = RfDetr("rfdetr-nano", ("x", "y"), RfDetrKnobs(resolution=96, groups=groups, num_queries=queries))
    ours = workload.build()
    theirs: Any = copy.deepcopy(ours)
    workload.load(ours, str(path))
    load_pretrain_weights(theirs, workload.config.model_copy(update={"pretrain_weights": str(path)}))
    assert_same(ours, theirs)
    assert torch.equal(
        ours.get_parameter("refpoint_embed.weight")[:queries], published[0].refpoint_embed.weight[:queries]
    )


def test_more_queries_or_groups_than_the_file_has_are_refused(published: tuple[Any, Path]) -> None:
    workload = RfDetr("rfdetr-nano", ("x",), RfDetrKnobs(resolution=SIDE, groups=14, num_queries=200))
    with pytest.raises(
        TrainfitError, match=r"13 query groups of 300 queries.*--groups 13 and --num-queries 200"
    ) as caught:
        workload.load(workload.build(), str(published[1]))
    assert "\n" not in str(caught.value)


def head_rows(model: torch.nn.Module, published: torch.nn.Module) -> tuple[int, ...]:
    """Which of the published rows the rows of `model`'s class heads are; they are the same ones in every head."""
    own, theirs = model.state_dict(), published.state_dict()
    same = (own["class_embed.weight"][:, None] == theirs["class_embed.weight"][None]).all(-1)
    assert same.any(1).all()
    rows = same.int().argmax(1).tolist()
    heads = [key for key in own if "class_embed." in key]
    assert len(heads) >= 4
    for key in heads:
        assert torch.equal(own[key], theirs[key][rows])
    return tuple(rows)


def test_all_class_heads_follow_the_names_of_coco(published: tuple[Any, Path]) -> None:
    model, path = published
    workload = RfDetr("rfdetr-nano", NAMES, RfDetrKnobs(resolution=SIDE, groups=2))
    ours = workload.build()
    (remark,) = workload.load(ours, str(path))
    assert "all 80 classes" in remark
    rows = head_rows(ours, model)
    assert rows[:80] == tuple(COCO_CLASSES)
    assert rows[80] not in COCO_CLASSES


def test_known_classes_follow_their_names_and_the_others_start_as_upstreams(published: tuple[Any, Path]) -> None:
    model, path = published
    workload = RfDetr("rfdetr-nano", ("fig", "Person", "date", "traffic_light"), RfDetrKnobs(resolution=SIDE, groups=1))
    ours = workload.build()
    (remark,) = workload.load(ours, str(path))
    assert "Person, traffic_light start" in remark
    assert "date, fig, which it does not name" in remark
    rows = head_rows(ours, model)
    assert rows[:4] == (0, 1, 2, 10)


@pytest.mark.parametrize(
    ("classes", "names", "rows"),
    [
        (("dog", "cat"), ("cat", "dog", ""), [1, 0, 2]),
        (("dog",), ("cat", "dog", ""), [1, 2]),
        (("cat", "fig"), ("fox", "cat", ""), [1, 0, 2]),  # row 1 is the cat's: the fig starts from the next free row
        (("a", "b", "cat", "d"), ("cat", ""), [1, 1, 0, 1, 1]),
        (("cat", "x"), ("x", "cat"), [1, 0, 0]),  # every row is a class: the last output has none of its own to take
    ],
)
def test_starting_rows(classes: Sequence[str], names: Sequence[str], rows: list[int]) -> None:
    assert starting_rows(positions(classes, names), names) == rows


def test_names_are_compared_exactly_before_they_are_compared_loosely() -> None:
    assert positions(("car", "Car", "CAR", "", "bus"), ("Car", "car", "")) == [1, 0, 0, None, None]


def test_weights_of_a_run_follow_class_names_too(tmp_path: Path) -> None:
    from trainfit.training.run_folder import save_weights

    knobs = RfDetrKnobs(resolution=SIDE, groups=1, num_queries=20)
    before = RfDetr("rfdetr-nano", ("cat", "dog", "fox"), knobs)
    trained = before.build()
    torch.nn.init.normal_(trained.get_parameter("class_embed.bias"))
    save_weights(tmp_path / "best.safetensors", trained.state_dict(), before.metadata())
    before.export(trained.state_dict(), tmp_path / "best.pth")
    after = RfDetr("rfdetr-nano", ("fox", "cat"), knobs)
    for name in ("best.safetensors", "best.pth"):
        ours = after.build()
        (remark,) = after.load(ours, str(tmp_path / name))
        assert "all 2 classes" in remark
        expected = trained.get_parameter("class_embed.bias")[[2, 0, 3]]
        assert torch.equal(ours.get_parameter("class_embed.bias"), expected)


def test_a_key_more_and_a_key_less_load_as_upstream_and_are_named(published: tuple[Any, Path], tmp_path: Path) -> None:
    state = dict(published[0].state_dict())
    del state["transformer.decoder.norm.bias"]
    state["backbone.0.added_later"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "old.pth")
    workload = RfDetr("rfdetr-nano", ("x", "y"), RfDetrKnobs(resolution=SIDE, groups=1))
    ours = workload.build()
    theirs: Any = copy.deepcopy(ours)
    first, _ = workload.load(ours, str(tmp_path / "old.pth"))
    assert "lacks transformer.decoder.norm.bias" in first
    assert "has besides backbone.0.added_later" in first
    load_pretrain_weights(theirs, workload.config.model_copy(update={"pretrain_weights": str(tmp_path / "old.pth")}))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.zeros(1)}, "3 is no name of a tensor"),
        ({"class_embed.weight": "text"}, "'class_embed.weight' is no name of a tensor"),
        ({"class_embed.bias": torch.zeros(10**5)}, "`class_embed` is no linear layer"),
        ({"class_embed.bias": torch.zeros(())}, "`class_embed` is no linear layer"),
    ],
)
def test_what_is_no_model_is_refused_before_anything_is_built(
    tmp_path: Path, change: dict[Any, Any], message: str
) -> None:
    state = {"class_embed.weight": torch.zeros(3, 2), "class_embed.bias": torch.zeros(3)} | change
    torch.save({"model": state}, tmp_path / "broken.pth")
    with pytest.raises(TrainfitError, match=message):
        read_weights(tmp_path / "broken.pth")


@dataclass(frozen=True, kw_only=True)
class World:
    """A COCO data set whose objects are some of what a model of upstream's detects in its images, moved a little."""

    folder: Path
    weights: Path
    truth: dict[str, Any]
    detections: list[dict[str, Any]]
    """Upstream's, as COCO results; their category ids are the head's rows."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("coco")
    model, config = upstream_model(group_detr=1)
    with torch.no_grad():
        model.class_embed.bias.normal_(-3, 1)
        model.class_embed.bias[1] = 2.0  # more than 100 persons an image
        model.refpoint_embed.weight.normal_(0, 0.3)
    torch.save({"model": model.state_dict(), "args": published_args(config)}, folder / "nano.pth")
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    for number in range(1, 5):
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        pixels = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
        for split in ("train", "val"):
            (folder / f"{split}2017").mkdir(exist_ok=True)
            pixels.save(folder / f"{split}2017" / f"{number}.png")
    detections = upstream_detections(model, config, folder, images)
    truth = {"images": images, "categories": [{"id": i, "name": name} for i, name in COCO_CLASSES.items()]}
    truth["annotations"] = some_as_objects(detections)
    for split in ("train", "val"):
        (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(truth))
    return World(folder=folder, weights=folder / "nano.pth", truth=truth, detections=detections)


def upstream_detections(model: Any, config: Any, folder: Path, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By upstream's model and `PostProcess`, at the images' own size, so that no resizing enters."""
    _, postprocess = build_criterion_from_config(config, TrainConfig(dataset_dir=".", output_dir="."))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = [np.asarray(Image.open(folder / "val2017" / each["file_name"])) for each in images]
    batch = [((torch.tensor(each) / 255 - mean) / std).permute(2, 0, 1) for each in pixels]
    with torch.no_grad():
        results = postprocess(model.eval()(batch), torch.tensor([[SIDE, SIDE]] * len(images)))
    rows: list[dict[str, Any]] = []
    for image, result in zip(images, results, strict=True):
        for box, score, label in zip(*(result[k].tolist() for k in ("boxes", "scores", "labels")), strict=True):
            corner, size = box[:2], [box[2] - box[0], box[3] - box[1]]
            rows.append({"image_id": image["id"], "category_id": label, "score": score, "bbox": [*corner, *size]})
    return rows


def some_as_objects(detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = []
    for number, row in enumerate(detections):
        x, y, width, height = row["bbox"]
        if number % 3 and row["category_id"] in COCO_CLASSES and min(width, height) > 2:
            box = [x, y, width * 0.93, height]
            objects.append(row | {"id": number + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    return objects


def silent(*_: object) -> None:
    """The library's progress lines, dropped."""


def oracle_ap(world: World, category_of_row: dict[int, int], max_detections: int) -> float:
    """COCO's evaluation of upstream's detections, with the class head's rows as `category_of_row` has them."""
    known = [row for row in world.detections if row["category_id"] in category_of_row]
    results = [row | {"category_id": category_of_row[row["category_id"]]} for row in known]
    truth = COCO(copy.deepcopy(world.truth), print_function=silent)
    run_ = COCOeval_faster(truth, truth.loadRes(results), "bbox", print_function=silent)
    run_.params.maxDets = [1, 10, max_detections]
    run_.evaluate()
    run_.accumulate()
    precision = run_.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean())


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run("evaluate", *arguments, "--device", "cpu", "--json") == 0
    return json.loads(capsys.readouterr().out)["bbox"]


def test_evaluate_gives_the_ap_of_a_published_checkpoint(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    published = ("--weights", world.weights, "--model", "rfdetr-nano", "--data", world.folder)
    own_ids = {row: row for row in COCO_CLASSES}
    result = evaluated(capsys, *published)
    assert result["max_detections"] == TrainConfig(dataset_dir=".", output_dir=".").eval_max_dets == 500
    assert result["ap"] == pytest.approx(oracle_ap(world, own_ids, 500), abs=1e-6)
    assert 0.05 < result["ap"] < 0.95
    at_100 = evaluated(capsys, *published, "--max-detections", 100)["ap"]
    assert at_100 == pytest.approx(oracle_ap(world, own_ids, 100), abs=1e-6)
    assert at_100 < result["ap"] - 0.01


def test_evaluate_takes_the_names_of_a_fine_tuned_checkpoint(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(world.weights, weights_only=True)
    names = ["person", "zebra", *(f"thing {row}" for row in range(88))]  # the row of most detections is the zebra's
    torch.save({"model": content["model"], "args": content["args"] | {"class_names": names}}, tmp_path / "tuned.pth")
    result = evaluated(capsys, tmp_path / "tuned.pth", "--model", "rfdetr-nano", "--data", world.folder)
    ids = {name: number for number, name in COCO_CLASSES.items()}
    assert result["ap"] == pytest.approx(oracle_ap(world, {0: ids["person"], 1: ids["zebra"]}, 500), abs=1e-6)
    found = {row["name"]: row["detections"] for row in result["per_class"]}
    assert found["zebra"] == sum(row["category_id"] == 1 for row in world.detections) > 400
    assert set(found) == set(NAMES)


def test_detect_names_the_classes_of_a_published_checkpoint(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    image = world.folder / "val2017" / "1.png"
    options = ("--model", "rfdetr-nano", "--threshold", 0, "--device", "cpu", "--json")
    assert run("detect", world.weights, image, *options) == 0
    found = json.loads(capsys.readouterr().out)["detections"]
    expected = [row for row in world.detections if row["image_id"] == 1 and row["category_id"] in COCO_CLASSES]
    assert [row["class"] for row in found] == [COCO_CLASSES[row["category_id"]] for row in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "sample"], "--weights FILE --model NAME"),
        (["a", "--weights", "b", "--data", "sample"], "give one of them"),
        (["WEIGHTS", "--data", "sample"], "give --model"),
        (["WEIGHTS", "--model", "timm:resnet18", "--data", "sample"], "cannot be evaluated yet"),
        (["WEIGHTS", "--model", "rfdetr-nano", "--data", "sample"], "was trained on others"),
        (["nothing.pth", "--data", "sample"], "nothing.pth is not a run folder"),
        (["WEIGHTS", "--max-detections", "0", "--data", "sample"], "--max-detections must be at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(
    world: World, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run("evaluate", *[str(world.weights) if each == "WEIGHTS" else each for each in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
