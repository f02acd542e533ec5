"""Saving and loading: fresh processes, moved modules, and what a checkpoint must not be able to do."""

import importlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

import pipelines
from pipelines import base
from pipelines.base import TesseraPipeline
from pipelines.loading import load, model_index, sources
from pipelines.loading.load import load_pipeline
from pipelines.loading.model_index import COMPONENT_MODULES
from pipelines.text_to_image import TextToImagePipeline
from tests.fresh import run_python
from tests.pipes.tiny import tiny_text_to_image_pipeline

ROOT = Path(__file__).parents[2]
PAINT = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def picture(saved):
    """What the saved pipeline generates. Weights that lie in a file may round otherwise than weights just made."""
    painted = paint(load_pipeline(saved, device="cpu"))
    torch.testing.assert_close(painted, paint(tiny_text_to_image_pipeline()), atol=1e-6, rtol=0)
    assert painted.std() > 0.01
    return painted


def paint(pipe, seed=3):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red apple", generator=torch.Generator().manual_seed(seed), **PAINT).images


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the saved pipeline that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_fresh_process_paints_the_same_picture(saved, picture, tmp_path):
    code = """
import sys, torch
from safetensors.torch import save_file
from pipelines import load_pipeline
pipe = load_pipeline(sys.argv[1], device="cpu")
picture = pipe("a red apple", generator=torch.Generator().manual_seed(3), num_inference_steps=2, output_type="pt")
save_file({"picture": picture.images}, sys.argv[2])
"""
    run_python("-c", code, saved, tmp_path / "picture.safetensors")
    assert torch.equal(load_file(tmp_path / "picture.safetensors")["picture"], picture)


def test_importing_pipelines_imports_nothing_heavy():
    code = "import sys, pipelines; dir(pipelines); print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lazy_names():
    assert pipelines.TextToImagePipeline is TextToImagePipeline
    assert pipelines.load_pipeline is load_pipeline
    assert set(dir(pipelines)) == set(pipelines.__all__)
    with pytest.raises(AttributeError, match="nothing_here"):
        pipelines.nothing_here  # noqa: B018


def test_class_loads_by_itself(saved, picture):
    pipe = TextToImagePipeline.from_pretrained(saved)
    assert type(pipe.transformer).__name__ == "TextDiT"
    assert torch.equal(paint(pipe), picture)


def test_moved_module_is_found(copy, picture, monkeypatch):
    monkeypatch.setitem(model_index.RENAMED_MODULES, "dit.models.old_home", "dit.models.text_dit")
    edit_index(copy, transformer=["dit.models.old_home", "TextDiT"])
    pipe = load_pipeline(copy, device="cpu")
    assert torch.equal(paint(pipe), picture)
    pipe.save_pretrained(copy / "again")
    assert json.loads((copy / "again" / "model_index.json").read_text())["transformer"][0] == "dit.models.text_dit"


def test_renamed_modules_lead_to_components():
    assert set(model_index.RENAMED_MODULES.values()) <= COMPONENT_MODULES
    assert not COMPONENT_MODULES & set(model_index.RENAMED_MODULES)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pipelines.next_scale", "NextScaleClassToImagePipeline"),
        ("pipelines.next_scale", "NextScaleTextToImagePipeline"),
        ("pipelines.next_scale_text", "NextScaleTextToImagePipeline"),
        ("pipelines.class_to_image", "ClassToImagePipeline"),
        ("pipelines.text_to_image", "TextToImagePipeline"),
    ],
)
def test_public_paths_of_pipelines_stay(path, name):
    """`_class_name` of a saved index and imports of programs lead to the same class, wherever it lives."""
    found = getattr(importlib.import_module(path), name)
    assert found is getattr(pipelines, name) is sources.pipeline_class({"_class_name": name})


@pytest.mark.parametrize("module", ["dit.attention", "apps.cli", "pipelines.loading.load", "dit.models.nowhere"])
def test_modules_outside_the_list_are_refused(copy, module):
    edit_index(copy, transformer=[module, "TextDiT"])
    with pytest.raises(ValueError, match=f"names the module '{module}', which holds no component"):
        load_pipeline(copy, device="cpu")


