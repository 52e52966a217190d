"""trainfit check-exactness."""

import json
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, Literal

from trainfit.values import In, Range, require_valid


@dataclass(frozen=True, kw_only=True)
class CheckExactness:
    """Whether a training loop of your own accumulates the gradient of the big batch, and if not, why."""

    loop: Annotated[str, In(positional=True)]
    """module:function of a function without parameters that returns a trainfit.OwnLoop."""
    micro_batch: Annotated[int, Range(1, 100_000)] = 2
    """Items in one micro-batch."""
    accumulation: Annotated[int, Range(2, 100_000)] = 4
    """Micro-batches in one window."""
    ranks: Annotated[int, Range(1, 64)] = 1
    """Processes that share each window, on the CPU: for loops with DistributedDataParallel."""
    precision: Literal["float64", "float32"] = "float64"
    """float32 is for a loop that cannot run in float64."""
    tolerance: Annotated[float | None, Range(0, 1, inside=True)] = None
    """Relative error that counts as rounding; without it, what the number format allows."""
    as_json: bool = False
    """Print JSON (schema 1) instead of text."""


def check_exactness(arguments: CheckExactness, _given: AbstractSet[str]) -> int:
    """Check the gradient of a loop of your own; exit code 1 where it is not exact."""
    from trainfit.exactness.check import check_exactness as check
    from trainfit.reports.exactness import exactness_json, exactness_text

    require_valid(arguments)
    result = check(
        arguments.loop,
        micro_batch=arguments.micro_batch,
        accumulation=arguments.accumulation,
        ranks=arguments.ranks,
        precision=arguments.precision,
        tolerance=arguments.tolerance,
    )
    print(json.dumps(exactness_json(result)) if arguments.as_json else exactness_text(result))
    return 0 if result.exact else 1
