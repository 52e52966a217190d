"""The process that forks for each trace: asked again, with other surroundings, where a fork dies, and when nobody waits."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainfit import process
from trainfit.errors import TrainfitError
from trainfit.tracing import client, server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each trace has a process of its own")


def tells(device: object) -> None:
    """A step's factory: what is around it, as an error."""
    raise TrainfitError(f"{os.getppid()} {os.environ.get('SURROUNDINGS')} {device}")


def dies(device: object) -> None:
    del device
    os.kill(os.getpid(), signal.SIGKILL)


def waits(device: object, note: str) -> None:
    del device
    Path(note).write_text(str(os.getpid()))
    time.sleep(600)


class Evaluated:
    """A step of one parameter, whose evaluation is what a test makes of it; `models.build.FixedStep` in small."""

    ema = None
    blocks = 0

    def __init__(self, device: torch.device, evaluate: Callable[[], object]) -> None:
        self.model = torch.nn.Linear(2, 1).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.device = device
        self.evaluate: Callable[[], object] | None = evaluate
        self.trained = False

    def run(self) -> object:
        if self.trained and self.evaluate is not None:
            return self.evaluate()
        self.trained = True
        self.model(torch.zeros(4, 2, device=self.device)).sum().backward()
        self.optimizer.step()
        return None


def evaluated(device: torch.device, ends: str, note: str = "") -> Evaluated:
    """A factory of a step whose evaluation ends in one of several ways."""

    def evaluate() -> None:
        if ends == "named":
            raise TrainfitError("no such evaluation")
        if ends == "unnamed":
            raise ZeroDivisionError("of pixels")
        if ends == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        Path(note).write_text(str(os.getpid()))
        time.sleep(600)

    return Evaluated(device, evaluate)


def ask(factory: str, *, both: bool = False, **kwargs: Any) -> str:
    """The error that a factory of this file ends with; with `both`, on fake tensors."""
    request = {"factory": f"{__name__}:{factory}", "kwargs": kwargs, "target": {"capability": (8, 0)}, "both": both}
    with pytest.raises(TrainfitError) as caught:
        client.run({**request, "device": "cuda" if both else "cpu", "steps": 2}, "a step")
    return str(caught.value)


def is_gone(pid: int) -> bool:
    for _ in range(500):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_one_process_serves_until_its_surroundings_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURROUNDINGS", "first")
    one, again = ask("tells"), ask("tells")
    assert one == again
    assert one.split()[1:] == ["first", "cpu"]
    monkeypatch.setenv("SURROUNDINGS", "second")
    other = ask("tells").split()
    assert other[1] == "second"
    assert other[0] != one.split()[0]
    assert is_gone(int(one.split()[0]))


def test_a_fork_that_dies_leaves_the_process_as_it_was() -> None:
    before = ask("tells")
    assert ask("dies") == "tracing a step: killed: the machine's own memory may have run out"
    assert ask("tells") == before
    os.kill(int(before.split()[0]), signal.SIGKILL)
    assert ask("tells").split()[0] != before.split()[0]


def test_nothing_goes_on_when_it_is_ended(tmp_path: Path) -> None:
    thread = threading.Thread(target=ask, args=("waits",), kwargs={"note": str(tmp_path / "pid")})
    thread.start()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    server.end()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_ctrl_c_starts_no_process_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the process while that still imports torch; a thread that waits for it must not ask another one."""
    started: list[int] = []
    start: Any = vars(server)["_Server"]

    def note(surroundings: object) -> Any:
        one = start(surroundings)
        started.append(one.process.pid)
        return one

    server.end()
    monkeypatch.setattr(server, "_Server", note)
    errors: list[BaseException] = []

    def trace() -> None:
        try:
            client.run({"factory": f"{__name__}:tells", "kwargs": {}, "device": "cpu", "steps": 2}, "a step")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=trace)
    thread.start()
    while not started:
        time.sleep(0.01)
    process.end_running()
    thread.join(timeout=60)
    assert [type(error) for error in errors] == [KeyboardInterrupt]
    assert all(map(is_gone, started))
    monkeypatch.undo()
    assert ask("tells").endswith("cpu")  # the next request is answered


def test_it_ends_with_who_started_it() -> None:
    code = (
        "import os, signal; from trainfit.tracing import server; "
        "print(server._server().process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert is_gone(int(done.stdout))


def test_it_imports_while_nothing_is_asked_yet() -> None:
    server.end()
    client.prepare()
    prepared = server._servers[0].process.pid  # pyright: ignore[reportPrivateUsage]
    assert ask("tells").split()[0] == str(prepared)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ("named", "no such evaluation"),
        ("unnamed", "tracing a step: exit status 1: ZeroDivisionError: of pixels"),
        ("killed", "tracing a step: killed: the machine's own memory may have run out"),
    ],
)
def test_an_evaluation_that_fails_beside_training_says_why(ends: str, message: str) -> None:
    assert ask("evaluated", both=True, ends=ends).startswith(message)


def test_the_fork_that_evaluates_ends_with_the_process(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    asked = {"both": True, "ends": "waiting", "note": str(note)}
    thread = threading.Thread(target=ask, args=("evaluated",), kwargs=asked)
    thread.start()
    while not note.exists() or not note.read_text():
        time.sleep(0.05)
    server.end()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert is_gone(int(note.read_text()))
