"""Surviving out-of-memory errors: the window starts again, smaller, with the same result."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from trainfit.errors import OutOfMemory
from trainfit.step import ranks
from trainfit.step.training_step import StepResult, TrainingStep

Result = TypeVar("Result")

MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "unable to find an engine to execute this computation",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
"""What libraries say that fail to allocate outside torch's allocator (cuBLAS, cuDNN) or on other devices: these come as
plain RuntimeErrors, so only their text tells."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: by its type, else by the words of the libraries below torch."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)
    )


@dataclass(frozen=True, kw_only=True)
class Survival:
    """One out-of-memory error and what was done."""

    step: int
    where: str
    """`window` (forward or backward), `update` or `evaluation`."""
    micro_batch: int
    """At the error."""
    next_micro_batch: int
    """Afterwards; the same where giving back cached memory was tried first."""
    allocated_bytes: int
    """Peak of this rank up to the error; 0 on the CPU."""
    reserved_bytes: int
    message: str
    """The first line of the error; empty where another rank had it."""


def attempt(action: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """The result, or the first line of an out-of-memory error; other errors pass.

    Only text leaves the `except` block: the exception's traceback would keep every tensor of its frames alive.
    """
    try:
        return action(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) and not isinstance(error, MemoryError):
            raise
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
    return None, message


def snapshot(model: torch.nn.Module, device: torch.device) -> Callable[[], None]:
    """Note the random numbers' state and the model's buffers; the function that is returned puts them back."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)

    return restore


class Survivor:
    """Runs windows of a `TrainingStep`, and starts a window again where memory runs out.

    The ladder: give cached memory back and try the same cut once more (fragmentation); halve the micro-batch, down to
    one; stop. The effective batch, the samples and the gradient stay what they are. All ranks go down together.
    """

    def __init__(self, micro_batch: int) -> None:
        """Start with this micro-batch."""
        self.micro_batch = micro_batch
        self.survived: list[Survival] = []
        self._same_again = True

    def run(self, step: TrainingStep, window: Sequence[Any], *, number: int) -> StepResult:
        """Train on one window, whatever it takes; `number` is the optimizer steps done so far.

        Raises:
            OutOfMemory: micro-batches of one do not fit. Parameters, random numbers and buffers are as before the window.
        """
        restore = snapshot(step.model, step.device)
        while True:
            losses, failure = attempt(lambda: step.gradient(window, micro_batch=self.micro_batch))
            if not ranks.any_rank(failure is not None):
                break
            step.optimizer.zero_grad(set_to_none=True)
            restore()
            self._go_down(step.device, number, failure)
        gradient_norm = self._update(step, number)
        assert losses is not None
        parts = -(-len(window) // self.micro_batch)
        return StepResult(losses=losses, gradient_norm=gradient_norm, images=len(window), micro_batches=parts)

    def _update(self, step: TrainingStep, number: int) -> torch.Tensor:
        """The update's phases; what a failure left undone is tried again once the window's memory is free."""
        failure = None
        for _ in range(3):
            norm, failure = attempt(lambda: step.update(number))
            if norm is not None:
                return norm
            self._note(step.device, "update", number, self.micro_batch, failure)
            free_cached(step.device)
        raise OutOfMemory(f"no memory for the optimizer's update at step {number} ({failure}): go on with --resume")

    def _go_down(self, device: torch.device, number: int, failure: str | None) -> None:
        free_cached(device)
        smaller = self.micro_batch if self._same_again else -(-self.micro_batch // 2)
        if not self._same_again and self.micro_batch == 1:
            raise OutOfMemory(
                f"one image does not fit the memory at step {number} ({failure or 'on another rank'}): lower --resolution, "
                "--groups or --num-queries, or add --checkpointing"
            )
        self._note(device, "window", number, smaller, failure)
        self._same_again = not self._same_again
        self.micro_batch = smaller

    def _note(self, device: torch.device, where: str, number: int, smaller: int, failure: str | None) -> None:
        on_gpu = device.type == "cuda"
        self.survived.append(
            Survival(
                step=number,
                where=where,
                micro_batch=self.micro_batch,
                next_micro_batch=smaller,
                allocated_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else 0,
                reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else 0,
                message=failure or "",
            )
        )


def survival_line(event: Survival) -> str:
    """One line for the user."""
    what = "tried again" if event.next_micro_batch == event.micro_batch else f"micro-batch now {event.next_micro_batch}"
    why = event.message or "another rank ran out of memory"
    return f"out of memory at step {event.step + 1} ({event.where}, micro-batch {event.micro_batch}): {what}; {why}"


def free_cached(device: torch.device) -> None:
    """Drop dead cycles, and give unused cached memory back to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
