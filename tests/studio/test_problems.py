"""What is wrong with a request, said in the language of the page: every type of check, every error of ours."""

from __future__ import annotations

import ast
from pathlib import Path

import gradio as gr
import pytest
from pydantic import ValidationError

import apps
from apps.service import limits
from apps.service.events import Failed
from apps.service.request_error import RequestError
from apps.service.requests import REQUEST, TASKS, TextToImageRequest
from apps.studio import fields
from apps.studio.forms import form_to_request
from apps.studio.problems import LABELS, explain, explain_failure
from apps.studio.strings import Strings, languages
from tests.studio.test_page import ENGLISH, PAGE

CHINESE = Strings("zh")
NAMES_OF_ERRORS = {"RequestError", "UploadError", "LoraError", "UnavailableError", "UnknownModelError", "MetadataError",
                   "QueueFullError", "PromptFileError", "FineTuningError", "TuningError", "OwnModelError",
                   "DownloadError", "QuotaError"}  # fmt: skip
LEFT = ("Input", "should", "Value error", "field required", "choose", "valid")
"""English words of pydantic and of ours."""


def said(words: Strings, **values: object) -> str:
    with pytest.raises((ValidationError, RequestError)) as caught:
        form_to_request({**PAGE, **values}, ("text_to_image", "inpaint"))
    return explain(caught.value, words)


@pytest.mark.parametrize(
    ("values", "label", "parts"),
    [
        ({"steps": 1000}, "steps", ("1000", "1", "200")),
        ({"steps": None}, "steps", ("1", "200")),
        ({"steps": 2.5}, "steps", ("2.5", "1", "200")),
        ({"steps": "many"}, "steps", ("many", "1", "200")),
        ({"guidance": -1}, "guidance", ("-1", "0", f"{limits.MAX_GUIDANCE:g}")),
        ({"guidance": float("inf")}, "guidance", ("inf", "0", f"{limits.MAX_GUIDANCE:g}")),
        ({"seed": -5}, "seed", ("-5", "0", "4294967295")),
        ({"num_images": 99}, "num_images", ("99", "1", "16")),
        ({"batch_size": 0}, "batch_size", ("0", "1", "8")),
        ({"shape": "custom", "width": 9999, "height": 64}, "width", ("9999", "32", "2048")),
        ({"shape": "custom", "width": 70, "height": 64}, "width", ("70", "8", "72")),
        ({"shape": "custom", "width": 64, "height": None}, "height", ()),
        ({"scheduler": "magic"}, "scheduler", ("magic", "euler", "ddpm")),
        ({"step_cache": "fora", "cache_amount": -5}, "step_cache.amount", ("-5", "0", "100")),
        ({"lora": "x", "lora_scale": 9}, "loras.scale", ("9", "-4", "4")),
        ({"lora": "x", "lora_2": "y", "lora_scale_2": -5}, "loras.scale", ("-5", "-4", "4")),
        ({"mode": "video", "frames": 1000}, "frames", ("1000", "1", "257")),
        ({"dtype": "float8"}, "dtype", ("float8", "bfloat16")),
        ({"file_format": "gif"}, "file_format", ("gif", "png", "webp")),
        ({"negative_prompt": "x" * 3000}, "negative_prompt", ("3000", "2000")),
        ({"mode": "inpaint", "source": "0" * 64, "grow_left": 300}, "expand.left", ("300", "0", "200")),
        ({"mode": "inpaint", "source": "0" * 64, "grow_left": 10, "repaint": 2}, "strength", ("2", "0.05", "1")),
        ({"mode": "image", "source": "../../etc/passwd"}, "image", ("passwd",)),
    ],
)
def test_a_field_out_of_range_is_named_by_its_label_with_value_and_range(values, label, parts):
    for words in (ENGLISH, CHINESE):
        text = said(words, **values)
        assert words(label) in text, text
        for part in parts:
            assert part in text, text
    assert not any(word in said(CHINESE, **values) for word in LEFT)


def test_several_wrong_fields_are_all_named():
    text = said(ENGLISH, steps=0, guidance=99, num_images=0)
    assert all(ENGLISH(label) in text for label in ("steps", "guidance", "num_images"))


