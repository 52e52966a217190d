"""What several tests need."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Threads that wait for each other by spinning make a busy machine up to 30 times slower: one here and in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def shared_data(name: str) -> Path:
    """A real data set beside the checkout, or skip."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache out of the tests, but draw the sample set once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    torch.set_num_threads(1)
    gc.freeze()  # the imports' many objects: surviving an error collects garbage, which would go through them each time
    yield
    gc.unfreeze()
