"""A validation split held out of the training records, for data sets that have none."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from trainfit.errors import TrainfitError
from trainfit.tasks.findings import Finding


class Numbered(Protocol):
    """A record of a data set."""

    @property
    def id(self) -> int:
        """Unique in its split."""
        ...


Item = TypeVar("Item", bound=Numbered)


def hold_out(
    train: Sequence[Item], fraction: float, seed: int, *, root: Path, key: Callable[[Item], bytes], remark: str = ""
) -> tuple[tuple[Item, ...], tuple[Item, ...], Finding]:
    """Hold out max(1, round(fraction * n)) records, chosen by `seed` and name; returns (train, val, a finding for the user).

    They are ranked by a hash, so that the choice does not depend on the order of the records or on added ones.

    Args:
        train: The training records.
        fraction: Share that is held out.
        seed: Which ones follow from it.
        root: The data set, for messages.
        key: What names a record.
        remark: Ends the finding's message.

    Raises:
        TrainfitError: there are fewer than two records, or the fraction does not lie between 0 and 1.
    """
    if not 0 < fraction < 1 or len(train) < 2:
        raise TrainfitError(
            f"{root}: no val split, and {fraction:g} of {len(train)} images cannot be held out; "
            "give a val split, or at least two images and a fraction between 0 and 1"
        )
    ranked = sorted(train, key=lambda record: hashlib.sha256(f"{seed} ".encode() + key(record)).digest())
    count = min(len(train) - 1, max(1, round(fraction * len(train))))
    val_ids = {record.id for record in ranked[:count]}
    message = f"no usable val split: {len(val_ids)} of the {len(train)} train images are held out for it (seed {seed}){remark}"
    finding = Finding(severity="note", kind="val held out", where="train", message=message)
    remaining = tuple(record for record in train if record.id not in val_ids)
    val = tuple(record for record in train if record.id in val_ids)
    return remaining, val, finding
