"""The contract between a family and the step: what a model is to those who predict, measure and train it."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from trainfit.models.setting import Setting
from trainfit.step.contrastive import Contrastive
from trainfit.step.terms import Objective


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What the parameter groups are made from."""

    lr: float = 1e-4
    """Learning rate of the parameters that have none of their own."""
    weight_decay: float = 1e-4
    """Decay of the parameters that are decayed."""
    training: Any = None
    """The values of training that the family alone has, an object of its `Family.training`; None: their defaults."""


class Workload(Protocol):
    """One model for one setting. It holds no weights: `build` makes them."""

    @property
    def setting(self) -> Setting:
        """What it was made for."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def objective(self) -> Objective | Contrastive:
        """Its losses."""
        ...

    def build(self) -> torch.nn.Module:
        """Make the model on the CPU in train mode, with random weights from torch's current seed."""
        ...

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        """Optimizer groups, each with an "lr"; the trainable parameters, each once."""
        ...

    def blocks(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """What activation checkpointing may recompute, in order; of a model as `build` made it."""
        ...

    def saturate(self, model: torch.nn.Module) -> None:
        """Make parts whose size depends on the data as large as they can get; for `worst_window` alone."""
        ...

    def worst_window(self, model: torch.nn.Module, images: int) -> Sequence[Any]:
        """CPU samples of a window that needs as much memory as any of data like the setting's."""
        ...

    def eval_sample(self, model: torch.nn.Module) -> Any:
        """A CPU sample for evaluation that needs as much memory as any."""
        ...

    def outputs(self, model: torch.nn.Module, samples: Sequence[Any]) -> Any:
        """What a micro-batch gives in evaluation, one item a sample; the model is in eval mode."""
        ...


@runtime_checkable
class OwnOptimizer(Protocol):
    """A workload whose optimizer is the user's own, not one of the setting's names."""

    def own_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        """The optimizer of these groups, with its state; None where it is the setting's."""
        ...


class Decoder(Protocol):
    """Makes one sample of a record in a loader process; it can be pickled and holds no model."""

    def __call__(self, record: Any, *, size: int, augment: AbstractSet[str], generator: torch.Generator) -> Any:
        """Random choices come from `generator` alone; `augment` says which are made: `crop`, `flip` or none.

        `size` is one of the workload's `sizes`, or its `eval_size`.
        """
        ...


class TrainableWorkload(Workload, Protocol):
    """A workload that trains on data, and whose weights come and go."""

    @property
    def eval_size(self) -> int:
        """The size of samples in evaluation, as the decoder takes it."""
        ...

    @property
    def remarks(self) -> Sequence[str]:
        """Lines for the user, where the setting is not taken as it was written."""
        ...

    @property
    def export_name(self) -> str:
        """File name of the best weights as the upstream project loads them."""
        ...

    def load(self, model: torch.nn.Module, weights: str) -> list[str]:
        """Fill the model from a file of trainfit, one of upstream's, or `pretrained`; returns remarks for the user."""
        ...

    def sizes(self) -> tuple[int, ...]:
        """Sizes that training draws from, one a window; what a size means is up to the family's decoder."""
        ...

    def decoder(self) -> Decoder:
        """The function that makes samples in loader processes."""
        ...

    def metadata(self) -> dict[str, str]:
        """What a weights file must say so that `models.build.workload_from_metadata` makes this workload again."""
        ...

    def export(self, weights: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write the weights as the upstream project loads them."""
        ...


def all_parameters(model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """One group of all trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": parameters, "lr": settings.lr, "weight_decay": settings.weight_decay}]
