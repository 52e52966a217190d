"""Experiment trackers: what they get, offline, across a resume, and where one fails."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from conftest import run
from trainfit.errors import TrainfitError
from trainfit.training.recipe import make_recipe
from trainfit.training.trackers import TRACKERS, Trackers

ROW = {"step": 3, "loss": 1.5, "epoch": 0, "lr": None, "figures": {"bbox AP": 0.5}, "score_name": "AP", "bbox_ap": 0.5}
FIGURES = {"loss": 1.5, "epoch": 0.0, "bbox_ap": 0.5}


class Service:
    """What `wandb` and `trackio` are as modules and as runs: it keeps what it is given."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0
        self.fails = False
        self.id = "id-1"

    def init(self, **options: Any) -> "Service":
        if self.fails:
            raise RuntimeError("no account\nand more")
        self.started.append(options)
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("the line is down")
        self.logged.append((figures, step))

    def finish(self) -> None:
        self.finished += 1


class Client:
    """mlflow's client: runs by id."""

    runs: dict[str, dict[str, Any]]
    addresses: list[str]

    def __init__(self, tracking_uri: str) -> None:
        self.addresses.append(tracking_uri)

    def get_experiment_by_name(self, _name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, _experiment: str, run_name: str) -> Any:
        self.runs[run_name] = {"metrics": [], "params": {}, "ended": False}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_name))

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["ended"] = status != "RUNNING"

    def log_param(self, run: str, key: str, value: str) -> None:
        self.runs[run]["params"][key] = value

    def log_metric(self, run: str, key: str, value: float, step: int) -> None:
        self.runs[run]["metrics"].append((key, value, step))

    def set_terminated(self, run: str) -> None:
        self.runs[run]["ended"] = True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # the tracker sets it
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "recipe.json").write_text(json.dumps({"model": "rfdetr-nano", "lr": 0.1}))
    return tmp_path / "run-1"


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_numbers_and_the_same_run_again(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    installed(monkeypatch, name, init=service.init, log=service.log, finish=service.finish)
    for _ in range(2):  # the second is the resumed run
        trackers = Trackers([name], folder, print)
        trackers.log(ROW)
        trackers.close()
    assert service.logged == [(FIGURES, 3)] * 2
    assert service.finished == 2
    first, second = service.started
    assert first["config"] == {"model": "rfdetr-nano", "lr": 0.1}
    assert (first["project"], first["resume"]) == ("trainfit", "allow")
    known = "id" if name == "wandb" else "name"
    assert (first[known], second[known]) == ((None, "id-1") if name == "wandb" else ("run-1", "run-1"))


def test_mlflow_stays_in_the_runs_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Client.runs, Client.addresses = {}, []
    installed(monkeypatch, "mlflow", MlflowClient=Client)
    for _ in range(2):
        trackers = Trackers(["mlflow"], folder, print)
        trackers.log({**ROW, "AP (50 %)": 1.0})
        trackers.close()
    assert set(Client.addresses) == {(folder / "mlruns").as_uri()}
    (one,) = Client.runs.values()
    assert one["metrics"][:4] == [("loss", 1.5, 3), ("epoch", 0.0, 3), ("bbox_ap", 0.5, 3), ("AP _50 __", 1.0, 3)]
    assert len(one["metrics"]) == 8
    assert one["params"] == {"model": "rfdetr-nano", "lr": "0.1"}
    assert one["ended"]


def test_a_service_that_fails_is_noted_and_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    installed(monkeypatch, "wandb", init=service.init)
    notes: list[str] = []
    trackers = Trackers(["wandb"], folder, notes.append)
    service.fails = True
    trackers.log(ROW)
    trackers.log(ROW)
    trackers.close()
    assert notes == ["wandb failed (the line is down): it gets nothing more of this run"]
    with pytest.raises(TrainfitError, match=r"--track wandb cannot start \(no account\): WANDB_MODE=offline"):
        Trackers(["wandb"], folder, print)


def test_what_is_not_installed_or_not_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(TrainfitError, match="--track trackio needs trackio: pip install trackio"):
        Trackers(["trackio"], folder, print)
    assert run("train", "rfdetr-nano", "--data", "sample", "--track", "wandbb") == 2
    assert (
        capsys.readouterr().err.strip().endswith("one of tensorboard, wandb, trackio, mlflow. Perhaps you meant wandb")
    )
    recipe = make_recipe("rfdetr-nano", data="sample", track=("mlflow",), tensorboard=True)
    assert recipe.trackers == ("mlflow", "tensorboard")
    assert list(TRACKERS) == ["tensorboard", "wandb", "trackio", "mlflow"]


def test_tensorboard_reads_its_own_files(folder: Path) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = Trackers(["tensorboard", "tensorboard"], folder, print)
    trackers.log(ROW)
    trackers.close()
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        name: [(3, value)] for name, value in FIGURES.items()
    }
