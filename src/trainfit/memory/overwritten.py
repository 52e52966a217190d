"""Gradients that autograd writes into an existing tensor, where a trace shows a new one.

While a dispatch mode runs, as the recorder of a trace does, every tensor counts as a subclass (pytorch
ATen/TensorSubclassLikeUtils.h), and autograd does not write into tensors of subclasses. In a real step

- two gradients of one tensor are added into the first of them, unless something else still holds it
  (torch/csrc/autograd/input_buffer.cpp, `accumulate`);
- the gradient of an indexed tensor is written into the zeros that were made for it (torch/csrc/autograd/FunctionsManual.cpp,
  `index_backward`; ATen/native/TensorAdvancedIndexing.cpp, `gather_backward` and `index_select_backward`).

Both leave a pattern: a new tensor, and at once the end of those that it was made from.
"""

from dataclasses import replace

import numpy as np

from trainfit.memory.columns import Columns, Integers

SUM = "aten.add"
SCATTERED = {"aten.index_put", "aten.scatter_add", "aten.scatter", "aten.index_add"}
ZEROS = {"aten.new_zeros", "aten.zeros", "aten.zeros_like"}


def overwriting_events(trace: Columns) -> Integers:
    """The events of a real step, one for each event of the trace; 0 where a real step neither allocates nor frees."""
    events = trace.events.copy()
    made, first = _overwritten(trace)
    holder = np.arange(len(trace.nbytes) + 1)
    """Number of a tensor -> number of that which has its values; numbers count from 1."""
    for new, old in zip(events[made].tolist(), (-events[first]).tolist(), strict=True):
        holder[new] = holder[old]
    events[made] = events[first] = 0
    frees = events < 0
    events[frees] = -holder[-events[frees]]
    return events


def _overwritten(trace: Columns) -> tuple[Integers, Integers]:
    """Events that allocate a tensor in a trace alone, and for each the event that ends the tensor it is written into.

    That is one of the frees of other tensors that directly follow the allocation.
    """
    events = trace.events
    tensors = np.abs(events) - 1
    is_sum, is_scattered, is_zeros = (
        np.array([name in ops for name in trace.names], dtype=bool)[trace.op] for ops in ({SUM}, SCATTERED, ZEROS)
    )
    is_backward = np.array([name == "backward" for name in trace.names], dtype=bool)[trace.phase]
    candidates = (events > 0) & (is_backward & (is_sum | is_scattered))[tensors]
    before = np.maximum.accumulate(np.where(events > 0, np.arange(len(events)), 0))
    """Of each event: the last allocation until then."""
    ends = np.flatnonzero((events < 0) & candidates[before])
    made = tensors[before[ends]]
    ended = tensors[ends]
    alike = (made != ended) & (trace.nbytes[made] == trace.nbytes[ended]) & (is_sum[made] | is_zeros[ended])
    allocations, first, count = np.unique(before[ends[alike]], return_index=True, return_counts=True)
    # Where one summand ends and the other lives on, a trace does not tell which of them was the first.
    certain = (count > 1) | ~is_sum[tensors[allocations]]
    return allocations[certain], ends[alike][first[certain]]


def overwriting(trace: Columns) -> Columns:
    """The trace of the real step."""
    events = overwriting_events(trace)
    before = np.append(0, np.cumsum(events != 0))
    marks = tuple((int(before[index]), name) for index, name in trace.marks)
    return replace(trace, events=events[events != 0], marks=marks)
