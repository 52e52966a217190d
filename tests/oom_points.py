"""Out-of-memory errors at random operators of a window and an evaluation: used by a test and by benchmarks/oom_injection.py."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clip_cases import make_case, random_pairs
from small_rcnn import small_rcnn
from test_exact_gradient import make_sample, nano
from test_families import pairs, tiny_clip
from test_oom import FailAt, make_step
from test_update import two_types_step, windows
from trainfit.models.clip import workload as clip
from trainfit.models.images import crowded_sample
from trainfit.models.maskrcnn.family import MaskRcnnSetting
from trainfit.models.maskrcnn.workload import MaskRcnn
from trainfit.models.workload import OptimizerSettings
from trainfit.step.contrastive import Contrastive
from trainfit.step.names import Optimizer
from trainfit.step.training_step import TrainingStep
from trainfit.training.oom import Halving, Survivor
from trainfit.training.rehearsal import keep

NUMBERS = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 0.50 GiB is free."
TAIL = "is reserved by PyTorch but unallocated."
IN_PIECES = (
    f"CUDA out of memory. {NUMBERS} Of the allocated memory 4.00 GiB is allocated by PyTorch, and 2.50 GiB {TAIL}"
)
"""The same cut is tried once more."""
TOO_LITTLE = (
    f"CUDA out of memory. {NUMBERS} Of the allocated memory 6.40 GiB is allocated by PyTorch, and 0.10 GiB {TAIL}"
)
"""The micro-batch is halved."""
MICRO_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny model with a window."""

    step: TrainingStep
    window: Sequence[Any]
    detect: Callable[[torch.nn.Module, Sequence[Any]], list[torch.Tensor]]
    """(model, micro-batch) -> one tensor a sample."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an injected error did."""

    where: str
    split: bool
    """Whether the window was cut otherwise afterwards."""
    error: float
    """Difference of parameters, EMA weights, optimizer state and loss scale, over what the undisturbed window moved them by;
    0 means equal bit for bit."""


def rfdetr(_folder: Any, optimizer: Optimizer, scaler: bool) -> Family:
    """RF-DETR Nano in float64 at 64 px, one group of 30 queries; 3 images, one of them empty."""
    workload, model = nano(groups=1)
    groups = workload.parameter_groups(model, OptimizerSettings())
    step = make_step(model, workload.objective, groups, optimizer=optimizer, scaler=scaler)

    def detect(model: torch.nn.Module, samples: Sequence[Any]) -> list[torch.Tensor]:
        return [found.scores for found in workload.detect(model, samples)]

    return Family(step=step, window=[make_sample(n, i) for i, n in enumerate((0, 3, 5))], detect=detect)


def contrastive(folder: Any, optimizer: Optimizer, scaler: bool) -> Family:
    """CLIP with two-layer towers in float64: a coupled loss."""
    model = tiny_clip(folder, "tiny-oom", {}, dropout=False)
    objective = Contrastive(features=clip.features, rows_loss=clip.rows_loss, chunk_rows=4)
    step = make_step(model, objective, optimizer=optimizer, scaler=scaler)

    def detect(model: torch.nn.Module, samples: Sequence[Any]) -> list[torch.Tensor]:
        return list(clip.features(model, samples)[0])

    return Family(step=step, window=pairs(5), detect=detect)


def maskrcnn(_folder: Any, optimizer: Optimizer, scaler: bool) -> Family:
    """A small Mask R-CNN in float64 at 64 px with random picks; 3 images of three shapes, one of them empty."""
    workload = MaskRcnn(MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=64, max_size=96), ("a", "b", "c"))
    model = small_rcnn()
    groups = workload.parameter_groups(model, OptimizerSettings())
    step = make_step(model, workload.objective, groups, optimizer=optimizer, scaler=scaler)
    shapes = ((64, 96, 3), (64, 80, 0), (96, 64, 2))
    window = [
        dataclasses.replace(crowded_sample(h, w, objects=n, classes=3, masks=True), image_id=number)
        for number, (h, w, n) in enumerate(shapes)
    ]

    def detect(model: torch.nn.Module, samples: Sequence[Any]) -> list[torch.Tensor]:
        return [found.scores for found in workload.outputs(model, samples)]

    return Family(step=step, window=window, detect=detect)


def of_open_clip(kind: str, ratio: float | None, folder: Any, optimizer: Optimizer, scaler: bool) -> Family:
    """A tiny model of open_clip in float64: towers that run one after the other, or CoCa with its caption loss."""
    case = make_case(Path(folder), kind, text_ratio=ratio)
    step = make_step(case.model, case.objective, optimizer=optimizer, scaler=scaler)

    def detect(model: torch.nn.Module, samples: Sequence[Any]) -> list[torch.Tensor]:
        return list(clip.features(model, samples)[0])

    return Family(step=step, window=random_pairs(5), detect=detect)


def two_types(_folder: Any, optimizer: Optimizer, scaler: bool, *, overflow: bool = False) -> Family:
    """Two linear layers of float64 and float32; `overflow`: the loss of the window is infinite."""

    def detect(model: torch.nn.Module, samples: Sequence[Any]) -> list[torch.Tensor]:
        return list(model(torch.stack(list(samples))))

    step = two_types_step(optimizer, scaler=scaler)
    return Family(step=step, window=windows(overflow=overflow)[0], detect=detect)


