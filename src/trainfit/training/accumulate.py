"""Exact accumulation for a training loop of the user: counts, scaling, and when to step, and nothing else."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from trainfit.errors import TrainfitError
from trainfit.step import ranks
from trainfit.training.parts import items_in, parts_of

Counts = Callable[[Any], float | torch.Tensor | Mapping[str, float | torch.Tensor]]
"""Batch -> what its loss is a mean over: a number, or a number for each of several loss terms by name."""

CHECKED = 3
"""Windows after which remaining gradients are looked for. Looking waits for the GPU, and a loop that clears them keeps doing
so."""


class Accumulation:
    """The micro-batches of a training loop, grouped into windows whose gradient is that of one big batch.

    Iterate it in place of the loader. It holds the CPU batches of one window at a time, because what normalises a loss
    over a window has to be known before its first backward. Made by `trainfit.accumulate`.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        windows: Callable[[Iterable[Any]], Iterator[Sequence[Any]]],
        *,
        model: torch.nn.Module,
        counts: Counts,
        reduction: Literal["mean", "sum"],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Store the arguments; nothing is read from the loader yet."""
        self.loader = loader
        self.model = model
        self.counts = counts
        self.reduction = reduction
        self.scaler = scaler
        self.complete = False
        """Whether the current micro-batch is the last of its window, after which the optimizer steps."""
        self.index = 0
        """Number of windows whose last micro-batch was given out."""
        self._windows = windows
        self._totals: dict[str, float] = {}
        self._own: dict[str, float] = {}
        self._waiting = False
        self._first = True

    def __iter__(self) -> Iterator[Any]:
        """Yield every micro-batch; `complete` tells whether it ends its window. The last window may be short."""
        for window in self._windows(self.loader):
            own = [_named(self.counts(batch)) for batch in window]
            self._totals = {name: sum(each[name] for each in own) for name in own[0]}
            self._totals = _sum_over_ranks(self._totals, self.model)
            for number, (batch, counts) in enumerate(zip(window, own, strict=True), 1):
                self._require_backward()
                self._own = counts
                self._first = number == 1
                self.complete = number == len(window)
                self._exchange(self.complete)
                self._waiting = True
                yield batch
                self.index += self.complete
        self._require_backward()

    def backward(self, loss: torch.Tensor | Mapping[str, torch.Tensor]) -> None:
        """Backward of this micro-batch's part of the window's loss, scaled by the scaler if there is one.

        Args:
            loss: The micro-batch's loss as `reduction` says, a scalar; or one for each name that `counts` gives.

        Raises:
            TrainfitError: other names than those of the counts, or a mean over nothing.
        """
        terms = {"loss": loss} if isinstance(loss, torch.Tensor) else dict(loss)
        if terms.keys() != self._totals.keys():
            raise TrainfitError(f"losses {sorted(terms)} and counts {sorted(self._totals)} must have the same names")
        if self._first and self.index <= CHECKED:
            self._require_cleared()
        whole = torch.stack([self._share(name, value) for name, value in terms.items()]).sum()
        (self.scaler.scale(whole) if self.scaler is not None else whole).backward()
        self._waiting = self._first = False

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float = 0.0,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> bool:
        """Unscale, clip, step, update the scale, step the scheduler and clear at a window's end; do nothing before it.

        Args:
            optimizer: Steps once a window.
            clip_norm: Largest norm of the window's gradient; 0 turns clipping off.
            scheduler: Steps once after the optimizer, unless an overflow in fp16 skipped the optimizer's step.
            after_step: Called then, for instance to update a moving average.

        Returns:
            Whether the optimizer stepped.
        """
        if not self.complete:
            return False
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        if self.scaler is not None:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        stepped = self.scaler is None or self.scaler.get_scale() >= scale
        if stepped and scheduler is not None:
            scheduler.step()
        if stepped and after_step is not None:
            after_step()
        optimizer.zero_grad(set_to_none=True)
        return stepped

    def _share(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The share of one micro-batch in a term. DDP averages over the ranks, so it is multiplied by their number."""
        total = self._totals[name]
        own = self._own[name]
        copies = ranks.world_size() if _exchanges(self.model) else 1
        if self.reduction == "sum":
            return value * (copies / max(total, 1.0))
        if not own:
            raise TrainfitError(
                f"a micro-batch has a count of 0 for {name!r}, and its mean is none: give sums, with reduction='sum'"
            )
        return value * (copies * own / total)

    def _exchange(self, now: bool) -> None:
        """Let DDP (or FSDP2) exchange gradients only in the window's last micro-batch, its forward included."""
        if isinstance(self.model, torch.nn.parallel.DistributedDataParallel):
            self.model.require_backward_grad_sync = now
        elif hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(now)  # pyright: ignore[reportCallIssue]

    def _require_backward(self) -> None:
        if self._waiting:
            raise TrainfitError(
                "a micro-batch had no backward: call windows.backward(loss) for each, also for a skipped one"
            )

    def _require_cleared(self) -> None:
        """Refuse a window that starts with gradients of the previous one."""
        if self.index and any(p.grad is not None and bool(p.grad.any()) for p in self.model.parameters()):
            raise TrainfitError(
                "gradients of the last window are still there: call windows.update(optimizer), or step and zero_grad where "
                "windows.complete is true"
            )


