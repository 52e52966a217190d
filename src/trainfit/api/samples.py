"""`samples_page`: the samples of a data set as a model sees them. torch is imported when it is called."""

from typing import TYPE_CHECKING

from trainfit.errors import TrainfitError
from trainfit.models.family import families, family_of
from trainfit.models.setting import make_setting

if TYPE_CHECKING:
    from trainfit.tasks.task import DataCheck


def samples_page(
    check: "DataCheck",
    *,
    task: str,
    model: str | None = None,
    augment: str = "default",
    split: str = "train",
    count: int = 12,
    seed: int = 0,
) -> str:
    """An HTML page of samples as training makes them of a checked data set: `trainfit check-data --show`.

    Args:
        check: What `check_data` returned.
        task: What the data are for.
        model: The model that sees them; one of the task's unless given.
        augment: As `trainfit train --augment`.
        split: Which records are shown.
        count: How many records, spread over the split.
        seed: As `trainfit train --seed`: the draws are those of its first epochs.

    Raises:
        TrainfitError: no such model, augmentation or split, or nothing can be shown.
    """
    from trainfit.models.build import build_trainable
    from trainfit.reports.samples_html import samples_html
    from trainfit.tasks.augment import parse
    from trainfit.tasks.transforms import user_transform
    from trainfit.training.preview import previews

    family, name = family_of(model or default_model(task))
    if family.task != task:
        raise TrainfitError(f"--model {model}: its task is {family.task}, the data are for {task}")
    if split not in check.splits:
        raise TrainfitError(f"the data set has no split {split!r}: one of {', '.join(check.splits)}")
    augmentation = parse(augment, family.augments)
    if augmentation.function:
        user_transform(augmentation.function)
    classes: tuple[str, ...] = check.dataset.classes
    setting = make_setting(name, **({"classes": len(classes)} if classes else {}))
    workload = build_trainable(setting, classes)
    shown = previews(check.splits[split], classes, workload, augmentation, count=count, seed=seed)
    lines = [
        f"{len(shown)} of the {len(check.splits[split])} records of the split {split} as {name} sees them with "
        f"--augment {augment}: each without augmentation, and as the first epochs of a training with --seed {seed} draw it.",
        "Training may draw another size for each window; what is normalised afterwards is not shown.",
    ]
    return samples_html(shown, classes, title=f"{check.title}", lines=lines)


def default_model(task: str) -> str:
    """A model of the task that has a name of its own.

    Raises:
        TrainfitError: the task's models are an open set.
    """
    own = [family for family in families().values() if family.task == task]
    named = [name for family in reversed(own) for name in family.models if ":" not in name]
    if named:
        return named[0]
    pattern = next((name for family in own for name in family.models), "MODEL")
    raise TrainfitError(f"--show needs the model that sees the images: give --model {pattern}")
