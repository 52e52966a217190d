"""Instance segmentation: the detector stage, the mask stage and the single stage, against upstream and pycocotools."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as oracle_mask
from rfdetr.config import SegmentationTrainConfig
from rfdetr.models import build_criterion_from_config, criterion, matcher
from rfdetr.models.heads import segmentation
from rfdetr.models.heads.segmentation import point_sample
from rfdetr.models.postprocess import PostProcess
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import rows, run, shared_data
from support.workloads import make_workload
from trainfit.errors import TrainfitError
from trainfit.models.build import workload_from_metadata
from trainfit.models.family import family_of
from trainfit.models.rfdetr import lean_head
from trainfit.models.rfdetr.data import make_sample, to_batch, to_targets
from trainfit.models.rfdetr.family import RfDetrKnobs, Stage
from trainfit.models.rfdetr.guide import translate
from trainfit.models.rfdetr.lean_head import masks_of
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.models.workload import OptimizerSettings
from trainfit.step.ema import ema_copy, update_ema
from trainfit.step.window import accumulate, cut
from trainfit.tasks.augment import OWN
from trainfit.tasks.detection.masks import decode_rle
from trainfit.tasks.detection.samples import ImageRecord, Sample, packed
from trainfit.training import run_folder
from trainfit.training.recipe import make_recipe

CPU = torch.device("cpu")
SIDE = 60
SMALL = RfDetrKnobs(resolution=SIDE, groups=2, num_queries=12)
TINY = ["--resolution", 64, "--groups", 1, "--num-queries", 10, "--multi-scale", 0, "--workers", 0, "--device", "cpu"]
BATCH = ["--batch", 2, "--accum", 2]


pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(objects: int, seed: int, *, side: int = SIDE, masks: bool = True) -> Sample:
    """An image with random ellipses' masks and the boxes around them."""
    g = np.random.default_rng(seed)
    ys, xs = np.mgrid[:side, :side] + 0.5
    shapes = np.zeros((objects, side, side), np.bool_)
    for shape in shapes:
        (x, y), (a, b) = g.uniform(12, 48, 2), g.uniform(4, 11, 2)
        shape[:] = ((xs - x) / a) ** 2 + ((ys - y) / b) ** 2 < 1
    boxes = [[np.flatnonzero(s.max(0))[[0, -1]], np.flatnonzero(s.max(1))[[0, -1]]] for s in shapes]
    corners = np.array([[x[0], y[0], x[1] + 1, y[1] + 1] for x, y in boxes], np.float32).reshape(-1, 4)
    return Sample(
        image=torch.from_numpy(g.integers(0, 256, (3, side, side), np.uint8)),
        boxes=torch.from_numpy(corners),
        classes=torch.from_numpy(g.integers(0, 3, objects)),
        masks=torch.from_numpy(shapes) if masks else None,
        image_id=seed,
        original_size=(side, side),
    )


def build(stage: Stage = "single", name: str = "rfdetr-seg-nano") -> tuple[RfDetr, torch.nn.Module]:
    torch.manual_seed(0)
    workload = RfDetr(name, ("a", "b", "c"), replace(SMALL, stage=stage))
    return workload, workload.build()


