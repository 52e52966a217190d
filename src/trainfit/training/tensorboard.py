"""TensorBoard logs, where they are asked for."""

import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError


def event_writer(folder: Path) -> Callable[[Mapping[str, Any], int], None]:
    """A function that writes a row's numbers at a step.

    Raises:
        TrainfitError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainfitError("--tensorboard needs TensorBoard: pip install 'trainfit[tensorboard]'") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(row: Mapping[str, Any], step: int) -> None:
        for key, value in row.items():
            if isinstance(value, numbers.Real) and key != "step":
                writer.add_scalar(key, float(value), step)
        writer.flush()

    return write
