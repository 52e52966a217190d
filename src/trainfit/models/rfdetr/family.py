"""RF-DETR and the RT-DETR-Seg guide's models as a family. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from trainfit.errors import TrainfitError
from trainfit.models.family import Capability, DrawnSizes, Family, dashed, register
from trainfit.models.rfdetr.guide import translate
from trainfit.models.rfdetr.matching import matching_seconds
from trainfit.models.rfdetr.sizes import drawn
from trainfit.models.setting import DetectionSetting
from trainfit.values import In, Range, require_valid

Stage = Literal["single", "detector", "masks"]
PARTS = ("encoder", "projector", "decoder")
"""What `--freeze` may name."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a model was published with."""

    resolution: int
    """Side of the square input in pixels."""
    block: int
    """Legal resolutions are its multiples."""
    queries: int
    """Object queries."""
    decoder_layers: int
    """Layers of the decoder."""


def _published(resolution: int, block: int, queries: int, decoder_layers: int) -> Published:
    return Published(resolution=resolution, block=block, queries=queries, decoder_layers=decoder_layers)


PUBLISHED = {
    "rfdetr-nano": _published(384, 32, 300, 2),
    "rfdetr-small": _published(512, 32, 300, 3),
    "rfdetr-medium": _published(576, 32, 300, 4),
    "rfdetr-large": _published(704, 32, 300, 4),
    "rfdetr-seg-nano": _published(312, 12, 100, 4),
    "rfdetr-seg-small": _published(384, 24, 100, 4),
    "rfdetr-seg-medium": _published(432, 24, 200, 5),
    "rfdetr-seg-large": _published(504, 24, 200, 5),
    "rfdetr-seg-xlarge": _published(624, 24, 300, 6),
    "rfdetr-seg-2xlarge": _published(768, 24, 300, 6),
    "rtdetr-seg-nano": _published(384, 32, 300, 2),
    "rtdetr-seg-small": _published(512, 32, 300, 3),
    "rtdetr-seg-base": _published(560, 56, 300, 3),
    "rtdetr-seg-medium": _published(576, 32, 300, 4),
    "rtdetr-seg-large": _published(560, 56, 300, 3),
}
"""Upstream's configurations (a test compares), here so that planning needs no torch.
rtdetr-seg: detection sizes with a mask head, as the RT-DETR-Seg guide names them."""
GROUPS = 13
"""Query groups in training, of every published model."""
REFERENCE_BATCHES = (4, 16)
"""rfdetr 1.11.2 config.py: batch_size 4 x grad_accum_steps 1, and auto_batch_target_effective 16, the default before 1.10."""
LARGEST_SCALE = 1.4
"""The largest of the multi-scale sizes, as a multiple of the resolution, for a sample's bytes; the sizes differ by model."""
KERNELS_ALIKE = {(8, 6): (8, 0), (10, 0): (9, 0), (6, 1): (7, 5)}
"""These differ in kernels for attention heads of more than 128 numbers, or not of a multiple of 8: not RF-DETR's."""


@dataclass(frozen=True, kw_only=True)
class RfDetrKnobs:
    """What a user may change of the published model."""

    resolution: Annotated[int | None, Range(1, 8192)] = None
    """Side of the square input in pixels; as published unless given."""
    snap: Annotated[bool, In("model", rare=True)] = True
    """Take the nearest legal resolution where the wanted one is not legal."""
    multi_scale: bool = True
    """Draw the training size anew for every window, out of sizes around the resolution; the largest is the one priced."""
    num_queries: Annotated[int | None, Range(1, 10_000)] = None
    """Object queries; as published unless given."""
    groups: Annotated[int | None, Range(1, 100)] = None
    """Query groups in training (upstream's group_detr); 13 unless given."""
    freeze: Annotated[str, In("model")] = "none"
    """Parts that are not trained: encoder, projector, decoder, or several with commas between."""
    freeze_encoder: Annotated[bool, In("model", rare=True)] = False
    """As --freeze encoder."""
    lora: Annotated[int | None, Range(1, 1024), In("model")] = None
    """Train the encoder by low-rank adapters of its queries, keys and values, of this rank (16 is upstream's); whole unless
    given."""
    drop_path: Annotated[float, Range(0, 0.9), In("model", rare=True)] = 0.0
    """Stochastic depth in the encoder: the last layer is left out for this share of images, earlier ones for less."""
    stage: Annotated[Stage, In("model"), "formerly recipe"] = "single"
    """For models with masks. single: everything trains at once; detector: without the mask head; masks: the mask head alone,
    on a frozen detector."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be used."""
        require_valid(self)
        require_parts(self.freeze)

    @property
    def frozen(self) -> frozenset[str]:
        """The parts that are not trained, of `PARTS`; with adapters the encoder's own weights are not."""
        encoder = {"encoder"} if self.freeze_encoder else set[str]()
        return frozenset(encoder | set(require_parts(self.freeze)))