def move_heads(model: torch.nn.Module) -> torch.nn.Module:
    """Off their constant start, so that every parameter gets a gradient and detections differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_embed" in name or "bbox_embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def fix_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream draws mask points by torch.rand, in the matcher (1, points, 2) and in the loss (masks, points, 2): let them
    depend on the number of points alone. Its sampling also takes points in the dtype of what is sampled alone, and it
    samples float64 logits and float32 targets at the same points.
    """
    draw = torch.rand

    def fixed(*size: int, device: torch.device | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(size[1])
        return draw(1, *size[1:], generator=generator).repeat(size[0], 1, 1).to(device)

    def sample(values: torch.Tensor, points: torch.Tensor, **options: Any) -> torch.Tensor:
        return point_sample(values, points.to(values.dtype), **options)

    monkeypatch.setattr(torch, "rand", fixed)
    for module in (criterion, matcher, segmentation):
        monkeypatch.setattr(module, "point_sample", sample)


@pytest.mark.parametrize(
    ("stage", "name"),
    [*((stage, "rfdetr-seg-nano") for stage in ("single", "detector", "masks")), ("masks", "rfdetr-nano")],
)
def test_any_cut_gives_the_whole_gradient(
    stage: Stage, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload, model = build(stage, name)
    move_heads(model.double())
    fix_points(monkeypatch)
    window = [drawn(n, i, side=workload.resolution, masks=workload.masks) for i, n in enumerate((0, 3, 1, 5, 0))]
    # The oracle is not us: upstream's criterion with all its losses on the whole window, and its own count of boxes.
    theirs, _ = build_criterion_from_config(workload.config, SegmentationTrainConfig(dataset_dir=".", output_dir="."))
    theirs.train()
    like = next(model.parameters())
    targets = to_targets(window, like)
    losses = theirs(model(to_batch(window, (workload.resolution, workload.resolution), like), targets), targets)
    torch.stack([losses[k] * w for k, w in theirs.weight_dict.items() if k in losses]).sum().backward()
    whole = gradient(model)
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(n.startswith("segmentation_head.") for n in trained) is (stage == "masks")
    errors: list[float] = []
    for parts in ([window], cut(window, 1), [window[:4], window[4:]]):
        model.zero_grad(set_to_none=True)
        accumulate(model, workload.objective, parts, device=CPU)
        errors.append(((gradient(model) - whole).norm() / whole.norm()).item())
    with capsys.disabled():
        print(f"\n{name} {stage}: gradient error of 3 cuts at most {max(errors):.1e}")
    assert max(errors) <= 1e-12


def test_points_as_upstream_draws_them_have_the_whole_gradient_as_their_mean() -> None:
    """What holds without fixed points: each cut's gradient is a draw around the same mean."""
    workload, model = build("masks")
    move_heads(model)
    window = [drawn(n, i) for i, n in enumerate((2, 3))]
    means: list[torch.Tensor] = []
    spreads: list[float] = []
    for parts in ([window], cut(window, 1)):
        draws: list[torch.Tensor] = []
        for seed in range(12):
            torch.manual_seed(seed)
            model.zero_grad(set_to_none=True)
            accumulate(model, workload.objective, parts, device=CPU)
            draws.append(gradient(model))
        stacked = torch.stack(draws)
        means.append(stacked.mean(0))
        spreads.append(float((stacked - means[-1]).square().sum(1).mean().sqrt()))
    error = float((means[0] - means[1]).norm())
    assert spreads[0] > 1e-3 * float(means[0].norm())
    assert error < 3 * (2 / 12) ** 0.5 * max(spreads)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operator returns, bytes."""

    largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest_bytes = max(self.largest_bytes, result.nbytes)
        return result


def test_masks_of_a_large_image_are_upstreams_and_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.nn.functional.avg_pool2d(torch.randn(1, 40, 19, 19), 5)
    scores = torch.randn(1, 40, 2)
    outputs = {"pred_logits": scores, "pred_boxes": torch.rand(1, 40, 4), "pred_masks": logits}
    theirs = PostProcess(num_select=30)(outputs, torch.tensor([[301, 203]]))[0]["masks"][:, 0]
    _, _, queries = PostProcess(num_select=30)._select_topk(scores)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(lean_head, "MASK_PIXELS_AT_ONCE", 4 * 301 * 203 + 5)
    with _Largest() as seen:
        ours = masks_of(logits, 0, queries[0], (301, 203))
    assert seen.largest_bytes <= 4 * 4 * 301 * 203
    np.testing.assert_array_equal(np.stack([decode_rle(rle, 301, 203) for rle in ours]), theirs.numpy())


@pytest.mark.filterwarnings("ignore::UserWarning")  # upstream on missing OpenCV and on speed
def test_upstream_loads_a_runs_weights_and_gives_the_same_masks(tmp_path: Path) -> None:
    from rfdetr import RFDETRSegNano

    workload, model = build()
    move_heads(model)
    workload.export(model.state_dict(), tmp_path / "run.pth")
    sizes: dict[str, Any] = {"resolution": SIDE, "num_queries": 12, "num_select": 12, "group_detr": 2}
    theirs = RFDETRSegNano(pretrain_weights=str(tmp_path / "run.pth"), num_classes=3, device="cpu", **sizes)
    sample = drawn(4, 1)
    ours = workload.detect(model.eval(), [sample])[0]
    found: Any = theirs.predict(Image.fromarray(sample.image.permute(1, 2, 0).numpy()), threshold=0.0)
    known = np.asarray(found.class_id) < 3
    assert ours.masks is not None
    masks = np.stack([decode_rle(rle, SIDE, SIDE) for rle in ours.masks])
    np.testing.assert_allclose(np.asarray(found.confidence)[known], ours.scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.asarray(found.xyxy)[known], ours.boxes.numpy(), atol=1e-2)
    assert (np.asarray(found.mask)[known] != masks).mean() < 1e-4
    assert 0.01 < masks.mean() < 0.99


def saved_bytes(stage: Stage) -> int:
    """Bytes of distinct storages, parameters apart, that the forward and the losses keep for backward."""
    workload, model = build(stage)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        terms = workload.objective.terms(model, [drawn(3, 0), drawn(3, 1)], (SIDE, SIDE))
    assert ("box" in terms) is (stage == "single")
    return sum(kept.values())


def test_mask_stage_keeps_little_for_backward_and_little_optimizer_state() -> None:
    assert saved_bytes("masks") < 0.4 * saved_bytes("single")  # benchmarks/stage_memory.py has the published sizes
    workload, model = build("masks")
    groups = workload.parameter_groups(model, OptimizerSettings())
    assert sum(p.numel() for g in groups for p in g["params"]) == 933_121  # of 33.6 million


def test_average_leaves_frozen_parameters_alone() -> None:
    _, model = build("masks")
    averaged = ema_copy(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    update_ema(averaged, model, 0.9)
    for name, parameter in averaged.named_parameters():
        start = frozen.get(name, model.get_parameter(name) - 0.9)
        assert torch.equal(parameter, start) if name in frozen else torch.allclose(parameter, start, atol=1e-6)
    assert torch.equal(model.get_parameter("query_feat.weight"), frozen["query_feat.weight"])


def detector_file(folder: Path, name: str = "rfdetr-nano", **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    workload, model = build("detector", name)
    state = dict(model.state_dict())
    for key, value in changes.items():
        state.pop(key.replace("__", ".")) if value is None else state.update({key.replace("__", "."): value})
    run_folder.save_weights(folder / "best.safetensors", state, workload.metadata())
    return folder / "best.safetensors", state


def test_mask_head_is_attached_to_a_detection_size_which_upstream_refuses(tmp_path: Path) -> None:
    path, state = detector_file(tmp_path)
    workload, model = build("masks", "rfdetr-nano")
    (remark,) = workload.load(model, str(path))
    assert "795393" in remark  # 23 tensors, as counted in upstream's Nano with segmentation_head=True
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in state.items())
    assert all(key.startswith("segmentation_head.") for key in own.keys() - state.keys())
    again = workload_from_metadata(workload.metadata())
    again.build().load_state_dict(own)
    assert getattr(again, "masks", False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bbox_embed__layers__1__bias": None}, "lacks bbox_embed.layers.1.bias"),
        ({"stranger": torch.zeros(1)}, "has besides stranger"),
        ({"segmentation_head__bias": torch.zeros(1)}, "already has segmentation_head.bias"),
        ({"query_feat__weight": torch.zeros(3, 256)}, "other shapes for query_feat.weight"),
    ],
)
def test_anything_missing_but_the_mask_head_is_an_error(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path, _ = detector_file(tmp_path, **changes)
    workload, model = build("masks", "rfdetr-nano")
    with pytest.raises(TrainfitError, match=said.replace(".", r"\.")):
        workload.load(model, str(path))


def test_mask_stage_on_other_classes_is_refused(tmp_path: Path) -> None:
    path, _ = detector_file(tmp_path)
    other = RfDetr("rfdetr-nano", ("x", "y", "z"), replace(SMALL, stage="masks"))
    with pytest.raises(TrainfitError, match="trained on the classes"):
        other.load(other.build(), str(path))


def record_of(tmp_path: Path, segmentation: Any) -> ImageRecord:
    """A white rectangle on black, and a crowd over all of it."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[20:50, 30:70] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    whole = {"size": [60, 90], "counts": [0, 60 * 90]}
    return ImageRecord(
        id=1,
        path=tmp_path / "image.png",
        width=90,
        height=60,
        boxes=np.array([[0.0, 0.0, 90.0, 60.0], [30.0, 20.0, 70.0, 50.0]]),
        classes=np.array([0, 1]),
        crowd=np.array([True, False]),
        areas=np.array([5400.0, 1200.0]),
        segmentations=(whole, packed(segmentation)),
        object_ids=np.array([1, 2]),
    )


def rectangle(kind: str) -> Any:
    mask = np.zeros((60, 90), np.uint8, order="F")
    mask[20:50, 30:70] = 1
    compressed: dict[str, Any] = dict(oracle_mask.encode(mask))
    runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel("F"), [0]])))
    if kind == "polygons":  # two, side by side: one object
        return [[30.0, 20.0, 50.0, 20.0, 50.0, 50.0, 30.0, 50.0], [50.0, 20.0, 70.0, 20.0, 70.0, 50.0, 50.0, 50.0]]
    if kind == "compressed":
        return {"size": compressed["size"], "counts": compressed["counts"].decode()}
    return {"size": [60, 90], "counts": np.diff(np.concatenate([[0], runs, [60 * 90]])).tolist()}


