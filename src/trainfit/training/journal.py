"""What a run writes down window by window: metrics.jsonl, telemetry.jsonl, TensorBoard, and the live line."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainfit.step import ranks
from trainfit.step.training_step import StepResult
from trainfit.training.run_folder import METRICS, TELEMETRY, Metrics
from trainfit.training.telemetry import Clock, Progress, StepUpdate, memory_bytes
from trainfit.training.tensorboard import event_writer

FLUSH_STEPS = 10
"""On a GPU losses are read this often: reading waits for the GPU."""


class Journal:
    """Keeps the windows' losses on the device and reads them now and then. Files are rank 0's."""

    def __init__(
        self,
        folder: Path,
        *,
        after_step: int,
        total_steps: int,
        steps_per_epoch: int,
        device: torch.device,
        tensorboard: bool,
        show: Progress,
    ) -> None:
        """Open the files of a run that has done `after_step` steps."""
        first = ranks.rank() == 0
        self.folder, self.device, self.show = folder, device, show
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.metrics = Metrics(folder / METRICS, keep_through=after_step) if first else None
        self.events = event_writer(folder) if tensorboard and first else None
        self.clock = Clock()
        self.pending: list[dict[str, Any]] = []
        self.finite = True
        """Whether every loss and gradient of the last reading was a number."""

    def window(self, result: StepResult, *, step: int, lr: float, size: int) -> None:
        """Note one window; `step` counts from 1."""
        self.clock.images += result.images
        self.pending.append(
            {
                "step": step,
                "epoch": (step - 1) // self.steps_per_epoch,
                "losses": result.losses,
                "gradient_norm": result.gradient_norm,
                "lr": lr,
                "size": size,
                "images": result.images,
            }
        )
        if self.device.type == "cpu" or step % FLUSH_STEPS == 0:
            self.flush()

    def flush(self) -> None:
        """Read what is pending from the device, write it, show the last window."""
        if not self.pending:
            return
        rows = [_read(row) for row in self.pending]
        self.pending.clear()
        elapsed_s, waited_s = self.clock.read()
        last = rows[-1]
        images = sum(row["images"] for row in rows)
        self.finite = all(row["loss"] is not None and row["gradient_norm"] is not None for row in rows)
        if self.metrics:
            self.metrics.write(rows)
        self._event(last)
        update = StepUpdate(
            step=last["step"],
            total_steps=self.total_steps,
            epoch=last["epoch"],
            epochs=-(-self.total_steps // self.steps_per_epoch),
            loss=math.nan if last["loss"] is None else last["loss"],
            images_per_s=images / elapsed_s,
            remaining_s=(self.total_steps - last["step"]) * elapsed_s / len(rows),
            memory_bytes=memory_bytes(self.device),
            wait_share=waited_s / elapsed_s,
        )
        self.show.step(update)
        if self.metrics:
            with (self.folder / TELEMETRY).open("a") as file:
                values = {"images_per_s": update.images_per_s, "wait_share": update.wait_share}
                row = {"step": update.step, "time": time.time(), "memory_bytes": update.memory_bytes, **values}
                file.write(json.dumps(row) + "\n")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Write an evaluation's figures; `row` has a `step`."""
        if self.metrics:
            self.metrics.write([row])
        self._event(row)

    def _event(self, row: Mapping[str, Any]) -> None:
        if self.events:
            self.events(row, row["step"])

    def close(self) -> None:
        """Close the files."""
        if self.metrics:
            self.metrics.close()


def _read(row: dict[str, Any]) -> dict[str, Any]:
    """A pending window's numbers, summed over the ranks; null where one is not finite."""
    shares = {name: float(value) for name, value in row["losses"].items()} | {"images": float(row["images"])}
    summed = ranks.sum_over_ranks(shares)
    images = int(summed.pop("images"))
    values = {"loss": sum(summed.values()), **summed, "gradient_norm": float(row["gradient_norm"])}
    return {
        "step": row["step"],
        "epoch": row["epoch"],
        **{key: value if math.isfinite(value) else None for key, value in values.items()},
        "lr": row["lr"],
        "size": row["size"],
        "images": images,
    }
