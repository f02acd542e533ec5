"""Prompts with alternatives, wildcards and weights from a request to an image and back, over HTTP-like requests too."""

import json

import pytest
from fastapi.testclient import TestClient

from apps.api.app import create_app
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.commands.own_files import own_presets, usual_wildcards, with_own_preset
from apps.service.engine import Engine
from apps.service.events import Failed, Picture
from apps.service.metadata import read_picture, request_from_settings
from apps.service.prompt_texts import as_literal, check_texts, is_prompt_note, texts_of, without_weights
from apps.service.request_error import RequestError
from apps.service.requests import REQUEST, ClassToImageRequest, TextToImageRequest
from apps.service.usage import UsageError
from apps.service.user_presets import UserPresets
from apps.service.wildcards import MAX_BYTES, Wildcards
from pipelines.inputs.prompt_syntax import parse_weights, plain_text
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.fakes import FakePipeline


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "wildcards"
    (folder / "food").mkdir(parents=True)
    (folder / "animals.txt").write_text("cat\n\n# no line\n{big|small} dog\n", encoding="utf-8")
    (folder / "food" / "fruit.txt").write_text("apple\npear\n", encoding="utf-8")
    return Wildcards(folder)


def asked(prompt, syntax="dynamic", **more):
    return TextToImageRequest(prompt=prompt, prompt_syntax=syntax, seed=3, **more)


# ------------------------------------------------------------------------------- wildcards


def test_wildcards_are_the_text_files_of_a_folder(lists, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (lists.folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (lists.folder / ".hidden.txt").write_text("x")
    (lists.folder / "odd name!.txt").write_text("x")
    assert lists.names() == ("animals", "food/fruit")
    assert lists.lines("animals") == ("cat", "{big|small} dog")
    assert lists.lines("food/fruit") == ("apple", "pear")
    assert Wildcards(None).names() == Wildcards(tmp_path / "absent").names() == ()


@pytest.mark.parametrize("name", ["../secret", "link", "/etc/passwd", "food", "food/../animals", ""])
def test_a_name_leads_to_no_other_file(lists, tmp_path, name):
    (tmp_path / "secret.txt").write_text("secret")
    with pytest.raises(RequestError, match="choose among animals, food/fruit"):
        lists.lines(name)


def test_files_that_are_too_large_or_no_text_are_refused(lists):
    (lists.folder / "big.txt").write_bytes(b"a\n" * MAX_BYTES)
    (lists.folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RequestError, match="split it"):
        lists.lines("big")
    with pytest.raises(RequestError, match="UTF-8"):
        lists.lines("latin")


# ----------------------------------------------------------------------------------- texts


def test_plain_requests_are_not_read():
    request = asked("a {red|blue} (cat:1.5) __animals__", None)
    found = texts_of(request, 3, Wildcards())
    assert found.request is request
    assert found.recorded == {"prompt_template": None, "negative_prompt_template": None}
    assert found.notes == ()


def test_each_seed_has_its_own_text_and_always_the_same(lists):
    request = asked("a {red|blue|green} __animals__", negative_prompt="{dark|pale}")
    texts = [texts_of(request, seed, lists) for seed in range(40)]
    assert len({one.request.prompt for one in texts}) > 5
    assert {one.request.negative_prompt for one in texts} == {"dark", "pale"}
    assert texts == [texts_of(request, seed, lists) for seed in range(40)]
    assert all(one.request.prompt_syntax is None for one in texts)
    assert texts[0].prompt_template == request.prompt
    assert texts[0].negative_prompt_template == request.negative_prompt
    assert all(is_prompt_note(note) for one in texts for note in one.notes)


@pytest.mark.parametrize(
    ("syntax", "prompt", "weights"),
    [
        ("weights", "a (red:1.4) {x|y} (cat)", [("red", 1.4)]),
        ("dynamic", r"a (red:1.4) \{x\} (cat)", [("red", 1.4)]),
        ("a1111", r"a [red] ((cat)) \(x\)", [("red", 1 / 1.1), ("cat", 1.1 * 1.1)]),
    ],
)
def test_what_is_recorded_reads_the_same_again(syntax, prompt, weights):
    first = texts_of(asked(prompt, syntax), 0, Wildcards()).request
    assert first.prompt_syntax == "weights"
    spans = parse_weights(first.prompt)
    assert [one.text for one in spans if one.weight != 1] == [text for text, _ in weights]
    assert [one.weight for one in spans if one.weight != 1] == pytest.approx([weight for _, weight in weights])
    again = texts_of(first, 0, Wildcards())
    assert again.request.prompt == first.prompt
    assert again.recorded == {"prompt_template": None, "negative_prompt_template": None}
    assert without_weights(first).prompt == plain_text(spans)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("__nothing__", "no wildcard 'nothing'; choose among animals, food/fruit"),
        ("(a:99)", "weight 99"),
        ("{3$$a|b}", "asks for 3"),
        ("{|  }", "prompt is empty"),
        ("(c:1.5)" + "(" * 1500, "characters long"),
    ],
)
def test_what_cannot_be_had_is_said_before_the_request_waits(lists, prompt, message):
    with pytest.raises(RequestError, match=message):
        check_texts(asked(prompt), lists)


