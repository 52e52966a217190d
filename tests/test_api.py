"""The public names: importable without torch, and the same results as the commands."""

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import dataclass, is_dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import trainfit
from conftest import run
from plan_cases import make_plan
from trainfit.gpus.catalogue import GIB, gpu_with_memory
from trainfit.reports.profile import profile_json


@pytest.mark.parametrize("name", trainfit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(trainfit, name)
    assert name in dir(trainfit)
    assert name == "__version__" or value.__doc__


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(trainfit.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {*imported, "__version__"} == set(trainfit.__all__)


def test_the_page_names_every_public_name() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    assert [name for name in trainfit.__all__ if f"`{name}" not in page and f"trainfit.{name}" not in page] == []


def test_importing_and_planning_names_import_no_torch() -> None:
    code = (
        "import sys, trainfit; trainfit.plan; trainfit.predict; trainfit.measure; trainfit.train; trainfit.make_setting; "
        "assert trainfit.find_gpu('rtx 3060').memory_bytes > 11 << 30; assert 'torch' not in sys.modules; "
        "import trainfit.measuring.bench; assert callable(trainfit.measure)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    assert trainfit.__version__ == metadata.version("trainfit")


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'plam'"):
        _ = trainfit.plam  # pyright: ignore[reportAttributeAccessIssue]


def test_predict_is_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    prediction = trainfit.predict("rfdetr-nano", gpu="rtx 3060", micro_batch=2)
    assert run("predict", "rfdetr-nano", "--gpu", "rtx 3060", "--micro-batch", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(profile_json(prediction)))
    assert trainfit.predict(prediction.setting, gpu=prediction.gpu) == prediction
    assert isinstance(prediction, trainfit.Prediction)


def test_calls_give_what_the_page_says() -> None:
    """The results in the table of docs/api.md are the annotations of the functions, and public names themselves."""
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| `(\w+)\([^|]*\| [^|]* \| (?:tuple of )?`(\w+)`", page, re.MULTILINE)
    assert {"plan", "predict", "measure", "train", "evaluate", "check_data", "explain", "report"} <= dict(rows).keys()
    for call, result in rows:
        assert result in trainfit.__all__
        annotation = inspect.signature(getattr(trainfit, call)).return_annotation
        assert re.search(
            rf"\b{result}\b", annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        )


def test_every_call_is_documented_with_what_it_takes_and_raises() -> None:
    for name in trainfit.__all__:
        value = getattr(trainfit, name)
        if not inspect.isfunction(value) or name in ("model_names", "register"):  # which take nothing, and a function
            continue
        text = inspect.getdoc(value) or ""
        named = [each for each in inspect.signature(value).parameters if each not in text]
        assert (name, named) in [(name, []), ("find_gpu", ["name"]), ("make_setting", ["model"])]
        assert "Raises:" in text, name


@pytest.mark.parametrize("name", [each for each in trainfit.__all__ if is_dataclass(getattr(trainfit, each))])
def test_every_field_of_a_public_record_has_a_docstring(name: str) -> None:
    """In the source of its class, and of the classes that it inherits from."""
    for kind in getattr(trainfit, name).__mro__:
        if not kind.__module__.startswith("trainfit"):
            continue
        (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, after in pairwise([*tree.body, ast.Pass()]):
            if isinstance(statement, ast.AnnAssign):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert is_text, f"{kind.__name__}: {ast.unparse(statement)}"


def test_names_of_models_and_cards() -> None:
    assert {"rfdetr-nano", "maskrcnn-r50-v2", "timm:NAME", "clip:ARCH", "module:function"} <= set(
        trainfit.model_names()
    )
    assert isinstance(trainfit.find_gpu("rtx 3060"), trainfit.Gpu)
    setting = trainfit.make_setting("rf-detr nano", groups=2)
    assert isinstance(setting, trainfit.Setting)
    assert isinstance(setting.family, trainfit.Family)
    assert isinstance(trainfit.make_setting("timm:resnet10t").family, trainfit.Family)


@dataclass(frozen=True)
class Planned:
    """The part of a plan that `trainfit.plan` adds to."""

    data: str = ""
    only_classes: str = ""


def test_plan_takes_what_the_command_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def capture(*positional: Any, **named: Any) -> Planned:
        asked.append((positional, named))
        return Planned()

    monkeypatch.setattr("trainfit.api.planning.make_plan", capture)
    assert trainfit.plan("timm:resnet10t", memory="6GiB", effective_batch=8, micro_batch=4, resolution=64) == Planned()
    (setting, card), named = asked[0]
    assert setting == trainfit.make_setting("timm:resnet10t", resolution=64)
    assert card == gpu_with_memory("6GiB")
    assert (named["effective_batch"], named["micro_batch"], named["checkpointing"]) == (8, 4, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trainfit.plan("rfdetr-nanno", memory="8GiB"), "Perhaps you meant rfdetr-nano"),
        (lambda: trainfit.predict("rfdetr-nano", memory="8GiB", gruops=1), "Perhaps you meant groups"),
        (lambda: trainfit.predict("rfdetr-nano"), "give --gpu NAME or --memory 8GiB"),
        (lambda: trainfit.measure("timm:resnet10t", device="cpu", memory="4GiB"), "on the CPU leave it out"),
        (lambda: trainfit.train("rfdetr-nano"), "--data is missing"),
        (lambda: trainfit.evaluate("/nowhere", data="sample", device="cpu"), "/nowhere is not a run folder"),
        (lambda: trainfit.check_data("/nowhere"), "/nowhere"),
    ],
)
def test_what_a_user_can_repair_is_one_line(call: Any, message: str) -> None:
    with pytest.raises(trainfit.TrainfitError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_may_stand_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def capture(setting: Any, *_positional: Any, **_named: Any) -> Planned:
        asked.append(setting)
        return Planned()

    monkeypatch.setattr("trainfit.api.planning.make_plan", capture)
    setting = trainfit.make_setting("rf-detr nano", groups=1)
    trainfit.plan(setting, memory="8GiB", num_queries=20)
    assert asked == [replace(setting, num_queries=20)]


def test_check_data_lists_defects(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in (2, 3):
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / f"{number}.png")
    (tmp_path / "train" / "_annotations.coco.json").write_text(
        json.dumps(
            {
                "images": [
                    {"id": 1, "file_name": "gone.jpg", "width": 8, "height": 8},
                    *({"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in (2, 3)),
                ],
                "annotations": [
                    {"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}
                    for i in (1, 2, 3)
                ],
                "categories": [{"id": 1, "name": "thing"}],
            }
        )
    )
    dataset = trainfit.check_data(tmp_path, format="coco")
    assert [f.severity for f in dataset.findings if "gone.jpg" in f.where + f.message] == ["skipped"]


def test_train_evaluate_detect(tmp_path: Path) -> None:
    """One step on the sample set; the evaluation of its folder is that which ended the run."""
    sizes: dict[str, Any] = {"resolution": 64, "groups": 1, "num_queries": 20, "multi_scale": False, "ema": False}
    summary = trainfit.train(
        "rfdetr-nano",
        data="sample",
        out=str(tmp_path / "run"),
        device="cpu",
        max_steps=1,
        effective_batch=2,
        workers=0,
        **sizes,
    )
    assert isinstance(summary, trainfit.RunSummary)
    assert (summary.steps, summary.total_steps, summary.folder) == (1, 1, tmp_path / "run")
    evaluation = trainfit.evaluate(tmp_path / "run", data="sample", device="cpu")
    assert isinstance(evaluation, trainfit.Evaluation)
    assert summary.evaluation is not None
    assert [table.rows for table in evaluation.tables] == [table.rows for table in summary.evaluation.tables]
    image = trainfit.check_data("sample", decode=False).splits["val"][0].path
    (detections,) = trainfit.detect(tmp_path / "run", [image], device="cpu")
    assert detections.boxes.shape == (len(detections.scores), 4)
    assert len(detections.scores) == 20


def test_gib_is_binary() -> None:
    assert trainfit.find_gpu("RTX 3060").nominal_memory_bytes == 12 * GIB


def test_the_pages_building_blocks_run() -> None:
    """The last example of docs/api.md, as it stands there."""
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    code = page.split("```python\n")[-1].split("```")[0]
    values: dict[str, Any] = {"trainfit": trainfit}
    exec(code, values)
    assert values["result"].images == 8


def test_pages_for_contributors_point_at_real_files() -> None:
    """Every path that CONTRIBUTING.md and the list of benchmarks name is there, and every benchmark is listed."""
    root = Path(__file__).parents[1]
    page = (root / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:src|tests|scripts|benchmarks)/[\w./-]+)`", page)
    assert named
    assert [path for path in named if not (root / path).exists()] == []
    listed = re.findall(r"^\| `([\w./]+)`", (root / "benchmarks" / "README.md").read_text(), re.MULTILINE)
    assert {path.name for path in (root / "benchmarks").glob("*.py")} <= set(listed)
    assert all((root / "benchmarks" / path).exists() for path in listed)


def test_results_are_what_the_commands_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`report` and `check-data` here, whose commands take no time; `predict` is compared above."""
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "rfdetr-nano"}))
    report = trainfit.report(tmp_path)
    assert isinstance(report, trainfit.RunReport)
    assert run("report", tmp_path, "--html", tmp_path / "page.html") == 0
    assert capsys.readouterr().out == trainfit.as_text(report) + "\n"
    assert (tmp_path / "page.html").read_text() == trainfit.as_html(report)
    check = trainfit.check_data("sample", decode=False)
    assert isinstance(check, trainfit.DataCheck)
    assert run("check-data", "sample", "--no-decode", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(trainfit.as_json(check)))
    with pytest.raises(trainfit.TrainfitError, match="there is no html of a DataCheck, only of: Plan"):
        trainfit.as_html(check)
    with pytest.raises(trainfit.TrainfitError, match="not a run folder"):
        trainfit.report(tmp_path / "none")


def test_a_plan_is_written_emitted_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan((4, "none"))
    assert plan.chosen is not None
    assert trainfit.as_text(plan).startswith("rfdetr-nano on")
    emitted = trainfit.emit(plan, "rfdetr")
    assert isinstance(emitted, trainfit.Emitted)
    assert emitted.tool == "rfdetr"
    assert isinstance(plan, trainfit.Plan)
    file = trainfit.save_plan(plan, tmp_path / "plan.json")
    asked: list[Any] = []

    class Capture:
        def __init__(self, **values: Any) -> None:
            asked.append(values["setting"])

        def run(self, _sizes: object) -> list[Any]:
            return []

    monkeypatch.setattr("trainfit.api.measuring.Bench", Capture)
    for given in (plan, file, str(file)):
        assert trainfit.measure(plan=given, device="cpu") == ()
    assert asked == [plan.chosen.setting] * 3
    with pytest.raises(trainfit.TrainfitError, match="is for rfdetr-nano, not rfdetr-small"):
        trainfit.measure("rfdetr-small", plan=file, device="cpu")
    with pytest.raises(trainfit.TrainfitError, match="cannot be written"):
        trainfit.save_plan(plan, tmp_path / "none" / "plan.json")


def test_every_result_has_a_text() -> None:
    """Trials of `measure` as one and as a sequence, a checked loop and an emitted configuration."""
    ran = trainfit.Measured(micro_batch=2, outcome="ran", images_per_s=12.5, slowest=12.0, fastest=13.0, windows=3)
    died = trainfit.Measured(micro_batch=4, outcome="died", message="killed by signal 9")
    assert trainfit.as_text(ran).splitlines()[-1].split() == ["2", "12.5", "12", "to", "13"]
    assert trainfit.as_text((died, ran)).splitlines()[-1] == "micro-batch 4: died: killed by signal 9"
    assert trainfit.as_json([ran, died])["knee"] == 2
    emitted = trainfit.Emitted(tool="lightning", text="trainer = 1\n", notes=("a note",))
    assert trainfit.as_text(emitted) == "trainer = 1\n# a note"
    exact = trainfit.Exactness(
        findings=(), groups=(), micro_batch=2, accumulation=2, ranks=1, windows=1, tolerance=1e-9
    )
    assert "exact" in trainfit.as_text(exact)
    with pytest.raises(trainfit.TrainfitError, match="there is no html of a Measured"):
        trainfit.as_html(ran)
