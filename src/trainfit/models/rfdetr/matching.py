"""What Hungarian matching costs in a step of RF-DETR: time that no operator of a trace shows. Imports no torch.

Every image, query group and layer (the decoder's and the encoder's proposals) is a problem of queries x objects. The GPU
waits for the answer, because upstream reads the indices on the host (rfdetr 1.11.2 models/matcher.py and _assignment.py).
"""

TRITON_CAPABILITY = (8, 0)
"""torch_linear_assignment 0.1.0 assignment.py `_cuda_uses_triton`: below it, or without Triton, SciPy solves."""


def solves_on_device(capability: tuple[int, int]) -> bool:
    """Whether batched problems are solved by upstream's Triton kernel."""
    return capability >= TRITON_CAPABILITY
