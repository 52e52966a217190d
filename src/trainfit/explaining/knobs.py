"""Computes what each knob of a model would free on the card of an error. Imports no torch for models with stored traces."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import Gpu
from trainfit.memory.priced import Pricer
from trainfit.models.setting import Setting
from trainfit.planning.candidates import FREE, STATE, turned
from trainfit.planning.make import precision_for
from trainfit.planning.predict import predict


@dataclass(frozen=True, kw_only=True)
class Freed:
    """One knob turned, all others as they are."""

    knob: str
    """The flag on the command line."""
    frees_bytes: int
    """Reserved memory that it frees at most; negative if it needs more."""
    needs_bytes: int
    """The most that it needs afterwards, with the CUDA context."""
    same_result: bool
    """Whether the result of training stays the same."""
    failure: str = ""
    """Why there is no figure; empty if there is one."""


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


def frees(
    setting: Setting, gpu: Gpu, *, trace: bool = False, note: Callable[[str], None] = lambda _: None
) -> tuple[int, tuple[Freed, ...]]:
    """What the setting needs at most, and what each knob would free.

    Where the setting itself is answered from stored traces, a knob that is not is left without a figure unless `trace`:
    each would take some 10 s.

    Raises:
        TrainfitError: the setting itself cannot be predicted.
    """
    pricer = Pricer(gpu=gpu)

    def is_stored(each: Setting) -> bool:
        return pricer.answers(replace(each, precision=precision_for(each, gpu)))

    quick = not trace and is_stored(setting)
    base = predict(setting, gpu).needs.high_bytes
    freed: list[Freed] = []
    for knob, changed, same in changes(setting):
        failure = ""
        needs = 0
        try:
            if quick and not is_stored(changed):
                failure = "no stored trace covers it: --trace prices it too, in some 10 s"
            else:
                note(f"predicting {knob}")
                needs = predict(changed, gpu).needs.high_bytes
        except TrainfitError as error:
            failure = str(error)
        frees_bytes = 0 if failure else base - needs
        freed.append(Freed(knob=knob, frees_bytes=frees_bytes, needs_bytes=needs, same_result=same, failure=failure))
    return base, tuple(sorted(freed, key=lambda each: (bool(each.failure), -each.frees_bytes)))
