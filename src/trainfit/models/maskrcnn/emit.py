"""Writes a plan of a Mask R-CNN or Faster R-CNN as a configuration of detectron2."""

from trainfit.models.emit import Job, register, rounded
from trainfit.models.maskrcnn.family import MaskRcnnSetting
from trainfit.models.setting import Setting

BATCH = 16
RATE = 0.02
ITERATIONS = 270_000
STEPS = (210_000, 250_000)
WARMUP = 1000
CHECKPOINTS = 5000
"""detectron2 configs/Base-RCNN-FPN.yaml and COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml."""


def _without_blocks(setting: Setting) -> bool:
    return setting.checkpointing == "none"


def _base(setting: MaskRcnnSetting) -> str:
    """The configuration of detectron2's whose model is nearest."""
    depth = 101 if "-r101-" in setting.model else 50
    if setting.has_masks:
        return f"COCO-InstanceSegmentation/mask_rcnn_R_{depth}_FPN_3x.yaml"
    return f"COCO-Detection/faster_rcnn_R_{depth}_FPN_3x.yaml"


def _detectron2_knobs(setting: MaskRcnnSetting) -> dict[str, object]:
    """Knobs of the model that are not as published."""
    options: dict[str, object] = {}
    if setting.trainable_stages is not None:
        options["BACKBONE"] = {"FREEZE_AT": 5 - setting.trainable_stages}
    if setting.proposals is not None and setting.model != "maskrcnn-r50-v2":
        options["RPN"] = {"PRE_NMS_TOPK_TRAIN": setting.proposals[0], "POST_NMS_TOPK_TRAIN": setting.proposals[1]}
    return options


def _detectron2_sides(setting: MaskRcnnSetting) -> dict[str, object]:
    """Sides in training, and in evaluation where they are others."""
    drawn = setting.drawn_sides
    longest = setting.sides[1]
    is_range = setting.short_sides is not None and "-" in setting.short_sides
    options: dict[str, object] = {"MIN_SIZE_TRAIN": [drawn[0], drawn[-1]] if is_range else list(drawn)}
    options |= {"MIN_SIZE_TRAIN_SAMPLING": "range"} if is_range else {}
    options["MAX_SIZE_TRAIN"] = longest
    if setting.short_sides is not None:
        options |= {"MIN_SIZE_TEST": setting.eval_side, "MAX_SIZE_TEST": longest}
    return options


@register("detectron2", families=("maskrcnn",), accumulates=False, checkpoints=_without_blocks)
def _detectron2(job: Job) -> tuple[str, list[str]]:
    """Source: detectron2 config/defaults.py. It has neither accumulation nor checkpointing of ResNets."""
    import yaml

    setting = job.setting
    assert isinstance(setting, MaskRcnnSetting)
    heads: dict[str, object] = {"NUM_CLASSES": setting.classes}
    heads |= {"BATCH_SIZE_PER_IMAGE": setting.rois_per_image} if setting.rois_per_image else {}
    model: dict[str, object] = {"MASK_ON": setting.has_masks, "ROI_HEADS": heads}
    if setting.model == "maskrcnn-r50-v2":
        model |= {
            "RESNETS": {"NORM": "BN", "STRIDE_IN_1X1": False},
            "FPN": {"NORM": "BN"},
            "RPN": {"CONV_DIMS": [-1, -1]},
            "WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_CONV": 4, "NUM_FC": 1, "NORM": "BN"},
            "ROI_MASK_HEAD": {"NUM_CONV": 4, "NORM": "BN"},
        }
    images = job.effective_batch
    longer = BATCH / images
    solver = {
        "IMS_PER_BATCH": images,
        "BASE_LR": rounded(RATE / longer),
        "MAX_ITER": round(ITERATIONS * longer),
        "STEPS": [round(at * longer) for at in STEPS],
        "WARMUP_ITERS": round(WARMUP * longer),
        "CHECKPOINT_PERIOD": round(CHECKPOINTS * longer),
        "AMP": {"ENABLED": setting.precision != "fp32"},
    }
    record = {
        "_BASE_": _base(setting),
        "MODEL": model | _detectron2_knobs(setting),
        "INPUT": _detectron2_sides(setting) | ({"FORMAT": "RGB"} if setting.model == "maskrcnn-r50-v2" else {}),
        "SOLVER": solver,
        "DATALOADER": {"NUM_WORKERS": job.workers},
        "CUDNN_BENCHMARK": False,
    }
    head = (
        "# A file of detectron2's folder configs/, for its tools/train_net.py:\n"
        f"# train_net.py --num-gpus {job.gpus} --config-file configs/THIS_FILE\n"
    )
    notes = [
        "detectron2's optimizer is SGD with momentum, whatever the plan's; it holds no more than AdamW.",
        f"Rate and iterations are those of its 3x schedule for {BATCH} images, scaled to {images} (linear; Goyal 2017).",
    ]
    if setting.precision == "bf16":
        notes.append("SOLVER.AMP computes in fp16, with loss scaling: the same memory as the plan's bf16.")
    if setting.ema:
        notes.append("detectron2 keeps no EMA weights.")
    return head + yaml.safe_dump(record, sort_keys=False), notes
