"""Files of the first versions (commit 2c7fc46, 24 November 2026) are read: what they wrote, shortened to what a test needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainfit.api.measuring import planned_setting
from trainfit.errors import TrainfitError
from trainfit.models.build import workload_from_metadata
from trainfit.models.rfdetr.family import RfDetrSetting, RfDetrTraining
from trainfit.planning.plan import with_plan
from trainfit.reports.run_report import read_run, run_json, run_text
from trainfit.training.recipe import Recipe, make_recipe, resume_recipe
from trainfit.training.run_folder import load_state, save_state
from trainfit.training.saved_state import require_state

RECIPE: dict[str, Any] = {
    "model": "rfdetr-nano",
    "data": "fruits",
    "format": "auto",
    "plan": None,
    "weights": None,
    "recipe": "single",
    "from_run": None,
    "resolution": 64,
    "snap": True,
    "effective_batch": 1,
    "micro_batch": 1,
    "accumulation": None,
    "epochs": 100,
    "max_steps": 1,
    "out": "oldrun",
    "resume": None,
    "seed": 0,
    "tensorboard": False,
    "device": "auto",
    "precision": "auto",
    "lr": 0.0001,
    "lr_encoder": 0.00015,
    "weight_decay": 0.0001,
    "schedule": "step",
    "lr_drop": 100,
    "warmup_epochs": 0.0,
    "clip_norm": 0.1,
    "ema": True,
    "multi_scale": False,
    "augment": True,
    "num_queries": 20,
    "groups": 1,
    "checkpointing": "none",
    "optimizer": "adamw-fused",
    "ema_on_host": False,
    "freeze_encoder": False,
    "workers": 0,
    "eval_every": 1,
    "eval_micro_batch": None,
    "val_fraction": 0.1,
    "save_minutes": 10.0,
}
METRICS = """\
{"step": 1, "epoch": 0, "loss": 13.1, "class": 0.4, "box": 6.5, "giou": 6.2, \
"gradient_norm": 3.6, "lr": 0.0001, "size": 64, "images": 1}
{"step": 1, "epoch": 0, "bbox_ap": 0.25, "bbox_ap50": 0.5, "bbox_ap75": 0.1, "bbox_per_class": {"date": 0.5, "fig": 0.0}}
"""
TELEMETRY = """\
{"time": 1795899759.66, "step": 0, "event": "start", "start_s": 10.4, "workers": 0, "total_steps": 1, "effective_batch": 1}
{"time": 1795899759.67, "step": 1, "memory_bytes": 1364209664, "images_per_s": 1.3, "wait_share": 0.0, "windows": 1, "images": 1, \
"elapsed_s": 0.77, "waited_s": 0.0, "compute_s": 0.77, "load_s": 0.01, "gpu_utilization": null, "gpu_power_w": null, \
"gpu_memory_used_bytes": null, "allocated_bytes": null, "reserved_bytes": null, "alloc_retries": null}
{"time": 1795899760.97, "step": 1, "event": "pause", "paused_s": 1.3}
{"time": 1795899761.11, "step": 1, "event": "end", "interrupted": false, "noise": "gradient noise scale not told"}
"""
METADATA = {
    "model": "rfdetr-nano",
    "classes": '["date", "fig", "hazelnut"]',
    "knobs": '{"resolution": 64, "snap": true, "num_queries": 20, "groups": 1, "freeze_encoder": false, "stage": "single"}',
    "ap": "0.0",
    "step": "1",
}
PLAN: dict[str, Any] = {
    "schema": 1,
    "model": "rfdetr-nano",
    "gpu": "RTX 3060",
    "gpus": 1,
    "setting": {
        "model": "rfdetr-nano",
        "micro_batch": 8,
        "accumulation": 2,
        "eval_micro_batch": None,
        "resolution": None,
        "canvas": None,
        "precision": "bf16",
        "checkpointing": 3,
        "optimizer": "adamw-fused",
        "ema": None,
        "ema_on_host": False,
        "freeze_encoder": False,
        "multi_scale": True,
        "channels_last": False,
        "classes": 80,
        "objects_per_image": 100,
        "num_queries": None,
        "groups": 4,
        "stage": "single",
        "contrastive": "cached",
    },
    "knobs": {
        "effective_batch": 16,
        "micro_batch": 8,
        "checkpointing": 3,
        "precision": "bf16",
        "multi_scale": True,
        "groups": 4,
        "optimizer": "adamw-fused",
        "ema_on_host": False,
        "freeze_encoder": False,
        "recipe": "single",
        "workers": 4,
    },
    "predicted": {
        "low_bytes": 5_000_000_000,
        "high_bytes": 6_000_000_000,
        "allocated_bytes": 4_500_000_000,
        "reserved_bytes": 4_900_000_000,
        "budget_bytes": 11_000_000_000,
        "images_per_s": 30.0,
        "calibrated": False,
    },
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "oldrun"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    (folder / "metrics.jsonl").write_text(METRICS)
    (folder / "telemetry.jsonl").write_text(TELEMETRY)
    return folder


def test_a_run_is_reported(run: Path) -> None:
    report = read_run(run)
    text = run_text(report)
    assert "1 of 1 step" in text
    assert "25.0" in text
    assert run_json(report)["schema"] >= 1


def test_a_run_is_resumed_with_its_recipe(run: Path) -> None:
    recipe = resume_recipe(Recipe(resume=run))
    assert (recipe.model, recipe.data, recipe.micro_batch, recipe.max_steps) == ("rfdetr-nano", "fruits", 1, 1)
    assert isinstance(recipe, RfDetrSetting)
    assert (recipe.resolution, recipe.num_queries, recipe.groups, recipe.stage) == (64, 20, 1, "single")


def test_the_encoders_rate_was_in_every_recipe_and_plan(tmp_path: Path) -> None:
    """Until version 0.1 recipes and plans of families without a rate of the encoder had `lr_encoder` too."""
    old = {"model": "timm:resnet18", "data": "flowers", "lr": 0.1, "lr_encoder": 0.00015}
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    recipe = resume_recipe(make_recipe("timm:resnet18", resume=tmp_path))
    assert recipe.lr == 0.1
    assert not hasattr(recipe, "lr_encoder")
    file = tmp_path / "plan.json"
    knobs = {"effective_batch": 16, "micro_batch": 8, "lr": 0.1, "lr_encoder": 0.2}
    file.write_text(json.dumps(PLAN | {"model": "timm:resnet18", "knobs": knobs}))
    assert with_plan(make_recipe("timm:resnet18", plan=file, data="flowers")).lr == 0.1
    with pytest.raises(TrainfitError, match="unknown key 'lr_encoder'"):
        make_recipe("timm:resnet18", data="flowers", lr_encoder=0.1)


def test_the_encoders_rate_of_an_rfdetr_is_kept(run: Path) -> None:
    (run / "recipe.json").write_text(json.dumps(RECIPE | {"lr_encoder": 0.25}))
    recipe = resume_recipe(Recipe(resume=run))
    assert isinstance(recipe, RfDetrTraining)
    assert recipe.lr_encoder == 0.25


def test_a_state_is_read_under_todays_names(tmp_path: Path) -> None:
    weights = {"layer": torch.arange(3.0)}
    ladder = {
        "_asked": 4, "micro_batch": 2, "checkpointing": 0, "_larger": 3, "_may_rise": True, "_quiet": 7, "_same_again": 0,
    }  # fmt: skip
    state = {
        "step": 1,
        "model": weights,
        "ema": None,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "best": {"ap": 0.25, "step": 1},
        "skipped": [],
        "survivor": ladder,
        "owed": True,
    }
    save_state(tmp_path / "state.pt", state)
    read = load_state(tmp_path / "state.pt", require_state)
    assert read["best"] == {"score": 0.25, "step": 1}
    assert (read["survivor"]["asked"], read["survivor"]["quiet"], read["pending_evaluation"]) == (4, 7, True)
    assert torch.equal(read["model"]["layer"], weights["layer"])


def test_weights_make_the_model_again() -> None:
    workload = workload_from_metadata(METADATA)
    assert workload.classes == ("date", "fig", "hazelnut")
    assert isinstance(workload.setting, RfDetrSetting)
    assert (workload.setting.resolution, workload.setting.num_queries, workload.setting.groups) == (64, 20, 1)


def test_a_plan_is_trained_and_measured(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(PLAN))
    recipe = with_plan(make_recipe("rfdetr-nano", plan=file, data="fruits"))
    assert (recipe.micro_batch, recipe.effective_batch, recipe.checkpointing, recipe.workers) == (8, 16, 3, 4)
    setting = planned_setting(file)
    assert isinstance(setting, RfDetrSetting)
    assert (setting.micro_batch, setting.accumulation, setting.groups) == (8, 2, 4)


def test_a_plan_of_another_schema_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(PLAN | {"schema": 0}))
    with pytest.raises(TrainfitError, match="write one with trainfit plan --out"):
        planned_setting(file)
