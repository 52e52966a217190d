"""Broken data sets without end: seeded mutations of small generated sets and of real ones, and a list of known traps."""

import base64
import copy
import functools
import io
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data"
CANARY = "CANARY:x:0:0"
"""Stands in a file outside of every data set; no command may print it."""

Files = dict[str, bytes]
"""A data set in memory: content by relative path."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One broken data set."""

    name: str
    write: Callable[[Path], None]
    """Writes it into an empty folder. Beside that folder lies `outside/`, with an image and a text."""


def cases(count: int, *, seed: int = 0) -> Iterator[Case]:
    """The known traps, then mutations until there are `count` cases; case n is the same for every count."""
    traps = list(_traps())
    yield from traps[:count]
    bases = sorted(_bases().items())
    for n in range(count - len(traps)):
        name, files = bases[n % len(bases)]
        yield Case(name=f"{n:05d} {name}", write=functools.partial(_write_mutated, dict(files), seed * 1_000_003 + n))


def write_files(files: Files, folder: Path) -> None:
    """Write a data set; a name that no file can have is left out."""
    for name, content in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (OSError, ValueError):
            continue


def write_outside(folder: Path) -> None:
    """What data sets must not read without leave: an image and a text."""
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(picture(0))
    (folder / "secret.txt").write_text(f"{CANARY}\n{CANARY}.png\n")


