"""What every room knows of a family of models, and the register of families. Imports no torch."""

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import metadata
from typing import TYPE_CHECKING, Any

from trainfit.errors import TrainfitError

if TYPE_CHECKING:
    from trainfit.models.setting import Setting

ENTRY_POINTS = "trainfit.families"
"""The group of entry points under which an installed package names modules that register families."""
VARIABLE = "TRAINFIT_FAMILIES"
"""Environment variable: modules, separated by commas, that register families and are on the module path."""
Capability = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class DrawnSizes:
    """The sizes of images that training draws from, where a step is traced at one of them."""

    pixels: tuple[float, ...]
    """Pixels of each size over those of the traced one; all are drawn equally often."""
    flops_share: float
    """Part of a traced micro-batch's FLOPs that is in proportion to the pixels; the rest is the same at every size."""
    bytes_share: float
    """Part of the bytes that its kernels read and write that is."""


def _nothing_to_turn(_setting: Any, _knob: str) -> Iterator[tuple[str, Any]]:
    yield from ()


def _as_it_is(setting: Any, _statistics: Any) -> Any:
    return setting


@dataclass(frozen=True, kw_only=True)
class Family:
    """The models that share a training step. A function that returns one is made known by `register`.

    Functions that take a setting take the family's own kind of setting.
    """

    name: str
    """As its folder is named."""
    setting: "type[Setting]"
    """The dataclass of a setting: the knobs that all families have and the family's own."""
    models: tuple[str, ...]
    """Names of its models, for lists and suggestions. An open set is written as a pattern, for instance "timm:NAME"."""
    match: Callable[[str], str | None]
    """What a user typed -> the canonical name of the model, or None for a model of another family."""
    workload: str
    """Module with `make_workload(setting, classes) -> Workload`; it is imported with torch, when a step is built."""
    prepare_trace: str | None = None
    """"module:function" that a tracing process calls before it builds a step, with the compute capability that it traces for:
    to stand in for what a trace cannot run."""
    published: Callable[[Any], bool] = lambda _: False
    """Setting -> whether upstream has weights that training starts from where nothing else is said."""
    checkpoint: str | None = None
    """"module:function" of (model name, file of upstream's or `pretrained`) -> (`Workload`, the model with the file's
    weights and classes, remarks for the user); None: such files cannot be evaluated."""
    emit: str | None = None
    """Module that registers the tool which trains its models upstream (`models.emit.register`), for `plan --emit`."""
    refuses_checkpointing: tuple[str, ...] = ()
    """Tools of `plan --emit` that refuse activation checkpointing of its models."""
    task: str | None = None
    """What reads its data and measures it: a room in `tasks/`, or the path of a module with the functions of `tasks.task.Task`.
    None: it is predicted, and not trained."""
    augments: frozenset[str] = frozenset({"crop", "flip"})
    """What of `crop` and `flip` its decoder draws by itself where `--augment` is `default`."""
    extra: str | None = None
    """The optional dependency of trainfit that it needs."""
    packages: tuple[str, ...] = ()
    """Distributions, besides torch, that its steps are made from: a stored trace is of their versions."""
    packages_for: Callable[[Any], tuple[str, ...]] = lambda _: ()
    """Setting -> distributions that this setting's step is made from, besides `packages`."""
    last: bool = False
    """Whether it is asked for a name after all others, because its names could be theirs."""
    cacheable: bool = True
    """Whether traces may be stored: not where the model's code may change without notice."""
    ema: bool = False
    """Whether EMA weights are kept where the setting leaves it open."""
    reference_batches: tuple[int, int] | None = None
    """Least and largest effective batch that upstream itself trains with at the default learning rates."""
    asks_batch: str = ""
    """Why an effective batch must be given, in a sentence; empty: there is a default for all families that say nothing."""
    coupled: Callable[[Any], bool] = lambda _: False
    """Setting -> whether all samples of a window meet in one loss, so that micro-batches know of each other."""
    coupled_rows: Callable[[Any], int] = lambda _: 0
    """Setting -> rows of a coupled loss that are computed at one time, where all micro-batches of a window run in the same way;
    0: a window is predicted from traces of its own."""
    ratio_knob: str | None = None
    """The knob by which a tower runs by itself in a coupled window, on so many times the micro-batch; None as its value: all
    towers run together."""
    kernels: Callable[[Capability], Capability] = lambda capability: capability
    """Compute capability -> one that stands for all on which the family's kernels are the same."""
    alike: Callable[[Any], Mapping[Capability, Capability]] = lambda _: {}
    """Setting -> for compute capabilities one on which this setting's kernels are the same, where not all of the family's are."""
    halves_alike: bool = False
    """Whether a step in fp16 allocates what one in bf16 does, on cards that compute in both."""
    learns: tuple[str, ...] = ()
    """Knobs that free memory and change what is learned, the gentlest first; `--allow` names them."""
    turns: Callable[[Any, str], Iterator[tuple[str, Any]]] = _nothing_to_turn
    """(setting, knob) -> (flag, setting) for each turn of one of `learns` that frees memory, the gentlest first."""
    assumptions: Callable[[Any], Sequence[str]] = lambda _: ()
    """Setting -> what a prediction takes for granted, in sentences."""
    for_data: Callable[[Any, Any], Any] = _as_it_is
    """(setting, the task's statistics of a data set) -> the setting with what the statistics determine."""
    check_recipe: Callable[[Any], None] = lambda _: None
    """Recipe -> None; raises TrainfitError for values of the family's knobs that do not go together in a training."""
    needed_flags: Callable[[Any], Sequence[str]] = lambda _: ()
    """Setting -> flags that `trainfit train` needs for it besides its knobs, for a printed command."""
    training: type | None = None
    """A dataclass of values of training that its models alone have and that are no part of a setting: each is a flag of
    `trainfit train` and a field of the recipe, declared as a knob is. None: there are none."""
    rates: tuple[str, ...] = ()
    """Fields of `training` that are learning rates: they follow the effective batch as `lr` does."""
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of `training.recipe.Recipe` -> the family's own defaults."""
    not_flags: tuple[str, ...] = ()
    """Fields of `training.recipe.Recipe` that say nothing to its models, and are no flags."""
    lr_factor: Callable[..., float] | None = None
    """(optimizer step, recipe, steps_per_epoch=, total_steps=) -> what every rate is multiplied by; None: as
    `training.schedule.lr_factor`."""
    translate: Callable[[Sequence[str]], list[str]] = list
    """Command line -> the same with the flags of other programs for these models as trainfit's."""
    shapes_weights: tuple[str, ...] = ()
    """Knobs that a run keeps from the one that it starts from with --weights RUN."""
    sample_bytes: Callable[[Any], int] = lambda _: 0
    """Setting -> bytes of one decoded sample in host memory."""
    loads: Callable[[Any], tuple[int, bool]] | None = None
    """Setting -> side in pixels of the square that an image is resized to by a loader process, or of a square of as many
    pixels, and whether masks are drawn: loading is timed without torch. None: it is timed with the family's own decoder."""
    group: Callable[[Any, Any], int] = lambda _setting, _record: 0
    """(setting, training record) -> the number of its group: the records of a window are of one group."""
    drawn_sizes: Callable[[Any], DrawnSizes | None] = lambda _: None
    """Setting -> the sizes that training draws from; None where the step is always as traced."""
    host_seconds: Callable[[Any, int, Capability | None], float] = lambda _setting, _images, _capability: 0.0
    """(setting, images, compute capability) -> seconds of a training micro-batch that the GPU waits for and that no operator
    of a trace shows."""


