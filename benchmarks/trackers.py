"""The trackers that are installed, offline: what they are given is what they say afterwards, and a resumed run goes on there.

    pip install wandb mlflow-skinny trackio tensorboard
    python benchmarks/trackers.py

Prints a line a tracker. No account and no network is needed; nothing leaves the machine.
"""

import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "TRACKIO_DISABLE_TELEMETRY": "1"}

from trainfit.errors import TrainfitError
from trainfit.training.trackers import IDS, TRACKERS, Trackers


def mlflow_history(folder: Path, run: str) -> list[tuple[int, float]]:
    """(step, value) of the loss."""
    client: Any = __import__("mlflow").MlflowClient(tracking_uri=(folder / "mlruns").resolve().as_uri())
    return [(metric.step, metric.value) for metric in client.get_metric_history(run, "loss")]


def main() -> None:
    """Log six steps in two processes' worth of trackers."""
    for name in TRACKERS:
        if find_spec(name) is None:
            print(f"{name:<12} not installed")
            continue
        with tempfile.TemporaryDirectory() as place:
            os.environ |= {"TRACKIO_DIR": f"{place}/trackio"}
            folder = Path(place) / "run-1"
            folder.mkdir()
            (folder / "recipe.json").write_text(json.dumps({"model": "rfdetr-nano", "lr": 0.1}))
            notes: list[str] = []
            try:
                for steps in ((1, 2, 3), (4, 5, 6)):
                    trackers = Trackers([name], folder, notes.append)
                    for step in steps:
                        trackers.log({"step": step, "loss": 1 / step})
                    trackers.close()
            except TrainfitError as error:
                notes.append(str(error))
            ids = json.loads((folder / IDS).read_text()) if (folder / IDS).exists() else {}
            files = sum(path.is_file() for path in Path(place).rglob("*")) - 1
            history = mlflow_history(folder, ids["mlflow"]) if name == "mlflow" and "mlflow" in ids else ""
            print(f"{name:<12} {'; '.join(notes) or 'ok'}; id {ids.get(name)}, {files} files {history}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
