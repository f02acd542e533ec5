"""Modular pipelines of diffusers: loaded as safely as others, and run with callbacks, interrupts and early ends."""

from __future__ import annotations

import json
import logging
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from apps import cli
from apps.service.engine import Engine
from apps.service.events import Done, Failed, Picture, Step, Stopped
from apps.service.media import read_mp4
from apps.service.metadata import read_picture
from apps.service.requests import ImageToImageRequest, InpaintRequest, TextToImageRequest
from pipelines import load_pipeline
from pipelines.info.inspection import info_of, pipelines_by_task, tasks_in
from pipelines.info.modular_call import ModularCall
from pipelines.loading.modular import CODE, INDEX
from sampling.step_cache import StepCache
from tests.families.modular import tiny_modular

HEIGHT, WIDTH = 32, 64
ASK = {"prompt": "a red apple", "steps": 4, "seed": 1, "height": HEIGHT, "width": WIDTH}


@pytest.fixture(scope="session")
def modular_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("modular")

    def folder_of(name):
        folder = root / name
        if not folder.is_dir():
            tiny_modular(name).save_pretrained(str(folder), overwrite_modular_index=True)
        return folder

    return folder_of


@pytest.fixture
def copied(modular_folder, tmp_path):
    """A copy of FLUX's folder, and a function that changes its index."""
    folder = shutil.copytree(modular_folder("flux"), tmp_path / "copied")

    def change(**entries):
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(index | entries))
        return folder

    return change


def load(folder, **kwargs):
    return load_pipeline(folder, device="cpu", dtype="float32", **kwargs)


def call_of(pipe):
    call = ModularCall(pipe)
    call.set_progress_bar_config(disable=True)
    return call


def arguments(pipe, steps=4, **more):
    clip = {"num_frames": 9} if "frames" in info_of(pipe).arguments else {}
    seeded = {"generator": torch.Generator().manual_seed(1)}
    size = {"height": HEIGHT, "width": WIDTH}
    return {"prompt": "a red apple", "num_inference_steps": steps, **size, **clip, **seeded, **more}


def result(output):
    return output.frames if output.images is None else output.images


def pixels(made):
    return np.stack([np.asarray(one) for one in (made[0] if isinstance(made[0], list) else made)])


# --------------------------------------------------------------------------- loading


def test_a_folder_loads_as_diffusers_own_class_with_its_weights(modular_folder):
    pipe, made = load(modular_folder("flux")), tiny_modular("flux")
    assert type(pipe).__name__ == "FluxModularPipeline"
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        stored, loaded = getattr(made, name).state_dict(), getattr(pipe, name).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in stored.items())
    assert load_pipeline(modular_folder("flux"), device="cpu", dtype="bfloat16").transformer.dtype == torch.bfloat16


def test_a_moved_folder_is_read_where_it_is(modular_folder, copied):
    folder = copied()
    assert str(modular_folder("flux")) in (folder / INDEX).read_text()
    (folder / "transformer/config.json").write_text("{}")
    with pytest.raises(ValueError, match=str(folder / "transformer")):
        load(folder)


def test_code_of_a_checkpoint_is_never_run(copied, tmp_path):
    folder = copied()
    trap = tmp_path / "trapped"
    (folder / "block.py").write_text(f"open({str(trap)!r}, 'w')\nclass Block: pass\n")
    (folder / CODE).write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "block.Block"}}))
    with pytest.raises(ValueError, match="never run"):
        load(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder, trust_remote_code=True)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"auto_map": {"ModularPipeline": "x.Y"}}, "never run"),
        ({"_class_name": "os"}, "'os'"),
        ({"_class_name": ["x", "Y"]}, "is none of diffusers"),
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"_blocks_class_name": "MyBlocks"}, "MyBlocks"),
        ({"_blocks_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"vae": ["subprocess", "Popen", {"type_hint": ["subprocess", "Popen"], "subfolder": "vae"}]}, "subprocess"),
        ({"vae": ["diffusers", "load", {"type_hint": ["diffusers", "logging"], "subfolder": "vae"}]}, "logging"),
        ({"vae": ["diffusers", "AutoencoderKL", {"subfolder": "../vae"}]}, "no name of a folder"),
        ({"vae": ["diffusers", "AutoencoderKL", {"subfolder": 3}]}, "expected texts"),
        ({"vae": [None, None, {"type_hint": [None, None], "subfolder": "vae"}]}, "names no class"),
    ],
)
def test_an_index_names_only_what_diffusers_has(copied, entries, reason):
    with pytest.raises(ValueError, match=reason):
        load(copied(**entries))


