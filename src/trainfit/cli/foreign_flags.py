"""Flags of other programs that people type: taken as ours where they mean the same, else answered with ours in one line."""

import os
from collections.abc import Callable, Container, Mapping, Sequence

from trainfit.errors import TrainfitError
from trainfit.training.lines import counted
from trainfit.values import flag_words

ALIASES: Mapping[str, tuple[str, ...]] = {
    "--grad-accum-steps": ("--accumulation",),
    "--gradient-accumulation-steps": ("--accumulation",),
    "--imgsz": ("--resolution",),
    "--img-size": ("--resolution",),
    "--image-size": ("--resolution",),
    "--patience": ("--early-stopping",),
    "--early-stopping-patience": ("--early-stopping",),
    "--lr0": ("--lr",),
    "--learning-rate": ("--lr",),
    "--output-dir": ("--out",),
    "--dataset-dir": ("--data",),
    "--num-workers": ("--workers",),
    "--fp16": ("--precision", "fp16"),
    "--bf16": ("--precision", "bf16"),
    "--gradient-checkpointing": ("--checkpointing", "all"),
    "--use-ema": ("--ema",),
    "--pretrain-weights": ("--weights",),
    "--pretrained": ("--weights", "pretrained"),
    "--conf": ("--threshold",),
}
"""Flag that no command has -> ours, and its value where theirs is a switch."""
SWITCHES = {"--use-ema", *(name for name, ours in ALIASES.items() if len(ours) > 1)}
"""Aliases without a value of their own; `True` may stand behind them."""
ANSWERS: Mapping[str, str] = {
    "--batch-size": "images of one forward are --micro-batch {}, images of an optimizer step --effective-batch {}",
    "--batch": "images of one forward are --micro-batch {}, images of an optimizer step --effective-batch {}",
    "--classes": "to train on some of the classes give --only-classes {}; their number follows from the data",
    "--num-classes": "the number of classes follows from the data: leave it out",
    "--project": "the run folder is --out {}",
    "--name": "the run folder is --out {}",
    "--amp": "mixed precision is on where the GPU has it: --precision fp32 turns it off",
    "--devices": "one process trains on one GPU: torchrun --nproc-per-node {} -m trainfit train ... takes several",
    "--nproc-per-node": "that is torchrun's: torchrun --nproc-per-node {} -m trainfit train ...",
    "--source": "images come behind the run, without a flag: trainfit detect RUN {}",
}
"""Flag that no command has -> what to give instead; `{}` is the value that was typed."""
DEVICES = ("auto", "cpu", "cuda")


def with_own_flags(words: Sequence[str], known: Container[str], note: Callable[[str], None]) -> list[str]:
    """A command line with flags of other programs as ours.

    Args:
        words: The command line.
        known: The flags of its command; none of them is foreign, and an alias is one of them.
        note: Called with a line for each flag that is taken as ours.

    Raises:
        TrainfitError: a flag means something else here, or more than one thing.
    """
    result: list[str] = []
    rest = flag_words(words)
    of_window = {"--grad-accum-steps", "--gradient-accumulation-steps", "--accumulation"} & set(rest)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            result.append(word)
            continue
        after = rest[0] if rest and not rest[0].startswith("--") else ""
        if word == "--device" and word in known and after and after not in DEVICES:
            result += ["--device", _cuda(rest.pop(0), note)]
        elif word in known:
            result.append(word)
        elif word in ("--batch-size", "--batch") and of_window and "--micro-batch" in known:
            result.append("--micro-batch")  # beside a number of micro-batches it can mean nothing else
            note(f"{word} is taken as --micro-batch")
        elif word == "--model":
            note("the model comes without a flag: --model is left out")
        elif ALIASES.get(word, ("",))[0] in known:
            ours = ALIASES[word]
            if word in SWITCHES and after.lower() in ("true", "1"):
                rest.pop(0)
            result += ours
            note(f"{word} is taken as {' '.join(ours)}")
        elif word in ANSWERS:
            raise TrainfitError(f"{word}: {ANSWERS[word].format(*[after or 'N'] * 2)}")
        else:
            result.append(word)
    return result


def _cuda(value: str, note: Callable[[str], None]) -> str:
    """`cuda`, with the GPU that `--device` names by number as the only one that this process sees.

    Raises:
        TrainfitError: it names no GPU, or several.
    """
    number = value.removeprefix("cuda").lstrip(":")
    if not number:
        raise TrainfitError(f"--device {value} is one of {', '.join(DEVICES)}")
    parts = [part.strip() for part in number.split(",")]
    if not all(part.isdigit() for part in parts):
        raise TrainfitError(
            f"--device {value}: trainfit trains on NVIDIA GPUs (cuda) and on the CPU: --device cuda or --device cpu"
        )
    if len(parts) > 1 or "LOCAL_RANK" in os.environ:
        launch = f"CUDA_VISIBLE_DEVICES={number} torchrun --nproc-per-node {len(parts)} -m trainfit train ..."
        raise TrainfitError(f"--device {value}: choose GPUs by {launch}, and leave --device out")
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if "CUDA_VISIBLE_DEVICES" in os.environ else None
    if shown is not None and int(number) >= len(shown):
        raise TrainfitError(
            f"--device {value}: CUDA_VISIBLE_DEVICES shows {counted(len(shown), 'GPU')}, numbered from 0"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = number if shown is None else shown[int(number)]
    note(f"--device {value} is taken as CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} and --device cuda")
    return "cuda"
