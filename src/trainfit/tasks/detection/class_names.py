"""Class names of weights and of data sets: which of one list are which of another."""

from collections.abc import Sequence


def plain(name: str) -> str:
    """A class name without what people spell differently: case, `_` and `-` ("Traffic_Light" is "traffic light")."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def positions(wanted: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each wanted class its index in `names`, or None where that name is not there.

    The exact name is preferred to one that only differs in case, `_` or `-`. An empty name is nobody's.
    """
    exact = {name: index for index, name in reversed(list(enumerate(names))) if name}
    alike = {plain(name): index for index, name in reversed(list(enumerate(names))) if name}
    return [exact.get(name, alike.get(plain(name))) for name in wanted]