def require_parts(freeze: str) -> tuple[str, ...]:
    """The parts that `--freeze` names.

    Raises:
        TrainfitError: there is no such part.
    """
    parts = tuple(part.strip() for part in freeze.split(",") if part.strip() not in ("", "none"))
    for part in parts:
        if part not in PARTS:
            near = get_close_matches(part, PARTS, n=1)
            hint = f" Perhaps you meant {near[0]}." if near else ""
            raise TrainfitError(f"--freeze {freeze}: {part!r} is no part.{hint} Parts are {', '.join(PARTS)}")
    return parts


@dataclass(frozen=True, kw_only=True)
class RfDetrTraining:
    """Values of a training of an RF-DETR that are no part of its setting."""

    lr_encoder: Annotated[float, Range(0, 1e3), In("schedule")] = 1.5e-4
    """Learning rate of the encoder's last layer, before component decay."""


@dataclass(frozen=True, kw_only=True)
class RfDetrSetting(RfDetrKnobs, DetectionSetting):
    """A setting of an RF-DETR."""

    lean: Annotated[Literal["on", "off"], In("model", rare=True)] = "on"
    """Mask losses, mask matching and the choice of queries in pieces (same numbers, less memory); off: upstream's own, to
    compare."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be used."""
        DetectionSetting.__post_init__(self)
        RfDetrKnobs.__post_init__(self)
        if self.lora and "encoder" in self.frozen:
            raise TrainfitError(
                "--lora trains the encoder by adapters, and --freeze encoder not at all: leave one of the two out"
            )

    @property
    def has_masks(self) -> bool:
        """Whether masks are trained."""
        return "-seg-" in self.model and self.stage != "detector"


def match(typed: str) -> str | None:
    """The canonical name of a model: "RF-DETR Nano", "rfdetr_nano" and "rf-detr-nano" are rfdetr-nano."""
    name = dashed(typed).replace("rf-detr", "rfdetr").replace("rt-detr", "rtdetr")
    return name if name in PUBLISHED else None


def kernels(capability: Capability) -> Capability:
    """The capability whose traces serve this one."""
    return KERNELS_ALIKE.get(capability, capability)


