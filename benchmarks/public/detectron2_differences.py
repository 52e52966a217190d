"""Predicted differences of memory between models against those of Detectron2's zoo: R101 - R50, GN - frozen BN, more classes.

    python -m benchmarks.public.detectron2_differences [NAME ...]

Differences leave out what both rows share: the images that a whole training happened to draw, Detectron2's own buffers.
The zoo has steps of 0.1 GB, so a difference of 1.1 GB is known to 9 %. Steps and assumptions are those of
`public/detectron2_zoo.py`; the norms and the box head of the rows with GN and SyncBN are those of configs/Misc, where
SyncBN is traced as BatchNorm of one process. A model takes half a minute to trace; traces are kept in the cache.
The second figure has the workspace of non-fused Winograd at every convolution, the largest that `memory.hidden` knows;
which algorithms the cuDNN of these rows took is not published.

These are torchvision's models; `public/detectron2_code.py` traces Detectron2's own, and results/detectron2.md says why rows
whose peak lies in convolutions over regions are measured higher than any trace of tensors has them.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmarks.public import detectron2_zoo, traces
from benchmarks.public.predictions import predict
from benchmarks.public.rows import DATA, Case, Row
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from trainfit.gpus.catalogue import MIB, find_gpu
from trainfit.memory.allocator import replay
from trainfit.memory.predict import completed

FPN3X = "configs/COCO-InstanceSegmentation/mask_rcnn_{}_FPN_3x.yaml"
BOXES3X = "configs/COCO-Detection/faster_rcnn_{}_FPN_3x.yaml"
RETINA3X = "configs/COCO-Detection/retinanet_{}_FPN_3x.yaml"
LVIS = "configs/LVISv0.5-InstanceSegmentation/mask_rcnn_{}_FPN_1x.yaml"
MISC = "configs/Misc/mask_rcnn_R_50_FPN_3x_{}.yaml"
LVIS_CLASSES = 1230
NORMS = {"gn": partial(torch.nn.GroupNorm, 32), "syncbn": torch.nn.BatchNorm2d}
MASK, BOXES, RETINA = "mask_rcnn", "faster_rcnn", "retinanet"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mask R50": (FPN3X.format("R_50"), {"head": MASK, "backbone": "R_50"}),
    "mask R101": (FPN3X.format("R_101"), {"head": MASK, "backbone": "R_101"}),
    "mask X101": (FPN3X.format("X_101_32x8d"), {"head": MASK, "backbone": "X_101_32x8d"}),
    "boxes R50": (BOXES3X.format("R_50"), {"head": BOXES, "backbone": "R_50"}),
    "boxes R101": (BOXES3X.format("R_101"), {"head": BOXES, "backbone": "R_101"}),
    "retinanet R50": (RETINA3X.format("R_50"), {"head": RETINA, "backbone": "R_50"}),
    "retinanet R101": (RETINA3X.format("R_101"), {"head": RETINA, "backbone": "R_101"}),
    "mask R50 GN": (MISC.format("gn"), {"norm": "gn"}),
    "mask R50 SyncBN": (MISC.format("syncbn"), {"norm": "syncbn"}),
    "mask R50 LVIS": (LVIS.format("R_50"), {"classes": LVIS_CLASSES}),
    "mask R101 LVIS": (LVIS.format("R_101"), {"backbone": "R_101", "classes": LVIS_CLASSES}),
}
"""Name -> (config, what its step is built from)."""
DIFFERENCES = (
    ("mask R101", "mask R50"),
    ("boxes R101", "boxes R50"),
    ("retinanet R101", "retinanet R50"),
    ("mask X101", "mask R101"),
    ("mask R50", "boxes R50"),
    ("mask R50 GN", "mask R50"),
    ("mask R50 SyncBN", "mask R50"),
    ("mask R50 LVIS", "mask R50"),
    ("mask R101 LVIS", "mask R50 LVIS"),
)


def build(device: torch.device, backbone: str = "R_50", norm: str = "", classes: int = 80) -> Any:
    """The zoo's Mask R-CNN step with other norms and heads, or another number of classes."""
    extra: dict[str, Any] = {}
    heads: dict[str, Any] = {}
    if norm:
        layer = NORMS[norm]
        extra = {"norm_layer": layer}
        heads["box_head"] = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=layer)
        heads["mask_head"] = MaskRCNNHeads(256, (256,) * 4, 1, norm_layer=layer)
    names = detectron2_zoo.BACKBONES
    body = resnet_fpn_backbone(backbone_name=names[backbone], weights=None, trainable_layers=3, **extra)
    if norm:
        fpn: Any = body.fpn
        for block in (*fpn.inner_blocks, *fpn.layer_blocks):
            block.append(NORMS[norm](256))

    low, high = detectron2_zoo.HEIGHT, detectron2_zoo.WIDTH
    model = detection.MaskRCNN(body, num_classes=classes + 1, min_size=low, max_size=high, **heads)
    return detectron2_zoo.Step(device, MASK, backbone, 2, detectron2_zoo.OBJECTS, 8, model=model)


def case_of(name: str) -> Case:
    """What is traced: the zoo's own case, where there is one."""
    arguments = CASES[name][1]
    if "head" in arguments:
        return Case(
            source="detectron2_zoo",
            arguments={**arguments, "batch": 2, "objects_per_image": detectron2_zoo.OBJECTS, "ranks": 8},
            capability=detectron2_zoo.CAPABILITY,
        )
    return Case(source="detectron2_differences", arguments=arguments, capability=detectron2_zoo.CAPABILITY)


def main() -> None:
    """Trace what is missing and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), help=", ".join(CASES))
    names: list[str] = parser.parse_args().names
    lines = (DATA / "public_memory/detectron2_zoo.jsonl").read_text().splitlines()
    measured = {record["config"]: record["value_mib"] for record in map(json.loads, lines)}
    traces.make(case_of(name) for name in names)
    template = detectron2_zoo.rows()[0]
    predicted: dict[str, tuple[float, float]] = {}
    print("model            measured MiB  predicted MiB   error   with workspaces   error")
    for name in names:
        row: Row = replace(template, name=name, case=case_of(name), drawn=None)
        found = predict(row)
        if found is None:
            print(f"{name:16} no trace: {traces.failure(case_of(name))}")
            continue
        predicted[name] = found.likely_mib, with_workspaces(case_of(name))
        print(f"{name:16}{_columns(predicted[name], measured[CASES[name][0]])}")
    print("\ndifference                     measured MiB  predicted MiB   error   with workspaces   error")
    for one, other in DIFFERENCES:
        if one in predicted and other in predicted:
            known = measured[CASES[one][0]] - measured[CASES[other][0]]
            least, most = (ours - theirs for ours, theirs in zip(predicted[one], predicted[other], strict=True))
            print(f"{f'{one} - {other}':30}{_columns((least, most), known)}")


def with_workspaces(case: Case) -> float:
    """MiB allocated at most where every convolution takes the largest workspace of `memory.hidden`."""
    stored = traces.load(case)
    assert stored is not None
    most = completed(stored, find_gpu(detectron2_zoo.CARD), bound="most")
    return replay(most.columns.trace(), capacity_bytes=None).peak_allocated_bytes / MIB


def _columns(predicted: tuple[float, float], known: float) -> str:
    least, most = predicted
    errors = (100 * (least / known - 1), 100 * (most / known - 1))
    return f"{known:13.0f}{least:15.0f}{errors[0]:+8.1f} %{most:16.0f}{errors[1]:+8.1f} %"


if __name__ == "__main__":
    main()
