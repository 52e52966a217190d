"""Lean mask losses and matching of RF-DETR: upstream's numbers, in pieces."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from rfdetr.models.heads.segmentation import point_sample
from torch.utils._python_dispatch import TorchDispatchMode

import mask_cases
from mask_cases import Case, float64_points, make_case, peak_bytes, relative
from support.workloads import make_workload
from trainfit.errors import TrainfitError
from trainfit.models.rfdetr import lean_losses, lean_matching
from trainfit.models.rfdetr.data import to_lean_targets
from trainfit.models.rfdetr.family import Stage
from trainfit.models.rfdetr.lean_losses import LeanCriterion
from trainfit.models.rfdetr.packed_masks import PackedMasks, pack
from trainfit.models.setting import make_setting

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("height", "width"), [(96, 96), (673, 96), (5, 673), (1, 3)])
def test_packed_masks_read_as_upstream_samples_them(height: int, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(4, height, width, generator=g) < 0.5
    chosen = torch.tensor([2, 0, 3, 2, 1])
    ties = torch.cartesian_prod(torch.arange(6) / width, torch.arange(6) / height)  # between two pixels
    points = torch.cat([torch.rand(5, 400, 2, generator=g), ties.clamp(max=1).expand(5, -1, -1)], 1)
    theirs = point_sample(masks[chosen][:, None].float(), points, mode="nearest")[:, 0]
    packed = PackedMasks(bits=pack(masks), size=(height, width))
    assert packed.bits.shape == (4, -(-height * width // 8))
    assert torch.equal(packed.at(chosen, points), theirs > 0)
    shared = point_sample(masks[:, None].float(), points[:1].repeat(4, 1, 1), mode="nearest")[:, 0]
    assert torch.equal(packed.at(torch.arange(4), points[:1]), shared > 0)


def test_masks_that_begin_anywhere_in_memory_are_packed() -> None:
    masks = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    shifted = torch.zeros(1 + masks.numel(), dtype=torch.bool)[1:].view_as(masks).copy_(masks)
    assert torch.equal(pack(shifted), pack(masks))
    assert pack(masks[:0]).shape == (0, 8)


def differences(case: Case) -> tuple[float, float]:
    """The largest relative difference from upstream's of a loss, and of a gradient; matches must be equal."""
    theirs, ours = (mask_cases.run(case, lean=lean) for lean in (False, True))
    assert len(theirs.matches) == len(ours.matches) > 0
    for a, b in zip(theirs.matches, ours.matches, strict=True):
        assert torch.equal(a, b)
    assert theirs.losses.keys() == ours.losses.keys()
    gradients = list(zip(theirs.gradients, ours.gradients, strict=True))
    assert all((a is None) == (b is None) for a, b in gradients)
    return (
        max(relative(loss, ours.losses[name]) for name, loss in theirs.losses.items()),
        max(relative(a, b) for a, b in gradients if a is not None and b is not None),
    )


OBJECTS = pytest.mark.parametrize("objects", [(0, 5, 1), (30,), (0, 0), (2, 25, 0)])


@OBJECTS
@pytest.mark.parametrize("stage", ["single", "masks"])
def test_losses_are_upstreams_bit_for_bit(objects: Sequence[int], stage: Stage) -> None:
    loss, gradient = differences(make_case(1, objects, stage=stage))
    assert loss == 0
    assert gradient <= 1e-6


@OBJECTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_change_nothing_but_the_order_of_sums(
    objects: Sequence[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_losses, "PIECE", 7 * 24 * 24)
    monkeypatch.setattr(lean_matching, "PIECE", 11 * 36)
    with float64_points() if dtype == torch.float64 else nullcontext():
        loss, gradient = differences(make_case(1, objects, dtype=dtype))
    assert loss <= (1e-12 if dtype == torch.float64 else 1e-6)
    assert gradient <= (1e-12 if dtype == torch.float64 else 1e-6)


def test_costs_that_are_not_finite_are_replaced_as_upstream_does() -> None:
    case = make_case(2, (4, 3))
    with torch.no_grad():
        case.outputs["pred_masks"]["query_features"][0, 3] = float("inf")
        case.outputs["aux_outputs"][0]["pred_logits"][1, 7] = float("nan")
    theirs, ours = (mask_cases.run(case, lean=lean) for lean in (False, True))
    for a, b in zip(theirs.matches, ours.matches, strict=True):
        assert torch.equal(a, b)


def test_a_hundred_objects_take_less_than_a_quarter_of_upstreams_memory() -> None:
    case = make_case(0, (100,), queries=100, groups=13, side=432, layers=1, channels=16)
    theirs, ours = (peak_bytes(case, lean=lean) for lean in (False, True))
    assert ours * 4 < theirs


class Kernels(TorchDispatchMode):
    """Counts the operators that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        return func(*args, **(kwargs or {}))


def kernels(images: int, *, lean: bool) -> int:
    """Operators of losses and backward with ten objects in each image."""
    case = make_case(3, (10,) * images)
    with Kernels() as seen:
        mask_cases.run(case, lean=lean)
    return seen.count


def test_few_objects_take_about_as_many_kernels_as_upstream_at_every_micro_batch() -> None:
    two, four = (kernels(images, lean=True) for images in (2, 4))
    assert four < 1.1 * kernels(4, lean=False)  # which on CUDA takes more: it reads the labels of each image by itself
    assert four - two < 0.1 * two


def test_lean_is_the_default_and_can_be_switched_off() -> None:
    knobs = {"resolution": 60, "groups": 1, "num_queries": 12}
    lean, plain = (make_workload("rfdetr-seg-nano", ("a",), knobs | more) for more in ({}, {"lean": "off"}))
    assert isinstance(lean.criterion, LeanCriterion)
    assert not isinstance(plain.criterion, LeanCriterion)
    assert not isinstance(make_workload("rfdetr-nano", ("a",), {"groups": 1}).criterion, LeanCriterion)
    assert make_setting("rfdetr-seg-nano").to_json()["lean"] == "on"
    with pytest.raises(TrainfitError, match="--lean must be on or off"):
        make_setting("rfdetr-seg-nano", lean="maybe")


def test_targets_keep_a_bit_a_pixel() -> None:
    case = make_case(0, (3, 0, 2))
    targets = to_lean_targets(case.samples, case.outputs["pred_logits"])
    assert [len(target["masks"]) for target in targets] == [3, 0, 2]
    assert all(target["masks"].bits.shape[1] == 96 * 96 // 8 for target in targets)
    for target, sample in zip(targets, case.samples, strict=True):
        assert sample.masks is not None
        every = (torch.stack(torch.meshgrid(torch.arange(96), torch.arange(96), indexing="xy"), -1) + 0.5) / 96
        read = target["masks"].at(torch.arange(len(sample.masks)), every.view(1, -1, 2))
        assert torch.equal(read, sample.masks.flatten(1))
