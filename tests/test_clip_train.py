"""Family clip as a user runs it: trains, is killed, resumes, is evaluated; its parts are open_clip's."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from clip_cases import COCA, TINY, random_pairs, register
from conftest import rows, run, shared_data
from trainfit.errors import TrainfitError
from trainfit.models.clip.architecture import build_model, preprocessing, unlock
from trainfit.models.clip.data import centre_crop, random_crop, tokenize
from trainfit.models.clip.family import ClipSetting, Freeze
from trainfit.models.clip.losses import image_features
from trainfit.models.clip.names import match
from trainfit.models.clip.schedule import lr_factor
from trainfit.models.clip.upstream_flags import translate
from trainfit.models.clip.workload import Clip, from_upstream
from trainfit.models.setting import make_setting
from trainfit.models.workload import OptimizerSettings
from trainfit.training.recipe import make_recipe, resolve_batching
from trainfit.weights import load_weights

PACKAGE = Path(__file__).parents[1] / "src"
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
FAST = ["--workers", 0, "--device", "cpu", "--micro-batch", 8, "--effective-batch", 13, "--warmup-steps", 3]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with CLIP's vocabulary."""
    return register(tmp_path_factory.mktemp("small"), "small", SMALL, dropout=0.2)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 26 small images with two texts each."""
    folder = tmp_path_factory.mktemp("drawn")
    lines = ["filepath,title"]
    for number in range(26):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines += [f"{number}.png,square {number}", f"{number}.png,noise of seed {number}"]
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def test_coco_captions_train_and_are_found_again(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five captions an image: one is drawn each epoch; evaluation counts all five. Trained on, they are found."""
    out, data = tmp_path / "run", shared_data("coco_mini_cc")
    words = ["--epochs", 20, "--lr", 1e-3, "--eval-every", 0, "--augment", "none", "--out", out, *FAST]
    assert run("train", small, "--data", data, *words) == 0
    printed = capsys.readouterr()
    assert "26 train, 25 val images, 130 texts" in printed.err
    assert f"trainfit evaluate {out} --data DATA" in printed.out
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert len(losses) == 40
    assert min(losses[-4:]) < 0.75 * losses[0]
    assert run("evaluate", out, "--data", data, "--split", "train", "--json", "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["texts"]) == (26, 130)
    assert found["image_to_text_r5"] > 0.5  # by chance 0.18: one of five texts among the first 5 of 130
    assert found["text_to_image_r1"] > 4 / 26


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "trainfit", *map(str, words)]


def test_a_killed_run_ends_as_one_that_was_not(small: str, drawn: Path, tmp_path: Path) -> None:
    """With dropped patches, drawn captions and random crops; the weights are equal bit for bit."""
    words = ["train", small, "--data", drawn, "--epochs", 12, "--eval-every", 0, *FAST]
    words += ["--save-minutes", 0]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"env": environment, "stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(*words, "--out", tmp_path / "whole") == 0
    torch.set_num_threads(threads)
    process = subprocess.Popen(command(*words, "--out", tmp_path / "killed"), **options)
    until, file = time.monotonic() + 120, tmp_path / "killed" / "metrics.jsonl"
    while time.monotonic() < until and (not file.exists() or file.read_text().count('"loss"') < 4):
        time.sleep(0.02)
        assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(rows(tmp_path / "killed")) < 24
    assert run("train", "--resume", tmp_path / "killed") == 0
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert texts[0] == texts[1]
    weights = [load_weights(tmp_path / name / "last.safetensors")[0] for name in ("whole", "killed")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("changes", "knobs"),
    [
        ({}, {"loss": "siglip"}),
        ({}, {"text_ratio": 2.0, "positives": "texts"}),
        ({}, {"freeze": "image"}),
        ({}, {"freeze": "text", "unlocked_groups": 1}),
        ({}, {"contrastive": "plain"}),
        (COCA | {"text_cfg": {**COCA["text_cfg"], "vocab_size": 49408}}, {"checkpointing": "all"}),
    ],
)
def test_every_loss_trains(drawn: Path, tmp_path: Path, changes: dict[str, Any], knobs: dict[str, Any]) -> None:
    changes = {**SMALL, **changes}
    if "multimodal_cfg" in changes:
        changes["embed_dim"] = 16
        changes["multimodal_cfg"] = {**changes["multimodal_cfg"], "vocab_size": 49408}
    model = register(tmp_path, "model", changes)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in knobs.items()]
    out = tmp_path / "run"
    assert run("train", model, "--data", drawn, "--max-steps", 2, "--out", out, *FAST, *words) == 0
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    workload = Clip(make_setting(model, **knobs), ())  # pyright: ignore[reportArgumentType]
    theirs = workload.build()
    workload.load(theirs, str(out / "best-open_clip.pt"))


