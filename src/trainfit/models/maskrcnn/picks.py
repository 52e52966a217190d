"""The anchors and regions that Mask R-CNN's two samplers select in an image, by the image's own random numbers."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from trainfit.models.maskrcnn.data import to_images, to_targets
from trainfit.models.maskrcnn.lean import assign_to_anchors
from trainfit.step.random_state import RandomState
from trainfit.tasks.detection.samples import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Forwarded:
    """Outputs of the backbone and the RPN's head for a micro-batch."""

    images: ImageList
    """The images, padded to one canvas."""
    features: Mapping[str, torch.Tensor]
    """Level of the feature pyramid -> its features."""
    levels: list[int]
    """Anchors of an image on each level."""
    objectness: torch.Tensor
    """(anchors of all images, 1)."""
    deltas: torch.Tensor
    """(anchors of all images, 4)."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image."""
        return self.images.image_sizes


@dataclass(frozen=True, kw_only=True, eq=False)
class Picks:
    """The anchors and regions selected by both samplers: about 30 KiB per image."""

    anchors: torch.Tensor
    """Numbers of the sampled anchors, positive ones first."""
    anchor_labels: torch.Tensor
    """1 or 0 for each of them."""
    positive_anchors: torch.Tensor
    """Numbers of the sampled anchors that show an object."""
    target_deltas: torch.Tensor
    """(positive anchors, 4)."""
    proposed: int
    """Proposals of all images, as NMS left them."""
    regions: list[torch.Tensor]
    """(n, 4) of each image: the sampled regions in pixels."""
    matched: list[torch.Tensor]
    """(n,) of each image: the object that belongs to each region."""
    labels: list[torch.Tensor]
    """(n,) of each image: classes, 0 for the background."""
    region_deltas: list[torch.Tensor]
    """(n, 4) of each image: the target deltas of the box head."""
    positive: list[torch.Tensor]
    """Of each image, the numbers of its regions that show an object."""

    def counts(self) -> dict[str, float]:
        """The count that normalises each term."""
        anchors = float(len(self.anchors))
        regions = float(sum(map(len, self.regions)))
        masks = float(sum(map(len, self.positive)))
        return {"objectness": anchors, "rpn_box": anchors, "class": regions, "box": regions, "mask": masks}

    def numbers(self) -> dict[str, float]:
        """Figures that determine the memory."""
        counts = self.counts()
        return {"proposals": float(self.proposed), "rois": counts["class"], "positives": counts["mask"]}


def forward(rcnn: FasterRCNN, samples: Sequence[Sample], canvas: tuple[int, int]) -> Forwarded:
    """Run the backbone and the RPN's head: objectness and deltas of all anchors."""
    images = to_images(samples, canvas, next(rcnn.parameters()))
    features: Mapping[str, torch.Tensor] = rcnn.backbone(images.tensors)
    rpn: Any = rcnn.rpn
    objectness, deltas = rpn.head(list(features.values()))
    levels = [level[0].numel() for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    return Forwarded(images=images, features=features, levels=levels, objectness=objectness, deltas=deltas)


def pick(rcnn: FasterRCNN, samples: Sequence[Sample], outputs: Forwarded) -> Picks:
    """What both samplers pick: `RegionProposalNetwork.forward` and `compute_loss` (torchvision 0.29 rpn.py) up to the losses,
    and `RoIHeads.select_training_samples` (roi_heads.py).
    """
    targets = to_targets(samples, next(rcnn.parameters()))
    rpn: Any = rcnn.rpn
    anchors = rpn.anchor_generator(outputs.images, list(outputs.features.values()))
    proposals = rpn.box_coder.decode(outputs.deltas.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(proposals, outputs.objectness, outputs.sizes, outputs.levels)
    labels, matched = assign_to_anchors(rpn, anchors, targets)
    target_deltas = torch.cat(list(rpn.box_coder.encode(matched, anchors)))
    picked, chosen = _pick_of_each(rcnn, samples, labels, proposals, targets)
    positive, negative = (torch.where(torch.cat(side))[0] for side in picked)
    sampled = torch.cat((positive, negative))
    regions, objects, classes, region_deltas = chosen
    return Picks(
        anchors=sampled,
        anchor_labels=torch.cat(labels)[sampled],
        positive_anchors=positive,
        target_deltas=target_deltas[positive],
        proposed=sum(map(len, proposals)),
        regions=regions,
        matched=objects,
        labels=classes,
        region_deltas=region_deltas,
        positive=[torch.where(label > 0)[0] for label in classes],
    )


def _pick_of_each(
    rcnn: FasterRCNN,
    samples: Sequence[Sample],
    labels: Sequence[torch.Tensor],
    proposals: Sequence[torch.Tensor],
    targets: Sequence[dict[str, torch.Tensor]],
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Run both samplers image by image, each image with its own stream of random numbers.

    Returns:
        Positive and negative anchors, in the form of the RPN's sampler; regions, objects, classes and target deltas, in the
        form of `RoIHeads.select_training_samples`.
    """
    rpn: Any = rcnn.rpn
    heads: Any = rcnn.roi_heads
    anchors: list[list[torch.Tensor]] = [[], []]
    chosen: list[list[torch.Tensor]] = [[], [], [], []]
    for sample, label, proposal, target in zip(samples, labels, proposals, targets, strict=True):
        with_masks = {**target, "masks": target["labels"]}  # torchvision requires the key
        with own_stream(sample.image_id, label.device):
            for column, own in zip(anchors, rpn.fg_bg_sampler([label]), strict=True):
                column += own
            for column, own in zip(chosen, heads.select_training_samples([proposal], [with_masks]), strict=True):
                column += own
    return anchors, chosen


@contextmanager
def own_stream(image_id: int, device: torch.device) -> Generator[None]:
    """Draw random numbers that follow from the seed of the window (`torch.manual_seed`) and the image alone."""
    state = RandomState.now(device)
    digest = blake2b(f"{torch.initial_seed()} {image_id}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)
    try:
        yield
    finally:
        state.restore(device)
