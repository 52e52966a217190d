"""Loops of users for the exactness check: correct ones, and ones with one fault each."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from trainfit import OwnLoop, accumulate

SIDE = 6
CLASSES = 3


def images(count: int, *, seed: int = 0) -> list[Any]:
    """Images with a class."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(3, SIDE, SIDE, generator=g), int(torch.randint(CLASSES, (), generator=g))) for _ in range(count)
    ]


def pixels(count: int) -> list[Any]:
    """Images with a class for each pixel, of which every image ignores another share."""
    g = torch.Generator().manual_seed(1)
    items: list[Any] = []
    for number in range(count):
        label = torch.randint(CLASSES, (SIDE, SIDE), generator=g)
        label[: number % 5] = 255
        items.append((torch.randn(3, SIDE, SIDE, generator=g), label))
    return items


def small(*layers: nn.Module) -> nn.Module:
    """A convolution, what is given, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), *layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )


def dense() -> nn.Module:
    """A class for each pixel."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1))


Loss = Callable[[nn.Module, Any], torch.Tensor]


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    """Mean over the batch."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def windows(batches: Any, accumulation: int) -> Iterator[list[Any]]:
    """Lists of `accumulation` batches; the last may be shorter."""
    held: list[Any] = []
    for batch in batches:
        held.append(batch)
        if len(held) == accumulation:
            yield held
            held = []
    if held:
        yield held


def plain(loss: Loss = cross_entropy, **faults: Any) -> Callable[[nn.Module, Any, int], None]:
    """A plain loop over windows. Without `faults` it is exact where the loss is a mean over equal micro-batches."""

    def train(model: nn.Module, batches: Any, accumulation: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
        average = copy.deepcopy(model)
        scaler = torch.amp.GradScaler("cuda", enabled=bool(faults.get("scaler")))
        for window in windows(batches, accumulation):
            if faults.get("drop_short") and len(window) < accumulation:
                break
            for number, batch in enumerate(window, 1):
                parts = accumulation if faults.get("fixed_divisor") else len(window)
                if faults.get("clear") == "micro-batch":
                    optimizer.zero_grad()
                value = loss(model, batch)
                scaler.scale(value if faults.get("add") else value / parts).backward()
                if faults.get("ema") == "micro-batch":
                    update_average(average, model)
                if faults.get("scheduler") == "micro-batch":
                    scheduler.step()
                if faults.get("clip") == "micro-batch":
                    clip_grad_norm_(model.parameters(), 0.01)
                if faults.get("step") == "micro-batch" and number < len(window):
                    optimizer.step()
                    optimizer.zero_grad()
            if faults.get("unscale", True):
                scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
            if faults.get("clear") is None:
                optimizer.zero_grad()
            if faults.get("ema") is None:
                update_average(average, model)
            if faults.get("scheduler") is None:
                scheduler.step()

    return train


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module) -> None:
    """An exponential moving average, as many write it."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.mul_(0.9).add_(new, alpha=0.1)


def loop(train: Any, *, model: Any = small, items: Any = None, collate: Any = None) -> OwnLoop:
    """The loop on two windows of 4 x 2 and a short one of 2 x 2."""
    more = {"collate": collate} if collate else {}
    return OwnLoop(model=model, items=items or images(20), train=train, **more)


# Normalisers


def valid_pixels(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], ignore_index=255)


def masked_by_hand(model: nn.Module, batch: Any) -> torch.Tensor:
    rows = functional.log_softmax(model(batch[0]).movedim(1, -1), -1)
    chosen = batch[1] == 1
    return -rows[..., 1][chosen].mean()


def two_terms(model: nn.Module, batch: Any) -> torch.Tensor:
    return valid_pixels(model, batch) + masked_by_hand(model, batch)


def exact_pixels(model: nn.Module, batches: Any, accumulation: int) -> None:
    """Sums over the window's valid pixels."""
    optimizer = torch.optim.AdamW(model.parameters())
    for window in windows(batches, accumulation):
        count = sum(int((labels != 255).sum()) for _, labels in window)
        for pictures, labels in window:
            found = functional.cross_entropy(model(pictures), labels, ignore_index=255, reduction="sum")
            (found / count).backward()
        optimizer.step()
        optimizer.zero_grad()


