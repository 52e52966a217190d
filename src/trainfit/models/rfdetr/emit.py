"""Writes a plan of an RF-DETR as a training script of rfdetr."""

from collections.abc import Mapping

from trainfit.errors import TrainfitError
from trainfit.models.emit import RATE, Job, call, means, register, rounded
from trainfit.models.rfdetr.family import RfDetrSetting, RfDetrTraining
from trainfit.models.setting import Setting

ENCODER_BLOCKS = 12
"""Blocks of RF-DETR's DINOv2: the first of the model's blocks, and all that upstream's gradient_checkpointing covers
(rfdetr 1.11.2)."""
RFDETR_CLASSES: Mapping[str, str] = {
    **{f"rfdetr-{size}": f"RFDETR{size.title()}" for size in ("nano", "small", "medium", "large")},
    **{f"rfdetr-seg-{size}": f"RFDETRSeg{size.title()}" for size in ("nano", "small", "medium", "large")},
    "rfdetr-seg-xlarge": "RFDETRSegXLarge",
    "rfdetr-seg-2xlarge": "RFDETRSeg2XLarge",
}


def _rfdetr_blocks(setting: Setting) -> bool:
    """Upstream recomputes the encoder alone; the first blocks of a model with masks are the mask head's."""
    blocks = setting.checkpointing
    return blocks == "none" or (isinstance(blocks, int) and blocks <= ENCODER_BLOCKS and "-seg-" not in setting.model)


@register("rfdetr", families=("rfdetr",), checkpoints=_rfdetr_blocks)
def _rfdetr(job: Job) -> tuple[str, list[str]]:
    """Source: rfdetr 1.11.2 config.py `ModelConfig`, `TrainConfig`."""
    setting = job.setting
    gpus = job.gpus
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
        "num_workers": job.workers,
    }
    factor = job.rate_factor or 1.0
    training |= {"lr": rounded(RATE * factor), "lr_encoder": rounded(RfDetrTraining.lr_encoder * factor)}
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
        size = f"{job.parameter_bytes / 2**30:.2f} GiB"
        if job.parameter_bytes > job.spare_bytes:
            raise TrainfitError(
                f"--emit rfdetr: rfdetr keeps the EMA weights on the GPU, and their {size} do not fit: plan with --no-ema"
            )
        notes.append(f"rfdetr keeps the EMA weights on the GPU: {size} more than planned.")
    if setting.optimizer == "adamw-8bit":
        notes.append(
            "rfdetr sets the learning rates of an optimizer given by import path; its other arguments are up to you."
        )
    return notes