_families: dict[str, Family] = {}
_modules: dict[str, str] = {}
"""Family name -> the module that registered it."""


def register(make: Callable[[], Family]) -> Callable[[], Family]:
    """Decorate a function that returns a `Family`: its models are known from then on.

    Raises:
        ValueError: another module registered a family of this name.
    """
    family = make()
    module = make.__module__
    if _modules.get(family.name, module) != module:
        raise ValueError(f"two families are named {family.name}: {_modules[family.name]} and {module}")
    family.setting.family = family
    _families[family.name] = family
    _modules[family.name] = module
    return make


def families() -> Mapping[str, Family]:
    """All families by name: those of the package, of installed packages and of `TRAINFIT_FAMILIES`."""
    if not _discovered:
        _discover()
    return _families


_discovered: list[bool] = []


def _discover() -> None:
    """Import every module that registers families, once."""
    _discovered.append(True)
    package = importlib.import_module("trainfit.models")
    for folder in pkgutil.iter_modules(package.__path__):
        if folder.ispkg:
            importlib.import_module(f"trainfit.models.{folder.name}.family")
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    named += [point.value for point in metadata.entry_points(group=ENTRY_POINTS)]
    for module in named:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise TrainfitError(f"{VARIABLE}: {module} cannot be imported ({error})") from error


def registering_modules() -> tuple[str, ...]:
    """Modules outside the package that registered families: another process has to import them too."""
    return tuple(sorted({module for module in _modules.values() if not module.startswith("trainfit.")}))


def find(typed: str) -> tuple[Family, str] | None:
    """The family of a model as people type it, and the model's canonical name; None where no family has it."""
    for family in sorted(families().values(), key=lambda each: each.last):
        name = family.match(typed.strip())
        if name is not None:
            return family, name
    return None


def family_of(typed: str) -> tuple[Family, str]:
    """The family of a model as people type it, and the model's canonical name.

    Raises:
        TrainfitError: no family has such a model; the message names the nearest.
    """
    family_and_name = find(typed)
    if family_and_name is not None:
        return family_and_name
    models = model_names()
    near = get_close_matches(dashed(typed), models, n=1, cutoff=0.6)
    hint = f" Perhaps you meant {near[0]}." if near else ""
    raise TrainfitError(f"no model named {typed!r}.{hint} Models: {', '.join(models)}")


def model_names() -> tuple[str, ...]:
    """The models of all families; names first, patterns last."""
    names: list[str] = []
    for family in families().values():
        names += family.models
    return tuple(sorted(names, key=lambda name: ":" in name))


def dashed(typed: str) -> str:
    """A model's name in lower case, with hyphens for spaces and underscores."""
    return typed.strip().lower().replace(" ", "-").replace("_", "-")
