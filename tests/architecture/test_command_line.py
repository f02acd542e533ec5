"""The command line answers at once and fails with one clear line."""

import subprocess
import sys

import pytest

from apps import cli
from tests.architecture.sources import ROOT

HEAVY = ("torch", "diffusers", "transformers", "gradio", "numpy", "PIL")
COMMANDS = ("studio", "generate", "compare", "train", "evaluate", "convert", "info", "attention")


def tessera(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "apps", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(arguments)
    return int(leaving.value.code or 0)


def loaded_modules(code: str) -> int:
    """How many modules a fresh Python holds after some code."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(len(sys.modules))"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return int(result.stdout.splitlines()[-1])


def test_help_loads_little_beside_what_parses_and_draws_it() -> None:
    """Counts modules, because seconds depend on the machine."""
    least = loaded_modules("import typer, rich.console, rich.panel, rich.table, rich.markdown")
    ours = loaded_modules(
        "from apps.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    sys.stdout.flush()"
    )
    assert ours < 1.3 * least


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from apps.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as leaving:\n    code = leaving.code\n"
        f"assert not code, code; print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert "Usage: tessera" in result.stdout


def test_version() -> None:
    from dit import __version__

    assert tessera("--version").stdout.split() == ["tessera", __version__]


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["generate"], ["generate", "a cat", "--steps", "0"], ["generate", "a cat", "--dtype", "int3"]],
)
def test_wrong_usage_leaves_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("size 7 is odd"), OSError("disk full"), ImportError("no gradio")])
def test_an_error_of_the_user_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr("apps.commands.info.run", fail)
    assert exit_code("info") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {error}")
    with pytest.raises(type(error)):
        cli.main(["info", "--debug"])


def test_an_interrupt_leaves_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("apps.commands.info.run", interrupt)
    assert exit_code("info") == 130


def test_a_defect_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("apps.commands.info.run", fail)
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_generating_with_a_built_in_model_warns_of_nothing(tmp_path) -> None:
    """Importing all of diffusers' pipelines takes seconds, and transformers then warns about torchvision."""
    command = [sys.executable, "-m", "apps", "generate", "a fox on blue", "--steps", "1", "-o", str(tmp_path / "a.png")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=170)
    assert (result.returncode, result.stderr) == (0, "")
