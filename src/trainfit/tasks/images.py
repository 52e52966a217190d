"""Image files: what can be told without decoding, and the decoding itself."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from trainfit.errors import TrainfitError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What Pillow may take a file for, whatever its name: it opens some 40 formats by content, PostScript among them."""
MOST_PIXELS = 89_478_485
"""The largest image, where Pillow starts to warn of decompression bombs: decoding and turning it takes 0.7 GiB."""

_LONGEST_REASON = 200
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFile(Protocol):
    """An image file and the size that its data set states."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def width(self) -> int:
        """Pixels, as annotated."""
        ...

    @property
    def height(self) -> int:
        """Pixels, as annotated."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """What the head of an image file says."""

    size: tuple[int, int]
    """(width, height) of the pixels as stored."""
    orientation: int
    """EXIF orientation; 1: as stored."""

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) as a viewer shows it: EXIF orientation applied."""
        width, height = self.size
        return (height, width) if self.orientation >= 5 else (width, height)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageDefect:
    """Why an image file cannot be used."""

    kind: str
    """"missing image", "unreadable image" or "truncated image"."""
    message: str
    """What is wrong, without the file's name."""


def read_header(path: Path) -> ImageHeader | ImageDefect:
    """Size and orientation of an image, or why it cannot be used; decodes nothing unless the file looks cut off.

    A JPEG ends with its end mark, a PNG with its last chunk; only a file that does not is decoded, to know for sure
    (trailing bytes after the end mark are harmless). Pillow itself refuses to open a WebP that is cut off. Known
    limits: damage in the middle of a file, and other formats cut off, are found by decoding alone (`check_dataset`).
    """
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for names that no file can have
        special = os.path.exists(path)  # noqa: PTH110
        return ImageDefect(kind="missing image", message="no regular file" if special else "no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                what = f"{image.width} x {image.height}, more than {MOST_PIXELS // 10**6} million pixels; cut it into tiles"
                return ImageDefect(kind="image too large", message=what)
            if image.mode in ("I", "F"):
                return ImageDefect(kind="unreadable image", message="32 bits a channel; convert it to 8 bits")
            header = ImageHeader(size=image.size, orientation=_orientation(image))
            with path.open("rb") as file:
                complete = _ends_well(file, image.format)
            try:
                if not complete:
                    image.load()
            except Exception as error:
                return ImageDefect(kind="truncated image", message=_reason(error, path))
            return header
    # Pillow's plugins raise whatever their parsers meet: struct.error, KeyError, MemoryError, SyntaxError, ...
    except Exception as error:
        return ImageDefect(kind="unreadable image", message=_reason(error, path))


def require_header(path: Path) -> ImageHeader:
    """`read_header` of an image that must be usable.

    Raises:
        TrainfitError: why it cannot be used.
    """
    header = read_header(path)
    if isinstance(header, ImageDefect):
        raise TrainfitError(f"{path}: {header.kind}: {header.message}")
    return header


def read_headers(paths: Sequence[Path]) -> list[ImageHeader | ImageDefect]:
    """`read_header` of each path, in order; threads hide the latency of network disks."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read_header, paths))


def read_image(record: ImageFile) -> Image.Image:
    """The record's image in RGB, exactly `record.width` x `record.height`.

    EXIF orientation is applied when the upright size is the annotated one (as Detectron2, mmcv and OpenCV do);
    when only the size as stored is, the annotator ignored the orientation, and so does this. 16-bit images keep
    their upper 8 bits, transparency is dropped.

    Raises:
        TrainfitError: the file is missing, damaged or of another size; it names the file.
    """
    rgb, orientation = _decoded(record.path, None)
    header = ImageHeader(size=rgb.size, orientation=orientation)
    annotated = (record.width, record.height)
    if header.upright == annotated:
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
    if header.size == annotated:
        return rgb
    width, height = header.upright
    raise TrainfitError(
        f"{record.path}: is {width} x {height}, but its record says {record.width} x {record.height}; "
        "it was replaced after the data set was read: start again"
    )


def read_rgb(path: Path, content: BinaryIO | None = None) -> Image.Image:
    """An image in RGB, upright as its EXIF orientation says; `content` holds its bytes where `path` is a file around them.

    Raises:
        TrainfitError: the image is missing, damaged or larger than `MOST_PIXELS`; it names the file.
    """
    rgb, orientation = _decoded(path, content)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _decoded(path: Path, content: BinaryIO | None) -> tuple[Image.Image, int]:
    """The image as stored, in RGB, and its EXIF orientation."""
    try:
        with Image.open(content or path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height}, more than {MOST_PIXELS // 10**6} million pixels")
            orientation = _orientation(image)
            return _rgb(image), orientation
    except Exception as error:  # as in `read_header`
        reason = _reason(error, path)
        raise TrainfitError(f"{path}: {reason}; replace the file or take it out of the data set") from error


def _orientation(image: Image.Image) -> int:
    # Pillow turns TIFF upright by itself; for PNG its getexif() decodes the whole image unless the chunk came first.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    return orientation if orientation in _UPRIGHT else 1


def _ends_well(file: BinaryIO, image_format: str | None) -> bool:
    file.seek(max(0, file.seek(0, 2) - 12))
    tail = file.read()
    if image_format in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    return image_format != "PNG" or tail[4:8] == b"IEND"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip every value above 255 to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA", "LA"):  # a palette with transparency warns unless it goes through RGBA
        return image.convert("RGBA").convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _reason(error: BaseException, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text.replace(f" {str(path)!r}", "").replace("\n", " ")
    return text[:_LONGEST_REASON] or type(error).__name__
