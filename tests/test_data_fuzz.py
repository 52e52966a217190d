"""Everything a user can hand in: a sample of `benchmarks/fuzz_data.py`, and what each defect says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from conftest import run
from data_corpus import CANARY, NASTY, cases, coco_files, picture, voc_files, write_files, write_outside, yolo_files
from data_trial import trial
from trainfit.errors import TrainfitError
from trainfit.tasks.detection.check import check_dataset
from trainfit.tasks.detection.masks import mask_area, require_masks, rle_fault
from trainfit.tasks.detection.read import read_dataset, require_no_errors
from trainfit.tasks.detection.samples import DetectionDataset

SAMPLE = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for a data set, beside files that no data set may read."""
    write_outside(tmp_path / "outside")
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def read(folder: Path, files: dict[str, bytes], **options: Any) -> DetectionDataset:
    write_files(files, folder)
    return read_dataset(folder, **options)


def named(dataset: DetectionDataset) -> set[tuple[str, str]]:
    return {(f.severity, f.kind) for f in dataset.findings if f.severity != "note"}


def first(**changes: Any) -> dict[str, bytes]:
    """A COCO set whose first annotation is changed."""
    return coco_files(lambda document: document["annotations"][0].update(changes))


def test_a_sample_of_the_corpus_is_named_or_trainable(tmp_path: Path) -> None:
    corpus = list(cases(600))
    for case in corpus[:: len(corpus) // SAMPLE]:
        if case.name != "image large":  # seconds long
            outcome = trial(case, tmp_path / "case")
            assert outcome.good, f"{case.name}: {outcome}"


def test_the_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    """Mutations once changed the values that later ones took."""
    before = repr(NASTY)
    for number, case in enumerate(list(cases(900))[-60:]):
        case.write(tmp_path / str(number))
    assert repr(NASTY) == before


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (b"[]," * 3_000_000, "lists and objects in"),
        (b"0," * 20_000, "20000 of 20001 annotations are not objects"),
    ],
)
def test_a_file_that_holds_no_annotations_is_refused_before_it_takes_memory(
    folder: Path, entries: bytes, reason: str
) -> None:
    files = coco_files(lambda document: document.update(annotations=[{"id": 1}]))
    name = "train/_annotations.coco.json"
    with pytest.raises(TrainfitError, match=reason):
        read(folder, files | {name: files[name].replace(b'[{"id": 1}]', b"[" + entries + b'{"id": 1}]')})


@pytest.mark.parametrize(("kind", "number"), [("coco", 10_050), ("yolo", 10_050)])
def test_of_many_findings_of_a_kind_some_are_listed_and_the_others_counted(
    folder: Path, kind: str, number: int
) -> None:
    strays = [{"id": 100 + n, "image_id": 99, "category_id": 7, "bbox": [1, 1, 2, 2]} for n in range(number)]
    lines = "".join(f"x {n}\n" for n in range(number))
    files = coco_files(lambda d: d["annotations"].extend(strays)) if kind == "coco" else yolo_files(lines)
    dataset = read(folder, files)
    skipped = [finding for finding in dataset.findings if finding.severity == "skipped"]
    assert len(skipped) == 10_001
    assert [finding.message for finding in skipped if "not listed" in finding.message] == ["50 more, not listed"]


def test_a_label_file_without_end_is_named(folder: Path) -> None:
    dataset = read(folder, yolo_files("0 0.5 0.5 0.1 0.1\n" * 1_000_000))
    assert ("skipped", "malformed label") in named(dataset)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"segmentation": {"size": [30, 40], "counts": [1000]}}, ("skipped", "broken RLE")),
        ({"segmentation": {"size": [30, 40], "counts": "zz"}}, ("skipped", "broken RLE")),
        ({"segmentation": {"size": [30, 40], "counts": [-5, 1205]}}, ("skipped", "broken RLE")),
        ({"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}, ("mended", "broken polygon")),
        ({"segmentation": [[0, 0, 10**30, 0, 5, 5]]}, ("mended", "broken polygon")),
        ({"segmentation": [[0, 0, 40, 30] * 20_000]}, ("mended", "broken polygon")),
        ({"bbox": [5, 5, 1e-9, 10]}, ("skipped", "zero-size box")),
        ({"bbox": [5, 5, 10**400, 10]}, ("skipped", "box not finite")),
        ({"image_id": [0]}, ("skipped", "annotation without image")),
        ({"category_id": [7]}, ("error", "unknown class")),
        ({"id": 2**63}, ("mended", "broken annotation id")),
        ({"area": "big"}, ("mended", "broken area")),
        ({"area": float("nan")}, ("mended", "broken area")),
        ({"area": -4}, ("mended", "broken area")),
        ({"iscrowd": "no"}, ("skipped", "malformed annotation")),
    ],
)
def test_a_broken_annotation_is_named_and_the_rest_is_read(
    folder: Path, changes: dict[str, Any], kind: tuple[str, str]
) -> None:
    dataset = read(folder, first(**changes))
    assert named(dataset) == {kind}
    (finding,) = [f for f in dataset.findings if f.kind == kind[1]]
    assert finding.where.startswith("train/_annotations.coco.json annotation ")
    assert len(finding.message) < 300
    assert [len(record.classes) for record in dataset.splits["train"][1:]] == [4, 4]


