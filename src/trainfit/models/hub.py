"""Downloads that other packages make through huggingface_hub. Imports no torch."""

import logging
import socket
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies


@contextmanager
def quiet_hub() -> Generator[None]:
    """Leave out huggingface_hub's warnings of what it tries again, and its tries where its host has no address.

    Without a network it would try each name of a file for half a minute; what it has stored before is used as ever.
    """
    constants: Any = import_module("huggingface_hub.constants")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    offline = constants.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = offline or not _is_reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)


def not_downloaded(file: str, place: str, error: Exception) -> str:
    """What the user can do about published weights that could not be downloaded; `place` is where they are on the network."""
    return (
        f"could not download {file} from {place} ({type(error).__name__}): get it on another machine and name it with "
        "--weights FILE, or start from nothing with --weights random"
    )


def _is_reachable(address: str) -> bool:
    """Whether the host of an address is known here; behind a proxy it need not be."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(address).hostname, 443)
    except OSError:
        return False
    return True
