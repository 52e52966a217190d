"""Survives out-of-memory errors: the window starts again with smaller micro-batches and the same result."""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from trainfit.errors import HalfUpdated, OutOfMemory, TrainfitError
from trainfit.gpus.detect import detect_gpus
from trainfit.step import ranks
from trainfit.step.attempt import Result, attempt
from trainfit.step.checkpointing import checkpoint_first
from trainfit.step.contrastive import Contrastive
from trainfit.step.random_state import RandomState
from trainfit.step.training_step import StepResult, TrainingStep
from trainfit.training.shortage import Cause, Ran, Survival, cause_of, gib, shortage, stop_message

Item = TypeVar("Item")


def others_on(device: torch.device) -> str:
    """The other processes on the GPU, as "python (pid 12) 3.10 GiB"; empty if NVML is not available."""
    if device.type != "cuda":
        return ""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        processes = [process for gpu in detect_gpus() if gpu.uuid.endswith(uuid) for process in gpu.processes]
    except TrainfitError:  # no NVML: the message has the numbers without the names
        return ""
    return ", ".join(f"{p.name or 'a process'} (pid {p.pid}) {gib(p.used_bytes or 0)} GiB" for p in processes)


def survival(
    failure: str | None,
    device: torch.device,
    *,
    outside_bytes: int | None = None,
    agreed: Mapping[str, float] | None = None,
    **known: Any,
) -> Survival:
    """The event of a failure with its cause and numbers; `agreed` has the numbers if another rank failed."""
    failure = None if failure == ranks.ANOTHER_RANK else failure
    short = shortage(failure or "")
    cause: Cause = cause_of(short, outside_bytes=outside_bytes) if failure else "other rank"
    conf = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    advice = "" if "expandable_segments:True" in conf else "PYTORCH_ALLOC_CONF=expandable_segments:True avoids it"
    numbers = {"needs": short.needs_bytes, "usable": short.usable_bytes} if short else agreed or {}
    return Survival(
        cause=cause,
        needs_bytes=int(numbers.get("needs", 0)),
        usable_bytes=int(numbers.get("usable", 0)),
        hint={"taken": others_on(device), "fragmented": advice}.get(cause, ""),
        message=failure or "",
        **known,
    )


def snapshot(model: torch.nn.Module, device: torch.device) -> Callable[[], None]:
    """Save the state of the random number generators and the model's buffers; the returned function restores them.

    Buffers are copied to the host where the device has no room for a copy.
    """

    def copied(buffer: torch.Tensor) -> torch.Tensor:
        copy, _ = attempt(buffer.clone)
        return buffer.to("cpu", copy=True) if copy is None else copy

    buffers = [copied(buffer) for buffer in model.buffers()]
    state = RandomState.now(device)

    def restore() -> None:
        state.restore(device)
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)

    return restore