def test_a_float_size_of_an_rle_is_mended(folder: Path) -> None:
    dataset = read(folder, first(segmentation={"size": [30.0, 40.0], "counts": [155, 10, 1035]}))
    shape = dataset.splits["train"][0].segmentations[0]
    assert shape is not None
    assert mask_area(shape, 30, 40) == 10
    assert not named(dataset)


def test_every_mask_that_is_admitted_has_the_pixels_of_the_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(n) for n in rng.integers(1, 90, 2))
        pixels = (rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 1.0])).astype(np.uint8)
        rle = coco_mask.encode(np.asfortranarray(pixels))
        text = cast(bytes, rle["counts"]).decode()
        assert rle_fault({"counts": text}, height, width) is None
        assert rle_fault({"counts": text}, height + 1, width) is not None
        assert mask_area({"size": [height, width], "counts": text}, height, width) == pixels.sum()
        assert rle_fault({"counts": text[:-1]}, height, width) is not None


def test_a_set_with_masks_here_and_there_says_that_masks_cannot_be_trained(folder: Path) -> None:
    dataset = check_dataset(read(folder, first(segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]])))
    assert "objects without a mask" in {f.kind for f in dataset.findings}
    with pytest.raises(TrainfitError, match="have objects without a mask"):
        require_masks(dataset.splits["train"])


@pytest.mark.parametrize("place", ["../outside/x.png", "ABSOLUTE", "link.png"])
def test_files_outside_of_the_data_set_are_refused_unless_allowed(folder: Path, place: str) -> None:
    outside = folder.parent / "outside" / "x.png"
    (folder / "train").mkdir()
    (folder / "train" / "link.png").symlink_to(outside)
    name = str(outside) if place == "ABSOLUTE" else f"../{place}" if place.startswith("..") else place
    files = coco_files(lambda document: document["images"][0].update(file_name=name))
    dataset = read(folder, files)
    with pytest.raises(
        TrainfitError, match=r"annotations\.coco\.json image 0: outside the data set: .*--allow-outside"
    ):
        require_no_errors(dataset)
    assert len(dataset.splits["train"]) == 2
    assert len(read_dataset(folder, allow_outside=True).splits["train"]) == 3


@pytest.mark.parametrize("place", ["../../", "../outside", "/etc/passwd", "../outside/secret.txt"])
def test_yolo_entries_outside_are_refused_and_not_read(
    folder: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(yolo_files(data=f"names: [cat, dog]\ntrain: {place}\nval: images/val\n"), folder)
    assert run("check-data", folder) == 2
    assert "--allow-outside" in capsys.readouterr().err
    if place.endswith(("passwd", "secret.txt")):
        assert run("check-data", folder, "--allow-outside") == 2
        said = "".join(capsys.readouterr())
        assert CANARY not in said
        assert "root:" not in said


def test_what_is_no_regular_file_is_named_at_once(folder: Path) -> None:
    by_name = {case.name: case for case in cases(600)}
    outcome = trial(by_name["pipe train/_annotations.coco.json"], folder.parent / "case", limit_s=20)
    assert (outcome.verdict, "not a regular file" in outcome.detail) == ("refused in one line", True)
    assert trial(by_name["pipe Annotations/a.xml"], folder.parent / "case", limit_s=20).good


def test_copies_of_a_yolo_line_are_one_object(folder: Path) -> None:
    dataset = read(folder, yolo_files("0 0.5 0.5 0.1 0.1\n" * 5000))
    assert len(dataset.splits["train"][0].classes) == 1
    assert ("skipped", "identical lines") in named(dataset)
    crowded = "\n".join(f"0 0.5 0.5 0.2 {0.1 + n / 1e5}" for n in range(2001))
    assert ("skipped", "too many objects") in named(read(folder, yolo_files(crowded)))


def test_names_of_classes_stay_as_they_are_written(folder: Path) -> None:
    files = yolo_files(data="names: [no, 2020-13-45, 1.50]\ntrain: images/train\nval: images/val\n")
    assert read(folder, files).classes == ("no", "2020-13-45", "1.50")


def test_voc_width_and_lists(folder: Path) -> None:
    xml = "<annotation><size><width>²</width></size></annotation>".encode()
    assert ("mended", "wrong image size") in named(read(folder, voc_files(xml)))
    with pytest.raises(TrainfitError, match=r"train\.txt: is not UTF-8 text at byte 0"):
        read(folder, voc_files(train=b"\xe9\n"))


def test_only_the_named_image_formats_are_opened(folder: Path) -> None:
    assert ("skipped", "unreadable image") in named(
        read(folder, coco_files() | {"train/a.png": picture(0, kind="PPM")})
    )


def test_the_report_has_no_escapes_and_needs_no_unicode(folder: Path) -> None:
    write_files(coco_files(lambda d: d["categories"][0].update(name="\x1b[31mcát")), folder)
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    code = "from trainfit.cli import main; main()"
    command = [sys.executable, "-c", code, "check-data", str(folder), "--format", "coco"]
    result = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert b"\x1b" not in result.stdout
    assert rb"\x1b[31mc\xe1t" in result.stdout
    assert b"####" in result.stdout
    assert all(
        line.startswith(b"decoded ") and line.isascii() for line in result.stderr.splitlines()
    )  # a slow machine's


def test_json_and_format_are_flags(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(first(category_id=[7]), folder)
    assert run("check-data", folder, "--json", "--format", "coco") == 1
    assert json.loads(capsys.readouterr().out)["schema"] == 1
