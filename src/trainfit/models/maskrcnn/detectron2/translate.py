"""A command line with `--detectron2 FILE` as one of trainfit's."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from trainfit.errors import TrainfitError
from trainfit.models.maskrcnn.detectron2.read import read_configuration
from trainfit.models.maskrcnn.detectron2.rules import COSINE, DIFFERENCES, RULES, Flags, Instead, Same
from trainfit.models.maskrcnn.detectron2.zoo import WARMUP_ITERS

TRAIN_DEFAULTS = ("--optimizer", "sgd", "--epochs", "1000000", "--eval-every", "0")
"""Flags of `trainfit train`: a configuration counts steps, not epochs, and Detectron2 trains with SGD."""
CLIP_VALUE = 1.0
"""Default of SOLVER.CLIP_GRADIENTS.CLIP_VALUE (Detectron2's config/defaults.py, as the two below)."""
STEPS = [30000]
"""Default of SOLVER.STEPS."""
MAX_ITER = 40000
"""Default of SOLVER.MAX_ITER."""


@dataclass(frozen=True, kw_only=True)
class Translation:
    """What a configuration says to trainfit. Every key is in exactly one of the lists."""

    model: str
    """Name of the model."""
    values: Mapping[str, Any]
    """Key -> value, with `_BASE_` resolved."""
    knobs: tuple[str, ...]
    """Words for the command line of every command."""
    training: tuple[str, ...]
    """Words that only `trainfit train` takes."""
    effective_batch: int | None
    """Images per optimizer step; None if the file does not say."""
    accumulation: int
    """Micro-batches per optimizer step."""
    carried: tuple[str, ...]
    """Keys whose values became flags."""
    same: tuple[str, ...]
    """Keys whose values the model has by itself."""
    instead: tuple[tuple[str, str], ...]
    """(key, what is done instead)."""
    unknown: tuple[str, ...]
    """Keys that Detectron2 does not have."""

    def lines(self) -> Iterable[str]:
        """The report, key by key."""
        yield f"detectron2: {len(self.carried)} keys are carried over: {', '.join(self.carried)}"
        if self.same:
            yield f"detectron2: {len(self.same)} keys say what {self.model} is: {', '.join(self.same)}"
        for key, text in self.instead:
            yield f"detectron2: {key} {_short(self.values[key])}: not carried over; {text}"
        for key in self.unknown:
            yield f"detectron2: {key} {_short(self.values[key])}: unknown, and not used"
        for text in DIFFERENCES:
            yield f"detectron2: model: {text}"


def translated(name: str) -> Translation:
    """What becomes of a configuration.

    Raises:
        TrainfitError: it cannot be read, is of another model, or has a value that trainfit has not.
    """
    values = read_configuration(name)
    carried: list[str] = []
    same: list[str] = []
    instead: list[tuple[str, str]] = []
    unknown: list[str] = []
    words: dict[bool, list[str]] = {False: [], True: []}
    for key, value in values.items():
        rule = RULES.get(key)
        if isinstance(rule, Flags):
            words[rule.training] += _made(rule, key, value, name)
            carried.append(key)
        elif isinstance(rule, Same) and _equal(rule.value, value):
            same.append(key)
        elif isinstance(rule, Same):
            if not rule.instead:
                raise TrainfitError(
                    f"{name} is of another model than R50/R101-FPN Mask or Faster R-CNN: {key} is {_short(value)}, not "
                    f"{_short(rule.value)}"
                )
            instead.append((key, rule.instead))
        elif isinstance(rule, Instead):
            instead.append((key, rule.text))
        else:
            unknown.append(key)
    batch = _whole(values, "SOLVER.IMS_PER_BATCH", name)
    accumulation = _whole(values, "SOLVER.ACCUMULATION_STEPS", name)
    return Translation(
        model=_model(values, name),
        values=values,
        knobs=tuple(_joined(words[False], values, name)),
        training=(*words[True], *_clipping(values, name), *_schedule(values, name)),
        effective_batch=None if batch is None else batch * (accumulation or 1),
        accumulation=accumulation or 1,
        carried=tuple(carried),
        same=tuple(same),
        instead=tuple(instead),
        unknown=tuple(unknown),
    )


def with_configuration(arguments: Sequence[str]) -> list[str]:
    """A command line without `--detectron2 FILE`, with its model and flags; flags that are there already stay.

    What is not carried over is said on stderr.

    Raises:
        TrainfitError: no file, another command, another model, or as `translated`.
    """
    words, name = _without_flag(arguments)
    command = words[0] if words else ""
    if command not in ("plan", "predict", "measure", "train"):
        raise TrainfitError("--detectron2 goes with plan, predict, measure and train")
    translation = translated(name)
    rest = words[1:]
    if rest and not rest[0].startswith("-"):
        from trainfit.models.family import family_of

        model = family_of(rest.pop(0))[1]
        if model != translation.model:
            raise TrainfitError(f"{name} is of {translation.model}, not {model}: leave the model out")
    added: list[str] = list(translation.knobs)
    if command == "train":
        added += [*translation.training, *TRAIN_DEFAULTS]
    added += _batch(translation, command)
    for line in translation.lines():
        print(line, file=sys.stderr)
    return [command, translation.model, *_not_given(added, rest), *rest]


def _batch(translation: Translation, command: str) -> list[str]:
    """The flags of the batch: plans and trainings hold the effective batch, other commands take how it is cut."""
    if translation.effective_batch is None:
        return []
    if command == "plan" or (command == "train" and translation.accumulation == 1):
        return ["--effective-batch", str(translation.effective_batch)]
    micro_batch = translation.effective_batch // translation.accumulation
    return ["--micro-batch", str(micro_batch), "--accumulation", str(translation.accumulation)]


def _not_given(added: Sequence[str], rest: Sequence[str]) -> list[str]:
    """The words of flags that are not in `rest`."""
    given = {_bare(word) for word in rest if word.startswith("--")}
    if given & {"effective-batch", "micro-batch", "accumulation"}:
        given |= (
            {"effective-batch", "micro-batch", "accumulation"} if "effective-batch" in given else {"effective-batch"}
        )
    kept: list[str] = []
    keep = True
    for word in added:
        if word.startswith("--"):
            keep = _bare(word) not in given
        if keep:
            kept.append(word)
    return kept


def _bare(word: str) -> str:
    return word[2:].partition("=")[0].replace("_", "-").removeprefix("no-")


def _without_flag(arguments: Sequence[str]) -> tuple[list[str], str]:
    words = list[str]()
    name = ""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag != "--detectron2":
            words.append(word)
            continue
        if not equals and (not rest or rest[0].startswith("--")):
            raise TrainfitError("--detectron2 needs a YAML file of Detectron2's, or the name of one of its own")
        name = value if equals else rest.pop(0)
    return words, name


def _made(rule: Flags, key: str, value: Any, name: str) -> list[str]:
    try:
        return rule.make(value)
    except (ValueError, TypeError, KeyError) as error:
        raise TrainfitError(f"{name}: {key} {_short(value)} is not a value that trainfit has") from error


def _joined(words: Sequence[str], values: Mapping[str, Any], name: str) -> list[str]:
    """The knobs, with those that two keys make together."""
    joined = list(words)
    sides = "--short-sides"
    if values.get("INPUT.MIN_SIZE_TRAIN_SAMPLING") == "range" and sides in joined:
        place = joined.index(sides) + 1
        joined[place] = joined[place].replace(",", "-")
    if sides in joined and "--resolution" not in joined:
        joined += ["--resolution", "800"]  # config/defaults.py INPUT.MIN_SIZE_TEST
    before, after = (_whole(values, f"MODEL.RPN.{which}_NMS_TOPK_TRAIN", name) for which in ("PRE", "POST"))
    if before is not None or after is not None:
        joined += ["--proposals", str(before or 2000), str(after or 1000)]
    if "--max-size" not in joined:
        joined += ["--max-size", "1333"]  # config/defaults.py INPUT.MAX_SIZE_TRAIN
    return joined


def _clipping(values: Mapping[str, Any], name: str) -> list[str]:
    if not values.get("SOLVER.CLIP_GRADIENTS.ENABLED", False):
        return ["--clip-norm", "0"]
    value = values.get("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", CLIP_VALUE)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise TrainfitError(f"{name}: SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be more than 0, not {_short(value)}")
    return ["--clip-norm", str(value)]


def _schedule(values: Mapping[str, Any], name: str) -> list[str]:
    """The schedule of the rate; where the file does not say, as config/defaults.py has it."""
    warmup = values.get("SOLVER.WARMUP_ITERS", WARMUP_ITERS)
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
        raise TrainfitError(f"{name}: SOLVER.WARMUP_ITERS must be a whole number, not {_short(warmup)}")
    words = ["--warmup-steps", str(warmup)]
    if values.get("SOLVER.LR_SCHEDULER_NAME") == COSINE:
        return [*words, "--schedule", "cosine"]
    steps = values.get("SOLVER.STEPS", STEPS)
    if not isinstance(steps, list) or not all(type(step) is int and step > 0 for step in cast(list[Any], steps)):
        raise TrainfitError(f"{name}: SOLVER.STEPS must be a list of whole numbers, not {_short(steps)}")
    last = _whole(values, "SOLVER.MAX_ITER", name) or MAX_ITER
    reached = [step for step in cast(list[int], steps) if step < last] or [last]  # no fall before the end
    return [*words, "--schedule", "step", "--lr-steps", *map(str, reached)]


def _model(values: Mapping[str, Any], name: str) -> str:
    depth = values.get("MODEL.RESNETS.DEPTH", 50)
    if depth not in (50, 101):
        raise TrainfitError(f"{name} is of another model: MODEL.RESNETS.DEPTH is {_short(depth)}, not 50 or 101")
    if values.get("MODEL.META_ARCHITECTURE") is None:
        raise TrainfitError(
            f"{name} is not a configuration of a Mask or Faster R-CNN: it has no MODEL.META_ARCHITECTURE"
        )
    return f"{'maskrcnn' if values.get('MODEL.MASK_ON', False) else 'fasterrcnn'}-r{depth}-v1"


def _whole(values: Mapping[str, Any], key: str, name: str) -> int | None:
    value = values.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise TrainfitError(f"{name}: {key} must be a whole number of at least 1, not {_short(value)}")
    return value


def _equal(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
