"""Writes the records of a run: metrics.jsonl, telemetry.jsonl, trackers, and the live line."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trainfit.step import ranks
from trainfit.step.training_step import StepResult
from trainfit.tasks.charts import write_graphics
from trainfit.tasks.task import Evaluation
from trainfit.training import headroom
from trainfit.training.extents import Largest, largest_over
from trainfit.training.lines import counted
from trainfit.training.loader import usable_cores
from trainfit.training.noise_scale import TOO_FEW, NoiseSample, noise_line, noise_scale
from trainfit.training.run_files import METRICS, PICTURES, TELEMETRY
from trainfit.training.run_folder import Metrics, heal
from trainfit.training.telemetry import Clock, Progress, StepUpdate, memory_bytes, meter
from trainfit.training.trackers import Trackers

FLUSH_STEPS = 10
"""Steps between two readings of losses on a GPU: reading waits for the GPU."""
WARN_WINDOWS = 30
"""Windows after which a running training may warn that it waits for its loader, once."""
WARN_SHARE = 0.25
"""Share of waiting above which it warns."""


class Journal:
    """Keeps the windows' losses on the device and reads them now and then. Files are rank 0's."""

    def __init__(
        self,
        folder: Path,
        *,
        after_step: int,
        pending_evaluation: bool,
        total_steps: int,
        steps_per_epoch: int,
        device: torch.device,
        began: float,
        workers: int,
        effective_batch: int,
        trackers: Sequence[str],
        show: Progress,
    ) -> None:
        """Open the files of a run that has done `after_step` steps and began at `began` (time.perf_counter).

        With `pending_evaluation` the evaluation after the last of these steps is still to be done.
        """
        first = ranks.rank() == 0
        self.device = device
        self.show = show
        self.workers = workers
        self.effective_batch = effective_batch
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.metrics = (
            Metrics(folder, keep_through=after_step, pending_evaluation=pending_evaluation) if first else None
        )
        self.trackers = Trackers(trackers if first else (), folder, show.note)
        self.telemetry = folder / TELEMETRY if first else None
        if first:
            self._heal(folder)
        self.clock = Clock(device, began)
        self.meter = meter(device)
        self.worker_bytes = headroom.WORKER_BYTES
        self.noise: list[NoiseSample] = []
        self.pending: list[tuple[StepResult, int, float, int]] = []
        self.extents: list[Largest] = []
        self.finite = True
        """Whether every loss and gradient of the last reading was finite."""

    def _heal(self, folder: Path) -> None:
        """Drop damaged lines of both files, for instance one that a kill cut short, and report them."""
        dropped = {METRICS: self.metrics.dropped if self.metrics else 0, TELEMETRY: heal(folder / TELEMETRY)}
        for name, number in dropped.items():
            if number:
                self.show.note(f"{folder / name}: {counted(number, 'unreadable line')} dropped")

    def window(self, result: StepResult, *, step: int, lr: float, size: int, largest: Largest | None = None) -> None:
        """Note one window; `step` counts from 1, `largest` is what `largest_of` gives."""
        self.clock.window_done(result.images)
        if self.clock.total.windows == 0 and not self.pending:
            totals = {"total_steps": self.total_steps, "effective_batch": self.effective_batch}
            self.event("start", step - 1, start_s=self.clock.start_s, workers=self.workers, **totals)
        self.pending.append((result, step, lr, size))
        self.extents.append(largest or {})
        if self.device.type == "cpu" or step % FLUSH_STEPS == 0:
            self.flush()

    def flush(self) -> None:
        """Read pending numbers from the device, write them, and show the last window."""
        if not self.pending:
            return
        rows = [self._read(*window) for window in self.pending]
        most = _largest([window[0].numbers for window in self.pending])
        self.pending.clear()
        largest = largest_over(self.extents)
        self.extents.clear()
        spent = self.clock.read()
        last = rows[-1]
        images = sum(row["images"] for row in rows)
        self.finite = all(row["loss"] is not None and row["gradient_norm"] is not None for row in rows)
        self.record(rows)
        update = StepUpdate(
            step=last["step"],
            total_steps=self.total_steps,
            epoch=last["epoch"],
            epochs=-(-self.total_steps // self.steps_per_epoch),
            loss=math.nan if last["loss"] is None else last["loss"],
            images_per_s=images / spent.elapsed_s,
            remaining_s=(self.total_steps - last["step"]) * spent.elapsed_s / len(rows),
            memory_bytes=memory_bytes(self.device),
            wait_share=spent.waited_s / spent.elapsed_s,
        )
        self.show.step(update)
        values = {"memory_bytes": update.memory_bytes, "images_per_s": update.images_per_s}
        numbers: dict[str, Any] = {"window_numbers": most} if most else {}
        numbers |= {"largest": largest} if largest else {}
        self._write(
            {"step": update.step, **values, "wait_share": update.wait_share, **asdict(spent), **numbers, **self.meter()}
        )
        done = self.clock.total.windows
        if done - len(rows) < WARN_WINDOWS <= done:
            self.worker_bytes = headroom.worker_host_bytes()
            verdict, line = self._loader(update.step)
            if verdict.wait_share > WARN_SHARE:
                self.show.note(line)

    def _read(self, result: StepResult, step: int, lr: float, size: int) -> dict[str, Any]:
        """A pending window's numbers, summed over the ranks; null where one is not finite."""
        shares = {name: float(value) for name, value in result.losses.items()}
        summed = ranks.sum_over_ranks(shares | {"images": float(result.images)})
        images = int(summed.pop("images"))
        values = {"loss": sum(summed.values()), **summed, "gradient_norm": float(result.gradient_norm)}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        epoch = (step - 1) // self.steps_per_epoch
        return {"step": step, "epoch": epoch, **finite, "lr": lr, "size": size, "images": images}

    def evaluation(self, evaluation: Evaluation, *, step: int, epoch: int) -> None:
        """Write an evaluation: the task's own values, and the score and figures that a report shows of any task."""
        shown = {"score": evaluation.score, "score_name": evaluation.score_name, "figures": dict(evaluation.figures)}
        self.record([{"step": step, "epoch": epoch, **evaluation.record, **shown}])

    def graphics(self, evaluation: Evaluation) -> None:
        """Write the pictures and curves of the evaluation that is the best so far."""
        if self.telemetry and evaluation.graphics:
            write_graphics(evaluation.graphics, self.telemetry.with_name(PICTURES), self.show.note)

    def event(self, name: str, step: int, **values: Any) -> None:
        """Note in telemetry.jsonl that something happened after `step` steps."""
        self._write({"step": step, "event": name, **values})

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.telemetry:
            with self.telemetry.open("a") as file:
                file.write(json.dumps({"time": time.time(), **row}) + "\n")

    def noise_sample(self, sample: NoiseSample, step: int) -> None:
        """Keep the sample of the gradient noise of a watched window."""
        self.noise.append(sample)
        self.event("noise", step, **asdict(sample))

    def _loader(self, step: int) -> tuple[headroom.LoaderVerdict, str]:
        total = self.clock.total
        windows = max(1, total.windows)
        facts = headroom.LoaderFacts(
            windows=total.windows,
            compute_s=total.compute_s / windows,
            waited_s=total.waited_s,
            load_s=total.load_s / windows,
            workers=self.workers,
            cores=usable_cores(),
            available_bytes=headroom.available_host_bytes(),
            worker_bytes=self.worker_bytes,
        )
        verdict = headroom.judge(facts)
        line = headroom.verdict_line(verdict, facts)
        self.event("loader", step, line=line, **asdict(facts), **asdict(verdict))
        return verdict, line

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write figures of windows or of an evaluation; each row has a `step`. Trackers receive the last row."""
        if self.metrics:
            self.metrics.write(rows)
        self.trackers.log(rows[-1])

    def close(self, step: int, *, interrupted: bool, unseen: str | None) -> tuple[str, str]:
        """Write the verdicts; returns what to tell of the loader and of the noise scale.

        Args:
            step: Optimizer steps done.
            interrupted: Stopped before the end.
            unseen: Why the noise scale is not available, where that is known.
        """
        _, line = self._loader(step)
        scale = noise_scale(self.noise)
        hint = (
            noise_line(scale, self.effective_batch)
            if scale
            else f"gradient noise scale not available: {unseen or TOO_FEW}"
        )
        self.trackers.close()
        self.event("end", step, interrupted=interrupted, noise=hint)
        return line, hint


def _largest(windows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest of each number over some windows: what their memory follows from."""
    return {name: max(window.get(name, 0.0) for window in windows) for window in windows for name in window}
