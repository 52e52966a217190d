"""AdamW's moments in the CPU's memory (`--optimizer adamw-host`), priced from a trace that has them on the GPU."""

from dataclasses import replace

from trainfit.step.names import UNIT_BYTES
from trainfit.tracing.events import TensorInfo, Trace

COUNT_BYTES = 8
"""Larger optimizer state is moments; what stays on the GPU is a step count for each parameter."""


def moments_bytes(trace: Trace) -> int:
    """What the moments hold, wherever they are."""
    return sum(tensor.nbytes for tensor in trace.tensors if _is_moment(tensor))


def with_state_on_host(trace: Trace) -> Trace:
    """The step with the moments on the host.

    While the optimizer runs, the GPU holds a copy of one part's parameters (`step.units`) and a buffer for its moments
    (`step.host_adamw`); a bound for all parts stands for each.
    """
    tensors = [replace(tensor, nbytes=0) if _is_moment(tensor) else tensor for tensor in trace.tensors]
    moments = moments_bytes(trace)
    # Each parameter has two; `UNIT_BYTES` bounds a part that has more than one.
    part_bytes = max((t.nbytes for t in trace.tensors if _is_moment(t)), default=0)
    part_bytes = max(part_bytes, min(UNIT_BYTES, moments // 2))
    events: list[int] = []
    begins: list[int] = []  # index of each old event in the new list
    steps = {index for index, name in trace.marks if name == "optimizer"}
    for index in range(len(trace.events) + 1):
        begins.append(len(events))
        if index in steps:
            for nbytes in (part_bytes, 2 * part_bytes):
                made = TensorInfo(id=len(tensors), nbytes=nbytes, op="aten.empty", module="", phase="optimizer")
                tensors.append(replace(made, category="temporary"))
            events += [len(tensors) - 1, len(tensors), 1 - len(tensors), -len(tensors)]
        events += trace.events[index : index + 1]
    marks = tuple((begins[index], name) for index, name in trace.marks)
    return replace(trace, tensors=tuple(tensors), events=tuple(events), marks=marks)


def _is_moment(tensor: TensorInfo) -> bool:
    return tensor.category == "optimizer state" and tensor.nbytes > COUNT_BYTES