def test_an_image_of_a_batch_has_no_prompt_of_its_own(lists):
    with pytest.raises(RequestError, match="leave pick"):
        check_texts(asked("{a|b}", num_images=2, batch_size=2, pick=1), lists)
    check_texts(asked("a", num_images=2, batch_size=2, pick=1), lists)


@pytest.mark.parametrize("syntax", ["weights", "dynamic", "a1111"])
def test_words_of_a_style_stay_what_they_are(syntax):
    text = r"a {x|y} (z:1.3) [q] __w__ \ | end"
    request = asked(as_literal(text, syntax), syntax)
    assert texts_of(request, 0, Wildcards()).request.prompt == text


def test_requests_of_classes_have_no_syntax():
    request = ClassToImageRequest(label=1, seed=1)
    assert texts_of(request, 1, Wildcards()).request is request
    assert "prompt_syntax" not in ClassToImageRequest.model_fields


# ---------------------------------------------------------------------------------- engine


class Listening(FakePipeline):
    """Remembers its prompts."""

    def __init__(self):
        super().__init__()
        self.prompts = []

    def __call__(self, prompt, negative_prompt=None, height=None, width=None, num_inference_steps=28,
                 guidance_scale=4.0, generator=None, output_type="pil", callback_on_step_end=None,
                 callback_on_step_end_tensor_inputs=("latents",), num_images_per_prompt=1):  # fmt: skip
        self.prompts.append(prompt)
        return super().__call__(
            prompt, negative_prompt, height, width, num_inference_steps, guidance_scale, generator, output_type,
            callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip


@pytest.fixture
def world(tmp_path, lists):
    pipe = Listening()
    engine = Engine({"fake": str(tmp_path)}, tmp_path, device="cpu", load=lambda source: pipe)
    yield engine, pipe
    engine.close()


def pictures_of(engine, request):
    events = list(engine.generate(request))
    failed = [event for event in events if isinstance(event, Failed)]
    assert not failed, failed
    return [event for event in events if isinstance(event, Picture)]


def test_images_of_a_request_have_texts_of_their_own_and_are_repeated(world):
    engine, pipe = world  # wildcards beside the images are found
    request = asked("a {red|blue|green|black} __animals__", num_images=4, batch_size=4, steps=1, height=64, width=64)
    pictures = pictures_of(engine, request)
    prompts = [one.metadata.prompt for one in pictures]
    assert pipe.prompts == prompts
    assert len(set(prompts)) > 1
    settings = read_picture(pictures[2].path)
    assert (settings.prompt, settings.prompt_template, settings.batch_size) == (prompts[2], request.prompt, 1)
    assert pictures[2].notes == (f"The prompt was read as: {prompts[2]}",)
    again = pictures_of(engine, request_from_settings(settings))[0]
    assert pipe.prompts[-1] == prompts[2] == again.metadata.prompt
    assert again.metadata.prompt_template is None


def test_a_style_goes_around_what_was_chosen(world):
    engine, pipe = world
    request = asked("{red|red} cat", style="on white", steps=1, height=64, width=64)
    from apps.service.styles import load_styles

    name = next(iter(load_styles()))
    pictures_of(engine, request.model_copy(update={"style": name}))
    assert pipe.prompts == [load_styles()[name].prompt.replace("{prompt}", "red cat")]


def test_a_refusal_comes_before_the_queue(world):
    engine, _ = world
    with pytest.raises(RequestError, match="no wildcard"):
        engine.submit(asked("__nothing__"))
    assert engine.unfinished("local") == []


@pytest.mark.parametrize(
    "body", [{"prompt": "__nothing__", "prompt_syntax": "dynamic"}, {"prompt": "a", "preset": "none"}]
)
def test_over_http_a_refusal_is_no_failure_of_the_server(world, body):
    engine, _ = world
    with TestClient(create_app(engine), base_url="http://127.0.0.1") as client:
        answer = client.post("/v1/jobs", json={"task": "text_to_image", **body})
    assert answer.status_code == 422
    assert "choose among" in answer.text


def test_weights_change_the_image_and_are_repeated_bit_by_bit(tmp_path):
    engine = Engine({"tiny": "x"}, tmp_path, device="cpu", load=lambda source: tiny_text_to_image_pipeline())
    try:
        plain = pictures_of(engine, asked("a red apple", steps=2))[0]
        strong = pictures_of(engine, asked("a (red:2.5) apple", steps=2))[0]
        assert plain.image.tobytes() != strong.image.tobytes()
        assert strong.metadata.prompt == "a (red:2.5) apple"
        assert strong.metadata.prompt_syntax == "weights"
        again = pictures_of(engine, request_from_settings(read_picture(strong.path)))[0]
        assert again.image.tobytes() == strong.image.tobytes()
        unread = pictures_of(engine, asked("a (red:2.5) apple", None, steps=2))[0]
        assert unread.image.tobytes() != strong.image.tobytes()
    finally:
        engine.close()


def test_a_model_that_cannot_weight_words_says_so(world):
    engine, _ = world
    (failed,) = [event for event in engine.generate(asked("a (red:2) cat", steps=1)) if isinstance(event, Failed)]
    assert "no text encoder" in failed.message
    assert "leave the weights out" in failed.message


# --------------------------------------------------------------------------------- presets


def test_presets_are_a_users_own_and_stay(tmp_path):
    presets = UserPresets(tmp_path)
    assert presets.save("ann", "  my   draft ", {"steps": 5, "prompt": "x", "seed": 3, "loras": ()}) == "my draft"
    assert UserPresets(tmp_path).of("ann")["my draft"].values() == {"steps": 5}
    assert presets.of("bob") == {}
    assert [one.stat().st_mode & 0o777 for one in tmp_path.iterdir()] == [0o600]
    assert json.loads(presets.export("ann")) == {"my draft": {"steps": 5}}
    assert presets.take_in("bob", presets.export("ann").encode()) == ("my draft",)
    presets.delete("ann", "my draft")
    assert presets.of("ann") == {}
    assert presets.of("bob")["my draft"].steps == 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", "no JSON object"),
        (b"{", "no JSON object"),
        (b'{"a": {"steps": 100000}}', "steps"),
        (b'{"a": {"colour": 1}}', "colour"),
        (b'{"a": {"image": "' + b"0" * 64 + b'"}}', "go with an image"),
        (b'{"draft": {"steps": 2}}', "built-in"),
        (b'{"": {"steps": 2}}', "name of 1 to"),
        (b'{"a\\u0000b": {"steps": 2}}', "printable"),
        (b" " * 300_000, "at most"),
        (json.dumps({str(i): {} for i in range(101)}).encode(), "at most 100"),
    ],
)
def test_files_of_presets_are_checked(tmp_path, data, message):
    presets = UserPresets(tmp_path)
    with pytest.raises(RequestError, match=message):
        presets.take_in("ann", data)
    assert presets.of("ann") == {}