def test_a_component_elsewhere_on_the_machine_is_not_read(copied, modular_folder):
    kind = ["diffusers", "AutoencoderKL"]
    elsewhere = {"type_hint": kind, "pretrained_model_name_or_path": str(modular_folder("flux")), "subfolder": "gone"}
    folder = copied(vae=[*kind, elsewhere])
    with pytest.raises(FileNotFoundError, match="no hub id"):
        load(folder)
    vae = tiny_modular("flux").vae
    assert load(folder, vae=vae).vae is vae
    with pytest.raises(FileNotFoundError, match="names no source for vae"):
        load(copied(vae=[*kind, {"subfolder": "gone"}]))
    with pytest.raises(ValueError, match="vea"):
        load(modular_folder("flux"), vea=vae)


def test_pickles_and_damaged_weights_are_refused(copied):
    folder = copied()
    weights = next((folder / "transformer").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-64])
    with pytest.raises(OSError, match="transformer"):
        load(folder)
    weights.unlink()
    (folder / "transformer/diffusion_pytorch_model.bin").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="transformer"):
        load(folder)


def test_offloading_is_refused_before_anything_is_read(modular_folder):
    with pytest.raises(ValueError, match="modular"):
        load_pipeline(modular_folder("flux"), device="meta", offload="group")


def test_a_hub_repository_comes_from_the_cache(modular_folder, tmp_path):
    """The tests run with HF_HUB_OFFLINE=1; one component lies in a repository of its own."""
    commit, other = "1" * 40, "2" * 40
    for name, hash_ in (("models--someone--modular", commit), ("models--someone--vae", other)):
        (tmp_path / name / "refs").mkdir(parents=True)
        (tmp_path / name / "refs/main").write_text(hash_)
    snapshot = tmp_path / "models--someone--modular/snapshots" / commit
    shutil.copytree(modular_folder("flux"), snapshot)
    (tmp_path / "models--someone--vae/snapshots" / other).mkdir(parents=True)
    shutil.move(snapshot / "vae", tmp_path / "models--someone--vae/snapshots" / other / "vae")
    index = json.loads((snapshot / INDEX).read_text())
    for name, entry in index.items():
        if isinstance(entry, list):
            entry[2]["pretrained_model_name_or_path"] = "someone/vae" if name == "vae" else "someone/modular"
    (snapshot / INDEX).write_text(json.dumps(index))
    pipe = load("someone/modular", cache_dir=tmp_path)
    made = call_of(pipe)(**arguments(pipe)).images
    local = load(modular_folder("flux"))
    assert (pixels(made) == pixels(call_of(local)(**arguments(local)).images)).all()
    assert load(f"someone/modular@{commit}", cache_dir=tmp_path).vae is not None
    shutil.rmtree(tmp_path / "models--someone--vae")
    with pytest.raises(ConnectionError, match="someone/vae"):
        load("someone/modular", cache_dir=tmp_path)
    with pytest.raises(ConnectionError, match="someone/nothing"):
        load("someone/nothing", cache_dir=tmp_path)


# ---------------------------------------------------------------------------- calling


@pytest.fixture(scope="module", params=["flux", "flux2", "sd3", "qwen_image", "ltx"])
def pipe(request, modular_folder):
    return load(modular_folder(request.param))


