"""The toy as a `TrainableWorkload`; see that protocol for what the methods do."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from toy_family import SIDE, ToySetting
from toy_task import Label, LabelledImage, decode

from trainfit.models.images import IMAGENET_MEAN, IMAGENET_STD, stack_images, to_device
from trainfit.models.workload import OptimizerSettings, all_parameters
from trainfit.step.terms import LossTerm, Objective
from trainfit.weights import load_weights


def logits(model: nn.Module, images: Sequence[LabelledImage]) -> torch.Tensor:
    """(n, classes)."""
    like = next(model.parameters())
    return model(stack_images([each.image for each in images], like, mean=IMAGENET_MEAN, std=IMAGENET_STD))


def terms(model: nn.Module, images: Sequence[LabelledImage], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    """The cross entropy of a micro-batch, as a sum over its images."""
    rows = logits(model, images)
    labels = to_device([torch.tensor([each.label for each in images])], rows)
    return {"class": LossTerm(total=functional.cross_entropy(rows, labels, reduction="sum"), kind="images")}


class Toy:
    """Three convolutions, a mean over the image, a linear layer."""

    eval_size = SIDE
    export_name = "best-toy.pth"
    remarks = ()

    def __init__(self, setting: ToySetting, classes: tuple[str, ...]) -> None:
        self.setting = setting
        self.classes = classes
        self.objective = Objective(terms=terms, counts=lambda images: {"class": float(len(images))})

    def build(self) -> nn.Module:
        width = self.setting.width
        layers: list[nn.Module] = []
        for channels in (3, width, width):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(1, width), nn.ReLU()]
        head = nn.Linear(width, len(self.classes))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).train()

    def parameter_groups(self, model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        return all_parameters(model, settings)

    def blocks(self, _model: nn.Module) -> Sequence[nn.Module]:
        return []

    def saturate(self, model: nn.Module) -> None:
        pass

    def worst_window(self, model: nn.Module, images: int) -> Sequence[LabelledImage]:
        return [self.eval_sample(model)] * images

    def eval_sample(self, _model: nn.Module) -> LabelledImage:
        return LabelledImage(image=torch.zeros(3, SIDE, SIDE, dtype=torch.uint8), label=0, record_id=0)

    def outputs(self, model: nn.Module, samples: Sequence[LabelledImage]) -> list[Label]:
        chosen = logits(model, samples).argmax(1).tolist()
        return [Label(record_id=sample.record_id, label=row) for sample, row in zip(samples, chosen, strict=True)]

    def load(self, model: nn.Module, weights: str) -> list[str]:
        model.load_state_dict(load_weights(Path(weights))[0])
        return []

    def sizes(self) -> tuple[int, ...]:
        return (SIDE,)

    def decoder(self) -> Any:
        return decode

    def metadata(self) -> dict[str, str]:
        knobs = asdict(self.setting)
        return {"model": knobs.pop("model"), "classes": json.dumps(self.classes), "knobs": json.dumps(knobs)}

    def export(self, weights: Mapping[str, torch.Tensor], path: Path) -> None:
        torch.save(dict(weights), path)


make_workload = Toy
