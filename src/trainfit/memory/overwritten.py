"""Gradients that autograd writes into an existing tensor, where a trace shows a new one.

While a dispatch mode runs, as the recorder of a trace does, every tensor counts as a subclass (pytorch
ATen/TensorSubclassLikeUtils.h), and autograd does not write into tensors of subclasses. In a real step

- two gradients of one tensor are added into the first of them, unless something else still holds it
  (torch/csrc/autograd/input_buffer.cpp, `accumulate`);
- the gradient of an indexed tensor is written into the zeros that were made for it (torch/csrc/autograd/FunctionsManual.cpp,
  `index_backward`; ATen/native/TensorAdvancedIndexing.cpp, `gather_backward` and `index_select_backward`).

Both leave a pattern: a new tensor, and at once the end of those that it was made from.
"""

from trainfit.tracing.events import Trace

SUM = "aten.add"
SCATTERED = {"aten.index_put", "aten.scatter_add", "aten.scatter", "aten.index_add"}
ZEROS = {"aten.new_zeros", "aten.zeros", "aten.zeros_like"}


def overwriting_events(trace: Trace) -> list[int]:
    """The events of a real step, one for each event of the trace; 0 where a real step neither allocates nor frees."""
    tensors, events = trace.tensors, list(trace.events)
    holder: dict[int, int] = {}
    """Number of a tensor that is never allocated -> number of that which has its values; numbers count from 1."""
    for index, event in enumerate(events):
        if event < 0:
            events[index] = -holder.get(-event, -event)
        elif event > 0:
            made = tensors[event - 1]
            if made.phase != "backward" or (made.op != SUM and made.op not in SCATTERED):
                continue
            freed = _freed_next(trace, index)
            alike = [at for at in freed if tensors[-trace.events[at] - 1].nbytes == made.nbytes]
            if made.op == SUM:
                # Where one ends and the other lives on, a trace does not tell which of them was the first.
                alike = alike if len(alike) > 1 else []
            else:
                alike = [at for at in alike if tensors[-trace.events[at] - 1].op in ZEROS]
            if alike:
                first = -trace.events[alike[0]]
                holder[event] = holder.get(first, first)
                events[index] = events[alike[0]] = 0
    return events


def _freed_next(trace: Trace, index: int) -> list[int]:
    """The frees of other tensors that directly follow an allocation."""
    end = index + 1
    while end < len(trace.events) and trace.events[end] < 0:
        end += 1
    return [at for at in range(index + 1, end) if trace.events[at] != -trace.events[index]]


def overwriting(trace: Trace) -> Trace:
    """The trace of the real step."""
    events = overwriting_events(trace)
    before = [0]
    for event in events:
        before.append(before[-1] + (event != 0))
    marks = tuple((before[index], name) for index, name in trace.marks)
    return Trace(tensors=trace.tensors, events=tuple(event for event in events if event), marks=marks)
