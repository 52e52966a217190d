"""The recipe of a training: setting, data, schedule and run."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args, get_origin, get_type_hints

from trainfit.errors import TrainfitError
from trainfit.files import read_json
from trainfit.models.family import Family, families, family_of, find, model_names
from trainfit.models.setting import Setting
from trainfit.tasks.augment import parse
from trainfit.training.lines import counted
from trainfit.training.run_files import RECIPE
from trainfit.training.trackers import require_trackers
from trainfit.values import In, Range, changed, flag, from_record, given, keeps_given, require_known, require_valid

DEFAULT_EFFECTIVE_BATCH = 16
"""docs/training.md explains this default. A family may require a value instead (`Family.asks_batch`)."""
DEFAULT_MICRO_BATCH = 4
RANDOM = "random"
"""Value of --weights: start from random weights."""
PRETRAINED = "pretrained"
"""Value of --weights: download upstream's weights."""


@keeps_given
@dataclass(frozen=True, kw_only=True)
class Recipe(Setting):
    """What to train, on which data and for how long: a setting with data, schedule and run.

    `Recipe(model=..., ...)` is a recipe with the knobs of the model's family (`recipe_type`).
    """

    model: Annotated[str, In(positional=True)] = ""
    """The model, as `trainfit plan` takes it; with --resume, --plan or --weights RUN it may be left out."""
    data: Annotated[str, In("data")] = ""
    """Data set: a folder or file that the model's task reads, or `sample`."""
    format: Annotated[str, In("data")] = "auto"
    """Format of the data set, for instance coco, yolo or voc; detected unless given."""
    allow_outside: Annotated[bool, In("data", rare=True)] = False
    """Read files that the data set names but does not hold: absolute paths, `..`, links."""
    val_fraction: Annotated[float, Range(0, 1, inside=True), In("data")] = 0.1
    """Share of the training data held out where the data set has no validation split."""
    only_classes: Annotated[str, In("data")] = ""
    """Names of classes, with commas between: objects or images of others are left out. All classes unless given."""
    augment: Annotated[str, In("data")] = "default"
    """What is drawn at random: none, light, default (as upstream), aerial or medical; then crop, flip, colour, scale, each
    with no- before it to leave it out; then module:name of your own. For instance default,no-flip,colour."""
    workers: Annotated[int | None, Range(0, 256), In("data")] = None
    """Loader processes per GPU; by the machine's cores unless given."""
    plan: Annotated[Path | None, In("run")] = None
    """File that `trainfit plan --out` wrote: its knobs are taken where none are given here."""
    weights: Annotated[str | None, In("run")] = None
    """What to start from: a run folder (its best weights), a weights file of trainfit or upstream, `pretrained` (downloads
    upstream's) or `random`; pretrained where upstream has weights of the model, unless given."""
    effective_batch: Annotated[int | None, Range(1, 1_000_000), In("batch")] = None
    """Images (or pairs) per optimizer step over all GPUs (default 16; docs/training.md says why; CLIP has none)."""
    epochs: Annotated[int, Range(1, 1_000_000), In("schedule")] = 100
    """Passes over the training data."""
    max_steps: Annotated[int | None, Range(1), In("schedule")] = None
    """Stop after this many optimizer steps."""
    lr: Annotated[float, Range(0, 1e3), In("schedule")] = 1e-4
    """Learning rate of the heads; it follows the effective batch, not the micro-batch."""
    weight_decay: Annotated[float, Range(0), In("schedule")] = 1e-4
    """AdamW's decay."""
    schedule: Annotated[Literal["step", "cosine"], In("schedule")] = "step"
    """step: a tenth of the rate from epoch 100 on; cosine: to --lr-min-factor of it at the end."""
    lr_min_factor: Annotated[float, Range(0, 1), In("schedule", rare=True)] = 0.0
    """Floor of the cosine schedule, as a share of the rate."""
    early_stopping: Annotated[int | None, Range(1, 1_000_000), In("schedule")] = None
    """Stop after this many epochs without a better evaluation; all epochs unless given."""
    lr_drop: Annotated[int, Range(0), In(None)] = 100
    """Epoch of the step schedule's drop; not a flag."""
    lr_steps: Annotated[tuple[int, ...], In("schedule", rare=True)] = ()
    """Optimizer steps at which the rate falls to a tenth, each time again, with --schedule step."""
    warmup_epochs: Annotated[float, Range(0), In("schedule")] = 0.0
    """Length of the linear warm-up."""
    warmup_steps: Annotated[int, Range(0, 1_000_000_000), In("schedule")] = 0
    """Length of the linear warm-up in optimizer steps."""
    compile: Annotated[bool, In("memory")] = False
    """Compile the model's repeated blocks by torch.compile; plans and predictions are of eager execution."""
    clip_norm: Annotated[float, Range(0), In("schedule")] = 0.1
    """Largest gradient norm of a window; 0 turns clipping off."""
    out: Annotated[Path | None, In("run")] = None
    """Run folder; runs/MODEL-N by default."""
    resume: Annotated[Path | None, In("run")] = None
    """Run folder to go on with; its own recipe is used, and --epochs, --max-steps, --micro-batch may be given anew."""
    seed: Annotated[int, Range(0, 2**63 - 1), In("run")] = 0
    """Weights, order of data and augmentation follow from it."""
    device: Annotated[Literal["auto", "cpu", "cuda"], In("run")] = "auto"
    """Device to train on."""
    eval_steps: Annotated[int | None, Range(1), In("run", rare=True)] = None
    """Evaluate after every so many optimizer steps, besides --eval-every."""
    eval_every: Annotated[int, Range(0), In("run")] = 1
    """Evaluate every so many epochs, and at the end; 0: at the end alone."""
    save_minutes: Annotated[float, Range(0), In("run", rare=True)] = 10.0
    """Save the state this often besides after every evaluation."""
    tensorboard: Annotated[bool, In("run")] = False
    """Write TensorBoard logs too (needs trainfit[tensorboard])."""
    track: Annotated[tuple[str, ...], In("run", rare=True)] = ()
    """Trackers that get the figures too: tensorboard, wandb, mlflow, trackio."""

    def __new__(cls, **values: Any) -> Self:
        """The recipe of the model's family, where `model` names one."""
        match = find(str(values.get("model", ""))) if cls is Recipe else None
        kind: Any = cls if match is None else recipe_type(match[0].setting)
        return object.__new__(kind)

    def __post_init__(self) -> None:
        """Refuse values that cannot be used, alone or together."""
        require_valid(self)
        parse(self.augment)
        require_trackers(self.track)
        if self.lr_steps and self.schedule != "step":
            raise TrainfitError(f"--lr-steps goes with --schedule step, not {self.schedule}")
        if any(step < 1 for step in self.lr_steps):
            raise TrainfitError(f"--lr-steps must be at least 1, not {min(self.lr_steps)}")
        if self.resume is None and not self.model and self.earlier_run is None and self.plan is None:
            raise TrainfitError(f"name a model, for instance: trainfit train {model_names()[0]} --data DIR")
        if self.resume is None and not self.data:
            raise TrainfitError("--data is missing: a folder, a COCO JSON file, or `sample`")
        if type(self) is not Recipe:
            self.family.check_recipe(self)

    @property
    def trackers(self) -> tuple[str, ...]:
        """All trackers that are asked for."""
        return (*self.track, *(("tensorboard",) if self.tensorboard else ()))

    @property
    def earlier_run(self) -> Path | None:
        """The run folder that `weights` names; None where it names something else."""
        return Path(self.weights) if self.weights and Path(self.weights).is_dir() else None


