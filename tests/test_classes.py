"""Classifiers train on folders by class: reading, accuracy, training, resume, survival."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import trainfit
from conftest import rows, run
from trainfit.errors import TrainfitError
from trainfit.models.build import build_trainable
from trainfit.models.classifier.data import decode
from trainfit.models.setting import make_setting
from trainfit.tasks.augment import OWN
from trainfit.tasks.classes import task
from trainfit.tasks.classes.metric import Accuracy
from trainfit.tasks.classes.samples import ClassRecord, Ranking
from trainfit.tasks.decoding import decoded, threads_for
from trainfit.tasks.graphics import Matrix
from trainfit.weights import load_weights

MODEL = "timm:test_resnet"
COLOURS = {"blue": 2, "green": 1, "red": 0}


def write(folder: Path, count: int, channel: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        pixels = random.integers(0, 60, (40, 48, 3), dtype=np.uint8)
        pixels[..., channel] += 150
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 8), ("val", 4)):
        for name, channel in COLOURS.items():
            write(folder / split / name, count, channel)
    return folder


WORDS = ("--resolution", 32, "--device", "cpu", "--workers", 0, "--effective-batch", 12, "--lr", 0.01)


def test_a_model_learns_colours_and_its_files_are_timms(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, evaluation and a start from the run; timm's own model with the exported file gives the same classes."""
    assert run("train", MODEL, "--data", data, *WORDS, "--epochs", 8, "--out", tmp_path / "run") == 0
    found = [row["top1"] for row in rows(tmp_path / "run") if "top1" in row]
    assert max(found) == 1.0
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", "--data", data, "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["top1"] == 1.0
    picture = data / "val" / "red" / "0.png"
    assert run("detect", tmp_path / "run", picture, "--device", "cpu", "--draw", tmp_path / "drawn") == 0
    assert capsys.readouterr().out.startswith(f"{picture}  red  ")
    assert (tmp_path / "drawn" / "0.png").exists()
    exported = tmp_path / "run" / "best-timm.safetensors"
    model: Any = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(exported)).eval()
    records = task.read(str(data)).splits["val"]
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    for record in records:
        image = decode(record, size=32, augment=frozenset(), generator=torch.Generator()).image
        with torch.no_grad():
            assert int(model((image / 255 - mean)[None] / std).argmax()) == record.label
    assert (
        run(
            "train",
            MODEL,
            "--data",
            data,
            *WORDS,
            "--max-steps",
            1,
            "--weights",
            tmp_path / "run",
            "--out",
            tmp_path / "b",
        )
        == 0
    )


