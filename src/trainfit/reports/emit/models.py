"""Tools that bring the models: rfdetr, detectron2, open_clip."""

import shlex
from collections.abc import Mapping
from math import sqrt

from trainfit.errors import TrainfitError
from trainfit.models.clip.family import ClipSetting
from trainfit.models.maskrcnn.family import MaskRcnnSetting
from trainfit.models.rfdetr.family import RfDetrSetting
from trainfit.models.setting import Setting
from trainfit.planning.make import rate_factor
from trainfit.reports.emit.tool import RATE, RATE_ENCODER, Job, call, means, register, rounded
from trainfit.reports.profile import gib
from trainfit.tracing.events import CATEGORIES

ENCODER_BLOCKS = 12
"""Of RF-DETR's DINOv2: the first of its blocks, and all that upstream's gradient_checkpointing covers (rfdetr 1.11.2)."""
RFDETR_CLASSES: Mapping[str, str] = {
    **{f"rfdetr-{size}": f"RFDETR{size.title()}" for size in ("nano", "small", "medium", "large")},
    **{f"rfdetr-seg-{size}": f"RFDETRSeg{size.title()}" for size in ("nano", "small", "medium", "large")},
    "rfdetr-seg-xlarge": "RFDETRSegXLarge",
    "rfdetr-seg-2xlarge": "RFDETRSeg2XLarge",
}


DETECTRON2_BATCH, DETECTRON2_RATE, DETECTRON2_ITERATIONS, DETECTRON2_STEPS = 16, 0.02, 270_000, (210_000, 250_000)
DETECTRON2_WARMUP, DETECTRON2_CHECKPOINTS = 1000, 5000
"""detectron2 configs/Base-RCNN-FPN.yaml and COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml."""
OPEN_CLIP_BATCH, OPEN_CLIP_RATE = 32_768, 5e-4
"""Radford et al. 2021, table 18; open_clip_train/params.py `get_default_params`."""


def _rfdetr_blocks(setting: Setting) -> bool:
    """Upstream recomputes the encoder alone; the first blocks of a model with masks are the mask head's."""
    blocks = setting.checkpointing
    return blocks == "none" or (isinstance(blocks, int) and blocks <= ENCODER_BLOCKS and "-seg-" not in setting.model)


