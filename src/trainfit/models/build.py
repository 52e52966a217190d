"""Builds training steps. Predict, measure and train all build theirs here, so that the steps are the same."""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.family import family_of
from trainfit.models.setting import Setting, setting_from_json
from trainfit.models.workload import OptimizerSettings, OwnOptimizer, TrainableWorkload, Workload
from trainfit.step.checkpointing import checkpoint_first
from trainfit.step.ema import ema_copy
from trainfit.step.offload import offloaded
from trainfit.step.optimizer import make_optimizer
from trainfit.step.precision import autocast, resolve_precision, set_matmul_precision
from trainfit.step.training_step import TrainingStep


def build_workload(setting: Setting, classes: tuple[str, ...] | None = None) -> Workload:
    """The workload of a setting; classes are named "class 0", "class 1", ... unless they are given.

    Raises:
        TrainfitError: the model cannot be built: a missing package, an unknown architecture.
    """
    module = importlib.import_module(setting.family.workload)
    names = classes if classes is not None else tuple(f"class {n}" for n in range(setting.classes))
    return module.make_workload(setting, names)


def build_trainable(setting: Setting, classes: tuple[str, ...]) -> TrainableWorkload:
    """`build_workload` of a model that can be trained on data.

    Raises:
        TrainfitError: the family can be predicted, but not trained.
    """
    if setting.family.task is None:
        raise TrainfitError(f"training of {setting.model} is not implemented; `trainfit predict {setting.model}` works")
    workload: Any = build_workload(setting, classes)
    return workload


def workload_from_metadata(metadata: Mapping[str, str]) -> TrainableWorkload:
    """The workload that wrote a weights file; see `TrainableWorkload.metadata`.

    Raises:
        TrainfitError: trainfit did not write the metadata, or it is damaged.
    """
    try:
        name = metadata["model"]
        classes = json.loads(metadata["classes"])
        knobs = json.loads(metadata["knobs"])
    except KeyError as error:
        raise TrainfitError(f"not a weights file of trainfit: its metadata lacks {error}") from error
    except (ValueError, RecursionError) as error:
        raise TrainfitError("the metadata of the weights file is damaged: it is not JSON") from error
    named = isinstance(classes, list) and all(isinstance(each, str) for each in classes)
    if not named or not isinstance(knobs, dict):
        raise TrainfitError("the metadata of the weights file is damaged: no list of class names, or no knobs")
    return build_trainable(setting_from_json({"model": name, **knobs}), tuple(classes))


def open_checkpoint(model: str, weights: str) -> tuple[TrainableWorkload, torch.nn.Module, list[str]]:
    """A model for inference from a checkpoint of its upstream project, or `pretrained`; also returns remarks for the user.

    Raises:
        TrainfitError: no such model or file, or not a checkpoint of this model.
    """
    family, name = family_of(model)
    if family.checkpoint is None:
        raise TrainfitError(f"checkpoints of {name} cannot be evaluated yet")
    module, _, function = family.checkpoint.partition(":")
    return getattr(importlib.import_module(module), function)(name, weights)


def build_training_step(
    workload: Workload,
    device: torch.device,
    *,
    model: torch.nn.Module | None = None,
    optimizer_settings: OptimizerSettings | None = None,
    clip_norm: float = 0.1,
) -> TrainingStep:
    """Build model, optimizer and EMA weights on the device, as the workload's setting says.

    Args:
        workload: Its `setting` gives precision, checkpointing, optimizer and EMA.
        device: Where the step runs.
        model: The model that `workload.build` returned, on the CPU, with its initial weights; built here unless given.
        optimizer_settings: Learning rates and weight decay.
        clip_norm: Largest gradient norm of a window; 0 turns clipping off.
    """
    setting = workload.setting
    set_matmul_precision(device)
    model = workload.build() if model is None else model
    checkpoint_first(workload.blocks(model), setting.checkpointing)
    model.to(device)
    groups = workload.parameter_groups(model, optimizer_settings or OptimizerSettings())
    own = workload.own_optimizer(groups) if isinstance(workload, OwnOptimizer) else None
    objective = workload.objective
    return TrainingStep(
        model=model,
        objective=offloaded(objective) if setting.checkpointing == "offload" else objective,
        optimizer=own or make_optimizer(setting.optimizer, groups),
        device=device,
        precision=resolve_precision(setting.precision, device),
        clip_norm=clip_norm,
        ema=ema_copy(model, on_host=setting.ema_on_host) if setting.keeps_ema else None,
    )


@dataclass(kw_only=True)
class FixedStep:
    """A training step with its most memory-intensive window, or the evaluation after it; a `tracing.trace.Step`."""

    training: TrainingStep
    """The step of one rank."""
    window: Sequence[Any]
    """Samples on the CPU."""
    micro_batch: int
    """Samples in one forward and backward."""
    blocks: int = 0
    """Blocks that activation checkpointing may recompute."""
    evaluate: Callable[[], object] | None = None
    """Called by every `run` except the first, instead of training. Optimizer state and EMA weights are then allocated, and the
    allocator is in the state that training left."""
    model: torch.nn.Module = field(init=False)
    """That of the step."""
    optimizer: torch.optim.Optimizer = field(init=False)
    """That of the step."""
    ema: torch.nn.Module | None = field(init=False)
    """That of the step."""

    def __post_init__(self) -> None:
        """Set the attributes that a trace reads."""
        self.trained = False
        self.model = self.training.model
        self.optimizer = self.training.optimizer
        self.ema = self.training.ema

    def run(self) -> object:
        """Train one window; or evaluate."""
        if self.evaluate is not None and self.trained:
            return self.evaluate()
        self.trained = True
        return self.training.run(self.window, micro_batch=self.micro_batch, step=0)


def build_step(*, setting: Mapping[str, Any], device: torch.device) -> FixedStep:
    """The training step of a setting (`Setting.to_json`) with its most memory-intensive window, to be traced or measured."""
    return step_on_worst_window(build_workload(setting_from_json(setting)), device)


def build_eval_step(*, setting: Mapping[str, Any], device: torch.device) -> FixedStep:
    """The evaluation of a setting: the first `run` trains a window, every later one evaluates a micro-batch."""
    workload = build_workload(setting_from_json(setting))
    step = step_on_worst_window(workload, device)
    chosen = workload.setting
    samples = [workload.eval_sample(step.model)] * (chosen.eval_micro_batch or chosen.micro_batch)
    return replace(step, evaluate=partial(_evaluate, step.training, workload, samples))


def step_on_worst_window(workload: Workload, device: torch.device) -> FixedStep:
    """The workload's training step with the window that needs the most memory of any that its setting allows."""
    setting = workload.setting
    model = workload.build()
    workload.saturate(model)
    window = workload.worst_window(model, setting.micro_batch * setting.accumulation)
    training = build_training_step(workload, device, model=model)
    blocks = len(workload.blocks(model))
    return FixedStep(training=training, window=window, micro_batch=setting.micro_batch, blocks=blocks)


@torch.no_grad()
def _evaluate(step: TrainingStep, workload: Workload, samples: Sequence[Any]) -> object:
    """Evaluate one micro-batch with the EMA weights, if they are kept."""
    model = step.ema or step.model
    original_device = next(model.parameters()).device
    model.to(step.device)  # from the host, where the EMA weights may be
    was_training = model.training
    model.eval()
    with autocast(step.precision, step.device.type):
        outputs = workload.outputs(model, samples)
    model.train(was_training)
    model.to(original_device)
    return outputs
