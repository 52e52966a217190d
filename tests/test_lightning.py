"""Lightning's accumulation, against the same trainer with every window as one batch, and with the callback that weights."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import trainfit
from exactness_cases import dense, images, pixels, small

pytest.importorskip("lightning", reason="lightning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]


def module(net: Callable[[], torch.nn.Module], *, by_hand: bool = False) -> Any:
    from lightning.pytorch import LightningModule

    class Small(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.automatic_optimization = not by_hand

        def training_step(self, batch: Any, index: int) -> torch.Tensor:  # noqa: ARG002
            return functional.cross_entropy(self.net(batch[0]), batch[1], ignore_index=255)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Small()


def valid(batch: Any) -> torch.Tensor:
    return (batch[1] != 255).sum()


def check(net: Any, items: Any, counts: Any = None, **arguments: Any) -> trainfit.Exactness:
    from trainfit.integrations.lightning import ExactAccumulation, lightning_loop

    callbacks: Any = list if counts is None else lambda: [ExactAccumulation(counts)]
    return trainfit.check_exactness(lightning_loop(lambda: module(net), items, callbacks=callbacks, **arguments))


def test_lightning_is_exact_for_full_windows_of_equal_counts_alone() -> None:
    assert check(small, images(16)).exact
    short = check(small, images(20))
    assert short.causes == ("short last window",)
    assert "its gradient is 0.5 of the big batch's" in short.findings[0].explanation
    assert check(dense, pixels(16)).causes == ("ignored labels",)


def test_the_callback_makes_any_window_exact() -> None:
    """Short windows, a short last micro-batch, pixels that do not count; clipped behind it."""
    for result in (
        check(small, images(21), len_of, gradient_clip_val=0.01),
        check(dense, pixels(19), valid, gradient_clip_val=0.01),
    ):
        assert result.exact, result.findings
        assert max(group.relative_error for group in result.groups) < 1e-12


def two_ranks() -> trainfit.OwnLoop:
    from trainfit.integrations.lightning import ExactAccumulation, lightning_loop

    return lightning_loop(
        lambda: module(dense), pixels(32), callbacks=lambda: [ExactAccumulation(valid)], gradient_clip_val=0.01
    )


def test_the_callback_is_exact_on_two_ranks() -> None:
    """Lightning's DDP by gloo, every rank with other counts of pixels, against one process with the whole window."""
    result = trainfit.check_exactness(two_ranks, ranks=2)
    assert result.exact, result.findings
    assert result.windows == 2
    assert max(group.relative_error for group in result.groups) < 1e-12


def test_the_check_chooses_the_processes() -> None:
    with pytest.raises(trainfit.TrainfitError, match="leave devices out: check_exactness"):
        check(small, images(16), devices=2, strategy="ddp")


def len_of(batch: Any) -> float:
    return float(len(batch[1]))


def test_what_the_callback_cannot_do_is_one_line() -> None:
    from lightning.pytorch import Trainer

    from trainfit.integrations.lightning import ExactAccumulation

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False}
    data = [torch.utils.data.default_collate(images(2))]
    for make, callback, message in (
        (lambda: module(small), ExactAccumulation(lambda _: 0), "batch 0 has a count of 0"),
        (lambda: module(small, by_hand=True), ExactAccumulation(), "needs automatic optimization"),
    ):
        with pytest.raises(trainfit.TrainfitError, match=message):
            Trainer(callbacks=[callback], **quiet).fit(make(), train_dataloaders=data)


@pytest.mark.parametrize(
    ("name", "causes"),
    [
        ("lightning_windows", "ignored labels, short last window"),
        ("accelerate_windows", "short last window, ignored labels"),
    ],
)
def test_an_example_runs(name: str, causes: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "accelerate_windows":
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    plain, exact = capsys.readouterr().out.splitlines()[-2:]
    assert plain.startswith("plain: exact False")
    assert plain.split(", ", 2)[2] == causes
    assert exact.startswith("exact: exact True")
    assert float(exact.split()[4].rstrip(",")) < 1e-12
