"""What a stored trace is found by, and what makes it invalid."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from test_profile import make_trace
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory import priced, shipped
from trainfit.memory.archive import write_archive
from trainfit.memory.priced import Pricer
from trainfit.memory.scaling import ScaledTrace, scale
from trainfit.models.classifier.family import ClassifierSetting
from trainfit.models.rfdetr.family import RfDetrSetting
from trainfit.models.setting import make_setting
from trainfit.planning.predict import predict
from trainfit.tracing import provenance, trace_cache
from trainfit.tracing.provenance import Provenance, code_digest, imported_files
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest

changes = shipped.changes  # before `conftest` takes it away
STORED = StoredTrace(trace=make_trace(), ops=(), blocks=7)


@dataclass(frozen=True, kw_only=True)
class NewKnob(ClassifierSetting):
    """One knob more, with a default."""

    new_knob: int = 3


@dataclass(frozen=True, kw_only=True)
class OtherDefault(ClassifierSetting):
    """Another default of a knob that there was."""

    classes: int = 91


@pytest.fixture
def tracings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TraceRequest]:
    """The requests that a stand-in for the tracing process was given; the cache is empty."""
    asked: list[TraceRequest] = []

    def traced(request: TraceRequest, *, both: bool = False) -> str:
        asked.append(request)
        made = replace(STORED, blocks=len(asked))
        return json.dumps(dict.fromkeys(("training", "evaluation"), made.to_record())) if both else made.to_json()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trace_cache, "_traced", traced)
    return asked


def request_of(kind: type[ClassifierSetting], **knobs: int) -> TraceRequest:
    setting = kind(model="timm:resnet18", **knobs)  # pyright: ignore[reportArgumentType]
    return TraceRequest(setting=setting, part="training", capability=(8, 0))


def test_a_trace_is_named_by_what_differs_from_the_defaults() -> None:
    assert request_of(ClassifierSetting).name == "training capability=8.0"
    assert request_of(ClassifierSetting, micro_batch=4).name == "training capability=8.0 micro_batch=4"


def test_a_new_knob_with_a_default_keeps_stored_traces(tracings: list[TraceRequest]) -> None:
    for kind in (ClassifierSetting, NewKnob, ClassifierSetting):
        assert trace_cache.get_trace(request_of(kind)).blocks == 1
    assert trace_cache.get_trace(request_of(NewKnob, new_knob=4)).blocks == 2
    assert len(tracings) == 2


def test_a_changed_default_makes_stored_traces_invalid(tracings: list[TraceRequest]) -> None:
    assert trace_cache.get_trace(request_of(ClassifierSetting)).blocks == 1
    assert trace_cache.get_trace(request_of(OtherDefault)).blocks == 2
    assert len(tracings) == 2


def test_changed_code_makes_stored_traces_invalid(
    tracings: list[TraceRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_cache.get_trace(request_of(ClassifierSetting))
    trace_cache.get_trace(request_of(ClassifierSetting))
    assert len(tracings) == 1

    def is_unchanged(path: str, _: str) -> bool:
        return path != "step/window.py"

    monkeypatch.setattr(provenance, "is_unchanged", is_unchanged)
    assert trace_cache.get_trace(request_of(ClassifierSetting)).blocks == 2


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has one scaled trace of ResNet-18, in the place of the package's."""
    request = Pricer(gpu=find_gpu("A100")).request(ClassifierSetting(model="timm:resnet18"), "training")
    scaled = scale(STORED, STORED, (2, 4))
    assert scaled is not None
    name = shipped.entry_name(request)
    settings = json.dumps({name: request.setting.to_json()})
    write_archive(tmp_path / "timm-resnet18.tar.xz", {name: scaled.to_json(), shipped.SETTINGS: settings})
    record = {"timm:resnet18": trace_cache.made_with(request.setting).to_record()}
    (tmp_path / shipped.MADE_WITH).write_text(json.dumps(record))
    monkeypatch.setattr(shipped, "shipped_folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.usefixtures("package")
def test_traces_of_the_package_outlive_a_new_knob_and_not_a_changed_default() -> None:
    pricer = Pricer(gpu=find_gpu("A100"))
    for kind, there in ((ClassifierSetting, True), (NewKnob, True), (OtherDefault, False)):
        request = pricer.request(kind(model="timm:resnet18"), "training")
        assert shipped.is_shipped(request) == there
        found = shipped.shipped(request, ScaledTrace.from_record)
        assert (found is not None and found.blocks == 7) == there


def test_a_stale_trace_of_the_package_is_not_used_and_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "changes", changes)
    setting = ClassifierSetting(model="timm:resnet18")
    request = Pricer(gpu=find_gpu("A100")).request(setting, "training")
    assert shipped.is_shipped(request)
    assert shipped.why_unused(setting) is None
    path = package / shipped.MADE_WITH
    record = json.loads(path.read_text())
    record["timm:resnet18"]["packages"]["torch"] = "1.0"
    record["timm:resnet18"]["files"]["step/window.py"] = "another digest"
    path.write_text(json.dumps(record))
    shipped.forget()
    assert not shipped.is_shipped(request)
    line = shipped.why_unused(setting) or ""
    assert line.startswith(
        "the traces of timm:resnet18 that come with trainfit were made with other versions of torch 1.0"
    )
    assert "step/window.py" in line


