"""What can't be loaded is refused with one clear sentence, before weights are read, and leaves nothing behind."""

import json
import shutil
import struct
import weakref
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelines import load_pipeline
from pipelines.loading import load, memory, sources
from pipelines.loading.hub_id import split_revision
from pipelines.loading.memory import NotEnoughMemoryError
from pipelines.loading.weight_files import read_header
from tests.pipes.tiny import tiny_text_to_image_pipeline

SECRET = "hf_thisIsASecretThatNobodyMaySee"
INDEX = "diffusers.configuration_utils.hf_hub_download"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    tiny_text_to_image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def reads():
    """For tests that load after all."""


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch, request):
    """Reading weights fails the test, unless it uses `reads`."""
    if "reads" not in request.fixturenames:
        monkeypatch.setattr("safetensors.torch.load_file", lambda *args, **kwargs: pytest.fail("weights were read"))
        monkeypatch.setattr(torch.nn.Module, "to", lambda *args, **kwargs: pytest.fail("a module was moved"))


def edit_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ------------------------------------------------------------------- folders


def test_a_wrong_folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json.*it holds notes\.txt"):
        load_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No folder '\./nowhere'"):
        load_pipeline("./nowhere")
    for text in ("{", "[1]"):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=r"model_index\.json (is no JSON|holds a list)"):
            load_pipeline(tmp_path)


def test_unknown_classes(copy):
    edit_index(copy, transformer=["diffusers", "Dreamer9Transformer"])
    with pytest.raises(
        ValueError, match=r"'transformer' is a Dreamer9Transformer, which diffusers [\d.]+ doesn't have"
    ):
        load_pipeline(copy)
    edit_index(copy, _class_name="Dreamer9Pipeline")
    with pytest.raises(ValueError, match="'Dreamer9Pipeline' is neither ours nor one of diffusers"):
        load_pipeline(copy)


