"""fp16's loss scaler: one unscale, clip and step a window; an overflow in one micro-batch skips the window."""

from collections.abc import Mapping, Sequence

import torch

from test_exact_gradient import Toy, make_sample, toy_objective
from test_oom import everything, make_step, toy_step
from trainfit.step.terms import LossTerm, Objective
from trainfit.step.training_step import TrainingStep
from trainfit.tasks.detection.samples import Sample


def scaled(step: TrainingStep) -> TrainingStep:
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return step


def test_scaling_changes_nothing() -> None:
    """A power of two is exact in float64: the same parameters, bit for bit."""
    window = [make_sample(n, i) for i, n in enumerate((0, 3, 6, 2))]
    plain, other = toy_step("targets"), scaled(toy_step("targets"))
    for number in range(3):
        norms = [step.run(window, micro_batch=2, step=number).gradient_norm for step in (plain, other)]
        assert torch.equal(*norms)
    assert all(torch.equal(a, b) for a, b in zip(everything(plain), everything(other), strict=True))


def test_overflow_in_one_micro_batch_skips_the_window_and_halves_the_scale() -> None:
    usual = toy_objective("images")

    def overflows(model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
        term = usual.terms(model, samples, canvas)["loss"]
        factor = float("inf") if samples[0].image_id == 2 else 1.0
        return {"loss": LossTerm(total=term.total * factor, kind="images")}

    step = scaled(make_step(Toy(), Objective(terms=overflows, counts=usual.counts)))
    before = [t.clone() for t in step.model.state_dict().values()]
    window = [make_sample(1, i) for i in range(4)]
    result = step.run(window, micro_batch=2, step=0)
    assert not torch.isfinite(result.gradient_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.state_dict().values(), strict=True))
    assert step.scaler.get_scale() == 2.0**9
    step.run(window[:2], micro_batch=2, step=1)
    assert not all(torch.equal(a, b) for a, b in zip(before, step.model.state_dict().values(), strict=True))
