"""Loads windows of CPU samples. Which images, at which size and in which order are functions of the optimizer step."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.workload import Decoder, TrainableWorkload
from trainfit.step import ranks
from trainfit.tasks.augment import Augmentation
from trainfit.training.headroom import IN_MEMORY_BYTES
from trainfit.training.packets import Spooled, spooled
from trainfit.training.schedule import mix
from trainfit.training.workers import NOTE_S, LoaderDiedError, run_workers

ORDER, SIZE, SAMPLE, STEP = range(4)
"""Purposes of `mix`."""


PART = 128
"""Samples that a loader process makes at a time; several processes make the parts of a larger window."""


class Unreadable(str):
    """Why an image failed to decode in the middle of training: left out of its window, named in the summary."""


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """The order in which a whole run sees its data."""

    images: int
    """Number of training images."""
    effective_batch: int
    """Images of a window over all ranks."""
    sizes: tuple[int, ...]
    """Side lengths to draw from, one a window."""
    seed: int
    """Seed of the order and the sizes."""
    rank: int = 0
    """This process."""
    world_size: int = 1
    """Number of processes."""
    groups: tuple[int, ...] = ()
    """Group of each image: a window holds images of one group only. Empty: there is only one group."""

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows per epoch. The last one of an epoch, or of a group, may be short; every image is seen once."""
        counts = Counter(self.groups).values() if self.groups else (self.images,)
        return sum(-(-count // self.effective_batch) for count in counts)

    def size(self, step: int) -> int:
        """Side length of window `step`, the same on every rank and in every micro-batch."""
        generator = torch.Generator().manual_seed(mix(self.seed, SIZE, step))
        return self.sizes[int(torch.randint(len(self.sizes), (), generator=generator).item())]

    def indices(self, step: int) -> list[int]:
        """This rank's image numbers in window `step`; the ranks' shares are disjoint and cover the window."""
        epoch, window = divmod(step, self.windows_per_epoch)
        return self._epoch(epoch)[window][self.rank :: self.world_size].tolist()

    def _epoch(self, epoch: int) -> Sequence[torch.Tensor]:
        """Indices of the images of each window of an epoch."""
        generator = torch.Generator().manual_seed(mix(self.seed, ORDER, epoch))
        order = torch.randperm(self.images, generator=generator)
        if not self.groups:
            return order.split(self.effective_batch)
        group = torch.tensor(self.groups)[order]
        windows = [part for each in group.unique() for part in order[group == each].split(self.effective_batch)]
        return [windows[number] for number in torch.randperm(len(windows), generator=generator)]


def window_plan(workload: TrainableWorkload, records: Sequence[Any], *, effective_batch: int, seed: int) -> WindowPlan:
    """This rank's order of these training records."""
    return WindowPlan(
        images=len(records),
        effective_batch=effective_batch,
        sizes=workload.sizes(),
        seed=seed,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        groups=groups_of(workload, records),
    )


def groups_of(workload: TrainableWorkload, records: Sequence[Any]) -> tuple[int, ...]:
    """`WindowPlan.groups` of training records; empty where all are of one group."""
    setting = workload.setting
    groups = tuple(setting.family.group(setting, record) for record in records)
    return groups if len(set(groups)) > 1 else ()


@dataclass(frozen=True, kw_only=True)
class SampleKey:
    """What a loader process needs to make one sample: the record, and how it is drawn."""

    record: Any
    """The record that the sample is made of."""
    size: int
    """Side of the image in pixels."""
    seed: int
    """Seed of the augmentation."""


def _windows(plan: WindowPlan, steps: range, records: Sequence[Any]) -> Iterator[list[SampleKey]]:
    for step in steps:
        size = plan.size(step)
        epoch = step // plan.windows_per_epoch
        seeds = {i: mix(plan.seed, SAMPLE, epoch, i) for i in plan.indices(step)}
        yield [SampleKey(record=records[i], size=size, seed=seed) for i, seed in seeds.items()]


class Loaded(Spooled):
    """The samples of a window, a part of one, or a micro-batch."""

    load_s: float
    """Seconds that the loader process took to read and decode."""
    paths: Sequence[str] = ()
    """Path of each sample."""
    ends_window: bool = True


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some samples of a window."""

    keys: Sequence[SampleKey]
    """What the samples are made from, one for each."""
    window: int = 0
    """Samples of the whole window."""
    ends_window: bool = True
    """Whether the window's last sample is among them."""


def _parts(window: Sequence[SampleKey]) -> Iterator[Part]:
    """Split a window into parts of `PART` samples; an empty window is one part."""
    for start in range(0, max(len(window), 1), PART):
        keys = window[start : start + PART]
        yield Part(keys=keys, window=len(window), ends_window=start + PART >= len(window))


def _bytes_of(sample: Any) -> int:
    """Bytes of a sample's tensors."""
    values = [getattr(sample, each.name) for each in fields(sample)] if hasattr(sample, "__dataclass_fields__") else []
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


@dataclass(frozen=True, kw_only=True)
class Making:
    """Makes the samples of a window. An image that cannot be decoded becomes `Unreadable`, not an exception."""

    decode: Decoder
    """Reads the file of a record and makes its sample."""
    augment: Augmentation
    """What is drawn at random."""
    folder: Path | None = None
    """Folder in which windows of more than `IN_MEMORY_BYTES` wait; None: they wait in memory, too."""

    def __call__(self, part: Part, report: Callable[[str], None] = lambda _: None) -> Loaded:
        """Decode one image after the other; `report` is called with the path of each before it is read."""
        started = time.perf_counter()
        loaded = Loaded()
        loaded.ends_window = part.ends_window
        for key in part.keys:
            report(str(key.record.path))
            loaded.append(self._sample(key))
        loaded.paths = [str(key.record.path) for key in part.keys]
        largest = max(map(_bytes_of, loaded), default=0)
        if part.window * largest > IN_MEMORY_BYTES:
            loaded.folder = self.folder
        loaded.load_s = time.perf_counter() - started
        return loaded

    def _sample(self, key: SampleKey) -> Any:
        generator = torch.Generator().manual_seed(key.seed)
        try:
            sample = self.decode(key.record, size=key.size, augment=self.augment.own, generator=generator)
        except TrainfitError as error:
            return Unreadable(error)
        if not self.augment.after_decoding:
            return sample
        from trainfit.tasks.transforms import augmented  # torchvision's transforms take a second to import

        return augmented(sample, self.augment, generator)


def usable_cores() -> int:
    """Cores that this process may use: its rank's share of the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_workers() -> int:
    """Loader processes: one per usable core less one for the trainer, eight at most."""
    return min(8, usable_cores() - 1)


def _loaded_here(make: Making, parts: Iterable[Part], note: Callable[[str], None]) -> Iterator[Loaded]:
    """The samples of each part, made in this process; a line every `NOTE_S` while one takes long.

    Raises:
        LoaderDiedError: no room on the disk for a window that is too large to wait in memory.
    """
    for part in parts:
        began = noted = time.monotonic()

        def report(item: str, began: float = began) -> None:
            nonlocal noted
            if (now := time.monotonic()) - noted > NOTE_S:
                noted = now
                note(f"waiting for data for {now - began:.0f} s; reading {item}")

        yield _waiting(make(part, report))


def _waiting(loaded: Loaded) -> Loaded:
    """Put samples where they wait for the trainer, in memory or in a file."""
    try:
        spooled_window = spooled(loaded)
    except OSError as error:
        raise LoaderDiedError(
            f"a window cannot wait in {loaded.folder} ({error.strerror}): make room there, or give another --out"
        ) from error
    assert isinstance(spooled_window, Loaded)
    return spooled_window


def _whole(parts: Sequence[Loaded]) -> Loaded:
    """Join the parts of a window, or of a batch."""
    whole = Loaded(sample for part in parts for sample in part)
    whole.maps = tuple(each for part in parts for each in part.maps)
    whole.load_s = sum(part.load_s for part in parts)
    whole.paths = [path for part in parts for path in part.paths]
    return whole


def _joined(parts: Iterable[Loaded]) -> Iterator[Loaded]:
    """Join parts into whole windows; an incomplete last window is dropped."""
    taken: list[Loaded] = []
    for part in parts:
        taken.append(part)
        if part.ends_window:
            yield _whole(taken)
            taken = []


def training_loader(
    records: Sequence[Any],
    decode: Decoder,
    plan: WindowPlan,
    *,
    steps: range,
    augment: Augmentation,
    workers: int,
    folder: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Loaded]:
    """A loader whose items are whole windows (lists of samples) of the given steps, in order.

    A window of more than `PART` samples is made in parts; one of more than `IN_MEMORY_BYTES` waits in a file without a name
    in `folder`, where one is given. `note` receives a line for the user while a window takes long. Where `stop` returns True
    while loader processes are waited for, the windows end early.

    Raises:
        LoaderDiedError: a loader process died, is stopped or stuck; while iterating.
    """
    make = Making(decode=decode, augment=augment, folder=folder)
    parts = (part for window in _windows(plan, steps, records) for part in _parts(window))
    if workers == 0:
        return _joined(_loaded_here(make, parts, note))
    share = -(-plan.effective_batch // plan.world_size)
    ahead = -(-share // PART) + workers
    what = "windows" if share <= PART else f"parts of {PART} images"
    return _joined(run_workers(make, parts, workers, least_ahead=ahead, what=what, note=note, stop=stop))


def evaluation_loader(
    records: Sequence[Any],
    workload: TrainableWorkload,
    *,
    micro_batch: int,
    workers: int,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[Loaded]:
    """A loader whose items are micro-batches of this rank's share of the records, in order and not augmented.

    The samples hold inputs alone: evaluation reads the truth from the records. `note` is that of `training_loader`.
    """
    mine = records[ranks.rank() :: ranks.world_size()]
    keys = (SampleKey(record=record.without_truth(), size=workload.eval_size, seed=0) for record in mine)
    batches = (Part(keys=batch) for batch in iter(lambda: list(islice(keys, micro_batch)), []))
    make = Making(decode=workload.decoder(), augment=Augmentation())
    return run_workers(make, batches, workers, note=note) if workers else _loaded_here(make, batches, note)
