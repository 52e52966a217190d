"""One data set tried as a user would: checked, reported, and every sample that passed decoded as the loader does."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from data_corpus import CANARY, Case, write_outside
from trainfit.errors import TrainfitError
from trainfit.models.rfdetr.data import make_sample
from trainfit.reports.check_data import check_data_json, check_data_text
from trainfit.tasks.augment import OWN
from trainfit.tasks.detection.check import check_dataset, check_of
from trainfit.tasks.detection.masks import require_masks
from trainfit.tasks.detection.read import read_dataset, require_no_errors
from trainfit.tasks.detection.samples import DetectionDataset, Sample

LIBTIFF = re.compile(r"(tempfile\.tif|JPEGLib|_?TIFF\w+|\w*Decode\w*|Fax\w+|OJPEG\w+): ")
"""How the lines of libtiff begin."""
SIDE = 224
SAMPLES = 8
"""Records of a split that are decoded."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case."""

    verdict: str
    """Good: "refused in one line", "errors named", "trainable, defects named", "trainable"; anything else is a fault."""
    detail: str = ""
    seconds: float = 0.0
    peak_mib: int = 0
    """The most resident memory of the process, imports included."""

    @property
    def good(self) -> bool:
        """Whether the case ended as every case must."""
        return self.verdict in ("refused in one line", "errors named", "trainable, defects named", "trainable")


def trial(case: Case, scratch: Path, *, limit_s: float = 30.0, limit_bytes: int = 2 << 30) -> Outcome:
    """Try a case in a forked process that may grow by `limit_bytes` and live for `limit_s`."""
    shutil.rmtree(scratch, ignore_errors=True)
    write_outside(scratch / "outside")
    (scratch / "set").mkdir()
    case.write(scratch / "set")
    start = time.monotonic()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(scratch, limit_bytes, sender))
    process.start()
    sender.close()
    process.join(limit_s)
    seconds = time.monotonic() - start
    if process.is_alive():
        process.kill()
        process.join()
        return Outcome(verdict="hang", seconds=seconds)
    try:
        verdict, detail, peak_mib = receiver.recv()
    except EOFError:
        return Outcome(verdict=f"died with {process.exitcode}", seconds=seconds)
    # libtiff writes its errors to stderr itself, and Pillow gives no way to turn that off.
    lines = (scratch / "noise.txt").read_text(errors="replace").splitlines()
    noise = "\n".join(line for line in lines if not LIBTIFF.match(line))
    if noise:
        verdict, detail = "noise on stdout or stderr", noise[:500]
    return Outcome(verdict=verdict, detail=detail, seconds=seconds, peak_mib=peak_mib)


def _child(scratch: Path, limit_bytes: int, sender: Connection) -> None:
    _limit(limit_bytes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    noise = os.open(scratch / "noise.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(noise, 1)
    os.dup2(noise, 2)
    sys.stdout, sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb")), io.TextIOWrapper(os.fdopen(2, "wb"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.filterwarnings("ignore", module=r"PIL\.")  # as the command line does
            verdict, detail = _try(scratch / "set")
    except BaseException:
        verdict, detail = "traceback", traceback.format_exc()[-1500:]
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send((verdict, detail, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10))
    os._exit(0)


def _limit(limit_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _try(folder: Path) -> tuple[str, str]:
    torch.set_num_threads(1)
    try:
        dataset = check_dataset(read_dataset(folder))
    except TrainfitError as error:
        return _one_line(str(error))
    text = check_data_text(check_of(dataset), ascii_only=True)
    document = json.dumps(check_data_json(check_of(dataset)))
    if CANARY in text or CANARY in document:
        return "prints a foreign file", text[:1500]
    if any(not c.isprintable() for c in text.replace("\n", "")):
        return "prints control characters", repr(text)[:1500]
    if any(finding.severity == "error" for finding in dataset.findings):
        with contextlib.suppress(TrainfitError):
            require_no_errors(dataset)
            return "errors, and training starts", text[-500:]
        return "errors named", ""
    _decode_all(dataset)
    left_out = any(finding.severity in ("skipped", "mended") for finding in dataset.findings)
    return ("trainable, defects named" if left_out else "trainable"), ""


def _one_line(message: str) -> tuple[str, str]:
    if "\n" in message or len(message) > 4000 or CANARY in message:
        return "refused, not in one short line", message[:1500]
    return "refused in one line", message


def _decode_all(dataset: DetectionDataset) -> None:
    """Boxes, as every model needs them, and masks where a model with masks would start."""
    for records in dataset.splits.values():
        try:
            require_masks(records)
            masks = True
        except TrainfitError:
            masks = False
        for record in records[:SAMPLES]:
            for with_masks in (False, True) if masks else (False,):
                generator = torch.Generator().manual_seed(record.id % 1000)
                for augment in (frozenset[str](), OWN):
                    _require_sound(
                        make_sample(record, size=SIDE, augment=augment, masks=with_masks, generator=generator), dataset
                    )


def _require_sound(sample: Sample, dataset: DetectionDataset) -> None:
    assert sample.image.shape == (3, SIDE, SIDE)
    assert torch.isfinite(sample.boxes).all()
    assert (sample.boxes >= 0).all()
    assert (sample.boxes <= SIDE).all()
    assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
    assert ((sample.classes >= 0) & (sample.classes < len(dataset.classes))).all()
    assert len(sample.classes) == len(sample.boxes)
    assert sample.masks is None or len(sample.masks) == len(sample.boxes)
