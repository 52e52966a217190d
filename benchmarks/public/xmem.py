"""The runs of xMem (Middleware'25): torchvision's classifiers on CIFAR-10 images of 86 x 86 pixels, float32, two cards.

The step is that of their script (see SOURCE.txt beside the data): optimizers at torch's defaults with lr 1e-3, four
steps, the loss's mean. Where the file does not record the place of `zero_grad` (the older series), it is taken between
loss and backward (mode 1): an assumption, and mode 0 gives nearly the same errors.
"""

from typing import Any

import torch
import torchvision
from benchmarks.public.rows import DATA, Cap, Case, Row, records

from trainfit.gpus.capability import kernel_class
from trainfit.gpus.catalogue import find_gpu

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
CARDS = {"NVIDIA GeForce RTX 3060": "RTX 3060", "NVIDIA GeForce RTX 4060": "RTX 4060"}
GROUPS = {"mnasnet1_0": "mobile CNN", "mobilenet_v3_large": "mobile CNN", "convnext_base": "ConvNeXt"}
TRACED_BATCH = 127
SIDE = 86


class Step:
    """Four steps of the script are four runs of this."""

    ema, blocks = None, 0

    def __init__(self, device: torch.device, model: str, optimizer: str, classes: int, mode: int) -> None:
        """Build model and optimizer on `device`."""
        self.device, self.mode = device, mode
        self.model: Any = torchvision.models.get_model(model, weights=None, num_classes=classes).to(device).train()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr=1e-3)
        self.inputs = self.labels = self.outputs = self.loss = self.largest = None

    def run(self) -> None:
        """One step; what the script calls by plain names lives until it is bound again."""
        self.inputs, self.labels = (
            torch.empty(TRACED_BATCH, 3, SIDE, SIDE),
            torch.zeros(TRACED_BATCH, dtype=torch.int64),
        )
        if self.mode == 0:
            self.optimizer.zero_grad()
        self.inputs, self.labels = self.inputs.to(self.device), self.labels.to(self.device)
        self.outputs = self.model(self.inputs)
        self.loss = torch.nn.functional.cross_entropy(self.outputs, self.labels)
        if self.mode == 1:
            self.optimizer.zero_grad()
        self.loss.backward()
        self.optimizer.step()
        self.largest = torch.max(self.outputs, 1)
        if self.mode == 2:
            self.optimizer.zero_grad()


build = Step


def rows() -> list[Row]:
    """One a run."""
    return [_row(record) for record in records(DATA / "public_memory/xmem.jsonl")]


def _row(record: dict[str, Any]) -> Row:
    model, card = record["model"], CARDS[record["card"]]
    mode = 1 if record["zero_grad_mode"] is None else record["zero_grad_mode"]
    classes = 10 if model in ("mnasnet1_0", "mobilenet_v3_large") else 1000
    capability = kernel_class(find_gpu(card).capability)
    arguments = {"model": model, "optimizer": record["optimizer"], "classes": classes, "mode": mode}
    caps = tuple(Cap(limit_mib=cap["cap_mib"], oom=cap["oom"]) for cap in record["capped_reruns"])
    return Row(
        source="xmem",
        group=GROUPS.get(model, "dense CNN"),
        name=f"{model} {record['optimizer']} {record['micro_batch']}",
        card=card,
        card_mib=record["card_memory_mib"],
        quantity="nvml_minus_start",
        measured_mib=record["value_mib"],
        case=Case(source="xmem", arguments=arguments, capability=capability, steps=4),
        batch=record["micro_batch"],
        traced_batch=TRACED_BATCH,
        oom=record["oom"],
        others_mib={name: record[f"{name.lower()}_est_mib"] for name in ("xMem", "DNNMem", "SchedTune")},
        caps=caps,
    )
