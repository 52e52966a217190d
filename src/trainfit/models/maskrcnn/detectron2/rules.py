"""What becomes of each key of Detectron2's configurations for R50/R101-FPN."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A key that is carried over."""

    make: Callable[[Any], list[str]]
    """Its value -> words of the command line; raises ValueError for a value that trainfit has not."""
    training: bool = False
    """Whether only `trainfit train` has these flags."""


@dataclass(frozen=True, kw_only=True)
class Same:
    """A key whose value the model has by itself."""

    value: Any
    """The value that the model has."""
    instead: str
    """What is done where the file has another value; empty: a file with another value is of another model."""


@dataclass(frozen=True, kw_only=True)
class Instead:
    """A key that is not carried over."""

    text: str
    """What is done instead."""


def _words(flag: str) -> Callable[[Any], list[str]]:
    return lambda value: [flag, str(value)]


def _proposals(_value: Any) -> list[str]:
    return []  # both keys make one flag: `translate.translated`


def _sides(value: Any) -> list[str]:
    sides = [value] if isinstance(value, int) else list(value)
    return ["--short-sides", ",".join(str(int(side)) for side in sides)]


def _test_side(value: Any) -> list[str]:
    """Detectron2 takes a whole number; people write a tuple of one, as for training."""
    (side,) = value if isinstance(value, list) else [value]
    return ["--resolution", str(int(side))]


def _stages(value: Any) -> list[str]:
    if value not in range(6):
        raise ValueError(value)
    return ["--trainable-stages", str(5 - value)]


def _norm(value: Any) -> list[str]:
    return {"FrozenBN": ["--norm", "published"], "GN": ["--norm", "group"]}[value]


def _switch(value: Any) -> list[str]:
    if not isinstance(value, bool):
        raise ValueError(value)
    return []  # `translate.translated` reads it


def _amp(value: Any) -> list[str]:
    _switch(value)
    return ["--precision", "fp16" if value else "fp32"]


def _seed(value: Any) -> list[str]:
    return ["--seed", str(value)] if int(value) >= 0 else []


def _flip(value: Any) -> list[str]:
    return {"horizontal": ["--augment", "default"], "none": ["--augment", "none"]}[value]


def _grouping(value: Any) -> list[str]:
    return {True: ["--aspect-grouping"], False: ["--no-aspect-grouping"]}[value]


def _scheduler(value: Any) -> list[str]:
    if value not in (MULTI_STEP, COSINE):
        raise ValueError(value)
    return []  # `translate.translated` writes the schedule


def _period(value: Any) -> list[str]:
    return ["--eval-steps", str(value)] if int(value) > 0 else []


def _sampling(value: Any) -> list[str]:
    if value not in ("choice", "range"):
        raise ValueError(value)
    return []  # `translate.translated` writes the sides of a range


