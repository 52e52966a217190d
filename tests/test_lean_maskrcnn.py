"""Mask R-CNN in pieces against torchvision's own functions."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import box_iou

from trainfit.models.images import crowded_sample
from trainfit.models.maskrcnn import detect as detecting
from trainfit.models.maskrcnn import lean
from trainfit.models.maskrcnn.family import MaskRcnnSetting
from trainfit.models.maskrcnn.model import build_model
from trainfit.tasks.detection.masks import decode_rle


def random_boxes(n: int, generator: torch.Generator, *, side: int = 60) -> torch.Tensor:
    """Whole-number boxes in a small square, so that overlaps tie."""
    corners = torch.randint(0, side, (n, 2), generator=generator)
    sizes = torch.randint(1, side // 2, (n, 2), generator=generator)
    return torch.cat((corners, corners + sizes), 1).float()


@pytest.mark.parametrize("low_quality", [True, False])
def test_matching_in_pieces_is_torchvisions(monkeypatch: pytest.MonkeyPatch, low_quality: bool) -> None:
    g = torch.Generator().manual_seed(1)
    monkeypatch.setattr(lean, "IOU_PIECE", 64)
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=low_quality)
    kinds: set[int] = set()
    for case in range(60):
        boxes, anchors = random_boxes(1 + case % 9, g), random_boxes(1 + 7 * case, g)
        expected = matcher(box_iou(boxes, anchors))
        assert torch.equal(lean.match(matcher, boxes, anchors), expected)
        kinds |= set(expected.clamp(max=0).tolist())
    assert kinds == {-2, -1, 0}


def test_labels_of_anchors_are_torchvisions_also_without_objects() -> None:
    model: Any = build_model(MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=64, max_size=96), classes=2)
    g = torch.Generator().manual_seed(2)
    anchors = [random_boxes(200, g), random_boxes(150, g)]
    targets = [{"boxes": random_boxes(4, g)}, {"boxes": torch.zeros(0, 4)}]
    expected = model.rpn.assign_targets_to_anchors(anchors, targets)
    found = lean.assign_to_anchors(model.rpn, anchors, targets)
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip(found, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("piece", [1, 5000, 10**9])
def test_mask_targets_in_pieces_are_torchvisions(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(lean, "MASK_PIECE", piece)
    g = torch.Generator().manual_seed(3)
    masks = torch.rand((9, 41, 57), generator=g) > 0.6
    size = (62, 86)
    regions = random_boxes(40, g) + torch.rand((40, 4), generator=g)
    matched = torch.randint(0, 7, (40,), generator=g)  # two masks belong to no region
    resized = functional.interpolate(masks[:, None].float(), size=size)[:, 0].byte()
    expected = project_masks_on_boxes(resized, regions, matched, 28)
    assert torch.equal(lean.mask_targets(masks, size, regions, matched, 28), expected)


def untrained() -> Any:
    """A model that finds something everywhere."""
    torch.manual_seed(0)
    model: Any = build_model(MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=64, max_size=96), classes=2)
    model.roi_heads.score_thresh = 0.0
    model.roi_heads.detections_per_img = 12
    return model.eval()


@pytest.mark.parametrize("pixels", [1, 2**24])
def test_detections_are_torchvisions(monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    monkeypatch.setattr(detecting, "PIXELS_AT_ONCE", pixels)
    model = untrained()
    samples = [crowded_sample(h, w, objects=1, classes=2, masks=False) for h, w in ((64, 96), (96, 64), (48, 96))]
    images = [sample.image.float() / 255 for sample in samples]
    with torch.no_grad():  # portrait and landscape images have canvases of their own
        (first, last), (portrait,) = model([images[0], images[2]]), model([images[1]])
        expected = [first, portrait, last]
    found = detecting.detect(model, samples, torch.ones(2, dtype=torch.bool))
    for ours, theirs, sample in zip(found, expected, samples, strict=True):
        assert len(ours.boxes) == 12
        assert torch.equal(ours.boxes, theirs["boxes"])
        assert torch.equal(ours.scores, theirs["scores"])
        assert torch.equal(ours.classes + 1, theirs["labels"])
        drawn = torch.stack([torch.from_numpy(decode_rle(mask, *sample.original_size)) for mask in ours.masks or ()])
        assert torch.equal(drawn, theirs["masks"][:, 0] > 0.5)
        assert drawn.any()
        assert not drawn.all()
