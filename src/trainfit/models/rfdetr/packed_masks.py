"""Target masks with one bit per pixel, and their values at points."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from rfdetr.models.heads.segmentation import point_sample

GATHER_BITS = 0x0102040810204080
"""As a factor of eight bytes that are 0 or 1 it puts byte j into bit j of the highest byte: the sum of 2**(7 k), k = 1 to 8."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedMasks:
    """Masks of one size on one device; those of an image are a part of its micro-batch's."""

    bits: torch.Tensor
    """uint8 (masks, bytes) of all masks: pixel 8 b + j of a mask, counted row by row, is bit j of byte b."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    first: int = 0
    """Number of the first of these masks among all."""
    count: int | None = None
    """How many these are; None: all."""

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.bits) if self.count is None else self.count

    def split(self, counts: Sequence[int]) -> list["PackedMasks"]:
        """Consecutive masks, `counts[i]` in the i-th part."""
        firsts = [0, *accumulate(counts)][:-1]
        parts = zip(firsts, counts, strict=True)
        return [PackedMasks(bits=self.bits, size=self.size, first=first, count=count) for first, count in parts]

    def all(self) -> "PackedMasks":
        """All masks that these are a part of."""
        return PackedMasks(bits=self.bits, size=self.size)

    def at(self, masks: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """The pixels of the masks numbered `masks` (n,) nearest to `points` (n or 1, p, 2): bool (n, p).

        Points are x, y in 0..1 of a mask's width and height. The pixel is the one that upstream's `point_sample` reads with
        mode "nearest", ties included.
        """
        height, width = self.size
        columns = _nearest(points, width, axis=0)
        rows = _nearest(points, height, axis=1)
        pixels = rows.mul_(width).add_(columns)
        values = self.bits[self.first : self.first + len(self)][masks[:, None], pixels >> 3]
        return (values >> (pixels & 7).to(torch.uint8)).bitwise_and_(1).bool()


def _nearest(points: torch.Tensor, length: int, *, axis: int) -> torch.Tensor:
    """The pixel along one axis of `length` pixels that is nearest to each of `points` (n, p, 2): int64 (n, p).

    The sampler itself says which, by sampling the pixels' numbers: how its kernels round a tie depends on the build (rfdetr
    1.11.2 models/criterion.py `_sample_target_masks_at_points`). float32 holds every number up to 2**24.
    """
    numbers = torch.arange(length, dtype=torch.float32, device=points.device)
    line = numbers.view(1, 1, *((1, length) if axis == 0 else (length, 1)))
    return point_sample(line, points.float().flatten(0, 1)[None], mode="nearest").view(points.shape[:2]).long()


def pack(masks: torch.Tensor) -> torch.Tensor:
    """Bool (n, height, width) -> `PackedMasks.bits`, on the same device."""
    flat = masks.flatten(1)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8))
    eights = flat.clone(memory_format=torch.contiguous_format).view(
        torch.int64
    )  # a clone begins at a multiple of 8 bytes
    return eights.mul_(GATHER_BITS).bitwise_right_shift_(56).bitwise_and_(255).to(torch.uint8)
