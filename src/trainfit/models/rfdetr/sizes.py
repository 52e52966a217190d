"""The sizes of multi-scale training, and how a micro-batch's work grows with them. Imports no torch."""

from trainfit.models.family import DrawnSizes

STEPS = range(-5, 6)
"""Sizes are the resolution and five blocks more and less (rfdetr 1.11.2 datasets/coco.py `compute_multi_scale_scales`,
expanded; a test compares)."""
SMALLEST_BLOCKS = 2
SHARES = {
    "rfdetr-nano": (0.72, 0.51),
    "rfdetr-small": (0.76, 0.50),
    "rfdetr-medium": (0.78, 0.49),
    "rfdetr-large": (0.91, 0.57),
    "rfdetr-seg-nano": (0.88, 0.88),
    "rfdetr-seg-small": (0.92, 0.93),
    "rfdetr-seg-medium": (0.85, 0.90),
}
"""Part of a micro-batch's FLOPs, and of its bytes, that grows in proportion to the pixels: of traces at the smallest and at the
largest size, the published groups and queries, 100 objects, bf16 (Small is taken between its neighbours)."""
WITH_MASKS = (0.86, 0.90)
"""Of the larger models with masks, which were not traced at two sizes."""


def drawn(model: str, *, resolution: int, published: int, block: int, queries_share: float, masks: bool) -> DrawnSizes:
    """What multi-scale training draws, against a trace at the largest size.

    The mean time over three sizes is within 3 % of that of traces at each of them, for five models on five cards (T4, RTX
    3060, RTX 4090, A100, H100). A frozen encoder, recomputation and other stages change the shares, which is not modelled.

    Args:
        model: Canonical name.
        resolution: Side of the middle size in pixels.
        published: Side that the model was published with, where `SHARES` hold.
        block: Sizes are its multiples.
        queries_share: Queries of all groups over those of the published model: the rest of the work is theirs.
        masks: Whether masks are trained.
    """
    middle = resolution // block
    blocks = [middle + step for step in STEPS if middle + step >= SMALLEST_BLOCKS]
    largest = max(blocks)
    flops, in_bytes = (
        _of_setting(share, pixels=(resolution / published) ** 2, queries=queries_share)
        for share in SHARES.get(model, WITH_MASKS if masks else SHARES["rfdetr-medium"])
    )
    pixels = tuple((count / largest) ** 2 for count in blocks)
    return DrawnSizes(pixels=pixels, flops_share=flops, bytes_share=in_bytes)


def _of_setting(share: float, *, pixels: float, queries: float) -> float:
    """A published model's share where there are `pixels` times as many pixels and `queries` times as many queries."""
    of_pixels = share * pixels
    return of_pixels / (of_pixels + (1 - share) * queries)
