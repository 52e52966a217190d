"""Augmentation of decoded samples by torchvision.transforms.v2, with boxes and masks, and by a user's callable."""

import random
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from trainfit.errors import TrainfitError
from trainfit.tasks.augment import CROP_SIDE, Augmentation
from trainfit.user_code import load_named

FILL = (124, 116, 104)
"""Colour around an image that is made smaller: ImageNet's mean, which is 0 after normalisation."""
SMALLEST_SIDE = 1.0
"""Pixels: an object whose box is less high or wide afterwards is left out."""
Values = dict[str, Any]
"""A sample as transforms take it: `image` (a tv_tensors.Image), and where its task has them `boxes`, `masks`, `labels`."""


class AugmentationError(TrainfitError):
    """A user's transform cannot be used, or failed: every image would fail, so that none is left out."""


def augmented(sample: Any, augmentation: Augmentation, generator: torch.Generator) -> Any:
    """The sample after everything that its family's decoder does not draw.

    Samples are dataclasses with an `image` and, where there are objects, `boxes`, `classes` and `masks`. All numbers are
    drawn from a seed of `generator`'s, so that a sample depends on the run's seed, its record and the epoch alone. The
    size of the image stays: the step's memory is planned for it.

    Raises:
        AugmentationError: the user's transform failed, or returned what the sample cannot be.
    """
    if not augmentation.after_decoding or not _has_image(sample):
        return sample
    with _seeded(int(torch.randint(2**62, (), generator=generator).item())):
        values = _values(sample)
        for transform in _transforms(augmentation):
            values = transform(values)
        if augmentation.function:
            values = _called(augmentation.function, values)
    return _sample(sample, values, augmentation.function)


def _has_image(sample: Any) -> bool:
    """Texts alone have no image."""
    return sample.image.dim() == 3


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    """Torch's, Python's and NumPy's global generators from a seed; they come back as they were."""
    python = random.getstate()
    legacy = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def _values(sample: Any) -> Values:
    """Tensors that torchvision's transforms recognise, of the sample's fields."""
    names = {field.name for field in fields(sample)}
    values: Values = {"image": tv_tensors.Image(sample.image)}
    if "boxes" in names:
        size = (sample.image.shape[1], sample.image.shape[2])
        values["boxes"] = tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=size)  # pyright: ignore
        values["labels"] = sample.classes
        if sample.masks is not None:
            values["masks"] = tv_tensors.Mask(sample.masks)
    return values


def _transforms(chosen: Augmentation) -> Iterator[Callable[[Values], Values]]:
    """The transforms in the order in which they are applied."""
    if chosen.crop:
        yield _cropped
    if chosen.flip:
        yield v2.RandomHorizontalFlip(0.5)
    if chosen.turns:
        yield v2.RandomVerticalFlip(0.5)
        yield _turned
    if chosen.scale is not None:
        no_turn: Any = 0
        yield v2.RandomAffine(degrees=no_turn, translate=(0.1, 0.1), scale=chosen.scale, fill=cast(Any, _fills()))
    if chosen.colour:
        saturation = chosen.colour if chosen.saturation else 0.0
        yield v2.ColorJitter(brightness=chosen.colour, contrast=chosen.colour, saturation=saturation)


def _fills() -> dict[type, Any]:
    return {tv_tensors.Image: list(FILL), tv_tensors.Mask: 0}


def _cropped(values: Values) -> Values:
    """A part of the image with its shape, at the image's size; half of the time."""
    if torch.rand(()).item() >= 0.5:
        return values
    height, width = values["image"].shape[-2:]
    side = CROP_SIDE + (1 - CROP_SIDE) * torch.rand(()).item()
    h = max(1, round(side * height))
    w = max(1, round(side * width))
    top, left = (int(torch.randint(most + 1, ()).item()) for most in (height - h, width - w))
    return _each(values, lambda value: functional.resized_crop(value, top, left, h, w, [height, width]))


def _turned(values: Values) -> Values:
    """Turned by quarters where height and width are the same, else as it is."""
    height, width = values["image"].shape[-2:]
    if height != width:
        return values
    quarters = int(torch.randint(4, ()).item())
    return _each(values, lambda value: functional.rotate(value, 90.0 * quarters)) if quarters else values


def _each(values: Values, change: Callable[[Any], Any]) -> Values:
    """The values with all that lies on the image changed."""
    return {name: value if name == "labels" else change(value) for name, value in values.items()}


def _called(name: str, values: Values) -> Values:
    """What the user's callable makes of the values."""
    transform = user_transform(name)
    try:
        return transform(values)
    except Exception as error:
        raise AugmentationError(f"--augment {name} failed: {where(error)}") from error


def where(error: BaseException) -> str:
    """An exception in a line, with the line of code that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})"


@cache
def user_transform(name: str) -> Callable[[Values], Values]:
    """The callable that "module:name" names; its module may lie in the working directory.

    Raises:
        AugmentationError: there is no such module or transform.
    """
    module, _, attribute = name.partition(":")
    try:
        transform = load_named(module, attribute, f"--augment {name}")
    except TrainfitError as error:
        raise AugmentationError(str(error)) from error
    except Exception as error:
        raise AugmentationError(f"--augment {name}: {module} cannot be imported: {where(error)}") from error
    if not callable(transform):
        raise AugmentationError(
            f"--augment {name} is a {type(transform).__name__}: it must be a transform or a function"
        )
    return cast(Callable[[Values], Values], transform)


def _sample(sample: Any, values: Any, function: str) -> Any:
    """The sample with what the transforms left of it."""
    what = f"--augment {function}"
    if not isinstance(values, Mapping) or not isinstance(values.get("image"), torch.Tensor):
        raise AugmentationError(f"{what} must return a dictionary with the image, as it is given one")
    image: torch.Tensor = values["image"]
    if image.shape != sample.image.shape or image.dtype != torch.uint8:
        raise AugmentationError(
            f"{what} returned an image of {image.dtype} {tuple(image.shape)}: it must stay torch.uint8 "
            f"{tuple(sample.image.shape)}, which the step's memory is planned for"
        )
    plain = image.as_subclass(torch.Tensor).contiguous()
    if "boxes" not in values:
        return replace(sample, image=plain)
    return replace(sample, image=plain, **_objects(sample, cast(Mapping[str, Any], values), what))


def _objects(sample: Any, values: Mapping[str, Any], what: str) -> Values:
    """Boxes within the image, their classes and masks; objects that are no longer in it are left out."""
    height, width = sample.image.shape[1:]
    boxes = torch.as_tensor(values["boxes"]).as_subclass(torch.Tensor).to(torch.float32).reshape(-1, 4)
    labels = torch.as_tensor(values.get("labels", ())).to(torch.int64)
    masks: Any = values.get("masks")
    counts = {len(boxes), len(labels)}
    if sample.masks is not None:
        counts.add(-1 if masks is None else len(masks))
    if len(counts) > 1:
        raise AugmentationError(f"{what} must return as many labels and masks as boxes ({len(boxes)})")
    low = boxes.new_zeros(4)
    boxes = boxes.clamp(low, boxes.new_tensor([width, height] * 2))
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = (sides >= SMALLEST_SIDE).all(1)
    kept: Values = {"boxes": boxes[keep], "classes": labels[keep]}
    if sample.masks is not None:
        kept["masks"] = torch.as_tensor(masks).as_subclass(torch.Tensor).to(torch.bool)[keep].contiguous()
    return kept