def test_foreign_modules_are_not_imported(copy, monkeypatch):
    (copy / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(copy)
    edit_index(copy, transformer=["evil_module", "TextDiT"])
    with pytest.raises(ValueError, match="evil_module"):
        load_pipeline(copy, device="cpu")
    assert "evil_module" not in sys.modules


def test_every_component_module_can_be_stored():
    """diffusers records a module only by its folder when that is the name of a diffusers pipeline."""
    import diffusers.pipelines

    for module in COMPONENT_MODULES:
        imported = __import__(module, fromlist=["_"])
        parts = module.split(".")
        assert not hasattr(diffusers.pipelines, parts[-2] if len(parts) > 2 else parts[0])
        assert {"ModelMixin", "SchedulerMixin"} & set(vars(imported)), module


class Planted:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    ("component", "weights", "pickled"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_planted_pickles_are_refused(copy, tmp_path, component, weights, pickled):
    (copy / component / weights).unlink()
    (copy / component / pickled).write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    with pytest.raises(OSError, match=r"safetensors"):
        load_pipeline(copy, device="cpu")
    assert not (tmp_path / "executed").exists()
    for read in (load_pipeline, TextToImagePipeline.from_pretrained):
        with pytest.raises(ValueError, match="safetensors"):
            read(copy, use_safetensors=False)


def test_pipeline_code_in_a_checkpoint_is_not_run(copy):
    (copy / "custom.py").write_text("raise SystemExit('executed')")
    edit_index(copy, _class_name=["custom", "Pipeline"])
    with pytest.raises(ValueError, match="brings its own pipeline code"):
        load_pipeline(copy, device="cpu")


def test_builtin_models_by_name(copy, monkeypatch):
    monkeypatch.setattr(load, "PRETRAINED", copy.parent)
    copy.rename(copy.parent / "stickers")
    assert pipelines.builtin_models() == ["stickers"]
    assert isinstance(load_pipeline("stickers", device="cpu"), TextToImagePipeline)
    with pytest.raises(FileNotFoundError, match=r"No model is called 'stikers'\. Did you mean 'stickers'\?"):
        load_pipeline("stikers")
    with pytest.raises(FileNotFoundError, match="built-in name: stickers"):
        load_pipeline("zebra")


def test_missing_things_are_named(copy):
    with pytest.raises(FileNotFoundError, match=r"No folder '\./nowhere'"):
        load_pipeline("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        load_pipeline(copy / "transformer")
    with pytest.raises(TypeError, match="dtype='float7' is unknown"):
        load_pipeline(copy, dtype="float7")
    shutil.rmtree(copy / "vae")
    with pytest.raises(FileNotFoundError, match="lacks the component 'vae'"):
        load_pipeline(copy, device="cpu")


def test_device_and_dtype(saved, monkeypatch):
    pipe = load_pipeline(saved, device="cpu")
    assert (pipe.device.type, pipe.transformer.dtype) == ("cpu", torch.float32)
    half = load_pipeline(saved, device="cpu", dtype="bfloat16")
    assert half.transformer.dtype == half.text_encoder.dtype == torch.bfloat16
    assert load.default_dtype(torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load.default_device() == torch.device("cuda")


def test_pipelines_of_diffusers_load_too(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path, device="cpu")
    assert type(pipe) is DDPMPipeline
    assert torch.equal(pipe.unet.conv_in.weight, unet.conv_in.weight)


def test_hub_repositories_of_ours_come_as_data_only(saved, picture, monkeypatch):
    asked = {}

    def snapshot(repository, **kwargs):
        asked.update(kwargs, repository=repository)
        return str(saved)

    monkeypatch.setattr(
        "diffusers.configuration_utils.hf_hub_download", lambda *args, **kwargs: str(saved / "model_index.json")
    )
    monkeypatch.setattr(base, "snapshot_download", snapshot)
    pipe = load_pipeline("someone/pictures", device="cpu", revision="v1")
    assert torch.equal(paint(pipe), picture)
    assert (asked["repository"], asked["revision"]) == ("someone/pictures", "v1")
    assert "*.safetensors" in asked["allow_patterns"]
    assert {"*.py", "*.bin", "*.pkl"} <= set(asked["ignore_patterns"])


def test_hub_repositories_of_others_go_to_diffusers(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
    )
    monkeypatch.setattr(
        "diffusers.configuration_utils.hf_hub_download", lambda *args, **kwargs: str(tmp_path / "model_index.json")
    )
    seen = []
    monkeypatch.setattr(
        base.DiffusionPipeline, "download", classmethod(lambda cls, name, **kwargs: seen.append((name, kwargs)))
    )
    TesseraPipeline.download("someone/ddpm", revision="main")
    assert seen == [("someone/ddpm", {"revision": "main"})]


def test_group_offloading_changes_nothing(saved, picture):
    pipe = load_pipeline(saved, device="cpu")
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(paint(pipe), picture)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_the_cpu_changes_nothing(saved, offload):
    plain = paint(load_pipeline(saved, device="cuda", dtype="float32"))
    pipe = load_pipeline(saved, device="cpu")
    getattr(pipe, offload)()
    torch.testing.assert_close(paint(pipe).cpu(), plain.cpu(), atol=1e-4, rtol=1e-4)
