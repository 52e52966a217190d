"""Builds what training starts from: the recipe's data, workload, and step on the device."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import FrozenBatchNorm2d

from trainfit.errors import TrainfitError
from trainfit.files import read_bytes
from trainfit.models.build import build_trainable, build_training_step
from trainfit.models.family import family_of
from trainfit.models.workload import OptimizerSettings, TrainableWorkload
from trainfit.step import ranks
from trainfit.step.attempt import is_out_of_memory
from trainfit.step.compiling import compile_blocks
from trainfit.step.training_step import TrainingStep
from trainfit.tasks.augment import Augmentation, parse
from trainfit.tasks.class_filter import with_classes
from trainfit.tasks.task import Task
from trainfit.training import run_folder
from trainfit.training.earlier_run import evaluated_weights
from trainfit.training.loader import usable_cores
from trainfit.training.oom import Survivor
from trainfit.training.recipe import PRETRAINED, RANDOM, Batching, Recipe, encode, resolve_batching, setting_of
from trainfit.training.run_files import PLAN
from trainfit.training.run_folder import has_state
from trainfit.training.saved_state import require_like
from trainfit.training.telemetry import Progress
from trainfit.values import changed, given
from trainfit.weights import UNREADABLE, first_line

Choose = Callable[[Recipe, Any, torch.device, int, Callable[[str], None]], Mapping[str, Any]]
"""(recipe, data set, device, number of ranks, note) -> values of the recipe that were left open."""


WEIGHTS_VARIABLE = "TRAINFIT_WEIGHTS"
"""Environment variable: what training starts from where upstream has weights and `--weights` is not given."""


def take_defaults(*_: object) -> Mapping[str, Any]:
    """A `Choose` that leaves everything as it is."""
    return {}


def with_choice(recipe: Recipe, dataset: Any, device: torch.device, choose: Choose, show: Progress) -> Recipe:
    """The recipe with what `choose` says on the first rank; a run that is resumed keeps its own values."""
    if recipe.resume is not None:
        return recipe
    world = ranks.world_size()
    own = choose(recipe, dataset, device, world, show.note) if ranks.rank() == 0 else {}
    return changed(recipe, **ranks.gather(dict(own))[0])


def with_weights(recipe: Recipe) -> Recipe:
    """The recipe with its initial weights: upstream's if they exist and no others were given.

    The environment variable `TRAINFIT_WEIGHTS` may say otherwise, for machines without a network.
    """
    if recipe.weights is not None:
        return recipe
    family, name = family_of(recipe.model)
    published = family.published(changed(recipe, model=name))
    wanted = os.environ.get(WEIGHTS_VARIABLE) or PRETRAINED
    return changed(recipe, weights=wanted if published else RANDOM)


def require_task(recipe: Recipe) -> None:
    """Refuse a model that can only be planned, and one whose effective batch is missing, before anything is written."""
    if family_of(recipe.model)[0].task is None:
        raise TrainfitError(
            f"trainfit does not train {recipe.model} yet: trainfit plan {recipe.model} says what fits, "
            "and --emit writes its plan for another tool"
        )
    resolve_batching(recipe, ranks.world_size())


def write_recipe(recipe: Recipe, batching: Batching, folder: Path) -> None:
    """Write the recipe, and the plan where it has one, into a new run folder."""
    values: dict[str, Any] = {"out": folder, "effective_batch": batching.effective_batch}
    if "accumulation" in given(recipe):
        values["micro_batch"] = batching.micro_batch
    run_folder.write_text(folder / run_folder.RECIPE, encode(changed(recipe, **values)))
    if recipe.plan is not None:
        run_folder.write_text(folder / PLAN, read_bytes(recipe.plan).decode())


def load_data(recipe: Recipe, task: Task, show: Progress) -> Any:
    """Read the data set; report what was left out or mended; refuse what cannot be trained on.

    Raises:
        TrainfitError: the data set has an error, or nothing in it can be used.
    """
    dataset = task.read(
        recipe.data,
        file_format=None if recipe.format == "auto" else recipe.format,
        val_fraction=recipe.val_fraction,
        seed=recipe.seed,
        allow_outside=recipe.allow_outside,
    )
    for line in task.notes(dataset):
        show.note(line)
    return with_classes(task, dataset, recipe.only_classes)


def augmentation_of(recipe: Recipe) -> Augmentation:
    """The augmentation of the recipe.

    Raises:
        TrainfitError: there is no such augmentation, or the user's transform cannot be imported.
    """
    chosen = parse(recipe.augment, recipe.family.augments)
    if chosen.function:
        from trainfit.tasks.transforms import user_transform

        user_transform(chosen.function)
    return chosen


def workload_of(recipe: Recipe, classes: tuple[str, ...]) -> TrainableWorkload:
    """The recipe's model for these classes."""
    return build_trainable(setting_of(recipe, len(classes)), classes)


def make_survivor(workload: TrainableWorkload, step: TrainingStep, batching: Batching) -> Survivor:
    """What runs the windows of a step and survives out-of-memory errors; its last message names the family's flags."""
    setting = workload.setting
    turns = [next((flag for flag, _ in setting.family.turns(setting, knob)), "") for knob in setting.family.learns]
    return Survivor(
        batching.micro_batch,
        blocks=workload.blocks(step.model),
        freeing_flags=[flag for flag in turns if flag],
    )


def make_step(workload: TrainableWorkload, recipe: Recipe, device: torch.device, show: Progress) -> TrainingStep:
    """Model, optimizer and EMA weights on the device, from the recipe's seed and weights."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Leave a core to the loader: threads that compete for a busy core make a step up to 30 times slower.
        torch.set_num_threads(max(1, usable_cores() - 1))
    torch.manual_seed(recipe.seed)
    model = workload.build()
    weights = None if has_state(recipe.resume) else recipe.weights
    if weights and recipe.earlier_run is not None:
        weights = str(evaluated_weights(recipe.earlier_run))
    if weights not in (None, RANDOM):
        for remark in _load(workload, model, weights):
            show.note(remark)
    elif recipe.resume is None:
        show.note("weights: random")
        if frozen := sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules()):
            show.note(
                f"{frozen} frozen BatchNorm layers normalize by statistics that random weights do not have, so training may "
                "diverge: give --weights FILE, or train with another norm"
            )
    if recipe.compile:
        blocks = workload.blocks(model)
        compile_blocks(blocks, device)
        show.note(
            f"{len(blocks)} blocks by torch.compile: windows of a new size wait for it; plans price eager execution"
        )
    settings = OptimizerSettings(lr=recipe.lr, weight_decay=recipe.weight_decay, training=recipe)
    return build_training_step(workload, device, model=model, optimizer_settings=settings, clip_norm=recipe.clip_norm)


def _load(workload: TrainableWorkload, model: torch.nn.Module, weights: str) -> list[str]:
    """Load `--weights` into a model; return remarks for the user.

    Raises:
        TrainfitError: no regular file, no weights of this model, or a file with values that an upstream loader trips over.
    """
    path = Path(weights)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise TrainfitError(f"--weights {weights} is not a regular file: give a weights file")
    try:
        return workload.load(model, weights)
    except (TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise TrainfitError(f"--weights {weights} cannot be loaded ({first_line(error)}): take another file") from error


def restore(step: TrainingStep, state: Mapping[str, Any], path: Path) -> None:
    """Restore a step from a saved state that was read from `path`.

    Raises:
        TrainfitError: the state is of another model or optimizer.
    """
    own = {"optimizer": step.optimizer.state_dict(), "scaler": step.scaler.state_dict()}
    try:
        require_like(state, own, "state")
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
