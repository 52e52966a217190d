"""Detectron2's model zoo (V100, 2 images a GPU, float32): the rows whose model torchvision has too.

Memory is the most that torch allocated over a whole training, in steps of 0.1 GB. Detectron2 groups images by aspect
ratio (DATALOADER.ASPECT_RATIO_GROUPING), so the largest batch is two images of 800 x 1333, not a mixed pair; its masks
stay polygons on the CPU, so masks here have one pixel. Matching compares boxes with anchors, so the fullest image counts
(`OBJECTS`; the interval is from `FEWEST` to `MOST`). Stem and first stage are frozen, BatchNorm is frozen (FREEZE_AT 2).
Eight GPUs: DistributedDataParallel holds buckets as large as the gradients. RetinaNet's classification loss is over all
images at once, its targets made by a one-hot tensor of int64 (detectron2 modeling/meta_arch/retinanet.py), where
torchvision goes image by image. Overlaps of boxes are as Detectron2 computed them in October 2019 (989f52d6,
structures/boxes.py, pairwise_iou).
"""

import hashlib
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmarks.public.rows import DATA, Case, Row, records
from torchvision.models import detection
from torchvision.models.detection import retinanet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import LastLevelP6P7
from torchvision.ops import sigmoid_focal_loss

from trainfit.models.family import DrawnSizes
from trainfit.models.maskrcnn.caps import cap_training_samples

CARD, CAPABILITY = "V100 16GB", (7, 0)
BACKBONES = {"R_50": "resnet50", "R_101": "resnet101", "X_101_32x8d": "resnext101_32x8d"}
HEADS = {
    "faster_rcnn": partial(detection.FasterRCNN, num_classes=81),
    "mask_rcnn": partial(detection.MaskRCNN, num_classes=81),
    "keypoint_rcnn": partial(detection.KeypointRCNN, num_classes=2, num_keypoints=17),
    "retinanet": partial(detection.RetinaNet, num_classes=80),
}
HEIGHT, WIDTH = 800, 1333
SHORT_SIDES, ASPECT = (640, 672, 704, 736, 768, 800), 4 / 3
"""INPUT.MIN_SIZE_TRAIN, one drawn for each batch; of COCO's images, 640 x 480 is the most frequent size."""
OF_PIXELS = 0.9
"""Share of the work that grows with the pixels: an assumption, the heads' regions do not."""
OBJECTS = 90
"""An assumption about the fullest image of COCO's training set, made after 1 object was 20 % too low on these rows."""
FEWEST, MOST = 10, 100
"""What the interval spans, since no row says how many objects the images had that made its peak: the two numbers that `trainfit
predict` shows where no count is given, as for rf-detr (`single_rows`)."""


class Step:
    """SGD with momentum, one parameter tensor at a time as Detectron2's torch had it."""

    ema, blocks = None, 0

    def __init__(
        self,
        device: torch.device,
        head: str,
        backbone: str,
        batch: int,
        objects_per_image: int,
        ranks: int,
        model: torch.nn.Module | None = None,
    ) -> None:
        """Build model (unless it is given) and optimizer on `device`."""
        self.model: Any = (model or _model(head, backbone)).to(device).train()
        if head != "retinanet":
            cap_training_samples(self.model.roi_heads)
            self.model.rpn.box_similarity = self.model.roi_heads.box_similarity = _overlaps
        else:
            overlaps: Any = retinanet.box_ops
            overlaps.box_iou = _overlaps
            vars(self.model.head.classification_head)["compute_loss"] = _loss_of_all_images
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.buckets = [torch.empty_like(p) for p in parameters] if ranks > 1 else []
        self.optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4, foreach=False)
        self.device, self.head = device, head
        self.images = [torch.zeros(3, HEIGHT, WIDTH) for _ in range(batch)]
        self.targets = [self._target(objects_per_image) for _ in range(batch)]

    def run(self) -> None:
        """One step: images and boxes come to the device, as many as the batch has."""
        images = [image.to(self.device) for image in self.images]
        targets = [{name: value.to(self.device) for name, value in target.items()} for target in self.targets]
        losses = self.model(images, targets)
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()

    def _target(self, objects: int) -> dict[str, torch.Tensor]:
        corner = torch.arange(objects, dtype=torch.float32)[:, None] + torch.tensor([[10.0, 10.0]])
        target = {"boxes": torch.cat([corner, corner + 200], 1), "labels": torch.ones(objects, dtype=torch.int64)}
        if self.head == "mask_rcnn":
            target["masks"] = torch.ones(objects, 1, 1, dtype=torch.uint8)
        if self.head == "keypoint_rcnn":
            target["keypoints"] = torch.full((objects, 17, 3), 50.0)
        return target