def picture(seed: int, size: tuple[int, int] = (40, 30), kind: str = "PNG", **options: Any) -> bytes:
    """An image file of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind, **options)
    return stream.getvalue()


@functools.cache
def _bases() -> dict[str, Files]:
    """Small generated sets in every format, and a few images of the real ones where they are beside the checkout."""
    bases = {"coco": coco_files(), "yolo": yolo_files(), "voc": voc_files(), "images": image_files()}
    for name in ("coco_mini_cc", "fruits_nuts"):
        if (REAL / name).is_dir():
            bases[name] = _real_coco(REAL / name)
    if (REAL / "bccd").is_dir():
        bases["bccd"] = _real_voc(REAL / "bccd")
    return bases


def coco_document(names: list[str]) -> dict[str, Any]:
    """COCO of 40 x 30 images, each with a polygon, both kinds of RLE, a crowd and a box."""
    square = np.zeros((30, 40), np.uint8, order="F")
    square[5:15, 5:15] = 1
    rle = coco_mask.encode(square)
    shapes: list[Any] = [
        [[5, 5, 15, 5, 15, 15, 5, 15]],
        {"size": [30, 40], "counts": cast(bytes, rle["counts"]).decode()},
        {"size": [30, 40], "counts": [155, 10, 20, 10, 1005]},
        [[5.5, 5, 15, 5, 15, 15.25], [20, 20, 25, 20, 25, 25, 20, 25]],
    ]
    annotations = [
        {
            "id": 1 + len(shapes) * n + k,
            "image_id": n,
            "category_id": 7 + 2 * (k % 2),
            "bbox": [5 + k, 5, 10, 10],
            "area": 100.0,
            "iscrowd": int(k == 2),
            "segmentation": shape,
        }
        for n in range(len(names))
        for k, shape in enumerate(shapes)
    ]
    return {
        "images": [{"id": n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(names)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }


def coco_files(change: Callable[[dict[str, Any]], Any] | None = None) -> Files:
    """A Roboflow export; `change` edits the document of its train split."""
    files: Files = {}
    for split, names in (("train", ["a.png", "b.jpg", "c.png"]), ("valid", ["v.png"])):
        document = coco_document(names)
        if split == "train" and change is not None:
            change(document)
        files[f"{split}/_annotations.coco.json"] = json.dumps(document).encode()
        files |= {f"{split}/{n}": picture(k, kind="JPEG" if "jpg" in n else "PNG") for k, n in enumerate(names)}
    return files


def yolo_files(label: str = "", data: str = "names: [cat, dog]\ntrain: images/train\nval: images/val\n") -> Files:
    """A YOLO set; `label` is the label of its first training image."""
    lines = "0 0.5 0.5 0.25 0.5\n1 0.1 0.2 0.6 0.2 0.6 0.9 0.1 0.8\n"
    files: Files = {"data.yaml": data.encode()}
    for split, names in (("train", "abc"), ("val", "v")):
        for k, name in enumerate(names):
            files[f"images/{split}/{name}.png"] = picture(k)
            files[f"labels/{split}/{name}.txt"] = (label if label and name == "a" else lines).encode("utf-8", "replace")
    return files


def voc_files(xml: bytes | None = None, **lists: bytes) -> Files:
    """A Pascal VOC set; `xml` is the annotation of its first image."""
    text = (
        "<annotation><filename>{0}.png</filename><size><width>40</width><height>30</height></size><object><name>cat"
        "</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>15</xmax><ymax>16</ymax></bndbox>"
        "</object></annotation>"
    )
    files: Files = {}
    for k, name in enumerate("abcv"):
        files[f"JPEGImages/{name}.png"] = picture(k)
        files[f"Annotations/{name}.xml"] = xml if xml is not None and name == "a" else text.format(name).encode()
    files |= {"ImageSets/Main/train.txt": b"a\nb\nc\n", "ImageSets/Main/val.txt": b"v\n"}
    return files | {f"ImageSets/Main/{name}.txt": content for name, content in lists.items()}


def image_files() -> Files:
    """A YOLO set with an image of every format and of many modes."""
    files = {name: content for name, content in yolo_files().items() if "train/" not in name}
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        files[f"images/train/{kind}.{kind.lower()}"] = picture(1, kind=kind)
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg"):
        files[f"images/train/{compression}.tiff"] = picture(2, kind="TIFF", compression=compression)
    files["images/train/progressive.jpg"] = picture(3, kind="JPEG", progressive=True)
    for stem in [Path(name).stem for name in files if "images/train" in name]:
        files[f"labels/train/{stem}.txt"] = b"0 0.5 0.5 0.25 0.5\n"
    return files


def _real_coco(root: Path) -> Files:
    """Three images of a real set and their annotations, as a Roboflow export."""
    files: Files = {}
    documents = (json.loads(file.read_text()) for file in sorted(root.rglob("*.json")))
    document = next(document for document in documents if "categories" in document)
    for split, images in (("train", document["images"][:3]), ("valid", document["images"][3:4])):
        ids = {image["id"] for image in images}
        kept = [a for a in document["annotations"] if a["image_id"] in ids]
        part = {"images": images, "annotations": kept, "categories": document["categories"]}
        files[f"{split}/_annotations.coco.json"] = json.dumps(part).encode()
        for image in images:
            found = next(root.rglob(Path(image["file_name"]).name))
            files[f"{split}/{image['file_name']}"] = found.read_bytes()
    return files


def _real_voc(root: Path) -> Files:
    files: Files = {"ImageSets/Main/train.txt": b"", "ImageSets/Main/val.txt": b""}
    for n, xml in enumerate(sorted((root / "Annotations").glob("*.xml"))[:4]):
        files[f"Annotations/{xml.name}"] = xml.read_bytes()
        files[f"JPEGImages/{xml.stem}.jpg"] = (root / "JPEGImages" / f"{xml.stem}.jpg").read_bytes()
        files[f"ImageSets/Main/{'train' if n < 3 else 'val'}.txt"] += f"{xml.stem}\n".encode()
    return files


NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        1.5,
        -0.0,
        1e-9,
        1e9,
        1e30,
        10**30,
        10**400,
        -(10**400),
        2**31,
        2**63,
        2**64,
        1e308,
    ),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "0",
        "1",
        "a.png",
        "cat",
        "x" * 300,
        "x" * 70_000,
        "²",
        "é",
        "\ud800",
    ),
    *(
        "\x00",
        "\x1b[31mred\x1b[0m",
        "a\nb",
        "../../outside/x.png",
        "/etc/passwd",
        "../outside/secret.txt",
        "..",
        ".",
        "/",
    ),
    *(
        [],
        [[]],
        [1],
        [1, 2, 3, 4],
        ["a"],
        {},
        {"a": 1},
        {"size": [30, 40], "counts": [1200]},
        [[1, 2], [3]],
        [None],
        [[1e9] * 8],
    ),
    *(
        {"size": [30.0, 40.0], "counts": "zzz"},
        {"size": [2**40, 2**40], "counts": [2**80]},
        {"size": [30, 40], "counts": ""},
    ),
    *(
        [[0, 0, 1e9, 0, 1e9, 1e9]],
        [[0, 0, 10**30, 0, 5, 5]],
        [[0, 0] * 50_000],
        [[float("nan")] * 6],
        list(range(3000)),
    ),
)
"""Values that stand where others should."""


def _nasty(rng: random.Random) -> Any:
    """A copy: later mutations change lists in place."""
    return copy.deepcopy(rng.choice(NASTY))


def _write_mutated(files: Files, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        labels = [
            name for name in files if not name.lower().endswith((".png", ".jpg", ".webp", ".bmp", ".tif", ".tiff"))
        ]
        images = [name for name in files if name not in labels]
        name = rng.choice(images if images and rng.random() < (0.8 if len(images) > 6 else 0.15) else labels)
        _mutate(files, name, rng)
    write_files(files, folder)
    _special(files, folder, rng)


def _mutate(files: Files, name: str, rng: random.Random) -> None:
    """Change one file: by its structure where it has one, else by its bytes."""
    if name.endswith(".json") and rng.random() < 0.8:
        try:
            document = json.loads(files[name])
        except (ValueError, RecursionError):
            return
        for _ in range(rng.choice((1, 1, 2, 5))):
            document = _mutate_json(document, rng)
        files[name] = json.dumps(document).encode()
    elif rng.random() < 0.5 and name.endswith((".xml", ".txt", ".yaml")):
        files[name] = _mutate_words(files[name], rng)
    else:
        files[name] = _mutate_bytes(files[name], rng)


def _mutate_json(document: Any, rng: random.Random) -> Any:
    """Replace, remove, repeat or wrap the value at a random place."""
    place, key = document, None
    parent: Any = None
    while isinstance(place, dict | list) and place and (parent is None or rng.random() < 0.85):
        parent, key = place, rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        place = place[key]
    if parent is None:
        return _nasty(rng)
    action = rng.random()
    if action < 0.7:
        parent[key] = _nasty(rng)
    elif action < 0.8:
        del parent[key]
    elif action < 0.9 and isinstance(parent, list):
        parent.append(place)
    else:
        parent[key] = [place]
    return document


def _mutate_words(content: bytes, rng: random.Random) -> bytes:
    """Replace a word of a text by a nasty one."""
    words = content.replace(b">", b"> ").replace(b"<", b" <").split(b" ")
    value = _nasty(rng)
    text = value if isinstance(value, str) else json.dumps(value)
    words[rng.randrange(len(words))] = text.encode("utf-8", "surrogatepass")
    return b" ".join(words).replace(b"> ", b">").replace(b" <", b"<")


def _mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    action = rng.randrange(6)
    if action == 0:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if action == 1:
        return bytes(data) + rng.randbytes(rng.choice((1, 10, 1000)))
    if action == 2:
        return rng.choice(
            (b"", b"\0" * 1000, b"\xff\xfe" + content, b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"))
        )
    if action == 3:
        start = rng.randrange(len(data) + 1)
        data[start:start] = data[start : start + rng.choice((1, 20, 2000))] * rng.choice((1, 3))
        return bytes(data)
    for _ in range(rng.choice((1, 3, 20))):
        if data:  # the head of a file holds sizes and kinds
            data[rng.randrange(min(len(data), rng.choice((64, 400, len(data)))))] = rng.randrange(256)
    return bytes(data)


def _special(files: Files, folder: Path, rng: random.Random) -> None:
    """Now and then one file becomes a pipe, a folder, a link, or is gone."""
    path = folder / rng.choice(sorted(files))
    if rng.random() > 0.12 or not path.is_file():
        return
    path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(folder.parent / "outside" / ("x.png" if path.suffix == ".png" else "secret.txt"))
    elif kind == 3:
        path.symlink_to(path)
    elif kind == 4:
        path.symlink_to("/dev/zero")


def _traps() -> Iterator[Case]:
    for name, files in _trap_files():
        yield Case(name=name, write=functools.partial(write_files, files))
    for name in ("train/_annotations.coco.json", "train/a.png"):
        yield Case(name=f"pipe {name}", write=functools.partial(_with_pipe, coco_files(), name))
    for name in ("Annotations/a.xml", "ImageSets/Main/train.txt"):
        yield Case(name=f"pipe {name}", write=functools.partial(_with_pipe, voc_files(), name))
    for name in ("labels/train/a.txt", "data.yaml"):
        yield Case(name=f"pipe {name}", write=functools.partial(_with_pipe, yolo_files(), name))
    yield Case(name="link out of the set", write=_with_links)


def _with_pipe(files: Files, name: str, folder: Path) -> None:
    write_files(files, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)


def _with_links(folder: Path) -> None:
    write_files(yolo_files(), folder)
    shutil.rmtree(folder / "labels" / "train")
    (folder / "labels" / "train").symlink_to(folder.parent / "outside")
    (folder / "images" / "train" / "x.png").symlink_to(folder.parent / "outside" / "x.png")


def _trap_files() -> Iterator[tuple[str, Files]]:
    first = "train/_annotations.coco.json"
    for value in NASTY:
        for key in ("segmentation", "bbox", "id", "area"):
            files = coco_files(lambda document, k=key, v=value: document["annotations"][0].update({k: v}))
            yield f"coco {key} {value!r:.40}", files
    for key in ("width", "file_name"):
        for value in NASTY:
            yield (
                f"coco image {key} {value!r:.40}",
                coco_files(lambda document, k=key, v=value: document["images"][0].update({k: v})),
            )
    for text in (
        b"[" * 100_000,
        b"9" * 5000,
        b'{"images":' * 20_000,
        b'{"images": [' + b"9" * 5000 + b"]}",
        b"\xff\xfe{}",
    ):
        yield f"coco text {text[:20]!r}", coco_files() | {first: text}
    yield "coco name escape", coco_files(lambda d: d["categories"][0].update(name="\x1b]0;owned\x07\x1b[31mcat"))
    yield (
        "coco 3000 objects",
        coco_files(lambda d: d["annotations"].extend([d["annotations"][0] | {"id": 100 + n} for n in range(3000)])),
    )
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    folders = "train: images/train\nval: images/val\n"
    for names in (
        "5",
        "1.5",
        "true",
        "{a: b}",
        "[2020-13-45]",
        "[[cat]]",
        "[null, ~]",
        "[a, b, c]",
        "{0: a, 2: b}",
        "!!python/object:os.system [a]",
    ):
        yield f"yolo names {names}", yolo_files(data=f"names: {names}\n{folders}")
    yield "yolo alias bomb", yolo_files(data=f"{bomb}names: [*i, dog]\n{folders}")
    yield (
        "yolo merge bomb",
        yolo_files(data="a: &a {x: 1}\n" + f"b: {{<<: [{','.join(['*a'] * 9)}]}}\nnames: [cat, dog]\n{folders}"),
    )
    yield "yolo nested", yolo_files(data="names: " + "[" * 100_000)
    for place in (
        "../../",
        "..",
        "/etc/passwd",
        "/",
        "../outside",
        "../outside/secret.txt",
        "/dev/zero",
        "[[]]",
        "{a: b}",
        "x" * 300,
        '"\\0"',
    ):
        for key in ("train", "val", "path"):
            data = "names: [cat, dog]\n" + folders.replace(f"{key}: images/{key}", f"{key}: {place}")
            yield f"yolo {key} {place:.20}", yolo_files(data=data + (f"path: {place}\n" if key == "path" else ""))
    for label in (
        "0 0.5 0.5 1e-9 1e-9",
        "0 0.5 0.5 0.1 0.1\n" * 100_000,
        "0 1e308 1e308 1e308 1e308",
        "0 " + "9" * 5000 + " 1 1 1",
        "1e300 0 0 1 1",
    ):
        yield f"yolo label {label[:30]}", yolo_files(label)
    many = "\n".join(f"0 0.5 0.5 0.2 {0.1 + n / 1e6}" for n in range(20_000))
    yield "yolo 20000 objects", yolo_files(many)
    yield "yolo polygon zigzag", yolo_files("0 " + " ".join("0 0 1 1" for _ in range(60_000)))
    yield "yolo latin label", yolo_files() | {"labels/train/a.txt": b"0 0.5 0.5 0.1 0.1 \xe9\n"}
    yield (
        "yolo latin list",
        yolo_files(data="names: [cat, dog]\ntrain: t.txt\nval: images/val\n") | {"t.txt": b"\xe9.png\n"},
    )
    listed = b"../outside/x.png\nroot:x:0:0\nimages/train/a.png\n" + b"x" * 5000 + b".png\n\0.png\n"
    yield "yolo list", yolo_files(data="names: [cat, dog]\ntrain: t.txt\nval: images/val\n") | {"t.txt": listed}
    for encoding in (
        "foo",
        "gbk",
        "utf-7",
        "idna",
        "rot13",
        "hex",
        "utf-16",
        "latin-1",
        "ascii",
        "cp437",
        "unicode_escape",
        "utf-32",
    ):
        yield (
            f"voc encoding {encoding}",
            voc_files(f"<?xml version='1.0' encoding='{encoding}'?><annotation/>".encode()),
        )
    for body in (
        "<size><width>²</width></size>",
        "<object/>",
        "<a>" * 50_000,
        "<filename>../../outside/x.png</filename>",
        "<filename>/etc/passwd</filename>",
    ):
        yield f"voc {body[:30]}", voc_files(f"<annotation>{body}</annotation>".encode())
    entities = (
        b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation><filename>&x;</filename></annotation>"
    )
    yield "voc entity", voc_files(entities)
    for content in (b"\xe9\n", b"\0\n", b"../../outside/secret\n", b"x" * 5000, b"a\na\n"):
        yield f"voc list {content[:20]!r}", voc_files(train=content)
    yield "voc labels", voc_files() | {"labels.txt": b"\xe9\n"}
    yield "voc no objects", voc_files() | {"labels.txt": b"\x1b[31mdog\n"}
    for kind in ("GIF", "PPM", "PCX", "TGA", "ICO"):
        yield f"image {kind}", coco_files() | {"train/a.png": picture(0, kind=kind)}
    yield "image eps", coco_files() | {"train/a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n"}
    yield (
        "image thin",
        yolo_files() | {"images/train/a.png": picture(0, (8000, 1)), "images/train/b.png": picture(0, (1, 1))},
    )
    yield "image bomb", yolo_files() | {"images/train/a.png": _png_that_claims(30_000, 30_000)}
    yield (
        "image large",
        yolo_files() | {"images/train/a.png": _png_of(6_000, 6_000), "images/train/b.png": _png_of(9_400, 9_400)},
    )
    gif = base64.b64decode("R0lGODlhAQABAAAAACw=")
    yield "image tiny gif", coco_files() | {"train/a.png": gif}


def _png_of(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel."""
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _png_that_claims(width: int, height: int) -> bytes:
    """A small PNG whose head gives another size."""
    content = bytearray(picture(0))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)
