"""`tessera info` tells the truth about this machine and about packages that shadow ours."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from apps.commands import info
from pipelines import builtin_models


def test_report_is_json_and_names_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    info.run(json_output=True)
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["cores"] >= 1
    assert [row["device"] for row in report["devices"]][-1] == "cpu"
    assert all(row["bfloat16_gain"] > 0 for row in report["devices"])
    assert report["attention"]["native"].startswith("works on ")
    assert report["models"] == builtin_models()


def test_shown_report_keeps_every_value() -> None:
    report = {
        "versions": {"torch": "9.9"},
        "machine": {"cores": 3},
        "attention": {"native": "works on cpu"},
        "extras": {"studio": "missing [gradio]"},
        "devices": [{"device": "cpu", "name": "abacus", "memory_gib": 1.5, "bfloat16_gain": 2.5}],
        "models": ["stickers"],
        "warnings": ["dit: [someone] is in the way"],
    }
    console = Console(record=True, width=200)
    info.show(report, console)
    text = console.export_text()
    for value in ("9.9", "3", "works on cpu", "missing [gradio]", "abacus", "2.5", "stickers", "[someone] is in"):
        assert value in text


def test_our_own_packages_are_no_shadows() -> None:
    assert info.find_shadows() == {}


def test_another_distribution_with_our_name_is_found() -> None:
    providers = {"dit": ["tessera", "dit"], "apps": ["tessera"], "sampling": ["tessera"], "pipelines": ["Tessera"]}
    shadows = info.find_shadows(providers)
    assert list(shadows) == ["dit"]
    assert "pip uninstall dit" in shadows["dit"]


def test_a_package_from_another_place_is_found(tmp_path: Path) -> None:
    shadows = info.find_shadows({}, home=tmp_path)
    assert list(shadows) == list(info.PACKAGES)
    assert str(tmp_path / "dit") in shadows["dit"]


def test_extras_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["torch>=2.6", 'pytest>=8; extra == "dev"', 'no-such-package; extra == "bench"']
    monkeypatch.setattr("apps.commands.info.metadata.requires", lambda _: requirements)
    assert info.installed_extras() == {"dev": "", "bench": "missing no-such-package"}


def test_a_backend_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("this kernel wants a GPU\nand more lines")

    monkeypatch.setattr("dit.attention.backends.attention", refuse)
    device = info.available_devices()[0]
    assert info.probe_attention("native") == f"fails on {device}: this kernel wants a GPU"
