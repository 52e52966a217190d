"""Mask R-CNN and Faster R-CNN of torchvision as a family. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor, isqrt
from typing import Annotated, Any, Literal

from trainfit.errors import TrainfitError
from trainfit.models.family import Capability, DrawnSizes, Family, dashed, register
from trainfit.models.setting import DetectionSetting
from trainfit.values import In, Range, require_valid

MODELS = (
    "maskrcnn-r50-v1",
    "maskrcnn-r50-v2",
    "maskrcnn-r101-v1",
    "fasterrcnn-r50-v1",
    "fasterrcnn-r50-v2",
    "fasterrcnn-r101-v1",
)
MIN_SIZE, MAX_SIZE = 800, 1333
"""Short side after the resize, and the longest side allowed, in pixels (torchvision's defaults)."""
REFERENCE_BATCHES = (2, 16)
"""torchvision's references/detection trains 8 x 2 images; Detectron2's configurations 16."""
TRAINABLE_STAGES = 3
"""Of torchvision, which keeps the stem and the first stage as they were pretrained; Detectron2's FREEZE_AT 2 is the same."""
LIVE_BATCH_NORMS = {"r50": 53, "FPN": 8, "box head": 4, "mask head": 4}
"""BatchNorm layers of the v2 models by part (a test counts them)."""
SHARES = {
    "maskrcnn-r50-v1": (0.71, 0.83),
    "maskrcnn-r50-v2": (0.65, 0.71),
    "maskrcnn-r101-v1": (0.78, 0.88),
    "fasterrcnn-r50-v1": (0.97, 0.92),
    "fasterrcnn-r50-v2": (0.79, 0.82),
    "fasterrcnn-r101-v1": (0.97, 0.92),
}
"""Part of a micro-batch's FLOPs, and of its bytes, that grows in proportion to the pixels: of traces of one image of 800 x 1333
and of 480 x 800 pixels, 512 regions, 20 objects, bf16 (of R101 Faster R-CNN: as with R50)."""
MOST_SIDE = 8192
"""Pixels."""
NO_RETINANET = (
    "it has neither proposals nor regions, so this family's losses, knobs, class heads and traces are not its own; "
    "take fasterrcnn-r50-v1, which finds boxes too, or train a RetinaNet in a loop of your own with trainfit.accumulate"
)
Norm = Literal["published", "frozen", "group"]
Reference = Literal["R1", "R2"]


@dataclass(frozen=True, kw_only=True)
class MaskRcnnSetting(DetectionSetting):
    """A setting of a Mask R-CNN or Faster R-CNN."""

    resolution: Annotated[int | None, Range(1, 8192)] = None
    """Short side after the resize, in pixels; 800 unless given, or the largest of --short-sides."""
    canvas: tuple[int, int] | None = None
    """(height, width) in pixels of the largest window. The largest there is unless given: the longest side allowed, as high
    too where --no-aspect-grouping lets portrait and landscape images meet."""
    max_size: Annotated[int | None, Range(1, 16384)] = None
    """Longest side allowed after the resize, in pixels; 1333/800 of the short side unless given."""
    short_sides: str | None = None
    """Short sides that training draws from, one a window: "640,672,704", or "640-800" for any whole number between; the
    resolution alone unless given."""
    rois_per_image: Annotated[int | None, Range(1, 100_000)] = None
    """Regions of each image that the heads train on (Detectron2's ROI_HEADS.BATCH_SIZE_PER_IMAGE); 512 unless given."""
    proposals: tuple[int, int] | None = None
    """Proposals of each level that go into NMS in training, and how many of an image it leaves at most; 2000 2000 unless
    given."""
    trainable_stages: Annotated[int | None, Range(0, 5)] = None
    """Stages of the ResNet that train, from the last: 0 to 5, where 5 is all of it with its stem; 3 unless given."""
    norm: Norm = "published"
    """published: frozen BatchNorm in v1, live BatchNorm in v2; frozen, or group: GroupNorm with 32 groups in its place."""
    aspect_grouping: Annotated[bool, In("model", rare=True)] = True
    """Whether the images of a window are all landscape (or square), or all portrait, as torchvision and Detectron2 train; a
    window is padded to its largest image, so a mixed one needs up to two thirds more memory."""
    reference: Reference = "R1"
    """R1: the gradient of one big batch, exactly; R2: the mean of the micro-batches' own losses, as data parallel training
    computes it. R2 saves the counting pass, and the cut into micro-batches changes the result."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be used."""
        require_valid(self)
        if self.short_sides is not None:
            require_sides(self.short_sides)
        if self.proposals is not None and min(self.proposals) < 1:
            raise TrainfitError(f"--proposals must be at least 1, not {' '.join(map(str, self.proposals))}")
        if self.canvas is not None and min(self.canvas) < 1:
            raise TrainfitError(f"--canvas must be at least 1 pixel, not {self.canvas[0]} {self.canvas[1]}")
        short, longest = self.sides
        if longest < short:
            raise TrainfitError(f"--max-size {longest} is less than the short side of {short}: give at least {short}")

    @property
    def sides(self) -> tuple[int, int]:
        """The largest short side after the resize, and the longest side allowed, in pixels."""
        short = max((self.eval_side, *self.drawn_sides))
        return short, self.max_size or round(short * MAX_SIZE / MIN_SIZE)

    @property
    def eval_side(self) -> int:
        """Short side in evaluation, in pixels."""
        return self.resolution or (max(require_sides(self.short_sides)) if self.short_sides else MIN_SIZE)

    @property
    def drawn_sides(self) -> tuple[int, ...]:
        """Short sides that training draws from, in pixels."""
        return require_sides(self.short_sides) if self.short_sides else (self.eval_side,)

    @property
    def has_masks(self) -> bool:
        """Whether masks are trained."""
        return self.model.startswith("maskrcnn")

    @property
    def live_batch_norms(self) -> dict[str, int]:
        """Part of the model -> its BatchNorm layers with live statistics."""
        if self.norm != "published" or not self.model.endswith("-v2"):
            return {}
        parts = dict(LIVE_BATCH_NORMS)
        if not self.has_masks:
            del parts["mask head"]
        return {"backbone": parts.pop("r50"), **parts}


def require_sides(text: str) -> tuple[int, ...]:
    """The sides that --short-sides names, in pixels.

    Raises:
        TrainfitError: it is neither a list of whole numbers nor a range of them, or one is out of bounds.
    """
    low, dash, high = text.partition("-")
    parts = [low, high] if dash else text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 9 for part in parts):
        raise TrainfitError(f'--short-sides must be a list as "640,672,704" or a range as "640-800", not {text[:60]!r}')
    sides = tuple(int(part) for part in parts)
    if min(sides) < 1 or max(sides) > MOST_SIDE:
        raise TrainfitError(f"--short-sides must be between 1 and {MOST_SIDE} pixels, not {text[:60]}")
    if dash and sides[0] > sides[1]:
        raise TrainfitError(f"--short-sides {text}: the range must begin with its least side")
    return tuple(range(sides[0], sides[1] + 1)) if dash else sides


