"""The check of exactness on loops written in other ways than test_exactness_check.py: what it names, where it is silent."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import trainfit
from exactness_cases import SIDE, images, small

Loop = Callable[[nn.Module, Any, int], None]


def windows(batches: Any, accumulation: int) -> Iterator[list[Any]]:
    """Lists of batches; the last may be short."""
    every = list(batches)
    yield from (every[start : start + accumulation] for start in range(0, len(every), accumulation))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def by_window(loss: Callable[[nn.Module, Any, list[Any]], torch.Tensor]) -> Loop:
    """A loop over windows whose micro-batches have the loss `loss(model, batch, window)`, division included."""

    def train(model: nn.Module, batches: Any, accumulation: int) -> None:
        optimizer = adam(model)
        for window in windows(batches, accumulation):
            for batch in window:
                loss(model, batch, window).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def by_number(before: Callable[..., None], after: Callable[..., None] = lambda *_: None) -> Loop:
    """A loop that counts micro-batches; `before(model, optimizer)` runs before each backward, `after` after it."""

    def train(model: nn.Module, batches: Any, accumulation: int) -> None:
        optimizer = adam(model)
        for number, (pictures, labels) in enumerate(batches, 1):
            before(model, optimizer)
            (functional.cross_entropy(model(pictures), labels) / accumulation).backward()
            after(model, optimizer)
            if number % accumulation == 0:
                optimizer.step()
                if before is nothing:
                    optimizer.zero_grad()

    return train


def nothing(*_: Any) -> None:
    pass


class Words(nn.Module):
    """A next-word model, with dropout on request."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.dropout, self.head = nn.Embedding(20, 8), nn.Dropout(dropout), nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.words(tokens)))


def texts(count: int) -> list[Any]:
    """Tokens and labels, of which every text ignores another number (-100, torch's default)."""
    g = torch.Generator().manual_seed(2)
    found: list[Any] = []
    for number in range(count):
        labels = torch.randint(1, 20, (7,), generator=g)
        labels[3 + number % 5 :] = -100
        found.append((torch.randint(1, 20, (7,), generator=g), labels))
    return found


def token_loss(model: nn.Module, batch: Any, reduction: str) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction=reduction)


def per_token(model: nn.Module, batch: Any, window: list[Any]) -> torch.Tensor:
    return token_loss(model, batch, "sum") / sum(int((labels != -100).sum()) for _, labels in window)


def smoothed(model: nn.Module, batch: Any, window: list[Any]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1) / len(window)


def with_penalty(model: nn.Module, batch: Any, window: list[Any]) -> torch.Tensor:
    penalty = torch.stack([p.pow(2).sum() for p in model.parameters()]).sum()
    return (functional.cross_entropy(model(batch[0]), batch[1]) + 1e-3 * penalty) / len(window)


def weighted(model: nn.Module, batch: Any, window: list[Any]) -> torch.Tensor:
    outputs = model(batch[0])
    weight = torch.tensor([0.2, 1.0, 5.0], dtype=outputs.dtype)
    return functional.cross_entropy(outputs, batch[1], weight=weight) / len(window)


def views(model: nn.Module, batch: Any, window: list[Any]) -> torch.Tensor:
    one, other = (functional.normalize(model(each), dim=1) for each in (batch[0], batch[0].flip(3)))
    return functional.cross_entropy(one @ other.T / 0.1, torch.arange(len(one))) / len(window)


def with_average(model: nn.Module, batches: Any, accumulation: int) -> None:
    optimizer = adam(model)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda old, new, _: 0.9 * old + 0.1 * new)
    for window in windows(batches, accumulation):
        optimizer.zero_grad()
        for pictures, labels in window:
            (functional.cross_entropy(model(pictures), labels) / len(window)).backward()
        optimizer.step()
        average.update_parameters(model)


def with_scaler(model: nn.Module, batches: Any, accumulation: int, *, late: bool = False) -> None:
    optimizer, scaler = adam(model), torch.amp.GradScaler("cuda", init_scale=128.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for number, (pictures, labels) in enumerate(batches, 1):
        scaler.scale(functional.cross_entropy(model(pictures), labels) / accumulation).backward()
        if number % accumulation == 0:
            if late:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.unscale_(optimizer)
            if not late:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()


def late_scaler(model: nn.Module, batches: Any, accumulation: int) -> None:
    with_scaler(model, batches, accumulation, late=True)


def blended(model: nn.Module, batches: Any, accumulation: int) -> None:
    """A moving average by `lerp_`, at each micro-batch."""
    optimizer, average = adam(model), copy.deepcopy(model)
    for number, (pictures, labels) in enumerate(batches, 1):
        (functional.cross_entropy(model(pictures), labels) / accumulation).backward()
        if number % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.1)


def by_closure(model: nn.Module, batches: Any, accumulation: int) -> None:
    """The gradients are made within the optimizer's step."""
    optimizer = adam(model)
    for window in windows(batches, accumulation):

        def closure(window: list[Any] = window) -> float:
            optimizer.zero_grad()
            losses = [functional.cross_entropy(model(x), y) / len(window) for x, y in window]
            for loss in losses:
                loss.backward()
            return losses[0].item()

        optimizer.step(closure)


def clip_values(model: nn.Module, _optimizer: Any) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def clear(_model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 5))


CORRECT: dict[str, tuple[Loop, Any, Any]] = {
    "label smoothing": (by_window(smoothed), small, images(16)),
    "sums over the window's tokens": (by_window(per_token), Words, texts(20)),
    "scaler, clip and schedule": (with_scaler, small, images(16)),
    "GroupNorm and an average behind the step": (with_average, lambda: small(nn.GroupNorm(2, 4)), images(20)),
    "a penalty on the weights": (by_window(with_penalty), small, images(16)),
    "a closure": (by_closure, small, images(20)),
}
FAULTS: dict[str, tuple[str, Loop, Any, Any]] = {
    "mean of means over tokens": (
        "ignored labels",
        by_window(lambda model, batch, window: token_loss(model, batch, "mean") / len(window)),
        Words,
        texts(16),
    ),
    "losses are added": (
        "normaliser",
        by_window(lambda model, batch, _: functional.cross_entropy(model(batch[0]), batch[1])),
        small,
        images(16),
    ),
    "class weights": ("normaliser", by_window(weighted), small, images(16)),
    "two views contrasted": ("coupled loss", by_window(views), flat, images(16)),
    "dropout": ("RNG", by_window(per_token), lambda: Words(0.3), texts(16)),
    "BatchNorm": ("BatchNorm", by_window(smoothed), lambda: small(nn.BatchNorm2d(4)), images(16)),
    "values are clipped each time": ("clip", by_number(nothing, clip_values), small, images(16)),
    "an average that is blended each time": ("EMA", blended, small, images(16)),
    "clipped before unscale_": ("scaler", late_scaler, small, images(16)),
    "cleared before each backward": ("zero_grad", by_number(clear), small, images(16)),
    "the last window has no step": ("short last window", by_number(nothing), small, images(20)),
}


@pytest.mark.parametrize("name", CORRECT)
def test_silent(name: str) -> None:
    train, model, items = CORRECT[name]
    result = trainfit.check_exactness(trainfit.OwnLoop(model=model, items=items, train=train))
    assert result.exact, result.findings
    assert result.windows >= 2


@pytest.mark.parametrize("name", FAULTS)
def test_named(name: str) -> None:
    cause, train, model, items = FAULTS[name]
    result = trainfit.check_exactness(trainfit.OwnLoop(model=model, items=items, train=train))
    assert result.causes == (cause,)
