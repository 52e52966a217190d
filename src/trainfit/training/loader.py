"""Windows of CPU samples: which images, at which size, in which order, all functions of the optimizer step."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from trainfit.errors import TrainfitError
from trainfit.models.workload import Decoder, Workload
from trainfit.step import ranks
from trainfit.tasks.detection.samples import ImageRecord, Sample
from trainfit.training.schedule import mix

ORDER, SIZE, SAMPLE, STEP = range(4)
"""Purposes of `mix`."""


class Unreadable(str):
    """Why an image failed to decode in the middle of training: left out of its window, named in the summary."""


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """The order of data of a whole run."""

    images: int
    effective_batch: int
    sizes: tuple[int, ...]
    """Side lengths to draw from, one a window."""
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def windows_per_epoch(self) -> int:
        """The last window of an epoch may be short; every image is seen once an epoch."""
        return -(-self.images // self.effective_batch)

    def size(self, step: int) -> int:
        """Side length of window `step`, the same on every rank and in every micro-batch."""
        generator = torch.Generator().manual_seed(mix(self.seed, SIZE, step))
        return self.sizes[int(torch.randint(len(self.sizes), (), generator=generator).item())]

    def indices(self, step: int) -> list[int]:
        """This rank's image numbers in window `step`; the ranks' shares are disjoint and cover the window."""
        epoch, window = divmod(step, self.windows_per_epoch)
        generator = torch.Generator().manual_seed(mix(self.seed, ORDER, epoch))
        order = torch.randperm(self.images, generator=generator)
        first = window * self.effective_batch
        return order[first : first + self.effective_batch][self.rank :: self.world_size].tolist()


@dataclass(frozen=True, kw_only=True)
class _Key:
    """What a loader process needs to make one sample."""

    index: int
    size: int
    seed: int


def _windows(plan: WindowPlan, steps: range) -> Iterator[list[_Key]]:
    for step in steps:
        size, epoch = plan.size(step), step // plan.windows_per_epoch
        yield [_Key(index=i, size=size, seed=mix(plan.seed, SAMPLE, epoch, i)) for i in plan.indices(step)]


class Loaded(list[Sample | Unreadable]):
    """The samples of a window or micro-batch."""

    load_s: float
    """Seconds that reading and decoding took, in the process that did."""


class _Samples(Dataset[Sample | Unreadable]):
    """Decodes one key at a time. An image that cannot be decoded comes back as `Unreadable`, not as an exception."""

    def __init__(self, records: Sequence[ImageRecord], decode: Decoder, *, augment: bool) -> None:
        self.records, self.decode, self.augment = records, decode, augment

    def __getitems__(self, keys: Sequence[_Key]) -> Loaded:
        """What torch's loader asks for, where a dataset has it, instead of single items."""
        started = time.perf_counter()
        loaded = Loaded(map(self.__getitem__, keys))
        loaded.load_s = time.perf_counter() - started
        return loaded

    def __getitem__(self, key: _Key) -> Sample | Unreadable:
        generator = torch.Generator().manual_seed(key.seed)
        record = self.records[key.index]
        try:
            return self.decode(record, size=key.size, augment=self.augment, generator=generator)
        except TrainfitError as error:
            return Unreadable(error)


def _as_list(samples: list[Sample | Unreadable]) -> list[Sample | Unreadable]:
    return samples


def usable_cores() -> int:
    """Cores that this process may use: its rank's share of the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_workers() -> int:
    """Loader processes: one per usable core less one for the trainer, eight at most."""
    return min(8, usable_cores() - 1)


class LoaderDiedError(TrainfitError):
    """A loader process is gone; raised while data is waited for, never in the middle of a step."""


def _loaded(samples: _Samples, batches: Iterable[list[_Key]], workers: int) -> Iterator[Loaded]:
    """A loader's items. Torch would raise from a signal handler, anywhere, an update half done included: its handler is
    taken away, and dead processes are found while data is waited for (torch looks every 5 s).
    """
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=_as_list, num_workers=workers)  # pyright: ignore[reportArgumentType]
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if main else None
    others = multiprocessing.active_children()
    source = iter(loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    processes = [p for p in multiprocessing.active_children() if p not in others]
    try:
        yield from source
    except RuntimeError as error:
        dead = [p for p in processes if p.exitcode]
        if not dead or "DataLoader worker" not in str(error):
            raise
        said = ", ".join(f"{p.pid} (exit code {p.exitcode})" for p in dead)
        raise LoaderDiedError(
            f"loader process {said} died, most likely killed because host memory ran out: take fewer --workers"
        ) from error


def training_loader(
    records: Sequence[ImageRecord], decode: Decoder, plan: WindowPlan, *, steps: range, augment: bool, workers: int
) -> Iterator[Loaded]:
    """A loader whose items are whole windows (lists of samples) of the given steps, in order."""
    return _loaded(_Samples(records, decode, augment=augment), _windows(plan, steps), workers)


def evaluation_loader(
    records: Sequence[ImageRecord], workload: Workload, *, micro_batch: int, workers: int
) -> Iterator[Loaded]:
    """A loader whose items are micro-batches of this rank's share of the records, in order and not augmented."""
    mine = range(ranks.rank(), len(records), ranks.world_size())
    keys = [_Key(index=i, size=workload.resolution, seed=0) for i in mine]
    batches = [keys[i : i + micro_batch] for i in range(0, len(keys), micro_batch)]
    return _loaded(_Samples(records, workload.decoder(), augment=False), batches, workers)
