"""Random outputs and targets of RF-DETR with masks, through upstream's criterion and the lean one.

Used by test_lean_masks.py and benchmarks/lean_masks.py.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from rfdetr.config import SegmentationTrainConfig
from rfdetr.models import build_criterion_from_config
from rfdetr.models.criterion import SetCriterion
from rfdetr.models.heads.segmentation import point_sample

from trainfit.models.rfdetr.data import to_lean_targets, to_targets
from trainfit.models.rfdetr.family import RfDetrKnobs, Stage
from trainfit.models.rfdetr.losses import make_lean
from trainfit.models.rfdetr.workload import make_config
from trainfit.tasks.detection.samples import Sample
from trainfit.tracing.recorder import Recorder

CLASSES = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What a model might give for some images, and their objects."""

    outputs: dict[str, Any]
    samples: list[Sample]
    groups: int
    stage: Stage = "single"

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The tensors that get a gradient."""
        return list(_tensors(self.outputs))

    def criterion(self, *, lean: bool) -> SetCriterion:
        """Upstream's criterion, or the lean one."""
        config = make_config("rfdetr-seg-nano", CLASSES, RfDetrKnobs(groups=self.groups))
        criterion, _ = build_criterion_from_config(config, SegmentationTrainConfig(dataset_dir=".", output_dir="."))
        criterion.train()
        if self.stage == "masks":
            criterion.losses = ["masks"]
        if lean:
            make_lean(criterion)
        return criterion

    def targets(self, *, lean: bool) -> list[dict[str, Any]]:
        """Upstream's targets, or those with packed masks."""
        like = self.outputs["pred_logits"]
        return to_lean_targets(self.samples, like) if lean else [*to_targets(self.samples, like)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What one criterion made of a case."""

    losses: dict[str, torch.Tensor]
    gradients: list[torch.Tensor | None]
    matches: list[torch.Tensor]


def make_case(
    seed: int,
    objects: Sequence[int],
    *,
    queries: int = 20,
    groups: int = 3,
    side: int = 96,
    channels: int = 16,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    stage: Stage = "single",
) -> Case:
    """A case of as many images as `objects` has counts; mask logits are a quarter of `side`, as published models have them."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(objects), queries * groups)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g).to(dtype).requires_grad_()

    def layer() -> dict[str, Any]:
        boxes = 0.1 + 0.4 * torch.rand(*shape, 4, generator=g)
        head = {
            "spatial_features": normal(len(objects), channels, side // 4, side // 4),
            "query_features": normal(*shape, channels),
            "bias": normal(1),
        }
        logits = normal(*shape, CLASSES + 1)
        return {"pred_logits": logits, "pred_boxes": boxes.to(dtype).requires_grad_(), "pred_masks": head}

    outputs = layer() | {"aux_outputs": [layer() for _ in range(layers - 1)], "enc_outputs": layer()}
    samples = [_sample(g, count, side) for count in objects]
    return Case(outputs=outputs, samples=samples, groups=groups, stage=stage)


def _sample(g: torch.Generator, count: int, side: int) -> Sample:
    """An image with `count` objects, each a filled ellipse in its box."""
    size = 0.1 + 0.4 * torch.rand(count, 2, generator=g)
    corner = torch.rand(count, 2, generator=g) * (1 - size)
    axis = (torch.arange(side) + 0.5) / side
    x, y = ((axis - (corner + size / 2)[:, i, None]) / (size / 2)[:, i, None] for i in (0, 1))
    return Sample(
        image=torch.zeros(3, side, side, dtype=torch.uint8),
        boxes=torch.cat([corner, corner + size], 1) * side,
        classes=torch.randint(0, CLASSES, (count,), generator=g),
        masks=y.square()[:, :, None] + x.square()[:, None, :] < 1,
        image_id=0,
        original_size=(side, side),
    )


def _tensors(outputs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in outputs.values():
        if isinstance(value, torch.Tensor):
            yield value
        else:
            for each in value if isinstance(value, list) else [value]:
                yield from _tensors(each)


def run(case: Case, *, lean: bool, seed: int = 0) -> Result:
    """Losses, gradients of their weighted sum, and matches."""
    criterion = case.criterion(lean=lean)
    matches: list[torch.Tensor] = []

    def keep(_matcher: object, _inputs: object, found: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        matches.extend(torch.stack(pair) for pair in found)

    criterion.matcher.register_forward_hook(keep)
    torch.manual_seed(seed)
    losses = criterion(case.outputs, case.targets(lean=lean), num_boxes=1.0)
    weighted = [losses[key] * weight for key, weight in criterion.weight_dict.items() if key in losses]
    gradients = torch.autograd.grad(torch.stack(weighted).sum(), case.leaves, allow_unused=True)
    return Result(losses={k: v.detach() for k, v in losses.items()}, gradients=list(gradients), matches=matches)


@contextmanager
def float64_points() -> Generator[None]:
    """Upstream takes points in the dtype of what it samples alone, and draws them in float32: let it convert them."""

    def sample(values: torch.Tensor, points: torch.Tensor, **options: Any) -> torch.Tensor:
        return point_sample(values, points.to(values.dtype), **options)

    names = ("criterion", "matcher", "heads.segmentation")
    first, second, third = (patch(f"rfdetr.models.{name}.point_sample", sample) for name in names)
    with first, second, third:
        yield


def peak_bytes(case: Case, *, lean: bool) -> int:
    """The most bytes that criterion and backward hold at once on the CPU, targets included and outputs left out."""
    criterion, targets = case.criterion(lean=lean), case.targets(lean=lean)
    masks = [target["masks"].bits if lean else target["masks"] for target in targets]
    outputs = sum(leaf.nbytes for leaf in case.leaves)
    with Recorder("cpu", None) as recorder:
        recorder.categorise([*case.leaves, *masks], "inputs")
        losses = criterion(case.outputs, targets, num_boxes=1.0)
        torch.stack([losses[k] * w for k, w in criterion.weight_dict.items() if k in losses]).sum().backward()
    held = peak = 0
    for made, tensor in recorder.finish():
        held += tensor.nbytes if made else -tensor.nbytes
        peak = max(peak, held)
    return peak - outputs


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far `b` is from `a`, over the size of `a`."""
    return float((a - b).double().norm() / a.double().norm().clamp(min=1e-300))
