"""Mask R-CNN trains: exact for any cut and on any number of ranks, with torchvision's weights, and from the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

import trainfit
from conftest import rows, run, shared_data
from small_rcnn import gradient, rank_gradient, small_rcnn, window
from test_families import CPU, FirstOfEach, error, gradients, scenes, tiny_rcnn, torchvision_gradient
from trainfit.errors import TrainfitError
from trainfit.models.build import build_trainable
from trainfit.models.images import crowded_sample
from trainfit.models.maskrcnn import interop
from trainfit.models.maskrcnn.data import make_sample
from trainfit.models.maskrcnn.family import MaskRcnnSetting, assumptions, drawn_sizes, for_data, require_sides
from trainfit.models.maskrcnn.losses import make_objective
from trainfit.models.maskrcnn.model import build_model
from trainfit.models.maskrcnn.picks import own_stream
from trainfit.models.maskrcnn.workload import MaskRcnn, from_upstream
from trainfit.models.setting import make_setting
from trainfit.step.terms import largest_image
from trainfit.step.window import accumulate, cut
from trainfit.tasks.augment import OWN
from trainfit.tasks.detection.masks import decode_rle
from trainfit.tasks.detection.samples import ImageRecord
from trainfit.training import run_folder
from trainfit.training.loader import WindowPlan, groups_of

PACKAGE = Path(trainfit.__file__).resolve().parents[1]
SMALL = ["--resolution", 64, "--max-size", 96, "--rois-per-image", 16, "--proposals", 40, 40, "--workers", 0]
TINY: dict[str, Any] = {"resolution": 64, "max_size": 96, "rois_per_image": 16, "proposals": (60, 60)}


def test_random_picks_are_those_of_any_other_cut(capsys: pytest.CaptureFixture[str]) -> None:
    model, samples = small_rcnn(), window()
    known = gradient(model, [samples])
    found = [
        error(gradient(model, parts), known) for parts in (cut(samples, 1), cut(samples, 3), [samples[:1], samples[1:]])
    ]
    with capsys.disabled():
        print(f"\nMask R-CNN, random picks, any cut: error {found}")
    assert max(found) <= 1e-12
    torch.manual_seed(8)
    accumulate(model, make_objective(), [samples], device=CPU)  # other picks in the next window
    assert error({name: g - known[name] for name, g in gradients(model).items()}, known) > 1e-3


def test_an_images_stream_leaves_no_trace() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    drawn: list[torch.Tensor] = []
    for image in (1, 2, 1):
        with own_stream(image, CPU):
            drawn.append(torch.rand(4))
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_two_ranks_have_the_gradient_of_one_big_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mp.start_processes(rank_gradient, (str(tmp_path),), nprocs=2, start_method="spawn")
    known = gradient(small_rcnn(), cut(window(), 1))
    found = [error(torch.load(tmp_path / f"gradient-{rank}", weights_only=True), known) for rank in range(2)]
    with capsys.disabled():
        print(f"\nMask R-CNN on 2 ranks: error {found}")
    assert max(found) <= 1e-10


def test_r2_is_the_mean_of_torchvisions_losses() -> None:
    model, samples = tiny_rcnn(), scenes()
    known = torchvision_gradient(model, cut(samples, 1))
    model.zero_grad(set_to_none=True)
    accumulate(model, make_objective("R2"), cut(samples, 1), device=CPU)
    assert error(gradients(model), known) <= 1e-12  # a window's canvas is another: 0.4


def test_scales_of_regions_follow_from_the_strides_whatever_comes_first() -> None:
    setting = MaskRcnnSetting(model="maskrcnn-r50-v1", **TINY)
    known = torchvisions(1)
    known([torch.zeros(3, 64, 64)])
    model: Any = build_model(setting, classes=1).eval()
    landscape, canvas = crowded_sample(64, 96, objects=1, classes=1, masks=True), (96, 96)
    make_objective().terms(model.train(), [landscape], canvas)  # a feature of 24 rows for an image of 64: not 1/2
    for pool in ("box_roi_pool", "mask_roi_pool"):
        ours, theirs = getattr(model.roi_heads, pool), getattr(known.roi_heads, pool)
        assert ours.scales == theirs.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        assert vars(ours.map_levels) == vars(theirs.map_levels)


def test_the_counting_pass_moves_no_statistics_and_puts_them_back_when_it_fails() -> None:
    model: Any = build_model(MaskRcnnSetting(model="maskrcnn-r50-v2", **TINY), classes=3).double()
    model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler = FirstOfEach(12, 20), FirstOfEach(6, 10)
    samples, objective = scenes()[:2], make_objective()
    before = [buffer.clone() for buffer in model.buffers()]
    canvas = largest_image(samples)

    def refuse(*_arguments: Any) -> Any:
        objective.terms(model, samples[:1], canvas)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        accumulate(model, replace(objective, count=refuse), cut(samples, 1), device=CPU)
    assert all(torch.equal(buffer, old) for buffer, old in zip(model.buffers(), before, strict=True))
    accumulate(model, objective, cut(samples, 1), device=CPU)
    moved = [buffer.clone() for buffer in model.buffers()]
    for buffer, old in zip(model.buffers(), before, strict=True):
        buffer.copy_(old)
    for sample in (samples[1], samples[0]):  # the same forwards without counting: the last one's graph is kept
        objective.terms(model, [sample], canvas)
    assert all(torch.equal(buffer, new) for buffer, new in zip(model.buffers(), moved, strict=True))
    assert not torch.equal(moved[0], before[0])


def test_live_batch_norms_are_named_before_anything_trains() -> None:
    for name in ("maskrcnn-r50-v2", "fasterrcnn-r50-v2", "maskrcnn-r50-v1"):
        setting = MaskRcnnSetting(model=name)
        model = build_model(setting, classes=2)
        layers = [each for each, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
        parts = {"backbone.body": "backbone", "backbone.fpn": "FPN", "roi_heads.box_head": "box head"}
        found = Counter(parts.get(".".join(layer.split(".")[:2]), "mask head") for layer in layers)
        assert dict(found) == setting.live_batch_norms
        assert any("Live BatchNorm" in line for line in assumptions(setting)) == name.endswith("v2")
    for norm in ("frozen", "group"):
        model = build_model(MaskRcnnSetting(model="maskrcnn-r50-v2", norm=norm), classes=2)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(("stages", "trained"), [(0, 0), (None, 3), (5, 5)])
def test_stages_that_train(stages: int | None, trained: int) -> None:
    model = build_model(MaskRcnnSetting(model="maskrcnn-r50-v1", trainable_stages=stages), classes=2)
    body = model.get_submodule("backbone.body")
    names = {name.partition(".")[0] for name, parameter in body.named_parameters() if parameter.requires_grad}
    assert len(names) == trained


# ---- data


@pytest.fixture
def record(tmp_path: Path) -> ImageRecord:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    outline = (np.array([10.0, 20, 50, 20, 50, 70, 10, 70]),)
    return ImageRecord(
        id=5,
        path=tmp_path / "a.png",
        width=100,
        height=80,
        boxes=np.array([[10.0, 20, 50, 70], [60, 10, 90, 30], [0, 0, 100, 80]]),
        classes=np.array([1, 0, 1]),
        crowd=np.array([False, False, True]),
        areas=np.array([2000.0, 600, 8000]),
        segmentations=(outline, None, outline),
        object_ids=np.array([1, 2, 3]),
    )


def test_the_loaders_resize_is_torchvisions(record: ImageRecord) -> None:
    sample = make_sample(record, size=64, augment=frozenset(), generator=torch.Generator(), max_size=96, masks=True)
    model: Any = build_model(MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=64, max_size=96), classes=2)
    with Image.open(record.path) as image:
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    target = {"boxes": torch.tensor(record.boxes, dtype=torch.float32)}
    expected, targets = model.eval().transform.resize(pixels, target)
    assert sample.image.shape == expected.shape
    assert (sample.image / 255 - expected).abs().max() <= 0.5001 / 255
    torch.testing.assert_close(sample.boxes, targets["boxes"][:2], rtol=1e-5, atol=1e-4)
    assert sample.classes.tolist() == [1, 0]
    assert sample.masks is not None
    assert sample.masks.shape == (2, 64, 80)
    assert abs(int(sample.masks[0].sum()) - 2000 * 0.64) < 60
    flipped = make_sample(
        record, size=64, augment=OWN, generator=torch.Generator().manual_seed(0), max_size=96, masks=True
    )
    assert torch.equal(flipped.image, sample.image.flip(2))
    assert flipped.masks is not None
    assert torch.equal(flipped.masks, sample.masks.flip(2))


def test_sides_of_training() -> None:
    assert require_sides("64, 96") == (64, 96)
    assert require_sides("64-67") == (64, 65, 66, 67)
    setting = MaskRcnnSetting(model="maskrcnn-r50-v1", short_sides="640-800", resolution=600)
    assert (setting.eval_side, len(setting.drawn_sides), setting.sides) == (600, 161, (800, 1333))
    for text in ("", "64-", "a", "0", "99999", "96-64", "-5"):
        with pytest.raises(TrainfitError, match="--short-sides"):
            MaskRcnnSetting(model="maskrcnn-r50-v1", short_sides=text)
    with pytest.raises(TrainfitError, match="--max-size 32"):
        MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=64, max_size=32)
    with pytest.raises(TrainfitError, match="--resolution must be at least 1, not 0"):
        MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=0)


def test_windows_are_of_one_orientation_and_every_image_is_seen_once_an_epoch() -> None:
    shapes = [(64, 96), (96, 64), (64, 64), (96, 50), (50, 96)] * 5

    class Record:
        def __init__(self, height: int, width: int) -> None:
            self.height, self.width = height, width

    records = [Record(*shape) for shape in shapes]
    setting = MaskRcnnSetting(model="maskrcnn-r50-v1")
    workload: Any = MaskRcnn(setting, ("a",))
    groups = groups_of(workload, records)
    assert groups == tuple(int(height > width) for height, width in shapes)
    mixed: Any = MaskRcnn(replace(setting, aspect_grouping=False), ("a",))
    assert groups_of(mixed, records) == groups_of(workload, records[:1]) == ()

    def plan(rank: int = 0, world: int = 1) -> WindowPlan:
        return WindowPlan(images=25, effective_batch=4, sizes=(64,), seed=3, rank=rank, world_size=world, groups=groups)

    assert plan().windows_per_epoch == 4 + 3  # 15 landscape or square, 10 portrait
    epochs = [[plan().indices(epoch * 7 + step) for step in range(7)] for epoch in range(2)]
    for windows in epochs:
        assert sorted(index for own in windows for index in own) == list(range(25))
        assert all(len({groups[index] for index in own}) == 1 for own in windows)
        kinds = [groups[own[0]] for own in windows]
        assert kinds != sorted(kinds)  # the groups take turns
    assert [plan().indices(step) for step in range(7, 14)] == epochs[1]  # whoever resumes sees the same
    assert sorted(plan(0, 2).indices(3) + plan(1, 2).indices(3)) == sorted(plan().indices(3))


def test_a_canvas_is_that_of_the_larger_group() -> None:
    class Statistics:
        objects_per_image_max = 7
        canvas_sizes = (((640, 480), 9), ((640, 400), 4), ((300, 400), 1))  # width, height

    setting = MaskRcnnSetting(model="maskrcnn-r50-v1")
    assert for_data(setting, Statistics).canvas == (800, 1280)
    mixed = replace(setting, aspect_grouping=False)
    assert for_data(mixed, Statistics).canvas == (1066, 1280)
    for each, canvas in ((setting, (800, 1333)), (mixed, (1333, 1333))):
        window = MaskRcnn(each, ("a",)).worst_window(torch.nn.Linear(1, 1), 3)
        assert largest_image(window) == canvas
    drawn = drawn_sizes(replace(setting, short_sides="400,800", canvas=(800, 1000)))
    assert drawn is not None
    assert drawn.pixels == (0.25, 1.0)
    assert drawn_sizes(setting) is None
    with pytest.raises(TrainfitError, match="trainfit has no retinanet-r50-v2: it has neither proposals nor regions"):
        make_setting("retinanet-r50-v2")


# ---- weights


def torchvisions(classes: int) -> Any:
    torch.manual_seed(1)
    model: Any = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=classes + 1,
        min_size=64,
        max_size=96,
        box_score_thresh=0.0,
        box_detections_per_img=6,
    )
    return model.eval()


def few(model: Any) -> Any:
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 6
    return model.eval()


def test_torchvisions_checkpoint_finds_the_same_and_goes_back(tmp_path: Path) -> None:
    theirs = torchvisions(2)
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "model_3.pth")
    workload: Any = build_trainable(make_setting("maskrcnn-r50-v1", resolution=64, max_size=96), ("a", "b"))
    model = workload.build()
    assert workload.load(model, str(tmp_path / "model_3.pth")) == []
    few(model)
    sample = crowded_sample(64, 96, objects=1, classes=2, masks=False)
    found = workload.outputs(model, [replace(sample, original_size=(128, 192))])[0]
    with torch.no_grad():
        expected = theirs([sample.image.float() / 255])[0]
    assert torch.equal(found.classes + 1, expected["labels"])
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.boxes, expected["boxes"] * 2, rtol=1e-5, atol=1e-3)
    assert decode_rle(found.masks[0], 128, 192).shape == (128, 192)
    workload.export(model.state_dict(), tmp_path / "back.pth")
    again = torchvisions(2)
    again.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True))
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items() if "num_b" not in key
    )


def test_rows_of_the_class_heads_follow_the_names_of_coco(tmp_path: Path) -> None:
    theirs = torchvisions(90)
    torch.save(theirs.state_dict(), tmp_path / "coco.pth")
    setting = MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=64)
    workload = MaskRcnn(setting, ("hazelnut", "stop sign", "person"))
    model = workload.build()
    random = model.state_dict()["roi_heads.box_predictor.bbox_pred.weight"][4:8].clone()
    (remark,) = workload.load(model, str(tmp_path / "coco.pth"))
    assert remark == "class heads: hazelnut start at random, because coco.pth does not name them"
    ours, known = model.state_dict(), theirs.state_dict()
    for name, each in interop.CLASS_HEADS.items():
        key = f"{name}.weight"
        assert torch.equal(ours[key][2 * each : 3 * each], known[key][13 * each : 14 * each])  # COCO's id of stop sign
        assert torch.equal(ours[key][3 * each : 4 * each], known[key][each : 2 * each])
        assert torch.equal(ours[key][:each], known[key][:each])
    assert torch.equal(ours["roi_heads.box_predictor.bbox_pred.weight"][4:8], random)
    inference, _, remarks = from_upstream("maskrcnn-r50-v1", str(tmp_path / "coco.pth"))
    assert remarks == []
    assert (inference.classes[0], inference.classes[11], len(inference.classes)) == ("person", "", 90)


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    workload = MaskRcnn(MaskRcnnSetting(model="maskrcnn-r50-v1"), ("a",))
    model = workload.build()
    (tmp_path / "model_final_f10217.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(TrainfitError, match=r"unpickling runs whatever code.*--weights pretrained"):
        workload.load(model, str(tmp_path / "model_final_f10217.pkl"))
    faster = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    torch.save(faster.state_dict(), tmp_path / "faster.pth")
    with pytest.raises(TrainfitError, match="checkpoint of another model than maskrcnn-r50-v1"):
        workload.load(model, str(tmp_path / "faster.pth"))
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(TrainfitError, match="not a checkpoint of torchvision's"):
        workload.load(model, str(tmp_path / "other.pth"))
    with pytest.raises(TrainfitError, match="no weights of maskrcnn-r101-v1"):
        MaskRcnn(MaskRcnnSetting(model="maskrcnn-r101-v1"), ("a",)).load(model, "pretrained")


# ---- the commands


@pytest.mark.parametrize(("name", "images"), [("fruits_nuts", "images"), ("coco_mini_cc", "train2017")])
def test_trains_is_killed_resumes_bit_for_bit_and_detects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, images: str
) -> None:
    """The kill comes at a random moment after the second window."""
    data = shared_data(name)
    common = ["train", "maskrcnn-r50-fpn", "--data", data, *SMALL, "--effective-batch", 3, "--micro-batch", 2]
    common += ["--eval-every", 0, "--eval-steps", 3, "--short-sides", "48-64", "--device", "cpu", "--norm", "group"]
    common += ["--optimizer", "sgd", "--trainable-stages", 1, "--max-steps", 5, "--save-minutes", 0]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(*common, "--out", whole) == 0
    torch.set_num_threads(threads)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "trainfit", *map(str, common), "--out", str(killed)]
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until, file = time.monotonic() + 120, killed / run_folder.METRICS
        while time.monotonic() < until and (not file.exists() or file.read_text().count('"loss"') < 2):
            time.sleep(0.02)
            assert process.poll() is None
        time.sleep(random.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert run("train", "--resume", killed) == 0
    capsys.readouterr()
    ours, theirs = (run_folder.load_state(folder / run_folder.STATE)["model"] for folder in (whole, killed))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert rows(whole) == rows(killed)
    assert [row["step"] for row in rows(whole) if "segm_ap" in row] == [3, 5]
    losses = [{k: v for k, v in row.items() if "loss" in row} for row in rows(whole) if "loss" in row]
    assert all(row[key] >= 0 for row in losses for key in ("objectness", "rpn_box", "class", "box", "mask"))
    assert {"segm_ap", "bbox_ap"} <= set(rows(whole)[-1])
    readings = list(map(json.loads, (whole / run_folder.TELEMETRY).read_text().splitlines()))
    (reading, *_) = [row for row in readings if "window_numbers" in row]
    assert reading["window_numbers"].keys() == {"proposals", "rois", "positives"}
    assert reading["window_numbers"]["rois"] == 3 * 16
    assert Path(reading["largest"]["objects"]["item"]).parent == data / images
    assert run("report", whole) == 0
    assert "regions     a window: " in capsys.readouterr().out
    image = next((data / images).glob("*.jpg"))
    assert run("detect", whole, image, "--threshold", 0, "--json", "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out)["detections"]
    with Image.open(image) as picture:
        size = picture.size[::-1]
    assert {tuple(row["mask"]["size"]) for row in found} <= {size}
    state = torch.load(whole / "best-maskrcnn.pth", weights_only=True)
    assert torch.equal(state["backbone.body.conv1.weight"], ours["backbone.body.conv1.weight"])


def test_faster_rcnn_trains_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["--effective-batch", 2, "--micro-batch", 1, "--max-steps", 1, "--val-fraction", 0.02, "--out", out]
    data = ["--data", shared_data("bccd")]
    assert run("train", "fasterrcnn-r50-v1", *data, *SMALL, *arguments, "--reference", "R2") == 0
    assert rows(out)[0]["images"] == 2
    # ResNet-50 has 53 convolutions, each with a norm
    assert "53 frozen BatchNorm layers normalize by statistics that random weights" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*arguments: object) -> str:
        assert run("train", *arguments, "--out", tmp_path / "run") == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "without a mask" in message("maskrcnn-r50-v1", "--data", shared_data("bccd"), *SMALL)
    assert "--resolution must be at least 1" in message("maskrcnn-r50-v1", "--data", "sample", "--resolution", 0)
    assert "Perhaps you meant maskrcnn-r50-v" in message("maskrcnn-r50-v3", "--data", "sample")
