"""Lightning: a callback that makes `accumulate_grad_batches` exact, and its loop for `check_exactness`."""

import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, default_collate

from trainfit.errors import TrainfitError
from trainfit.exactness.loop import Batches, OwnLoop
from trainfit.training.parts import items_in


class ExactAccumulation(Callback):
    """Weights every micro-batch's loss by its count, so that a window's gradient is that of one big batch on all ranks.

    Lightning divides each loss by `accumulate_grad_batches`: a mean of means, and too little in the short last window of an epoch.
    Here a loss that is a mean over `counts(batch)` things is taken as many times, and before the optimizer's step the gradients
    are divided by the window's count over all ranks. Nothing is read ahead. Logged losses stay as they are.

    Known limits: automatic optimization alone, and one count for the whole loss (several losses with counts of their own need
    `trainfit.accumulate`). On several ranks every rank needs as many micro-batches as the others.
    """

    def __init__(self, counts: Callable[[Any], float | torch.Tensor] = items_in) -> None:
        """`counts` gives what the loss of a batch is a mean over, for instance its valid pixels; its items unless given."""
        self.counts = counts
        self._count = 0.0
        self._total = 0.0
        self._unit = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - the callback's signature
        """Begin with an empty window.

        Raises:
            TrainfitError: the module optimizes by hand.
        """
        if not pl_module.automatic_optimization:
            raise TrainfitError(
                "ExactAccumulation needs automatic optimization: take trainfit.accumulate in a loop of your own"
            )
        self._total = self._unit = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count a micro-batch.

        Raises:
            TrainfitError: its count is 0, so that its mean is none.
        """
        self._count = float(self.counts(batch))
        if not self._count > 0:
            raise TrainfitError(
                f"batch {batch_idx} has a count of {self._count:g}, and its mean is none: leave such batches out"
            )
        if not self._unit:  # losses stay near their size, so that fp16's scale does too
            self._unit = self._over_ranks(trainer, pl_module, self._count) / trainer.world_size
        self._total += self._count

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:  # noqa: ARG002
        """Weight the loss, which is Lightning's own quotient of what `training_step` gave."""
        with torch.enable_grad():
            loss.mul_(self._count / self._unit)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Divide the window's gradient by its count; clipping comes later."""
        total = self._over_ranks(trainer, pl_module, self._total)
        factor = trainer.accumulate_grad_batches * trainer.world_size * self._unit / total
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(factor)
        self._total = 0.0

    def _over_ranks(self, trainer: Trainer, module: LightningModule, value: float) -> float:
        on_device = torch.tensor(value, dtype=torch.float32, device=module.device)
        return float(trainer.strategy.reduce(on_device, reduce_op="sum")) if trainer.world_size > 1 else value


@contextmanager
def _silent(name: str) -> Generator[None]:
    """Hold back what a logger and those below it say, errors excepted."""
    loggers = [
        each for each in map(logging.getLogger, [name, *logging.root.manager.loggerDict]) if each.name.startswith(name)
    ]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def lightning_loop(
    make_module: Callable[[], LightningModule],
    items: Sequence[Any],
    *,
    collate: Callable[[list[Any]], Any] = default_collate,
    callbacks: Callable[[], Sequence[Callback]] = list,
    **arguments: Any,
) -> OwnLoop:
    """Lightning's loop as `check_exactness` takes it, in one process or, with its `ranks`, on several by DDP.

    Args:
        make_module: Makes the module.
        items: Items of the data set.
        collate: Items -> batch, as the `DataLoader`'s `collate_fn`.
        callbacks: Makes the Trainer's callbacks, anew for each run.
        arguments: Of the Trainer, for instance `gradient_clip_val=1.0`; `strategy` is used on several ranks alone.

    Raises:
        TrainfitError: the arguments choose the processes, which the check does.
    """
    if chosen := sorted({"devices", "num_nodes", "use_distributed_sampler"} & arguments.keys()):
        # With devices=2 Lightning would start the running program again as the second rank, and wait for it.
        raise TrainfitError(
            f"lightning_loop: leave {', '.join(chosen)} out: check_exactness(..., ranks=N) starts the ranks"
        )

    def train(model: torch.nn.Module, batches: Batches, accumulation: int) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": ranks, "max_epochs": 1}
        quiet |= {"strategy": "ddp"} | arguments if ranks > 1 else arguments | {"strategy": "auto"}
        quiet["use_distributed_sampler"] = False  # the batches are this rank's share
        assert isinstance(model, LightningModule)
        with warnings.catch_warnings(), _silent("lightning.pytorch"):
            warnings.simplefilter("ignore")
            trainer = Trainer(accumulate_grad_batches=accumulation, callbacks=list(callbacks()), **quiet)
            trainer.fit(model, train_dataloaders=DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]

    return OwnLoop(model=make_module, items=items, train=train, collate=collate)