_DATA = "--data names the data set, which trainfit reads from a folder or file"
MULTI_STEP = "WarmupMultiStepLR"
"""SOLVER.LR_SCHEDULER_NAME of the step schedule."""
COSINE = "WarmupCosineLR"
"""SOLVER.LR_SCHEDULER_NAME of the cosine schedule."""
_SGD = "of torch.optim.SGD with momentum 0.9, as `--optimizer sgd` has it"
RULES: Mapping[str, Flags | Same | Instead] = {
    "VERSION": Same(value=2, instead="trainfit reads version 2"),
    "MODEL.META_ARCHITECTURE": Same(value="GeneralizedRCNN", instead=""),
    "MODEL.BACKBONE.NAME": Same(value="build_resnet_fpn_backbone", instead=""),
    "MODEL.ROI_HEADS.NAME": Same(value="StandardROIHeads", instead=""),
    "MODEL.KEYPOINT_ON": Same(value=False, instead=""),
    "MODEL.LOAD_PROPOSALS": Same(value=False, instead=""),
    "MODEL.MASK_ON": Flags(make=_switch),
    "MODEL.RESNETS.DEPTH": Flags(make=lambda _: []),
    "MODEL.DEVICE": Instead(text="--device auto takes the GPU where there is one"),
    "MODEL.WEIGHTS": Instead(
        text="torchvision's COCO weights, where it has any of this model; --weights random or FILE"
    ),
    "MODEL.PIXEL_MEAN": Instead(text="torchvision's mean of RGB in 0..1"),
    "MODEL.PIXEL_STD": Instead(text="torchvision's deviation of RGB in 0..1"),
    "MODEL.BACKBONE.FREEZE_AT": Flags(make=_stages),
    "MODEL.RESNETS.NORM": Flags(make=_norm),
    "MODEL.RESNETS.STRIDE_IN_1X1": Same(value=False, instead="the stride is in the 3x3 convolution"),
    "MODEL.RESNETS.OUT_FEATURES": Same(value=["res2", "res3", "res4", "res5"], instead=""),
    "MODEL.RESNETS.NUM_GROUPS": Same(value=1, instead=""),
    "MODEL.RESNETS.WIDTH_PER_GROUP": Same(value=64, instead=""),
    "MODEL.RESNETS.RES5_DILATION": Same(value=1, instead=""),
    "MODEL.FPN.IN_FEATURES": Same(value=["res2", "res3", "res4", "res5"], instead=""),
    "MODEL.FPN.OUT_CHANNELS": Same(value=256, instead=""),
    "MODEL.FPN.NORM": Same(value="", instead="no norm in the FPN, as in maskrcnn-r50-v1"),
    "MODEL.FPN.FUSE_TYPE": Same(value="sum", instead=""),
    "MODEL.ANCHOR_GENERATOR.SIZES": Same(
        value=[[32], [64], [128], [256], [512]], instead="anchors of 32 to 512 pixels"
    ),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": Same(value=[[0.5, 1.0, 2.0]], instead="ratios of 0.5, 1 and 2"),
    "MODEL.RPN.IN_FEATURES": Same(value=["p2", "p3", "p4", "p5", "p6"], instead=""),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": Same(value=256, instead="256 anchors an image"),
    "MODEL.RPN.POSITIVE_FRACTION": Same(value=0.5, instead="at most half of them positive"),
    "MODEL.RPN.IOU_THRESHOLDS": Same(value=[0.3, 0.7], instead="thresholds of 0.3 and 0.7"),
    "MODEL.RPN.NMS_THRESH": Same(value=0.7, instead="an NMS threshold of 0.7"),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": Flags(make=_proposals),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": Flags(make=_proposals),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": Same(value=1000, instead="1000 proposals of a level in evaluation"),
    "MODEL.RPN.POST_NMS_TOPK_TEST": Same(value=1000, instead="1000 proposals of an image in evaluation"),
    "MODEL.ROI_HEADS.IN_FEATURES": Same(value=["p2", "p3", "p4", "p5"], instead=""),
    "MODEL.ROI_HEADS.NUM_CLASSES": Instead(text="as many classes as the data set has (--classes to plan without one)"),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": Flags(make=_words("--rois-per-image")),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": Same(value=0.25, instead="at most a quarter of the regions positive"),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": Same(value=[0.5], instead="a threshold of 0.5"),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": Same(value=0.05, instead="a least score of 0.05"),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": Same(value=0.5, instead="an NMS threshold of 0.5"),
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": Same(value=True, instead="objects are appended to the proposals"),
    "MODEL.ROI_BOX_HEAD.NAME": Same(value="FastRCNNConvFCHead", instead=""),
    "MODEL.ROI_BOX_HEAD.NUM_FC": Same(value=2, instead=""),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": Same(value=0, instead="no convolutions in the box head, as in maskrcnn-r50-v1"),
    "MODEL.ROI_BOX_HEAD.FC_DIM": Same(value=1024, instead=""),
    "MODEL.ROI_BOX_HEAD.NORM": Same(value="", instead="no norm in the box head, as in maskrcnn-r50-v1"),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": Same(value=7, instead=""),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": Same(value=2, instead="2 samples a bin"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": Same(value="ROIAlign", instead="ROIAlign without the half pixel's shift"),
    "MODEL.ROI_MASK_HEAD.NAME": Same(value="MaskRCNNConvUpsampleHead", instead=""),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": Same(value=4, instead=""),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": Same(value=256, instead=""),
    "MODEL.ROI_MASK_HEAD.NORM": Same(value="", instead="no norm in the mask head, as in maskrcnn-r50-v1"),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": Same(value=14, instead=""),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": Same(value=2, instead="2 samples a bin"),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": Same(value="ROIAlign", instead="ROIAlign without the half pixel's shift"),
    "DATASETS.TRAIN": Instead(text=_DATA),
    "DATASETS.TEST": Instead(text=f"{_DATA}; its val split is evaluated"),
    "DATALOADER.NUM_WORKERS": Flags(make=_words("--workers"), training=True),
    "DATALOADER.ASPECT_RATIO_GROUPING": Flags(make=_grouping),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": Same(value=False, instead="images without objects are trained on"),
    "DATALOADER.SAMPLER_TRAIN": Same(value="TrainingSampler", instead="every image is seen once an epoch"),
    "INPUT.MIN_SIZE_TRAIN": Flags(make=_sides),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": Flags(make=_sampling),
    "INPUT.MAX_SIZE_TRAIN": Flags(make=_words("--max-size")),
    "INPUT.MIN_SIZE_TEST": Flags(make=_test_side),
    "INPUT.MAX_SIZE_TEST": Instead(text="--max-size, the longest side in training, holds for evaluation too"),
    "INPUT.RANDOM_FLIP": Flags(make=_flip, training=True),
    "INPUT.FORMAT": Same(value="RGB", instead="RGB"),
    "INPUT.MASK_FORMAT": Instead(text="polygons and bitmasks are both read, and drawn at the size after the resize"),
    "INPUT.CROP.ENABLED": Same(value=False, instead="no crops"),
    "SOLVER.IMS_PER_BATCH": Flags(make=lambda _: []),
    "SOLVER.ACCUMULATION_STEPS": Flags(make=lambda _: []),
    "SOLVER.REFERENCE_WORLD_SIZE": Same(value=0, instead="--effective-batch is held on any number of GPUs"),
    "SOLVER.BASE_LR": Flags(make=_words("--lr"), training=True),
    "SOLVER.WEIGHT_DECAY": Flags(make=_words("--weight-decay"), training=True),
    "SOLVER.WEIGHT_DECAY_NORM": Instead(text="norms decay like other weights; frozen ones do not train"),
    "SOLVER.MOMENTUM": Same(value=0.9, instead=f"momentum 0.9, {_SGD}"),
    "SOLVER.NESTEROV": Same(value=False, instead=_SGD),
    "SOLVER.BIAS_LR_FACTOR": Same(value=1.0, instead="biases have the rate of weights"),
    "SOLVER.MAX_ITER": Flags(make=_words("--max-steps"), training=True),
    "SOLVER.STEPS": Flags(make=lambda _: [], training=True),
    "SOLVER.GAMMA": Same(value=0.1, instead="at each of SOLVER.STEPS the rate falls to a tenth"),
    "SOLVER.LR_SCHEDULER_NAME": Flags(make=_scheduler, training=True),
    "SOLVER.WARMUP_METHOD": Same(value="linear", instead="a linear warm-up"),
    "SOLVER.WARMUP_FACTOR": Instead(text="a warm-up begins at 0"),
    "SOLVER.WARMUP_ITERS": Flags(make=lambda _: [], training=True),
    "SOLVER.CHECKPOINT_PERIOD": Instead(text="the state is saved every --save-minutes and after every evaluation"),
    "SOLVER.AMP.ENABLED": Flags(make=_amp),
    "SOLVER.CLIP_GRADIENTS.ENABLED": Flags(make=_switch, training=True),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": Flags(make=lambda _: [], training=True),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": Same(value="norm", instead="the norm of the whole gradient is clipped"),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Same(value=2.0, instead="the 2-norm"),
    "TEST.EVAL_PERIOD": Flags(make=_period, training=True),
    "TEST.DETECTIONS_PER_IMAGE": Same(value=100, instead="100 detections an image"),
    "TEST.AUG.ENABLED": Same(value=False, instead="no augmentation in evaluation"),
    "TEST.PRECISE_BN.ENABLED": Same(value=False, instead="running statistics as training left them"),
    "OUTPUT_DIR": Flags(make=_words("--out"), training=True),
    "SEED": Flags(make=_seed, training=True),
    "CUDNN_BENCHMARK": Same(value=False, instead="cuDNN's own choice of algorithms"),
    "VIS_PERIOD": Same(value=0, instead="pictures are drawn by trainfit detect"),
}
DIFFERENCES = (
    "smooth L1 of the RPN's boxes has beta 1/9 (Detectron2: 0, plain L1), of the region's boxes too",
    "RoIAlign is not shifted by half a pixel and samples 2 x 2 points a bin (Detectron2: ROIAlignV2, adaptive)",
    "RPN losses are divided by the sampled anchors (Detectron2: by 256 times the images, also where fewer were sampled)",
    "images are RGB, normalised by mean and deviation (Detectron2: BGR, deviation 1)",
    "the stride of a ResNet's stage is in its 3x3 convolution (Detectron2 with MSRA's weights: in the 1x1)",
    "weights are torchvision's: a .pkl of Detectron2's model zoo does not load",
)
"""What no key can carry over, between torchvision's model and Detectron2's."""
