"""Matches class names of weights with those of data sets."""

from collections.abc import Sequence


def plain(name: str) -> str:
    """A class name in lower case with spaces for `_` and `-` ("Traffic_Light" becomes "traffic light")."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def positions(classes: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each class its index in `names`, or None if the name is not there.

    An exact match is preferred to one that differs only in case, `_` or `-`. Empty names are ignored.
    """
    exact = {name: index for index, name in reversed(list(enumerate(names))) if name}
    alike = {plain(name): index for index, name in reversed(list(enumerate(names))) if name}
    return [exact.get(name, alike.get(plain(name))) for name in classes]