def test_what_is_said_of_a_pipeline_is_what_its_blocks_declare(pipe, modular_folder):
    info, declared = info_of(pipe), {one.name for one in pipe.blocks.inputs}
    ours = {"guidance_scale", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    assert info.parameters <= declared | ours
    assert set(info.arguments.values()) <= info.parameters
    assert (info.can_interrupt, info.finish, info.preview) == (True, "switch", "latents")
    assert info.steps == 50
    kind = type(pipe).__name__
    assert info.output == ("frames" if kind.startswith("LTX") else "images")
    assert info.guidance_kind == ("distilled" if kind.startswith("Flux") else "classifier_free")
    tasks = ("text_to_image", "image_to_image", *(("inpaint",) if kind.startswith("Qwen") else ()))
    assert info.tasks == tuple(pipelines_by_task(pipe)) == tasks


def test_tasks_are_known_before_anything_is_loaded(modular_folder):
    assert tasks_in(modular_folder("qwen_image")) == ("text_to_image", "image_to_image", "inpaint")


def test_a_watched_call_gives_what_diffusers_gives(pipe):
    name = "videos" if info_of(pipe).output == "frames" else "images"
    plain = pipe(**arguments(pipe), output_type="pil", output=name)
    seen = []

    def watch(call, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))

    loops = [type(one) for one in pipe.blocks.sub_blocks.values()]
    output = call_of(pipe)(**arguments(pipe), callback_on_step_end=watch)
    assert (pixels(result(output)) == pixels(plain)).all()
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert sorted((at for _, at, _ in seen), reverse=True) == [at for _, at, _ in seen]
    assert loops == [type(one) for one in pipe.blocks.sub_blocks.values()]
    assert (pixels(pipe(**arguments(pipe), output_type="pil", output=name)) == pixels(plain)).all()  # no trace


def test_a_call_stops_between_steps_and_decodes_nothing(pipe, monkeypatch):
    decoded, steps = [], []
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **kwargs: decoded.append(1))

    def stop(call, step, timestep, tensors):
        steps.append(step)
        call.interrupt = step == 1

    output = call_of(pipe)(**arguments(pipe), callback_on_step_end=stop)
    assert (steps, decoded, result(output)) == ([0, 1], [], [])


def test_a_call_ends_early_with_the_image_as_it_is(pipe):
    steps = []

    def finish(call, step, timestep, tensors):
        steps.append(step)
        call.finish_now = step == 2

    early = call_of(pipe)(**arguments(pipe), callback_on_step_end=finish)
    whole = call_of(pipe)(**arguments(pipe))
    assert steps == [0, 1, 2]
    first, second = (pixels(result(one)) for one in (early, whole))
    assert first.shape == second.shape
    assert (first != second).any()


