"""Writes a plan for tools that train the user's own model: lightning, transformers, accelerate."""

from dataclasses import fields

from trainfit.models.emit import RATE, Job, call, means, register, rounded
from trainfit.models.setting import Setting, make_setting
from trainfit.reports.plan import blocks_text

EXPRESSED = {
    *("model", "micro_batch", "accumulation", "eval_micro_batch", "precision", "checkpointing", "optimizer"),
    *("classes", "objects_per_image", "canvas", "contrastive"),
}
"""Knobs that these tools take, and those that the data set determines."""


def _own_code(setting: Setting) -> list[str]:
    """A note with the knobs that the user's own code has to set."""
    published = make_setting(setting.model)
    chosen = [
        f"{each.name} {getattr(setting, each.name)}"
        for each in fields(setting)
        if each.name not in EXPRESSED and getattr(setting, each.name) != getattr(published, each.name)
    ]
    return [f"Set in your model's code: {', '.join(chosen)}."] if chosen else []


def _contrast(setting: Setting) -> list[str]:
    """The note of a tool without an exact contrastive window."""
    if not setting.family.coupled(setting) or setting.accumulation == 1:
        return means(setting)
    return [
        f"A pair is contrasted only with the {setting.micro_batch} of its micro-batch: another loss than the plan's."
    ]


_MIXED = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}


@register("lightning")
def _lightning(job: Job) -> tuple[str, list[str]]:
    setting = job.setting
    gpus = job.gpus
    trainer: dict[str, object] = {"accelerator": "gpu", "devices": gpus}
    trainer |= {"strategy": "ddp"} if gpus > 1 else {}
    trainer |= {"precision": _MIXED[setting.precision], "accumulate_grad_batches": setting.accumulation}
    trainer |= {"benchmark": False}
    loader = f"loader = DataLoader(dataset, batch_size={setting.micro_batch}, num_workers={job.workers})\n"
    imports = "from lightning import Trainer\nfrom torch.utils.data import DataLoader\n\n"
    text = f"{imports}{loader}trainer = {call('Trainer', trainer)}"
    return text, [*_contrast(setting), *_blocks_are_yours(job), *_optimizer_is_yours(setting), *_own_code(setting)]


def _blocks_are_yours(job: Job) -> list[str]:
    words = f"Activation checkpointing is up to your model's code: {blocks_text(job.setting.checkpointing)}."
    return [words] if job.checkpoints else []


def _optimizer_is_yours(setting: Setting) -> list[str]:
    return [f"The optimizer is up to your code: the plan has {setting.optimizer}."]


def _transformers_blocks(setting: Setting) -> bool:
    return "transformers" not in setting.family.refuses_checkpointing or setting.checkpointing == "none"


@register("transformers", checkpoints=_transformers_blocks)
def _transformers(job: Job) -> tuple[str, list[str]]:
    """Source: transformers 5.23 training_args.py."""
    setting = job.setting
    optimizers = {
        "adamw-fused": "adamw_torch_fused",
        "adamw-foreach": "adamw_torch",
        "adamw-8bit": "adamw_8bit",
        "sgd": "sgd",
        "sgd-plain": "sgd",
        "adagrad": "adagrad",
        "rmsprop": "rmsprop",
    }
    arguments: dict[str, object] = {
        "output_dir": "runs",
        "per_device_train_batch_size": setting.micro_batch,
        "gradient_accumulation_steps": setting.accumulation,
        "per_device_eval_batch_size": setting.eval_micro_batch or setting.micro_batch,
        "bf16": setting.precision == "bf16",
        "fp16": setting.precision == "fp16",
        "optim": optimizers.get(setting.optimizer, "adamw_torch_fused"),
        "dataloader_num_workers": job.workers,
    }
    arguments |= {"activation_checkpointing": True} if job.checkpoints else {}
    arguments |= {"optim_args": "momentum=0.9"} if setting.optimizer == "sgd" else {}
    start = f"{job.torchrun} train.py" if job.gpus > 1 else "CUDA_VISIBLE_DEVICES=0 python train.py"
    if job.rate_factor is not None:
        arguments["learning_rate"] = rounded(RATE * job.rate_factor)
    imports = "import torch\nfrom transformers import TrainingArguments\n\ntorch.backends.cudnn.benchmark = False\n"
    head = f"# Start it with: {start}\n{imports}"
    notes = [*_contrast(setting), *_own_code(setting)]
    if setting.optimizer not in optimizers:
        notes.append(
            f"TrainingArguments has no {setting.optimizer}: AdamW, with state of the same size; or pass your own to Trainer."
        )
    if job.gpus == 1:
        notes.append("Trainer uses all visible GPUs, and the effective batch grows with them: make only one visible.")
    if isinstance(setting.checkpointing, int) and job.checkpoints:
        notes.append("transformers checkpoints all blocks: less memory and more time than planned.")
    return head + f"arguments = {call('TrainingArguments', arguments)}", notes


@register("accelerate")
def _accelerate(job: Job) -> tuple[str, list[str]]:
    """Source: accelerate 1.15 commands/config/config_args.py `ClusterConfig`, accelerator.py (the environment variable)."""
    import yaml

    setting = job.setting
    gpus = job.gpus
    record = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if gpus > 1 else "NO",
        "mixed_precision": "no" if setting.precision == "fp32" else setting.precision,
        "num_machines": 1,
        "num_processes": gpus,
        "use_cpu": False,
    }
    head = (
        f"# ACCELERATE_GRADIENT_ACCUMULATION_STEPS={setting.accumulation} accelerate launch --config_file THIS_FILE train.py\n"
        f"# train.py: DataLoader(batch_size={setting.micro_batch}, num_workers={job.workers}), and each "
        "micro-batch in `with accelerator.accumulate(model):`; torch.backends.cudnn.benchmark = False\n"
    )
    notes = [*_contrast(setting), *_blocks_are_yours(job), *_optimizer_is_yours(setting), *_own_code(setting)]
    return head + yaml.safe_dump(record, sort_keys=False), notes
