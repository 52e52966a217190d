"""Published rows predicted as a user predicts their own model: `trainfit.predict("module:function")` of a `CustomTask`.

python -m benchmarks.public.through_api [--source xmem] [--cases N] [--out FILE]

The step is trainfit's own (clipping and all), not the script that was measured, and a T4 takes fp16 and its fused attention
where that script took an emulated bfloat16, which has none; `python -m benchmarks.public` traces the scripts themselves. Each
case is traced anew: 10 to 40 s on a core.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from benchmarks.public import preflight_t4, xmem
from benchmarks.public.predictions import quantity_of
from benchmarks.public.rows import Row

import trainfit
from trainfit.gpus.catalogue import MIB, find_gpu

SOURCES = {"preflight_t4": preflight_t4, "xmem": xmem}


def __getattr__(name: str) -> Callable[[trainfit.Setting], trainfit.CustomTask]:
    """The task of a case: "preflight_t4__resnet50__224" or "xmem__vgg16__adam__1000"."""
    source, _, rest = name.partition("__")
    if source not in SOURCES:
        raise AttributeError(name)
    make = {"preflight_t4": _preflight, "xmem": _xmem}[source]
    return lambda _setting: make(*rest.split("__"))


def _preflight(model: str, length: str) -> trainfit.CustomTask:
    side = int(length)
    if model == "resnet50":
        return _classifier(torchvision.models.resnet50, side, partial(torch.optim.AdamW, lr=1e-4))
    ids = torch.zeros(side, dtype=torch.int64)
    kept: list[Any] = []
    known = {"gpt2": "gpt2", "bert": "bert-base-uncased", "distilbert": "distilbert-base-uncased"}

    def loss(network: torch.nn.Module, batch: Any) -> torch.Tensor:
        out = network(input_ids=batch, labels=batch) if model == "gpt2" else network(input_ids=batch)
        kept[:] = [out]  # the measured script's `out` lives until the next step
        return out.loss if model == "gpt2" else out.last_hidden_state.float().pow(2).mean()

    return trainfit.CustomTask(
        build_model=lambda: preflight_t4.network(known[model]), make_sample=lambda _: ids, loss=loss
    )


def _xmem(model: str, optimizer: str, classes: str) -> trainfit.CustomTask:
    build = partial(torchvision.models.get_model, model, weights=None, num_classes=int(classes))
    return _classifier(build, xmem.SIDE, partial(xmem.OPTIMIZERS[optimizer], lr=1e-3))


def _classifier(build: Callable[[], torch.nn.Module], side: int, optimizer: Any) -> trainfit.CustomTask:
    def loss(network: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(batch[0]), batch[1])

    def sample(_: int) -> Any:
        return torch.zeros(3, side, side), torch.tensor(0)

    return trainfit.CustomTask(build_model=build, make_sample=sample, loss=loss, optimizer=optimizer)


def task_name(row: Row) -> str:
    """The model's name for `trainfit.predict`."""
    assert row.case is not None
    a = row.case.arguments
    if row.source == "xmem":
        return f"{__spec__.name if __name__ == '__main__' else __name__}:xmem__{a['model']}__{a['optimizer']}__{a['classes']}"
    model = a["model"].partition("-")[0]
    return f"{__spec__.name if __name__ == '__main__' else __name__}:preflight_t4__{model}__{a['length']}"


def predicted(row: Row) -> tuple[float, float, float]:
    """Mebibytes at least, likeliest and at most of what the row measured."""
    gpu = find_gpu(row.card)
    if row.card_mib is not None:
        gpu = replace(gpu, memory_bytes=int(row.card_mib * MIB))
    precision = "fp32" if row.source == "xmem" else "fp16"
    found = trainfit.predict(
        task_name(row), gpu=gpu, micro_batch=row.batch, precision=precision, optimizer="adamw-foreach", cache=False
    )
    size, likely = quantity_of(row, found.training, gpu)
    return size.low_bytes / MIB, likely / MIB, size.high_bytes / MIB


def chosen(source: str, cases: int) -> Iterator[Row]:
    """Rows that ran, of as many cases, spread evenly over the file."""
    rows = [row for row in SOURCES[source].rows() if row.case is not None and not row.oom]
    names = list(dict.fromkeys((row.case.name, row.batch) for row in rows if row.case is not None))
    kept = {names[n * len(names) // min(cases, len(names))] for n in range(min(cases, len(names)))}
    yield from (row for row in rows if row.case is not None and (row.case.name, row.batch) in kept)


def main() -> None:
    """Predict, print a row each, and the errors' median and largest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", choices=SOURCES, default="preflight_t4")
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="rows whose name begins with this")
    given = parser.parse_args()
    errors: list[float] = []
    inside = 0
    for row in filter(lambda each: each.name.startswith(given.only), chosen(given.source, given.cases)):
        began = time.process_time()
        low, likely, high = predicted(row)
        error = likely / row.measured_mib - 1
        errors.append(error)
        inside += low <= row.measured_mib <= high
        line = f"{row.name:44} {row.quantity:16} {row.measured_mib:8.0f} MiB"
        line += f", predicted {likely:8.0f} ({low:.0f}-{high:.0f}) {error:+.1%}"
        print(f"{line}, {time.process_time() - began:.1f} s here", flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(json.dumps({"row": row.name, "quantity": row.quantity, "error": error}) + "\n")
    sizes = [abs(error) for error in errors]
    print(
        f"{len(errors)} rows: median error {median(sizes):.1%}, largest {max(sizes):.1%}, {inside} inside the interval"
    )


if __name__ == "__main__":
    main()