def match(typed: str) -> str | None:
    """The canonical name of a model: "Mask R-CNN" is spelt "maskrcnn" here, and "R50-FPN" is the first version.

    Raises:
        TrainfitError: it is a RetinaNet.
    """
    if dashed(typed).partition("-")[0] == "retinanet":
        raise TrainfitError(f"trainfit has no {typed}: {NO_RETINANET}")
    name = dashed(typed).replace("r-cnn", "rcnn").replace("mask-rcnn", "maskrcnn").replace("faster-rcnn", "fasterrcnn")
    name = name.replace("resnet", "r").replace("-fpn-v2", "-v2").replace("-r-50", "-r50").replace("-r-101", "-r101")
    if name.endswith("-fpn"):
        name = name.removesuffix("-fpn") + "-v1"
    return name if name in MODELS else None


def kernels(capability: Capability) -> Capability:
    """The capability whose traces serve this one: the model has no attention, so convolutions alone tell them apart."""
    alike = {(8, 6): (8, 0), (9, 0): (8, 0), (10, 0): (8, 0), (6, 1): (7, 5)}
    return alike.get(capability, capability)


def assumptions(setting: MaskRcnnSetting) -> Sequence[str]:
    """What a prediction takes for granted."""
    short, longest = sorted(setting.sides)
    largest = f"{longest} x {longest} pixels, which portrait and landscape images together are padded to"
    if setting.aspect_grouping:
        largest = f"{short} x {longest} pixels, because a window's images are all landscape or all portrait"
    canvas = f"{setting.canvas[0]} x {setting.canvas[1]} pixels" if setting.canvas else largest
    lines = [
        f"The fullest image has {setting.objects_per_image} objects (--objects-per-image, or --data).",
        f"All region samplers are full; the canvas is {canvas} (--data narrows it).",
    ]
    return (*lines, *remarks(setting))


def remarks(setting: MaskRcnnSetting) -> Sequence[str]:
    """What the user should know of a setting before training with it."""
    lines: list[str] = []
    live = setting.live_batch_norms
    if live:
        parts = ", ".join(f"{count} in the {part}" for part, count in live.items())
        lines.append(
            f"Live BatchNorm layers ({parts}) take their statistics from each micro-batch, so the gradient depends on the "
            "micro-batch; --norm frozen or --norm group makes it exact."
        )
    if setting.reference == "R2":
        lines.append(
            "--reference R2: each micro-batch's losses are averaged by its own counts, as data parallel training does; the "
            "gradient is not that of one big batch, and another micro-batch gives another result."
        )
    return lines


