"""A plan: the chosen setting, why, what it needs, what else fits, and what does not. A file that later commands take."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from trainfit.errors import TrainfitError
from trainfit.files import read_json
from trainfit.gpus.catalogue import Gpu
from trainfit.gpus.context import ByteRange
from trainfit.memory.predict import RESERVE, Prediction
from trainfit.models.family import family_of
from trainfit.models.setting import Setting
from trainfit.planning.rates import scaled_rates
from trainfit.step.names import Checkpointing
from trainfit.training.recipe import FROM_DATA, Recipe, make_recipe, recipe_type, with_todays_names
from trainfit.values import given, require_known

SCHEMA = 1
Verdict = Literal["chosen", "fits", "fits, no reserve", "does not fit"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One setting that was considered."""

    setting: Setting
    """Micro-batch, accumulation and checkpointing tell candidates apart; `precision` is never "auto"."""
    cuts: tuple[int, ...]
    """Images of each micro-batch of a full window on one GPU; the last may be smaller."""
    needs: ByteRange
    """The least that training runs in, its CUDA context included (`memory.predict.MemoryPrediction.needs`)."""
    seconds: float | None
    """Seconds of one window; None for a card whose rates are not known."""
    images_per_s: float | None
    """Speed over all GPUs."""
    verdict: Verdict
    """fits: the most that it may need is available, and `memory.predict.RESERVE` of the budget in addition."""
    reason: str
    """Why it was not chosen, with the number; for the chosen one, why it was."""
    needs_more: bool = False
    """Whether `needs` is only a lower bound, which is already too much: the need was not computed."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What one knob would free."""

    knob: str
    """The flag and its value, for instance "--checkpointing all"."""
    saved_bytes: int
    """Bytes that training with the chosen setting would need less; with the smallest setting if nothing fits."""
    learns_differently: bool
    """Whether it changes what is learned, so that only the user may choose it."""
    slower: float | None = None
    """Share of its time by which a window takes longer, negative if it is faster; None if it is not known."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What feeding the GPUs requires of the host."""

    workers: int
    """Loader processes per GPU."""
    host_bytes: int
    """Host memory of the trainers (one per GPU), their workers, and the windows in their queues."""
    reason: str
    """How the number of workers was chosen."""
    of_this_machine: bool = True
    """Whether the cores were those of the machine that trains; else it chooses its own number of workers."""


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """The request for a plan."""

    setting: Setting
    """The user's knobs; micro-batch and accumulation are ignored; precision must not be "auto"."""
    effective_batch: int
    """Images per optimizer step over all GPUs."""
    gpus: int = 1
    """Number of GPUs, one process each."""
    budget_bytes: int
    """Memory that is certainly available to a process."""
    reserve: float = RESERVE
    """Share of the budget that is kept free; 0 if no setting leaves so much."""
    exchange_s: float = 0.0
    """Seconds to sum the gradients over the GPUs, once per window."""
    micro_batch: int | None = None
    """The only micro-batch to consider; None: all."""
    checkpointing: Checkpointing | None = None
    """The only checkpointing to consider; None: the least that fits."""
    allow: tuple[str, ...] = ()
    """Knobs of `Family.learns` that may change if nothing fits otherwise."""

    @property
    def share(self) -> int:
        """Images of a window on the fullest GPU."""
        return -(-self.effective_batch // self.gpus)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The result of a search."""

    chosen: Candidate | None
    """The fastest candidate that fits; None if nothing fits."""
    prediction: Prediction | None
    """Prediction of the chosen setting, evaluation included."""
    candidates: tuple[Candidate, ...]
    """All settings that were considered."""
    knee: int
    """See `Plan.knee`."""
    savings: tuple[Saving, ...]
    """What each knob would free."""
    not_priced: tuple[str, ...] = ()
    """A line for each candidate that may be somewhat faster, but that no trace covers yet."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer, whether anything fits or not."""

    model: str
    """Name of the model."""
    gpu: Gpu
    """The card that is planned for."""
    gpus: int
    """Number of cards, one process each."""
    effective_batch: int
    """Images per optimizer step over all GPUs, exactly."""
    budget: ByteRange
    """What the process may have on each GPU, at worst and at best."""
    chosen: Candidate | None
    """None: nothing fits."""
    prediction: Prediction | None
    """Prediction of the chosen setting, evaluation included; None if nothing fits."""
    knee: int | None
    """Smallest micro-batch within 3 % of the best speed, whether it fits or not; None for a card without rates."""
    frontier: tuple[Candidate, ...]
    """The candidates that fit and of which no faster one needs less memory; fastest first."""
    candidates: tuple[Candidate, ...]
    """All that were considered, the chosen one too."""
    smallest: Candidate
    """The candidate that needs the least memory."""
    savings: tuple[Saving, ...]
    """What each knob would free, largest first. Where something fits, of the chosen setting: knobs that change memory and time
    alone, as far as that is known without a trace. Where nothing fits, of the smallest: all knobs."""
    loading: Loading
    """Loader processes and host memory."""
    learning_rate: str
    """A sentence on what the effective batch means for the learning rate."""
    calibrated: bool
    """Whether times were corrected by measurements on this card; otherwise they only rank settings."""
    assumptions: tuple[str, ...]
    """Sentences on what the plan assumes."""
    data: str = ""
    """The data set that it is for, as the user named it; empty: any."""
    only_classes: str = ""
    """Classes of the data set, as `--only-classes` takes them; empty: all."""


NOT_TAKEN = ("model", "accumulation", *FROM_DATA)
"""Knobs of a setting that training does not take from a plan."""


OF_THE_RUN = ("data", "plan", "weights", "out", "resume")
"""Values of a recipe that no plan determines."""


def knobs(plan: Plan) -> dict[str, Any]:
    """What training takes from a plan: values of a `training.recipe.Recipe`. The plan must have a chosen setting."""
    assert plan.chosen is not None
    setting = plan.chosen.setting
    own = {name: value for name, value in setting.to_json().items() if name not in NOT_TAKEN}
    values = {"effective_batch": plan.effective_batch, **own, **scaled_rates(setting, plan.effective_batch)}
    if plan.loading.of_this_machine:
        values["workers"] = plan.loading.workers
    if plan.only_classes:
        values["only_classes"] = plan.only_classes
    return {name: value for name, value in values.items() if value is not None}


def with_plan(recipe: Recipe) -> Recipe:
    """The recipe with its plan's model and knobs, where it has none of its own.

    Raises:
        TrainfitError: not a plan file, or another model's.
    """
    if recipe.plan is None:
        return recipe
    record = read_plan(recipe.plan)
    if recipe.model and family_of(recipe.model)[1] != record["model"]:
        raise TrainfitError(f"--plan {recipe.plan} is for {record['model']}, not {recipe.model}: drop one of the two")
    own = {name: getattr(recipe, name) for name in given(recipe) - {"model"}}
    try:
        return make_recipe(record["model"], **{**record["knobs"], **own})
    except TrainfitError as error:
        raise TrainfitError(f"--plan {recipe.plan}: {error}") from error


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan file: what training takes, and what was predicted. The plan must have a chosen setting."""
    assert plan.chosen is not None
    assert plan.prediction is not None
    training = plan.prediction.training
    return {
        "schema": SCHEMA,
        "model": plan.model,
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "setting": plan.chosen.setting.to_json(),
        "knobs": knobs(plan),
        "predicted": {
            "low_bytes": plan.prediction.needs.low_bytes,
            "high_bytes": plan.prediction.needs.high_bytes,
            "takes_low_bytes": plan.prediction.takes.low_bytes,
            "takes_high_bytes": plan.prediction.takes.high_bytes,
            "allocated_bytes": training.profile.peak_allocated_bytes,
            "reserved_bytes": training.profile.peak_reserved_bytes,
            "budget_bytes": plan.budget.low_bytes,
            "images_per_s": plan.chosen.images_per_s,
            "calibrated": plan.calibrated,
        },
    }


def read_plan(path: Path) -> Mapping[str, Any]:
    """A plan file.

    Raises:
        TrainfitError: not there, not a plan, or another version's.
    """
    try:
        record = read_json(path)
    except OSError as error:
        raise TrainfitError(
            f"--plan {path} cannot be read ({error.strerror}): write one with trainfit plan --out"
        ) from error
    except ValueError as error:
        raise TrainfitError(f"--plan {path} is not JSON ({error}): write one with trainfit plan --out") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise TrainfitError(f"--plan {path} is not a plan file of schema {SCHEMA}: write one with trainfit plan --out")
    for key, kind in (("model", str), ("knobs", dict), ("setting", dict), ("predicted", dict)):
        if not isinstance(record.get(key), kind):
            raise TrainfitError(
                f"--plan {path} is not a plan file (it has no {key!r}): write one with trainfit plan --out"
            )
    kind = recipe_type(family_of(record["model"])[0].setting)
    taken = {field.name for field in fields(kind)} - {*NOT_TAKEN, *OF_THE_RUN}
    todays_knobs = with_todays_names(record["knobs"], kind)
    require_known(todays_knobs, taken, f"--plan {path}, knobs")
    return {**record, "knobs": todays_knobs}
