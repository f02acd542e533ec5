"""What pydantic finds is told in our words: the field, the accepted range, the remedy."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from apps.service.requests import REQUEST, TASKS, explain
from tests.studio.test_api import hostile_requests

TEXT = {"task": "text_to_image", "prompt": "x"}
FOREIGN = ("Input should", "Value error", "Field required", "Extra inputs", "should be", "validation error",
           "pydantic", "unable to parse", "constrained", "function-after")  # fmt: skip


def explained(body):
    with pytest.raises(ValidationError) as error:
        REQUEST.validate_json(body) if isinstance(body, bytes) else REQUEST.validate_python(body)
    return explain(error.value)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({**TEXT, "steps": 0}, "steps: choose 1 to 200"),
        ({**TEXT, "steps": 201}, "steps: choose 1 to 200"),
        ({**TEXT, "steps": 2.5}, "steps: choose a whole number, 1 to 200"),
        ({**TEXT, "steps": "many"}, "steps: choose a whole number, 1 to 200"),
        ({**TEXT, "guidance": -1}, "guidance: choose 0 to 31"),
        ({**TEXT, "guidance": float("nan")}, "guidance: must be finite; choose 0 to 31"),
        ({**TEXT, "scheduler": "magic"}, "scheduler: choose euler, heun, sde, dpm++, unipc, ddim or ddpm"),
        ({**TEXT, "keep_settings": "perhaps"}, "keep_settings: choose true or false"),
        ({**TEXT, "negative_prompt": 7}, "negative_prompt: give a text of at most 2000 characters"),
        ({**TEXT, "step_cache": {"preset": "fora", "amount": 0}}, "amount: choose a number above 0, at most 100"),
        ({**TEXT, "step_cache": 3}, "step_cache: give an object with preset, amount"),
        ({**TEXT, "step_cache": {"preset": "fora", "every": 3}}, "step_cache.every: step_cache has no such setting"),
        ({**TEXT, "label": 3}, "label: text_to_image has no such setting; leave it out"),
        ({"task": "text_to_image"}, "prompt: is missing; give a text"),
        ({**TEXT, "prompt": " "}, "prompt: the prompt is empty"),
        ({**TEXT, "width": 64}, "request: height and width go together"),
        ({**TEXT, "task": "sculpture"}, f"task: choose among {', '.join(TASKS)}"),
        ({"prompt": "x"}, f"task: choose among {', '.join(TASKS)}"),
        ({"task": "image_to_image", "prompt": "x", "image": "a.png"}, "image: give the hash of an image"),
        ({"task": "class_to_image", "label": []}, "choose a whole number, 0 to 1000000, or give a text of 1 to 200"),
        ({"task": "next_scale_class", "label": 1, "kv_budget": 0}, "kv_budget: choose a number above 0, at most 1"),
        ([], "request: send a JSON object"),
        (b"{", "request: the body is not valid JSON"),
        (b"[" * 5000, "request: "),
        (b"\xff", "request: "),
    ],
)  # fmt: skip
def test_errors_are_told_in_our_words(body, told):
    found = explained(body)
    assert told in found
    assert not [words for words in FOREIGN if words in found]


def test_hostile_requests_are_told_in_our_words_and_not_repeated():
    refused = 0
    for body in hostile_requests(400, seed=1):
        try:
            REQUEST.validate_python({**body, "<b>x</b>": 1} if refused % 3 == 0 else body)
        except ValidationError as error:
            refused += 1
            found = explain(error)
            assert not [words for words in (*FOREIGN, "passwd", "<", "script") if words in found], found
    assert refused > 200


def test_errors_of_one_kind_of_request_are_told_like_those_of_any():
    with pytest.raises(ValidationError) as error:
        TASKS["inpaint"].model_validate({"prompt": "x", "steps": 0, "expand": {"left": 9}})
    told = explain(error.value).split("; ")
    assert {"image: is missing", "expand.left: choose 0 to 2", "steps: choose 1 to 200"} <= set(told)
