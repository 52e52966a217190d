"""A setting: one choice of every knob. Imports no torch, so that planning with stored traces starts at once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trainfit.errors import TrainfitError
from trainfit.step.names import Checkpointing, Optimizer, Precision


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is predicted, planned and trained: plain values, so that it can be sent to another process as JSON.

    A knob that a family has not got (queries of a classifier) does nothing there.
    """

    model: str
    """rfdetr-nano, maskrcnn-r50-v2, clip:ARCH, timm:NAME, or module:function of your own."""
    micro_batch: int = 1
    """Images (or pairs) in one forward and backward."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    eval_micro_batch: int | None = None
    """Images in one forward of evaluation; None: `micro_batch`."""
    resolution: int | None = None
    """Pixels: side of the square input; Mask R-CNN: the short side after the resize. None: as published."""
    canvas: tuple[int, int] | None = None
    """Mask R-CNN: (height, width) in pixels that micro-batches are padded to. None: the worst, which is a window of
    images with the longest allowed side, upright and lying by turns."""
    precision: Precision = "auto"
    checkpointing: Checkpointing = "none"
    """Activation checkpointing: how many of the model's blocks, from the first, are computed again in backward."""
    optimizer: Optimizer = "adamw-fused"
    """sgd has momentum; adamw-8bit is bitsandbytes' (extra `8bit`)."""
    ema: bool | None = None
    """Keep an averaged copy of the weights on the device. None: as the family is trained: RF-DETR yes, others no."""
    ema_on_host: bool = False
    """Keep that copy in the CPU's memory: less on the GPU, more time."""
    freeze_encoder: bool = False
    """RF-DETR: the encoder does not train."""
    multi_scale: bool = True
    """RF-DETR: the training size changes with every window; the largest one is priced."""
    channels_last: bool = False
    """Store images and convolution weights as NHWC. Classifiers."""
    classes: int = 80
    """Classes of the data set, background not counted."""
    objects_per_image: int = 100
    """Objects in the fullest image; the default is that of rf-detr's own memory probe."""
    num_queries: int | None = None
    """RF-DETR: object queries. None: as published."""
    groups: int | None = None
    """RF-DETR: query groups in training. None: as published."""
    stage: Literal["single", "detector", "masks"] = "single"
    """RF-DETR-Seg: `single`: everything trains; `detector`: without the mask head; `masks`: the mask head alone."""
    contrastive: Literal["cached", "plain"] = "cached"
    """CLIP: `cached`: the loss of the whole window, exactly; `plain`: each micro-batch is contrasted with itself alone
    and the losses are averaged, which is another loss where `accumulation` > 1."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("micro_batch", "accumulation", "eval_micro_batch", "resolution", "classes", "objects_per_image"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainfitError(f"--{name.replace('_', '-')} must be at least 1, not {value}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Setting":
        """What `to_json` gave, after any trip through JSON (which has no tuples)."""
        values = dict(record)
        if values.get("canvas") is not None:
            values["canvas"] = tuple(values["canvas"])
        return cls(**values)
