"""The documentation site is built with every link checked, and says what the program says."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import trainfit

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SOURCE = Path(trainfit.__file__).parent
PAGES = sorted(DOCS.glob("*.md"))


def in_navigation(entry: Any) -> list[str]:
    """The pages of an entry of `nav`."""
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in in_navigation(value)]


def test_the_site_builds_with_every_link_checked(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    reference = (tmp_path / "build" / "site" / "reference" / "index.html").read_text()
    assert "effective batch" in reference
    assert all(f".{name}" in reference for name in trainfit.__all__ if name != "__version__")


def test_every_page_is_in_the_navigation() -> None:
    settings = tomllib.loads((ROOT / "zensical.toml").read_text())
    assert sorted(in_navigation(settings["project"]["nav"])) == [page.name for page in PAGES]


def texts_of_the_program() -> str:
    """All strings of the source, those of one literal joined, with placeholders as a mark."""
    texts: list[str] = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_that_are_explained_are_the_programs() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^\*\*`([^`]+)`", page, flags=re.M)
    assert len(messages) > 15
    program = texts_of_the_program().replace("'", "")
    others = {"CUDA out of memory", "No space left on device"}  # PyTorch's and the operating system's
    parts = [part.strip() for message in messages for part in re.split(r"\.\.\.|\b[ABN]\b", message.replace("'", ""))]
    assert not [part for part in parts if part not in program and part not in others]


def commands_of(page: Path) -> list[list[str]]:
    """The words of each `trainfit` command in a fenced or indented block of a page, in any of its three forms."""
    text = page.read_text()
    blocks = [
        *re.findall(r"```(?:bash)?\n(.*?)```", text, flags=re.S),
        *re.findall(r"^    (trainfit .*)$", text, flags=re.M),
    ]
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    return [
        shlex.split(line[line.index("trainfit") :]) for line in lines if re.match(r"(torchrun .*-m )?trainfit ", line)
    ]


COMMANDS = [(page.name, words) for page in [ROOT / "README.md", *PAGES] for words in commands_of(page)]


ELSEWHERE = ("--detectron2", "--config", "--print-config", "--help", "--help-all", "--version")
"""Flags that are taken before a command's own."""


@lru_cache
def help_of(*words: str) -> str:
    from trainfit.cli import main

    shown = StringIO()
    with pytest.raises(SystemExit) as caught, redirect_stdout(shown):
        main([*words, "--help"])
    assert caught.value.code == 0
    return shown.getvalue()


def test_every_page_shows_how() -> None:
    assert len(COMMANDS) > 50
    assert {"index.md", "README.md", "detect.md", "clip.md", "maskrcnn.md", "plan.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "-".join(value[1:4])
)
def test_the_commands_of_the_pages_have_the_flags_that_they_name(page: str, words: list[str]) -> None:
    """Each flag is in the help of its command and of its model; flags of other tools, which are translated, are not."""
    from trainfit.models.family import find

    _, name, *rest = words
    if name.startswith("--"):
        return
    model = next((word for word in rest if find(word)), "rtdetr-seg-nano" if "--stage" in rest else "")
    shown = help_of(name, *([model] if model and name in ("plan", "predict", "train", "measure") else []))
    flags = [word.partition("=")[0] for word in rest if word.startswith("--") and word not in ELSEWHERE]
    assert [flag for flag in flags if flag not in shown and flag.replace("--no-", "--") not in shown] == [], page