FROM_DATA = ("classes", "objects_per_image", "canvas")
"""Fields of settings that a data set determines: they are not flags of training."""


def _no_flag(hint: Any) -> Any:
    """An annotation with its checks, of a field that is not a flag."""
    inner, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return Annotated[(inner, *(extra for extra in extras if not isinstance(extra, In)), In(None))]


@cache
def recipe_type(kind: type[Setting]) -> type[Recipe]:
    """The recipe with the knobs of one kind of setting."""
    if kind is Setting:
        return Recipe
    hints = get_type_hints(kind, include_extras=True) | get_type_hints(Recipe, include_extras=True)
    own: Mapping[str, Any] = kind.family.recipe
    of_training = () if kind.family.training is None else (kind.family.training,)
    hidden = {*FROM_DATA, *kind.family.not_flags}
    defaults = {field.name: field.default for each in (kind, Recipe) for field in dataclasses.fields(each)} | dict(own)
    body: dict[str, Any] = {name: value for name, value in defaults.items() if name in hidden or name in own}
    body["__annotations__"] = {name: _no_flag(hints[name]) if name in hidden else hints[name] for name in body}
    body["__doc__"] = Recipe.__doc__
    made = type(f"{kind.__name__.removesuffix('Setting')}Recipe", (*of_training, Recipe, kind), body)
    return keeps_given(dataclass(frozen=True, kw_only=True)(made))