@register("rfdetr", families=("rfdetr",), checkpoints=_rfdetr_blocks)
def _rfdetr(job: Job) -> tuple[str, list[str]]:
    """Source: rfdetr 1.11.2 config.py `ModelConfig`, `TrainConfig`."""
    setting = job.setting
    gpus = job.plan.gpus
    assert isinstance(setting, RfDetrSetting)
    if setting.model not in RFDETR_CLASSES or setting.stage != "single":
        what = setting.model if setting.model not in RFDETR_CLASSES else f"--stage {setting.stage}"
        raise TrainfitError(f"--emit rfdetr: rfdetr has no {what}; trainfit train has")
    model: dict[str, object] = {"gradient_checkpointing": True} if job.checkpoints else {}
    model |= {"resolution": setting.resolution} if setting.resolution else {}
    if setting.num_queries:
        model |= {"num_queries": setting.num_queries, "num_select": setting.num_queries}
    model |= {"group_detr": setting.groups} if setting.groups else {}
    model |= {"freeze_encoder": True} if setting.freeze_encoder else {}
    model |= {"fused_optimizer": False} if setting.optimizer not in ("adamw-fused", "adamw-host") else {}
    training: dict[str, object] = {
        "dataset_dir": "DIR",
        "batch_size": setting.micro_batch,
        "grad_accum_steps": setting.accumulation,
        "eval_batch_size": setting.eval_micro_batch or setting.micro_batch,
        "amp_dtype": None if setting.precision == "fp32" else setting.precision,
        "multi_scale": setting.multi_scale,
        "use_ema": setting.ema is not False,
        "num_workers": job.plan.loading.workers,
    }
    factor = rate_factor(setting, job.plan.effective_batch) or 1.0
    training |= {"lr": rounded(RATE * factor), "lr_encoder": rounded(RATE_ENCODER * factor)}
    training |= {"devices": gpus, "strategy": "ddp"} if gpus > 1 else {}
    optimizers: Mapping[str, dict[str, object]] = {
        "sgd": {"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.9}},
        "adamw-8bit": {"optimizer": "bitsandbytes.optim.AdamW8bit"},
        "sgd-plain": {"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.0}},
        **{name: {"optimizer": name} for name in ("adam", "adagrad", "rmsprop")},
    }
    training |= optimizers.get(setting.optimizer, {})
    name = RFDETR_CLASSES[setting.model]
    text = f"from rfdetr import {name}\n\nmodel = {call(name, model)}model.{call('train', training)}"
    return text.replace("(\n)", "()"), [*means(setting), *_rfdetr_notes(job)]


def _rfdetr_notes(job: Job) -> list[str]:
    setting = job.setting
    assert isinstance(setting, RfDetrSetting)
    notes = ["It starts from the model's published weights; pretrain_weights=None starts from random ones."]
    if job.checkpoints and setting.checkpointing != ENCODER_BLOCKS:
        notes.append(
            f"rfdetr checkpoints all {ENCODER_BLOCKS} blocks of the encoder: less memory and more time than planned."
        )
    if setting.ema_on_host and setting.ema is not False:
        assert job.plan.prediction is not None
        prediction = job.plan.prediction
        copy = prediction.training.profile.peak.category_bytes[CATEGORIES.index("parameters")]
        if prediction.needs.high_bytes + copy > job.plan.budget.low_bytes:
            raise TrainfitError(
                f"--emit rfdetr: rfdetr keeps the averaged weights on the GPU, and their {gib(copy)} GiB do not fit: plan "
                "with --no-ema"
            )
        notes.append(f"rfdetr keeps the averaged weights on the GPU: {gib(copy)} GiB more than planned.")
    if setting.optimizer == "adamw-host":
        raise TrainfitError(
            "--emit rfdetr: rfdetr keeps the optimizer's state on the GPU: plan with --optimizer adamw-fused or adamw-8bit"
        )
    if setting.lean == "on":
        notes.append("rfdetr's own losses and choice of queries need more than trainfit's: --lean off plans with them.")
    if setting.optimizer == "adamw-8bit":
        notes.append(
            "rfdetr gives an optimizer by its import path the layers' learning rates; its other arguments are yours."
        )
    return notes


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
    found: dict[str, object] = {}
    if setting.trainable_stages is not None:
        found["BACKBONE"] = {"FREEZE_AT": 5 - setting.trainable_stages}
    if setting.proposals is not None and setting.model != "maskrcnn-r50-v2":
        found["RPN"] = {"PRE_NMS_TOPK_TRAIN": setting.proposals[0], "POST_NMS_TOPK_TRAIN": setting.proposals[1]}
    return found


def _detectron2_sides(setting: MaskRcnnSetting) -> dict[str, object]:
    """Sides in training, and in evaluation where they are others."""
    drawn, longest = setting.drawn_sides, setting.sides[1]
    is_range = setting.short_sides is not None and "-" in setting.short_sides
    found: dict[str, object] = {"MIN_SIZE_TRAIN": [drawn[0], drawn[-1]] if is_range else list(drawn)}
    found |= {"MIN_SIZE_TRAIN_SAMPLING": "range"} if is_range else {}
    found["MAX_SIZE_TRAIN"] = longest
    if setting.short_sides is not None:
        found |= {"MIN_SIZE_TEST": setting.eval_side, "MAX_SIZE_TEST": longest}
    return found


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
    images = job.plan.effective_batch
    longer = DETECTRON2_BATCH / images
    solver = {
        "IMS_PER_BATCH": images,
        "BASE_LR": rounded(DETECTRON2_RATE / longer),
        "MAX_ITER": round(DETECTRON2_ITERATIONS * longer),
        "STEPS": [round(at * longer) for at in DETECTRON2_STEPS],
        "WARMUP_ITERS": round(DETECTRON2_WARMUP * longer),
        "CHECKPOINT_PERIOD": round(DETECTRON2_CHECKPOINTS * longer),
        "AMP": {"ENABLED": setting.precision != "fp32"},
    }
    record = {
        "_BASE_": _base(setting),
        "MODEL": model | _detectron2_knobs(setting),
        "INPUT": _detectron2_sides(setting) | ({"FORMAT": "RGB"} if setting.model == "maskrcnn-r50-v2" else {}),
        "SOLVER": solver,
        "DATALOADER": {"NUM_WORKERS": job.plan.loading.workers},
        "CUDNN_BENCHMARK": False,
    }
    head = (
        "# A file of detectron2's folder configs/, for its tools/train_net.py:\n"
        f"# train_net.py --num-gpus {job.plan.gpus} --config-file configs/THIS_FILE\n"
    )
    notes = [
        "detectron2's optimizer is SGD with momentum, whatever the plan's; it holds no more than AdamW.",
        f"Rate and iterations are those of its 3x schedule for {DETECTRON2_BATCH} images, scaled to {images} (linear; Goyal 2017).",
    ]
    if setting.precision == "bf16":
        notes.append("SOLVER.AMP computes in fp16, with loss scaling: the same memory as the plan's bf16.")
    if setting.ema:
        notes.append("detectron2 keeps no averaged weights.")
    return head + yaml.safe_dump(record, sort_keys=False), notes


@register("open_clip", families=("clip",))
def _open_clip(job: Job) -> tuple[str, list[str]]:
    """Source: open_clip 3.3 open_clip_train/params.py; its `--accum-freq` contrasts the whole window, as trainfit does."""
    setting = job.setting
    gpus = job.plan.gpus
    assert isinstance(setting, ClipSetting)
    architecture = setting.model.removeprefix("clip:")
    precision = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}[setting.precision]
    flags = [
        "--model",
        architecture,
        "--batch-size",
        str(setting.micro_batch),
        "--accum-freq",
        str(setting.accumulation),
    ]
    flags += ["--precision", precision, "--workers", str(job.plan.loading.workers), "--train-data", "DATA"]
    flags += ["--force-image-size", str(setting.resolution)] if setting.resolution else []
    flags += ["--grad-checkpointing"] if job.checkpoints else []
    flags += ["--siglip"] if "siglip" in architecture.lower() else []
    flags += ["--local-loss", "--gather-with-grad"] if gpus > 1 else []
    rate = rounded(OPEN_CLIP_RATE * sqrt(job.plan.effective_batch / OPEN_CLIP_BATCH))
    flags += ["--lr", f"{rate:g}"]
    notes = [
        f"The rate is CLIP's {OPEN_CLIP_RATE:g} for {OPEN_CLIP_BATCH} pairs, scaled by the root (Malladi 2022); weights are random "
        "without --pretrained NAME, and --warmup is 10000 steps unless given.",
        "open_clip turns torch.backends.cudnn.benchmark on, which the plan has off: a convolution's first run empties the cache.",
    ]
    if setting.accumulation > 1:
        notes.append(
            f"open_clip keeps the {setting.accumulation * setting.micro_batch} images of a window on the GPU; the gradient "
            f"of logit_scale is {setting.accumulation} times too large, which AdamW without clipping does not feel."
        )
        if setting.contrastive == "plain":
            notes.append("open_clip contrasts the whole window, the plan each micro-batch alone.")
    if isinstance(setting.checkpointing, int) and job.checkpoints:
        notes.append("open_clip checkpoints all blocks: less memory and more time than planned.")
    if setting.optimizer == "adamw-host":
        raise TrainfitError("--emit open_clip: open_clip keeps the optimizer's state on the GPU: plan with adamw-fused")
    if setting.optimizer not in ("adamw-fused", "adamw-foreach"):
        notes.append(f"open_clip trains with AdamW, not {setting.optimizer}: its state may need more than planned.")
    if setting.ema:
        notes.append("open_clip keeps no averaged weights.")
    return f"{job.torchrun} -m open_clip_train.main {shlex.join(flags)}\n", notes