def test_every_field_of_every_request_has_a_label_in_every_language():
    for kind in TASKS.values():
        assert set(kind.model_fields) <= set(LABELS)
    for words in map(Strings, languages()):
        assert set(LABELS.values()) <= words.keys()


def _raised() -> dict[str, set[str]]:
    """Return the keys of all errors that are raised in the sources, with the names of their values."""
    found: dict[str, set[str]] = {}
    for path in Path(apps.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if name in NAMES_OF_ERRORS and len(node.args) == 2 and not isinstance(node.args[0], ast.Name):
                first = node.args[0]
                keys = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
                for key in keys:
                    values = {keyword.arg for keyword in node.keywords}
                    found[key.value] = found.get(key.value, values) & values
    return found


def test_every_error_of_ours_has_a_sentence_in_every_language():
    raised = _raised()
    assert {"range", "multiple", "area", "choice", "setting", "file.key", "queue.yours"} <= set(raised)
    for words in map(Strings, languages()):
        for key, names in raised.items():
            sentence = words(f"error.{key}", **dict.fromkeys(names, "X"))  # no value is missing
            assert "{" not in sentence
        unused = {key for key in words.keys() if key.startswith("error.")} - {f"error.{key}" for key in raised}  # noqa: SIM118
        assert unused <= {
            "error.value",
            "error.number",
            "error.whole",
            "error.missing",
            "error.long",
            "error.ft.room_ended",  # reasons for which a training has ended, kept in its record
            "error.ft.time",
        }  # of pydantic's checks
    assert len({key for key in Strings("en").keys() if key.startswith("error.")}) > 40  # noqa: SIM118


def test_checks_behind_the_request_are_translated_too():
    with pytest.raises(RequestError) as caught:
        limits.check_size(64, 97)
    assert CHINESE("width") in explain(caught.value, CHINESE)
    with pytest.raises(ValidationError) as wrong:  # the kind of request found by its task, as in a grid
        REQUEST.validate_python({"task": "text_to_image", "prompt": "x", "steps": 0})
    assert explain(wrong.value, ENGLISH) == "\u201cSteps\u201d is 0: choose 1 to 200."
    with pytest.raises(ValidationError) as extra:
        TextToImageRequest.model_validate({"prompt": "x", "kv_policy": "full"})
    assert CHINESE("kv_policy") in explain(extra.value, CHINESE)


def test_an_error_that_is_not_ours_is_not_repeated():
    assert explain(ValueError("/srv/secret"), ENGLISH) == ENGLISH("wrong_form")


def test_a_failed_job_is_explained_in_the_language_of_the_page():
    cause = RequestError("setting", "no scheduler", field="scheduler")
    assert explain_failure(Failed("bad_request", "no scheduler", cause), CHINESE) == explain(cause, CHINESE)
    refused = explain_failure(Failed("bad_request", "expected a multiple of 16"), CHINESE)  # of a pipeline
    assert refused.startswith(CHINESE("failed.bad_request", message=""))
    assert "multiple of 16" in refused
    for code in ("model_failed", "out_of_memory", "too_slow", "failed", "of another version"):
        assert explain_failure(Failed(code, "message"), CHINESE) != "message"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (fields.Number(0, minimum=0, maximum=9, precision=0, render=False), -5),
        (fields.Slider(0, 9, 1, render=False), 1000),
        (fields.Dropdown(["a"], render=False), "b"),
        (fields.Radio(["a"], render=False), "b"),
    ],
)
def test_fields_hand_on_what_they_got_and_gradio_refuses_nothing(field, value):
    """A field is made anew by its class when a listener updates it."""
    again = type(field)(**field.constructor_args, render=False) if "render" not in field.constructor_args else field
    assert field.preprocess(value) == again.preprocess(value) == value
    assert field.get_block_name() in ("number", "slider", "dropdown", "radio")
    with pytest.raises(gr.Error):  # what is gone
        type(field).__base__.preprocess(field, value)


def test_no_field_of_the_page_is_checked_by_gradio():
    for path in (Path(fields.__file__).parent).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in ("Number", "Slider", "Dropdown", "Radio"):
            assert f"gr.{name}(" not in text, path
    assert not list(Path(fields.__file__).parent.rglob("*.pyi"))  # Gradio writes them beside classes
