"""The folder of models: what lies in it is told by headers, hostile files are listed with the reason, links refused."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from apps.service import model_folder
from apps.service.model_facts import facts_of
from apps.service.model_folder import MAX_HEADER, MOST_ENTRIES, scan

WEIGHT = {"blocks.0.attn.to_q.weight": torch.zeros(8, 4)}
LORA = {"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 4),
        "transformer.blocks.0.attn.to_q.lora_B.weight": torch.zeros(8, 2)}  # fmt: skip


def pipeline_at(folder, *, card=None, **index):
    """Write a folder with an index and a component of 32 parameters."""
    (folder / "transformer").mkdir(parents=True)
    save_file(WEIGHT, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "config.json").write_text("{}")
    values = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"], **index}
    (folder / "model_index.json").write_text(json.dumps(values))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def found_in(folder):
    return {one.name: one for one in scan(folder)}


def gguf_bytes(tensors=1):
    """Return a GGUF file with one float32 tensor of four values."""
    from struct import pack

    name = b"blocks.0.weight"
    head = b"GGUF" + pack("<IQQ", 3, tensors, 0)
    entry = pack("<Q", len(name)) + name + pack("<IQIQ", 1, 4, 0, 0)
    body = head + (entry if tensors else b"")
    return body + b"\0" * (-len(body) % 32) + (b"\0" * 16 if tensors else b"")


def test_each_kind_is_told_by_its_headers_and_names_are_paths_below_the_folder(tmp_path):
    pipeline_at(tmp_path / "owner" / "flux")
    (tmp_path / "modular").mkdir()
    (tmp_path / "modular" / "modular_model_index.json").write_text('{"_class_name": "FluxModularPipeline"}')
    save_file(WEIGHT, tmp_path / "single.safetensors")
    save_file(LORA, tmp_path / "style.safetensors")
    (tmp_path / "peft").mkdir()
    save_file(LORA, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    (tmp_path / "small.gguf").write_bytes(gguf_bytes())
    (tmp_path / "notes.txt").write_text("not a model")
    (tmp_path / ".hidden").mkdir()
    found = found_in(tmp_path)
    assert {name: one.kind for name, one in found.items()} == {
        "modular": "modular", "owner/flux": "pipeline", "peft": "lora", "single": "checkpoint", "small": "gguf",
        "style": "lora",
    }  # fmt: skip
    assert all(one.is_usable for one in found.values())
    assert scan(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 64, "no safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        ((2).to_bytes(8, "little") + b"[]", "not readable"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "not readable"),
        (
            (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'.ljust(60),
            "cut short",
        ),
        ((66).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'.ljust(66), "shape"),
    ],
    ids=["empty", "garbage", "no tensors", "a list", "nested", "cut short", "negative"],
)
def test_a_damaged_file_is_listed_with_the_reason(tmp_path, content, reason):
    (tmp_path / "bad.safetensors").write_bytes(content)
    found = found_in(tmp_path)["bad"]
    assert not found.is_usable
    assert reason in found.problem
    assert str(tmp_path) not in found.problem


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER + 100)  # sparse: it takes no room
    assert f"expected at most {MAX_HEADER}" in found_in(tmp_path)["huge"].problem


def test_damaged_gguf_files_and_indexes_are_listed(tmp_path):
    (tmp_path / "short.gguf").write_bytes(gguf_bytes()[:-8])
    (tmp_path / "none.gguf").write_bytes(gguf_bytes(0))
    for name, text in {"list": "[]", "broken": "{", "nested": "[" * 100_000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(text)
    pipeline_at(tmp_path / "code", _class_name=["pipeline.py", "Mine"])
    pipeline_at(tmp_path / "long", filler="x" * model_folder.MAX_INDEX)
    found = found_in(tmp_path)
    assert len(found) == 7
    assert not any(one.is_usable for one in found.values())
    assert "never run" in found["code"].problem
    assert "bytes" in found["long"].problem


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "bomb.ckpt").write_bytes(pickle.dumps(Bomb()))
    assert "pickle" in found_in(tmp_path)["bomb"].problem
    assert not (tmp_path / "exploded").exists()


def test_links_that_lead_out_are_refused_and_not_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "models"
    pipeline_at(outside / "secret")
    save_file(WEIGHT, outside / "file.safetensors")
    folder.mkdir()
    (folder / "folder").symlink_to(outside / "secret")
    (folder / "all").symlink_to(outside)
    (folder / "file.safetensors").symlink_to(outside / "file.safetensors")
    pipeline_at(folder / "half")
    (folder / "half" / "vae").symlink_to(outside / "secret" / "transformer")
    pipeline_at(folder / "whole")
    (folder / "again").symlink_to(folder / "whole")
    (folder / "loop").symlink_to(folder / "loop")
    found = found_in(folder)
    assert found.keys() == {"again", "file", "folder", "half", "whole"}
    assert {name for name, one in found.items() if one.is_usable} == {"again", "whole"}
    assert all("leads out" in found[name].problem for name in ("file", "folder", "half"))


def test_a_pipe_is_not_waited_for_and_strange_names_are_shown_safely(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    save_file(WEIGHT, tmp_path / "new\nline.safetensors")
    save_file(WEIGHT, tmp_path / "plain.safetensors")
    os.rename(tmp_path / "plain.safetensors", os.fsencode(tmp_path) + b"/no-\xff-utf8.safetensors")
    found = scan(tmp_path)
    assert len(found) == 3
    assert not any(one.is_usable for one in found)
    assert json.dumps([one.name for one in found]).isascii()
    assert all(one.name.isprintable() and one.name.encode() for one in found)


def test_depth_and_count_are_bounded(tmp_path, monkeypatch):
    pipeline_at(tmp_path / "a" / "b" / "too_deep")
    model = pipeline_at(tmp_path / "many")
    for number in range(MOST_ENTRIES):
        (model / "transformer" / f"{number}.txt").touch()
    found = found_in(tmp_path)
    assert found.keys() == {"many"}
    assert "more than" in found["many"].problem
    for number in range(5):
        save_file(WEIGHT, tmp_path / f"{number}.safetensors")
    monkeypatch.setattr(model_folder, "MOST_FOUND", 3)
    assert len(scan(tmp_path)) == 3


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    read = []
    header = model_folder.check_header_length
    monkeypatch.setattr(model_folder, "check_header_length", lambda path: read.append(path.name) or header(path))
    save_file(WEIGHT, tmp_path / "one.safetensors")
    assert found_in(tmp_path)["one"].kind == found_in(tmp_path)["one"].kind == "checkpoint"
    assert read == ["one.safetensors"]
    save_file(LORA, tmp_path / "one.safetensors")
    assert found_in(tmp_path)["one"].kind == "lora"
    assert len(read) == 2


def test_facts_are_read_from_headers_card_and_metadata(tmp_path):
    folder = pipeline_at(tmp_path / "flux", card="---\nlicense: apache-2.0\ntags: [x]\n---\nlicense: not this\n")
    facts = facts_of(str(folder))
    assert (facts.kind, facts.parameters, facts.nbytes, facts.licence) == ("pipeline", 32, 128, "apache-2.0")
    assert facts_of(str(folder), dtype="bfloat16").memory == 64
    assert (facts.verdict, facts.dtype) == ("fits", "F32")
    save_file(WEIGHT, tmp_path / "one.safetensors", metadata={"modelspec.license": "mit"})
    assert facts_of(str(tmp_path / "one.safetensors")).licence == "mit"
    assert facts_of("owner/name").kind == "hub"


@pytest.mark.parametrize(("share", "verdict"), [(10, "fits"), (1.1, "tight"), (0.9, "too_large")])
def test_the_verdict_compares_the_weights_with_what_is_free(tmp_path, monkeypatch, share, verdict):
    folder = pipeline_at(tmp_path / "flux")
    monkeypatch.setattr("pipelines.loading.memory.free_memory", lambda device: int(128 * share))
    assert facts_of(str(folder)).verdict == verdict
    assert facts_of(str(folder), is_loaded=True).verdict == "fits"


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: <script>alert(1)</script>\n---\n",
        b"---\nlicense:\n  - mit\n---\n",
        b"\xff\xfe",
        b"---\n" * 10**5,
    ],
    ids=["markup", "a list", "no text", "endless"],
)
def test_a_hostile_card_gives_no_licence_or_a_short_harmless_one(tmp_path, card):
    folder = pipeline_at(tmp_path / "flux")
    (folder / "README.md").write_bytes(card)
    licence = facts_of(str(folder)).licence
    assert len(licence) <= 60
    assert not set(licence) & set("<>&\"'\n")


def test_a_damaged_model_has_a_problem_in_place_of_facts(tmp_path):
    folder = pipeline_at(tmp_path / "flux")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 20)
    facts = facts_of(str(folder))
    assert facts.verdict == "unknown"
    assert "no safetensors file" in facts.problem
    assert str(tmp_path) not in facts.problem