class Injector:
    """Runs one window and its evaluation again and again from the same state, with an error at a given operator.

    The state is that after one window, so that the optimizer's is not zeros.
    """

    def __init__(self, family: Family) -> None:
        """Run once undisturbed."""
        self.step, self.window, self.detect = family.step, family.window, family.detect
        self.seen: list[tuple[int, int]] = []
        self.mode = FailAt()
        self._record()
        torch.manual_seed(5)
        Survivor(MICRO_BATCH).run(self.step, self.window, number=0)
        self.restore, start = keep(self.step), self._everything()
        self._run(FailAt(), Survivor(MICRO_BATCH))
        self.operators = self.mode.seen
        self.moved = (self._everything() - start).norm()
        self.known, self.known_found, self.known_rng = self._everything(), self.found, torch.get_rng_state()

    def _record(self) -> None:
        """Note which samples a forward with gradients sees, and how many errors there were before."""
        objective: Any = self.step.objective
        if not isinstance(objective, Contrastive):
            counting = objective.count

            def count(*arguments: Any) -> Any:
                assert counting is not None
                counts, terms = counting(*arguments)
                return counts, self._recorded(terms)

            terms = self._recorded(objective.terms)
            self.step.objective = dataclasses.replace(objective, terms=terms, count=counting and count)
        elif callable(objective.features):
            self.step.objective = dataclasses.replace(objective, features=self._recorded(objective.features))
        else:
            *others, last = objective.features
            name = "features" if last.with_terms is None else "with_terms"
            last = dataclasses.replace(last, **{name: self._recorded(getattr(last, name))})
            self.step.objective = dataclasses.replace(objective, features=(*others, last))

    def _recorded(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(model: torch.nn.Module, samples: Sequence[Any], *canvas: Any) -> Any:
            result = inner(model, samples, *canvas)
            if torch.is_grad_enabled():
                self.seen += [(self.mode.failed, id(sample)) for sample in samples]
            return result

        return recorded

    def _run(self, mode: FailAt, survivor: Survivor) -> None:
        self.seen.clear()
        self.mode, in_parts = mode, Halving(MICRO_BATCH, self.step.device, survivor.survived)
        with mode:
            survivor.run(self.step, self.window, number=0)
            self.step.model.eval()
            with torch.no_grad():
                action = partial(self.detect, self.step.model)
                self.found = in_parts(action, self.window[:MICRO_BATCH], step=0, where="evaluation")
        self.step.model.train()

    def _everything(self) -> torch.Tensor:
        assert self.step.ema is not None
        every: list[Any] = [*self.step.model.state_dict().values(), *self.step.ema.state_dict().values()]
        every += [value for own in self.step.optimizer.state.values() for value in own.values()]
        every += [*self.step.scaler.state_dict().values(), self.step.skipped_windows]
        return torch.cat([torch.as_tensor(value, dtype=torch.float64).flatten() for value in every])

    def point(self, number: int, message: str) -> Outcome:
        """Inject an error at operator `number` (from 1); AssertionError where a sample is lost or seen twice."""
        self.restore()
        survivor, mode = Survivor(MICRO_BATCH), FailAt(number, message=message)
        self._run(mode, survivor)
        assert mode.failed == 1
        assert len(survivor.survived) <= 1
        where = survivor.survived[0].where if survivor.survived else "snapshot"  # whose copies then go to the host
        split = survivor.micro_batch != MICRO_BATCH
        assert split == (message == TOO_LITTLE and where == "window")
        last = max(errors for errors, _ in self.seen)
        assert Counter(i for errors, i in self.seen if errors == last) == Counter(map(id, self.window))
        for ours, known in zip(self.found, self.known_found, strict=True):
            tolerance = 1e-9 if ours.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(ours, known, rtol=tolerance, atol=tolerance, equal_nan=True)
        if not split and where != "evaluation":
            assert torch.equal(torch.get_rng_state(), self.known_rng)
        difference = (self._everything() - self.known).norm() / self.moved
        return Outcome(where=where, split=split, error=difference.item())


def outcomes(injector: Injector, points: int, seed: int) -> list[Outcome]:
    """Errors at so many random operators, every other one answered by a smaller micro-batch."""
    drawn = torch.randint(1, injector.operators + 1, (points,), generator=torch.Generator().manual_seed(seed))
    return [injector.point(n, TOO_LITTLE if i % 2 else IN_PIECES) for i, n in enumerate(drawn.tolist())]


def every_operator(injector: Injector) -> list[Outcome]:
    """An error at each operator in turn, answered by the same cut once more."""
    return [injector.point(number, IN_PIECES) for number in range(1, injector.operators + 1)]


FAMILIES: dict[str, Callable[[Any, Optimizer, bool], Family]] = {
    "rfdetr": rfdetr,
    "maskrcnn": maskrcnn,
    "clip": contrastive,
    "clip-towers": partial(of_open_clip, "clip", 2.0),
    "siglip": partial(of_open_clip, "siglip", None),
    "coca": partial(of_open_clip, "coca", None),
    "two-types": two_types,
    "overflow": partial(two_types, overflow=True),
}
"""Builders: (folder for files, optimizer, whether fp16's loss scaler is enabled) -> family."""
