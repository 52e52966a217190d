"""The RF-DETR family against upstream itself."""

import importlib.util
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.workloads import make_workload
from trainfit.errors import TrainfitError
from trainfit.models.build import workload_from_metadata
from trainfit.models.family import family_of
from trainfit.models.rfdetr import data
from trainfit.models.rfdetr.data import make_sample
from trainfit.models.rfdetr.family import RfDetrKnobs, RfDetrTraining
from trainfit.models.rfdetr.workload import CONFIGS, RfDetr, legal_resolution
from trainfit.models.workload import OptimizerSettings
from trainfit.step.ema import ema_decay, update_ema
from trainfit.tasks.augment import OWN
from trainfit.tasks.detection.samples import ImageRecord
from trainfit.tasks.images import read_image
from trainfit.training.run_folder import save_weights

SMALL = RfDetrKnobs(resolution=64, groups=2, num_queries=20)


def upstream_file(name: str) -> Any:
    """A file of upstream's `training` package, whose __init__ needs extras that the file itself does not."""
    import rfdetr

    path = Path(rfdetr.__file__).parent / "training" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"upstream_{name}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nano() -> tuple[RfDetr, torch.nn.Module]:
    torch.manual_seed(0)
    workload = RfDetr("rfdetr-nano", ("cat", "dog"), SMALL)
    return workload, workload.build()


def test_parameter_groups_are_upstreams(nano: tuple[RfDetr, torch.nn.Module]) -> None:
    workload, model = nano
    settings = OptimizerSettings(lr=1e-3, weight_decay=3e-2, training=RfDetrTraining(lr_encoder=2e-3))
    arguments = SimpleNamespace(
        lr=1e-3,
        lr_encoder=2e-3,
        weight_decay=3e-2,
        lr_component_decay=0.7,
        lr_vit_layer_decay=0.8,
        out_feature_indexes=workload.config.out_feature_indexes,
    )
    theirs = upstream_file("param_groups").get_param_dict(arguments, model)
    expected = {id(p): (g["lr"], g.get("weight_decay", 3e-2)) for g in theirs for p in g["params"]}
    ours = {
        id(p): (g["lr"], g["weight_decay"]) for g in workload.parameter_groups(model, settings) for p in g["params"]
    }
    assert ours == expected
    assert len(set(ours.values())) > 10


def test_ema_is_upstreams() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    theirs = upstream_file("model_ema").ModelEma(model, decay=0.993, tau=100)
    ours = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    ours.load_state_dict(model.state_dict())
    for step in range(5):
        model(torch.randn(8, 3, dtype=torch.float64))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        theirs.update(model)
        update_ema(ours, model, ema_decay(step, decay=0.993, tau=100))
    for name, value in ours.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, theirs.module.state_dict()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("typed", ["rfdetr-nano", "RF-DETR Nano", "rf-detr-nano", "rfdetr_nano"])
def test_names_as_people_type_them(typed: str) -> None:
    assert family_of(typed)[1] == "rfdetr-nano"


def test_unknown_model_suggests() -> None:
    with pytest.raises(TrainfitError, match="Perhaps you meant rfdetr-nano"):
        family_of("rfdetr-nanno")[1]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_published_resolutions(name: str) -> None:
    published = {
        "rfdetr-nano": 384,
        "rfdetr-small": 512,
        "rfdetr-medium": 576,
        "rfdetr-large": 704,
        "rfdetr-seg-nano": 312,
        "rfdetr-seg-small": 384,
        "rfdetr-seg-medium": 432,
        "rfdetr-seg-large": 504,
        "rfdetr-seg-xlarge": 624,
        "rfdetr-seg-2xlarge": 768,
    }
    assert make_workload(name, ("a",), {}).eval_size == published[name]


def test_resolution_snaps_or_refuses() -> None:
    assert legal_resolution(100, 32, snap=True) == 96
    assert legal_resolution(1, 32, snap=True) == 32
    with pytest.raises(TrainfitError, match=r"--resolution 100 is not a multiple of 32.*use 96"):
        legal_resolution(100, 32, snap=False)


