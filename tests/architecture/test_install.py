"""What the Makefile installs: pins that every package index knows, torch from the right one, progress that is true."""

import ast
import http.server
import importlib.metadata
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.architecture.sources import ROOT, parse, python_files
from tools import install
from tools.pip_progress import Progress, normalized, pinned
from tools.torch_index import (
    CPU_INDEX,
    Choice,
    Machine,
    PipSettings,
    UnsuitableError,
    choose,
    find_gpu,
    make_probe,
    parse_pip_settings,
)

CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("studio", "train", "dev")
REFUSED = {"torchvision", "timm"}  # the project does without them; tests hold what it does where they are absent
LINUX, MAC = Machine("Linux", "x86_64"), Machine("Darwin", "arm64")


def pins() -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.splitlines())
    parts = [re.split(r"==|\s*;", line) for line in lines if line]
    return {normalized(name): version for name, version, *_ in parts}


def closure(extras: tuple[str, ...]) -> set[str]:
    """Names of all that the project needs here with some extras, read from what is installed."""
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    found: set[str] = set()
    left = [Requirement(line) for line in wanted]
    while left:
        requirement = left.pop()
        name = normalized(requirement.name)
        if f"{name}{sorted(requirement.extras)}" in found:
            continue
        found |= {name, f"{name}{sorted(requirement.extras)}"}
        needs = map(Requirement, importlib.metadata.requires(name) or ())
        marks = [{"extra": extra} for extra in ("", *requirement.extras)]
        left += [one for one in needs if one.marker is None or any(one.marker.evaluate(mark) for mark in marks)]
    return {name for name in found if "[" not in name}


# ----------------------------------------------------------------------------------- pins


def test_pins_are_public_versions() -> None:
    """A local label such as +cpu is on no index but its maker's, so pip would find nothing elsewhere."""
    assert len(pins()) > 50
    assert {
        name: version for name, version in pins().items() if not re.fullmatch(r"\d+(\.\d+)*(\.?\w+\d+)?", version)
    } == {}


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_every_dependency_is_pinned_within_its_range(extra: str) -> None:
    for line in PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins()[normalized(requirement.name)]), line


@pytest.mark.parametrize("extras", [(), ("studio", "train"), EXTRAS])
def test_headings_of_the_pins_tell_what_an_installation_brings(extras: tuple[str, ...]) -> None:
    """So the count of packages is known before pip has found out."""
    try:
        needed = closure(extras)
    except importlib.metadata.PackageNotFoundError as missing:
        pytest.skip(f"this environment lacks a package of the extras {extras}: {missing}")
    cuda = {name for name in needed if re.match(r"nvidia-|cuda-|triton$", name)}  # fixed by torch itself
    marked = {normalized(name) for name in re.findall(r"^([\w.-]+)==\S+ *;", CONSTRAINTS, re.MULTILINE)}
    assert needed - cuda - marked == set(pinned(CONSTRAINTS, set(extras)))
    assert not needed & REFUSED


def test_nothing_brings_torchvision_or_timm() -> None:
    names = {
        normalized(Requirement(line).name) for lines in PROJECT["optional-dependencies"].values() for line in lines
    }
    assert not (names | pins().keys()) & REFUSED


def test_the_makefile_installs_by_the_script_and_names_no_index() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-m tools.install" in makefile
    assert "pip install" not in makefile


