"""Plans and runs in a notebook: the example runs, and shows what it should."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import trainfit
from trainfit.api import notebook
from trainfit.reports.notebook import NotebookProgress
from trainfit.training.telemetry import StepUpdate

EXAMPLE = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def html_of(cell: Any) -> str:
    return "".join(output.get("data", {}).get("text/html", "") for output in cell.get("outputs", ()))


def test_the_example_runs_and_shows_a_plan_and_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    book: Any = nbformat.read(EXAMPLE, as_version=4)
    committed = [html_of(cell) for cell in book.cells]
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=120, kernel_name="python3", resources=where).execute()
    shown = [html_of(cell) for cell in book.cells]
    assert [bool(html) for html in shown] == [bool(html) for html in committed]
    plan, run = (html for html in shown if html)
    assert "data:image/svg+xml;base64" in plan
    assert "trainfit train timm:test_resnet --data DIR" in plan
    assert "16 of 16 steps" in run
    assert "srcdoc=" in run
    assert "<progress" in run


def test_the_committed_outputs_name_no_machine() -> None:
    text = EXAMPLE.read_text()
    assert "site-packages" not in text
    assert '"output_type": "error"' not in text
    assert '"text/html"' in text


def test_nothing_of_it_outside_of_a_notebook() -> None:
    code = "import sys, trainfit; sys.exit('IPython' in sys.modules or 'trainfit.api.notebook' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert notebook.progress() is None
    notebook.install()


def test_progress_is_one_bar_and_the_last_notes() -> None:
    shown: list[str] = []
    progress = NotebookProgress(shown.append)
    for number in range(12):
        progress.note(f"note <{number}>")
    update = StepUpdate(
        step=3,
        total_steps=10,
        epoch=0,
        epochs=1,
        loss=1.0,
        images_per_s=2.0,
        remaining_s=5.0,
        memory_bytes=2**30,
        wait_share=0.0,
    )
    progress.step(update)
    assert "<progress value='3' max='10'" in shown[-1]
    assert "note &lt;11&gt;" in shown[-1]
    assert "note &lt;3&gt;" not in shown[-1]
    progress.evaluated(4, 8)
    assert "evaluating: 4/8 images" in shown[-1]
    assert trainfit.__all__
