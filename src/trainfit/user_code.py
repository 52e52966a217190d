"""Functions of a user's own modules, named as "module:function"."""

import importlib
import sys
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError


def load_named(module: str, name: str, what: str) -> Any:
    """An attribute of a module, which may lie in the working directory.

    Args:
        module: The module's name.
        name: The attribute's name.
        what: How the user named it; errors begin with this.

    Raises:
        TrainfitError: there is no such module or attribute. Other errors of the module are not changed.
    """
    file = f"{module.replace('.', '/')}.py"
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise TrainfitError(f"{what}: {error}; run in the folder that holds {file}") from error
    except AttributeError as error:
        raise TrainfitError(f"{what}: {error}") from error
