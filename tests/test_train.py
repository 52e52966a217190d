"""`trainfit train` on real data sets: trains, evaluates, saves, resumes, detects; and refuses bad input in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import rows, run, shared_data
from trainfit.cli.signals import StopAfterStep
from trainfit.errors import TrainfitError
from trainfit.tasks.detection.sample_set import write_sample_set
from trainfit.training import loader, run_folder
from trainfit.training.loader import WindowPlan
from trainfit.training.recipe import Recipe, resolve_batching

TINY = ["--resolution", "64", "--groups", "1", "--num-queries", "20", "--no-multi-scale", "--workers", "0"]
FAST = [*TINY, "--effective-batch", "8", "--micro-batch", "3"]


@pytest.fixture(scope="module")
def sample_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_set(tmp_path_factory.mktemp("set") / "sample", train=12, val=4)


def test_fruits_nuts_trains_evaluates_saves_resumes_and_detects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = shared_data("fruits_nuts"), tmp_path / "run"
    assert run("train", "rfdetr-nano", "--data", data, "--epochs", 2, "--out", out, *FAST) == 0
    printed = capsys.readouterr().out
    assert "Trained rfdetr-nano for 4 steps" in printed
    assert f"trainfit detect {out}" in printed
    losses = [row for row in rows(out) if "loss" in row]
    assert [row["images"] for row in losses] == [8, 8, 8, 8]  # 16 train images (2 of 18 held out), 2 epochs
    assert {"date", "fig", "hazelnut"} == set(next(r for r in rows(out) if "bbox_ap" in r)["bbox_per_class"])
    assert run("train", "--resume", out, "--epochs", 3, "--workers", 1) == 0
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    image = next((data / "images").glob("*.jpg"))
    assert run("detect", out, image, "--threshold", 0.0, "--json", "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out.split("\n", 1)[1].partition("{")[2].join(["{", ""]))["detections"]
    with Image.open(image) as picture:
        width, height = picture.size
    assert found
    assert all(0 <= b[0] <= b[2] <= width and 0 <= b[1] <= b[3] <= height for b in (row["box"] for row in found))


def test_bccd_trains_and_its_zero_size_boxes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["--epochs", 2, "--out", out, *TINY, "--effective-batch", 64, "--micro-batch", 16, "--eval-every", 0]
    assert run("train", "rfdetr-nano", "--data", shared_data("bccd"), *arguments) == 0
    told = capsys.readouterr().err
    assert told.count("zero-size box") == 2
    assert "BloodImage_00338" in told
    assert "BloodImage_00343" in told
    images = [row["images"] for row in rows(out) if "loss" in row]
    assert images == [64, 64, 64, 13] * 2  # 205 train images: the last window of an epoch is short, none is repeated
    assert run("train", "--resume", out, "--max-steps", 9, "--epochs", 3) == 0
    assert rows(out)[-1]["step"] == 9


def test_a_stop_while_a_window_is_waited_for_saves_what_a_resume_needs(
    sample_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hanging(*_: object) -> None:
        time.sleep(60)

    def requested(_: StopAfterStep) -> bool:
        return True

    out = tmp_path / "run"
    arguments = ["--workers", 1, "--max-steps", 1]
    began = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr(loader.Making, "__call__", hanging)
        patched.setattr(StopAfterStep, "requested", requested)
        assert run("train", "rfdetr-nano", "--data", sample_set, "--out", out, *FAST, *arguments) == 130
    assert time.monotonic() - began < 50
    assert run_folder.load_state(out / run_folder.STATE)["step"] == 0
    assert run("train", "--resume", out, "--workers", 0) == 0
    assert [row["step"] for row in rows(out) if "loss" in row] == [1]


def start(arguments: list[object]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "trainfit", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)


def same_file_tensors(one: Path, other: Path) -> None:
    ours, theirs = run_folder.load_state(one), run_folder.load_state(other)
    assert ours["step"] == theirs["step"]
    assert ours["best"] == theirs["best"]
    for part in ("model", "ema"):
        assert all(torch.equal(value, theirs[part][key]) for key, value in ours[part].items())
    for key, slots in ours["optimizer"]["state"].items():
        assert all(torch.equal(value, theirs["optimizer"]["state"][key][name]) for name, value in slots.items())


def test_killed_and_resumed_run_is_the_uninterrupted_one(sample_set: Path, tmp_path: Path) -> None:
    common: list[object] = ["train", "rfdetr-nano", "--data", sample_set, "--epochs", 4, *FAST[:-4]]
    common += ["--effective-batch", 5, "--micro-batch", 2, "--device", "cpu", "--save-minutes", 0.01]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    straight = start([*common, "--out", whole])
    _, error = straight.communicate(timeout=600)
    assert straight.returncode == 0, error.decode()
    process = start([*common, "--out", killed])
    deadline = time.monotonic() + 300
    while not (killed / run_folder.STATE).exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.7)  # somewhere in a later step, an evaluation or a save
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = start(["train", "--resume", killed])
    _, error = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, error.decode()
    assert (killed / run_folder.METRICS).read_bytes() == (whole / run_folder.METRICS).read_bytes()
    same_file_tensors(whole / run_folder.STATE, killed / run_folder.STATE)


def test_ctrl_c_saves_and_says_how_to_go_on(sample_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(["train", "rfdetr-nano", "--data", sample_set, "--epochs", 50, "--out", out, *FAST])
    deadline = time.monotonic() + 300
    while not (out / run_folder.METRICS).exists() or not (out / run_folder.METRICS).read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"trainfit train --resume {out}" in printed.decode()
    assert run_folder.load_state(out / run_folder.STATE)["step"] == rows(out)[-1]["step"]


def test_two_ranks_train_as_one(sample_set: Path, tmp_path: Path) -> None:
    common: list[object] = ["rfdetr-nano", "--data", sample_set, "--epochs", 2, *FAST[:-4], "--device", "cpu"]
    common += ["--effective-batch", 7, "--micro-batch", 2, "--no-ema", "--save-minutes", 1000]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("train", *common, "--out", one) == 0
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "trainfit",
    ]
    done = subprocess.run(
        [*launcher, "train", *map(str, common), "--out", str(two)],
        capture_output=True,
        check=False,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    ours, theirs = rows(one), rows(two)
    assert [r["images"] for r in ours if "images" in r] == [r["images"] for r in theirs if "images" in r] == [7, 5] * 2
    for single, double in zip(ours, theirs, strict=True):
        if "loss" in single:
            assert double["loss"] == pytest.approx(single["loss"], rel=1e-4)
            assert double["gradient_norm"] == pytest.approx(single["gradient_norm"], rel=1e-2)


@pytest.mark.parametrize(("gpus", "micro", "accumulation"), [(1, 4, 4), (2, 4, 2), (4, 4, 1), (8, 2, 1)])
def test_effective_batch_is_kept_over_ranks(gpus: int, micro: int, accumulation: int) -> None:
    batching = resolve_batching(Recipe(model="rfdetr-nano", data="sample"), gpus)
    assert (batching.micro_batch, batching.accumulation, batching.effective_batch) == (micro, accumulation, 16)


def test_given_batch_sizes_must_agree() -> None:
    recipe = Recipe(model="rfdetr-nano", data="x", micro_batch=2, accumulation=3, effective_batch=8)
    with pytest.raises(TrainfitError, match="--effective-batch 8 is not --micro-batch 2 x --accumulation 3"):
        resolve_batching(recipe, 1)
    assert resolve_batching(Recipe(model="m", data="x", micro_batch=2, accumulation=3), 2).effective_batch == 12


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_is_seen_once_an_epoch(world_size: int) -> None:
    plans = [
        WindowPlan(images=23, effective_batch=5, sizes=(64, 96), seed=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    orders: list[list[int]] = []
    for epoch in range(2):
        steps = range(epoch * 5, epoch * 5 + 5)
        orders.append([index for step in steps for plan in plans for index in plan.indices(step)])
        assert sorted(orders[-1]) == list(range(23))
        assert all(len({plan.size(step) for plan in plans}) == 1 for step in steps)
    assert orders[0] != orders[1]


def message(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The last line on stderr of a command that must fail."""
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("trainfit: error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def test_bad_data_is_one_line(sample_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "rfdetr-nano", *FAST, "--out", tmp_path / "run", "--data"]
    assert "no such" in message(capsys, *train, tmp_path / "nowhere")
    empty, broken, outside = tmp_path / "empty", tmp_path / "broken", tmp_path / "outside"
    for folder in (empty, broken, outside):
        shutil.copytree(sample_set, folder)
    file = next(p.relative_to(sample_set) for p in sorted(sample_set.rglob("*.json")) if "train" in str(p))
    (empty / file).write_text("")
    assert str(file.name) in message(capsys, *train, empty)
    (broken / file).write_text('{"images": [')
    assert str(file.name) in message(capsys, *train, broken)
    content = json.loads((outside / file).read_text())
    content["annotations"][0]["category_id"] = 99
    (outside / file).write_text(json.dumps(content))
    assert "99" in message(capsys, *train, outside)


def test_truncated_image_is_left_out_and_named(
    sample_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample_set, data)
    image = sorted(p for p in data.rglob("*") if p.suffix in (".jpg", ".png") and "train" in str(p))[2]
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    assert run("train", "rfdetr-nano", "--data", data, "--epochs", 1, "--out", tmp_path / "run", *FAST) == 0
    told = capsys.readouterr().err
    assert image.name in told
    assert "truncated" in told


def test_bad_flags_and_folders_are_one_line(
    sample_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "rfdetr-nano", "--data", sample_set]
    (tmp_path / "file").write_text("")
    assert "cannot be written" in message(capsys, *train, *FAST, "--out", tmp_path / "file" / "run")
    flags = ["--resolution", 100, "--no-snap", "--out", tmp_path / "run"]
    assert "use 96" in message(capsys, *train, *flags)
    assert "Perhaps you meant rfdetr-nano" in message(capsys, "train", "rfdetr-nan", "--data", sample_set)
    assert "no such file" in message(capsys, *train, *FAST, "--out", tmp_path / "a", "--weights", tmp_path / "none.pth")
    for model in ("my.file:task",):
        untrained = message(capsys, "train", model, "--data", sample_set, "--out", tmp_path / "none")
        assert f"trainfit does not train {model} yet" in untrained
        assert not (tmp_path / "none").exists()
    assert "is not a run folder" in message(capsys, "train", "--resume", tmp_path)
    assert "--data is missing" in message(capsys, "train", "rfdetr-nano")


def test_a_run_folder_is_not_overwritten(sample_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "rfdetr-nano", "--data", sample_set, *FAST, "--max-steps", 1, "--out", tmp_path / "run"]
    assert run(*train) == 0
    assert "--resume" in message(capsys, *train)
    assert "--lr" in message(capsys, "train", "--resume", tmp_path / "run", "--lr", 0.5)


def test_full_disk_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run_folder.save_state(path, {"step": 1, "tensor": torch.zeros(10)})
    script = (
        "import resource, torch; from pathlib import Path; from trainfit.training import run_folder;"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        f"run_folder.save_state(Path({str(path)!r}), {{'step': 2, 'tensor': torch.zeros(10**6)}})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert "TrainfitError: could not save" in done.stderr.splitlines()[-1]
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "the previous one is intact" in done.stderr.splitlines()[-1]
    assert run_folder.load_state(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_damaged_state_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(TrainfitError, match=r"is damaged.*--weights"):
        run_folder.load_state(tmp_path / "state.pt")
