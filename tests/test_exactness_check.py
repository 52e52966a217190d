"""A user's own loop is checked against itself with every window as one batch, and the cause of a difference is named."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # pyright: ignore[reportPrivateUsage]

import exactness_cases as cases
import trainfit
from conftest import run
from exactness_cases import CORRECT, FAULTS
from trainfit.exactness.observe import Watch
from trainfit.exactness.processes import run_ranks
from trainfit.exactness.runs import Runner, numbers, whole, windows_of

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    cause, make = FAULTS[name]
    result = trainfit.check_exactness(make())
    assert result.causes == (cause,), result.findings
    assert "\n" not in result.findings[0].explanation


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_loop_is_silent(name: str) -> None:
    result = trainfit.check_exactness(CORRECT[name]())
    assert result.exact, result.findings
    assert result.groups
    assert max(group.relative_error for group in result.groups) < 1e-12


def test_the_gradients_compared_are_those_of_plain_pytorch() -> None:
    """What is recorded of the reference is what autograd gives for the window as one batch, in float64."""
    loop = cases.loop(cases.plain())
    runner = Runner(loop, micro_batch=2, double=True)
    windows = windows_of(loop.items, micro_batch=2, accumulation=4)
    recorded = runner.run(whole(windows), accumulation=1).windows[1].gradients
    model = cases.small().double()
    model.load_state_dict(runner.state)
    items = loop.items[8:16]
    images = torch.stack([image for image, _ in items]).double()
    cross_entropy(model(images), torch.tensor([label for _, label in items])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(recorded[name], parameter.grad, rtol=1e-12, atol=0)


def test_the_error_is_that_of_the_two_gradients() -> None:
    """Losses of three micro-batches that are added are three times the mean: an error of 2."""
    loop = cases.loop(cases.plain(add=True), items=cases.images(6))
    (group,) = trainfit.check_exactness(loop, micro_batch=2, accumulation=3).groups
    assert group.relative_error == pytest.approx(2, abs=1e-12)


def test_several_causes_are_told_apart() -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 1),
            torch.nn.BatchNorm2d(4),
            torch.nn.Dropout(0.2),
            torch.nn.Conv2d(4, cases.CLASSES, 1),
        )

    loop = cases.loop(cases.plain(cases.valid_pixels), model=model, items=cases.pixels(20))
    assert trainfit.check_exactness(loop).causes == ("BatchNorm", "RNG", "ignored labels")


def test_ignored_labels_and_a_wrongly_weighted_short_window_are_both_named() -> None:
    result = trainfit.check_exactness(
        cases.loop(cases.plain(cases.valid_pixels, fixed_divisor=True), model=cases.dense, items=cases.pixels(20))
    )
    assert result.causes == ("ignored labels", "short last window")
    assert "its gradient is 0.5 of what it is by itself: it has 2 micro-batches" in result.findings[1].explanation


def test_ranks_that_exchange_too_early_are_named() -> None:
    assert trainfit.check_exactness(cases.ddp_case, ranks=2).exact
    assert trainfit.check_exactness(cases.ddp_first, ranks=2).causes[0] == "not synchronised"


def waits_for_nobody(_model: torch.nn.Module, _batches: Any, _accumulation: int) -> None:
    if torch.distributed.get_rank() == 1:
        time.sleep(600)
    torch.distributed.barrier()


def make_waiting() -> trainfit.OwnLoop:
    return cases.loop(waits_for_nobody)


def test_ranks_that_stand_still_are_ended_with_the_place() -> None:
    windows = windows_of(cases.images(16), micro_batch=4, accumulation=4)
    with pytest.raises(trainfit.TrainfitError, match="the ranks did not end within 20 s: rank 0 in ") as caught:
        run_ranks(make_waiting, windows, ranks=2, accumulation=4, double=True, timeout_s=20)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_behind() -> None:
    before = (torch.autograd.backward, torch.get_default_dtype(), torch.get_rng_state(), torch.amp.GradScaler.__init__)
    trainfit.check_exactness(cases.loop(cases.plain(scaler=True)))
    after = (torch.autograd.backward, torch.get_default_dtype(), torch.get_rng_state(), torch.amp.GradScaler.__init__)
    assert before[0] is after[0]
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert before[3] is after[3]


def replaced_in_torch() -> dict[str, Any]:
    """What a run of a loop may replace in torch or add to it, by name: values, and the numbers of global hooks."""
    owners: tuple[Any, ...] = (
        *(torch.autograd, torch.autocast, torch.nn.utils, clip_grad, torch.amp.GradScaler, AveragedModel),
        *(torch.nn.parallel.DistributedDataParallel, *schedulers(LRScheduler)),
    )
    values = {f"{owner.__name__}.{name}": value for owner in owners for name, value in vars(owner).items()}
    for place in map(import_module, ("torch.nn.modules.module", "torch.optim.optimizer")):
        hooks = {name: value for name, value in vars(place).items() if name.startswith("_global_")}
        values |= {name: len(value) for name, value in hooks.items() if isinstance(value, dict)}
    values["modes"] = len(_get_current_dispatch_mode_stack())
    return values | {"dtype": torch.get_default_dtype(), "random": random.getstate()[1]}


def run_watched(watch: Watch, loop: Callable[[], None]) -> None:
    with numbers(seed=0, double=True), watch.watching():
        loop()


def schedulers(kind: Any) -> list[Any]:
    return [kind, *(each for below in kind.__subclasses__() for each in schedulers(below))]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError, trainfit.TrainfitError])
@pytest.mark.parametrize("where", ["forward", "backward", "step", "loop"])
def test_torch_is_as_before_however_a_loop_ends(where: str, error: type[BaseException]) -> None:
    """Also a BatchNorm whose statistics are frozen for the run, which the error leaves in the middle of its forward."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = replaced_in_torch()

    def stop(*_arguments: Any) -> None:
        raise error

    watch = Watch(model, mute=True, freeze_norms=True)

    def loop() -> None:
        assert replaced_in_torch() != before
        model.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if where == "forward":
            model[1].register_forward_hook(stop)
        loss = model(torch.ones(4, 2, dtype=torch.float64)).sum()
        if where == "backward":
            loss.register_hook(stop)
        loss.backward()
        if where == "step":
            optimizer.register_step_pre_hook(stop)
        optimizer.step()
        stop()

    with pytest.raises(error):
        run_watched(watch, loop)
    after = replaced_in_torch()
    assert [name for name, value in before.items() if after.get(name) is not value and after.get(name) != value] == []
    assert [
        name for name in after.keys() - before.keys() if not isinstance(after[name], ModuleType)
    ] == []  # imported late
    assert model[1].training
    assert model[1].running_mean is not None


