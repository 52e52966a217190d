"""Time of Hungarian matching in a step of RF-DETR, which no operator of a trace shows. Imports no torch.

Every image, query group and layer (the decoder's, and the encoder's proposals) is a problem of queries x objects. The GPU
waits for the solution, because upstream reads the indices on the host (rfdetr 1.11.2 models/matcher.py, _assignment.py).
"""

TRITON_CAPABILITY = (8, 0)
"""torch_linear_assignment 0.1.0 assignment.py `_cuda_uses_triton`: below it, or without Triton, SciPy solves."""
PROBLEM_S = 8e-6
"""SciPy's seconds for a problem, without those of its costs (`COST_S`)."""
COST_S = 7e-9
"""SciPy's seconds for each query x object of a problem. On one core of an AMD EPYC 208 problems of 300 queries took 3.3, 10 and
40 ms with 7, 30 and 100 objects (random costs, and costs of boxes near their objects), on a busier one 4, 19 and 86 ms: these
constants give 4.7, 15 and 45. A real host may differ by a factor of two."""
TRITON_PROBLEMS = 100
"""How many of SciPy's problems upstream's Triton kernel takes the time of, however many it is given: on an L4 it was 1.15
to 1.37 times as fast as SciPy for 52 problems, 2.0 to 2.5 times for 208 and 5.9 times for 624, of 300 queries and 1 to 30
objects (rfdetr 1.11.2 models/_assignment.py): 42, 92 and 106 problems."""
BATCHED_MASK_COSTS = 728_000
"""Costs of images with other images' objects from which a batch with masks is solved on the GPU
(rfdetr 1.11.2 models/matcher.py `_MASK_COMPACT_SAVED_ELEMENT_LIMIT`)."""


def solves_on_device(capability: tuple[int, int]) -> bool:
    """Whether batched problems are solved by upstream's Triton kernel."""
    return capability >= TRITON_CAPABILITY


def matching_seconds(
    *,
    images: int,
    objects: int,
    queries: int,
    groups: int,
    layers: int,
    masks: bool,
    capability: tuple[int, int] | None,
) -> float:
    """Seconds of matching in one training micro-batch.

    Args:
        images: Of the micro-batch.
        objects: In each of them.
        queries: Of one group.
        groups: Query groups.
        layers: Decoder layers; the encoder's proposals are one more.
        masks: Whether masks are trained.
        capability: CUDA compute capability of the card; None counts as 8.0.
    """
    problem_s = PROBLEM_S + COST_S * queries * min(queries, objects)
    of_a_layer = images * groups
    calls = layers + 1
    batched = images > 1
    if masks:
        batched = batched and images * queries * groups * (images - 1) * objects >= BATCHED_MASK_COSTS
    if not batched or not solves_on_device(capability or TRITON_CAPABILITY):
        return calls * of_a_layer * problem_s
    if masks:  # one call for each layer
        return calls * min(of_a_layer, TRITON_PROBLEMS) * problem_s
    return min(calls * of_a_layer, TRITON_PROBLEMS) * problem_s