@pytest.mark.parametrize("kind", ["polygons", "compressed", "counts"])
def test_masks_stay_on_their_objects_at_every_size_crop_and_flip(tmp_path: Path, kind: str) -> None:
    record = record_of(tmp_path, rectangle(kind))
    for seed in range(16):
        for size in (60, 84, 132):
            generator = torch.Generator().manual_seed(seed)
            sample = make_sample(record, size=size, augment=OWN, masks=True, generator=generator)
            assert sample.masks is not None
            assert sample.classes.tolist() == [1]  # the crowd is not an object to train on
            white = sample.image.float().mean(0) > 127
            assert (sample.masks[0] ^ white).float().mean() < 0.03
            rows, columns = sample.masks[0].nonzero().unbind(1)
            seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            assert (sample.boxes[0] - seen).abs().max() <= 2


def changed(before: Path, after: Path) -> set[str]:
    """Tensors of the file `after` that are not bit-equal in the file `before`."""
    old, _ = run_folder.load_weights(before)
    new, _ = run_folder.load_weights(after)
    return {key for key, value in new.items() if key not in old or not torch.equal(value, old[key])}


@pytest.mark.parametrize(
    ("data", "model", "steps"), [("fruits_nuts", "rfdetr-seg-nano", 2), ("coco_mini_cc", "rfdetr-nano", 1)]
)
def test_detector_stage_then_mask_stage_then_evaluation(
    tmp_path: Path, data: str, model: str, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, detector, masks = shared_data(data), tmp_path / "detector", tmp_path / "masks"
    common = ["--data", folder, *BATCH, "--multi-scale", 0, "--workers", 0, "--device", "cpu"]
    arguments = ["--max-steps", steps, "--out", detector, *TINY, *BATCH]
    assert run("train", model, "--data", folder, "--recipe", "detector", *arguments) == 0
    assert not any("segm_ap" in row for row in rows(detector))
    arguments = ["--recipe", "masks", "--stage1_run", detector, "--max-steps", 2, "--out", masks, "--lr", 1e-3]
    assert run("train", *common, *arguments) == 0
    told = capsys.readouterr().err
    assert "attached" in told
    losses = [row for row in rows(masks) if "loss" in row]
    assert [set(row) & {"mask_ce", "dice", "box", "giou", "class"} for row in losses] == [{"mask_ce", "dice"}] * 2
    # The average's file and the trained weights: everything but the head is the detector's, bit for bit.
    for name in (run_folder.BEST, run_folder.LAST):
        moved = changed(detector / run_folder.BEST, masks / name)
        assert {key.partition(".")[0] for key in moved} == {"segmentation_head"}
    state = run_folder.load_state(masks / run_folder.STATE)
    before, _ = run_folder.load_weights(detector / run_folder.BEST)
    assert all(torch.equal(state["model"][key], value) for key, value in before.items())
    assert len(state["optimizer"]["state"]) == len(state["model"]) - len(before)
    assert run("train", "--resume", masks, "--max-steps", 3) == 0
    assert [row["step"] for row in rows(masks) if "loss" in row] == [1, 2, 3]
    capsys.readouterr()
    assert run("evaluate", masks, "--data", folder, "--json", "--device", "cpu") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["segm"]["images"] == figures["bbox"]["images"] > 0
    assert figures["segm"]["ap"] is not None
    image = next(iter(sorted(folder.rglob("*.jpg"))))
    assert run("detect", masks, image, "--threshold", 0, "--json", "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out)["detections"]
    with Image.open(image) as picture:
        size = picture.size[::-1]
    assert {tuple(row["mask"]["size"]) for row in found} == {size}
    assert all(decode_rle(row["mask"], *size).shape == size for row in found[:3])


@pytest.mark.parametrize(("data", "model"), [("fruits_nuts", "rfdetr-seg-small"), ("coco_mini_cc", "rtdetr-seg-nano")])
def test_single_stage_trains_and_evaluates_masks(tmp_path: Path, data: str, model: str) -> None:
    out = tmp_path / "run"
    arguments = ["--data", shared_data(data), "--max-steps", 1, "--out", out, *TINY, *BATCH, "--no-ema"]
    assert run("train", model, *arguments) == 0
    first, evaluated = rows(out)
    assert all(first[name] > 0 for name in ("class", "box", "giou", "mask_ce", "dice"))
    assert {"segm_ap", "bbox_ap"} <= set(evaluated)


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_recipes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--data", "sample", *TINY, "--out", tmp_path / "run"]
    assert "--weights RUN" in failure(capsys, *train, "rfdetr-seg-nano", "--recipe", "masks")
    assert "evaluated weights" in failure(capsys, *train, "rfdetr-seg-nano", "--from", tmp_path)
    assert "evaluated weights" in failure(capsys, *train, "--recipe", "masks", "--from", tmp_path)
    bccd = ["train", "rfdetr-seg-nano", "--data", shared_data("bccd"), *TINY, "--out", tmp_path / "run"]
    assert "without a mask" in failure(capsys, *bccd)


def test_the_guides_command_lines_are_ours() -> None:
    guide = "train --size nano --recipe masks --batch 1 --accum=8 --multi_scale 0 --num_queries 300 --stage1_run runs/a"
    ours = "train rtdetr-seg-nano --stage masks --micro-batch 1 --accumulation 8 --no-multi-scale"
    assert translate(guide.split()) == [*ours.split(), "--num-queries", "300", "--weights", "runs/a"]
    assert translate(["train", "--multi-scale", "1", "--multi-scale", "--lr=1"])[1:4] == [
        "--multi-scale",
        "--multi-scale",
        "--lr",
    ]
    assert translate(["evaluate", "--batch", "1"]) == ["evaluate", "--batch", "1"]


@pytest.mark.parametrize(
    ("size", "resolution"), [("nano", 384), ("small", 512), ("base", 560), ("medium", 576), ("large", 560)]
)
def test_the_guides_sizes_have_its_resolutions_and_queries(size: str, resolution: int) -> None:
    workload = make_workload(f"rtdetr-seg-{size}", ("a",), {})
    assert isinstance(workload, RfDetr)
    assert (workload.resolution, workload.config.num_queries, workload.masks) == (resolution, 300, True)
    assert not make_workload(f"rtdetr-seg-{size}", ("a",), {"stage": "detector"}).masks
    assert family_of(f"RT-DETR Seg {size}")[1] == workload.name


def test_base_builds_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    workload = RfDetr("rtdetr-seg-base", ("a",), RfDetrKnobs(resolution=56, groups=1, num_queries=5))
    model = workload.build()
    assert sum(p.numel() for n, p in model.named_parameters() if n.startswith("segmentation_head.")) > 0


def test_the_recipe_says_what_goes_together() -> None:
    with pytest.raises(TrainfitError, match="--weights RUN"):
        make_recipe("rtdetr-seg-nano", data="x", stage="masks", weights="pretrained")
    assert make_recipe("rtdetr-seg-nano", data="x", stage="masks", weights="runs/a").weights == "runs/a"
