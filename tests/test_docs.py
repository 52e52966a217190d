"""The documentation site is built with every link checked, and says what the program says."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
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


@pytest.mark.parametrize("page", [DOCS / "index.md"], ids=lambda page: page.name)
def test_the_commands_of_a_page_have_the_flags_that_they_name(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainfit.cli import main

    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)
    lines = [line.split("#")[0].split() for block in blocks for line in block.splitlines()]
    commands = [words for words in lines if words[:1] == ["trainfit"]]
    assert commands
    for _, name, *rest in commands:
        with pytest.raises(SystemExit):
            main([name, *rest[:1], "--help"])
        shown = capsys.readouterr().out
        assert all(flag in shown for flag in rest if flag.startswith("--"))