class Survivor:
    """Runs windows of a `TrainingStep`, and starts a window again if memory runs out.

    The ladder: if there is enough memory but in pieces, or if the error has no numbers, free cached memory and try the
    same cut once more; halve the micro-batch, down to one; recompute the model's blocks in backward (activation
    checkpointing); stop. After a stretch without errors the micro-batch before the last halving is tried again, once. The
    effective batch, the samples and the gradient stay the same. All ranks go down and up together.
    """

    def __init__(
        self,
        micro_batch: int,
        *,
        blocks: Sequence[torch.nn.Module] = (),
        quiet_windows: int = 200,
        freeing_flags: Sequence[str] = (),
    ) -> None:
        """Start with this micro-batch.

        Args:
            micro_batch: Items in one forward and backward.
            blocks: The modules that activation checkpointing may recompute.
            quiet_windows: Windows without an error after which the larger micro-batch is tried again.
            freeing_flags: Flags that free memory and change what is learned, for the message of the stop.
        """
        self.micro_batch = micro_batch
        self.blocks = blocks
        self.freeing_flags = freeing_flags
        self.quiet_windows = quiet_windows
        self.checkpointing = False
        """Whether the ladder switched activation checkpointing on."""
        self.survived: list[Survival] = []
        self._asked = micro_batch
        self._larger = 0
        self._may_rise = True
        self._quiet = 0
        self._same_again = True
        self._ran: Ran | None = None
        self._outside_bytes: int | None = None

    def state(self) -> dict[str, int]:
        """The position on the ladder, for a saved state."""
        return {
            "asked": self._asked,
            "micro_batch": self.micro_batch,
            "checkpointing": int(self.checkpointing),
            "larger": self._larger,
            "may_rise": int(self._may_rise),
            "quiet": self._quiet,
            "same_again": int(self._same_again),
        }

    def load(self, state: Mapping[str, int]) -> None:
        """Restore what `state` returned, unless the requested micro-batch has changed since."""
        if state["asked"] != self._asked:
            return
        self.micro_batch = state["micro_batch"]
        self.checkpointing = bool(state["checkpointing"])
        self._larger = state["larger"]
        self._may_rise = bool(state["may_rise"])
        self._quiet = state["quiet"]
        self._same_again = bool(state["same_again"])
        if self.checkpointing:
            checkpoint_first(self.blocks, "all")

    def run(self, step: TrainingStep, window: Sequence[Any], *, number: int, where: str = "window") -> StepResult:
        """Train on one window, going down the ladder if necessary; `number` is the optimizer steps done so far.

        Raises:
            OutOfMemory: the ladder is exhausted. Parameters, random numbers and buffers are as before the window.
            HalfUpdated: the update could not be finished.
        """
        restore = snapshot(step.model, step.device)
        if where == "window":
            self._rise(number)
        while True:
            losses, failure = attempt(lambda: step.gradient(window, micro_batch=self.micro_batch))
            if losses is not None:  # on every rank, or on none
                break
            failure = None if failure == ranks.ANOTHER_RANK else failure
            agreed = self._agree(failure, len(window))
            step.optimizer.zero_grad(set_to_none=True)
            restore()
            free_cached(step.device)
            self._go_down(step.device, failure, agreed, step=number, where=where)
        gradient_norm = self._update(step, number)
        self._quiet += where == "window"
        self._remember(step, window)
        return step.result(losses, gradient_norm, images=len(window), micro_batch=self.micro_batch)

    def _agree(self, failure: str | None, images: int) -> dict[str, float]:
        """Agree after a failure: the number of ranks that need a smaller cut, their mean numbers, and the window's images."""
        short = shortage(failure or "")
        small = failure is not None and cause_of(short, outside_bytes=self._outside_bytes) in ("memory", "taken")
        numbers = {"needs": short.needs_bytes, "usable": short.usable_bytes} if short else {"needs": 0, "usable": 0}
        flags = {"small": small, "known": short is not None, "images": images}
        agreed = ranks.sum_over_ranks({key: float(value) for key, value in (numbers | flags).items()})
        return agreed | {key: agreed[key] / max(agreed["known"], 1) for key in numbers}

    def _update(self, step: TrainingStep, number: int) -> torch.Tensor:
        """Run the phases of the update; what a failure left undone is tried again once the window's memory is free."""
        failure = None
        for _ in range(3):
            norm, failure = attempt(lambda: step.update(number))
            if norm is not None:
                return norm
            same: dict[str, Any] = {"micro_batch": self.micro_batch, "next_micro_batch": self.micro_batch}
            self.survived.append(survival(failure, step.device, step=number, where="update", **same))
            free_cached(step.device)
        raise HalfUpdated(f"no memory for the optimizer's update at step {number + 1} ({failure})")

    def _go_down(self, device: torch.device, failure: str | None, agreed: Mapping[str, float], **known: Any) -> None:
        """Take the next rung, which is the same on every rank because it follows from what they agreed on."""
        images = min(self.micro_batch, -int(-agreed["images"] // ranks.world_size()))
        smaller = self.micro_batch
        switch = False
        if self._same_again and not agreed["small"]:
            self._same_again = False
        elif images > 1:
            smaller = -(-images // 2)
            self._larger = self.micro_batch
            self._same_again = True
        else:
            kinds = [type(block) for block in self.blocks]
            checkpoint_first(self.blocks, "all" if self.blocks else "none")
            switch = kinds != [type(block) for block in self.blocks]
            smaller = int(switch)
            self._larger = 0
            self._same_again = True
            self.checkpointing = self.checkpointing or switch
        known |= {"micro_batch": self.micro_batch, "next_micro_batch": smaller, "checkpointing": switch}
        event = survival(failure, device, outside_bytes=self._outside_bytes, agreed=agreed, **known)
        self.survived.append(event)
        if not smaller:
            raise OutOfMemory(stop_message(event, self._ran, self.freeing_flags))
        self.micro_batch = smaller
        self._quiet = 0

    def _rise(self, number: int) -> None:
        if self._may_rise and self._larger and self._quiet >= self.quiet_windows:
            before = self.micro_batch
            larger = self._larger
            event = Survival(step=number, where="window", cause="quiet", micro_batch=before, next_micro_batch=larger)
            self.survived.append(event)
            self.micro_batch = larger
            self._may_rise = False

    def _remember(self, step: TrainingStep, window: Sequence[Any]) -> None:
        """Remember the largest window that fits, for the message of the stop; on a GPU only."""
        if step.device.type != "cuda" or not window:
            return
        canvas = (0, 0) if isinstance(step.objective, Contrastive) else step.objective.canvas(window)
        reserved = torch.cuda.memory_reserved(step.device)
        now = Ran(canvas=canvas, micro_batch=self.micro_batch, reserved_bytes=reserved)
        self._ran = max(self._ran or now, now, key=lambda ran: (ran.canvas[0] * ran.canvas[1], ran.micro_batch))
        if self._outside_bytes is None:
            free, total = torch.cuda.mem_get_info(step.device)
            self._outside_bytes = total - free - reserved


class Halving:
    """Runs an action without gradients on parts of its items, and halves the parts when memory runs out.

    Within a share each rank halves by itself, because no collective comes between its parts; `on_all_ranks` brings the
    ranks together afterwards.
    """

    def __init__(self, micro_batch: int, device: torch.device, survived: list[Survival] | None = None) -> None:
        """Start with this micro-batch; events are added to `survived`."""
        self.micro_batch = micro_batch
        self.device = device
        self.survived = [] if survived is None else survived

    def __call__(
        self, action: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], *, step: int, where: str
    ) -> list[Result]:
        """Results of the action for all items, in order, one per item. `step` and `where` are for the events.

        Raises:
            OutOfMemory: one item alone does not fit.
        """
        results: list[Result] = []
        may_repeat = True
        while len(results) < len(items):
            part = items[len(results) : len(results) + self.micro_batch]
            outputs, failure = attempt(partial(action, part))
            results += outputs or []
            if failure is not None:
                free_cached(self.device)
                same = may_repeat and cause_of(shortage(failure), outside_bytes=None) != "memory"
                half = -(-len(part) // 2) if len(part) > 1 else 0
                smaller = len(part) if same else half
                known: dict[str, Any] = {"step": step, "where": where, "micro_batch": len(part)}
                self.survived.append(survival(failure, self.device, next_micro_batch=smaller, **known))
                if not smaller:
                    raise OutOfMemory(stop_message(self.survived[-1], None))
                self.micro_batch = self.micro_batch if same else smaller
                may_repeat = not same
        return results

    def on_all_ranks(self, action: Callable[[], Result], *, step: int, where: str) -> Result:
        """The result of an action that calls this object on every rank, each for its own share; a collective call.

        Afterwards all ranks have the smallest micro-batch that one of them needed.

        Raises:
            OutOfMemory: the action raised it here or on another rank; all ranks raise, so that none waits for another.
        """
        if ranks.world_size() == 1:
            return action()
        result: list[Result] = []
        failure = ""
        try:
            result.append(action())
        except OutOfMemory as error:
            failure = str(error)
        outcomes: list[tuple[str, int]] = ranks.gather((failure, self.micro_batch))
        failures = [f"rank {number}: {text}" for number, (text, _) in enumerate(outcomes) if text]
        if failures:
            raise OutOfMemory(failures[0])
        smallest = min(micro_batch for _, micro_batch in outcomes)
        if smallest < self.micro_batch:
            known: dict[str, Any] = {"step": step, "where": where, "micro_batch": self.micro_batch}
            self.survived.append(Survival(cause="other rank", next_micro_batch=smallest, **known))
            self.micro_batch = smallest
        return result[0]


def free_cached(device: torch.device) -> None:
    """Collect garbage, and return unused cached memory to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