def test_a_stopped_run_resumes_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    words = ("train", MODEL, "--data", data, *WORDS, "--epochs", 3)
    assert run(*words, "--out", tmp_path / "whole") == 0
    assert run(*words, "--max-steps", 3, "--out", tmp_path / "part") == 0
    assert run("train", "--resume", tmp_path / "part", "--max-steps", 6) == 0
    one, other = (load_weights(tmp_path / name / "last.safetensors")[0] for name in ("whole", "part"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_survives_out_of_memory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of more than three images fail; the run ends, with the micro-batch at which it fits."""
    forward = torch.nn.Conv2d.forward

    def crowded(self: torch.nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, images)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", crowded)
    words = (*WORDS, "--micro-batch", 12, "--max-steps", 2, "--out", tmp_path / "run")
    assert run("train", MODEL, "--data", data, *words) == 0
    assert rows(tmp_path / "run")[-1]["top1"] is not None


def test_folders_without_splits_hold_images_of_each_class_out(tmp_path: Path) -> None:
    for name, channel in COLOURS.items():
        write(tmp_path / name, 10, channel)
    dataset = task.read(str(tmp_path), val_fraction=0.2)
    assert dataset.classes == ("blue", "green", "red")
    for split, count in (("train", 8), ("val", 2)):
        labels = [record.label for record in dataset.splits[split]]
        assert [labels.count(row) for row in range(3)] == [count] * 3
    again = task.read(str(tmp_path), val_fraction=0.2)
    assert again.splits == dataset.splits
    assert task.recognises(str(tmp_path))
    assert not task.recognises(str(tmp_path / "blue"))


def test_what_cannot_be_used_is_found(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "train" / "red" / "0.png").write_bytes(b"no image")
    (folder / "train" / "red" / "link.png").symlink_to(data / "train" / "red" / "1.png")
    shutil.copytree(folder / "val" / "red", folder / "val" / "pink")
    kinds = [finding.kind for finding in task.read(str(folder)).findings]
    assert sorted(kinds) == ["file outside", "unknown class", "unreadable image"]
    assert len(task.read(str(folder), allow_outside=True).splits["train"]) == 24
    assert run("check-data", folder) in (0, 1)
    assert "unreadable image" in capsys.readouterr().out


def test_damage_in_the_middle_is_found_by_decoding(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    file = folder / "train" / "green" / "3.png"
    broken = bytearray(file.read_bytes())
    broken[len(broken) // 2] ^= 0xFF  # the head and the end are whole
    file.write_bytes(broken)
    assert not task.read(str(folder)).findings
    seen: list[tuple[int, int]] = []
    (finding,) = task.check(str(folder), progress=lambda done, total: seen.append((done, total))).findings
    assert (finding.kind, finding.where, finding.severity) == ("undecodable image", "train/green/3.png", "skipped")
    assert not finding.message.startswith(str(folder))
    assert seen == [(done, 36) for done in range(1, 37)]
    assert not task.check(str(folder), decode=False).findings


def test_images_are_decoded_by_threads_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, no more at one time than there is memory for, and none after the caller has stopped."""
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    running: list[int] = []
    most: list[int] = []
    started: list[int] = []

    def decode(record: int) -> None:
        running.append(record)
        started.append(record)
        most.append(len(running))
        time.sleep(0.002)
        running.remove(record)
        if record % 7 == 3:
            raise TrainfitError(f"{record} is damaged")

    faults = [fault for _, fault in decoded(range(40), decode, threads=3)]
    assert [number for number, fault in enumerate(faults) if fault] == [3, 10, 17, 24, 31, 38]
    assert 1 < max(most) <= 3
    started.clear()
    for record, _ in decoded(range(1000), decode, threads=3):
        if record == 5:
            break
    assert len(started) < 50
    assert threads_for([ClassRecord(id=0, path=Path("a"), width=8000, height=4000, label=0)]) == 4  # 256 MB each


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ((), "0 folders of classes"),
        (("train/a",), "1 folders of classes"),
        (("train/a", "train/b"), "no usable image"),
        (("val/a", "val/b"), "no train folder, only val"),
    ],
)
def test_a_folder_that_is_none_is_one_line(tmp_path: Path, folders: Sequence[str], message: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(TrainfitError) as caught:
        task.read(str(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(TrainfitError, match="no such folder"):
        task.read(str(tmp_path / "nowhere"))


def test_accuracy_is_that_of_torch() -> None:
    """Against top-k of random scores, image by image; classes of another data set go by name."""
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(50, 9, generator=g), torch.randint(9, (50,), generator=g)
    records = [ClassRecord(id=n, path=Path("x"), width=1, height=1, label=int(label)) for n, label in enumerate(labels)]
    workload = build_trainable(make_setting(MODEL, classes=9), tuple("abcdefghi"))
    metric = task.metric(records, workload)
    ranked = scores.topk(5).indices
    for start in (0, 20):
        part = range(start, 20 if start == 0 else 50)
        metric.add([Ranking(record_id=n, classes=tuple(ranked[n].tolist()), scores=()) for n in part])
    found = metric.result()
    assert found.score == pytest.approx(float((scores.argmax(1) == labels).float().mean()))
    assert found.figures["top-5"] == pytest.approx(float((ranked == labels[:, None]).any(1).float().mean()))
    by_class = [float((scores.argmax(1) == labels)[labels == row].float().mean()) for row in range(9)]
    assert found.figures["mean of classes"] == pytest.approx(sum(by_class) / 9)


def test_weights_of_other_classes_leave_the_head_alone(tmp_path: Path) -> None:
    three = build_trainable(make_setting(MODEL), ("a", "b", "c"))
    model = three.build()
    three.export(model.state_dict(), tmp_path / "three.safetensors")
    four = build_trainable(make_setting(MODEL), ("a", "b", "c", "d"))
    other = four.build()
    remarks = four.load(other, str(tmp_path / "three.safetensors"))
    assert len(remarks) == 1
    assert "the head (fc.bias, fc.weight) starts at random" in remarks[0]
    assert torch.equal(model.state_dict()["conv1.0.weight"], other.state_dict()["conv1.0.weight"])
    vit = build_trainable(make_setting("timm:test_vit"), ("a", "b"))
    with pytest.raises(TrainfitError, match=r"holds no weights of timm:test_vit|does not fit"):
        vit.load(vit.build(), str(tmp_path / "three.safetensors"))


def test_crops_are_reproducible_and_evaluation_takes_the_centre(tmp_path: Path) -> None:
    write(tmp_path / "a", 1, 0)
    record = ClassRecord(id=7, path=tmp_path / "a" / "0.png", width=48, height=40, label=2)
    one, other = (decode(record, size=16, augment=OWN, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.image, other.image)
    centre = decode(record, size=16, augment=frozenset(), generator=torch.Generator())
    assert (centre.image.shape, centre.label, centre.record_id) == ((3, 16, 16), 2, 7)
    with Image.open(record.path) as image:
        wanted = image.resize((16, 16), Image.Resampling.BICUBIC, box=(6.5, 2.5, 41.5, 37.5))
    assert torch.equal(centre.image, torch.from_numpy(np.asarray(wanted).copy()).permute(2, 0, 1))


def test_the_library_trains_them_too(data: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"resolution": 32, "device": "cpu", "workers": 0, "effective_batch": 12}
    summary = trainfit.train(MODEL, data=str(data), max_steps=1, out=str(tmp_path / "run"), **sizes)
    assert summary.evaluation is not None
    assert summary.evaluation.score_name == "top-1"


def test_only_the_head_trains(data: Path, tmp_path: Path) -> None:
    """`--freeze body`: all tensors but the classifier's stay as they began, statistics of BatchNorm included."""
    words = ("--freeze", "body", "--weights", "random", "--epochs", 2, "--out", tmp_path / "run")
    assert run("train", MODEL, "--data", data, *WORDS, *words) == 0
    weights, _ = load_weights(tmp_path / "run" / "last.safetensors")
    torch.manual_seed(0)
    began = build_trainable(make_setting(MODEL, resolution=32), tuple(sorted(COLOURS))).build().state_dict()
    moved = {name for name, value in weights.items() if not torch.equal(value, began[name])}
    assert moved == {"fc.weight", "fc.bias"}


def test_the_confusion_matrix(tmp_path: Path) -> None:
    """Images by true and first class; a class of the model that the data lack is in the last column."""
    truth, first = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 3, 0]
    records = [ClassRecord(id=n, path=tmp_path, width=1, height=1, label=row) for n, row in enumerate(truth)]
    metric = Accuracy(records, ["a", "b", "c"], [0, 1, 2, None])
    metric.add([Ranking(record_id=n, classes=(row,), scores=(1.0,)) for n, row in enumerate(first)])
    (matrix,) = metric.result().graphics
    assert isinstance(matrix, Matrix)
    assert matrix.values == ((1, 1, 0, 0), (0, 1, 0, 0), (1, 0, 1, 1))
    assert (matrix.rows, matrix.columns) == (("a", "b", "c"), ("a", "b", "c", "none of these"))


def test_batch_norm_of_one_value_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--resolution", 32, "--micro-batch", 1, "--effective-batch", 2, "--device", "cpu", "--workers", 0)
    words = (*words, "--weights", "random", "--max-steps", 1, "--out", tmp_path / "run")
    assert run("train", "timm:resnet18", "--data", data, *words) == 2
    assert "BatchNorm sees one value per channel" in capsys.readouterr().err.splitlines()[-1]