def never_steps(model: torch.nn.Module, batches: Any, _accumulation: int) -> None:
    for batch in batches:
        cases.cross_entropy(model, batch).backward()


def broken(_model: torch.nn.Module, _batches: Any, _accumulation: int) -> None:
    raise KeyError("image")


@pytest.mark.parametrize(
    ("loop", "options", "message"),
    [
        (lambda: cases.loop(never_steps), {}, "never stepped a torch optimizer"),
        (lambda: cases.loop(broken), {}, "the loop raised KeyError with accumulation 1"),
        (lambda: cases.loop(cases.plain(), items=cases.images(3)), {}, "needs 8: give more items"),
        (lambda: cases.loop(cases.plain()), {"accumulation": 1}, "they must be at least 1, 2 and 1"),
        (lambda: 3, {}, "must return a trainfit.OwnLoop"),
        ("nomodule:check", {}, "run in the folder that holds nomodule.py"),
        ("exactness_cases:nothing", {}, "has no attribute 'nothing'"),
        ("exactness_cases", {}, "write module:function"),
    ],
)
def test_what_a_user_can_repair_is_one_line(loop: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(trainfit.TrainfitError) as caught:
        trainfit.check_exactness(loop, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    assert run("check-exactness", "own_loop:check", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact"]
    assert result["groups"][0]["relative_error"] < 1e-12
    assert run("check-exactness", "own_loop:check_naive") == 1
    text = capsys.readouterr().out
    assert text.startswith("not exact (micro-batch 2 x 4, 3 windows)")
    assert "ignored labels: micro-batches weigh" in text
    assert "short last window" in text


def test_the_example_runs() -> None:
    script = ROOT / "examples" / "own_loop.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("check: exact\ncheck_naive: ('short last window', 'ignored labels')")
