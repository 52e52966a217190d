"""Cases whose traces are composed to any coupled window (`memory.composed`), for `scripts/traces`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from trainfit.files import cache_folder
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory import shipped
from trainfit.memory.composed import is_composed, make_window_traces
from trainfit.memory.priced import Pricer
from trainfit.models.setting import make_setting
from trainfit.step.names import Precision
from trainfit.tracing.trace_cache import TraceRequest

CARDS: dict[tuple[int, int], tuple[str, Precision]] = {(8, 0): ("A100", "bf16"), (7, 5): ("T4", "fp16")}
WORK = cache_folder() / "shipping"
"""What was traced and is not yet packed."""


@dataclass(frozen=True, kw_only=True)
class WindowCase:
    """One setting for one card: training and evaluation of two windows."""

    model: str
    capability: tuple[int, int]
    checkpointing: Any
    points: tuple[()] = ()
    """Micro-batches that are traced for scaling: none."""
    finder: None = None
    """The case that laws are found with: there are none."""

    def requests(self) -> tuple[TraceRequest, TraceRequest]:
        """Of training and of evaluation."""
        card, precision = CARDS[self.capability]
        setting = make_setting(model=self.model, precision=precision, checkpointing=self.checkpointing)
        pricer = Pricer(gpu=find_gpu(card), cache=False)
        return pricer.request(setting, "training"), pricer.request(setting, "evaluation")

    @property
    def folder(self) -> Path:
        """Where its traces wait to be packed."""
        return WORK / self.model / f"{'.'.join(map(str, self.capability))}-{self.checkpointing}"

    def rank(self) -> tuple[int, int, int]:
        """Its place in the order of use: the cards that most people have come first."""
        return 0, list(CARDS).index(self.capability), 0

    @property
    def is_traced(self) -> bool:
        """Whether its traces are there."""
        return self._file.exists()

    @property
    def _file(self) -> Path:
        return self.folder / "windows.json"

    def trace(self) -> str:
        """Trace what is not there."""
        if not self.is_traced:
            made = make_window_traces(self.requests()[0])
            record = {request.part: window and window.to_record() for request, window in made.items()}
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file.with_suffix(".part").write_text(json.dumps(record))
            self._file.with_suffix(".part").replace(self._file)
        return f"{self.model} {self.capability} {self.checkpointing}: two windows"

    def entries(self) -> Iterator[dict[str, str]]:
        """Name -> text of the archive's entry for training and for evaluation; empty where windows cannot be composed."""
        record = json.loads(self._file.read_text()) if self.is_traced else {}
        for request in self.requests():
            window = record.get(request.part)
            yield {shipped.entry_name(request): json.dumps(window, separators=(",", ":"))} if window else {}


def is_window(model: str) -> bool:
    """Whether the traces of a model are composed to any window."""
    return is_composed(make_setting(model=model))


def window_cases(model: str) -> Iterator[WindowCase]:
    """The cases of such a model."""
    for capability, checkpointing in product(CARDS, ("none", "all")):
        yield WindowCase(model=model, capability=capability, checkpointing=checkpointing)
