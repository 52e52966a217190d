"""The recipe: what the user wants trained."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from trainfit.errors import TrainfitError
from trainfit.files import read_json
from trainfit.step.names import Checkpointing, Optimizer, Precision
from trainfit.training.run_files import RECIPE
from trainfit.values import Range, flag, from_record, given, keeps_given, require_valid

DEFAULT_EFFECTIVE_BATCH = 16
"""Why this many: docs/training.md."""
DEFAULT_MICRO_BATCH = 4


@keeps_given
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what, for how long."""

    model: tyro.conf.Positional[str] = ""
    """Model: rfdetr-nano, -small, -medium, -large; with masks: rfdetr-seg-nano to -2xlarge. Of the run with --from."""
    data: str = ""
    """Data set: a folder (COCO, Roboflow export, YOLO, Pascal VOC), a COCO JSON file, or `sample`."""
    format: Literal["auto", "coco", "yolo", "voc"] = "auto"
    """Format of the data set; found by looking unless given."""
    allow_outside: bool = False
    """Read files that the data set names but does not hold: absolute paths, `..`, links."""
    plan: Path | None = None
    """File that `trainfit plan --out` wrote: its knobs are taken where none are given here."""
    weights: str | None = None
    """Start from a file of trainfit or upstream, or `pretrained` (downloads upstream's); random without it."""
    recipe: Literal["single", "detector", "masks"] = "single"
    """For models with masks. single: everything trains at once; detector: stage 1, without the mask head; masks: stage 2,
    the mask head alone, on the frozen detector of --from."""
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Run folder of the detector that --recipe masks adds its mask head to; its evaluated (best) weights are taken."""
    resolution: Annotated[int | None, Range(1, 8_192)] = None
    """Side of the square input in pixels; the model's published one by default."""
    snap: bool = True
    """Take the nearest legal resolution where the wanted one is not legal."""
    effective_batch: Annotated[int | None, Range(1, 1_000_000)] = None
    """Images per optimizer step over all GPUs (default 16; docs/training.md says why)."""
    micro_batch: Annotated[int | None, Range(1, 100_000)] = None
    """Images per forward and backward on one GPU; changes memory and speed, not the result."""
    accumulation: Annotated[int | None, Range(1, 1_000_000)] = None
    """Micro-batches per optimizer step and GPU."""
    epochs: Annotated[int, Range(1, 1_000_000)] = 100
    """Passes over the training images."""
    max_steps: Annotated[int | None, Range(1)] = None
    """Stop after this many optimizer steps."""
    out: Path | None = None
    """Run folder; runs/MODEL-N by default."""
    resume: Path | None = None
    """Run folder to go on with; its own recipe is used, and --epochs, --max-steps, --micro-batch may be given anew."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Weights, order of data and augmentation follow from it."""
    tensorboard: bool = False
    """Write TensorBoard logs too (needs trainfit[tensorboard])."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Precision = "auto"
    """auto: bf16 on CUDA capability 8.0 and later, fp16 on older GPUs, fp32 on the CPU."""
    lr: Annotated[float, Range(0, 1e3)] = 1e-4
    """Learning rate of the heads; it follows the effective batch, not the micro-batch."""
    lr_encoder: Annotated[float, Range(0, 1e3)] = 1.5e-4
    """Learning rate of the encoder's last layer, before component decay."""
    weight_decay: Annotated[float, Range(0)] = 1e-4
    """AdamW's decay."""
    schedule: Literal["step", "cosine"] = "step"
    """step: a tenth of the rate from epoch --lr-drop on; cosine: to zero at the end."""
    lr_drop: Annotated[int, Range(0)] = 100
    """Epoch of the step schedule's drop."""
    warmup_epochs: Annotated[float, Range(0)] = 0.0
    """Length of the linear warm-up."""
    clip_norm: Annotated[float, Range(0)] = 0.1
    """Largest gradient norm of a window; 0 turns clipping off."""
    ema: bool = True
    """Average the weights; evaluation and the saved best use the average."""
    multi_scale: bool = True
    """Draw the training size anew for every window; the largest is up to 1.4 times the resolution."""
    augment: bool = True
    """Random crops and flips."""
    num_queries: Annotated[int | None, Range(1, 10_000)] = None
    """Object queries; the published number by default."""
    groups: Annotated[int | None, Range(1, 100)] = None
    """Query groups in training (upstream's group_detr, 13)."""
    checkpointing: Annotated[Checkpointing, Range(0)] = "none"
    """Activation checkpointing: how many blocks, from the first, are computed again in backward: less memory, more time."""
    optimizer: Optimizer = "adamw-fused"
    """adamw-8bit needs bitsandbytes (trainfit[8bit])."""
    ema_on_host: bool = False
    """Keep the averaged weights in the CPU's memory: less on the GPU, more time."""
    freeze_encoder: bool = False
    """Train all but the encoder."""
    workers: Annotated[int | None, Range(0, 256)] = None
    """Loader processes per GPU; by the machine's cores unless given."""
    eval_every: Annotated[int, Range(0)] = 1
    """Evaluate every so many epochs, and at the end; 0: at the end alone."""
    eval_micro_batch: Annotated[int | None, Range(1, 100_000)] = None
    """Images per forward in evaluation; the micro-batch by default."""
    val_fraction: Annotated[float, Range(0, 1, inside=True)] = 0.1
    """Share of the training images held out where the data set has no validation split."""
    save_minutes: Annotated[float, Range(0)] = 10.0
    """Save the state this often besides after every evaluation."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        require_valid(self)
        if self.resume is None and not self.model and self.from_run is None and self.plan is None:
            raise TrainfitError("name a model, for instance: trainfit train rfdetr-nano --data DIR")
        if self.resume is None and not self.data:
            raise TrainfitError("--data is missing: a folder, a COCO JSON file, or `sample`")
        if (self.recipe == "masks") != (self.from_run is not None):
            raise TrainfitError("--recipe masks and --from RUN (the run of a detector) go together")
        if self.from_run is not None and self.weights is not None:
            raise TrainfitError("--weights and --from cannot both say where to start: leave --weights out")


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How an effective batch is divided."""

    effective_batch: int
    """Images per optimizer step over all ranks: held exactly."""
    micro_batch: int
    """Images per forward and backward."""
    accumulation: int
    """Micro-batches per optimizer step on the fullest rank."""
    world_size: int
    reason: str
    """The arithmetic, for the user."""