def divided_at_the_end(model: nn.Module, batches: Any, accumulation: int) -> None:
    """Sums go backward, and the gradient is divided before the step."""
    optimizer = torch.optim.AdamW(model.parameters())
    for window in windows(batches, accumulation):
        count = 0
        for pictures, labels in window:
            functional.cross_entropy(model(pictures), labels, ignore_index=255, reduction="sum").backward()
            count += int((labels != 255).sum())
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= count
        optimizer.step()
        optimizer.zero_grad()


# Canvases


def sized(count: int) -> list[Any]:
    """Images of different sizes."""
    g = torch.Generator().manual_seed(2)
    return [
        (torch.randn(3, 4 + number % 4, 5 + number // 3 % 3, generator=g) + 1, number % CLASSES)
        for number in range(count)
    ]


def padded(items: list[Any]) -> Any:
    """Collated to the largest image of the batch."""
    height, width = (max(image.shape[d] for image, _ in items) for d in (1, 2))
    whole = torch.stack(
        [functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image, _ in items]
    )
    return whole, torch.tensor([label for _, label in items])


def padded_in_the_model(model: nn.Module, batch: Any) -> torch.Tensor:
    pictures, labels = batch
    return functional.cross_entropy(model(padded([(p, 0) for p in pictures])[0]), torch.tensor(labels))


def lists(items: list[Any]) -> Any:
    """As detection models take them."""
    return [image for image, _ in items], [label for _, label in items]


# Contrastive


class Pairs(nn.Module):
    """Two towers and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(5, 4), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return functional.normalize(self.one(one), dim=-1), functional.normalize(self.other(other), dim=-1)


def pairs(count: int) -> list[Any]:
    g = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(2, 5, generator=g)) for _ in range(count)]


def clip_loss(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale.exp() * one @ other.T
    labels = torch.arange(len(one))
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def contrastive(model: Any, batch: Any) -> torch.Tensor:
    one, other = model(*batch)
    return clip_loss(one, other, model.scale)


def cached(*, once: bool) -> Any:
    """OpenCLIP's accumulation: cached features, and the full loss once for each micro-batch."""

    def train(model: Any, batches: Any, accumulation: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters())
        for window in windows(batches, accumulation):
            with torch.no_grad():
                features = [model(*batch) for batch in window]
            for number, batch in enumerate(window):
                fresh = model(*batch)
                rows = [
                    torch.cat([*(f[t] for f in features[:number]), fresh[t], *(f[t] for f in features[number + 1 :])])
                    for t in (0, 1)
                ]
                scale = model.scale.detach() if once and number else model.scale
                clip_loss(rows[0], rows[1], scale).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


# Ranks


def ddp(model: nn.Module, batches: Any, accumulation: int, *, sync: str = "last") -> None:
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in windows(batches, accumulation):
        for number, batch in enumerate(window, 1):
            exchange = {"last": number == len(window), "first": number == 1, "never": False}[sync]
            with nullcontext() if exchange else wrapped.no_sync():
                (cross_entropy(wrapped, batch) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_accumulate(model: nn.Module, batches: Any, accumulation: int, *, wrap: bool = False) -> None:
    """Exact windows, with a scaler, a schedule and an average."""
    wrapped = nn.parallel.DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    average, scaler = copy.deepcopy(model), torch.amp.GradScaler("cpu")
    parts = accumulate(batches, accumulation, model=wrapped, counts=count_valid, scaler=scaler)
    for batch in parts:
        parts.backward(valid_pixels(wrapped, batch))
        parts.update(optimizer, clip_norm=0.1, scheduler=scheduler, after_step=lambda: update_average(average, model))


def count_valid(batch: Any) -> torch.Tensor:
    return (batch[1] != 255).sum()


def ddp_case() -> OwnLoop:
    """Ranks whose shares have other counts."""
    return loop(partial(with_accumulate, wrap=True), model=dense, items=pixels(32))


def ddp_first() -> OwnLoop:
    return loop(partial(ddp, sync="first"), items=images(32))


class Recomputed(nn.Module):
    """A model whose middle is recomputed in backward, which runs a backward within the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, CLASSES)
        self.middle = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.middle, self.first(pictures), use_reentrant=True).mean((2, 3)))


def two_optimizers(model: nn.Module, batches: Any, accumulation: int, *, add: bool = False) -> None:
    """Backbone and head with an optimizer each, behind the same backwards."""
    first, *rest = model.parameters()
    optimizers = [torch.optim.SGD([first], lr=0.1), torch.optim.Adam(rest)]
    for window in windows(batches, accumulation):
        for batch in window:
            (cross_entropy(model, batch) / (1 if add else len(window))).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


FAULTS: dict[str, tuple[str, Any]] = {
    "losses added": ("normaliser", lambda: loop(plain(add=True))),
    "mean over pixels of one class": ("normaliser", lambda: loop(plain(masked_by_hand), model=dense, items=pixels(20))),
    "two terms": ("ignored labels", lambda: loop(plain(two_terms), model=dense, items=pixels(20))),
    "unequal micro-batches": ("normaliser", lambda: loop(plain(), items=images(23))),
    "two optimizers": ("normaliser", lambda: loop(partial(two_optimizers, add=True))),
    "ignored labels": ("ignored labels", lambda: loop(plain(valid_pixels), model=dense, items=pixels(20))),
    "collate pads": ("canvas padding", lambda: loop(plain(), items=sized(20), collate=padded)),
    "model pads": ("canvas padding", lambda: loop(plain(padded_in_the_model), items=sized(20), collate=lists)),
    "BatchNorm": ("BatchNorm", lambda: loop(plain(), model=lambda: small(nn.BatchNorm2d(4)))),
    "BatchNorm without running statistics": (
        "BatchNorm",
        lambda: loop(plain(), model=lambda: small(nn.BatchNorm2d(4, track_running_stats=False))),
    ),
    "dropout": ("RNG", lambda: loop(plain(), model=lambda: small(nn.Dropout(0.3)))),
    "scale": ("scale parameter", lambda: loop(cached(once=False), model=Pairs, items=pairs(20))),
    "contrastive by micro-batch": ("coupled loss", lambda: loop(plain(contrastive), model=Pairs, items=pairs(16))),
    "average moves with micro-batches": ("EMA", lambda: loop(plain(ema="micro-batch"))),
    "scheduler steps with micro-batches": ("scheduler", lambda: loop(plain(scheduler="micro-batch"))),
    "clip of micro-batches": ("clip", lambda: loop(plain(clip="micro-batch"))),
    "clip before unscale": ("scaler", lambda: loop(plain(scaler=True, unscale=False))),
    "no zero_grad": ("zero_grad", lambda: loop(plain(clear="never"))),
    "zero_grad within the window": ("zero_grad", lambda: loop(plain(clear="micro-batch"))),
    "step at each micro-batch": ("step", lambda: loop(plain(step="micro-batch"))),
    "short window left out": ("short last window", lambda: loop(plain(drop_short=True))),
    "short window divided as a long one": ("short last window", lambda: loop(plain(fixed_divisor=True))),
}
"""Name -> (cause, loop)."""


CORRECT: dict[str, Any] = {
    "plain": lambda: loop(plain()),
    "scaler": lambda: loop(plain(scaler=True)),
    "GroupNorm": lambda: loop(plain(), model=lambda: small(nn.GroupNorm(2, 4))),
    "frozen BatchNorm": lambda: loop(plain(), model=lambda: small(nn.BatchNorm2d(4)).eval()),
    "sums over valid pixels": lambda: loop(exact_pixels, model=dense, items=pixels(23)),
    "divided before the step": lambda: loop(divided_at_the_end, model=dense, items=pixels(23)),
    "two optimizers": lambda: loop(two_optimizers),
    "activation checkpointing": lambda: loop(plain(), model=Recomputed),
    "trainfit.accumulate": lambda: loop(with_accumulate, model=dense, items=pixels(23)),
    "cached features": lambda: loop(cached(once=True), model=Pairs, items=pairs(20)),
}
