"""Runs of a user's loop: on the same items, cut in another way, with some cause of a difference taken away."""

import math
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from trainfit.errors import TrainfitError
from trainfit.exactness.loop import Batches, OwnLoop
from trainfit.exactness.observe import Watch
from trainfit.exactness.record import Run
from trainfit.step.window import cut
from trainfit.training.parts import image_list, part_of


@dataclass(frozen=True, kw_only=True)
class How:
    """How one run differs from the loop as it is."""

    one_canvas: bool = False
    """Every micro-batch is a part of the collated window, so that all have its canvas."""
    freeze_norms: bool = False
    """Batch normalisation uses its running statistics."""
    mute: bool = False
    """torch's random numbers are replaced by their expectation."""
    seed: int = 0
    """Seed of random numbers that are drawn after the first batch, if torch's are replaced."""


class Runner:
    """Runs one loop in the ways that the check asks for."""

    def __init__(self, loop: OwnLoop, *, micro_batch: int, double: bool) -> None:
        """Make the weights that every run starts from."""
        self.loop = loop
        self.micro_batch = micro_batch
        self.double = double
        with numbers(seed=0, double=double):
            self.state = {name: value.clone() for name, value in self._make().state_dict().items()}

    def _make(self) -> torch.nn.Module:
        model: Any = self.loop.model()
        if not isinstance(model, torch.nn.Module):
            raise TrainfitError(f"the loop's `model` returned {type(model).__name__}; it must return a torch.nn.Module")
        return model.double() if self.double else model

    def run(self, windows: Sequence[Sequence[Sequence[Any]]], *, accumulation: int, how: How | None = None) -> Run:
        """Run the loop on windows of micro-batches of items.

        Args:
            windows: The items of each micro-batch, by window.
            accumulation: As the loop takes it.
            how: Which causes of a difference are removed.

        Raises:
            TrainfitError: the loop raised.
        """
        how = how or How()
        with numbers(seed=0, double=self.double):
            model = self._make()
            model.load_state_dict(self.state)
            seed = how.seed if how.mute else accumulation
            batches = Batches(
                [batch for window in windows for batch in self._collate(window, how)],
                begin=lambda: seed_everything(seed),  # others for the big batch, which draws in another order
            )
            seed_everything(0)
            watch = Watch(model, mute=how.mute, freeze_norms=how.freeze_norms, double=self.double)
            watch.taken = lambda: batches.taken
            with watch.watching():
                try:
                    self.loop.train(model, batches, accumulation)
                except TrainfitError:
                    raise
                except Exception as error:
                    raise TrainfitError(_raised(error, accumulation, double=self.double)) from error
        return watch.run()

    def _collate(self, window: Sequence[Sequence[Any]], how: How) -> list[Any]:
        items = [item for micro_batch in window for item in micro_batch]
        if how.one_canvas:
            whole = self._numbers(self.loop.collate(items))
            parts: list[Any] = []
            start = 0
            for micro_batch in window:
                parts.append(part_of(whole, slice(start, start + len(micro_batch)), len(items)))
                start += len(micro_batch)
            return parts
        return [self._numbers(self.loop.collate(list(micro_batch))) for micro_batch in window]

    def _numbers(self, batch: Any) -> Any:
        def convert(leaf: Any) -> Any:
            floating = self.double and isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            return leaf.double() if floating else leaf

        return tree_map(convert, batch)

    def tensors(self, items: Sequence[Any]) -> list[torch.Tensor]:
        """The tensors of the batch of these items."""
        return _tensors(self.loop.collate(list(items)))

    def shapes(self, micro_batches: Sequence[Sequence[Any]]) -> set[tuple[Any, ...]]:
        """The shapes of every batch's tensors without the first dimension, and the sizes of images in lists."""
        shapes_seen: set[tuple[Any, ...]] = set()
        for items in micro_batches:
            batch = self.loop.collate(list(items))
            sides = [tuple(t.shape[-2:]) for t in image_list(batch)]
            largest = tuple(max(each) for each in zip(*sides, strict=True)) if sides else ()
            stacked = tuple(tuple(t.shape[1:]) for t in _tensors(batch) if t.dim() and len(t) == len(items))
            shapes_seen.add((largest, () if sides else stacked))
        return shapes_seen


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def seed_everything(seed: int) -> None:
    """Seed torch's, NumPy's and Python's generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def numbers(*, seed: int, double: bool) -> Generator[None]:
    """Seeded random numbers and, where asked, float64 as the default; everything is put back."""
    states: list[Callable[[], None]] = []
    python = random.getstate()
    legacy = np.random.get_state()
    torch_state = torch.get_rng_state()
    states += [lambda: random.setstate(python), lambda: np.random.set_state(legacy)]
    states.append(lambda: torch.set_rng_state(torch_state))
    dtype = torch.get_default_dtype()
    try:
        if double:
            torch.set_default_dtype(torch.float64)
        seed_everything(seed)
        yield
    finally:
        torch.set_default_dtype(dtype)
        for put_back in states:
            put_back()


def windows_of(items: Sequence[Any], *, micro_batch: int, accumulation: int) -> list[list[Sequence[Any]]]:
    """Windows of micro-batches of items; the last window and the last micro-batch may be short."""
    return [list(window) for window in cut(cut(items, micro_batch), accumulation)]


def whole(windows: Sequence[Sequence[Sequence[Any]]]) -> list[list[Sequence[Any]]]:
    """Each window as one batch."""
    return [[[item for micro_batch in window for item in micro_batch]] for window in windows]


def parameter_errors(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """|gradients - truth| / |truth| of each parameter; a tiny |truth| counts as 1e-5 of the whole gradient."""
    norm = math.sqrt(sum(float(value.norm()) ** 2 for value in truth.values()))
    errors: dict[str, float] = {}
    for name in {**truth, **gradients}:
        zero = torch.zeros_like(truth[name] if name in truth else gradients[name])
        one = gradients.get(name, zero)
        other = truth.get(name, zero)
        size = max(float(other.norm()), 1e-5 * norm)
        difference = float((one - other).norm())
        errors[name] = difference / size if size else float(difference > 0)
    return errors


def _raised(error: Exception, accumulation: int, *, double: bool) -> str:
    text = " ".join(str(error).split())
    hint = ""
    if double and any(word in text.lower() for word in ("dtype", "double", "float", "scalar type")):
        hint = "; where the loop insists on float32, check it with precision=float32"
    return f"the loop raised {type(error).__name__} with accumulation {accumulation}: {text:.300}{hint}"
