"""Experiment trackers in addition to a run's own files: TensorBoard, Weights & Biases, MLflow and trackio.

Where each of them writes is decided as its own documentation says (`WANDB_MODE`, `MLFLOW_TRACKING_URI`, ...); without such a
variable everything stays on this machine.
"""

import json
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from trainfit.errors import TrainfitError
from trainfit.files import read_json
from trainfit.training.run_files import RECIPE

PROJECT = "trainfit"
IDS = "trackers.json"
"""The file of a run with its names in the trackers, so that a resumed run continues there."""


class Tracker(Protocol):
    """An open tracker, which takes figures step by step."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of a step; `step` counts from 1 and never falls in one process."""
        ...

    def close(self) -> None:
        """Write what is pending and close the tracker."""
        ...


class Open(Protocol):
    """Starts a tracker for a run folder; `saved` is the id that the tracker gave this run before, or None."""

    def __call__(self, folder: Path, config: Mapping[str, Any], saved: str | None, /) -> tuple[Tracker, str | None]:
        """The tracker, and its id of the run."""
        ...


TRACKERS: dict[str, Open] = {}


def tracker(name: str) -> Callable[[Open], Open]:
    """Decorate the function that starts a tracker.

    Raises:
        ValueError: there is one of that name.
    """

    def add(function: Open) -> Open:
        if name in TRACKERS:
            raise ValueError(f"there is a tracker {name!r} already")
        TRACKERS[name] = function
        return function

    return add


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not known.

    Raises:
        TrainfitError: with the nearest known name.
    """
    for name in names:
        if name not in TRACKERS:
            close = get_close_matches(name, TRACKERS, n=1)
            hint = f". Perhaps you meant {close[0]}" if close else ""
            raise TrainfitError(f"--track {name} is not known: one of {', '.join(TRACKERS)}{hint}")


class Trackers:
    """The trackers of a run. One that fails during training is dropped, with a note."""

    def __init__(self, names: Sequence[str], folder: Path, note: Callable[[str], None]) -> None:
        """Start the trackers.

        Raises:
            TrainfitError: one is not installed, or cannot start.
        """
        self._note = note
        self._open: dict[str, Tracker] = {}
        if not names:
            return
        ids: dict[str, str] = _object(folder / IDS)
        config = _object(folder / RECIPE)
        for name in dict.fromkeys(names):
            try:
                self._open[name], known = TRACKERS[name](folder, config, ids.get(name))
            except ImportError as error:
                raise TrainfitError(f"--track {name} needs {name}: pip install {_PACKAGES[name]} ({error})") from error
            except TrainfitError:
                raise
            except Exception as error:  # whatever a service raises: no account, no network, a wrong address
                raise TrainfitError(f"--track {name} cannot start ({_first(error)}){_OFFLINE.get(name, '')}") from error
            if known is not None:
                ids[name] = known
        (folder / IDS).write_text(json.dumps(ids) + "\n")

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass on the numbers of a row of metrics."""
        figures = _figures(row)
        for name in list(self._open):
            self._try(name, lambda each: each.log(figures, int(row["step"])))

    def close(self) -> None:
        """Finish all trackers."""
        for name in list(self._open):
            self._try(name, lambda each: each.close())
        self._open.clear()

    def _try(self, name: str, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._open[name])
        except Exception as error:  # a service that is down must not end a training
            del self._open[name]
            self._note(f"{name} failed ({_first(error)}): it gets nothing more of this run")


def _object(path: Path) -> dict[str, Any]:
    try:
        content: Any = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if isinstance(value, numbers.Real) and key != "step"}


_PACKAGES = {
    "tensorboard": "'trainfit[tensorboard]'",
    "wandb": "wandb",
    "mlflow": "mlflow-skinny",
    "trackio": "trackio",
}
_OFFLINE = {
    "wandb": ": WANDB_MODE=offline keeps the run on this machine",
    "mlflow": ": without MLFLOW_TRACKING_URI the run stays in its folder",
}


class _Board:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@tracker("tensorboard")
def _tensorboard(folder: Path, _config: Mapping[str, Any], saved: str | None) -> tuple[Tracker, str | None]:
    return _Board(folder), saved


class _Run:
    """A tracker with functions `log` and `finish` of its own."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


@tracker("wandb")
def _wandb(folder: Path, config: Mapping[str, Any], saved: str | None) -> tuple[Tracker, str | None]:
    import wandb  # pyright: ignore[reportMissingImports] - an extra of the user's

    module: Any = wandb
    run: Any = module.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        dir=str(folder),
        config=dict(config),
        id=saved,
        resume="allow",
    )
    return _Run(run), str(run.id)


@tracker("trackio")
def _trackio(folder: Path, config: Mapping[str, Any], saved: str | None) -> tuple[Tracker, str | None]:
    import trackio  # pyright: ignore[reportMissingImports] - an extra of the user's

    module: Any = trackio
    name = saved or folder.name
    module.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, config=dict(config), resume="allow")
    return _Run(module), name


class _MlflowRun:
    def __init__(self, client: Any, run: str) -> None:
        self._client = client
        self._run = run

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._run, _plain(name), value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _plain(name: str) -> str:
    """A name of MLflow's: letters, digits and a few signs."""
    return "".join(sign if sign.isalnum() or sign in "_-. /" else "_" for sign in name)


@tracker("mlflow")
def _mlflow(folder: Path, config: Mapping[str, Any], saved: str | None) -> tuple[Tracker, str | None]:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports] - an extra of the user's

    where = os.environ.get("MLFLOW_TRACKING_URI")
    if not where:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.17 refuses a folder otherwise
        where = (folder / "mlruns").resolve().as_uri()
    client: Any = MlflowClient(tracking_uri=where)
    if saved is None:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else client.create_experiment(project)
        saved = str(client.create_run(experiment, run_name=folder.name).info.run_id)
        for key, value in config.items():
            client.log_param(saved, key, str(value)[:500])
    else:
        client.update_run(saved, status="RUNNING")
    return _MlflowRun(client, saved), saved
