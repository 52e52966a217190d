"""The user's cache folder."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where traces, measurements and the sample set are kept between runs; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainfit"
