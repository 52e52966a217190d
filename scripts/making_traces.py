"""Makes the traces of a case and writes them to the cache folder, for `scripts/traces`."""

import importlib
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

from shipped_cases import AnyCase, Case, Point
from window_cases import WindowCase

from trainfit.memory import shipped
from trainfit.memory.scaled_traces import PAIRS
from trainfit.memory.scaling import ScaledTrace, scale
from trainfit.models.build import build_eval_step
from trainfit.models.setting import Setting
from trainfit.tracing.stored_trace import StoredTrace


def trace_both(case: Case, point: Point) -> tuple[StoredTrace, StoredTrace]:
    """Traces of training and evaluation at a point."""
    from trainfit.tracing.both import ForkedStep
    from trainfit.tracing.fake_cuda import Target
    from trainfit.tracing.trace import trace_step

    setting = point.of(case.requests()[1].setting)
    case.folder.mkdir(parents=True, exist_ok=True)
    path = case.folder / f"evaluation-{point.name}.tmp"
    forked: list[ForkedStep] = []

    def build(device: Any) -> Any:
        forked.append(ForkedStep(build_eval_step(setting=setting.to_json(), device=device)))
        return forked[0]

    prepare(setting, case.capability)
    made = trace_step(build, target=Target(capability=case.capability))
    if forked[0].child == 0:
        path.write_text(made.to_json())
        os._exit(0)
    status = os.waitpid(forked[0].child, 0)[1]
    assert status == 0, f"evaluation of {setting.model}: exit status {status}"
    evaluation = StoredTrace.from_json(path.read_text())
    path.unlink()
    return made, evaluation


def prepare(setting: Setting, capability: tuple[int, int]) -> None:
    """Prepare this process for a trace of the setting's family, as `tracing.worker` does."""
    if setting.family.prepare_trace is not None:
        module, _, function = setting.family.prepare_trace.partition(":")
        getattr(importlib.import_module(module), function)(capability)


def trace_case(task: tuple[AnyCase, list[Point]]) -> str:
    """Trace and write one case at some points."""
    case, points = task
    if isinstance(case, WindowCase):
        return case.trace()
    made = 0
    for point in points:
        path = case.folder / f"{point.name}.json"
        if not path.exists():
            training, evaluation = trace_both(case, point)
            record = {"training": training.to_record(), "evaluation": evaluation.to_record()}
            path.with_suffix(".part").write_text(json.dumps(record))
            path.with_suffix(".part").replace(path)
            made += 1
    return f"{case.model} {case.capability} {case.checkpointing}: {made} points"


def load(case: Case, point: Point, part: str) -> StoredTrace | None:
    """What `trace_case` wrote."""
    path = case.folder / f"{point.name}.json"
    return StoredTrace.from_record(json.loads(path.read_text())[part]) if path.exists() else None


def import_everything() -> None:
    """What every trace imports; one thread, so that the process can be forked."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import trainfit.models.maskrcnn.workload
    import trainfit.models.rfdetr.workload
    import trainfit.tracing.trace  # noqa: F401


def scaled_of(case: Case, part: str) -> ScaledTrace | None:
    """A case's trace for any micro-batch; None where its traces cannot be scaled, or are not there."""
    for pair in PAIRS:
        small, large = (load(case, Point(micro_batch=number), part) for number in pair)
        scaled = scale(small, large, pair) if small and large else None
        if scaled is not None:
            return scaled
    return None


def entries(case: AnyCase) -> Iterator[dict[str, str]]:
    """Name -> text of the archive's entries for training and for evaluation; empty where the traces cannot be scaled."""
    if isinstance(case, WindowCase):
        yield from case.entries()
        return
    for request in case.requests():
        scaled, alone = scaled_of(case, request.part), load(case, Point(micro_batch=1), request.part)
        found = {shipped.entry_name(request): scaled, shipped.entry_name(request, alone=True): alone}
        yield {} if scaled is None else {name: trace.to_json() for name, trace in found.items() if trace is not None}


def traces_of(text: str, *, alone: bool) -> ScaledTrace:
    """An entry of an archive."""
    record = json.loads(text)
    return ScaledTrace.of_one(StoredTrace.from_record(record), 1) if alone else ScaledTrace.from_record(record)
