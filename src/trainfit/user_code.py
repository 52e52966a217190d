"""Functions of a user's own modules, named as "module:function"."""

import importlib
import re
import sys
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError

DYNAMIC = re.compile(r"import \*|\bglobals\(|\bexec\(|\b__getattr__\b|\bsetattr\(")
"""What can bind a name that a source does not spell."""


def require_named(what: str) -> None:
    """Refuse "module:function" where there is no such module, or its source spells no such name; nothing of it is run.

    A process that traces it would say the same, after it has imported torch.

    Raises:
        TrainfitError: there is none.
    """
    module, _, name = what.partition(":")
    first, *rest = module.split(".")
    spec = PathFinder.find_spec(first, [str(Path.cwd()), *sys.path])
    if spec is None and first not in sys.builtin_module_names:
        raise TrainfitError(f"{what}: No module named {first!r}; {_run_where(module)}")
    if (
        spec is None
        or spec.origin is None
        or rest
        or not spec.origin.endswith(".py")
        or spec.submodule_search_locations
    ):
        return
    try:
        source = Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # importing it will say why
    if re.search(rf"\b{re.escape(name)}\b", source) or DYNAMIC.search(source):
        return
    near = get_close_matches(name, re.findall(r"^def (\w+)", source, re.MULTILINE), n=1)
    hint = f". Perhaps you meant {module}:{near[0]}" if near else ""
    raise TrainfitError(f"{what}: module {module!r} has no attribute {name!r}{hint}")


def _run_where(module: str) -> str:
    return f"run in the folder that holds {module.replace('.', '/')}.py"


def load_named(module: str, name: str, what: str) -> Any:
    """An attribute of a module, which may lie in the working directory.

    Args:
        module: The module's name.
        name: The attribute's name.
        what: How the user named it; errors begin with this.

    Raises:
        TrainfitError: there is no such module or attribute. Other errors of the module are not changed.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise TrainfitError(f"{what}: {error}; {_run_where(module)}") from error
    except AttributeError as error:
        raise TrainfitError(f"{what}: {error}") from error
