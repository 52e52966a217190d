"""A micro-batch goes to the GPU by a few copies that the host does not wait for."""
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainfit.models.images import IMAGENET_MEAN, IMAGENET_STD, crowded_sample, stack_images
from trainfit.models.maskrcnn.data import to_images
from trainfit.models.maskrcnn.data import to_targets as to_rcnn_targets
from trainfit.models.rfdetr.data import to_batch, to_targets


class HostCopies(TorchDispatchMode):
    """Records every copy from the host to the (fake) GPU: whether its source is page-locked and the host goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.asynchronous: list[bool] = []
        self._pinned: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self._pinned.append(out)
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.device.type == "cuda":
            storage = args[0].untyped_storage()._cdata
            pinned = any(tensor.untyped_storage()._cdata == storage for tensor in self._pinned)
            self.asynchronous.append(pinned and bool(kwargs.get("non_blocking")))
        return out


SAMPLES = [crowded_sample(64, 64, objects=objects, classes=3, masks=True) for objects in (0, 3, 5)]


def square_images(like: torch.Tensor) -> object:
    return to_batch(SAMPLES, (64, 64), like)


def padded_images(like: torch.Tensor) -> object:
    return to_batch(SAMPLES, (64, 96), like)


def targets(like: torch.Tensor) -> object:
    return to_targets(SAMPLES, like)


def stacked_images(like: torch.Tensor) -> object:
    return stack_images([s.image for s in SAMPLES], like, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def images_of_mask_rcnn(like: torch.Tensor) -> object:
    return to_images(SAMPLES, (64, 64), like)


def targets_of_mask_rcnn(like: torch.Tensor) -> object:
    return to_rcnn_targets(SAMPLES, like)


@pytest.mark.parametrize(
    ("to_gpu", "copies"),
    [
        (square_images, 1),
        (padded_images, 1),
        (targets, 3),
        (stacked_images, 1),
        (images_of_mask_rcnn, 1),
        (targets_of_mask_rcnn, 2),
    ],
)
def test_copies_to_the_gpu_do_not_block(to_gpu: Callable[[torch.Tensor], object], copies: int) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), HostCopies() as host:
        to_gpu(torch.empty(1, device="cuda"))
    assert host.asynchronous == [True] * copies


def test_packed_targets_and_padding_have_the_values_of_each_sample() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    for sample, target in zip(SAMPLES, to_targets(SAMPLES, like), strict=True):
        centre, size = target["boxes"][:, :2] * 64, target["boxes"][:, 2:] * 64
        corners = torch.cat((centre - size / 2, centre + size / 2), 1)
        torch.testing.assert_close(corners, sample.boxes.double())
        assert torch.equal(target["labels"], sample.classes)
        assert sample.masks is not None
        assert torch.equal(target["masks"], sample.masks)
    batch = to_batch(SAMPLES, (64, 96), like)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (torch.stack([sample.image for sample in SAMPLES]) / like.new_tensor(255) - mean) / std
    torch.testing.assert_close(batch.tensors[..., :64], expected)
    assert batch.mask is not None
    assert not batch.mask[..., :64].any()
    assert batch.mask[..., 64:].all()
