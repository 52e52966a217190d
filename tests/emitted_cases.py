"""Reads what `reports.emit` wrote, as the tools' documents say that it is read; shared with `benchmarks/emit_check.py`."""

import ast
import re
import shlex
from typing import Any

import yaml


def call_arguments(source: str, name: str) -> dict[str, Any]:
    """Keyword arguments of the one call of `name` (or of a method of that name) in a Python snippet."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (call,) = [c for c in calls if ast.unparse(c.func).rpartition(".")[2] == name]
    return {each.arg: ast.literal_eval(each.value) for each in call.keywords if each.arg is not None}


def open_clip_flags(text: str) -> tuple[int, list[str]]:
    """(processes, flags of open_clip_train.main)."""
    words = shlex.split(text)
    return int(words[words.index("--nproc-per-node") + 1]), words[words.index("open_clip_train.main") + 1 :]


def effective_batch(tool: str, text: str) -> int:
    """Images per optimizer step over all GPUs, from the text alone."""
    if tool == "rfdetr":
        made = call_arguments(text, "train")
        return made["batch_size"] * made["grad_accum_steps"] * made.get("devices", 1)
    if tool == "detectron2":
        return yaml.safe_load(text)["SOLVER"]["IMS_PER_BATCH"]
    if tool == "open_clip":
        gpus, flags = open_clip_flags(text)
        return gpus * int(flags[flags.index("--batch-size") + 1]) * int(flags[flags.index("--accum-freq") + 1])
    if tool == "lightning":
        made, loader = call_arguments(text, "Trainer"), call_arguments(text, "DataLoader")
        return loader["batch_size"] * made["accumulate_grad_batches"] * made["devices"]
    if tool == "transformers":
        made = call_arguments(text, "TrainingArguments")
        found = re.search(r"--nproc-per-node (\d+)", text)
        gpus = int(found[1]) if found else 1
        return made["per_device_train_batch_size"] * made["gradient_accumulation_steps"] * gpus
    assert tool == "accelerate"
    steps, batch = re.search(r"ACCUMULATION_STEPS=(\d+)", text), re.search(r"batch_size=(\d+)", text)
    assert steps
    assert batch
    return int(steps[1]) * int(batch[1]) * yaml.safe_load(text)["num_processes"]
