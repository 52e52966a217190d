"""Detectron2's configurations of R50/R101-FPN for COCO, written from its documentation (configs/, config/defaults.py)."""

from collections.abc import Mapping
from typing import Any

BASE_RCNN_FPN: Mapping[str, Any] = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
    "DATASETS.TRAIN": ["coco_2017_train"],
    "DATASETS.TEST": ["coco_2017_val"],
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.STEPS": [60000, 80000],
    "SOLVER.MAX_ITER": 90000,
    "INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],
    "VERSION": 2,
}
THREE_TIMES: Mapping[str, Any] = {"SOLVER.STEPS": [210000, 250000], "SOLVER.MAX_ITER": 270000}


def _zoo(depth: int, masks: bool, schedule: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "MODEL.WEIGHTS": f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl",
        "MODEL.MASK_ON": masks,
        "MODEL.RESNETS.DEPTH": depth,
    }
    return {**BASE_RCNN_FPN, **own, **schedule}


ZOO: Mapping[str, Mapping[str, Any]] = {
    "Base-RCNN-FPN.yaml": BASE_RCNN_FPN,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": _zoo(50, True, {}),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml": _zoo(50, True, THREE_TIMES),
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml": _zoo(101, True, THREE_TIMES),
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": _zoo(50, False, {}),
    "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml": _zoo(50, False, THREE_TIMES),
    "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml": _zoo(101, False, THREE_TIMES),
}
"""Name below detectron2's folder configs/ -> values by key; `_BASE_` is resolved."""
EVAL_PERIOD = 0
"""Default of TEST.EVAL_PERIOD (Detectron2's config/defaults.py, as the two below)."""
CHECKPOINT_PERIOD = 5000
"""Default of SOLVER.CHECKPOINT_PERIOD."""
WARMUP_ITERS = 1000
"""Default of SOLVER.WARMUP_ITERS."""
