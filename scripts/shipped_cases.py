"""What the package has traces of: models, cards, micro-batches and values of knobs, for `scripts/traces`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from window_cases import WORK, WindowCase, is_window, window_cases

from trainfit.gpus.catalogue import find_gpu
from trainfit.memory.priced import Pricer
from trainfit.memory.scaled_traces import PAIRS
from trainfit.models.family import families
from trainfit.models.rfdetr.family import PUBLISHED
from trainfit.models.setting import Setting, make_setting
from trainfit.step.names import Precision
from trainfit.tracing.trace_cache import TraceRequest

CLIP = ("clip:ViT-B-32", "clip:ViT-B-16", "clip:ViT-L-14", "clip:ViT-B-16-SigLIP")
SHIPPED = [*families()["rfdetr"].models, *families()["maskrcnn"].models, *CLIP]
CARDS = {(8, 0): "A100", (7, 5): "T4", (9, 0): "H100"}
"""Those that most people have come first."""
PRECISIONS: dict[tuple[int, int], Precision] = {(8, 0): "bf16", (9, 0): "bf16", (7, 5): "fp16"}
OTHERS = {"objects_per_image": 37, "classes": 6}
"""Values of knobs that laws are found with, beside the defaults: 37/100, 7/81 and 6/80 are no everyday ratios."""
MANY = 500
"""Objects of the trace that says how sizes grow with more objects than a group has queries."""
IMAGES = {
    "rfdetr-nano": 416,
    "rfdetr-small": 448,
    "rfdetr-seg-nano": 288,
    "rfdetr-seg-small": 336,
    "rfdetr-seg-xlarge": 528,
    "rfdetr-seg-2xlarge": 720,
    "rtdetr-seg-nano": 416,
    "rtdetr-seg-small": 448,
    "rtdetr-seg-base": 616,
    "rtdetr-seg-medium": 640,
    "rtdetr-seg-large": 616,
}
"""Resolution that laws of the image's size are found with: the choice of queries (`rfdetr.lean_selection`) and the mask losses
(`rfdetr.lean_losses`) have as many pieces there as at the published one. With others, traces are not aligned, after minutes."""
SIBLINGS = {
    "rfdetr-medium": "rfdetr-large",
    "rfdetr-large": "rfdetr-medium",
    "rfdetr-seg-medium": "rfdetr-seg-large",
    "rfdetr-seg-large": "rfdetr-seg-medium",
}
"""Models that differ in nothing but the resolution: the traces of one are those of the other at its resolution, and laws of the
image's size need no trace."""
CELL = 32
"""Mask R-CNN pads to multiples of it."""
CANVAS, OTHER_CANVAS = (800, 1333), (800, 1066)
"""Of Mask R-CNN: the largest, which is the default, and that of images of 4:3. Laws are of the number of cells, 25 x 42."""
TWINS = {f"rtdetr-seg-{size}": f"rfdetr-{size}" for size in ("nano", "small", "medium")}
"""Models whose detector stage runs what another model runs: every tensor, event and operator of their traces was equal."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a case is traced at."""

    micro_batch: int
    other: bool = False
    """Whether knobs are at their values of `OTHERS`."""
    image: bool = False
    """Whether the resolution is that of `IMAGES`."""
    many: bool = False
    """Whether there are `MANY` objects."""

    @property
    def name(self) -> str:
        """Of its file."""
        said = {" other": self.other, " image": self.image, " many": self.many}
        return "".join([str(self.micro_batch), *(name for name, is_so in said.items() if is_so)])

    def of(self, setting: Setting) -> Setting:
        """The setting at the point."""
        others: dict[str, Any] = OTHERS if is_rfdetr(setting.model) else OTHERS | {"canvas": OTHER_CANVAS}
        image = {"resolution": IMAGES[setting.model]} if self.image else {}
        many = {"objects_per_image": MANY} if self.many else {}
        return replace(setting, micro_batch=self.micro_batch, **(others if self.other else {}), **image, **many)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting for one card: its traces are made together."""

    model: str
    capability: tuple[int, int]
    checkpointing: Any
    stage: str = "single"
    """Of RF-DETR-Seg's training."""

    @property
    def pricer(self) -> Pricer:
        """A pricer of the card."""
        return Pricer(gpu=find_gpu(CARDS[self.capability]), cache=False)

    def requests(self) -> tuple[TraceRequest, TraceRequest]:
        """Of training and of evaluation."""
        precision = PRECISIONS[self.capability]
        stage = {} if self.stage == "single" else {"stage": self.stage}
        setting = make_setting(model=self.model, precision=precision, checkpointing=self.checkpointing, **stage)
        return self.pricer.request(setting, "training"), self.pricer.request(setting, "evaluation")

    @property
    def points(self) -> list[Point]:
        """What is traced: micro-batches at the defaults and, for laws, two of them with other objects and classes."""
        numbers = [Point(micro_batch=number) for number in (*PAIRS[0], 1)]
        others = [Point(micro_batch=number, other=True) for number in (PAIRS[0][1], 1)]
        images = [Point(micro_batch=PAIRS[0][1], image=True)] if self.model in IMAGES else []
        many = [replace(other, other=False, many=True) for other in others] if queries_of(self.model) < MANY else []
        return numbers + ([*others, *images, *many] if self.has_laws else [])

    @property
    def has_laws(self) -> bool:
        """Whether laws are found with this case. Others have them from it: sizes that follow objects and classes are those of
        heads and losses, whatever the kernels and whatever is recomputed.
        """
        return (self.checkpointing, self.capability, self.stage) == ("none", (8, 0), "single")

    @property
    def finder(self) -> "Case | None":
        """The case that its laws are found with; None: it has none."""
        if self.stage == "detector":
            twin = TWINS.get(self.model)
            return Case(model=twin, capability=(8, 0), checkpointing="none") if twin else None
        return Case(model=self.model, capability=(8, 0), checkpointing="none")

    @property
    def folder(self) -> Path:
        """Where its traces wait to be packed."""
        if self.stage == "detector" and self.model in TWINS:
            return replace(self, model=TWINS[self.model], stage="single").folder
        stage = "" if self.stage == "single" else f"-{self.stage}"
        return WORK / self.model / f"{'.'.join(map(str, self.capability))}-{self.checkpointing}{stage}"

    def rank(self) -> tuple[int, int, int]:
        """Its place in the order of use: what most people train on the cards that most have comes first."""
        stages = stages_of(self.model)
        is_usual = self.stage == "single" or self.model.startswith("rtdetr")
        return 0 if is_usual else 1, list(CARDS).index(self.capability), stages.index(self.stage)

    @property
    def is_traced(self) -> bool:
        """Whether all its points are there."""
        return all((self.folder / f"{point.name}.json").exists() for point in self.points)


