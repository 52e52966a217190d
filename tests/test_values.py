"""What a user hands in is checked by the annotations, alike for command line, recipe, plan and constructor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import run
from trainfit.errors import TrainfitError
from trainfit.models.setting import Setting, make_setting, setting_from_json
from trainfit.planning.plan import with_plan
from trainfit.training.recipe import Recipe, encode, resume_recipe

make_recipe: Callable[..., Recipe] = Recipe
BAD: list[tuple[str, Any, str]] = [
    ("optimizer", "adamw-fusd", r"--optimizer must be .* Perhaps you meant adamw-fused"),
    ("precision", "int3", r"--precision must be auto, fp32, fp16 or bf16, not 'int3'"),
    ("ema", "maybe", r"--ema must be true or false, not 'maybe'"),
    ("lr", float("nan"), r"--lr must be a finite number, not nan"),
    ("lr", -1.0, r"--lr must be at least 0, not -1\.0"),
    ("workers", 1_000_000, r"--workers must be at most 256, not 1000000"),
    ("epochs", True, r"--epochs must be a whole number, not True"),
    ("epochs", 10**400, r"--epochs must be at most 1e\+06"),
    ("resolution", 10**9, r"--resolution must be at most 8192"),
    ("num_queries", 0, r"--num-queries must be at least 1, not 0"),
    (
        "checkpointing",
        "al",
        r"--checkpointing must be a whole number, none, all or offload, not 'al'. Perhaps you meant all",
    ),
    ("model", 5, r"--model must be text, not 5"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_bad_value_is_refused_wherever_it_comes_from(name: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainfitError, match=message):
        make_recipe(**{"model": "rfdetr-nano", "data": "x", name: value})
    recipe = json.loads(encode(Recipe(model="rfdetr-nano", data="x")))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {name: value}))
    with pytest.raises(TrainfitError, match=rf"recipe\.json: {message}"):
        resume_recipe(Recipe(resume=tmp_path))


@pytest.mark.parametrize(("name", "value", "message"), [bad for bad in BAD if bad[0] not in ("lr", "epochs", "model")])
def test_a_bad_value_of_a_plan_is_refused(name: str, value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan = {"schema": 1, "model": "rfdetr-nano", "setting": {"model": "rfdetr-nano"}, "predicted": {}}
    file.write_text(json.dumps(plan | {"knobs": {name: value}}))
    with pytest.raises(TrainfitError, match=rf"plan\.json: {message}"):
        with_plan(Recipe(plan=file, data="x"))
    if name != "workers":
        with pytest.raises(TrainfitError, match=message):
            setting_from_json({"model": "rfdetr-nano", name: value})
        with pytest.raises(TrainfitError, match=message):
            make_setting("rfdetr-nano", **{name: value})


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "model": (lambda plan: plan.pop("model"), "no 'model'"),
    "knobs": (lambda plan: plan.update(knobs=[]), "no 'knobs'"),
    "knob": (
        lambda plan: plan["knobs"].update(micro_bach=1),
        r"unknown key 'micro_bach'\. Perhaps you meant 'micro_batch'",
    ),
    "other knob": (lambda plan: plan["knobs"].update(out="/tmp"), "unknown key 'out'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_named(damage: str, tmp_path: Path) -> None:
    plan: dict[str, Any] = {"schema": 1, "model": "rfdetr-nano", "knobs": {}, "setting": {}, "predicted": {}}
    DAMAGES[damage][0](plan)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    with pytest.raises(TrainfitError, match=rf"--plan .*plan\.json.*{DAMAGES[damage][1]}"):
        with_plan(Recipe(plan=file, data="x"))


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"modl": "x"}', "[" * 100_000, "\ufeff{}"])
def test_a_damaged_recipe_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(TrainfitError, match=r"recipe\.json"):
        resume_recipe(Recipe(resume=tmp_path))


def test_settings_of_other_families_knobs_still_load() -> None:
    setting = setting_from_json({"model": "rfdetr-nano", "canvas": None, "micro_batch": 3})
    assert isinstance(setting, Setting)
    assert setting.micro_batch == 3


# ---- given, and equal to the default


def test_a_given_default_differs_from_what_was_not_given(tmp_path: Path) -> None:
    saved = Recipe(model="rfdetr-nano", data="sample", epochs=50, eval_every=5, lr=0.5, out=tmp_path)
    (tmp_path / "recipe.json").write_text(encode(saved))
    assert resume_recipe(Recipe(resume=tmp_path)).epochs == 50
    assert resume_recipe(Recipe(resume=tmp_path, epochs=100)).epochs == 100
    assert resume_recipe(Recipe(resume=tmp_path, eval_every=1)).eval_every == 1
    with pytest.raises(TrainfitError, match=r"--lr 0\.0001 differs from the resumed run's 0\.5"):
        resume_recipe(Recipe(resume=tmp_path, lr=1e-4))


def test_a_given_default_is_kept_beside_a_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    knobs = {"precision": "fp16", "micro_batch": 2, "ema": False}
    plan = {"schema": 1, "model": "rfdetr-nano", "knobs": knobs, "setting": {}, "predicted": {}}
    file.write_text(json.dumps(plan))
    recipe = with_plan(Recipe(plan=file, data="x", precision="auto", ema=True))
    assert (recipe.precision, recipe.ema, recipe.micro_batch) == ("auto", True, 2)


def test_flags_of_the_command_line_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Recipe] = []

    def fit(recipe: Recipe, **_: Any) -> None:
        asked.append(resume_recipe(recipe))
        raise TrainfitError("enough")

    monkeypatch.setattr("trainfit.training.fit.fit", fit)
    recipe = Recipe(model="rfdetr-nano", data="sample", epochs=50, ema=False, tensorboard=True, out=tmp_path)
    (tmp_path / "recipe.json").write_text(encode(recipe))
    for flags in (["--epochs", "100"], ["--epochs=100", "--no-tensorboard"], []):
        assert run("train", "--resume", tmp_path, *flags) == 2
    assert [(each.epochs, each.tensorboard) for each in asked] == [(100, True), (100, False), (50, True)]
    capsys.readouterr()
    for words in (["--resume", tmp_path, "--ema"], ["rfdetr-small", "--resume", tmp_path]):
        assert run("train", *words) == 2
        assert "differs from the resumed run's" in capsys.readouterr().err