def test_a_run_is_a_teacher(small: str, drawn: Path, tmp_path: Path) -> None:
    assert run("train", small, "--data", drawn, "--max-steps", 1, "--out", tmp_path / "teacher", *FAST) == 0
    weights = tmp_path / "teacher" / "best.safetensors"
    words = ["--distill-model", weights, "--max-steps", 1, "--out", tmp_path / "student", *FAST]
    assert run("train", small, "--data", drawn, *words) == 0
    assert {"contrastive", "distillation"} <= rows(tmp_path / "student")[0].keys()


BATCHNORM = {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}}


def test_batchnorm_is_refused_or_frozen(tmp_path: Path) -> None:
    model = register(tmp_path, "resnet", {**TINY, **BATCHNORM})
    with pytest.raises(TrainfitError, match=r"BatchNorm layers.*--freeze batchnorm"):
        Clip(ClipSetting(model=model), ()).require_trainable()
    for knobs in ({"freeze": "batchnorm"}, {"freeze": "image"}, {"contrastive": "plain"}):
        workload = Clip(ClipSetting(model=model, **knobs), ())  # pyright: ignore[reportArgumentType]
        workload.require_trainable()
    frozen = Clip(ClipSetting(model=model, freeze="batchnorm"), ())
    network = frozen.build()
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    window = random_pairs(6)
    image_features(network, window)
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())
    assert frozen.parameter_groups(network, OptimizerSettings())


@pytest.mark.parametrize("changes", [{}, BATCHNORM, COCA])
def test_weights_load_in_open_clip_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = register(tmp_path, "model", {**TINY, **changes})
    workload = Clip(ClipSetting(model=model, freeze="batchnorm"), ())
    torch.manual_seed(1)
    ours = workload.build().eval()
    workload.export(ours.state_dict(), tmp_path / "ours.pt")
    theirs: Any = open_clip.create_model("model", pretrained=str(tmp_path / "ours.pt")).eval()
    window = random_pairs(3)
    theirs.trainfit_preprocessing = preprocessing("model")
    with torch.no_grad():
        torch.testing.assert_close(image_features(theirs, window)[0], image_features(ours, window)[0])
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}, "epoch": 3}, tmp_path / "theirs.pt"
    )
    _, again, _ = from_upstream(model, str(tmp_path / "theirs.pt"))
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    other = register(tmp_path, "other", {**TINY, "embed_dim": 24})
    with pytest.raises(TrainfitError, match="not of"):
        from_upstream(other, str(tmp_path / "ours.pt"))


def test_groups_and_schedule_are_upstreams() -> None:
    """The rule of open_clip_train/main.py, and its own schedule function."""
    from open_clip_train.scheduler import cosine_lr

    workload = Clip(ClipSetting(model="clip:ViT-S-32"), ())
    model = build_model("clip:ViT-S-32", device="meta")
    groups = workload.parameter_groups(model, OptimizerSettings(lr=1.0, weight_decay=0.2))
    plain = {
        id(p)
        for n, p in model.named_parameters()
        if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
    }
    assert {id(p) for p in groups[0]["params"]} == plain
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert (groups[0]["betas"], groups[0]["eps"]) == ((0.9, 0.98), 1e-6)
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0}])
    theirs = cosine_lr(optimizer, 1.0, 7, 40)
    recipe = SimpleNamespace(warmup_steps=7, schedule="cosine", lr_min_factor=0.0)
    for step in range(40):
        assert lr_factor(step, recipe, steps_per_epoch=1, total_steps=40) == pytest.approx(theirs(step))


@pytest.mark.parametrize(("size", "mode"), list(product([(50, 70), (90, 33), (32, 32)], ["shortest", "squash"])))
def test_evaluation_sees_open_clips_pixels(size: tuple[int, int], mode: str) -> None:
    from dataclasses import replace

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    used = replace(preprocessing("ViT-B-32", 32), resize_mode=mode)
    transform: Any = image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode)
    theirs = transform(image)
    ours = torch.from_numpy(np.asarray(centre_crop(image, used)).copy()).permute(2, 0, 1)
    assert torch.equal((theirs * 255).round().to(torch.uint8), ours)