def test_a_request_may_name_a_preset_of_its_user_alone(world):
    engine, _ = world
    engine.presets.save("ann", "two", {"steps": 2, "guidance": 1.5})
    request = TextToImageRequest(prompt="a", seed=1, preset="two", guidance=3.0, height=64, width=64)
    stored = REQUEST.validate_json(engine.job(engine.submit(request, "ann")).request)
    assert (stored.preset, stored.steps, stored.guidance) == (None, 2, 3.0)
    with pytest.raises(RequestError, match="no such preset"):
        engine.submit(request, "bob")


# ---------------------------------------------------------------------------- command line


def test_the_command_line_reads_prompts_and_presets(tmp_path, lists, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny"
    tiny_text_to_image_pipeline().save_pretrained(folder)
    UserPresets(tmp_path / ".tessera" / "presets").save(
        "local", "quick", {"steps": 2, "step_cache": {"preset": "fora"}}
    )
    assert own_presets(None)["quick"].steps == 2
    where = DeviceOptions(device="cpu", wildcards=usual_wildcards(None))
    options = make_options(model=str(folder), prompt="a {red|red} __food/fruit__", preset="quick", seed=1)
    run(options, tmp_path / "a.png", where)
    settings = read_picture(tmp_path / "a.png")
    assert settings.prompt in ("a red apple", "a red pear")
    assert settings.steps == 2
    assert settings.step_cache.preset == "fora"
    run(make_options(model=str(folder)), tmp_path / "b.png", where, settings=tmp_path / "a.png")
    assert read_picture(tmp_path / "b.png").prompt == settings.prompt
    run(make_options(model=str(folder), prompt="{x|x}", prompt_syntax="plain", steps=1), tmp_path / "c.png", where)
    assert read_picture(tmp_path / "c.png").prompt == "{x|x}"
    with pytest.raises(UsageError, match="choose among draft"):
        with_own_preset(make_options(prompt="a", preset="none"), None)
