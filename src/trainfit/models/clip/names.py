"""Names of open_clip's architectures. Imports neither torch nor open_clip."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from trainfit.models.family import dashed

PREFIX = "clip:"


@cache
def architectures() -> tuple[str, ...]:
    """Names of open_clip's configurations, without importing it; none where it is not installed."""
    spec = find_spec("open_clip")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return tuple(sorted(file.stem for folder in folders for file in Path(folder, "model_configs").glob("*.json")))


def match(typed: str) -> str | None:
    """Any name that begins with "clip:": an architecture of open_clip, or a JSON file with the configuration of one.

    open_clip says whether there is such an architecture when it is built. "clip-vit-b-32" is clip:ViT-B-32.
    """
    if typed.startswith(PREFIX) and typed != PREFIX:
        name = typed.removeprefix(PREFIX)
        if name.endswith(".json"):
            return f"{PREFIX}{Path(name).absolute()}"
        return f"{PREFIX}{_spelt(name) or name}"
    if dashed(typed).startswith("clip-"):
        name = _spelt(dashed(typed).removeprefix("clip-"))
        return f"{PREFIX}{name}" if name else None
    return None


def _spelt(name: str) -> str | None:
    """An architecture as open_clip spells it; None where it has none, or several."""
    if name in architectures():
        return name
    same = [each for each in architectures() if dashed(each) == dashed(name)]
    return same[0] if len(same) == 1 else None
