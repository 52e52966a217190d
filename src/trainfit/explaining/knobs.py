"""What each knob of a named model would free on the card of an error. Imports no torch for models with stored traces."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import Gpu
from trainfit.models.setting import Setting
from trainfit.planning.candidates import FREE, STATE, turned
from trainfit.planning.predict import predict


@dataclass(frozen=True, kw_only=True)
class Freed:
    """One knob turned, all others as they are."""

    knob: str
    """The flag on the command line."""
    frees_bytes: int
    """Less reserved memory at most; negative where it needs more."""
    needs_bytes: int
    """The most that it needs afterwards, with the CUDA context."""
    same_result: bool
    """Whether training learns the same with it."""
    failure: str = ""
    """Why there is no figure."""


def changes(setting: Setting) -> Iterator[tuple[str, Setting, bool]]:
    """(Knob as on the command line, setting with it, whether training learns the same), the gentlest turn of each."""
    if setting.micro_batch > 1:
        half = setting.micro_batch // 2
        yield f"--micro-batch {half}", replace(setting, micro_batch=half, accumulation=setting.accumulation * 2), True
    if setting.checkpointing != "all":
        yield "--checkpointing all", replace(setting, checkpointing="all"), True
    for knob in (*FREE, STATE, *setting.family.learns):
        for flag, changed in islice(turned(setting, knob), 1):
            yield flag, changed, knob in (*FREE, STATE)


def frees(setting: Setting, gpu: Gpu, *, note: Callable[[str], None] = lambda _: None) -> tuple[int, tuple[Freed, ...]]:
    """What the setting needs at most, and what each knob would free.

    Raises:
        TrainfitError: the setting itself cannot be predicted.
    """
    base = predict(setting, gpu).needs.high_bytes
    freed: list[Freed] = []
    for knob, changed, same in changes(setting):
        note(f"predicting {knob}")
        try:
            needs = predict(changed, gpu).needs.high_bytes
            freed.append(Freed(knob=knob, frees_bytes=base - needs, needs_bytes=needs, same_result=same))
        except TrainfitError as error:
            freed.append(Freed(knob=knob, frees_bytes=0, needs_bytes=0, same_result=same, failure=str(error)))
    return base, tuple(sorted(freed, key=lambda each: -each.frees_bytes))
