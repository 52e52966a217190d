"""The worst window before training: it finds what does not fit, and leaves no trace."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from conftest import rows, run
from test_exact_gradient import Toy, make_sample, toy_objective
from test_oom import make_step
from test_survival import SMALL, TINY, WINDOW, sample_set
from trainfit.errors import OutOfMemory, TrainfitError
from trainfit.models.rfdetr.family import RfDetrSetting
from trainfit.step.terms import LossTerm, Objective
from trainfit.step.training_step import TrainingStep
from trainfit.tasks.detection.samples import ImageDetections, ImageRecord, Sample
from trainfit.tasks.detection.task import worst_first
from trainfit.training import fit, run_folder
from trainfit.training.oom import Halving, Survivor
from trainfit.training.rehearsal import rehearse

CPU = torch.device("cpu")
__all__ = ["sample_set"]


def record(number: int, objects: int, *, crowds: int = 0, width: int = 64, height: int = 64) -> ImageRecord:
    every = objects + crowds
    return ImageRecord(
        id=number,
        path=Path(f"{number}.png"),
        width=width,
        height=height,
        boxes=np.zeros((every, 4)),
        classes=np.zeros(every, np.int64),
        crowd=np.arange(every) >= objects,
        areas=np.zeros(every),
        segmentations=(None,) * every,
        object_ids=np.arange(every),
    )


RECORDS = [
    record(0, 2),
    record(1, 9),
    record(2, 0, crowds=50),
    record(3, 1, width=640),
    record(4, 5),
    record(5, 12),  # cannot be decoded
    record(6, 7, height=600),
]


def test_the_worst_come_first() -> None:
    assert [r.id for r in worst_first(RECORDS)] == [3, 5, 1, 6, 4, 0, 2]


class ToyWorkload:
    """What a rehearsal asks of a workload; notes what it was asked."""

    eval_size = 32
    setting = RfDetrSetting(model="rfdetr-nano")  # one group

    def __init__(self, most_detected: int = 100) -> None:
        self.decoded: list[tuple[int, int]] = []
        self.detected: list[int] = []
        self.most_detected = most_detected

    def decoder(self) -> Any:
        def decode(record: ImageRecord, *, size: int, augment: AbstractSet[str], generator: torch.Generator) -> Sample:
            assert not augment
            torch.rand((), generator=generator)
            if record.id == 5:
                raise TrainfitError("5.png: truncated")
            self.decoded.append((record.id, size))
            return make_sample(int((~record.crowd).sum()), record.id)

        return decode

    def outputs(self, model: torch.nn.Module, samples: Sequence[Sample]) -> list[ImageDetections]:
        assert not model.training
        self.detected.append(len(samples))
        if len(samples) > self.most_detected:
            raise torch.OutOfMemoryError(SMALL)
        model(torch.stack([s.image for s in samples]).double())
        torch.rand(3)
        nothing = torch.zeros(0)
        return [
            ImageDetections(image_id=s.image_id, boxes=nothing.reshape(0, 4), scores=nothing, classes=nothing.long())
            for s in samples
        ]


class Noisy(torch.nn.Module):
    """Running statistics, a negative zero, dropout: all that a careless rehearsal would change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.toy = torch.nn.BatchNorm2d(3, dtype=torch.float64), torch.nn.Dropout(0.2), Toy()
        self.zero = torch.nn.Parameter(torch.tensor([-0.0, 1.0], dtype=torch.float64))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.get_buffer("hidden").add_(1)
        return self.toy(self.drop(self.norm(images))) * self.zero.sum()


