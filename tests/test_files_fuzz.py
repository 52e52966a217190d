"""Files that a user or an earlier run hands in: a sample of `benchmarks/fuzz_files.py`, and what odd ones say."""

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import run
from file_corpus import KINDS, TINY, Originals
from file_trial import run_limited
from plan_cases import make_plan
from test_measure import measured, predicted
from trainfit.errors import TrainfitError
from trainfit.files import NotRegularError, read_bytes
from trainfit.measuring import calibration
from trainfit.models.setting import make_setting
from trainfit.planning.plan import read_plan, to_json
from trainfit.tasks.detection.sample_set import write_sample_set
from trainfit.training import run_folder, setup
from trainfit.training.run_files import read_rows
from trainfit.training.saved_state import require_like, require_state

SAMPLE = {"recipe": 3, "log": 3, "state": 2, "plan": 3, "weights": 3}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """A run of two steps, with a state after each, and a plan."""
    folder = tmp_path_factory.mktemp("originals")
    data = write_sample_set(folder / "data", train=6, val=2)
    train = ["train", "rfdetr-nano", "--data", str(data), *TINY, "--max-steps", "2", "--out", str(folder / "run")]
    assert run(*train) == 0
    plan = folder / "plan.json"
    plan.write_text(json.dumps(to_json(make_plan())))
    return Originals(run=folder / "run", data=data, plan=plan, cache=folder / "cache")


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_of_the_corpus_is_accepted_or_named(kind: str, originals: Originals, tmp_path: Path) -> None:
    for number in range(SAMPLE[kind]):
        name = f"gate/{kind}/{number}"
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = KINDS[kind][1](originals, folder, random.Random(zlib.crc32(name.encode())))
        outcome = run_limited(arguments, folder)
        assert outcome.verdict in ("accepted", "named"), f"{name}: {outcome}"
        shutil.rmtree(folder)


# ---- pipes in the place of files


def resume(recipe: Path) -> int:
    return run("train", "--resume", recipe.parent)


def report(recipe: Path) -> int:
    return run("report", recipe.parent)


def train_by_plan(plan: Path) -> int:
    return run("train", "rfdetr-nano", "--data", "sample", "--plan", plan)


def train_from_weights(weights: Path) -> None:
    setup._load(StandIn(), torch.nn.Module(), str(weights))  # pyright: ignore[reportPrivateUsage, reportArgumentType]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("recipe.json", resume),
        ("recipe.json", report),
        ("plan.json", train_by_plan),
        ("metrics.jsonl", read_rows),
        ("state.pt", run_folder.load_state),
        ("weights.pth", train_from_weights),
        ("t4.jsonl", calibration.read),
        ("plan.json", read_plan),
    ],
)
def test_a_pipe_is_named_and_not_waited_for(
    name: str, read: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody writes to the pipe: whoever opens it as a file waits until the test's time is over."""
    pipe = tmp_path / name
    os.mkfifo(pipe)
    try:
        code = read(pipe)
    except TrainfitError as error:
        line = str(error)
    else:
        assert code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(pipe) in line
    assert "not a regular file" in line


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(11))
    assert read_bytes(file, limit=11) == bytes(11)
    with pytest.raises(OSError, match="11 bytes long, and at most 10 are read"):
        read_bytes(file, limit=10)
    with pytest.raises(NotRegularError):
        read_bytes(tmp_path)


# ---- weights that upstream's loader trips over