def turns(setting: RfDetrSetting, knob: str) -> Iterator[tuple[str, RfDetrSetting]]:
    """(flag, setting) for each turn of one knob that frees memory."""
    published = PUBLISHED[setting.model]
    if knob == "resolution":
        now = setting.resolution or published.resolution
        for share in (0.75, 0.5):
            side = max(published.block, int(now * share) // published.block * published.block)
            if side < now:
                yield f"--resolution {side}", replace(setting, resolution=side)
    if knob == "multi-scale" and setting.multi_scale:
        yield "--no-multi-scale", replace(setting, multi_scale=False)
    if knob == "groups":
        for groups in (4, 1):
            if groups < (setting.groups or GROUPS):
                yield f"--groups {groups}", replace(setting, groups=groups)
    if knob == "queries":
        half = (setting.num_queries or published.queries) // 2
        if half:
            yield f"--num-queries {half}", replace(setting, num_queries=half)
    if knob == "encoder" and "encoder" not in setting.frozen and not setting.lora and setting.stage != "masks":
        yield "--freeze-encoder", replace(setting, freeze_encoder=True)


def assumptions(setting: RfDetrSetting) -> Sequence[str]:
    """What a prediction takes for granted."""
    lines = [f"The fullest image has {setting.objects_per_image} objects (--objects-per-image, or --data)."]
    side = setting.resolution or PUBLISHED[setting.model].resolution
    lines.append(f"Every image is resized to {side} x {side} pixels: no canvas to pad to.")
    if setting.multi_scale:
        lines.append("Multi-scale training: memory at the largest of its sizes, time as the mean over all.")
    return lines


def for_data(setting: RfDetrSetting, statistics: Any) -> RfDetrSetting:
    """The objects of the fullest image."""
    objects = max(1, statistics.objects_per_image_max)
    return replace(setting, objects_per_image=objects)


def host_seconds(setting: RfDetrSetting, images: int, capability: Capability | None) -> float:
    """Hungarian matching of a training micro-batch, every image as full as the fullest."""
    published = PUBLISHED[setting.model]
    return matching_seconds(
        images=images,
        objects=setting.objects_per_image,
        queries=setting.num_queries or published.queries,
        groups=setting.groups or GROUPS,
        layers=published.decoder_layers,
        masks=setting.has_masks,
        capability=capability,
    )


def has_published_weights(setting: RfDetrSetting) -> bool:
    """Whether upstream's file of the model fits; there is none of the guide's models with a mask head."""
    published = PUBLISHED[setting.model]
    stage = "single" if setting.model.startswith("rfdetr-") else "detector"
    return (
        setting.stage == stage and (setting.num_queries or 0) <= published.queries and (setting.groups or 0) <= GROUPS
    )


def check_recipe(recipe: Any) -> None:
    """The mask stage starts from the run of a detector."""
    if recipe.stage == "masks" and recipe.weights in (None, "pretrained", "random"):
        raise TrainfitError("--stage masks trains on a frozen detector: give its run folder with --weights RUN")


def drawn_sizes(setting: RfDetrSetting) -> DrawnSizes | None:
    """The sizes of multi-scale training; the largest is traced."""
    if not setting.multi_scale:
        return None
    published = PUBLISHED[setting.model]
    queries = (setting.num_queries or published.queries) * (setting.groups or GROUPS)
    return drawn(
        setting.model,
        resolution=setting.resolution or published.resolution,
        published=published.resolution,
        block=published.block,
        queries_share=queries / (published.queries * GROUPS),
        masks=setting.has_masks,
    )


def loads(setting: RfDetrSetting) -> tuple[int, bool]:
    """The largest size of training, and whether masks are drawn."""
    side = setting.resolution or PUBLISHED[setting.model].resolution
    return int(side * LARGEST_SCALE) if setting.multi_scale else side, setting.has_masks


def sample_bytes(setting: RfDetrSetting) -> int:
    """An image of the largest size, and a mask of a byte a pixel for each object."""
    side = setting.resolution or PUBLISHED[setting.model].resolution
    pixels = (side * LARGEST_SCALE if setting.multi_scale else side) ** 2
    masks = setting.objects_per_image if "-seg-" in setting.model else 0
    return int(pixels * (3 + masks))


@register
def family() -> Family:
    """The family of the models in `PUBLISHED`."""
    return Family(
        name="rfdetr",
        setting=RfDetrSetting,
        training=RfDetrTraining,
        rates=("lr_encoder",),
        models=tuple(PUBLISHED),
        match=match,
        workload="trainfit.models.rfdetr.workload",
        prepare_trace="trainfit.models.rfdetr.tracing:prepare",
        published=has_published_weights,
        checkpoint="trainfit.models.rfdetr.workload:from_upstream",
        emit="trainfit.models.rfdetr.emit",
        refuses_checkpointing=("transformers",),  # transformers 5.23
        task="detection",
        packages=("rfdetr",),
        ema=True,
        reference_batches=REFERENCE_BATCHES,
        kernels=kernels,
        halves_alike=True,
        learns=("multi-scale", "groups", "queries", "resolution", "encoder", "optimizer"),
        turns=turns,
        assumptions=assumptions,
        for_data=for_data,
        check_recipe=check_recipe,
        not_flags=("warmup_steps",),
        needed_flags=lambda setting: ("--weights RUN",) if setting.stage == "masks" else (),
        translate=translate,
        shapes_weights=("resolution", "num_queries", "groups", "lora"),
        sample_bytes=sample_bytes,
        loads=loads,
        drawn_sizes=drawn_sizes,
        host_seconds=host_seconds,
    )
