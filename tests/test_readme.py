"""The README's commands run."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_demo_runs(tmp_path: Path) -> None:
    """The first command, cut to one step."""
    assert "scripts/demo" in commands()
    done = subprocess.run(
        ["scripts/demo", "--max-steps", "1", "--resolution", "64", "--out", str(tmp_path / "run"), "--workers", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Trained rfdetr-nano for 1 step" in done.stdout
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_the_test_command_is_what_the_gate_runs() -> None:
    assert "scripts/test" in commands()
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()
    assert "pytest" in (ROOT / "scripts" / "test").read_text()


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("trainfit")])
def test_every_flag_of_the_readme_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from trainfit.cli import main

    _, name, *rest = command.split()
    with pytest.raises(SystemExit):
        main([name, "--help"])
    told = capsys.readouterr().out
    assert all(flag in told for flag in rest if flag.startswith("--"))


def test_documents_linked_are_there() -> None:
    assert all((ROOT / link).exists() for link in re.findall(r"\]\((docs/[^)]+)\)", README))