class StandIn:
    """A workload whose loader fails as rfdetr's `validate_checkpoint_compatibility` does where `patch_size` is a tensor."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def load(self, _model: torch.nn.Module, weights: str) -> list[str]:
        if self.error is not None:
            raise self.error
        return [Path(weights).read_text()]


def test_weights_that_trip_a_loader_are_one_line(tmp_path: Path) -> None:
    ambiguous = RuntimeError("Boolean value of Tensor with more than one value is ambiguous")
    model = torch.nn.Module()
    with pytest.raises(TrainfitError, match=r"--weights a\.pth cannot be loaded \(Boolean value .*take another file"):
        setup._load(StandIn(ambiguous), model, "a.pth")  # pyright: ignore[reportPrivateUsage, reportArgumentType]
    with pytest.raises(torch.OutOfMemoryError):
        setup._load(StandIn(torch.OutOfMemoryError("full")), model, "a.pth")  # pyright: ignore[reportPrivateUsage, reportArgumentType]
    (tmp_path / "file").write_text("loaded")
    assert setup._load(StandIn(), model, str(tmp_path / "file")) == ["loaded"]  # pyright: ignore[reportPrivateUsage, reportArgumentType]


# ---- a saved state


def state() -> dict[str, Any]:
    """A whole state, as small as one can be."""
    ladder = {"asked": 4, "micro_batch": 2, "checkpointing": 0, "larger": 4, "may_rise": 1, "quiet": 3, "same_again": 0}
    return {
        "step": 2,
        "model": {"weight": torch.zeros(2)},
        "ema": None,
        "optimizer": {},
        "scaler": {},
        "best": {"score": 0.5, "step": 2},
        "skipped": ["a.jpg: broken"],
        "survivor": ladder,
        "skipped_windows": 0,
        "pending_evaluation": False,
        "world_size": 1,
    }


ODD_STATES: list[dict[str, Any]] = [
    {"step": -1},
    {"step": True},
    {"step": "x"},
    {"model": {"weight": 3}},
    {"ema": []},
    {"optimizer": None},
    {"best": {}},
    {"best": {"score": "high", "step": 2}},
    {"best": {"score": float("nan"), "step": 2}},
    {"skipped": [None]},
    {"survivor": {"micro_batch": 2}},
    {"survivor": state()["survivor"] | {"micro_batch": 0}},
    {"survivor": state()["survivor"] | {"micro_batch": 5}},
    {"survivor": state()["survivor"] | {"quiet": None}},
    {"skipped_windows": -1},
    {"pending_evaluation": 3},
    {"world_size": 0},
]


def test_a_whole_state_passes() -> None:
    require_state(state())
    require_state(state() | {"best": {"score": None, "step": None}, "ema": {"weight": torch.zeros(2)}})


@pytest.mark.parametrize("change", ODD_STATES, ids=str)
def test_an_odd_state_gives_way_to_the_previous_one(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / run_folder.STATE
    run_folder.save_state(path, state())
    run_folder.save_state(path, state() | change)
    name, remark = run_folder.usable_state(tmp_path, require_state)
    assert name == run_folder.PREVIOUS
    assert f"its {next(iter(change))} has a value" in remark
    assert (tmp_path / run_folder.DAMAGED).exists()


def test_an_optimizer_of_another_structure_is_named_by_place() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], foreach=True)
    parameter.grad = torch.ones(3)
    optimizer.step()
    own = optimizer.state_dict()
    require_like(optimizer.state_dict(), own, "optimizer")
    slots = own["state"][0]
    for place, saved in {
        "optimizer.state.0": own | {"state": {}},
        "optimizer.state.0.exp_avg": own | {"state": {0: slots | {"exp_avg": torch.zeros(2)}}},
        "optimizer.state.0.step": own | {"state": {0: slots | {"step": "x"}}},
        "optimizer.param_groups": own | {"param_groups": []},
        "optimizer.param_groups.0.lr": own | {"param_groups": [own["param_groups"][0] | {"lr": float("nan")}]},
        "optimizer.param_groups.0.betas": own | {"param_groups": [own["param_groups"][0] | {"betas": (0.9,)}]},
        "optimizer.param_groups.0.foreach": own | {"param_groups": [own["param_groups"][0] | {"foreach": None}]},
    }.items():
        with pytest.raises(ValueError, match=f"^{place} is missing or of another shape or type$"):
            require_like(saved, own, "optimizer")


# ---- what was measured on a card


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b'{"made_by": null, "driver": 3}',
        b"[" * 9000,
        b'{"made_by": {}, "driver": "580", "setting": {}, "limit_bytes": null, "row": {"micro_batch": "x"}}',
        "negative",
        "zero",
    ],
    ids=lambda bad: str(bad)[:20],
)
def test_a_bad_line_of_measurements_is_left_out_with_a_warning(
    bad: bytes | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "made_by", lambda: {"torch": "2", "code": "x"})
    file = calibration.stored_at("T4")
    good = asdict(measured(1, 50.0, said=predicted(images_per_s=100.0)))
    odd = {"negative": {"images_per_s": -1.0}, "zero": {"predicted": good["predicted"] | {"reserved_low_bytes": 0}}}

    def line(row: dict[str, Any]) -> dict[str, Any]:
        setting = make_setting("timm:resnet10t").to_json()
        own = {"made_by": calibration.made_by(), "driver": "580", "setting": setting, "limit_bytes": None}
        return {**own, "row": row}

    calibration.append(file, line(good))
    content = json.dumps(line(good | odd[bad])).encode() if isinstance(bad, str) else bad
    file.write_bytes(content + b"\n" + file.read_bytes())
    found = calibration.load("T4")
    assert found is not None
    assert (found.rows, found.time_factor) == (1, 2.0)
    assert caplog.messages == [f"{file}: 1 unreadable line(s) left out"]


def test_measurements_in_a_folder_s_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainfitError, match=r"cannot be read .it is not a regular file.: remove it"):
        calibration.read(tmp_path)