def test_training_crops_as_torchvision_does() -> None:
    """Areas between 0.9 and 1 and shapes between 3:4 and 4:3, as far as the image has room; the same numbers, the same crop."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    used = preprocessing("ViT-B-32", 32)
    crops = [np.asarray(random_crop(image, used, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])
    assert all(crop.shape == (32, 32, 3) for crop in crops)


def test_texts_are_open_clips_tokens() -> None:
    texts = ["a photo of a cat", "Émile's  café!", "word " * 200]
    assert torch.equal(tokenize("ViT-B-32", texts), open_clip.get_tokenizer("ViT-B-32")(texts))


SOURCE_TABLE = [
    (128, 1, 8, 1024),
    (128, 2, 8, 2048),
    (128, 4, 8, 4096),
    (64, 8, 8, 4096),
    (256, 1, 4, 1024),
    (256, 4, 4, 4096),
]


@pytest.mark.parametrize(("batch", "accumulation", "gpus", "effective"), SOURCE_TABLE)
def test_the_sources_table(batch: int, accumulation: int, gpus: int, effective: int) -> None:
    words = translate(["train", "clip:ViT-B-32", "--batch-size", str(batch), f"--accum-freq={accumulation}"])
    assert words == ["train", "clip:ViT-B-32", "--micro-batch", str(batch), "--accumulation", str(accumulation)]
    recipe = make_recipe("clip:ViT-B-32", data="d", micro_batch=int(words[3]), accumulation=int(words[5]))
    assert resolve_batching(recipe, gpus).effective_batch == effective


def test_upstreams_flags() -> None:
    """Also `--distill-model` with `--accum-freq`, which upstream refuses: its list of what does not work is empty here."""
    theirs = "train --model ViT-B-32 --train-data pairs.csv --precision amp --grad-checkpointing --local-loss "
    theirs += (
        "--gather-with-grad --distill-model ViT-L-14 --distill-pretrained l14.pt --accum-freq 4 --wd 0.1 --warmup 500"
    )
    ours = (
        "train clip:ViT-B-32 --data pairs.csv --precision auto --checkpointing all --accumulation 4 --weight-decay 0.1 "
    )
    ours += "--warmup-steps 500 --distill-model ViT-L-14=l14.pt"
    assert translate(theirs.split()) == ours.split()
    assert translate(["train", "rfdetr-nano", "--batch-size", "4"]) == ["train", "rfdetr-nano", "--batch-size", "4"]
    assert match("clip:vit-b-32") == "clip:ViT-B-32"


def test_upstreams_flags_of_tables_and_locked_towers() -> None:
    theirs = "train --model ViT-B-32 --lock-image --lock-image-unlocked-groups 2 --csv-img-key url --csv-separator ;"
    ours = "train clip:ViT-B-32 --freeze image --unlocked-groups 2 --format table:url,title,;"
    assert translate(theirs.split()) == ours.split()
    words = translate(
        ["train", "clip:ViT-B-32", "--csv-caption-key", "alt", "--lock-text", "--lock-text-unlocked-layers=1"]
    )
    assert words[2:] == ["--freeze", "text", "--unlocked-groups", "1", "--format", "table:filepath,alt"]


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize(("tower", "groups"), [("image", 1), ("image", 2), ("text", 1), ("text", 2)])
def test_a_tower_frozen_in_part_is_upstreams(tmp_path: Path, custom_text: bool, tower: Freeze, groups: int) -> None:
    name = register(tmp_path, f"parts-{custom_text}", {"custom_text": custom_text})
    theirs: Any = build_model(name)
    ours = build_model(name, freeze=tower, unlocked_groups=groups)
    if tower == "image":
        theirs.lock_image_tower(unlocked_groups=groups)
    else:
        theirs.lock_text_tower(unlocked_layers=groups)
    wanted = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in ours.named_parameters() if parameter.requires_grad} == wanted
    assert len(wanted) < len(list(ours.parameters()))
    with pytest.raises(
        TrainfitError, match=r"--unlocked-groups 9 leaves nothing of the .* tower frozen: leave --freeze"
    ):
        build_model(name, freeze=tower, unlocked_groups=9)


def test_a_resnet_is_frozen_as_a_whole() -> None:
    with pytest.raises(TrainfitError, match="--unlocked-groups 1: the image tower cannot be frozen in part"):
        unlock(build_model("clip:RN50", device="meta"), "image", 1)
    with pytest.raises(TrainfitError, match="--unlocked-groups goes with --freeze image or --freeze text"):
        make_recipe("clip:ViT-B-32", data="d", unlocked_groups=2)


def test_the_effective_batch_has_no_default(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["plan", "clip:ViT-B-32", "--memory", "8GiB"], ["train", "clip:ViT-B-32", "--data", drawn]):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(
            r"trainfit: error: --effective-batch is missing: every pair .*; give --effective-batch N\n", error
        )
    recipe = make_recipe("clip:ViT-B-32", data="d", micro_batch=128)
    assert resolve_batching(recipe, 8).effective_batch == 1024  # as open_clip without --accum-freq


def test_at_most_forty_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "clip:ViT-B-32", "--help") == 0
    shown = capsys.readouterr().out
    flags = {flag for flag in re.findall(r"(?<![a-z-])--[a-z][a-z-]+", shown) if not flag.startswith("--no-")} - {
        "--help"
    }
    assert 20 < len(flags) <= 40
    assert "--text-ratio" in flags
    assert "--lr-encoder" not in flags
