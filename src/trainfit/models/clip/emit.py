"""Writes a plan of a CLIP model as a command of open_clip."""

import shlex
from math import sqrt

from trainfit.errors import TrainfitError
from trainfit.models.clip.family import ClipSetting
from trainfit.models.emit import Job, register, rounded

BATCH = 32_768
RATE = 5e-4
"""Radford et al. 2021, table 18; open_clip_train/params.py `get_default_params`."""


@register("open_clip", families=("clip",))
def _open_clip(job: Job) -> tuple[str, list[str]]:
    """Source: open_clip 3.3 open_clip_train/params.py; its `--accum-freq` contrasts the whole window, as trainfit does."""
    setting = job.setting
    gpus = job.gpus
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
    flags += ["--precision", precision, "--workers", str(job.workers), "--train-data", "DATA"]
    flags += ["--force-image-size", str(setting.resolution)] if setting.resolution else []
    flags += ["--grad-checkpointing"] if job.checkpoints else []
    flags += ["--siglip"] if "siglip" in architecture.lower() else []
    flags += ["--local-loss", "--gather-with-grad"] if gpus > 1 else []
    rate = rounded(RATE * sqrt(job.effective_batch / BATCH))
    flags += ["--lr", f"{rate:g}"]
    notes = [
        f"The rate is CLIP's {RATE:g} for {BATCH} pairs, scaled by the root (Malladi 2022); weights are random "
        "without --pretrained NAME, and --warmup is 10000 steps unless given.",
        "open_clip turns torch.backends.cudnn.benchmark on, which the plan has off: a convolution's first run empties the cache.",
    ]
    if setting.accumulation > 1:
        notes.append(
            f"open_clip keeps the {setting.accumulation * setting.micro_batch} images of a window on the GPU; the gradient "
            f"of logit_scale is {setting.accumulation} times too large, which does not affect AdamW without clipping."
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
        notes.append("open_clip keeps no EMA weights.")
    return f"{job.torchrun} -m open_clip_train.main {shlex.join(flags)}\n", notes
