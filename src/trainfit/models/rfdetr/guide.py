"""The command lines of the RT-DETR-Seg guide's three training scripts, as trainfit's; docs/segmentation.md has the table."""

from collections.abc import Sequence

from trainfit.values import flag_words

FLAGS = {"--batch": "--micro-batch", "--accum": "--accumulation", "--stage1-run": "--weights", "--recipe": "--stage"}
"""The guide's flag -> ours, the value unchanged; --recipe is what --stage was called until version 0.1.
Flags that are spelt alike (--resolution, --num-queries, --workers) need
no entry; `--size S` becomes the model `rtdetr-seg-S`."""


def translate(arguments: Sequence[str]) -> list[str]:
    """`trainfit train` with the guide's flags -> with ours; anything else comes back as it is.

    Underscores and hyphens are the same, and so are `--flag value` and `--flag=value`. `--multi-scale 0|1` becomes a switch.
    """
    if arguments and arguments[0] != "train":
        return ["--stage" if argument == "--recipe" else argument for argument in arguments]
    if not arguments:
        return []
    rest = flag_words(arguments[1:])
    result = ["train"]
    while rest:
        word = rest.pop(0)
        if word == "--size" and rest:
            result.append(f"rtdetr-seg-{rest.pop(0)}")
        elif word == "--multi-scale" and rest and rest[0] in ("0", "1"):
            result.append("--multi-scale" if rest.pop(0) == "1" else "--no-multi-scale")
        else:
            result.append(FLAGS.get(word, word))
    return result
