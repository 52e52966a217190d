"""A user's own model and loss as a workload, which is predicted, planned and accumulated like the built-in families."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from trainfit.errors import TrainfitError
from trainfit.models.setting import Setting
from trainfit.models.workload import OptimizerSettings, all_parameters
from trainfit.step.checkpointing import repeated_blocks
from trainfit.step.optimizer import with_state
from trainfit.step.terms import LossTerm, Objective
from trainfit.user_code import load_named


@dataclass(frozen=True, kw_only=True)
class CustomTask:
    """What a user's function returns: `def task(setting: Setting) -> CustomTask`."""

    build_model: Callable[[], torch.nn.Module]
    """Makes the model on the CPU."""
    make_sample: Callable[[int], Any]
    """Index -> one item in the form that the user's `Dataset` returns, on the CPU, as large as the largest of the data set."""
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    """(model, batch on the device) -> the batch's mean loss, a scalar."""
    make_batch: Callable[[list[Any]], Any] = default_collate
    """Items -> batch, as the `DataLoader`'s `collate_fn`."""
    blocks: Callable[[torch.nn.Module], Sequence[torch.nn.Module]] = repeated_blocks
    """Model -> the modules that `--checkpointing` may recompute, in order."""
    counts: Callable[[Any], float | torch.Tensor] | None = None
    """Batch -> the count that its loss is a mean over (valid pixels, boxes), so that accumulation is exact; the number of items
    unless given."""
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None
    """Parameter groups with an "lr" -> any optimizer, for instance `partial(torch.optim.RMSprop, momentum=0.9)`; that of
    `--optimizer` unless given."""


def objective_of(task: CustomTask) -> Objective:
    """The loss as one term: of kind `targets` if the task has `counts`, else of kind `mean`, named "mean of means".

    Without `counts`, micro-batches are weighted by their number of items. This gives the big batch's gradient if the loss is
    a mean over items.
    """

    def means(model: torch.nn.Module, items: Sequence[Any], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
        return {"mean of means": LossTerm(total=_loss(task, model, items), kind="mean")}

    def sums(model: torch.nn.Module, items: Sequence[Any], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
        return {"loss": LossTerm(total=_loss(task, model, items) * count(items), kind="targets")}

    def count(items: Sequence[Any]) -> float:
        return float(task.counts(task.make_batch(list(items)))) if items and task.counts is not None else 0.0

    if task.counts is not None:
        return Objective(terms=sums, counts=lambda items: {"loss": count(items)}, canvas=lambda _: (0, 0))
    return Objective(terms=means, counts=lambda items: {"mean of means": float(len(items))}, canvas=lambda _: (0, 0))


def _loss(task: CustomTask, model: torch.nn.Module, items: Sequence[Any]) -> torch.Tensor:
    device = next(model.parameters()).device

    def moved(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x

    return task.loss(model, tree_map(moved, task.make_batch(list(items))))


class Custom:
    """A `Workload` of a user's task. See that protocol for what the methods do."""

    def __init__(self, setting: Setting, classes: tuple[str, ...], task: CustomTask) -> None:
        """Store the task; `build` makes the weights."""
        self.setting = setting
        self.classes = classes
        self.task = task
        self.objective = objective_of(task)

    def build(self) -> torch.nn.Module:
        return self.task.build_model().train()

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        return all_parameters(model, settings)

    def own_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        """The user's optimizer with its state."""
        return None if self.task.optimizer is None else with_state(self.task.optimizer(groups))

    def blocks(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        return self.task.blocks(model)

    def saturate(self, model: torch.nn.Module) -> None:
        """Do nothing: the user's `make_sample` returns the largest sample."""

    def worst_window(self, model: torch.nn.Module, images: int) -> Sequence[Any]:
        return [self.task.make_sample(number) for number in range(images)]

    def eval_sample(self, model: torch.nn.Module) -> Any:
        return self.task.make_sample(0)

    def outputs(self, model: torch.nn.Module, samples: Sequence[Any]) -> torch.Tensor:
        """The loss of a micro-batch."""
        return _loss(self.task, model, samples)


def make_workload(setting: Setting, classes: tuple[str, ...]) -> Custom:
    """The workload of the task that the setting's model, "module:function", names."""
    return Custom(setting, classes, load_task(setting))


def load_task(setting: Setting) -> CustomTask:
    """Call the user's function; its module may lie in the working directory.

    Raises:
        TrainfitError: no such module or function, or it returns something else.
    """
    module, _, function = setting.model.partition(":")
    make = load_named(module, function, setting.model)
    try:
        task = make(setting)
    except ModuleNotFoundError as error:
        raise TrainfitError(f"{setting.model}: {error}; run in the folder that holds {module}.py") from error
    except AttributeError as error:
        raise TrainfitError(f"{setting.model}: {error}") from error
    if not isinstance(task, CustomTask):
        raise TrainfitError(f"{setting.model} returned {type(task).__name__}; it must return a CustomTask")
    return task