def test_multi_scale_sizes_reach_upstreams_largest() -> None:
    assert max(make_workload("rfdetr-nano", ("a",), {}).sizes()) == 544  # evidence: x 2.01 pixels
    assert make_workload("rfdetr-nano", ("a",), {"multi_scale": False}).sizes() == (384,)


def make_record(tmp_path: Path, *, width: int = 90, height: int = 60) -> ImageRecord:
    """An image that is black but for one white rectangle, which is also its object, as polygon and as box."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[20:50, 30:70] = 255
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return ImageRecord(
        id=7,
        path=path,
        width=width,
        height=height,
        boxes=np.array([[30.0, 20.0, 70.0, 50.0]]),
        classes=np.array([1]),
        crowd=np.array([False]),
        areas=np.array([1200.0]),
        segmentations=((np.array([30.0, 20.0, 70.0, 20.0, 70.0, 50.0, 30.0, 50.0]),),),
        object_ids=np.array([1]),
    )


@pytest.mark.parametrize("seed", range(12))
def test_crops_and_flips_keep_boxes_and_masks_on_the_object(tmp_path: Path, seed: int) -> None:
    record = make_record(tmp_path)
    generator = torch.Generator().manual_seed(seed)
    sample = make_sample(record, size=96, augment=OWN, masks=True, generator=generator)
    white = sample.image.float().mean(0) > 127
    assert sample.masks is not None
    assert (sample.masks[0] ^ white).float().mean() < 0.03
    rows, columns = white.nonzero().unbind(1)
    seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    assert (sample.boxes[0] - seen).abs().max() <= 2


@pytest.mark.parametrize("augment", [OWN, frozenset[str]()])
def test_boxes_draw_no_mask_and_are_the_same_as_with_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: AbstractSet[str]
) -> None:
    record = make_record(tmp_path)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(8) for _ in range(2)]
    with_masks = [make_sample(record, size=96, augment=augment, masks=True, generator=g) for g in seeds[::2]]

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a mask is drawn for boxes")

    monkeypatch.setattr(data, "draw_masks", refuse)
    for sample, generator in zip(with_masks, seeds[1::2], strict=True):
        boxes = make_sample(record, size=96, augment=augment, masks=False, generator=generator)
        assert boxes.masks is None
        assert torch.equal(boxes.boxes, sample.boxes)
        assert torch.equal(boxes.classes, sample.classes)
        assert torch.equal(boxes.image, sample.image)


def test_without_augmentation_the_sample_is_upstreams_resize(tmp_path: Path) -> None:
    from torchvision.transforms.v2 import functional as F

    record = make_record(tmp_path)
    sample = make_sample(record, size=64, augment=frozenset(), masks=False, generator=torch.Generator())
    expected = F.pil_to_tensor(F.resize(read_image(record), [64, 64], antialias=True))  # pyright: ignore[reportArgumentType]
    assert torch.equal(sample.image, expected)
    torch.testing.assert_close(sample.boxes, torch.tensor([[30 * 64 / 90, 20 * 64 / 60, 70 * 64 / 90, 50 * 64 / 60]]))


@pytest.mark.filterwarnings("ignore::UserWarning")  # upstream's remarks on missing OpenCV and on speed
def test_weights_of_a_run_load_upstream_and_predict_the_same(
    nano: tuple[RfDetr, torch.nn.Module], tmp_path: Path
) -> None:
    from rfdetr import RFDETRNano

    workload, model = nano
    record = make_record(tmp_path)
    path = tmp_path / "run.pth"
    workload.export(model.state_dict(), path)
    torch.load(path, weights_only=True)
    theirs = RFDETRNano(
        pretrain_weights=str(path),
        num_classes=2,
        resolution=64,
        num_queries=20,
        num_select=20,
        group_detr=2,
        device="cpu",
    )
    sample = make_sample(record, size=64, augment=frozenset(), masks=False, generator=torch.Generator())
    ours = workload.detect(model.eval(), [sample])[0]
    model.train()
    # Upstream resizes a picture by another filter than its training does: give it one that needs no resizing.
    found: Any = theirs.predict(Image.fromarray(sample.image.permute(1, 2, 0).numpy()), threshold=0.0)
    known = np.asarray(found.class_id) < 2
    scale = np.array([90 / 64, 60 / 64] * 2)
    np.testing.assert_allclose(np.asarray(found.xyxy)[known] * scale, ours.boxes.numpy(), atol=1e-2)
    np.testing.assert_allclose(np.asarray(found.confidence)[known], ours.scores.numpy(), atol=1e-5)
    assert theirs.model.class_names == ["cat", "dog"]


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours = one.state_dict()
    return all(torch.equal(value, ours[key]) for key, value in other.state_dict().items())


def save_upstream(workload: RfDetr, model: torch.nn.Module, path: Path) -> None:
    workload.export(model.state_dict(), path)


def save_lightning(_workload: RfDetr, model: torch.nn.Module, path: Path) -> None:
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, path)


def save_namespace(_workload: RfDetr, model: torch.nn.Module, path: Path) -> None:
    from argparse import Namespace

    torch.save({"model": model.state_dict(), "args": Namespace(num_queries=20, group_detr=2)}, path)


def save_ours(workload: RfDetr, model: torch.nn.Module, path: Path) -> None:
    save_weights(path, model.state_dict(), workload.metadata())


@pytest.mark.parametrize(
    ("name", "save"),
    [("a.pth", save_upstream), ("a.ckpt", save_lightning), ("a.pt", save_namespace), ("a.safetensors", save_ours)],
)
def test_checkpoints_load_here(
    nano: tuple[RfDetr, torch.nn.Module],
    tmp_path: Path,
    name: str,
    save: Callable[[RfDetr, torch.nn.Module, Path], None],
) -> None:
    workload, model = nano
    save(workload, model, tmp_path / name)
    torch.manual_seed(1)
    fresh = workload.build()
    assert not same_weights(model, fresh)
    assert workload.load(fresh, str(tmp_path / name)) == []
    assert same_weights(model, fresh)


@pytest.mark.parametrize(("name", "save"), [("a.pth", save_upstream), ("a.safetensors", save_ours)])
def test_another_number_of_classes_and_resolution_loads_with_a_remark(
    nano: tuple[RfDetr, torch.nn.Module],
    tmp_path: Path,
    name: str,
    save: Callable[[RfDetr, torch.nn.Module, Path], None],
) -> None:
    workload, model = nano
    save(workload, model, tmp_path / name)
    other = RfDetr("rfdetr-nano", ("x", "y", "z", "w"), RfDetrKnobs(resolution=96, groups=2, num_queries=20))
    fresh = other.build()
    (remark,) = other.load(fresh, str(tmp_path / name))
    assert "class" in remark
    assert fresh.get_parameter("class_embed.weight").shape[0] == 5
    key = "transformer.decoder.layers.0.linear1.weight"
    assert torch.equal(fresh.get_parameter(key), model.get_parameter(key))


def test_weights_of_another_model_are_refused(nano: tuple[RfDetr, torch.nn.Module], tmp_path: Path) -> None:
    workload, model = nano
    small = RfDetr("rfdetr-small", ("cat", "dog"), SMALL)
    for name, save in (("a.pth", save_upstream), ("a.safetensors", save_ours)):
        save(workload, model, tmp_path / name)
        with pytest.raises(TrainfitError, match="rfdetr-small") as caught:
            small.load(small.build(), str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_weights_are_refused(nano: tuple[RfDetr, torch.nn.Module], tmp_path: Path, name: str) -> None:
    workload, model = nano
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(TrainfitError, match="not a"):
        workload.load(model, str(tmp_path / name))


def test_pretrained_without_network_names_file_and_flag(
    nano: tuple[RfDetr, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    def refuse(*_arguments: object, **_options: object) -> None:
        raise requests.ConnectionError("no network")

    monkeypatch.setenv("RF_HOME", str(tmp_path))
    monkeypatch.setattr(requests, "get", refuse)
    workload, model = nano
    with pytest.raises(TrainfitError, match=r"rf-detr-nano\.pth.*--weights"):
        workload.load(model, "pretrained")


def test_metadata_makes_the_workload_again(nano: tuple[RfDetr, torch.nn.Module]) -> None:
    again = workload_from_metadata(nano[0].metadata())
    assert isinstance(again, RfDetr)
    assert again.config == nano[0].config
    assert again.classes == ("cat", "dog")
