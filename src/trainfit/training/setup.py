"""What a training starts from: the recipe's data, workload, and step on the device."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.registry import make_workload
from trainfit.models.workload import OptimizerSettings, Workload
from trainfit.step.checkpointing import checkpoint_first
from trainfit.step.ema import averaged_copy
from trainfit.step.names import Precision
from trainfit.step.optimizer import make_optimizer
from trainfit.step.precision import set_matmul_precision
from trainfit.step.training_step import TrainingStep
from trainfit.tasks.detection.read import read_dataset, require_no_errors
from trainfit.tasks.detection.samples import Dataset
from trainfit.training.loader import usable_cores
from trainfit.training.mask_stage import evaluated_weights
from trainfit.training.recipe import Recipe
from trainfit.training.telemetry import Progress
from trainfit.weights import UNREADABLE, first_line


def load_data(recipe: Recipe, show: Progress) -> Dataset:
    """Read the data set; say what was left out or mended; refuse what cannot be trained on.

    Raises:
        TrainfitError: the data set has an error, or no image can be used.
    """
    chosen = None if recipe.format == "auto" else recipe.format
    dataset = read_dataset(
        recipe.data,
        format=chosen,
        val_fraction=recipe.val_fraction,
        seed=recipe.seed,
        allow_outside=recipe.allow_outside,
    )
    require_no_errors(dataset)
    for finding in dataset.findings:
        if finding.severity in ("skipped", "mended"):
            show.note(f"{finding.severity}: {finding.where}: {finding.kind}: {finding.message}")
        elif finding.kind == "val held out":
            show.note(finding.message)
    return dataset


def workload_of(recipe: Recipe, classes: tuple[str, ...]) -> Workload:
    """The recipe's model for these classes."""
    knobs = {
        name: getattr(recipe, name)
        for name in ("resolution", "snap", "num_queries", "groups", "freeze_encoder", "multi_scale")
    }
    return make_workload(recipe.model, classes, knobs | {"stage": recipe.recipe})


def make_step(
    workload: Workload, recipe: Recipe, device: torch.device, precision: Precision, show: Progress
) -> TrainingStep:
    """Model, optimizer and EMA on the device, from the recipe's seed and weights."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # A core for the loader: threads that spin for a core that is taken make a step up to 30 times slower.
        torch.set_num_threads(max(1, usable_cores() - 1))
    set_matmul_precision(device)
    torch.manual_seed(recipe.seed)
    model = workload.build()
    weights = str(evaluated_weights(recipe.from_run)) if recipe.from_run else recipe.weights
    if weights:
        for remark in workload.load(model, weights):
            show.note(remark)
    else:
        show.note("weights: random; --weights pretrained starts from upstream's COCO weights")
    checkpoint_first(workload.blocks(model), recipe.checkpointing)
    model.to(device)
    settings = OptimizerSettings(lr=recipe.lr, lr_encoder=recipe.lr_encoder, weight_decay=recipe.weight_decay)
    groups = workload.parameter_groups(model, settings)
    return TrainingStep(
        model=model,
        objective=workload.objective,
        optimizer=make_optimizer(recipe.optimizer, groups),
        device=device,
        precision=precision,
        clip_norm=recipe.clip_norm,
        ema=averaged_copy(model, on_host=recipe.ema_on_host) if recipe.ema else None,
    )


def restore(step: TrainingStep, state: Mapping[str, Any], path: Path) -> None:
    """Bring a step to a saved state that was read from `path`.

    Raises:
        TrainfitError: the state is of another model or optimizer.
    """
    try:
        step.model.load_state_dict(state["model"])
        if step.ema:
            step.ema.load_state_dict(state["ema"])
        step.optimizer.load_state_dict(state["optimizer"])
        step.scaler.load_state_dict(state["scaler"])
        step.skipped_windows = state["skipped_windows"]
    except UNREADABLE as error:
        raise TrainfitError(
            f"{path} does not belong to this run's recipe ({first_line(error)}): start a new run with --weights"
        ) from error
