"""Own models: what a folder holds, what each needs, adding and removing, favourites, and the tab over them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from apps.api.tokens import TokenTable, add_user
from apps.cli import app as command_line
from apps.service import model_facts
from apps.service.engine import Engine
from apps.service.model_facts import facts_of
from apps.service.model_folder import scan
from apps.service.own_models import (
    FAVOURITES,
    LIST,
    OwnModelError,
    OwnModels,
    added_sources,
    own_loras,
    own_models,
)
from apps.studio.models_handlers import ModelsHandlers
from apps.studio.models_views import table
from apps.studio.page_values import PageError
from apps.studio.sessions import Sessions
from apps.studio.strings import Strings
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.fakes import FakePipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one of each kind, good and bad."""
    root = tmp_path_factory.mktemp("models")
    tiny_text_to_image_pipeline().save_pretrained(root / "tiny")
    (root / "tiny" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# tiny\n")
    (root / "org").mkdir()
    tiny_text_to_image_pipeline().save_pretrained(root / "org" / "other")
    save_file({"model.weight": torch.zeros(3, 5, dtype=torch.bfloat16)}, str(root / "whole.safetensors"))
    save_file(
        {"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}, str(root / "style.safetensors")
    )
    (root / "broken.safetensors").write_bytes(b"\xff" * 40)
    (root / "giant.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    (root / "pickle.bin").write_bytes(b"\x80\x04x")
    (root / "model.ckpt").write_bytes(b"\x80\x04x")
    (root / ".hidden").mkdir()
    outside = tmp_path_factory.mktemp("outside")
    tiny_text_to_image_pipeline().save_pretrained(outside / "secret")
    (root / "link").symlink_to(outside / "secret")
    (root / "loop").symlink_to(root)
    return root


@pytest.fixture
def world(folder, tmp_path):
    """An engine with one fake, and a list of models of its own."""
    engine = Engine({"fake": "x"}, None, device="cpu", load=lambda source: FakePipeline(0.005))
    yield engine, OwnModels(engine, tmp_path / "models", lambda repository, revision: COMMIT)
    engine.close()


def test_each_kind_is_told_by_names_and_headers(folder):
    found = {one.name: one for one in scan(folder)}
    assert {name: one.kind for name, one in found.items() if one.is_usable} == {
        "tiny": "pipeline", "org/other": "pipeline", "whole": "checkpoint", "style": "lora",
    }  # fmt: skip
    assert {name for name, one in found.items() if not one.is_usable} >= {"broken", "giant", "link"}
    assert "leads out of the folder" in found["link"].problem
    assert str(folder) not in found["broken"].problem
    assert scan(folder / "nowhere") == []


def test_models_and_adapters_of_a_folder_go_their_ways(folder):
    assert own_models(folder, ["tiny"]).keys() == {"tiny (2)", "org/other", "whole"}
    assert own_loras(folder).keys() == {"style"}


def test_what_a_model_needs_is_read_from_headers(folder, monkeypatch):
    facts = facts_of(str(folder / "whole.safetensors"), "cpu", "float32")
    assert (facts.kind, facts.nbytes, facts.parameters, facts.memory) == ("checkpoint", 30, 15, 60)
    tiny = facts_of(str(folder / "tiny"), "cpu", "bfloat16")
    pipe = tiny_text_to_image_pipeline()
    weights = sum(weight.numel() for weight in pipe.transformer.state_dict().values())
    assert weights < tiny.parameters <= 4 * weights  # text encoder and autoencoder, too
    assert tiny.memory < tiny.nbytes  # half as wide
    assert tiny.licence == "apache-2.0"
    assert tiny.verdict == "fits"
    assert facts_of("someone/model").kind == "hub"
    assert facts_of(str(folder / "broken.safetensors")).problem
    for free, verdict in ((59, "too_large"), (70, "tight"), (80, "fits")):
        monkeypatch.setattr("pipelines.loading.memory.free_memory", lambda device, free=free: free)
        assert facts_of(str(folder / "whole.safetensors"), "cpu", "float32").verdict == verdict
    assert model_facts.facts_of(str(folder / "whole.safetensors"), is_loaded=True).verdict == "fits"


def test_a_model_is_added_kept_and_removed(world, folder):
    engine, own = world
    key = own.add(str(folder / "tiny"))
    assert key == "tiny"
    assert engine.models == ("fake", "tiny")
    assert added_sources(own.folder) == [str((folder / "tiny").resolve())]
    assert [one.key for one in own.rows("local") if one.is_added] == ["tiny"]
    with pytest.raises(OwnModelError, match="already"):
        own.add(str(folder / "tiny"))
    own.remove("tiny")
    assert engine.models == ("fake",)
    assert (folder / "tiny").is_dir()
    with pytest.raises(OwnModelError, match="was not added"):
        own.remove("fake")


def test_a_hub_id_is_pinned_to_its_commit(world):
    engine, own = world
    key = own.add("someone/model")
    assert engine.source(key) == f"someone/model@{COMMIT}"
    assert own_models(own.folder) == {f"someone/model@{COMMIT}": f"someone/model@{COMMIT}"}


@pytest.mark.parametrize(
    "source",
    [
        "",
        "/nowhere/at/all",
        "a/b/c",
        "someone/model@main",
        "x\0y",
        "<b>/x",
        "file:///etc",
        "0" * 500,
        "~nobody-here/x/y",
    ],
)
def test_what_is_no_model_is_refused(world, source):
    _, own = world
    with pytest.raises(OwnModelError, match="There is no model") as refused:
        own.add(source)
    assert refused.value.key == "models.source"
    assert not (own.folder / LIST).exists()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "x", "sources": []}', '{"format": "tessera-models-1", "sources": 3}']
)
def test_a_damaged_list_is_passed_over(tmp_path, text, caplog):
    (tmp_path / LIST).write_text(text)
    assert added_sources(tmp_path) == []
    assert "can't be read" in caplog.text


def test_what_comes_into_the_folder_is_found(world, folder):
    engine, own = world
    own.folder = folder
    assert set(own.refresh()) == {"tiny", "org/other", "whole"}
    assert own.refresh() == []
    assert "style" in engine.loras


def test_favourites_are_of_a_user_and_stand_first(world, folder):
    _, own = world
    own.add(str(folder / "tiny"))
    assert own.mark("tiny", "ann") is True
    assert [one.key for one in own.rows("ann")] == ["tiny", "fake"]
    assert [one.key for one in own.rows("bob")] == ["fake", "tiny"]
    assert json.loads((own.folder / FAVOURITES).read_text()) == {"ann": ["tiny"]}
    assert own.mark("tiny", "ann") is False
    with pytest.raises(OwnModelError, match="no model"):
        own.mark("../x", "ann")


def test_the_table_escapes_names_and_says_what_fits(world, folder, tmp_path):
    _, own = world
    (tmp_path / "<b>x").mkdir()
    save_file({"w": torch.zeros(2)}, str(tmp_path / "<b>x" / "<i>.safetensors"))
    own.add(str(tmp_path / "<b>x" / "<i>.safetensors"))
    html = table(own.rows("local"), scan(folder), Strings("en"))
    assert "<i>" not in html
    assert "&lt;i&gt;" in html
    assert "fits: " in html
    assert "leads out of the folder" in html


def test_only_administrators_change_the_list_where_people_sign_in(world, folder, tmp_path):
    engine, own = world
    for name, role in {"ann": "generate", "eve": "view", "root": "admin"}.items():
        add_user(tmp_path / "users.json", name, role)
    sessions = Sessions(TokenTable(tmp_path / "users.json"))
    handlers = ModelsHandlers(engine, own, Strings("en"), sessions, SimpleNamespace())
    for name in ("ann", "eve"):
        who = SimpleNamespace(username=name)
        for act in (lambda who: handlers.add(who, str(folder / "tiny")), lambda who: handlers.remove(who, "fake"),
                    lambda who: handlers.refresh(who, "fake")):  # fmt: skip
            with pytest.raises(PageError, match="no_rights"):
                act(who)
    assert handlers.open(SimpleNamespace(username="ann"), None)["models_add"]["interactive"] is False
    shown = handlers.add(SimpleNamespace(username="root"), str(folder / "tiny"))
    assert ("tiny", "tiny") in shown["model"]["choices"]
    assert handlers.mark(SimpleNamespace(username="ann"), "tiny")["models_chosen"]["choices"][0] == ("tiny", "tiny")
    with pytest.raises(PageError, match="no_rights"):
        handlers.mark(SimpleNamespace(username="eve"), "tiny")


def test_the_command_line_lists_adds_and_removes(folder, tmp_path):
    run = CliRunner().invoke
    listed = run(command_line, ["models", "list", "--models", str(folder), "--json"])
    values = json.loads(listed.output)
    assert {"stickers", "tiny", "org/other", "whole"} <= {one["id"] for one in values["models"]}
    assert values["loras"] == ["style"]
    assert "link" in values["unusable"]
    own = tmp_path / "models"
    added = run(command_line, ["models", "add", str(folder / "tiny"), "--models", str(own)])
    assert added.exit_code == 0
    assert added_sources(own) == [added.output.strip()]
    assert run(command_line, ["models", "remove", added.output.strip(), "--models", str(own)]).exit_code == 0
    assert added_sources(own) == []


def test_hostile_links_and_entries_keep_no_server_from_starting(tmp_path):
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / LIST).write_text(json.dumps({
        "format": "tessera-models-1",
        "sources": ["a/b@main", str(tmp_path / "private" / "gone"), 3, "x\0y", f"someone/model@{COMMIT}"],
    }))  # fmt: skip
    assert [one.name for one in scan(tmp_path) if not one.is_usable] == ["loop"]
    assert own_models(tmp_path).keys() == {f"someone/model@{COMMIT}"}  # and no path of the machine
