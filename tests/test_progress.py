"""What `plan` and `predict` tell on stderr while they work, on a terminal and elsewhere."""

import io
import time
from dataclasses import replace

import pytest

from trainfit.cli import progress
from trainfit.cli.progress import StatusLine
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory.priced import Pricer
from trainfit.models.setting import Setting, make_setting
from trainfit.planning.nearest import nearest


class Terminal(io.StringIO):
    """A terminal that keeps what was written."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Lines as they stand: a carriage return with the erasing sequence takes the last one away."""
        return [line.rpartition("\r\x1b[2K")[2] for line in self.getvalue().split("\n")]


def test_a_terminal_shows_at_once_what_is_done_and_keeps_what_lasts() -> None:
    stream = Terminal()
    with StatusLine("planning x...", stream) as shown:
        assert stream.screen() == ["0 s: planning x"]
        shown.note("pricing micro-batch 2...")
        assert stream.screen() == ["0 s, 1 done: pricing micro-batch 2"]
        shown.note("provisional: 3 GiB")
        shown.note("pricing micro-batch 4...")
        assert stream.screen() == ["provisional: 3 GiB", "0 s, 2 done: pricing micro-batch 4"]
    assert stream.screen() == ["provisional: 3 GiB", ""]


def test_elsewhere_a_quick_answer_leaves_nothing_and_a_slow_one_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = io.StringIO(), io.StringIO()
    with StatusLine("planning x...", quick) as shown:
        shown.note("pricing...")
        shown.note("provisional: 3 GiB")
    assert quick.getvalue() == ""
    monkeypatch.setattr(progress, "FIRST_S", 0.1)
    with StatusLine("planning x...", slow) as shown:
        shown.note("provisional: 3 GiB")
        time.sleep(0.5)
        assert slow.getvalue().splitlines() == ["provisional: 3 GiB", "0 s: planning x"]


def test_the_nearest_setting_gives_up_as_few_knobs_as_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    covered = make_setting("rfdetr-nano", micro_batch=4, classes=7, precision="bf16")

    def answers(_: Pricer, setting: Setting) -> bool:
        return setting in (covered, replace(covered, checkpointing="all"))

    monkeypatch.setattr(Pricer, "answers", answers)
    pricer = Pricer(gpu=find_gpu("A100"))
    assert nearest(replace(covered, optimizer="sgd"), pricer) == (covered, "--optimizer")
    assert nearest(replace(covered, checkpointing=3), pricer) == (covered, "--checkpointing")
    both = replace(covered, optimizer="sgd", ema=False, checkpointing="all")
    assert nearest(both, pricer) == (replace(covered, checkpointing="all"), "--optimizer, --ema")
    assert nearest(covered, pricer) is None
    assert nearest(replace(covered, classes=8), pricer) is None