def make_recipe(model: str, **values: Any) -> Recipe:
    """The recipe of a model's family with these values, which count as given.

    Raises:
        TrainfitError: no such model, no such value, or one that cannot be used.
    """
    kind = recipe_type(family_of(model)[0].setting)
    require_known(values, [field.name for field in dataclasses.fields(kind)], "recipe")
    return cast(Callable[..., Recipe], kind)(**{**values, "model": model})


def setting_of(recipe: Recipe, classes: int) -> Setting:
    """The setting that a recipe trains, for a data set with so many classes (0: the data have none).

    Raises:
        TrainfitError: no such model.
    """
    family, model = family_of(recipe.model)
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(family.setting)}
    return cast(Callable[..., Setting], family.setting)(
        **{**values, "model": model, "classes": classes or values["classes"]}
    )


def batch_of(family: Family, effective_batch: int | None) -> int:
    """The effective batch, or the default where the family has one.

    Raises:
        TrainfitError: none is given, and the family asks for one.
    """
    if effective_batch is not None:
        return effective_batch
    if family.asks_batch:
        raise TrainfitError(f"--effective-batch is missing: {family.asks_batch}; give --effective-batch N")
    return DEFAULT_EFFECTIVE_BATCH


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How an effective batch is split into micro-batches and over ranks."""

    effective_batch: int
    """Images per optimizer step over all ranks: held exactly."""
    micro_batch: int
    """Images per forward and backward."""
    accumulation: int
    """Micro-batches per optimizer step on the fullest rank."""
    world_size: int
    """Number of ranks."""
    reason: str
    """The computation in words, for the user."""


def resolve_batching(recipe: Recipe, world_size: int) -> Batching:
    """Derive micro-batch, accumulation and effective batch from those that were given.

    Raises:
        TrainfitError: all three are given and disagree, none is and the family asks for one, or there are fewer images in a
            batch than ranks.
    """
    chosen = given(recipe)
    micro = recipe.micro_batch if "micro_batch" in chosen else None
    accumulation = recipe.accumulation if "accumulation" in chosen else None
    effective = recipe.effective_batch
    if micro is not None and accumulation is None and effective is None and recipe.family.asks_batch:
        accumulation = 1
    if accumulation is not None:
        micro = micro or max(1, batch_of(recipe.family, effective) // (accumulation * world_size))
        product = micro * accumulation * world_size
        if effective is not None and effective != product:
            raise TrainfitError(
                f"--effective-batch {effective} is not --micro-batch {micro} x --accumulation {accumulation} "
                f"x {world_size} GPUs = {product}: leave one of the three out"
            )
        effective = product
    if effective is None:
        effective = batch_of(recipe.family, None)
    if effective < world_size:
        raise TrainfitError(
            f"--effective-batch {effective} is less than the {world_size} GPUs: give at least {world_size}"
        )
    share = -(-effective // world_size)
    micro = min(micro or DEFAULT_MICRO_BATCH, share)
    steps = -(-share // micro)
    ranks = "" if world_size == 1 else f" x {world_size} GPUs"
    reason = f"effective batch {effective} = micro-batch {micro} x accumulation {steps}{ranks}"
    if micro * steps * world_size != effective:
        reason = (
            f"effective batch {effective} over {counted(world_size, 'process')}: {share} images each in {steps} micro-batches "
            f"of {micro} (the last one smaller; weighted exactly)"
        )
    return Batching(
        effective_batch=effective, micro_batch=micro, accumulation=steps, world_size=world_size, reason=reason
    )


RESUMABLE = frozenset(
    {
        *("epochs", "max_steps", "early_stopping", "eval_every", "eval_steps"),
        *("micro_batch", "accumulation", "eval_micro_batch"),
        *("workers", "tensorboard", "track"),
    }
)
"""Values that may change when a run is resumed: none of them changes what a step computes."""


def resume_recipe(wanted: Recipe) -> Recipe:
    """The saved recipe of the run folder `wanted.resume`, with the values that were given anew, defaults included.

    Raises:
        TrainfitError: not a run folder, or a flag that would make it another run.
    """
    assert wanted.resume is not None
    saved = _read(wanted.resume)
    changes: dict[str, Any] = {}
    for name in sorted(given(wanted) - {"resume", "out"}):
        value = getattr(wanted, name)
        before = getattr(saved, name)
        if value in ("", before):
            continue
        if name not in RESUMABLE:
            raise TrainfitError(
                f"{flag(name)} {value} differs from the resumed run's {before}: drop it, or start a new run"
            )
        changes[name] = value
    return changed(saved, **changes, resume=wanted.resume, out=wanted.resume)


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
    if not isinstance(record, dict):
        return from_record(Recipe, record, path)
    values = cast(dict[str, Any], record)
    model = values.get("model")
    if not isinstance(model, str):
        raise TrainfitError(f"{path}: --model must be text, not {model!r}")
    try:
        family, _ = family_of(model)
    except TrainfitError as error:
        raise TrainfitError(f"{path}: {error}") from error
    return from_record(recipe_type(family.setting), _of_today(values, family.setting), path)


FORMERLY = "formerly "
"""Begins a text in the annotation of a knob: files of version 0.1 and earlier have the knob by the name that follows."""


def with_todays_names(values: Mapping[str, Any], kind: type[Setting]) -> dict[str, Any]:
    """Knobs of a file of an earlier version by the names that they have today.

    Values of training that other families alone have are left out: until version 0.1 a recipe had those of all.
    """
    todays: dict[str, str] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        texts = (
            [extra for extra in get_args(hint)[1:] if isinstance(extra, str)] if get_origin(hint) is Annotated else []
        )
        todays |= {text.removeprefix(FORMERLY): name for text in texts if text.startswith(FORMERLY)}
    elsewhere = {name for other in families().values() for name in training_fields(other)}
    elsewhere -= set(training_fields(kind.family))
    return {todays.get(name, name): value for name, value in values.items() if name not in elsewhere}


def training_fields(family: Family) -> tuple[str, ...]:
    """Values of a recipe that the models of one family alone have: the fields of its `Family.training`."""
    return () if family.training is None else tuple(each.name for each in dataclasses.fields(family.training))


def _of_today(record: Mapping[str, Any], kind: type[Setting]) -> dict[str, Any]:
    """A recipe as it is written today.

    Until version 0.1 some knobs had other names, the run that `weights` may name was `from_run`, null meant "not given", and
    `augment` was yes or no.
    """
    values = with_todays_names(record, kind)
    earlier_run = values.pop("from_run", None)
    if earlier_run is not None:
        values["weights"] = earlier_run
    if isinstance(values.get("augment"), bool):
        values["augment"] = "default" if values["augment"] else "none"
    return {key: value for key, value in values.items() if value is not None or key not in BATCH}


BATCH = ("micro_batch", "accumulation")
"""Values whose absence means that training chooses."""


def encode(recipe: Recipe) -> str:
    """JSON of a recipe, without a micro-batch that was not given.

    The accumulation is left out always: it would mean another effective batch on another number of ranks.
    """
    values = dataclasses.asdict(recipe) | {"resume": None}
    left_out = {*FROM_DATA, "accumulation", *({"micro_batch"} - given(recipe))}
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if k not in left_out}
    return json.dumps(shown, indent=2) + "\n"
