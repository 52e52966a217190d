"""Hugging Face's Trainer: a callback that refuses wrong accumulation, and its loop for `check_exactness`."""

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from trainfit.errors import TrainfitError
from trainfit.exactness.loop import Batches, OwnLoop


class AccumulationCheck(TrainerCallback):
    """Stops a Trainer before its first step if the accumulated gradient would be too large by the number of micro-batches.

    The Trainer does not divide losses of models whose forward takes `**kwargs`: it expects them to divide by
    `num_items_in_batch`. Heads that drop that argument (CLIP's and SigLIP's classifiers, Segformer, UPerNet, DPT in
    transformers 5.23) add the micro-batches' losses up (transformers issue 47688).
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002 - the callback's signature
        """Compare the loss of one batch for two counts, without gradients.

        Raises:
            TrainfitError: the model does not use the count.
        """
        model = given.get("model")
        loader = given.get("train_dataloader")
        if args.gradient_accumulation_steps == 1 or model is None or loader is None:
            return
        if drops_count(model, next(iter(loader))):
            raise TrainfitError(
                f"{type(model).__name__} drops num_items_in_batch, so the Trainer adds the losses of "
                f"{args.gradient_accumulation_steps} micro-batches up instead of taking their mean: set "
                "model.accepts_loss_kwargs = False before the Trainer is made"
            )


def drops_count(model: torch.nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a Trainer would leave the division to the model, and the model's loss is the same for any count."""
    declared: Any = getattr(model, "accepts_loss_kwargs", None)
    parameters = inspect.signature(model.forward).parameters.values()
    takes = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters) if declared is None else bool(declared)
    if not takes or "labels" not in batch:
        return False
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    training = model.training
    model.eval()
    with torch.no_grad():
        losses = [float(model(**inputs, num_items_in_batch=torch.tensor(count)).loss) for count in (1, 10)]
    model.train(training)
    return losses[0] == losses[1]


def trainer_loop(
    make_model: Callable[[], torch.nn.Module],
    items: Sequence[Any],
    *,
    collate: Callable[[list[Any]], Any] = default_collate,
    trainer: type[Trainer] = Trainer,
    **arguments: Any,
) -> OwnLoop:
    """The Trainer's loop as `check_exactness` takes it.

    Args:
        make_model: Makes the model.
        items: Items of the data set, dicts that the model's forward takes.
        collate: Items -> batch, as `data_collator`.
        trainer: A subclass of the Trainer, for instance with a `compute_loss` of its own.
        arguments: Of `TrainingArguments`, for instance `max_grad_norm=1.0`.
    """

    def train(model: torch.nn.Module, batches: Batches, accumulation: int) -> None:
        class Fed(trainer):
            """The Trainer on given batches, in order."""

            def get_train_dataloader(self) -> Any:
                return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]

        with tempfile.TemporaryDirectory() as folder:
            chosen: dict[str, Any] = {
                "report_to": [],
                "save_strategy": "no",
                "num_train_epochs": 1,
                "disable_tqdm": True,
            }
            chosen |= {"logging_strategy": "no", "use_cpu": next(model.parameters()).device.type == "cpu"} | arguments
            settings = TrainingArguments(folder, gradient_accumulation_steps=accumulation, **chosen)
            Fed(model=model, args=settings, train_dataset=batches).train()  # pyright: ignore[reportArgumentType]

    return OwnLoop(model=make_model, items=items, train=train, collate=collate)
