"""The flags of every command: how many, in which groups, with which help; and the command lines of version 0.1."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import trainfit
from conftest import run
from trainfit.cli import commands
from trainfit.cli.arguments import todays_flags
from trainfit.cli.flags import GROUPS, field_texts
from trainfit.cli.measure import MeasureFlags
from trainfit.cli.plan import PlanFlags
from trainfit.cli.predict import PredictFlags
from trainfit.models.family import families, family_of
from trainfit.models.setting import Setting
from trainfit.training.recipe import Recipe, make_recipe, recipe_type, resume_recipe
from trainfit.values import In

MOST = 40
"""Flags of one command, without -h."""
MODELS = {
    "rfdetr": "rfdetr-nano",
    "maskrcnn": "maskrcnn-r50-v2",
    "clip": "clip:ViT-B-32",
    "classifier": "timm:resnet18",
    "custom": "module:function",
}
"""A model of each family of the package."""
WITH_MODEL = ("plan", "train", "predict", "measure")
OTHERS = ("check-data", "check-exactness", "detect", "evaluate", "explain", "export", "report")
CASES = [*((command, model) for command in WITH_MODEL for model in MODELS.values()), *((each, "") for each in OTHERS)]


def test_a_model_of_every_family() -> None:
    assert MODELS.keys() == {
        name for name, family in families().items() if family.setting.__module__.startswith("trainfit.")
    }


def shown(capsys: pytest.CaptureFixture[str], command: str, model: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    words = [command, *([model] if model else []), "--help"]
    assert run(*words) == 0
    return capsys.readouterr().out


def flags(text: str) -> Iterator[str]:
    """Names of the flags in a help (without boxes here); a switch and its negation are one."""
    for line in text.splitlines():
        match = re.match(r"^  (--[a-z0-9-]+)", line)
        if match:
            yield match[1].removeprefix("--no-").removeprefix("--")


@pytest.mark.parametrize(("command", "model"), CASES)
def test_help_is_short_and_readable(
    command: str, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(capsys, command, model, monkeypatch)
    names = list(flags(text))
    assert len(names) == len(set(names))
    assert 0 < len(names) <= MOST
    assert "None" not in text
    assert "{None}" not in text
    assert [line for line in text.splitlines() if len(line) > 80 and not line.startswith("usage:")] == []


@pytest.mark.parametrize("model", MODELS.values())
def test_rare_flags_are_in_the_long_help_and_work(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field that is a flag is in `--help-all`, and `--help` leaves out the rare ones alone."""
    short = set(flags(shown(capsys, "train", model, monkeypatch)))
    assert run("train", model, "--help-all") == 0
    long = set(flags(capsys.readouterr().out))
    kind = recipe_type(family_of(model)[0].setting)
    rare = {
        name.replace("_", "-")
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if any(isinstance(extra, In) and extra.rare for extra in get_args(hint)[1:])
    }
    assert "save-minutes" in rare
    assert long - short == rare & long
    assert run("train", model, "--save-minutes", "soon") == 2
    assert "--save-minutes" in capsys.readouterr().err