AnyCase = Case | WindowCase


def cases(models: list[str]) -> Iterator[AnyCase]:
    """All of the first model first."""
    for model in models:
        yield from window_cases(model) if is_window(model) else scaled_cases(model)


def scaled_cases(model: str) -> Iterator[Case]:
    """The cases of a model whose traces are scaled to any micro-batch."""
    for capability, stage, checkpointing in product(CARDS, stages_of(model), ("none", "all")):
        if capability == (9, 0) and (checkpointing == "all" or stage != "single" or not is_rfdetr(model)):
            continue
        yield Case(model=model, capability=capability, checkpointing=checkpointing, stage=stage)


def stages_of(model: str) -> tuple[str, ...]:
    """The stages of a model's training: the RT-DETR-Seg guide has the detector trained first and then its mask head."""
    if model.startswith("rtdetr"):
        return "single", "masks", "detector"
    return ("single", "masks") if "-seg-" in model else ("single",)


def queries_of(model: str) -> int:
    """Queries of a group, which is how many objects a model can match; more than `MANY` where it does not match."""
    return PUBLISHED[model].queries if is_rfdetr(model) else MANY + 1


def is_rfdetr(model: str) -> bool:
    """Whether laws are found for it, and it has kernels of its own for capability 9.0."""
    return model in families()["rfdetr"].models
