"""Settings in the forms of other programs: what is written, what is read, and what hostile files do not do."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from apps.commands import file_info
from apps.commands.options import read_any_settings
from apps.service import limits
from apps.service.comfy_graph import MAX_NODES, read_graph
from apps.service.foreign_files import UNKNOWN, read_file, read_foreign
from apps.service.infotext import MAX_LINE, read_infotext
from apps.service.metadata import MetadataError, PictureSettings, read_picture, save_picture
from apps.service.metadata_dialects import EXIF_IFD, MAX_TEXT, UNICODE, USER_COMMENT
from apps.service.option_values import SchedulerName
from apps.service.recipe import A1111_SAMPLERS, COMFY_SAMPLERS, fields_of, nearest_sampler

SETTINGS = PictureSettings(
    prompt="a red apple, \u2603: best", negative_prompt="blurry", seed=42, steps=28, guidance=4.5, height=64, width=96,
    model="stickers", fingerprint="0123456789abcdef", sampler="dpm++", versions={"tessera": "1.0"},
    loras=({"name": "sketch", "scale": 0.8},),
)  # fmt: skip
# As AUTOMATIC1111 documents it at its parser, with what newer versions and extensions add.
INFOTEXT = """girl with an artist's beret, <lora:12gb_settings-000007:1>, ((eyeshadow)), (coquettish:1.2)
second line
Negative prompt: ugly, fat, [blurry], mutation,
(ugly)
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 45dee52b, \
Model: sd_xl_base_1.0, Denoising strength: 0.5, ADetailer prompt: "face, <lora:x:1>: \\"photo\\"", Version: v1.6.0"""
# ComfyUI's example of the form of its API, shortened by nothing.
GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {
        "cfg": 8, "denoise": 1, "latent_image": ["5", 0], "model": ["4", 0], "negative": ["7", 0],
        "positive": ["6", 0], "sampler_name": "euler", "scheduler": "normal", "seed": 8566257, "steps": 20}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"batch_size": 1, "height": 512, "width": 768}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "masterpiece best quality girl"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "bad hands"}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}  # fmt: skip
FLUX = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux\\dev.gguf"}},
    "2": {"class_type": "LoraLoaderModelOnly", "inputs": {
        "lora_name": "style/ink.safetensors", "strength_model": 0.5, "model": ["1", 0]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": ["11", 0], "clip": ["x", 0]}},
    "4": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["3", 0]}},
    "5": {"class_type": "BasicGuider", "inputs": {"model": ["2", 0], "conditioning": ["4", 0]}},
    "6": {"class_type": "RandomNoise", "inputs": {"noise_seed": ["12", 0]}},
    "7": {"class_type": "BasicScheduler", "inputs": {"steps": 25, "denoise": 1.0, "scheduler": "simple"}},
    "8": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m_sde_gpu"}},
    "9": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 576, "batch_size": 1}},
    "10": {"class_type": "SamplerCustomAdvanced", "inputs": {
        "noise": ["6", 0], "guider": ["5", 0], "sampler": ["8", 0], "sigmas": ["7", 0], "latent_image": ["9", 0]}},
    "11": {"class_type": "StringConstant", "inputs": {"string": "a fox"}},
    "12": {"class_type": "PrimitiveInt", "inputs": {"value": 2**63}},
    "13": {"class_type": "SaveImage", "inputs": {"images": ["10", 0]}},
}  # fmt: skip


def png(path, **texts):
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        chunks.add_text(keyword, text)
    Image.new("RGB", (64, 96)).save(path, pnginfo=chunks)
    return path


def keys(read):
    return {note.key.removeprefix("foreign.") for note in read.notes}


def test_an_infotext_is_read_as_its_program_does(tmp_path):
    read = read_file(png(tmp_path / "a.png", parameters=INFOTEXT))
    settings = read.settings
    assert read.program == "AUTOMATIC1111"
    assert settings.prompt == "girl with an artist's beret, ((eyeshadow)), (coquettish:1.2)\nsecond line"
    assert settings.negative_prompt == "ugly, fat, [blurry], mutation,\n(ugly)"
    assert (settings.steps, settings.guidance, settings.seed) == (20, 7.0, 965400086)
    assert (settings.width, settings.height) == (512, 768)
    assert (settings.sampler, settings.model, settings.fingerprint) == ("dpm++", "sd_xl_base_1.0", UNKNOWN)
    assert [(one.name, one.scale) for one in settings.loras] == [("12gb_settings-000007", 1.0)]
    assert keys(read) == {"weights", "sampler", "denoise", "ignored"}
    assert "ADetailer prompt" in str(read.notes)


def test_a_last_line_of_few_parameters_belongs_to_the_prompt():
    assert read_infotext("a fox\nstyle: ink, mood: calm").prompt == "a fox\nstyle: ink, mood: calm"
    assert read_infotext("a fox\nNegative prompt: red").negative_prompt == "red"
    assert read_infotext("").prompt == ""


def test_a_graph_is_read_back_from_what_saves_the_image(tmp_path):
    read = read_file(png(tmp_path / "a.png", prompt=json.dumps(GRAPH), workflow="{}"))
    settings = read.settings
    assert (read.program, settings.prompt, settings.negative_prompt) == (
        "ComfyUI", "masterpiece best quality girl", "bad hands")  # fmt: skip
    assert (settings.seed, settings.steps, settings.guidance, settings.sampler) == (8566257, 20, 8.0, "euler")
    assert (settings.width, settings.height, settings.model) == (768, 512, "v1-5-pruned-emaonly")
    assert read.notes == ()


def test_a_graph_of_separate_nodes_is_read_through_its_links(tmp_path):
    read = read_file(png(tmp_path / "a.png", prompt=json.dumps(FLUX)))
    settings = read.settings
    assert (settings.prompt, settings.negative_prompt, settings.steps, settings.guidance) == ("a fox", "", 25, 3.5)
    assert (settings.width, settings.height, settings.model, settings.sampler) == (1024, 576, "dev", "sde")
    assert [(one.name, one.scale) for one in settings.loras] == [("ink", 0.5)]
    assert settings.seed == 2**63 % 2**32
    assert keys(read) == {"seed", "sampler"}


def test_the_first_of_two_samplers_says_what_was_composed():
    second = {**GRAPH["3"]["inputs"], "denoise": 0.5, "latent_image": ["20", 0], "steps": 5}
    graph = {
        "30": {"class_type": "KSampler", "inputs": second},
        "20": {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0], "width": 2048, "height": 2048}},
        **GRAPH,
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["30", 0], "vae": ["4", 2]}},
    }
    recipe = read_graph(json.dumps(graph))
    assert (recipe.steps, recipe.width, recipe.denoise) == (20, 768, 1.0)
    assert [note.key for note in recipe.notes] == ["foreign.samplers"]
    zeroed = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}}
    assert read_graph(json.dumps({**GRAPH, "7": zeroed})).negative_prompt == ""


@pytest.mark.parametrize("ending", [".png", ".webp"])
def test_what_is_written_is_read_by_the_rules_of_the_others(tmp_path, ending):
    path = save_picture(Image.new("RGB", (96, 64)), tmp_path / f"a{ending}", SETTINGS)
    assert read_picture(path) == SETTINGS  # ours goes first
    assert read_file(path).program == ""
    with Image.open(path) as image:
        if ending == ".png":
            text = image.info["parameters"]
            graph = json.loads(image.info["prompt"])
            kinds = {node["class_type"] for node in graph.values()}
            assert kinds == {
                "CheckpointLoaderSimple", "CLIPTextEncode", "KSampler", "EmptyLatentImage", "VAEDecode", "SaveImage",
                "LoraLoader"}  # fmt: skip
            links = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
            assert links
            assert all(name in graph for name, _ in links)
        else:
            comment = image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
            assert comment.startswith(UNICODE)
            text = comment.removeprefix(UNICODE).decode("utf-16-be")
    assert text == (
        "a red apple, \u2603: best <lora:sketch:0.8>\nNegative prompt: blurry\nSteps: 28, Sampler: DPM++ 2M, "
        "CFG scale: 4.5, Seed: 42, Size: 96x64, Model: stickers, Version: tessera 1.0"
    )
    foreign = read_foreign(path).settings
    for name in ("prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height", "sampler", "model"):
        assert getattr(foreign, name) == getattr(SETTINGS, name), name
    assert [(one.name, one.scale) for one in foreign.loras] == [("sketch", 0.8)]


@pytest.mark.parametrize("ending", [".png", ".webp"])
def test_without_settings_nothing_of_other_programs_is_written(tmp_path, ending):
    path = save_picture(Image.new("RGB", (96, 64)), tmp_path / f"a{ending}", SETTINGS, keep_settings=False)
    assert read_foreign(path) is None
    assert b"red apple" not in path.read_bytes()
    assert "apple".encode("utf-16-be") not in path.read_bytes()


def test_what_the_others_have_no_word_for_is_not_written(tmp_path):
    changes = ({"frames": 9, "fps": 8.0}, {"prompt": "", "label": 3, "task": "class_to_image"})
    for change in changes:
        path = save_picture(Image.new("RGB", (96, 64)), tmp_path / "a.png", SETTINGS.model_copy(update=change))
        assert read_foreign(path) is None
    again = SETTINGS.model_copy(update={"task": "image_to_image", "strength": 0.6, "image": "0" * 64})
    path = save_picture(Image.new("RGB", (96, 64)), tmp_path / "a.png", again)
    with Image.open(path) as image:
        assert "Denoising strength: 0.6" in image.info["parameters"]
        assert "prompt" not in image.info  # the smallest graph starts from nothing


@pytest.mark.parametrize("code", ["big", "little", "ascii", "bare"])
def test_the_user_comment_of_a_jpeg_is_read_in_every_code(tmp_path, code):
    text = INFOTEXT.rsplit("\n", maxsplit=1)[-1]
    body = {
        "big": UNICODE + f"a fox\n{text}".encode("utf-16-be"),
        "little": UNICODE + f"a fox\n{text}".encode("utf-16-le"),
        "ascii": b"ASCII\0\0\0" + f"a fox\n{text}".encode(),
        "bare": f"a fox\n{text}".encode(),
    }[code]
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = body
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg", exif=exif)
    assert read_file(tmp_path / "a.jpg").settings.prompt == "a fox"
    exif = Image.Exif()
    exif[0x0110] = f"prompt:{json.dumps(GRAPH)}"
    Image.new("RGB", (64, 64)).save(tmp_path / "a.webp", exif=exif)
    assert read_file(tmp_path / "a.webp").settings.seed == 8566257


def test_all_our_samplers_have_names_that_come_back():
    for names in (A1111_SAMPLERS, COMFY_SAMPLERS):
        assert names.keys() == set(get_args(SchedulerName))
        for ours, theirs in names.items():
            assert nearest_sampler(theirs) == (ours, ours != "sde")


@pytest.mark.parametrize(
    ("name", "ours", "is_same"),
    [
        ("Euler", "euler", True), ("k_euler", "euler", True), ("Euler Karras", "euler", False),
        ("Euler a", "sde", False),
        ("DPM++ 2M", "dpm++", True), ("dpmpp_2m", "dpm++", True), ("DPM++ 2M SDE Karras", "sde", False),
        ("dpmpp_3m_sde_gpu", "sde", False), ("DPM adaptive", "dpm++", False), ("LMS", "dpm++", False),
        ("DPM2 a", "heun", False), ("heunpp2", "heun", False), ("UniPC", "unipc", True), ("uni_pc_bh2", "unipc", False),
        ("DDIM", "ddim", True), ("ddpm", "ddpm", True), ("LCM", None, False), ("", None, False), ("<b>", None, False),
    ],
)  # fmt: skip
def test_samplers_are_mapped_to_the_nearest(name, ours, is_same):
    assert nearest_sampler(name) == (ours, is_same)


def test_what_is_out_of_range_is_noted_and_replaced(tmp_path):
    line = "Steps: 9999, Sampler: LCM, CFG scale: 99, Seed: 99999999999, Size: 5000x100"
    loras = "".join(f"<lora:n{i}:1>" for i in range(9)) + "<lora:far:99>"
    read = read_file(png(tmp_path / "a.png", parameters=f"{'x' * 3000}{loras}<hypernet:a:1>\n{line}"))
    settings = read.settings
    assert (settings.steps, settings.guidance, settings.sampler) == (None, None, None)
    assert settings.seed == 99999999999 % 2**32
    assert len(settings.prompt) == limits.MAX_PROMPT_CHARS
    assert len(settings.loras) == limits.MAX_LORAS
    limits.check_size(settings.height, settings.width)
    assert keys(read) == {"steps", "guidance", "no_sampler", "seed", "size", "long", "loras", "tags"}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        "1" * 100_000,
        json.dumps({str(i): {"class_type": "KSampler", "inputs": {}} for i in range(MAX_NODES + 1)}),
        '{"1": {"class_type": "KSampler", "inputs": 3}, "2": 5, "3": {"class_type": {}, "inputs": {}}}',
        "null",
        "\ud800",
    ],
)
def test_what_is_no_graph_is_refused(text):
    assert read_graph(text) is None


def test_links_in_circles_end():
    graph = {
        "1": {"class_type": "KSampler", "inputs": {
            "positive": ["2", 0], "negative": ["1", 0], "model": ["1", 0], "steps": ["3", 0], "seed": ["1", 0],
            "latent_image": ["1", 0], "cfg": [["1"], 0], "sampler_name": ["1", 0]}},
        "2": {"class_type": "Combine", "inputs": {"a": ["2", 0], "b": ["1", 0]}},
        "3": {"class_type": "PrimitiveInt", "inputs": {"value": ["3", 0]}},
    }  # fmt: skip
    recipe = read_graph(json.dumps(graph))
    assert (recipe.prompt, recipe.steps, recipe.seed) == ("", None, None)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["1", "2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
INPUTS = st.dictionaries(st.sampled_from([*GRAPH["3"]["inputs"], "text", "width", "guider", "lora_name"]), VALUES)
NODES = st.fixed_dictionaries({"class_type": st.sampled_from(["KSampler", "SaveImage", "X"]), "inputs": INPUTS})


@given(graph=st.dictionaries(st.sampled_from(["1", "2", "3"]), NODES | VALUES))
def test_any_graph_gives_settings_that_pass_the_checks(graph):
    recipe = read_graph(json.dumps(graph))
    if recipe is not None:
        PictureSettings.model_validate({**fields_of(recipe, (64, 64)), "fingerprint": UNKNOWN})


@given(text=st.text(max_size=300) | st.from_regex(r"(\w+\n)?(\w{2,6}: [^\n]{0,12}, ?){0,6}", fullmatch=True))
def test_any_text_gives_settings_that_pass_the_checks(text):
    fields = fields_of(read_infotext(text), (64, 64))
    PictureSettings.model_validate({**fields, "fingerprint": UNKNOWN})


def test_long_texts_are_not_read_and_long_lines_to_a_limit(tmp_path):
    assert read_foreign(png(tmp_path / "a.png", parameters="a" * (MAX_TEXT + 1))) is None
    assert read_foreign(png(tmp_path / "a.png", prompt=json.dumps(GRAPH) + " " * MAX_TEXT)) is None
    long = "Steps: 20, Seed: 3, Size: 64x64, Note: " + 'aa: \\"' * (MAX_LINE // 5) + ", CFG scale: 7"
    recipe = read_infotext(f"a fox\n{long}")
    assert (recipe.prompt, recipe.seed, recipe.guidance) == ("a fox", 3, None)


def test_broken_files_are_refused_as_ever(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG but no")
    with pytest.raises(MetadataError, match="not a readable"):
        read_file(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    with pytest.raises(MetadataError):
        read_file(tmp_path / "b.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    with pytest.raises(MetadataError, match="no settings"):
        read_file(tmp_path / "c.png")
    hostile = PngImagePlugin.PngInfo()
    hostile.add_itxt("tessera", '{"prompt": 1}')
    hostile.add_text("parameters", INFOTEXT)
    Image.new("RGB", (8, 8)).save(tmp_path / "d.png", pnginfo=hostile)
    with pytest.raises(MetadataError, match="checks"):  # what claims to be ours is judged as ours
        read_file(tmp_path / "d.png")


def test_the_command_line_reads_and_tells_them(tmp_path, capsys):
    path = png(tmp_path / "a.png", parameters=INFOTEXT.replace("girl", "\x1b[31mgirl"))
    assert read_any_settings(path).program == "AUTOMATIC1111"
    file_info.run(path)
    said = capsys.readouterr().out
    assert "965400086" in said
    assert "AUTOMATIC1111" in said
    assert "\x1b[31mgirl" not in said
    file_info.run(path, json_output=True)
    told = json.loads(capsys.readouterr().out)
    assert told["settings_program"] == "AUTOMATIC1111"
    assert any("ADetailer" in note for note in told["settings_notes"])