def turns(setting: MaskRcnnSetting, knob: str) -> Iterator[tuple[str, MaskRcnnSetting]]:
    """(flag, setting) for each turn of one knob that frees memory."""
    if knob == "rois":
        for rois in (256, 128, 64):
            if rois < (setting.rois_per_image or 512):
                yield f"--rois-per-image {rois}", replace(setting, rois_per_image=rois)
    if knob == "resolution" and setting.short_sides is None:
        for share in (0.75, 0.5):
            side = int(setting.eval_side * share)
            longest = None if setting.max_size is None else max(1, int(setting.max_size * share))
            flags = f"--resolution {side}" + ("" if longest is None else f" --max-size {longest}")
            yield flags, replace(setting, resolution=side, max_size=longest)
    if knob == "stages":
        for stages in (2, 1, 0):
            if stages < (TRAINABLE_STAGES if setting.trainable_stages is None else setting.trainable_stages):
                yield f"--trainable-stages {stages}", replace(setting, trainable_stages=stages)


def resized(height: int, width: int, *, min_size: int, max_size: int) -> tuple[int, int]:
    """What `GeneralizedRCNNTransform` makes of an image (torchvision 0.29 transform.py `_resize_image_and_masks`)."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, floor(height * scale)), max(1, floor(width * scale))


def group(setting: MaskRcnnSetting, record: Any) -> int:
    """1 for portrait images where they have windows of their own, else 0."""
    return int(setting.aspect_grouping and _is_portrait(record.height, record.width))


def _is_portrait(height: int, width: int) -> bool:
    return height > width


def for_data(setting: MaskRcnnSetting, statistics: Any) -> MaskRcnnSetting:
    """The objects of the fullest image, and the canvas of the largest window: as high and as wide as any image of a group
    after the resize.
    """
    low, high = setting.sides
    groups: dict[bool, list[tuple[int, int]]] = {}
    for (width, height), _ in statistics.canvas_sizes:
        portrait = setting.aspect_grouping and _is_portrait(height, width)
        groups.setdefault(portrait, []).append(resized(height, width, min_size=low, max_size=high))
    canvases = [(max(h for h, _ in sizes), max(w for _, w in sizes)) for sizes in groups.values()]
    return replace(
        setting,
        objects_per_image=max(1, statistics.objects_per_image_max),
        canvas=max(canvases, key=lambda canvas: (canvas[0] * canvas[1], canvas)),
    )


def drawn_sizes(setting: MaskRcnnSetting) -> DrawnSizes | None:
    """The short sides of training, each as often as it is named; the largest is traced."""
    if setting.short_sides is None:
        return None
    short, longest = setting.sides
    height, width = setting.canvas or (short, longest)
    sizes = [resized(height, width, min_size=side, max_size=longest) for side in setting.drawn_sides]
    flops, in_bytes = SHARES[setting.model]
    pixels = tuple(min(1.0, h * w / (height * width)) for h, w in sizes)
    return DrawnSizes(pixels=pixels, flops_share=flops, bytes_share=in_bytes)


def sample_bytes(setting: MaskRcnnSetting) -> int:
    """An image after the resize, and a mask of a byte a pixel for each object."""
    return _pixels(setting) * (3 + (setting.objects_per_image if setting.has_masks else 0))


def loads(setting: MaskRcnnSetting) -> tuple[int, bool]:
    """The side of a square of as many pixels as the largest image has, and whether masks are drawn."""
    return isqrt(_pixels(setting)), setting.has_masks


def _pixels(setting: MaskRcnnSetting) -> int:
    """Pixels of the largest image after the resize."""
    height, width = setting.canvas or setting.sides
    return height * width


def translate(arguments: Sequence[str]) -> list[str]:
    """A command line with `--detectron2 FILE` -> the same with what the configuration says as trainfit's flags."""
    if not any(word.partition("=")[0] == "--detectron2" for word in arguments):
        return list(arguments)
    from trainfit.models.maskrcnn.detectron2.translate import with_configuration

    return with_configuration(arguments)


@register
def family() -> Family:
    """The family of `MODELS`."""
    return Family(
        name="maskrcnn",
        setting=MaskRcnnSetting,
        models=MODELS,
        match=match,
        workload="trainfit.models.maskrcnn.workload",
        published=lambda setting: "-r50-" in setting.model and setting.norm == "published",
        checkpoint="trainfit.models.maskrcnn.workload:from_upstream",
        emit="trainfit.models.maskrcnn.emit",
        augments=frozenset({"flip"}),
        task="detection",
        packages=("torchvision",),
        reference_batches=REFERENCE_BATCHES,
        kernels=kernels,
        halves_alike=True,
        learns=("rois", "resolution", "stages", "optimizer"),
        turns=turns,
        assumptions=assumptions,
        for_data=for_data,
        group=group,
        translate=translate,
        shapes_weights=("norm",),
        sample_bytes=sample_bytes,
        loads=loads,
        drawn_sizes=drawn_sizes,
    )
