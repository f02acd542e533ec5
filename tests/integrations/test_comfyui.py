"""The nodes for ComfyUI: a workflow runs, cached outputs stay what they were, progress and stop are followed."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from integrations.comfyui.generation import to_image, to_tensor
from integrations.comfyui.model import ENGINES, KEPT, Model, lora_name
from pipelines import load_pipeline
from tests.integrations.comfy_runner import InvalidError, Runner

EXAMPLE = Path(__file__).parents[2] / "integrations" / "comfyui" / "example.json"


@pytest.fixture(autouse=True, scope="module")
def closed():
    yield
    ENGINES.close()


def workflow(**changes):
    """Return the example with few steps, small."""
    found = json.loads(EXAMPLE.read_text())
    found["3"]["inputs"] |= {"width": 64, "height": 64, "steps": 6, **changes}
    return found


def plain(found):
    """Return a workflow with Speed Up unplugged."""
    changed = copy.deepcopy(found)
    changed["3"]["inputs"]["model"] = ["1", 0]
    del changed["2"]
    return changed


def test_every_node_says_what_comfyui_asks_for():
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        declared = node.INPUT_TYPES()
        assert set(declared) <= {"required", "optional", "hidden"}
        assert callable(getattr(node, node.FUNCTION))
        assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
        assert node.CATEGORY == "tessera"
        assert node.DESCRIPTION
        for spec in {**declared["required"], **declared.get("optional", {})}.values():
            assert isinstance(spec, tuple)
            assert isinstance(spec[0], str | list)


def test_the_example_runs_and_says_what_the_acceleration_did():
    result = Runner(NODE_CLASS_MAPPINGS).run(workflow())
    images, report = result["3"]
    assert images.shape == (1, 64, 64, 3)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert "profile balanced" in json.loads(report)[0]["report"]


def test_unplugging_speed_up_gives_the_plain_image_again_bit_for_bit():
    runner, found = Runner(NODE_CLASS_MAPPINGS), workflow()
    before = runner.run(plain(found))["3"][0]
    fast = runner.run(found)["3"][0]
    after = runner.run(plain(found))["3"][0]
    assert not torch.equal(fast, before)
    assert torch.equal(after, before)
    pipe = load_pipeline("stickers")
    same = pipe("a red apple", height=64, width=64, num_inference_steps=6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(before, to_tensor(same.images))


def test_only_what_changed_is_run_again():
    runner = Runner(NODE_CLASS_MAPPINGS)
    runner.run(workflow())
    assert runner.ran == ["1", "2", "3", "4"]
    runner.run(workflow())
    assert runner.ran == []
    runner.run(workflow(seed=4))
    assert runner.ran == ["3", "4"]


def test_an_image_and_a_mask_keep_what_is_outside():
    runner = Runner(NODE_CLASS_MAPPINGS)
    image = runner.run(plain(workflow()))["3"][0]
    node, mask = NODE_CLASS_MAPPINGS["TesseraGenerateImage"](), torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    asked = {**plain(workflow())["3"]["inputs"], "model": Model("stickers"), "prompt": "a frog"}
    changed, _ = node.generate(**asked, image=image, mask=mask, strength=1.0)
    outside = (mask == 0)[..., None].expand_as(image)
    assert torch.equal(changed[outside], image[outside])
    assert not torch.equal(changed, image)
    with pytest.raises(ValueError, match="connect the image"):
        node.generate(**asked, mask=mask)


def test_a_clip_has_frames_and_a_rate():
    node = NODE_CLASS_MAPPINGS["TesseraGenerateVideo"]()
    asked = {"prompt": "a dolphin leaping", "negative_prompt": "", "seed": 1, "steps": 1, "guidance": -1.0}
    size = {"width": 32, "height": 32, "frames": 4, "fps": 0.0}
    frames, fps, _ = node.generate(Model("stickers-video"), **asked, **size)
    assert frames.shape == (4, 32, 32, 3)
    assert fps == 8.0
    with pytest.raises(ValueError, match="leave out frames"):
        node.generate(Model("stickers"), **asked, **size)


@pytest.mark.parametrize(
    ("node", "changes"),
    [("3", {"steps": 101}), ("3", {"batch_size": 0}), ("1", {"name": "../../etc"}), ("3", {"model": ["4", 0]})],
)
def test_workflows_that_comfyui_would_refuse_are_refused(node, changes):
    found = workflow()
    found[node]["inputs"] |= changes
    with pytest.raises((InvalidError, IndexError)):
        Runner(NODE_CLASS_MAPPINGS).run(found)


def test_hostile_inputs_are_refused_by_name():
    speed, load = NODE_CLASS_MAPPINGS["TesseraSpeedUp"](), NODE_CLASS_MAPPINGS["TesseraLoadModel"]()
    generate = NODE_CLASS_MAPPINGS["TesseraGenerateImage"]()
    asked = {**plain(workflow())["3"]["inputs"]}
    files = '{"step_cache": {"preset": "budget", "params": {"budget": 0.3, "profile": "/etc/passwd"}}}'
    (named,) = speed.speed_up(Model("stickers"), "none", files)
    with pytest.raises(ValueError, match="names of files"):
        generate.generate(**{**asked, "model": named})
    with pytest.raises(ValueError, match="either a profile"):
        speed.speed_up(Model("stickers"), "balanced", files)
    with pytest.raises(ValueError, match="other is empty"):
        load.load("other", "cpu", "auto", "none", "none")
    (missing,) = load.load("other", "cpu", "auto", "none", "none", "/nowhere/at/all")
    with pytest.raises(Exception, match="There is no model"):
        generate.generate(**{**asked, "model": missing})


def test_loras_come_from_comfyuis_list(monkeypatch, tmp_path):
    paths = {"style.safetensors": str(tmp_path / "style.safetensors")}
    fake = SimpleNamespace(get_filename_list=lambda kind: list(paths), get_full_path=lambda kind, name: paths[name])
    monkeypatch.setitem(sys.modules, "folder_paths", fake)
    node = NODE_CLASS_MAPPINGS["TesseraLoadLora"]
    assert node.INPUT_TYPES()["required"]["lora"] == (["style.safetensors"],)
    (first,) = node().load(Model("stickers"), "style.safetensors", 0.5)
    (second,) = node().load(first, "style.safetensors", 1.0)
    assert first.loras == ((paths["style.safetensors"], 0.5),)
    assert len(second.loras) == 2
    assert lora_name("/a/x y.safetensors") != lora_name("/b/x y.safetensors")
    with pytest.raises(ValueError, match="no loras file"):
        node().load(first, "../secret.safetensors", 1.0)


def test_progress_is_told_and_a_stop_of_comfyui_ends_the_work(monkeypatch):
    seen = []

    class Interrupted(Exception):
        pass

    def check():
        if len(seen) == 2:
            raise Interrupted

    bar = SimpleNamespace(update_absolute=lambda done, total, preview: seen.append((done, total, preview)))
    monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "comfy.utils", SimpleNamespace(ProgressBar=lambda total: bar))
    management = SimpleNamespace(throw_exception_if_processing_interrupted=check)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    generate = NODE_CLASS_MAPPINGS["TesseraGenerateImage"]()
    asked = {**plain(workflow())["3"]["inputs"], "model": Model("stickers")}
    with pytest.raises(Interrupted):
        generate.generate(**asked)
    assert [one[:2] for one in seen] == [(1, 6), (2, 6)]
    assert seen[0][2] is None or seen[0][2][0] == "JPEG"


def test_few_models_stay_in_memory():
    engines = [ENGINES.of(Model("stickers", dtype=dtype)) for dtype in ("auto", "float32", "bfloat16")]
    assert len(ENGINES._engines) == KEPT
    assert ENGINES.of(Model("stickers", dtype="bfloat16")) is engines[-1]


def test_images_go_there_and_back():
    tensor = torch.rand(1, 5, 4, 3).mul(255).round() / 255
    assert torch.allclose(to_tensor([to_image(tensor)]), tensor, atol=1e-6)
    with pytest.raises(ValueError, match="2 images are connected"):
        to_image(tensor.repeat(2, 1, 1, 1))


def test_what_a_model_can_not_be_given_is_refused_and_not_left_out():
    node = NODE_CLASS_MAPPINGS["TesseraGenerateImage"]()
    asked = {**plain(workflow())["3"]["inputs"], "model": Model("stickers-var"), "width": 0, "height": 0}
    with pytest.raises(ValueError, match="can't be given steps"):
        node.generate(**asked)
    images, _ = node.generate(**{**asked, "steps": 0})
    assert images.shape[0] == 1
    with pytest.raises(ValueError, match="strength is set"):
        node.generate(**{**asked, "steps": 0}, strength=0.5)


def test_a_stop_is_heard_while_no_step_is_told(monkeypatch):
    class Interrupted(Exception):
        pass

    def end():
        raise Interrupted

    management = SimpleNamespace(processing_interrupted=lambda: True, throw_exception_if_processing_interrupted=end)
    monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    monkeypatch.setattr("integrations.comfyui.generation.LOOK_SECONDS", 0.001)
    asked = {**plain(workflow())["3"]["inputs"], "model": Model("stickers"), "steps": 100, "width": 512, "height": 512}
    with pytest.raises(Interrupted):
        NODE_CLASS_MAPPINGS["TesseraGenerateImage"]().generate(**asked)
