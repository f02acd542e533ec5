"""Adding models while the server runs: downloads from a Hub at a commit, over HTTP, and in a browser."""

from __future__ import annotations

import json
import shutil
import threading
from types import SimpleNamespace

import httpx
import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from apps.api.app import create_app
from apps.cli import app as command_line
from apps.commands.serve import _start, check_port
from apps.service import model_download
from apps.service.engine import Engine
from apps.service.model_download import (
    PIN,
    CancelledError,
    DownloadError,
    HubFiles,
    downloaded_folder,
    pinned,
    wanted_files,
)
from apps.service.own_models import OwnModelError, OwnModels
from apps.studio.app import FORMS, UPLOADS, mount
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.fakes import FakePipeline
from tests.studio.serving import bearer, serving_page
from tests.studio.test_server import browser

__all__ = ["browser"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = save({"w": torch.zeros(4, 4)})
LORA = save({"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)})
PIPELINE = {
    "model_index.json": b'{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}',
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": WEIGHTS,
    "README.md": b"---\nlicense: mit\n---\n",
    "whole.safetensors": WEIGHTS,
    "transformer/diffusion_pytorch_model.fp16.safetensors": WEIGHTS,
    "transformer/diffusion_pytorch_model.bin": b"\x80\x04pickle",
    "pipeline.py": b"raise SystemExit",
    "../../outside.json": b"{}",
    "/etc/absolute.json": b"{}",
    "a/..\\b.json": b"{}",
    "*.json": b"{}",
}


class FakeHub:
    """A Hub of one repository, whose files come one after another once `open` is set."""

    def __init__(self, files, commit=COMMIT):
        self.content, self.commit = files, commit
        self.open, self.began = threading.Event(), threading.Event()
        self.open.set()
        self.asked = []

    def files(self, repository, revision):
        self.asked.append((repository, revision))
        if repository != "someone/flux":
            raise FileNotFoundError(f"The Hub has no repository {repository!r}.")
        return HubFiles(revision or self.commit, {name: len(text) for name, text in self.content.items()})

    def fetch(self, repository, commit, folder, names, is_cancelled):
        assert commit in (self.commit, "f" * 40)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self.content[name])
            self.began.set()
            while not self.open.wait(0.01):
                if is_cancelled():
                    raise CancelledError


@pytest.fixture
def world(tmp_path):
    """An engine with one fake, and a folder of models that are fetched from a fake Hub."""
    engine, hub = Engine({"fake": "x"}, None, device="cpu", load=lambda source: FakePipeline()), FakeHub(PIPELINE)
    own = OwnModels(engine, tmp_path / "models", hub=hub)
    yield SimpleNamespace(engine=engine, own=own, hub=hub, folder=tmp_path / "models")
    own.close()
    engine.close()


def test_only_weights_json_and_text_with_harmless_names_are_fetched():
    assert wanted_files(dict.fromkeys(PIPELINE, 1)).keys() == {
        "model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "README.md",
    }  # fmt: skip
    shards = {"model_index.json": 1, "t/m.fp16-00001-of-00002.safetensors": 1}
    assert wanted_files(shards).keys() == shards.keys()  # there is no other precision
    assert wanted_files({"one.safetensors": 1, "two.txt": 2}).keys() == {"one.safetensors", "two.txt"}
    for files, reason in (({"x.bin": 1, "y.json": 1}, "no .safetensors"), ({}, "no .safetensors"),
                          ({f"{one}.safetensors": 1 for one in range(1001)}, "1001 files")):  # fmt: skip
        with pytest.raises(DownloadError, match=reason):
            wanted_files(files)


def test_a_repository_is_fetched_at_its_commit_offered_and_removed(world):
    own, engine, folder = world.own, world.engine, world.folder
    started = own.fetch(" someone/flux ")
    assert (started.commit, started.state) == (COMMIT, "running")
    assert own.downloads.wait(20)
    last = own.downloads.last
    assert (last.state, last.keys, last.share) == ("done", ("someone--flux",), 1.0)
    assert engine.models == ("fake", "someone--flux")
    place = folder / "someone--flux"
    assert pinned(place) == ("someone/flux", COMMIT)
    assert {one.name for one in folder.rglob("*") if one.is_file()} == {
        "model_index.json", "config.json", "diffusion_pytorch_model.safetensors", "README.md", PIN,
    }  # fmt: skip
    row = next(one for one in own.rows("local") if one.key == "someone--flux")
    assert (row.is_added, row.origin, row.facts.licence) == (True, f"someone/flux@{COMMIT}", "mit")
    with pytest.raises(DownloadError, match="already"):
        own.fetch("someone/flux")
    own.remove("someone--flux")
    assert engine.models == ("fake",)
    assert not place.exists()


def test_a_commit_that_is_named_is_asked_for(world):
    world.own.fetch(f"someone/flux@{'F' * 40}")
    assert world.own.downloads.wait(20)
    assert world.hub.asked == [("someone/flux", "f" * 40)]
    assert pinned(world.folder / "someone--flux") == ("someone/flux", "f" * 40)


def test_a_download_is_watched_and_cancelled(world):
    world.hub.open.clear()
    world.own.fetch("someone/flux")
    assert world.hub.began.wait(20)
    last = world.own.downloads.last
    assert 0 < last.fetched < last.nbytes
    assert 0 < last.share < 1
    with pytest.raises(DownloadError, match="being fetched"):
        world.own.fetch("someone/flux")
    world.own.downloads.cancel()
    assert world.own.downloads.wait(20)
    assert world.own.downloads.last.state == "stopped"
    assert list(world.folder.iterdir()) == []
    assert world.engine.models == ("fake",)
    world.hub.open.set()
    world.own.fetch("someone/flux")
    assert world.own.downloads.wait(20)
    assert world.own.downloads.last.state == "done"


def test_a_failure_is_said_without_paths_and_leaves_nothing(world):
    def fetch(repository, commit, folder, names, is_cancelled):
        (folder / "half.safetensors").write_bytes(b"x")
        raise OSError(f"{folder}/half.safetensors: disk error")

    world.hub.fetch = fetch
    world.own.fetch("someone/flux")
    assert world.own.downloads.wait(20)
    last = world.own.downloads.last
    assert last.state == "failed"
    assert "disk error" in last.reason
    assert str(world.folder) not in last.reason
    assert list(world.folder.iterdir()) == []


def test_what_holds_no_model_is_not_kept(world):
    world.hub.content = {"bad.safetensors": b"\xff" * 50}
    world.own.fetch("someone/flux")
    assert world.own.downloads.wait(20)
    assert world.own.downloads.last.state == "failed"
    assert "nothing that can be loaded" in world.own.downloads.last.reason
    assert list(world.folder.iterdir()) == []


def test_a_lora_that_is_fetched_joins_the_loras(world):
    world.hub.content = {"style.safetensors": LORA}
    world.own.fetch("someone/flux")
    assert world.own.downloads.wait(20)
    assert world.own.downloads.last.state == "done"
    assert "someone--flux/style" in world.engine.loras
    assert world.engine.models == ("fake",)


def test_what_can_not_be_fetched_is_refused(world, monkeypatch):
    own = world.own
    for source in ("nobody/x", "a/b/c", "../x", "someone/..", "someone/flux@main", "some one/flux", "", "https://x/y"):
        with pytest.raises(DownloadError):
            own.fetch(source)
    world.hub.commit = "main"
    with pytest.raises(DownloadError, match="no commit"):
        own.fetch("someone/flux")
    world.hub.commit = COMMIT
    monkeypatch.setattr(model_download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    with pytest.raises(DownloadError, match="make room") as refused:
        own.fetch("someone/flux")
    assert refused.value.key == "models.disk"
    assert own.downloads.last is None


def test_only_what_was_downloaded_here_is_ever_deleted(world, tmp_path):
    own, engine, folder = world.own, world.engine, world.folder
    place = folder / "mine"
    (place / "transformer").mkdir(parents=True)
    for name in list(PIPELINE)[:3]:
        (place / name).write_bytes(PIPELINE[name])
    (place / PIN).write_text(json.dumps({"format": "tessera-pin-1", "repository": "someone/flux", "commit": COMMIT}))
    shutil.copytree(place, tmp_path / "outside")
    own.refresh()
    assert "mine" in engine.models  # with the pin of another model
    with pytest.raises(OwnModelError, match="was not added"):
        own.remove("mine")
    assert place.is_dir()
    assert downloaded_folder(str(tmp_path / "outside"), folder) is None
    assert downloaded_folder("someone/flux", folder) is None
    assert downloaded_folder(str(folder), folder) is None
    assert downloaded_folder(f"{folder}/x/../../outside", folder) is None
    (folder / "someone--flux").symlink_to(place)
    assert downloaded_folder(str(folder / "someone--flux"), folder) is None


def test_a_path_that_holds_no_model_is_refused_with_the_reason(world, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(LORA)
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "bomb.ckpt").write_bytes(b"\x80\x04x")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    refusals = {
        "style.safetensors": "models.lora",
        "bad.safetensors": "models.damaged",
        "bomb.ckpt": "models.damaged",
        "empty": "models.kind",
        "text.txt": "models.kind",
    }
    for name, key in refusals.items():
        with pytest.raises(OwnModelError) as refused:
            world.own.add(str(tmp_path / name))
        assert refused.value.key == key, name
    assert world.engine.models == ("fake",)
    assert not world.folder.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "tessera-pin-1", "repository": "../x", "commit": "y"}'])
def test_a_damaged_pin_is_none(tmp_path, text):
    (tmp_path / PIN).write_text(text)
    assert pinned(tmp_path) is None


def test_the_command_line_fetches_shows_and_removes(tmp_path, monkeypatch):
    hub, folder = FakeHub(PIPELINE), str(tmp_path / "models")
    monkeypatch.setattr(model_download, "HuggingFaceHub", lambda: hub)

    def run(*words):
        return CliRunner().invoke(command_line, ["models", *words, "--models", folder])

    added = run("add", "someone/flux")
    assert added.exit_code == 0, added.output
    assert added.output.splitlines()[-1] == f"someone/flux@{COMMIT}"
    values = json.loads(run("info", "someone--flux", "--json").output)
    assert (values["origin"], values["kind"], values["licence"]) == (f"someone/flux@{COMMIT}", "pipeline", "mit")
    assert values["tasks"] == ["text_to_image"]
    assert "someone--flux" in run("info", "someone--flux").output
    hub.content = {"style.safetensors": b"\xff" * 40}
    assert run("add", "someone/flux").exit_code != 0  # it is there
    removed = json.loads(run("remove", "someone--flux", "--json").output)
    assert removed["files_removed"] is True
    assert not (tmp_path / "models" / "someone--flux").exists()
    assert run("add", "someone/flux").exit_code != 0  # damaged
    assert list((tmp_path / "models").iterdir()) == []


# ------------------------------------------------------------------------------ HTTP


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving_page(tmp_path_factory.mktemp("page")) as found:
        yield found


def test_the_owner_adds_and_removes_over_http(served, tmp_path):
    folder = tmp_path / "mine"
    (folder / "transformer").mkdir(parents=True)
    for name in list(PIPELINE)[:4]:
        (folder / name).write_bytes(PIPELINE[name])
    with httpx.Client(base_url=served.address, trust_env=False, timeout=30) as client:
        root, ann = bearer(served, "root"), bearer(served, "ann")
        assert client.post("/v1/models", json={"source": str(folder)}, headers=ann).status_code == 403
        added = client.post("/v1/models", json={"source": str(folder)}, headers=root)
        assert (added.status_code, added.json()["id"]) == (201, "mine")
        listed = {one["id"]: one for one in client.get("/v1/models", headers=ann).json()["data"]}
        assert listed["fake"]["object"] == "model"
        assert listed["mine"]["added"] is True
        facts = listed["mine"]["facts"]
        assert (facts["kind"], facts["licence"], facts["parameters"], facts["verdict"]) == (
            "pipeline",
            "mit",
            16,
            "fits",
        )
        assert str(tmp_path) not in json.dumps(listed)
        again = client.post("/v1/models", json={"source": str(folder)}, headers=root)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "models_known")
        for body, status in (({"source": "/nowhere"}, 422), ({"source": ""}, 422), ({}, 422), ({"source": 3}, 422),
                             ({"source": "x/y", "more": 1}, 422), ({"source": "someone/flux"}, 502)):  # fmt: skip
            assert client.post("/v1/models", json=body, headers=root).status_code == status, body
        assert client.delete("/v1/models/mine", headers=ann).status_code == 403
        assert client.delete("/v1/models/mine", headers=root).json()["deleted"] is True
        assert client.delete("/v1/models/mine", headers=root).status_code == 404
        assert client.delete("/v1/models/fake", headers=root).status_code == 422
        assert client.get("/v1/model-download", headers=root).json() == {"download": None}
        paths = client.get("/v1/openapi.json", headers=ann).json()["paths"]
        assert {"get", "post"} <= paths["/v1/models"].keys()
        assert {"get", "delete"} <= paths["/v1/models/{model_id}"].keys()
    assert (folder / "model_index.json").is_file()


# --------------------------------------------------------------------------- browser


@pytest.mark.slow
def test_a_model_is_added_by_path_marked_used_and_generates_without_a_reload(browser, tmp_path):
    tiny_text_to_image_pipeline().save_pretrained(tmp_path / "tiny")
    (tmp_path / "out").mkdir()
    engine = Engine({"stickers": "stickers"}, tmp_path / "out", device="cpu", dtype="float32")
    hub = FakeHub(PIPELINE)
    own = OwnModels(engine, tmp_path / "models", hub=hub)
    app = create_app(engine, None, uploads=UPLOADS, forms=FORMS)
    app.state.own_models = own
    mount(app, engine, own=own)
    port = check_port("127.0.0.1", 0)
    server = _start(app, "127.0.0.1", port)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#generate:not([disabled])")
        page.click("#tabs button[role=tab]:has-text('Models')")
        page.wait_for_selector(".models-table tbody tr")
        page.fill("#models-source input, #models-source textarea", str(tmp_path / "tiny"))
        page.click("#models-add")
        row = page.locator(".models-table tbody tr", has_text="tiny")
        row.wait_for()
        assert "fits" in row.inner_text()
        page.click("#models-mark")
        page.wait_for_selector(".models-table tbody tr:first-child:has-text('\u2605')")
        hub.open.clear()
        page.fill("#models-source input, #models-source textarea", "someone/flux")
        page.click("#models-add")
        page.wait_for_selector("#models-note:has-text('someone/flux')")
        page.click("#models-cancel")
        page.wait_for_selector("#models-note:has-text('cancelled')")
        assert page.locator("#models-add").is_enabled()
        page.click("#models-use")
        page.wait_for_selector(
            "#tab-text-button[aria-selected=true], #tabs button[aria-selected=true]:has-text('Text')"
        )
        page.wait_for_function("document.querySelector('#model input')?.value.startsWith('tiny')")
        page.wait_for_selector("#generate:not([disabled])")
        page.fill("#prompt textarea", "a red apple")
        page.click("#generate")
        page.wait_for_selector("#stage img", timeout=60_000)
        job = engine.jobs(None, 1)[0]
        assert json.loads(job.request)["model"] == "tiny"
        assert own.favourites("local") == {"tiny"}
        page.reload()  # the lists of the page were made when the server started
        page.wait_for_selector("#generate:not([disabled])")
        page.wait_for_function("document.querySelector('#model input')?.value.startsWith('tiny')")
        page.fill("#prompt textarea", "a green pear")
        page.click("#generate")
        page.wait_for_selector("#stage img", timeout=60_000)
        assert [json.loads(one.request)["model"] for one in engine.jobs(None, 5)] == ["tiny", "tiny"]
        page.click("#tabs button[role=tab]:has-text('Models')")
        page.click("#models-remove:not([disabled])")
        row.wait_for(state="detached")
        assert engine.models == ("stickers",)
        assert page.locator("#model input").input_value().startswith("stickers")
    finally:
        page.close()
        server.should_exit = True
        own.close()
        engine.close()
