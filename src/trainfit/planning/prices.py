"""The contract between the search of a plan and what prices its settings."""

from collections.abc import Sequence
from typing import Literal, Protocol

from trainfit.gpus.context import ByteRange
from trainfit.memory.predict import Prediction
from trainfit.models.setting import Setting
from trainfit.timing.roofline import TimeEstimate


class Prices(Protocol):
    """Memory and time of settings on one card; see `memory.priced.Pricer`."""

    def needs(self, setting: Setting) -> ByteRange:
        """The smallest memory that one training process runs in, including its CUDA context."""
        ...

    def least(self, setting: Setting) -> int:
        """A lower bound of the high end of `needs`, computed in a fraction of its time; 0 if that is not possible."""
        ...

    def seconds(
        self, setting: Setting, cuts: Sequence[int], part: Literal["training", "evaluation"] = "training"
    ) -> TimeEstimate:
        """Time of a window cut into micro-batches of `cuts` images."""
        ...

    def predict(self, setting: Setting, cuts: Sequence[int]) -> Prediction:
        """The prediction of training, and of evaluation in the same process."""
        ...

    def blocks(self, setting: Setting) -> int:
        """Number of blocks that activation checkpointing may recompute."""
        ...

    def traces_each(self, setting: Setting) -> bool:
        """Whether every micro-batch of a setting takes a trace of its own."""
        ...

    def known(self, setting: Setting) -> bool:
        """Whether `needs` returns without tracing."""
        ...
