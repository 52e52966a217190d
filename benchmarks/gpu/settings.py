"""The suite: what is measured on a GPU, the most telling cases first."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from typing import Any, Literal

from trainfit.models.setting import Setting, make_setting, setting_from_json

GIB = 2**30
TAKEN_BYTES = GIB
"""Of a small card, what driver, context and kernels take before the caching allocator gets anything."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One process: a setting and its allocator."""

    setting: Setting
    part: Literal["training", "evaluation"] = "training"
    """evaluation: one training window, then evaluation."""
    expandable: bool = False
    """Expandable segments."""
    card_gib: int | None = None
    """The process may reserve what a card of this size would leave to it: `card_gib` less `TAKEN_BYTES`."""

    @property
    def name(self) -> str:
        """Every knob that is not at its default, so it changes only with what is measured."""
        s, default = self.setting, make_setting(model=self.setting.model)
        own = s.to_json()
        changed = {name for name, value in own.items() if value != getattr(default, name)}
        flags = {
            "ckpt": "checkpointing" in changed,
            s.optimizer: "optimizer" in changed,
            "ema": s.ema is True,
            "noema": s.ema is False,
            "onescale": "multi_scale" in changed,
            "nhwc": "channels_last" in changed,
            f"canvas{'x'.join(map(str, own.get('canvas') or ()))}": "canvas" in changed,
            f"classes{s.classes}": "classes" in changed,
            f"objects{own.get('objects_per_image')}": "objects_per_image" in changed,
            f"queries{own.get('num_queries')}": "num_queries" in changed,
            f"groups{own.get('groups')}": "groups" in changed,
            f"{own.get('stage')}": "stage" in changed,
            f"{own.get('contrastive')}": "contrastive" in changed,
            f"eval{s.eval_micro_batch or s.micro_batch}": self.part == "evaluation",
            "expandable": self.expandable,
            f"card{self.card_gib}": self.card_gib is not None,
        }
        size = f"-r{own['resolution']}" if own["resolution"] else ""
        steps = f"x{s.accumulation}" if s.accumulation > 1 else ""
        start = f"{s.model.replace(':', '-')}{size}-b{s.micro_batch}{steps}-{s.precision}"
        return "-".join((start, *(flag for flag, there in flags.items() if there)))

    @property
    def alloc_conf(self) -> str:
        """For PYTORCH_CUDA_ALLOC_CONF."""
        return "expandable_segments:True" if self.expandable else ""

    @property
    def limit_bytes(self) -> int | None:
        """The most that the process may reserve; None: all that the card has."""
        return None if self.card_gib is None else self.card_gib * GIB - TAKEN_BYTES

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Case":
        """What `to_json` gave."""
        values = dict(record)
        values["setting"] = setting_from_json(values["setting"])
        return cls(**values)


def _cases(model: str, base: Mapping[str, Any], *changes: Mapping[str, Any]) -> list[Case]:
    """The base itself, then the base with each of the changes: fields of `Setting` and of `Case`."""
    first = make_setting(model=model, **base)
    made = [Case(setting=first)]
    for change in changes:
        around = {key: value for key, value in change.items() if key in ("part", "expandable", "card_gib")}
        knobs = {key: value for key, value in change.items() if key not in around}
        made.append(Case.from_json({"setting": {**first.to_json(), **knobs}, **around}))
    return made


def _b(micro_batch: int, **others: Any) -> dict[str, Any]:
    return {"micro_batch": micro_batch, **others}


BF16 = {"micro_batch": 4, "precision": "bf16"}
FP32 = {"precision": "fp32"}
FP16 = {"precision": "fp16"}
CKPT = {"checkpointing": "all"}
EVAL = {"part": "evaluation"}
EXPANDABLE = {"expandable": True}
SMALLER_CANVAS: dict[str, Any] = {"canvas": (800, 1088)}

