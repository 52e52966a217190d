"""The documentation site is built with every link checked, and says what the program says."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import trainfit
from conftest import run as command
from trainfit.tasks.detection.sample_set import write_sample_set

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


def test_every_page_shows_how() -> None:
    assert len(COMMANDS) > 50
    assert {"index.md", "README.md", "detect.md", "clip.md", "maskrcnn.md", "plan.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "-".join(value[1:4])
)
def test_the_commands_of_the_pages_are_understood(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is read to its end, every flag and value, and would start: `--print-config` shows it instead."""
    from trainfit.cli import main

    monkeypatch.chdir(tmp_path)
    for run in ("RUN", "DET", "runs/rfdetr-nano-1", "runs/clip-ViT-B-32-1"):
        (tmp_path / run).mkdir(parents=True)
        model = {"DET": "rtdetr-seg-nano", "runs/clip-ViT-B-32-1": "clip:ViT-B-32"}.get(run, "rfdetr-nano")
        (tmp_path / run / "recipe.json").write_text(json.dumps({"model": model}))
    (tmp_path / "plan.json").write_text(json.dumps({"model": "rfdetr-medium"}))
    (tmp_path / "train.yaml").write_text("model: rfdetr-medium\n")
    if "--detectron2" in words:
        words = [word for word in words if word not in ("--detectron2", "mask_rcnn_R_50_FPN_3x.yaml")]
        words.insert(2, "maskrcnn-r50-v1")
    elsewhere = [word for word in words[1:] if word in ("--version", "--help", "--help-all", "--tyro-print-completion")]
    shown = words[1 : words.index(">")] if ">" in words else words[1:]
    with pytest.raises(SystemExit) as caught:
        main([*shown, *([] if elsewhere else ["--print-config"])])
    assert caught.value.code in (0, None), f"{page}: {capsys.readouterr()}"


def test_cheap_commands_of_the_pages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reports and checks of the pages, with a run and a data set in the place of RUN and DIR."""
    monkeypatch.chdir(tmp_path)
    write_sample_set(tmp_path / "DIR", train=2, val=1)
    for run in ("RUN", "runs/rfdetr-nano-1"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "recipe.json").write_text(json.dumps({"model": "rfdetr-nano"}))
    ran: set[str] = set()
    for _, (_, name, *rest) in COMMANDS:
        if name not in ("check-data", "report") or any(word in ("pairs.csv", "TASK") for word in rest):
            continue
        if " ".join([name, *rest]) not in ran:
            ran.add(" ".join([name, *rest]))
            for page in tmp_path.glob("*.html"):
                page.unlink()
            assert command(name, *rest) == 0, capsys.readouterr().err
    assert len(ran) >= 4
