"""Every task of the package has the functions that the rooms around it call, and the rooms name no task."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import trainfit
from conftest import run
from trainfit import api
from trainfit.tasks.task import Inference, Task, inference_of, recognised_task, task_names, task_of

SOURCE = Path(trainfit.__file__).parent
FUNCTIONS = [name for name, value in vars(Task).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.parametrize("name", task_names())
def test_a_task_has_every_function(name: str) -> None:
    """With the parameters of the protocol, in its order; a metric may have options besides."""
    task: Any = task_of(name)
    for function in FUNCTIONS:
        wanted = [each for each in inspect.signature(getattr(Task, function)).parameters if each != "self"]
        own = list(inspect.signature(getattr(task, function)).parameters)
        if function == "metric":
            wanted = wanted[:-1]
        assert own[: len(wanted)] == wanted, f"{name}.{function}"


def test_generic_rooms_name_no_task() -> None:
    """What detection calls its things stands in tasks/detection and in the folders of families with that task alone."""
    words = re.compile(r"tasks\.detection|ImageDetections|ImageRecord|bbox_ap\b(?!\" in row)")
    rooms = ("api", "cli", "reports", "planning", "training", "measuring", "memory", "tracing", "timing", "step")
    files = [file for room in rooms for file in (SOURCE / room).rglob("*.py")]
    code = {file: re.sub(r'""".*?"""', "", file.read_text(), flags=re.DOTALL) for file in files}
    assert [str(file) for file, text in code.items() if words.search(text)] == []


def test_data_are_recognised(tmp_path: Path) -> None:
    assert recognised_task("sample") == "detection"
    assert recognised_task(str(tmp_path / "nothing")) == "detection"  # whose error says what was looked for
    (tmp_path / "data.yaml").write_text("names: [cat]\n")
    assert task_of("detection").recognises(str(tmp_path))


def test_tasks_that_are_not_there_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check-data", tmp_path, "--task", "detecton") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the task 'detecton' cannot be imported" in line
    assert "detection" in line.split("one of")[1]
    assert run("check-data", "sample", "--format", "cocoo") == 2
    assert "--format cocoo" in capsys.readouterr().err


def test_options_that_a_metric_does_not_have_are_refused() -> None:
    with pytest.raises(trainfit.TrainfitError, match="--top-k is not an option of the metric of the task 'detection'"):
        api.require_options(task_of("detection").metric, {"top_k": 5}, "detection")
    api.require_options(task_of("detection").metric, {"max_detections": 5}, "detection")


def test_inference_is_for_tasks_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = inference_of("detection")
    assert isinstance(task, Inference)
    monkeypatch.delattr(task, "drawn")
    with pytest.raises(trainfit.TrainfitError, match="does not work with models of the task 'detection'"):
        inference_of("detection")
