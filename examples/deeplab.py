"""torchvision's DeepLabV3 as a task of your own: pixels that do not count, exact for any cut, predicted without a GPU.

`trainfit predict deeplab:task --gpu t4 --micro-batch 4 --resolution 320` runs in this folder.
"""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import trainfit

IGNORED = 255


def make_model(classes=4):
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)
    for module in model.modules():  # exact windows need statistics that do not depend on the batch
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda _mode=True, module=module: module
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def loss(model, batch):
    images, labels = batch
    return cross_entropy(model(images)["out"], labels, ignore_index=IGNORED)


def valid_pixels(batch):
    return (batch[1] != IGNORED).sum()


def make_item(side, number):
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(4, (side, side), generator=generator)
    labels[: number * 7 % side] = IGNORED
    return torch.randn(3, side, side, generator=generator), labels


def task(setting):
    return trainfit.CustomTask(
        build_model=make_model,
        make_sample=partial(make_item, setting.resolution or 320),
        loss=loss,
        counts=valid_pixels,
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    )


def train(model, batches, accumulation):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    windows = trainfit.accumulate(batches, accumulation, model=model, counts=valid_pixels)
    for batch in windows:
        windows.backward(loss(model, batch))
        windows.update(optimizer)


def check():
    return trainfit.OwnLoop(model=make_model, items=[make_item(48, n) for n in range(7)], train=train)


if __name__ == "__main__":
    result = trainfit.check_exactness(check, micro_batch=1, accumulation=3)
    print(f"exact: {result.exact}, error {max(group.relative_error for group in result.groups):.1e}")