def _model(head: str, backbone: str) -> torch.nn.Module:
    extra: dict[str, Any] = {}
    if head == "retinanet":
        extra = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    body = resnet_fpn_backbone(backbone_name=BACKBONES[backbone], weights=None, trainable_layers=3, **extra)
    return HEADS[head](body, min_size=HEIGHT, max_size=WIDTH)


def _overlaps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each pair of boxes, with the tensors that Detectron2 made for it in 2019."""
    first = torch.max(one[:, None, :2], other[:, :2])
    last = torch.min(one[:, None, 2:], other[:, 2:])
    sides = (last - first).clamp(min=0)
    common = sides[:, :, 0] * sides[:, :, 1]
    of_one, of_other = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (one, other))
    return torch.where(common > 0, common / (of_one[:, None] + of_other - common), common.new_zeros(1))


def _loss_of_all_images(
    targets: list[dict[str, torch.Tensor]], outputs: dict[str, torch.Tensor], matched: list[torch.Tensor]
) -> torch.Tensor:
    """RetinaNet's classification loss with the tensors that Detectron2 makes for it."""
    logits = outputs["cls_logits"]
    classes = logits.shape[-1]
    labels = torch.stack([t["labels"][m.clamp(min=0)] for t, m in zip(targets, matched, strict=True)])
    hot = torch.zeros(*labels.shape, classes + 1, dtype=torch.int64, device=logits.device)
    hot.scatter_(-1, labels[..., None], 1)
    chosen = logits.clone()  # a copy, as an index by all valid anchors makes it
    return sigmoid_focal_loss(chosen, hot[..., :-1].to(logits.dtype), reduction="sum") / len(targets)


build = Step


def rows() -> list[Row]:
    """Those that torchvision can build."""
    made = (_row(record) for record in records(DATA / "public_memory/detectron2_zoo.jsonl"))
    return [row for row in made if row is not None]


def _row(record: dict[str, Any]) -> Row | None:
    """None: a head, backbone, norm or data set that torchvision's models have not."""
    plain = record["model"].removesuffix("_1x").removesuffix("_3x").removesuffix("_FPN")
    head = next((head for head in HEADS if plain.startswith(head)), None)
    backbone = plain.removeprefix(f"{head}_")
    if head is None or backbone not in BACKBONES or "FPN" not in record["model"] or record["dataset"] != "COCO":
        return None
    if record["micro_batch"] != 2 or "GN" in record["note"].partition("norm ")[2][:8]:
        return None
    arguments = {"head": head, "backbone": backbone, "batch": 2, "objects_per_image": OBJECTS, "ranks": 8}
    case = Case(source="detectron2_zoo", arguments=arguments, capability=CAPABILITY)
    return Row(
        source="detectron2_zoo",
        group=head,
        name=record["model"],
        card=CARD,
        quantity="allocated",
        measured_mib=record["value_mib"],
        case=case,
        bounds=tuple(replace(case, arguments={**arguments, "objects_per_image": count}) for count in (FEWEST, MOST)),
        batch=2,
        traced_batch=2,
        seconds=record["seconds_per_step"],
        drawn=DrawnSizes(
            pixels=tuple(side**2 * ASPECT / (HEIGHT * WIDTH) for side in SHORT_SIDES),
            flops_share=OF_PIXELS,
            bytes_share=OF_PIXELS,
        ),
        fitted_time=hashlib.sha256(record["model"].encode()).hexdigest()[0] < "8",
    )
