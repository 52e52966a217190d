"""Flags of other programs that people type: answered with ours, in one line."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from trainfit.errors import TrainfitError

ANSWERS: Mapping[str, str] = {
    "--batch-size": "images of one forward are --micro-batch {}, images of an optimizer step --effective-batch {}",
    "--grad-accum-steps": "that is --accumulation {}; with --effective-batch N instead, the accumulation follows",
    "--gradient-accumulation-steps": "that is --accumulation {}; with --effective-batch N instead, the accumulation follows",
    "--imgsz": "the size of the input is --resolution {}",
    "--img-size": "the size of the input is --resolution {}",
    "--image-size": "the size of the input is --resolution {}",
    "--classes": "to train on some of the classes give --only-classes {}; their number follows from the data",
    "--num-classes": "the number of classes follows from the data: leave it out",
    "--patience": "that is --early-stopping {}",
    "--early-stopping-patience": "that is --early-stopping {}",
    "--lr0": "the learning rate is --lr {}",
    "--learning-rate": "the learning rate is --lr {}",
    "--output-dir": "the run folder is --out {}",
    "--project": "the run folder is --out {}",
    "--dataset-dir": "the data set is --data {}",
    "--num-workers": "loader processes are --workers {}",
    "--amp": "mixed precision is on where the GPU has it: --precision fp32 turns it off",
    "--fp16": "that is --precision fp16",
    "--bf16": "that is --precision bf16",
    "--gradient-checkpointing": "that is --checkpointing all, or a number of blocks",
    "--use-ema": "that is --ema, or --no-ema",
    "--pretrain-weights": "that is --weights {}",
    "--pretrained": "that is --weights pretrained, and the default where upstream has weights",
    "--devices": "one process trains on one GPU: torchrun --nproc-per-node {} -m trainfit train ... takes several",
    "--nproc-per-node": "that is torchrun's: torchrun --nproc-per-node {} -m trainfit train ...",
}
"""Flag that no command has -> what to give instead; `{}` is the value that was typed."""
OF_TRAINING = ("--classes", "--device")
"""Flags that other commands have, with another meaning or more values."""
COMMANDS = ("plan", "train", "predict", "measure")
DEVICES = ("auto", "cpu", "cuda")


def answer_foreign_flags(words: Sequence[str]) -> None:
    """Refuse flags of other programs in a command line about a model, with ours.

    Raises:
        TrainfitError: with the first of them.
    """
    if not words or words[0] not in COMMANDS:
        return
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.replace("_", "-").partition("=") if word.startswith("--") else (word, "", "")
        if not equals and not after.startswith("-"):
            value = after
        if name in OF_TRAINING and words[0] != "train":
            continue
        if name == "--device" and value and value not in DEVICES:
            raise TrainfitError(_other_device(value))
        if name in ANSWERS:
            raise TrainfitError(f"{name}: {ANSWERS[name].format(*[value or 'N'] * 2)}")


def _other_device(value: str) -> str:
    """What to give for a device that is written as another program takes it."""
    number = value.removeprefix("cuda").lstrip(":")
    if not number:
        return f"--device {value} is one of {', '.join(DEVICES)}"
    if all(part.strip().isdigit() for part in number.split(",")):
        count = len(number.split(","))
        launch = "trainfit train" if count == 1 else f"torchrun --nproc-per-node {count} -m trainfit train"
        return f"--device {value}: choose GPUs by CUDA_VISIBLE_DEVICES={number} {launch} ..., and leave --device out"
    return f"--device {value}: trainfit trains on NVIDIA GPUs (cuda) and on the CPU: --device cuda or --device cpu"
