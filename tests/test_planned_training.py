"""Training plans by itself for the card that is there."""

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainfit
from trainfit.errors import TrainfitError
from trainfit.gpus import detect
from trainfit.gpus.catalogue import GIB, Gpu, find_gpu
from trainfit.gpus.detect import DetectedGpu
from trainfit.models.setting import Setting
from trainfit.planning import here, make, on_cpu
from trainfit.planning.here import planned_here
from trainfit.planning.plan import Plan
from trainfit.training.fit import fit
from trainfit.training.recipe import make_recipe

CUDA = torch.device("cuda")


def card(index: int, free_gib: float) -> DetectedGpu:
    gpu = find_gpu("rtx 3060")
    free = int(free_gib * GIB)
    return DetectedGpu(
        index=index,
        uuid=f"GPU-{index}",
        driver_name=gpu.name,
        driver_version="580",
        mig=False,
        gpu=gpu,
        free_bytes=free,
        processes=(),
    )


def unchanged(setting: Setting, _: object) -> Setting:
    return setting


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[DetectedGpu]:
    """Cards that the driver shows; the data set is as the stored traces of the built-in models are."""
    shown: list[DetectedGpu] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for module in (here, detect):
        monkeypatch.setattr(module, "detect_gpus", lambda: tuple(shown))
    monkeypatch.setattr(here, "for_data", unchanged)
    return shown


def choose(**values: Any) -> tuple[dict[str, Any], str]:
    notes: list[str] = []
    data: Any = SimpleNamespace(classes=[str(n) for n in range(80)])
    gpus = values.pop("gpus", 1)
    device = values.pop("on", CUDA)
    recipe = make_recipe("rfdetr-nano", data="sample", **values)
    return dict(planned_here(recipe, data, device, gpus, notes.append)), "\n".join(notes)


def test_the_card_that_is_here_decides_the_micro_batch(cards: list[DetectedGpu]) -> None:
    cards.append(card(0, 11.6))
    roomy, said = choose()
    assert f"planned: micro-batch {roomy['micro_batch']} x " in said
    cards[0] = card(0, 4)
    tight, _ = choose()
    assert tight["micro_batch"] < roomy["micro_batch"]
    assert "checkpointing" not in choose(checkpointing="none")[0]


def test_several_cards_are_planned_for_as_the_smallest_of_those_used(
    cards: list[DetectedGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards += [card(0, 11.6), card(1, 4.0), card(2, 2.0)]
    assert here.smallest_card(2).memory_bytes == 4 * GIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-2")
    assert here.smallest_card(2).memory_bytes == 2 * GIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert here.smallest_card(1).memory_bytes == int(11.6 * GIB)


def test_a_plan_for_this_machine_is_for_the_smallest_of_its_cards(
    cards: list[DetectedGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As training takes it: of the first N that CUDA shows, each with an equal share of the effective batch."""
    cards += [card(0, 11.6), card(1, 4.0), card(2, 2.0)]
    asked: list[tuple[int, int]] = []

    def planned(_: Setting, gpu: Gpu, *, gpus: int, **__: object) -> None:
        asked.append((gpu.memory_bytes, gpus))
        raise TrainfitError("enough")

    monkeypatch.setattr("trainfit.api.planning.make_plan", planned)
    for gpus in (1, 2, 3):
        with pytest.raises(TrainfitError, match="enough"):
            trainfit.plan("rfdetr-nano", gpus=gpus)
    assert asked == [(int(11.6 * GIB), 1), (4 * GIB, 2), (2 * GIB, 3)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert detect.gpu_here(print).memory_bytes == 4 * GIB
    with pytest.raises(TrainfitError, match="--gpus 2: this machine has 1"):
        trainfit.plan("rfdetr-nano", gpus=2)


@pytest.mark.parametrize("own", [{"micro_batch": 2}, {"accumulation": 4}])
def test_what_is_given_by_hand_is_not_planned(own: dict[str, Any], cards: list[DetectedGpu]) -> None:
    cards.append(card(0, 11.6))
    assert choose(**own) == ({}, "")


def test_what_cannot_be_planned_trains_with_the_defaults_and_says_why(
    cards: list[DetectedGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose() == (
        {},
        "not planned (the driver shows no GPU): micro-batch and checkpointing are the defaults; --micro-batch N sets one",
    )
    cards.append(card(0, 11.6))

    def untraceable(*_: object, **__: object) -> None:
        raise TrainfitError("operator x cannot be traced")

    monkeypatch.setattr(here, "make_plan", untraceable)
    values, said = choose()
    assert values == {}
    assert "operator x cannot be traced" in said


def test_where_nothing_fits_the_smallest_is_tried(cards: list[DetectedGpu], monkeypatch: pytest.MonkeyPatch) -> None:
    cards.append(card(0, 11.6))
    plan, plans = make.make_plan, list[Plan]()

    def none_fits(*args: Any, **values: Any) -> Any:
        plans.append(plan(*args, **values))
        return replace(plans[-1], chosen=None)

    monkeypatch.setattr(here, "make_plan", none_fits)
    values, said = choose()
    fits = plans[0].chosen
    assert fits is not None
    assert values["micro_batch"] == plans[0].smallest.setting.micro_batch < fits.setting.micro_batch
    assert "no setting is sure to fit" in said


def test_training_takes_what_is_chosen(tmp_path: Path) -> None:
    def one_by_one(*_: object) -> dict[str, Any]:
        return {"micro_batch": 1}

    recipe = make_recipe(
        "rfdetr-nano",
        data="sample",
        resolution=64,
        groups=1,
        num_queries=10,
        multi_scale=False,
        effective_batch=2,
        max_steps=1,
        workers=0,
        device="cpu",
        out=tmp_path / "run",
    )
    fit(recipe, choose=one_by_one)
    assert '"micro_batch": 1' in (tmp_path / "run" / "recipe.json").read_text()


@pytest.mark.parametrize(
    ("free_gib", "values", "words"),
    [
        (32, {"micro_batch": 4}, "planned for the CPU: micro-batch 4 x 4, at most 7."),
        (6, {"micro_batch": 1}, "planned for the CPU: micro-batch 1 x 16, at most "),
        (
            2.5,
            {"micro_batch": 1, "checkpointing": "all"},
            "no setting is sure to fit: starting with the smallest, micro-batch 1",
        ),
    ],
)
def test_on_the_cpu_host_memory_decides(
    free_gib: float, values: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From stored traces, without a trace of its own. 4 images took 4.45 GiB on a CPU (`ru_maxrss`, torch included)."""
    monkeypatch.setattr(here, "for_data", unchanged)
    monkeypatch.setattr(on_cpu, "available_host_bytes", lambda: int(free_gib * GIB))
    monkeypatch.setattr(subprocess, "Popen", None)
    chosen, said = choose(on=torch.device("cpu"))
    assert chosen.items() >= values.items()
    assert words in said


def test_on_the_cpu_what_no_stored_trace_covers_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "for_data", unchanged)
    chosen, said = choose(on=torch.device("cpu"), resolution=64)
    assert chosen == {}
    assert said.startswith("not planned (no stored trace covers this setting)")
    assert "--micro-batch N sets one" in said