def test_the_installer_needs_nothing_but_python() -> None:
    for path in python_files():
        if path.relative_to(ROOT).parts[0] != "tools":
            continue
        for node in ast.walk(parse(path)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert {name.split(".")[0] for name in names} <= {"tools", *sys.stdlib_module_names}, path


# ---------------------------------------------------------------------------------- index


def reached(index: str) -> str:
    return ""


def unreachable(index: str) -> str:
    return "no answer within 6 seconds"


def forbidden(index: str) -> str:
    raise AssertionError(f"{index} was asked")


@pytest.mark.parametrize(
    ("machine", "override", "settings", "probe", "index", "word"),
    [
        (LINUX, "", PipSettings(), reached, CPU_INDEX, "no NVIDIA GPU"),
        (Machine("Linux", "aarch64"), "", PipSettings(), reached, CPU_INDEX, "no NVIDIA GPU"),
        (LINUX, "", PipSettings(), unreachable, "", "cannot be reached"),
        (Machine("Linux", "x86_64", "/dev/nvidia0"), "", PipSettings(), forbidden, "", "/dev/nvidia0"),
        (Machine("Linux", "x86_64", "/dev/nvidia0"), "cpu", PipSettings(), forbidden, CPU_INDEX, "TORCH_INDEX=cpu"),
        (MAC, "", PipSettings(), forbidden, "", "Darwin arm64"),
        (LINUX, "pypi", PipSettings(), forbidden, "", "TORCH_INDEX=pypi"),
        (
            LINUX,
            "https://me:secret@mirror/whl",
            PipSettings(),
            forbidden,
            "https://me:secret@mirror/whl",
            "//mirror/whl",
        ),
        (LINUX, "", PipSettings(no_index=True), forbidden, "", "no-index"),
        (LINUX, "cpu", PipSettings(no_index=True), forbidden, "", "no-index"),
        (LINUX, "", PipSettings(("https://download.pytorch.org/whl/cu130",)), forbidden, "", "whl/cu130"),
        (LINUX, "", PipSettings(("https://mirror/simple",)), reached, CPU_INDEX, "no NVIDIA GPU"),
    ],
)
def test_the_index_fits_the_machine(
    machine: Machine, override: str, settings: PipSettings, probe: Callable[[str], str], index: str, word: str
) -> None:
    choice = choose(machine, override, settings, probe)
    assert choice.index == index
    assert word in choice.reason
    assert "secret" not in choice.reason


def test_what_cannot_work_is_refused_with_a_remedy() -> None:
    with pytest.raises(UnsuitableError, match=r"TORCH_INDEX='cuda'.*TORCH_INDEX=pypi"):
        choose(LINUX, "cuda", PipSettings(), forbidden)
    with pytest.raises(UnsuitableError, match=r"machine=x86_64.*2\.2\.2.*arm64"):
        choose(Machine("Darwin", "x86_64"), "", PipSettings(), forbidden)


@pytest.mark.parametrize(
    ("files", "smi", "found"),
    [
        ((), False, ""),
        ((), True, "nvidia-smi"),
        (("dev/nvidia0",), False, "/dev/nvidia0"),
        (("dev/nvidiactl",), False, ""),
        (("proc/driver/nvidia/version",), False, "/proc/driver/nvidia"),
    ],
)
def test_a_gpu_is_found_by_its_driver(tmp_path: Path, files: tuple[str, ...], smi: bool, found: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert find_gpu(tmp_path, lambda: smi) == found


def test_settings_of_pip_are_read_in_its_order() -> None:
    listing = (
        ":env:.cert='/certificates/a.pem'\n"
        "global.cert='/certificates/b.pem'\n"
        "global.index-url='https://mirror/simple'\n"
        "global.extra-index-url='https://one/simple\\nhttps://two/simple'\n"
        "install.no-index='true'\n"
        "download.proxy='http://not-for-install:1'\n"
    )
    read = parse_pip_settings(listing, {"REQUESTS_CA_BUNDLE": "/certificates/c.pem"})
    indexes = ("https://mirror/simple", "https://one/simple", "https://two/simple")
    assert read == PipSettings(indexes, no_index=True, cert="/certificates/a.pem", proxy="")
    assert parse_pip_settings("", {}) == PipSettings()
    assert parse_pip_settings("", {"REQUESTS_CA_BUNDLE": "/certificates/c.pem"}).cert == "/certificates/c.pem"


@pytest.fixture
def index_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package index on this machine that has torch, and refuses another path; it answers at once."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in ("/whl/cpu/torch/", "http://far.example/torch/") else 403)
            self.end_headers()
            self.wfile.write(b"<a>")

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_an_index_is_probed(index_server: str) -> None:
    probe = make_probe(PipSettings(), seconds=60)
    assert probe(f"{index_server}/whl/cpu") == ""
    assert probe(f"{index_server}/whl/cu999") == "HTTP 403"
    assert "refused" in probe("http://127.0.0.1:9/whl/cpu")
    assert "No such file" in make_probe(PipSettings(cert="absent.pem"), 60)(index_server)


def test_the_probe_goes_through_the_proxy_of_pip(index_server: str) -> None:
    assert make_probe(PipSettings(proxy=index_server), seconds=60)("http://far.example") == ""


def test_a_probe_without_an_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr("tools.torch_index._ask", lambda *_: answered.wait(60))
    assert "no answer" in make_probe(PipSettings(), seconds=0.01)("https://silent.example")
    answered.set()


# ------------------------------------------------------------------------------- progress

OUTPUT = """\
Looking in indexes: https://pypi.org/simple, https://download.pytorch.org/whl/cpu
Obtaining file:///home/someone/tessera
  Preparing editable metadata (pyproject.toml): finished with status 'done'
Requirement already satisfied: numpy>=2 in ./site-packages (from tessera==0.1) (2.4.6)
Collecting torch>=2.6 (from tessera==0.1)
  Downloading https://download.pytorch.org/whl/cpu/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl (191.8 MB)
Progress 95000000 of 191800000
Progress 191800000 of 191800000
Collecting hf-xet<2 (from tessera==0.1)
  Downloading hf_xet-1.8.0-cp37-abi3-manylinux_2_28_x86_64.whl.metadata (5.2 kB)
INFO: pip is looking at multiple versions of hf-xet to determine which version is compatible.
Using cached hf_xet-1.8.0-cp37-abi3-manylinux_2_28_x86_64.whl (4 kB)
Installing collected packages: torch, hf-xet, tessera
"""


def test_the_output_of_pip_becomes_a_line_a_package() -> None:
    progress = Progress(3)
    assert "0 of about 3" in progress.waiting(0)
    told, waiting = [], []
    for line in OUTPUT.splitlines():
        told.append(progress.read(line))
        waiting.append(progress.waiting(1))
    assert [line for line in told if line] == [
        "  1/3  torch 2.13.0+cpu  191.8 MB",
        "INFO: pip is looking at multiple versions of hf-xet to determine which version is compatible.",
        "  2/3  hf-xet 1.8.0  0.0 MB  (cached)",
        "installing 3 packages",
    ]
    assert "torch (95 of 192 MB)" in waiting[6]
    assert "3 of about 3" in waiting[8]
    assert "1 of 3" in waiting[-1]
    assert "2 packages (192 MB) in 7 s, 1 were there already" in progress.summary(7.2)


def test_local_files_and_more_packages_than_expected_are_counted(tmp_path: Path) -> None:
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-any.whl").write_bytes(b"x" * 300_000)
    progress = Progress(1)
    first = progress.read(f"Processing {tmp_path}/torch-2.13.0+cpu-cp311-cp311-any.whl (from tessera==0.1)")
    assert first == "  1/1  torch 2.13.0+cpu  0.3 MB  (local file)"
    assert progress.read("  Downloading triton-3.7.1.tar.gz (197.7 MB)").startswith("  2/2  triton 3.7.1  197.7 MB")


def test_errors_of_pip_are_shown_whole_and_end_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import sys; print('Collecting torch>=2.6', flush=True);"
        "sys.exit('ERROR: first\\n  second line\\nERROR: No matching distribution found for torch==2.13.0')"
    )
    monkeypatch.setattr(install, "pip_command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr(install, "choose", lambda *_: Choice("", "a test"))
    monkeypatch.setattr(install, "read_pip_settings", PipSettings)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert install.main(["studio"]) == 1
    told = capsys.readouterr()
    assert "ERROR: first\n  second line\n" in told.err
    assert "glibc 2.28" in told.err
    assert "install.log" in told.err
    assert "No matching distribution" in (tmp_path / "install.log").read_text()
    assert "Collecting torch" in (tmp_path / "install.log").read_text()
    assert "torch: a test" in told.out


@pytest.mark.parametrize(
    ("errors", "word"),
    [
        ("WARNING: Retrying (Retry(total=4)) after connection broken\nERROR: No matching distribution", "HTTPS_PROXY"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "TMPDIR"),
        ("ERROR: something new", "make clean"),
    ],
)
def test_a_remedy_fits_the_error(errors: str, word: str) -> None:
    assert word in install.remedy(errors)


def test_pip_is_asked_for_the_extras_under_the_constraints() -> None:
    old = install.pip_command(["studio", "train"], Choice("", ""), (22, 3))
    new = install.pip_command(["dev"], Choice(CPU_INDEX, ""), (26, 0))
    assert old[-1] == f"{ROOT}[studio,train]"
    assert str(ROOT / "constraints.txt") in old
    assert "--extra-index-url" not in old
    assert new[new.index("--extra-index-url") + 1] == CPU_INDEX  # beside those of pip's settings, not in their place
    assert (old[old.index("--progress-bar") + 1], new[new.index("--progress-bar") + 1]) == ("off", "raw")


def test_wrong_use_says_what_is_expected() -> None:
    command = [sys.executable, "-m", "tools.install"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "studio,train" in done.stderr
