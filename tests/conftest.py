"""What several tests need."""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from trainfit.cli import main
from trainfit.memory import shipped
from trainfit.memory.native_loop import native_function
from trainfit.training.run_folder import METRICS

# Threads that wait for each other by spinning make a busy machine up to 30 times slower: one here and in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes says how busy the machine is; tests assert laws.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Nothing is downloaded: training starts from random weights where a test does not name any.
os.environ["TRAINFIT_WEIGHTS"] = "random"

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def shared_data(name: str) -> Path:
    """A real data set beside the checkout, or skip."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not beside this checkout")
    return folder


def run(*arguments: object) -> int:
    """The exit code of a command of the command line."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache out of the tests, but draw the sample set and compile the replay once; tests may forbid processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    native_function()
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models that are so small that threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _unchanged(_: str) -> tuple[str, ...]:
    return ()


@pytest.fixture(autouse=True)
def _as_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traces of the package count as valid, as in a release: an edit of the step would otherwise cost each test that
    plans a built-in model half a minute. Whether they are right is for `test_a_shipped_trace_equals_a_fresh_one`.
    """
    monkeypatch.setattr(shipped, "changes", _unchanged)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    torch.set_num_threads(1)
    gc.freeze()  # the imports' many objects: surviving an error collects garbage, which would go through them each time
    yield
    gc.unfreeze()