EDITS: dict[str, tuple[str, bool]] = {
    "docstring": ('def area(side: int) -> int:\n    """Another text."""\n    return side * side\n', True),
    "line breaks": (
        'def area(\n    side: int,\n) -> int:\n    """Text."""\n\n    return (side\n        * side)\n',
        True,
    ),
    "comment": ('def area(side: int) -> int:\n    """Text."""\n    return side * side  # square\n', True),
    "code": ('def area(side: int) -> int:\n    """Text."""\n    return side + side\n', False),
}


@pytest.mark.parametrize("edit", EDITS)
def test_only_edits_of_code_change_a_digest(edit: str, tmp_path: Path) -> None:
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text('def area(side: int) -> int:\n    """Text."""\n    return side * side\n')
    text, same = EDITS[edit]
    after.write_text(text)
    assert (code_digest(before) == code_digest(after)) == same


def test_declaring_a_knob_changes_no_digest_and_using_it_does(tmp_path: Path) -> None:
    texts = (
        "class Setting:\n    size: int = 1\n    def area(self): return self.size\n",
        "class Setting:\n    size: int = 1\n    other: int = 2\n    def area(self): return self.size\n",
        "class Setting:\n    size: int = 1\n    other: int = 2\n    def area(self): return self.size * self.other\n",
    )
    digests: list[str] = []
    for number, text in enumerate(texts):
        file = tmp_path / str(number) / "models" / "setting.py"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        digests.append(code_digest(file))
    assert digests[0] == digests[1] != digests[2]


def test_a_trace_depends_on_the_code_that_makes_it_and_on_no_other() -> None:
    setting = make_setting("rfdetr-nano")
    files = set(trace_cache.made_with(setting).files)
    assert {"step/window.py", "step/training_step.py", "tracing/recorder.py", "models/rfdetr/workload.py"} <= files
    assert not {file.partition("/")[0] for file in files} & {"cli", "planning", "reports", "training", "memory"}
    assert not {file for file in files if file.startswith(("models/clip", "models/maskrcnn", "models/classifier"))}
    assert not list(trace_cache.made_with(setting).changes())
    assert {path.name for path in imported_files(("trainfit.errors",))} == {"errors.py"}
    gone = Provenance(packages={"torch": "1.0"}, files={"step/gone.py": "a b"})
    assert [each.partition(" (")[0] for each in gone.changes()] == ["torch 1.0", "step/gone.py"]


def test_a_new_pricer_sees_the_code_of_a_model_of_the_users_own(tracings: list[TraceRequest]) -> None:
    """As in a notebook, where it is edited between two plans."""
    setting = make_setting("mine:task")
    first = Pricer(gpu=find_gpu("A100"))
    assert first.blocks(setting) == first.blocks(setting)
    assert len(tracings) == 2
    Pricer(gpu=find_gpu("A100")).blocks(setting)
    assert len(tracings) == 4


@pytest.fixture
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: TraceRequest, *, both: bool = False) -> str:
        raise AssertionError(f"traced {request.name}, both: {both}")

    monkeypatch.setattr(trace_cache, "_traced", refuse)


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize(
    "knobs", [{}, {"micro_batch": 3}, {"micro_batch": 4, "accumulation": 4, "checkpointing": "all"}]
)
@pytest.mark.parametrize("card", ["RTX 3060", "T4"])
def test_predict_gives_the_numbers_of_the_plan(card: str, knobs: dict[str, object]) -> None:
    setting = make_setting("rfdetr-nano", **knobs)
    found = predict(setting, find_gpu(card))
    pricer = Pricer(gpu=find_gpu(card))
    precision = "fp16" if card == "T4" else "bf16"
    resolved = replace(setting, precision=precision)
    assert found.training.needs.low_bytes <= pricer.needs(resolved).low_bytes <= found.training.needs.high_bytes
    assert found.training.needs.high_bytes == pricer.needs(resolved).high_bytes
    assert found.training.time == pricer.seconds(resolved, (setting.micro_batch,) * setting.accumulation)
    assert found.setting == setting
    assert (priced.PRICED_LIKE_TWO in found.assumptions) == (setting.accumulation == 1)


@pytest.mark.usefixtures("no_tracing")
def test_predict_traces_what_the_package_has_not_and_without_the_cache() -> None:
    rfdetr: Callable[..., RfDetrSetting] = RfDetrSetting
    for setting, cache in (
        (rfdetr(model="rfdetr-nano", drop_path=0.1), True),
        (rfdetr(model="rfdetr-nano", micro_batch=4), False),
    ):
        with pytest.raises(AssertionError, match="traced"):
            predict(setting, find_gpu("RTX 3060"), cache=cache)


def test_rooms_that_plan_and_predict_import_no_torch() -> None:
    """Every module of these rooms, all in one process."""
    code = (
        "import importlib, pkgutil, sys, trainfit\n"
        "for room in ('memory', 'planning', 'gpus', 'timing', 'cli'):\n"
        "    package = importlib.import_module(f'trainfit.{room}')\n"
        "    for module in pkgutil.walk_packages(package.__path__, f'trainfit.{room}.'):\n"
        "        importlib.import_module(module.name)\n"
        "        assert 'torch' not in sys.modules, module.name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
