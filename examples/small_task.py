"""A model, a loss and an optimizer of your own, for `trainfit predict small_task:task --micro-batch 8 --budget 4GiB`."""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import mse_loss

import trainfit


def loss(model, batch):
    signals, targets = batch
    return mse_loss(model(signals), targets)


def make_item(_number):
    return torch.randn(1, 4096), torch.randn(1, 4096)


def task(_setting):
    return trainfit.CustomTask(
        build_model=lambda: nn.Sequential(nn.Conv1d(1, 32, 9, padding=4), nn.ReLU(), nn.Conv1d(32, 1, 9, padding=4)),
        make_sample=make_item,
        loss=loss,
        optimizer=partial(torch.optim.RMSprop, momentum=0.9),
    )
