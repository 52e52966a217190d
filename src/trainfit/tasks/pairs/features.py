"""Features of an evaluation on the disk, so that memory does not grow with the data set."""

import tempfile
import weakref
from collections.abc import Iterator

import numpy as np
import torch

BLOCK = 4096
"""Rows that are in memory at a time."""


class FeatureStore:
    """Rows of features with a whole number each, in a temporary file without a name."""

    def __init__(self) -> None:
        """Start without rows."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the store
        weakref.finalize(self, self._file.close)
        self.numbers: list[int] = []
        self.width = 0

    def __len__(self) -> int:
        """Rows so far."""
        return len(self.numbers)

    def add(self, rows: torch.Tensor, number: int) -> None:
        """Append float32 rows (n, d) that all have this number."""
        self.width = rows.shape[1]
        self._file.write(rows.contiguous().numpy().tobytes())
        self.numbers += [number] * len(rows)

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(rows (n, d), their numbers (n,)), at most `BLOCK` rows at a time, in the order of `add`."""
        for start in range(0, len(self), BLOCK):
            yield self.block(start)

    def block(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows from `start` on, at most `BLOCK`; none beyond the end."""
        numbers = torch.tensor(self.numbers[start : start + BLOCK], dtype=torch.int64)
        self._file.seek(start * self.width * 4)
        content = self._file.read(len(numbers) * self.width * 4)
        rows = np.frombuffer(content, np.float32).reshape(len(numbers), self.width) if content else None
        return torch.zeros((0, self.width)) if rows is None else torch.from_numpy(rows.copy()), numbers
