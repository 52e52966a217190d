"""The flags of open_clip's trainer as trainfit's; docs/clip.md has the table. Imports no torch."""

from collections.abc import Sequence
from itertools import pairwise

from trainfit.models.clip.names import PREFIX, architectures, match
from trainfit.values import flag_words

RENAMED = {
    "--accum-freq": "--accumulation",
    "--batch-size": "--micro-batch",
    "--train-data": "--data",
    "--wd": "--weight-decay",
    "--warmup": "--warmup-steps",
    "--grad-clip-norm": "--clip-norm",
    "--force-image-size": "--resolution",
    "--pretrained": "--weights",
    "--lr-scheduler": "--schedule",
    "--lock-image-unlocked-groups": "--unlocked-groups",
    "--lock-text-unlocked-layers": "--unlocked-groups",
}
"""Upstream's flag -> ours, the value unchanged. Flags that are spelt alike need no entry."""
SWITCHES = {
    "--grad-checkpointing": ["--checkpointing", "all"],
    "--lock-image": ["--freeze", "image"],
    "--lock-text": ["--freeze", "text"],
    "--siglip": ["--loss", "siglip"],
    "--local-loss": [],
    "--gather-with-grad": [],
    "--lock-image-freeze-bn-stats": [],
    "--lock-text-freeze-layer-norm": [],
}
"""Upstream's switch -> ours. Those without any say how upstream computes a loss that here is computed once, exactly, or what
a frozen tower here always does."""
PRECISIONS = {"amp": "auto", "amp_bf16": "bf16", "amp_bfloat16": "bf16"}
DROPPED = ("--dataset-type", "--loss-dist-impl", "--train-num-samples")
"""Flags whose value is found by looking, or without meaning here."""
COLUMNS = {"--csv-img-key": "filepath", "--csv-caption-key": "title", "--csv-separator": ""}
"""Flags that say how a table is written, and upstream's defaults; the separator is found by looking unless given."""
SCHEDULES = {"const": "step"}


def translate(arguments: Sequence[str]) -> list[str]:
    """`trainfit train clip:ARCH` with upstream's flags -> with ours; anything else comes back as it is.

    `--model ARCH` becomes the model; `--distill-model ARCH --distill-pretrained FILE` becomes `--distill-model ARCH=FILE`.
    """
    words = list(arguments)
    of_upstream = any(before == "--model" and word in architectures() for before, word in pairwise(words))
    if not words or words[0] != "train" or not (of_upstream or any(match(word) for word in words)):
        return words
    remaining = flag_words(words[1:])
    result = ["train"]
    teacher: dict[str, str] = {}
    table: dict[str, str] = {}
    while remaining:
        word = remaining.pop(0)
        value = remaining[0] if remaining else ""
        if word == "--model":
            result.append(f"{PREFIX}{remaining.pop(0)}" if remaining else word)
        elif word in ("--distill-model", "--distill-pretrained") and remaining:
            teacher[word] = remaining.pop(0)
        elif word in COLUMNS and remaining:
            table[word] = remaining.pop(0)
        elif word in DROPPED and remaining:
            remaining.pop(0)
        elif word in SWITCHES:
            result += SWITCHES[word]
        elif word in ("--precision", "--lr-scheduler") and remaining:
            remaining.pop(0)
            result += [RENAMED.get(word, word), {**PRECISIONS, **SCHEDULES}.get(value, value)]
        else:
            result.append(RENAMED.get(word, word))
    if table:
        columns = [value for value in {**COLUMNS, **table}.values() if value]
        result += ["--format", f"table:{','.join(columns)}"]
    if teacher:
        parts = [teacher[flag] for flag in ("--distill-model", "--distill-pretrained") if flag in teacher]
        result += ["--distill-model", "=".join(parts)]
    return result