def noisy_step(most: int = 100, optimizer: str = "adamw") -> TrainingStep:
    inner = toy_objective("targets")

    def terms(model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
        if len(samples) > most:
            raise torch.OutOfMemoryError(SMALL)
        return inner.terms(model, samples, canvas)

    torch.manual_seed(4)
    step = make_step(Noisy(), Objective(terms=terms, counts=inner.counts))
    if optimizer == "sgd":  # makes its state in the first step
        step = TrainingStep(
            model=step.model,
            objective=step.objective,
            optimizer=torch.optim.SGD(step.model.parameters(), lr=0.1, momentum=0.9),
            device=CPU,
            ema=step.ema,
        )
    return step


def bits(step: TrainingStep) -> dict[str, Any]:
    """Everything that a later window depends on, and the sign of zeros."""
    assert step.ema is not None
    tensors = {**step.model.state_dict(), **{f"ema.{k}": v for k, v in step.ema.state_dict().items()}}
    tensors |= {f"buffer.{k}": v for k, v in step.model.named_buffers()}
    for number, slots in enumerate(step.optimizer.state.values()):
        tensors |= {f"{number}.{k}": v for k, v in slots.items()}
    return {k: v.numpy().tobytes() for k, v in tensors.items()} | {"rng": torch.get_rng_state().numpy().tobytes()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("trained", [0, 2])
def test_it_leaves_no_trace(trained: int, optimizer: str) -> None:
    step, workload, survivor = noisy_step(optimizer=optimizer), ToyWorkload(), Survivor(2)
    for number in range(trained):
        Survivor(2).run(step, WINDOW, number=number)
    before, modes = bits(step), [module.training for module in step.model.modules()]
    rehearse(
        step, survivor, Halving(3, CPU), workload, worst_first(RECORDS), size=48, share=16, number=trained, force=True  # type: ignore[arg-type]
    )  # fmt: skip
    assert bits(step) == before
    assert [module.training for module in step.model.modules()] == modes
    assert all(p.grad is None for p in step.model.parameters())
    assert (survivor.micro_batch, survivor.survived) == (2, [])
    # Two micro-batches of the largest and the most crowded at the largest size, then evaluation at its own.
    assert workload.decoded == [(3, 48), (1, 48), (6, 48), (4, 48), (3, 32), (1, 32), (6, 32)]
    assert workload.detected == [3]
    Survivor(2).run(step, WINDOW, number=trained)
    assert bits(step) != before  # what it does is not nothing


def test_the_ladder_works_before_the_first_window() -> None:
    step, workload, survivor = noisy_step(most=1), ToyWorkload(most_detected=1), Survivor(4)
    before, in_parts = bits(step), Halving(4, CPU, survivor.survived)
    rehearse(step, survivor, in_parts, workload, worst_first(RECORDS), size=48, share=4, number=0, force=True)  # type: ignore[arg-type]
    assert bits(step) == before
    assert (survivor.micro_batch, in_parts.micro_batch) == (1, 1)
    assert [(s.where, s.micro_batch, s.next_micro_batch) for s in survivor.survived] == [
        ("worst window", 4, 2),
        ("worst window", 2, 1),
        ("worst window", 4, 2),
        ("worst window", 2, 1),
    ]
    step = noisy_step(most=0)
    before = bits(step)
    with pytest.raises(OutOfMemory, match=r"step 1 \(worst window\): needs 7\.90 GiB, 7\.60 usable"):
        rehearse(
            step,
            Survivor(2),
            Halving(2, CPU),
            cast(Any, workload),
            worst_first(RECORDS),
            size=48,
            share=4,
            number=0,
            force=True,
        )
    assert bits(step) == before


def test_without_a_gpu_it_does_nothing_unless_forced() -> None:
    workload = ToyWorkload()
    rehearse(noisy_step(), Survivor(2), Halving(2, CPU), workload, worst_first(RECORDS), size=48, share=4, number=0)  # type: ignore[arg-type]
    assert workload.decoded == []


def test_a_rehearsed_run_is_the_run(
    sample_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rfdetr-nano", "--data", sample_set, *TINY, "--effective-batch", 4, "--micro-batch", 2]
    arguments += ["--workers", 0, "--epochs", 1]
    assert run("train", *arguments, "--out", tmp_path / "plain") == 0
    done: list[int] = []

    def forced(*positional: Any, **options: Any) -> None:
        rehearse(*positional, **options, force=True)
        done.append(options["size"])

    monkeypatch.setattr(fit, "rehearse", forced)
    assert run("train", *arguments, "--out", tmp_path / "rehearsed") == 0
    assert done == [64]
    capsys.readouterr()
    assert rows(tmp_path / "rehearsed") == rows(tmp_path / "plain")
    states = [run_folder.load_state(tmp_path / name / run_folder.STATE) for name in ("plain", "rehearsed")]
    for part in ("model", "ema"):
        assert all(torch.equal(v, states[1][part][k]) for k, v in states[0][part].items())