def test_missing_parts(copy):
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"no safetensors weights.*It has diffusion_pytorch_model\.bin"):
        load_pipeline(copy)
    index = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}))
    weights.with_suffix(".bin").rename(weights.with_name("part-1.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"lacks part-2\.safetensors"):
        load_pipeline(copy)
    shutil.rmtree(copy / "transformer")
    with pytest.raises(FileNotFoundError, match="lacks the component 'transformer'"):
        load_pipeline(copy)


def test_damaged_files(copy):
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(OSError, match=f"was cut short, {len(content) - 100} of {len(content)} bytes"):
        load_pipeline(copy)
    for spoilt in (b"", b"<html>not found</html>" * 9, struct.pack("<Q", 4) + b"nope"):
        weights.write_bytes(spoilt)
        with pytest.raises(OSError, match="no safetensors file"):
            load_pipeline(copy)
    weights.write_bytes(b"../../stickers/transformer/diffusion_pytorch_model.safetensors")  # git's stand-in of a link
    with pytest.raises(OSError, match=r"should be a link to '\.\./\.\./stickers/.*core\.symlinks true"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"token": SECRET}, "HF_TOKEN"),
        ({"trust_remote_code": True}, "never done here"),
        ({"custom_pipeline": "someone/code"}, "never done here"),
        ({"offload": "somewhere"}, "choose one of 'none', 'model', 'sequential', 'group'"),
        ({"offload": "model", "device": "cpu"}, "device 'cpu' has none"),
        ({"transformer": "missing-folder"}, "no .safetensors or .gguf file"),
    ],
)
def test_options_that_are_not_taken(saved, options, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        load_pipeline(saved, **options)
    assert SECRET not in str(refused.value)


# ----------------------------------------------------------------------- hub


def http_error(kind, status=404):
    return kind("from the hub", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


HUB_ERRORS = [
    (
        http_error(GatedRepoError, 403),
        PermissionError,
        "someone/model is gated.*huggingface.co/someone/model.*HF_TOKEN",
    ),
    (http_error(DisabledRepoError, 403), PermissionError, "disabled"),
    (http_error(RepositoryNotFoundError, 401), FileNotFoundError, "no repository 'someone/model', or it is private"),
    (http_error(RevisionNotFoundError), FileNotFoundError, "no revision 'v9'"),
    (EntryNotFoundError("x"), FileNotFoundError, "lacks a file that a pipeline needs"),
    (LocalEntryNotFoundError("x"), ConnectionError, "not .* in the local cache"),
    (OfflineModeIsEnabled("x"), ConnectionError, "HF_HUB_OFFLINE"),
    (HFValidationError("x"), OSError, "write user/repository"),
    (http_error(HfHubHTTPError, 401), PermissionError, "check HF_TOKEN"),
    (http_error(HfHubHTTPError, 503), ConnectionError, "HTTP 503"),
]


@pytest.mark.parametrize(("raised", "kind", "reason"), HUB_ERRORS, ids=lambda value: type(value).__name__)
def test_errors_of_the_hub(raised, kind, reason, monkeypatch):
    """diffusers wraps them all into an EnvironmentError of many lines; the cause is found and told."""
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def download(*args, **kwargs):
        assert kwargs["token"] is False  # a token that lies about on the disk isn't sent
        raise raised

    monkeypatch.setattr(INDEX, download)
    with pytest.raises(kind, match=reason) as told:
        load_pipeline("someone/model", revision="v9", device="cpu")
    assert "\n" not in str(told.value)


def test_the_token_comes_from_the_environment_and_is_told_to_nobody(monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    caplog.set_level("DEBUG")
    sent = []

    def download(*args, **kwargs):
        sent.append(kwargs["token"])
        raise http_error(GatedRepoError, 403)

    monkeypatch.setattr(INDEX, download)
    with pytest.raises(PermissionError, match="account of HF_TOKEN has no access") as told:
        load_pipeline("someone/model", device="cpu")
    assert sent == [SECRET]
    assert SECRET not in str(told.value) + caplog.text


@pytest.mark.usefixtures("reads")
def test_a_repository_in_the_cache_needs_no_network(saved, tmp_path, monkeypatch):
    """The tests run with HF_HUB_OFFLINE=1: whatever isn't in this cache can't be had."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--pictures"
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    pipe = load_pipeline("someone/pictures", revision="v1", cache_dir=tmp_path, device="cpu")
    assert type(pipe).__name__ == "TextToImagePipeline"
    with pytest.raises(ConnectionError, match=r"someone/pictures is not .* in the local cache"):
        load_pipeline("someone/pictures", revision="v2", cache_dir=tmp_path, device="cpu")


@pytest.mark.usefixtures("reads")
def test_a_name_may_be_pinned_to_a_commit(saved, tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--someone--pictures" / "snapshots" / commit
    shutil.copytree(saved, snapshot)
    options = {"cache_dir": tmp_path, "device": "cpu"}
    assert load_pipeline(f"someone/pictures@{commit}", **options).transformer is not None
    assert load_pipeline(f"someone/pictures@{commit.upper()}", revision=commit, **options)
    with pytest.raises(ConnectionError, match=r"not \(completely\) in the local cache"):  # another one isn't there
        load_pipeline(f"someone/pictures@{'f' * 40}", **options)
    for moving in ("main", "v1.0", commit[:8], "", f"{commit}0", "../x"):
        with pytest.raises(ValueError, match=r"is no commit.*40 hex digits"):
            load_pipeline(f"someone/pictures@{moving}", **options)
    with pytest.raises(ValueError, match="asks for another"):
        load_pipeline(f"someone/pictures@{commit}", revision="main", **options)


@pytest.mark.usefixtures("reads")
def test_a_folder_with_an_at_sign_is_a_folder(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "mine" / "best@main")
    monkeypatch.chdir(tmp_path)
    assert split_revision("mine/best@main") == ("mine/best@main", None)
    assert load_pipeline("mine/best@main", device="cpu").transformer is not None


def test_components_that_are_brought_are_not_fetched(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
    )
    monkeypatch.setattr(INDEX, lambda *args, **kwargs: str(tmp_path / "model_index.json"))
    seen = {}
    fake = classmethod(lambda cls, name, **kwargs: seen.update(kwargs) or tmp_path)
    monkeypatch.setattr(sources.DiffusionPipeline, "download", fake)
    assert sources.fetch("someone/ddpm", {"variant": "fp16"}, {"unet"}) == tmp_path
    assert seen == {"use_safetensors": True, "variant": "fp16", "token": False, "unet": None}


# -------------------------------------------------------------------- memory


def test_what_does_not_fit_is_refused_with_numbers_and_a_way_out(saved, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 50_000)
    with pytest.raises(NotEnoughMemoryError) as refused:
        load_pipeline(saved, device="cpu", dtype="float32")
    told = str(refused.value)
    headers = [read_header(path) for path in saved.glob("*/*.safetensors")]
    need = sum(tensor.nbytes for header in headers for tensor in header.values())
    assert f"need {memory.gib(need)} on cpu in float32" in told
    assert all(word in told for word in ("transformer", "text_encoder", "vae", "0.0 MiB are free"))
    assert f"dtype bfloat16 ({memory.gib(need // 2)})" in told


@pytest.mark.usefixtures("reads")
def test_the_estimate_is_what_loading_takes(saved):
    index = sources.read_index(saved)
    for dtype in (torch.float32, torch.bfloat16):
        sizes = sources.check_folder(saved, index, dtype=dtype)
        pipe = load_pipeline(saved, device="cpu", dtype=dtype)
        for name, size in sizes.items():
            stored = getattr(pipe, name).state_dict().values()
            pointers = {tensor.data_ptr(): tensor.nbytes for tensor in stored}
            assert size == pytest.approx(sum(pointers.values()), rel=0.02), name


def test_devices_are_looked_at_as_the_offload_needs(monkeypatch):
    gpu, parts = torch.device("cuda"), {"transformer": 6 * memory.GIB, "text_encoder": 4 * memory.GIB}
    free = {"cpu": 64 * memory.GIB, "cuda": 8 * memory.GIB}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])
    with pytest.raises(NotEnoughMemoryError, match=r"10\.0 GiB on cuda.*offload model \(6\.0 GiB\), or offload group"):
        memory.check_memory(parts, gpu, torch.bfloat16, "none")
    memory.check_memory(parts, gpu, torch.bfloat16, "model")
    free["cuda"] = 1
    with pytest.raises(NotEnoughMemoryError, match=r"6\.0 GiB on cuda.*Try offload group"):
        memory.check_memory(parts, gpu, torch.bfloat16, "model")
    memory.check_memory(parts, gpu, torch.bfloat16, "group")
    free["cpu"] = 1
    with pytest.raises(NotEnoughMemoryError, match=r"10\.0 GiB on cpu"):
        memory.check_memory(parts, gpu, torch.bfloat16, "group")


def test_free_memory_knows_containers_and_process_limits(tmp_path, monkeypatch):
    assert memory._container_headroom(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert memory._container_headroom(tmp_path) == [400]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_headroom(tmp_path) == []

    import resource

    now = memory.psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (now + 5_000_000_000, -1))
    assert memory._process_headroom()[0] == pytest.approx(5_000_000_000, rel=0.05)


CPU_IS_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2684354560 bytes. Error code 12"


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("kind", [MemoryError, RuntimeError])
def test_nothing_stays_half_loaded(saved, monkeypatch, kind):
    """All components are in memory when it fails, held by the frames of the error's own traceback."""
    loaded = []
    apply_offload = load.apply_offload

    def fail(pipe, *rest):
        loaded.extend(weakref.ref(part) for part in pipe.components.values() if isinstance(part, torch.nn.Module))
        raise kind(CPU_IS_FULL)

    monkeypatch.setattr(load, "apply_offload", fail)
    with pytest.raises(
        NotEnoughMemoryError, match=r"Loading pipe ran out of memory: one step needs 2\.5 GiB more"
    ) as told:
        load_pipeline(saved, device="cpu")
    assert len(loaded) == 3
    assert [part() for part in loaded if part() is not None] == [], told
    monkeypatch.setattr(load, "apply_offload", apply_offload)
    assert load_pipeline(saved, device="cpu").transformer is not None


def test_every_way_of_running_out_of_memory_is_known():
    known = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."),
        RuntimeError(f"[enforce fail at alloc_cpu.cpp] {CPU_IS_FULL}"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("std::bad_alloc"),
    ]
    assert all(memory.is_out_of_memory(error) for error in known)
    assert not memory.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))
    for error in known[:2]:
        told = memory.explain_out_of_memory(error, "Painting")
        assert str(told).startswith("Painting ran out of memory: one step needs 2.5 GiB more. Try a smaller size")
    assert memory.explain_out_of_memory(told, "Again") is told


def test_the_engine_tells_why_a_model_did_not_load(saved, monkeypatch):
    from apps.service.engine import Engine
    from apps.service.events import Failed
    from apps.service.requests import TextToImageRequest

    engine = Engine({"tiny": str(saved)}, device="cpu")
    monkeypatch.setattr(memory, "free_memory", lambda device: 50_000)
    failed = list(engine.generate(TextToImageRequest(prompt="x")))[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "out_of_memory"
    assert "dtype bfloat16" in failed.message
    assert str(saved) not in failed.message