def resolve_batching(recipe: Recipe, world_size: int) -> Batching:
    """Micro-batch, accumulation and effective batch from what was given of them.

    Raises:
        TrainfitError: all three are given and disagree, or there are fewer images in a batch than ranks.
    """
    micro, accumulation, effective = recipe.micro_batch, recipe.accumulation, recipe.effective_batch
    if accumulation is not None:
        micro = micro or max(1, (effective or DEFAULT_EFFECTIVE_BATCH) // (accumulation * world_size))
        product = micro * accumulation * world_size
        if effective is not None and effective != product:
            raise TrainfitError(
                f"--effective-batch {effective} is not --micro-batch {micro} x --accumulation {accumulation} "
                f"x {world_size} GPUs = {product}: leave one of the three out"
            )
        effective = product
    effective = effective or DEFAULT_EFFECTIVE_BATCH
    if effective < world_size:
        raise TrainfitError(
            f"--effective-batch {effective} is less than the {world_size} GPUs: give at least {world_size}"
        )
    share = -(-effective // world_size)
    micro = min(micro or DEFAULT_MICRO_BATCH, share)
    steps = -(-share // micro)
    reason = f"effective batch {effective} = micro-batch {micro} x accumulation {steps} x {world_size} GPU(s)"
    if micro * steps * world_size != effective:
        reason = (
            f"effective batch {effective} over {world_size} GPU(s): {share} images each in {steps} micro-batches of {micro} "
            "(the last one smaller; weighted exactly)"
        )
    return Batching(
        effective_batch=effective, micro_batch=micro, accumulation=steps, world_size=world_size, reason=reason
    )


RESUMABLE = frozenset(
    {"epochs", "max_steps", "micro_batch", "accumulation", "workers", "tensorboard", "eval_every", "eval_micro_batch"}
)
"""What may change when a run goes on: none of it changes what a step computes."""


def resume_recipe(wanted: Recipe) -> Recipe:
    """The saved recipe of the run folder `wanted.resume`, with the values that were given anew, defaults included.

    Raises:
        TrainfitError: not a run folder, or a flag that would make it another run.
    """
    assert wanted.resume is not None
    saved = _read(wanted.resume)
    changes: dict[str, Any] = {}
    for name in sorted(given(wanted) - {"resume", "out"}):
        value, before = getattr(wanted, name), getattr(saved, name)
        if value in ("", before):
            continue
        if name not in RESUMABLE:
            raise TrainfitError(
                f"{flag(name)} {value} differs from the resumed run's {before}: drop it, or start a new run"
            )
        changes[name] = value
    return dataclasses.replace(saved, **changes, resume=wanted.resume, out=wanted.resume)


def _read(folder: Path) -> Recipe:
    """The recipe of a run folder."""
    path = folder / RECIPE
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TrainfitError(f"--resume: {folder} is not a run folder of trainfit (no {RECIPE})") from error
    except OSError as error:
        raise TrainfitError(f"{path} cannot be read ({error.strerror}): start a new run") from error
    except ValueError as error:
        raise TrainfitError(f"{path} is damaged ({error}): start a new run") from error
    return from_record(Recipe, record, path)


def encode(recipe: Recipe) -> str:
    """JSON of a recipe."""
    values = dataclasses.asdict(recipe) | {"resume": None}
    return json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in values.items()}, indent=2) + "\n"
