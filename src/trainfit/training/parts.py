"""Splits a collated batch: what has one entry per item is cut, everything else is kept."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from trainfit.errors import TrainfitError

IMAGE_DIMENSIONS = 3


def items_in(batch: Any) -> float:
    """Items of a collated batch: entries of its first tensor with dimensions, or of its first list.

    Raises:
        TrainfitError: it has neither.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            images = image_list(batch)
            return float(len(images) or len(leaf))
    if isinstance(batch, (list, tuple)):
        return float(len(batch))
    raise TrainfitError(f"the items of a batch of type {type(batch).__name__} cannot be counted: give counts=")


def parts_of(batch: Any, micro_batch: int) -> list[Any]:
    """The batch in parts of at most `micro_batch` items."""
    items = int(items_in(batch))
    if items <= micro_batch:
        return [batch]
    return [part_of(batch, slice(start, start + micro_batch), items) for start in range(0, items, micro_batch)]


def image_list(batch: Any) -> list[torch.Tensor]:
    """The images of a batch that is a list of them, or that has such a list; empty where images are stacked."""
    if isinstance(batch, (list, tuple)):
        if batch and all(isinstance(e, torch.Tensor) and e.dim() == IMAGE_DIMENSIONS for e in batch):
            return list(batch) if all(e.is_floating_point() or e.dtype == torch.uint8 for e in batch) else []
        return next((images for element in batch if (images := image_list(element))), [])
    if isinstance(batch, dict):
        return next((images for element in batch.values() if (images := image_list(element))), [])
    return []


def part_of(batch: Any, rows: slice, items: int) -> Any:
    """Some rows of a collated batch, from every tensor and list with one entry per item; images in lists are padded."""
    images = image_list(batch)
    sides = [max(image.shape[d] for image in images) for d in (1, 2)] if images else []
    own = {id(image) for image in images}

    def padded(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(image, (0, sides[1] - image.shape[2], 0, sides[0] - image.shape[1]))

    def cut(value: Any, *, outermost: bool = False) -> Any:
        if isinstance(value, torch.Tensor):
            return value[rows] if value.dim() and len(value) == items else value
        if isinstance(value, dict):
            return type(value)((key, cut(each)) for key, each in value.items())
        if isinstance(value, (list, tuple)):
            fields = outermost and id(value[0]) not in own and all(_has_items(each, items) for each in value)
            if len(value) == items and not fields:
                kept = [padded(each) if id(each) in own else each for each in value[rows]]
            else:
                kept = [cut(each) for each in value]
            return type(value)(*kept) if hasattr(value, "_fields") else type(value)(kept)
        if hasattr(value, "tensors") and hasattr(value, "mask"):
            return type(value)(cut(value.tensors), cut(value.mask))
        return value

    return cut(batch, outermost=True)


def _has_items(value: Any, items: int) -> bool:
    """Whether a value has one entry per item itself, so that the list around it is a list of fields."""
    sized = isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim() > 0)
    return sized and len(value) == items
