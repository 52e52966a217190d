"""Weights files: written atomically, and read safely."""

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from trainfit.errors import TrainfitError
from trainfit.step.attempt import is_out_of_memory

LAST = "last.safetensors"
BEST = "best.safetensors"
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, MemoryError),
)
"""Exceptions of torch, zipfile and safetensors for a file that is damaged or of another format."""


def write_atomically(path: Path, write: Callable[[Path], object], *, keep: Path | None = None) -> None:
    """Write a temporary file, flush it to the disk, then rename it; the previous file is renamed to `keep`, if given.

    Raises:
        TrainfitError: the disk is full or cannot be written; the previous file is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors makes its files readable to their owner alone
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        # torch and safetensors wrap the operating system's error
        temporary.unlink(missing_ok=True)
        previous = "the previous one is intact" if path.exists() else "there is no previous one"
        reason = _system_reason(error)
        raise TrainfitError(
            f"could not save {path} ({reason}); {previous}: free space and continue with --resume"
        ) from error


def _system_reason(error: BaseException) -> str:
    """The operating system's message, which torch and safetensors wrap in their own; else the first line of theirs."""
    inner: BaseException | None = error
    if is_out_of_memory(error):
        return "host memory is full"
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 150 characters; its type if it has no text."""
    text = str(error).strip().partition("\n")[0]
    return text[:150] or type(error).__name__


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the metadata that `models.build.workload_from_metadata` needs."""

    def write(target: Path) -> None:
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        safetensors.torch.save_file(tensors, target, metadata=dict(metadata))

    write_atomically(path, write)


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        TrainfitError: the file cannot be read as safetensors, or holds values that are no weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        raise TrainfitError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    require_sound(weights, path)
    return weights, metadata


def read_checkpoint(path: Path, load: Callable[[Path], Any]) -> Any:
    """Read a pickled checkpoint with `load`, which must allow tensors and plain values only.

    Raises:
        TrainfitError: the file is damaged, of another format, or would run code.
    """
    try:
        with without_warnings():
            return load(path)
    except UNREADABLE as error:
        raise TrainfitError(f"{path}: not a checkpoint that loads safely ({first_line(error)})") from error


@contextmanager
def without_warnings() -> Generator[None]:
    """Suppress torch's warnings about the contents of a file, since an error follows anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def require_sound(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Reject NaN, infinite and complex values, from which no training recovers.

    Raises:
        TrainfitError: with the number of such tensors and the name of the first.
    """
    odd = [key for key, value in weights.items() if value.is_complex() or value.is_quantized]
    if odd:
        raise TrainfitError(f"{path}: {odd[0]} is {weights[odd[0]].dtype}, which cannot be a weight")
    broken = [key for key, value in weights.items() if value.is_floating_point() and not _is_finite(value)]
    if broken:
        raise TrainfitError(
            f"{path} holds NaN or infinite values in {len(broken)} tensors, first {broken[0]}: "
            "it comes from a training that diverged or is damaged; take another file"
        )


def _is_finite(value: torch.Tensor) -> bool:
    wide = value if value.element_size() > 1 else value.float()  # float8 has no isfinite
    return bool(torch.isfinite(wide).all())


def require_kinds(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Reject integers where the model has floating-point numbers, and the reverse.

    Raises:
        TrainfitError: with the first such tensor.
    """
    for name, expected in model.state_dict().items():
        value = weights.get(name, expected)
        if expected.is_floating_point() != value.is_floating_point():
            raise TrainfitError(f"{path}: {name} is {value.dtype}, not {expected.dtype}; the file is damaged")


def require_fit(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Reject weights whose names, shapes or types are not those of the model.

    Raises:
        TrainfitError: with the first tensor that does not fit.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights:
            what = "lacks" if name not in weights else "has besides"
            raise TrainfitError(f"{path} does not fit its own model: it {what} {name}; the file is damaged")
        if own[name].shape != weights[name].shape:
            raise TrainfitError(
                f"{path} does not fit its own model: {name} has the shape {tuple(weights[name].shape)}, "
                f"not {tuple(own[name].shape)}; the file is damaged"
            )
    require_kinds(model, weights, path)


def not_downloaded(path: Path, reason: str) -> str:
    """What the user can do about published weights that could not be downloaded; `path` is where they are looked for."""
    return (
        f"could not download {path.name} ({reason}): put the file at {path}, name it with --weights FILE, or start from "
        "nothing with --weights random"
    )
