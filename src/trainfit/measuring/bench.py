"""Trials of a setting on a device of this machine: each is predicted, run in a clean process, and stored. Imports no torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from trainfit.errors import TrainfitError
from trainfit.gpus.context import cuda_context_bytes
from trainfit.gpus.detect import DetectedGpu, detect_gpus
from trainfit.measuring.calibration import append, made_by, stored_at
from trainfit.measuring.process import context_bytes, run_trial
from trainfit.measuring.search import Measured, Predicted, search
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.predict import assess, trace_requests
from trainfit.models.setting import Setting
from trainfit.tracing.trace_cache import get_trace

MOST = {"cuda": 512, "cpu": 4}
"""The largest micro-batch that is tried unless the user names one."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A setting and the device that it is measured on."""

    setting: Setting
    """The setting; its micro-batch is the first to try if nothing can be predicted."""
    card: DetectedGpu | None
    """The GPU; None: the CPU."""
    limit_bytes: int | None = None
    """Memory that the allocator may reserve, to simulate a smaller card."""
    config: AllocatorConfig = field(default_factory=AllocatorConfig)
    """Configuration of the trials' allocator, from the environment."""
    windows: Mapping[str, float] = field(default_factory=dict[str, float])
    """Fields of `trial.Windows` that differ from its defaults."""
    show: Callable[[str], None] = print
    """Called with lines of progress."""

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return "cuda" if self.card else "cpu"

    @property
    def file(self) -> Path:
        """The file that its trials are stored in."""
        return stored_at(self.card.gpu.name if self.card else "CPU")

    def run(self, micro_batches: Sequence[int] = ()) -> Iterator[Measured]:
        """Yield each trial after it was stored: of these micro-batches, or of as few as possible to find the knee.

        Raises:
            TrainfitError: the setting cannot be built, or a trial cannot be stored.
        """
        predict = lru_cache(None)(self._predict)

        def trial(micro_batch: int) -> Measured:
            row = self._trial(micro_batch, predict(micro_batch))
            record = {"made_by": made_by(), "driver": self.card.driver_version if self.card else ""}
            record |= {"setting": self._at(micro_batch).to_json(), "limit_bytes": self.limit_bytes, "row": asdict(row)}
            append(self.file, record)
            return row

        if micro_batches:
            return map(trial, micro_batches)
        return search(trial, predict, start=self.setting.micro_batch, most=MOST[self.device])

    def _predict(self, micro_batch: int) -> Predicted | None:
        """The prediction for a micro-batch; memory that other programs hold on the card is not available."""
        if self.card is None:
            return None
        self.show(f"micro-batch {micro_batch}: predicting")
        gpu = replace(self.card.gpu, memory_bytes=self.card.free_bytes)
        config = self.config
        if self.limit_bytes is not None:
            config = replace(config, per_process_memory_fraction=min(1.0, self.limit_bytes / gpu.memory_bytes))
        try:
            stored = get_trace(trace_requests(self._at(micro_batch), gpu)[0])
        except TrainfitError as error:
            self.show(f"micro-batch {micro_batch}: no prediction: {error}")
            return None
        assessed = assess(stored, gpu, config)
        context = cuda_context_bytes(gpu)
        images = micro_batch * self.setting.accumulation
        setting = self.setting
        waits_s = setting.accumulation * setting.family.host_seconds(setting, micro_batch, gpu.capability)
        return Predicted(
            verdict=assessed.verdict,
            allocated_bytes=assessed.profile.peak_allocated_bytes,
            reserved_low_bytes=assessed.profile.peak_reserved_bytes,
            reserved_high_bytes=assessed.takes.high_bytes - context.high_bytes,
            images_per_s=images / (assessed.time.seconds + waits_s) if assessed.time else None,
        )

    def _trial(self, micro_batch: int, predicted: Predicted | None) -> Measured:
        self.show(f"micro-batch {micro_batch}: measuring")
        request = {"setting": self._at(micro_batch).to_json(), "device": self.device, "limit_bytes": self.limit_bytes}
        uuid = self.card.uuid if self.card else None
        free = next((each.free_bytes for each in detect_gpus() if each.uuid == uuid), 0) if uuid else 0
        record = run_trial({**request, "windows": dict(self.windows)}, gpu_uuid=uuid)
        context = context_bytes(free, record["end"])
        measured = {**(record["peak"] or {}), **(record["speed"] or {})}
        own = {"outcome": record["outcome"], "message": record["message"]}
        return Measured(micro_batch=micro_batch, predicted=predicted, context_bytes=context, **own, **measured)

    def _at(self, micro_batch: int) -> Setting:
        return replace(self.setting, micro_batch=micro_batch)
