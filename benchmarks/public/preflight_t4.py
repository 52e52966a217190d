"""The runs of torch-preflight on a T4 (torch 2.11, CUDA 12.8): ResNet-50 and three language models, autocast, AdamW.

autocast's type is not recorded. The script takes bfloat16 where `torch.cuda.is_bf16_supported()`, and that is true of a
T4 in torch 2.11, which counts emulation: so bfloat16 here.
"""

from typing import Any

import torch
import torchvision
from benchmarks.public.rows import DATA, Case, Row, records

CARD, CAPABILITY = "T4", (7, 5)


class Step:
    """Their step: inputs made once, gradients dropped first, forward and loss under autocast."""

    ema, blocks = None, 0

    def __init__(self, device: torch.device, model: str, batch: int, length: int) -> None:
        """Build model, optimizer and inputs on `device`."""
        self.name = model
        self.model: Any = network(model).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        if model == "resnet50":
            self.images = torch.randn(batch, 3, length, length, device=device)
            self.labels = torch.zeros(batch, dtype=torch.int64, device=device)
        else:
            self.ids = torch.zeros(batch, length, dtype=torch.int64, device=device)

    def run(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _out = (
                self._loss()
            )  # the script's `out` lives as long: logits and keys and values of a language model
        loss.backward()
        self.optimizer.step()

    def _loss(self) -> tuple[torch.Tensor, Any]:
        if self.name == "resnet50":
            return torch.nn.functional.cross_entropy(self.model(self.images), self.labels), None
        if self.name == "gpt2":
            out = self.model(input_ids=self.ids, labels=self.ids)
            return out.loss, out
        out = self.model(input_ids=self.ids)
        return out.last_hidden_state.float().pow(2).mean(), out


build = Step


def network(name: str) -> torch.nn.Module:
    """The model of a name, with weights of any values."""
    if name == "resnet50":
        return torchvision.models.resnet50()
    import transformers

    made = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        "bert-base-uncased": lambda: transformers.BertModel(transformers.BertConfig()),
        "distilbert-base-uncased": lambda: transformers.DistilBertModel(transformers.DistilBertConfig()),
    }
    return made[name]()


def rows() -> list[Row]:
    """One a figure; the contexts are rows of their own."""
    return [_row(record) for record in records(DATA / "public_memory/preflight_t4.jsonl")]


def _row(record: dict[str, Any]) -> Row:
    model = record["model"]
    common: dict[str, Any] = {"source": "preflight_t4", "card": CARD, "measured_mib": record["value_mib"]}
    if record["quantity"] == "context":
        return Row(**common, group="context", name=record["note"][:60], quantity="context")
    batch, length = record["micro_batch"], int(record["resolution"].split("x")[0].removeprefix("seq "))
    return Row(
        **common,
        group="dense CNN" if model == "resnet50" else "language model",
        name=f"{model} {batch} x {length} {record['quantity']}",
        quantity=record["quantity"],
        case=Case(
            source="preflight_t4",
            arguments={"model": model, "batch": batch, "length": length},
            capability=CAPABILITY,
        ),
        batch=batch,
        traced_batch=batch,
        after_step=1,
    )