def test_latents_of_a_callback_are_taken_over(pipe):
    call = call_of(pipe)

    def zeros(call, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    first, second = (call(**arguments(pipe, prompt=text), callback_on_step_end=zeros) for text in ("a", "b"))
    assert (pixels(result(first)) == pixels(result(second))).all()


def test_guidance_is_real_and_leaves_no_trace(pipe):
    call, info = call_of(pipe), info_of(pipe)
    scales = info.guidance, 2 * info.guidance
    latents = [call(**arguments(pipe, guidance_scale=scale)).state.get("latents") for scale in scales]
    assert (latents[0] - latents[1]).abs().max() > 0
    assert info_of(pipe).guidance == info.guidance


def test_what_a_pipeline_does_not_take_is_an_error(pipe):
    call = call_of(pipe)
    with pytest.raises(ValueError, match="colour"):
        call(**arguments(pipe), colour=3)
    with pytest.raises(ValueError, match="noise"):
        call(**arguments(pipe), callback_on_step_end_tensor_inputs=["noise"])


# ----------------------------------------------------------------------------- engine


@pytest.fixture
def engine(pipe, tmp_path):
    engine = Engine({"tiny": "somewhere"}, tmp_path, device="cpu", load=lambda source: pipe)
    yield engine
    engine.close()


def ask(engine, kind=TextToImageRequest, **settings):
    frames = {"frames": 9} if engine.model().result(60).frames is not None else {}
    return kind(**{**ASK, **frames, **settings})


def test_the_engine_generates_with_previews(engine):
    events = list(engine.generate(ask(engine)))
    assert isinstance(events[-1], Done), events[-1]
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert steps[0].preview is not None
    picture = next(event for event in events if isinstance(event, Picture))
    assert read_picture(picture.path) == picture.metadata
    assert (picture.metadata.height, picture.metadata.width) == (HEIGHT, WIDTH)
    if picture.video is not None:
        assert read_mp4(picture.video).frames == 9
    again = next(event for event in engine.generate(ask(engine)) if isinstance(event, Picture))
    assert again.image.tobytes() == picture.image.tobytes()


def test_the_engine_starts_from_images(engine):
    source = engine.uploads.add(Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 30)))
    model = engine.model().result(60)
    kinds = [ImageToImageRequest, *([InpaintRequest] if "inpaint" in model.tasks else [])]
    for kind in kinds:
        mask = {"mask": engine.uploads.add(Image.new("L", (WIDTH, HEIGHT), 255))} if kind is InpaintRequest else {}
        events = list(engine.generate(ask(engine, kind, image=source, height=64, width=128, **mask)))
        assert isinstance(events[-1], Done), events[-1]


def test_the_engine_stops_and_finishes_early(engine):
    stop, last = threading.Event(), None
    for event in engine.generate(ask(engine, steps=200), stop):
        if isinstance(event, Step):
            stop.set()
        last = event
    assert isinstance(last, Stopped)
    events = list(engine.generate(ask(engine, finish_after=2)))
    assert len([event for event in events if isinstance(event, Step)]) == 2
    assert isinstance(events[-1], Done)


def test_a_step_cache_tells_the_branches_of_guidance_apart_or_is_refused(pipe):
    call = call_of(pipe)
    asked = {"steps": 8, "guidance_scale": info_of(pipe).guidance}
    with StepCache.preset("fora").attach(call) as cache:
        if type(pipe).__name__.startswith("StableDiffusion3"):  # its network has no name for a branch
            with pytest.raises(ValueError, match="guidance_scale=1"):
                call(**arguments(pipe, **asked))
            asked["guidance_scale"] = 1.0
        call(**arguments(pipe, **asked))
        report = cache.report()
    assert set(report["strip"].values()) == {"C..C..C."}
    assert not report["inactive"]
    assert len(report["strip"]) == (2 if type(pipe).__name__.startswith(("Qwen", "LTX")) else 1)


def test_the_engine_caches_steps(engine):
    model = engine.model().result(60)
    guidance = {"guidance": 1.0} if "StableDiffusion3" in type(model.pipe.pipe).__name__ else {}
    events = list(engine.generate(ask(engine, steps=8, step_cache={"preset": "fora"}, **guidance)))
    assert isinstance(events[-1], Done), events[-1]
    assert "." in [event for event in events if isinstance(event, Step)][-1].strip


def test_wishes_that_would_be_ignored_are_refused(engine):
    model = engine.model().result(60)
    if "negative_prompt" not in model.accepts("text_to_image"):
        failed = list(engine.generate(ask(engine, negative_prompt="blue")))[-1]
        assert isinstance(failed, Failed)
        assert "negative_prompt" in failed.message


def test_the_command_line_generates(modular_folder, tmp_path, caplog):
    folder, picture = modular_folder("flux"), tmp_path / "apple.png"
    options = ["--model", str(folder), "--steps", "2", "--size", "64x32", "--device", "cpu", "-o", str(picture)]
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as left:
        cli.main(["generate", "a red apple", *options])
    assert left.value.code == 0
    assert read_picture(picture).width == 64
    assert not caplog.records