@pytest.mark.parametrize("model", MODELS.values())
def test_flags_of_training_are_in_groups(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(capsys, "train", model, monkeypatch)
    panels = re.findall(r"^ (\w+) options +$", text, re.MULTILINE)
    wanted = ["data", "batch", "memory", "schedule", "run"]
    assert [name for name in panels if name in wanted] == wanted
    free = re.split(r"\n options +\n", text)[1].split(" options ")[0]
    assert list(flags(free)) == []  # each flag belongs to a group
    kind = recipe_type(family_of(model)[0].setting)
    own = {field.name.replace("_", "-") for field in fields(kind)}
    assert set(flags(text)) <= own


KINDS = [each.setting for each in families().values()]


@pytest.mark.parametrize("kind", [*KINDS, *map(recipe_type, KINDS)])
def test_every_field_says_what_it_is(kind: Any) -> None:
    texts = field_texts(kind)
    assert [field.name for field in fields(kind) if not texts.get(field.name)] == []


def test_groups_are_known() -> None:
    """A knob with a misspelt group would have no flag."""
    hints = [hint for kind in KINDS for hint in get_type_hints(recipe_type(kind), include_extras=True).values()]
    groups = {extra.group for hint in hints for extra in get_args(hint)[1:] if isinstance(extra, In)}
    assert {"data", "batch", "memory", "schedule", "run"} <= groups <= {*GROUPS, None}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"trainfit {trainfit.__version__}\n"


def test_switches_that_may_be_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--ema` and `--no-ema` are given, and without them the family decides."""
    asked: list[Any] = []

    def fit(recipe: Any, **_: Any) -> None:
        asked.append(recipe)
        raise trainfit.TrainfitError("enough")

    monkeypatch.setattr("trainfit.training.fit.fit", fit)
    for words in ([], ["--ema"], ["--no-ema"], ["--ema", "False"]):
        assert run("train", "rfdetr-nano", "--data", "sample", *words) == 2
    assert [recipe.ema for recipe in asked] == [None, True, False, False]


def test_flags_of_version_0_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert todays_flags(["train", "--from", "runs/a", "--ema", "False"]) == ["train", "--weights", "runs/a", "--no-ema"]
    assert todays_flags(["train", "--from=runs/a"]) == ["train", "--weights=runs/a"]
    assert run("train", "rfdetr-nano", "--data", "sample", "--from", tmp_path, "--weights", "x.pth") == 2
    assert capsys.readouterr().err == "trainfit: error: --from is what --weights RUN was called: give one of the two\n"


def test_switches_of_augmentation_of_version_0_1() -> None:
    words = ["train", "rfdetr-nano", "--no-augment", "--data", "x", "--augment"]
    assert todays_flags(words) == ["train", "rfdetr-nano", "--augment", "none", "--data", "x", "--augment", "default"]
    assert todays_flags(["train", "--augment", "none,flip"]) == ["train", "--augment", "none,flip"]


def test_recipes_of_version_0_1(tmp_path: Path) -> None:
    """`from_run` was the run that `weights` may name now."""
    (tmp_path / "recipe.json").write_text(
        '{"model": "rtdetr-seg-nano", "data": "sample", "recipe": "masks", "from_run": "runs/a", "weights": null, '
        '"augment": false}'
    )
    recipe: Any = resume_recipe(make_recipe("rtdetr-seg-nano", resume=tmp_path))
    assert (recipe.weights, recipe.stage, recipe.augment) == ("runs/a", "masks", "none")


@pytest.mark.parametrize("name", MODELS)
def test_a_knob_is_declared_once(name: str) -> None:
    """One class declares a knob with its type, check and docstring, for the plan, the prediction and the training alike.

    Only `model` is declared again: a recipe may leave it out.
    """
    setting = families()[name].setting
    recipe = recipe_type(setting)
    again: dict[str, list[type]] = {}
    for knob in fields(setting):
        vocabularies = (*recipe.__mro__[1:], PlanFlags, PredictFlags, MeasureFlags)
        declaring = [each for each in vocabularies if knob.name in vars(each).get("__annotations__", {})]
        if len(declaring) != 1:
            again[knob.name] = declaring
    assert again == {"model": [Recipe, Setting]}


def test_commands_are_those_of_the_page() -> None:
    assert list(commands([""])) == [*WITH_MODEL[:1], "train", "predict", "measure", *OTHERS]


def test_a_switch_that_is_on_shows_both_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside `--no-decode` alone, the help of `--decode` would say the opposite."""
    assert run("check-data", "--help") == 0
    assert "--decode, --no-decode" in capsys.readouterr().out
    assert run("predict", "rfdetr-nano", "--help-all") == 0
    assert "--cache, --no-cache" in capsys.readouterr().out
