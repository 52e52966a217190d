"""A setting: one choice of every knob. Imports no torch, so that planning with stored traces starts at once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar

from trainfit.errors import TrainfitError
from trainfit.models.family import Family, families, family_of
from trainfit.step.names import Checkpointing, Optimizer, Precision
from trainfit.values import In, Range, flag, from_record, require_valid


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The knobs that every family has. A family adds its own in a subclass; `make_setting` makes that of a model.

    Values are plain, so that a setting can be sent to another process as JSON.
    """

    family: ClassVar[Family]
    """The family whose setting it is; `models.family.register` sets it."""

    model: Annotated[str, In(positional=True)]
    """The model: a name that ships (an unknown one is answered with the list), clip:ARCH, timm:NAME, or module:function of your
    own."""
    micro_batch: Annotated[int, Range(1, 100_000), In("batch")] = 1
    """Images (or pairs) in one forward and backward on one GPU; changes memory and speed, not the result."""
    accumulation: Annotated[int, Range(1, 1_000_000), In("batch")] = 1
    """Micro-batches per optimizer step and GPU."""
    eval_micro_batch: Annotated[int | None, Range(1, 100_000), In("batch", rare=True)] = None
    """Images in one forward of evaluation; the micro-batch unless given."""
    checkpointing: Annotated[Checkpointing, Range(0), In("memory")] = "none"
    """Activation checkpointing: how many of the model's blocks, from the first, are recomputed in backward; offload: all, and
    what is kept besides waits in host memory."""
    precision: Annotated[Precision, In("memory")] = "auto"
    """auto: bf16 on CUDA capability 8.0 and later, fp16 on older GPUs, fp32 on the CPU."""
    optimizer: Annotated[Optimizer, In("memory")] = "adamw-fused"
    """adamw-host is adamw-fused with its moments in host memory: less on the GPU, more time; sgd has momentum 0.9, sgd-plain
    none; adamw-8bit is that of bitsandbytes (extra `8bit`)."""
    ema: Annotated[bool | None, In("memory")] = None
    """Keep EMA weights, for evaluation and the best checkpoint; as upstream trains the model unless given."""
    ema_on_host: Annotated[bool, In("memory", rare=True)] = False
    """Keep the EMA weights in host memory: less on the GPU, more time."""
    classes: Annotated[int, Range(1, 100_000)] = 80
    """Classes of the data set, background not counted."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be used."""
        require_valid(self)
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is int and value < 1 and each.name != "checkpointing":
                raise TrainfitError(f"{flag(each.name)} must be at least 1, not {value}")

    @property
    def keeps_ema(self) -> bool:
        """Whether EMA weights are kept."""
        return self.family.ema if self.ema is None else self.ema

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class DetectionSetting(Setting):
    """The knobs of families that detect objects."""

    objects_per_image: Annotated[int, Range(1, 100_000)] = 100
    """Objects in the fullest image; --data sets it from the data set."""


def make_setting(model: str, **knobs: Any) -> Setting:
    """The setting of a model as people type it; `knobs` are fields of its family's setting.

    Raises:
        TrainfitError: no such model, or its family has no such knob.
    """
    family, name = family_of(model)
    known = [each.name for each in fields(family.setting) if each.name != "model"]
    for knob in knobs:
        if knob not in known:
            near = get_close_matches(knob, known, n=1)
            hint = f" Perhaps you meant {near[0]}." if near else ""
            raise TrainfitError(f"{name} has no knob {knob!r}.{hint} It has {', '.join(known)}")
    return family.setting(model=name, **knobs)


def named(setting: Setting) -> Setting:
    """The setting with the model's canonical name.

    Raises:
        TrainfitError: no such model.
    """
    return replace(setting, model=family_of(setting.model)[1])


def setting_from_json(record: Any, source: str = "setting") -> Setting:
    """What `Setting.to_json` gave, as a setting of the model's family; `source` is where it was read.

    Knobs of other families are left out: until version 0.1 a setting had those of all.

    Raises:
        TrainfitError: no such model, no family has such a knob, or a value that a setting cannot have.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("model"), str):
        raise TrainfitError(f"{source} is no setting: it has no `model`")
    try:
        family, name = family_of(record["model"])
        own = {each.name for each in fields(family.setting)}
        others = {each.name for other in families().values() for each in fields(other.setting)} - own
        values = {key: value for key, value in record.items() if key not in others}
        return from_record(family.setting, values | {"model": name}, source)
    except TrainfitError as error:
        if str(error).startswith(source):
            raise
        raise TrainfitError(f"{source}: {error}") from error