def accumulate(
    loader: Iterable[Any],
    accumulation: int | None = None,
    *,
    model: torch.nn.Module,
    micro_batch: int | None = None,
    counts: Counts | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    scaler: torch.amp.GradScaler | None = None,
) -> Accumulation:
    """Group a loader's batches into windows, or cut its batches into micro-batches, with the big batch's gradient.

    Args:
        loader: Gives batches. With `accumulation` each is a micro-batch; with `micro_batch` each is a whole window, which
            also has one canvas then.
        accumulation: Batches of one window; the last window may be shorter.
        model: The model, or DDP or FSDP2 around it: gradients are exchanged in a window's last micro-batch alone.
        micro_batch: Items of one micro-batch, of tensors, lists, tuples and dicts with one entry an item; the last may
            be smaller.
        counts: Batch -> what its loss is a mean over: valid pixels, boxes, tokens; without it, its items. Several loss
            terms have a count each by name. Counts are summed over the window and over the ranks.
        reduction: Whether the losses given to `backward` are means over these counts, or sums.
        scaler: For fp16: losses are scaled, and `update` unscales before it clips.

    Raises:
        TrainfitError: neither or both of `accumulation` and `micro_batch`, or less than 1.
    """
    if (accumulation is None) == (micro_batch is None):
        raise TrainfitError(
            "give either accumulation (batches of a window) or micro_batch (items of a part of a batch)"
        )
    size = micro_batch if accumulation is None else accumulation
    assert size is not None
    if size < 1:
        raise TrainfitError(f"accumulation or micro_batch must be at least 1, not {size}")

    def grouped(batches: Iterable[Any]) -> Iterator[Sequence[Any]]:
        window: list[Any] = []
        for batch in batches:
            window.append(batch)
            if len(window) == size:
                yield window
                window = []
        if window:
            yield window

    def cut(batches: Iterable[Any]) -> Iterator[Sequence[Any]]:
        for batch in batches:
            yield parts_of(batch, size)

    return Accumulation(
        loader,
        grouped if accumulation is not None else cut,
        model=model,
        counts=counts or items_in,
        reduction=reduction,
        scaler=scaler,
    )


def _named(count: float | torch.Tensor | Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    named = count if isinstance(count, Mapping) else {"loss": count}
    return {name: float(value) for name, value in named.items()}


def _exchanges(model: torch.nn.Module) -> bool:
    """Whether gradients are averaged over the ranks by the model's wrapper."""
    return isinstance(model, torch.nn.parallel.DistributedDataParallel) or hasattr(model, "set_requires_gradient_sync")


def _sum_over_ranks(counts: Mapping[str, float], model: torch.nn.Module) -> dict[str, float]:
    """Sum counts over the ranks, on the device where the group can: NCCL takes no CPU tensors."""
    if ranks.world_size() == 1:
        return dict(counts)
    device = next(model.parameters()).device if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor([counts[name] for name in sorted(counts)], dtype=torch.float64, device=device)
    with ranks.collective():
        dist.all_reduce(total)
    return dict(zip(sorted(counts), total.tolist(), strict=True))
