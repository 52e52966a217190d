"""Any classifier of timm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch.nn import functional

from trainfit.errors import TrainfitError
from trainfit.models.classifier.family import PREFIX, ClassifierSetting
from trainfit.models.images import IMAGENET_MEAN, IMAGENET_STD, stack_images, to_device
from trainfit.models.workload import OptimizerSettings, all_parameters
from trainfit.step.checkpointing import repeated_blocks
from trainfit.step.terms import LossTerm, Objective


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImage:
    """One image and its class, on the CPU."""

    image: torch.Tensor
    """uint8 (3, height, width)."""
    label: int


def build_model(name: str, *, classes: int, resolution: int | None = None) -> Any:
    """A model of timm with random weights, in train mode; `resolution` reaches those that must know it (ViTs).

    Raises:
        TrainfitError: timm is not installed, or has no such model.
    """
    try:
        import timm
    except ImportError as error:
        raise TrainfitError("timm: models need timm: pip install 'trainfit[timm]'") from error
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=1)
        hint = f" Perhaps you meant timm:{near[0]}." if near else ""
        raise TrainfitError(f"timm has no model {name!r}.{hint}")
    published = timm.get_pretrained_cfg(name)
    must_know = resolution is not None and published is not None and published.fixed_input_size
    size: dict[str, Any] = {"img_size": resolution} if must_know else {}
    model: Any = timm.create_model(name, pretrained=False, num_classes=classes, **size)
    return model.train()


def logits(model: torch.nn.Module, images: Sequence[LabelledImage]) -> torch.Tensor:
    """(n, classes); images take the memory format of the weights."""
    like = next(p for p in model.parameters() if p.dim() == 4)
    batch = stack_images([i.image for i in images], like, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return model(batch.contiguous(memory_format=torch.channels_last) if last else batch)


def _terms(model: torch.nn.Module, images: Sequence[LabelledImage], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    found = logits(model, images)
    labels = to_device([torch.tensor([i.label for i in images])], found)
    return {"class": LossTerm(total=functional.cross_entropy(found, labels, reduction="sum"), kind="images")}


OBJECTIVE = Objective(terms=_terms, counts=lambda images: {"class": float(len(images))})


class Classifier:
    """A `Workload`: training by cross entropy. See that protocol for what the methods do."""

    def __init__(self, setting: ClassifierSetting, classes: tuple[str, ...]) -> None:
        """Note what is to be built; no weights yet."""
        self.setting = setting
        self.classes = classes
        self.objective = OBJECTIVE

    def build(self) -> torch.nn.Module:
        name = self.setting.model.removeprefix(PREFIX)
        model = build_model(name, classes=len(self.classes), resolution=self.setting.resolution)
        if self.setting.channels_last:
            model.to(memory_format=torch.channels_last)
        return model

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        return all_parameters(model, settings)

    def blocks(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        return repeated_blocks(model)

    def saturate(self, model: torch.nn.Module) -> None:
        """Nothing in a classifier depends on the data."""

    def worst_window(self, model: torch.nn.Module, images: int) -> Sequence[LabelledImage]:
        return [self.eval_sample(model)] * images

    def eval_sample(self, model: Any) -> LabelledImage:
        side = self.setting.resolution or model.default_cfg["input_size"][-1]
        g = torch.Generator().manual_seed(0)
        return LabelledImage(image=torch.randint(0, 256, (3, side, side), generator=g, dtype=torch.uint8), label=0)

    def outputs(self, model: torch.nn.Module, samples: Sequence[LabelledImage]) -> torch.Tensor:
        return logits(model, samples)


make_workload = Classifier
