"""Pairs of images and texts: every format is read alike, every defect is named, and the figures are those of plain code."""

import csv
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from conftest import run
from trainfit.errors import TrainfitError
from trainfit.tasks.graphics import Plot
from trainfit.tasks.pairs import features, task
from trainfit.tasks.pairs import metric as metrics
from trainfit.tasks.pairs.metric import RetrievalMetric, ZeroShotMetric
from trainfit.tasks.pairs.read import read_pixels
from trainfit.tasks.pairs.samples import PairFeatures, PairRecord
from trainfit.tasks.task import Metric

TEXTS = [["a red square"], ["a blue square", "nothing but blue"], ["a red square"], ["green, mostly"]]


def draw(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (24 + number, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same four images and their texts in every format."""
    root = tmp_path_factory.mktemp("pairs")
    images = [draw(root / "images" / f"{number}.png", number) for number in range(len(TEXTS))]
    pairs = [(f"images/{image.name}", text) for image, texts in zip(images, TEXTS, strict=True) for text in texts]
    for name, separator in (("pairs.tsv", "\t"), ("pairs.csv", ",")):
        with (root / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerows([("filepath", "title"), *pairs])
    lines = [{"image": f"images/{image.name}", "captions": texts} for image, texts in zip(images, TEXTS, strict=True)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for image, texts in zip(images, TEXTS, strict=True):
        image.with_suffix(".txt").write_text("\n".join(texts))
    annotations = [{"id": i, "image_id": int(Path(path).stem), "caption": text} for i, (path, text) in enumerate(pairs)]
    listed = [{"id": number, "file_name": image.name} for number, image in enumerate(images)]
    (root / "captions_train.json").write_text(json.dumps({"images": listed, "annotations": annotations}))
    (root / "shards").mkdir()
    for shard, numbers in enumerate(((0, 1), (2, 3))):
        with tarfile.open(root / "shards" / f"{shard:04}.tar", "w") as tar:
            for number in numbers:
                tar.add(images[number], f"{number}.png")
                texts = "\n".join(TEXTS[number][:1]).encode()
                info = tarfile.TarInfo(f"{number}.txt")
                info.size = len(texts)
                tar.addfile(info, io.BytesIO(texts))
    return root


FORMATS = [
    "pairs.csv",
    "pairs.tsv",
    "pairs.jsonl",
    "images",
    "captions_train.json",
    "shards",
    "shards/{0000..0001}.tar",
    "shards/0000.tar::ROOT/shards/{0001..0001}.tar",
]


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_same_pairs(home: Path, name: str) -> None:
    path = str(home / name).replace("ROOT", str(home))
    dataset = task.read(path, val_fraction=0.25)
    assert [len(dataset.splits[split]) for split in ("train", "val")] == [3, 1]
    records = sorted((*dataset.splits["train"], *dataset.splits["val"]), key=lambda r: read_pixels(r).height)
    wanted = [texts[:1] if "shard" in name else texts for texts in TEXTS]
    assert [list(record.texts) for record in records] == wanted
    for number, record in enumerate(records):
        assert np.array_equal(np.asarray(read_pixels(record)), np.asarray(Image.open(home / f"images/{number}.png")))
    assert task.recognises(path)


def test_sources_in_several_folders_are_read_as_one(home: Path, tmp_path: Path) -> None:
    draw(tmp_path / "far.png", 9)
    (tmp_path / "far.csv").write_text("filepath,title\nfar.png,a far square\n")
    dataset = task.read(f"{home / 'pairs.csv'}::{tmp_path / 'far.csv'}", val_fraction=0.25)
    texts = [text for split in dataset.splits.values() for record in split for text in record.texts]
    assert sorted(texts) == sorted([*(text for own in TEXTS for text in own), "a far square"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://host/{0..3}.tar", "not from a URL or a pipe: download the shards"),
        ("ROOT/shards/0000.tar::s3://bucket/b.tar", "s3://bucket/b.tar: pairs are read from files on a disk"),
        ("pipe:cat a.tar", "not from a URL or a pipe"),
        ("ROOT/shards/{0000..0002}.tar", "0002.tar: no such file"),
        ("ROOT/pairs.csv::ROOT/none.csv", "none.csv: no such file"),
        ("ROOT/pairs.csv::ROOT/images", "images: sources joined by :: are shards"),
        ("ROOT/pairs.csv::ROOT/shards/0000.tar", "all shards or all tables"),
    ],
)
def test_sources_that_cannot_be_read_are_named(home: Path, path: str, message: str) -> None:
    with pytest.raises(TrainfitError, match=re.escape(message)):
        task.read(path.replace("ROOT", str(home)), val_fraction=0.25)


def test_defects_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, broken = draw(tmp_path / "good.png", 1), tmp_path / "broken.png"
    draw(tmp_path / "other.png", 2)
    broken.write_bytes(good.read_bytes()[:200])
    long = " ".join(["photograph"] * 100)
    rows = [
        ("good.png", "a square"),
        ("good.png", "a square"),
        ("other.png", "a square"),
        ("other.png", long),
        ("broken.png", "half a square"),
        ("none.png", "no square"),
        ("good.png", "  "),
        ("", "a text alone"),
    ]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    assert run("check-data", tmp_path / "pairs.csv", "--json") == 0
    check = json.loads(capsys.readouterr().out)
    kinds = {finding["kind"]: finding["where"] for finding in check["findings"]}
    assert kinds["missing image"] == "pairs.csv line 7"
    assert kinds["empty text"] == "pairs.csv line 8"
    assert kinds["no image"] == "pairs.csv line 9"
    assert kinds["pair twice"] == "pairs.csv line 3"
    assert kinds["undecodable image"].endswith("broken.png")
    assert kinds["over-long text"].endswith("other.png")
    shared = next(finding for finding in check["findings"] if finding["kind"] == "duplicate text")
    assert "2 images" in shared["message"]
    assert check["splits"]["train"]["images"] + check["splits"]["val"]["images"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "where,what\nx.png,text\n",
            "no column for images named filepath .*: it has 'where', 'what'; give --format",
        ),
        ("b.csv", "filepath,what\nx.png,text\n", "no column for texts named title"),
        ("c.jsonl", '{"image": 1\n', "line 1: broken JSON"),
        ("d.csv", "filepath,title\nnone.png,text\n", "no usable pair: 1 left out"),
        ("captions_x.json", "{}", "not a COCO captions file"),
        ("e.tar", "no tar file at all", "not a complete tar file"),
        ("f.txt", "text", "no pairs recognised"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainfitError, match=message):
        task.read(str(tmp_path / name))


def test_the_columns_of_a_table_can_be_named(home: Path, tmp_path: Path) -> None:
    """The header has commas besides the separator; and two columns that could hold texts."""
    draw(tmp_path / "0.png", 1)
    draw(tmp_path / "1.png", 2)
    rows = ["where;title,or,not;what", "0.png;no;a square", "1.png;no;another"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    dataset = task.read(str(tmp_path / "t.csv"), file_format="table:where,what,;")
    assert sorted(r.texts for part in dataset.splits.values() for r in part) == [("a square",), ("another",)]
    with pytest.raises(
        TrainfitError, match=r"no column for texts named which: it has 'where', .*; give --format table:"
    ):
        task.read(str(tmp_path / "t.csv"), file_format="table:where,which,;")
    with pytest.raises(TrainfitError, match="write table:IMAGE,TEXT or table:IMAGE,TEXT,SEPARATOR"):
        task.read(str(tmp_path / "t.csv"), file_format="table:where")
    with pytest.raises(TrainfitError, match="--format tabel: unknown; of pairs it is one of table, folder"):
        task.read(str(home / "pairs.csv"), file_format="tabel")


def test_files_outside_are_read_only_where_that_is_allowed(home: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(f"filepath,title\n{home / 'images/0.png'},a\n{home / 'images/1.png'},b\n")
    with pytest.raises(TrainfitError, match="--allow-outside"):
        task.read(str(tmp_path / "pairs.csv"))
    assert len(task.read(str(tmp_path / "pairs.csv"), allow_outside=True).splits["train"]) == 1


def noise(images: int, texts: Sequence[int], *, seed: int = 0) -> list[PairFeatures]:
    g = torch.Generator().manual_seed(seed)
    found: list[PairFeatures] = []
    for number in range(images):
        rows = torch.nn.functional.normalize(torch.randn(1 + texts[number], 16, generator=g), dim=1)
        found.append(PairFeatures(record_id=number, image=rows[0], texts=rows[1:]))
    return found


def test_recall_is_that_of_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy over the whole matrix, five texts an image or fewer; in blocks so small that all loops turn."""
    monkeypatch.setattr(features, "BLOCK", 7)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    found = noise(40, [1 + number % 5 for number in range(40)])
    measured = RetrievalMetric()
    measured.add(found)
    result = measured.result()
    record = result.record
    (curve,) = result.graphics
    assert isinstance(curve, Plot)
    assert dict(dict(curve.lines)["image to text"])[5] == record["image_to_text_r5"]
    images = np.stack([each.image.numpy() for each in found if each.image is not None])
    texts = np.concatenate([each.texts.numpy() for each in found if each.texts is not None])
    owner = np.repeat(np.arange(40), [1 + number % 5 for number in range(40)])
    similar = images @ texts.T
    for k in (1, 5, 10):
        best = owner[np.argsort(-similar, axis=1)[:, :k]]
        assert record[f"image_to_text_r{k}"] == np.mean([number in best[number] for number in range(40)])
        order = np.argsort(-similar.T, axis=1)[:, :k]
        assert record[f"text_to_image_r{k}"] == np.mean([owner[row] in order[row] for row in range(len(owner))])


def classified() -> tuple[list[PairRecord], list[PairFeatures]]:
    """Texts of four classes, then 30 images of them."""
    classes, images = noise(4, [3] * 4, seed=2), noise(30, [1] * 30, seed=3)
    found = [replace(each, image=None) for each in classes]
    found += [replace(each, record_id=4 + each.record_id, texts=None) for each in images]
    labels = [*range(4), *(n * 7 % 4 for n in range(30))]
    return [PairRecord(id=n, file="", texts=(), label=label) for n, label in enumerate(labels)], found


def record_of(metric: Metric, found: Sequence[PairFeatures]) -> Mapping[str, Any]:
    metric.add(found)
    return metric.result().record


def rank_of_metrics(rank: int, folder: str) -> None:
    """Unequal shares: 21 and 9 pairs; the first rank has the texts of three classes and few images."""
    torch.set_num_threads(1)
    features.BLOCK = metrics.BLOCK = 4
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    pairs, (records, given) = noise(30, [1 + n % 5 for n in range(30)]), classified()
    retrieval = record_of(RetrievalMetric(), pairs[:21] if rank == 0 else pairs[21:])
    mine = [each for each in given if (each.record_id < 3 or each.record_id % 5 == 0) == (rank == 0)]
    zero_shot = record_of(ZeroShotMetric(records, "abcd"), mine)
    torch.save((dict(retrieval), dict(zero_shot)), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    mp.start_processes(rank_of_metrics, (str(tmp_path),), nprocs=2, start_method="fork")
    records, given = classified()
    known = (
        record_of(RetrievalMetric(), noise(30, [1 + n % 5 for n in range(30)])),
        record_of(ZeroShotMetric(records, "abcd"), given),
    )
    for rank in range(2):
        assert torch.load(tmp_path / str(rank)) == known
    assert 0 < known[0]["image_to_text_r5"] < 1
    assert 0 < known[1]["top1"] < 1


def test_recall_of_single_texts_is_upstreams() -> None:
    from open_clip_train.train import get_clip_metrics

    found = noise(60, [1] * 60, seed=1)
    measured = RetrievalMetric()
    measured.add(found)
    record = measured.result().record
    images = torch.stack([each.image for each in found if each.image is not None])
    texts = torch.cat([each.texts for each in found if each.texts is not None])
    theirs: dict[str, float] = get_clip_metrics(images, texts, torch.tensor(1.0))
    for name, k in (("image_to_text", 1), ("image_to_text", 10), ("text_to_image", 1), ("text_to_image", 5)):
        assert record[f"{name}_r{k}"] == pytest.approx(theirs[f"{name}_R@{k}"])


def test_equal_features_are_no_better_than_chance() -> None:
    measured = RetrievalMetric()
    row = torch.nn.functional.normalize(torch.ones(8), dim=0)
    measured.add([PairFeatures(record_id=n, image=row, texts=row[None]) for n in range(100)])
    assert measured.result().record["image_to_text_r10"] == 0.0


def test_zero_shot_is_upstreams_classifier() -> None:
    """Class embeddings of `open_clip.build_zero_shot_classifier`, and the labels that follow from them."""
    from open_clip import build_zero_shot_classifier

    g = torch.Generator().manual_seed(2)
    words = torch.randn(12, 16, generator=g)

    class Model:
        def encode_text(self, tokens: torch.Tensor, *, normalize: bool) -> torch.Tensor:
            assert normalize
            return torch.nn.functional.normalize(words[tokens], dim=-1)

    templates = ["{0} 0", "{0} 1"]

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.tensor([3 * int(text.split()[0]) + int(text.split()[1]) for text in texts])

    model: Any = Model()
    theirs = build_zero_shot_classifier(model, tokenizer, ["0", "1", "2", "3"], templates)
    images = torch.nn.functional.normalize(torch.randn(50, 16, generator=g), dim=1)
    records = [PairRecord(id=n, file="", texts=("a", "b"), label=n, text_only=True) for n in range(4)]
    records += [PairRecord(id=4 + n, file="", texts=(), label=n % 4) for n in range(50)]
    measured = ZeroShotMetric(records, ["0", "1", "2", "3"])
    texts = torch.nn.functional.normalize(words, dim=-1)
    measured.add([PairFeatures(record_id=n, image=None, texts=texts[[3 * n, 3 * n + 1]]) for n in range(4)])
    measured.add([PairFeatures(record_id=4 + n, image=images[n], texts=None) for n in range(50)])
    wanted = ((images @ theirs).argmax(1) == torch.arange(50) % 4).double().mean().item()
    assert measured.result().record["top1"] == pytest.approx(wanted)


def test_folders_by_class_are_for_zero_shot(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        draw(tmp_path / "set" / name / "1.png", number)
    (tmp_path / "set" / "templates.txt").write_text("a {}.\nthe {}!\n")
    dataset = task.read(str(tmp_path / "set"))
    assert dataset.classes == ("cat", "dog")
    assert [record.texts for record in dataset.splits["val"] if record.text_only] == [
        ("a cat.", "the cat!"),
        ("a dog.", "the dog!"),
    ]
    workload: Any = None
    with pytest.raises(TrainfitError, match="no texts to train on"):
        task.require(dataset, workload)