DETECTION = chain(
    _cases("rfdetr-nano", BF16, FP32, CKPT, _b(6, card_gib=4), _b(16, **EXPANDABLE), _b(3, card_gib=4), FP16),
    _cases("rfdetr-medium", BF16, _b(2, **FP32), _b(4, card_gib=8), _b(8, **CKPT), _b(8, card_gib=16, **EXPANDABLE)),
    _cases("rfdetr-large", BF16, _b(8, **CKPT), _b(4, card_gib=12), _b(8, card_gib=16), _b(8, card_gib=24)),
    _cases("rfdetr-small", BF16, _b(2, accumulation=4), {"ema": False}, {"optimizer": "adamw-foreach"}, _b(32)),
    _cases("rfdetr-nano", BF16, {"objects_per_image": 10}, _b(1), _b(4, eval_micro_batch=32, **EVAL), {"groups": 1})[
        1:
    ],
    _cases("rfdetr-small", BF16, {"multi_scale": False}, _b(8, **FP16), {"optimizer": "sgd"}, _b(8, card_gib=6))[1:],
)
SEGMENTATION = chain(
    _cases("rfdetr-seg-nano", BF16, FP32, {"stage": "masks"}, {"stage": "detector"}, _b(4, card_gib=6), CKPT),
    _cases("rfdetr-seg-medium", _b(2, precision="bf16"), FP32, _b(4, **CKPT), _b(4, card_gib=12), EXPANDABLE, EVAL),
    _cases("rtdetr-seg-base", _b(2, precision="bf16"), {"stage": "masks"}, _b(2, card_gib=8)),
    _cases("rfdetr-seg-2xlarge", _b(1, precision="bf16"), _b(2, **CKPT), {"card_gib": 12}),
    _cases("rfdetr-seg-small", BF16, {"objects_per_image": 10}, _b(1, accumulation=8), FP16, _b(16, card_gib=24)),
    _cases("rfdetr-seg-large", _b(2, precision="bf16"), _b(4, card_gib=16), _b(8)),
    _cases("rtdetr-seg-large", _b(1, precision="bf16"), _b(2, stage="masks")),
)
REGIONS = chain(
    _cases("maskrcnn-r50-v2", _b(2, precision="bf16"), FP32, CKPT, _b(2, card_gib=8), SMALLER_CANVAS, EVAL),
    _cases("maskrcnn-r50-v1", _b(2, precision="fp32"), {"precision": "bf16"}, _b(1, card_gib=6), {"card_gib": 8}, FP16),
    _cases("maskrcnn-r50-v2", _b(4, precision="bf16"), {"card_gib": 12}, EXPANDABLE, {"card_gib": 16, **EXPANDABLE}),
    _cases("maskrcnn-r50-v1", _b(4, precision="bf16", resolution=480), _b(2, accumulation=4), {"optimizer": "sgd"}),
)
CONTRASTIVE = chain(
    _cases("clip:ViT-B-32", _b(64, precision="bf16", accumulation=4), {"contrastive": "plain"}, {"ema": True}, FP32),
    _cases("clip:ViT-B-16", _b(64, precision="bf16"), CKPT, FP16, {"optimizer": "adamw-foreach"}, {"card_gib": 8}),
    _cases("clip:ViT-L-14", _b(16, precision="bf16"), _b(32, **CKPT), {"card_gib": 12}, _b(32, card_gib=16, **CKPT)),
    _cases("clip:RN50", _b(64, precision="fp32"), {"precision": "bf16"}, EXPANDABLE, _b(64, accumulation=2)),
    _cases("clip:ViT-B-16-SigLIP", _b(32, precision="bf16", accumulation=2), _b(128, accumulation=1), EVAL),
)
CLASSIFIERS = chain(
    _cases("timm:resnet50", _b(32, precision="fp32"), {"channels_last": True}, {"precision": "bf16"}, {"card_gib": 4}),
    _cases("timm:vit_small_patch16_224", _b(64, precision="bf16"), FP32, CKPT, {"card_gib": 4}, {"optimizer": "sgd"}),
    _cases(
        "timm:convnext_tiny", _b(64, precision="bf16"), FP32, {"channels_last": True, **FP16}, {"card_gib": 6}, CKPT
    ),
    _cases("timm:resnet50", _b(128, precision="bf16"), {"channels_last": True, **EXPANDABLE}, {"card_gib": 12}, EVAL),
    _cases("timm:swin_tiny_patch4_window7_224", _b(64, precision="bf16"), FP16, {"card_gib": 8}),
    _cases("timm:efficientnet_b0", _b(64, precision="fp32"), {"channels_last": True, "precision": "bf16"}),
    _cases("timm:vit_base_patch16_224", _b(64, precision="bf16"), {"resolution": 384}, _b(128, card_gib=16)),
    _cases("timm:resnet10t", _b(2, precision="fp32", resolution=64)),
)
CUSTOM = chain(
    _cases("custom_tasks:deeplab", _b(8, precision="bf16"), FP32, _b(16, card_gib=8), _b(4, accumulation=4)),
    _cases("custom_tasks:encoder", _b(32, precision="bf16"), FP32, EXPANDABLE, {"optimizer": "adamw-foreach"}),
)


def _by_turns(groups: Iterable[Iterable[Case]]) -> tuple[Case, ...]:
    """The first of each group, then the second of each: a run that is cut short has seen every family."""
    return tuple(case for turn in zip_longest(*groups) for case in turn if case is not None)


SUITE = _by_turns((DETECTION, SEGMENTATION, REGIONS, CONTRASTIVE, CLASSIFIERS, CUSTOM))
