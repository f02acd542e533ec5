"""Files of prompts: one reader for the command line and the page, and nothing of a file is dropped in silence."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from apps.commands.batch import read_lines
from apps.commands.given_options import make_options
from apps.service.engine import Engine
from apps.service.limits import ServerLimits
from apps.service.prompt_file import PromptFileError, parse_lines, read_text, request_fields
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.problems import PLACE
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from tests.studio.fakes import FakePipeline
from tests.studio.test_page import ENGLISH, PAGE, generate

LINE = {"prompt": "a fox", "seed": 7, "steps": 3, "size": "96x64", "num": 2, "cache": "fora:every=3", "guidance": 2.5}


def parse(text: str, most: int = 100):
    known = {"prompt", "label", "seed", "steps", "size", "num", "cache", "width", "height", "expand", "mask"}
    return parse_lines(text, "prompts.jsonl", known, most)


@pytest.fixture
def page(tmp_path):
    (tmp_path / "out").mkdir()
    engine = Engine(
        {"fake": "x"},
        tmp_path / "out",
        device="cpu",
        load=lambda source: FakePipeline(),
        server_limits=ServerLimits(queue_per_user=3),
    )
    engine.model().result(10)
    sessions = Sessions(None)
    generation = GenerationHandlers(engine, ENGLISH, sessions)
    handlers = SettingsHandlers(engine, ENGLISH, sessions, generation)

    def take(text: str | bytes):
        file = tmp_path / "prompts.jsonl"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return handlers.take_prompts(str(file))

    def generate_lines(lines, **changes):
        return list(generate(SimpleNamespace(generation=generation, sessions=sessions), many=lines, **changes))

    yield SimpleNamespace(take=take, generate=generate_lines, engine=engine)
    engine.close()


def test_a_line_carries_fields_of_a_request_under_both_names():
    fields = request_fields(parse(json.dumps({**LINE, "guidance": 2}).replace('"guidance": 2', '"seed": 7'))[0])
    assert fields["width"], fields["height"] == (96, 64)
    assert (fields["seed"], fields["num_images"]) == (7, 2)
    assert fields["step_cache"].model_dump() == {"preset": "fora", "amount": 3}
    same = {"width": 96, "height": 64, "prompt": "a fox"}
    assert request_fields(parse(json.dumps(same))[0]) == same


@pytest.mark.parametrize(
    ("row", "key", "said"),
    [
        ('{"prompt": "x", "steps": 0}', "steps", "choose 1 to 200"),
        ('{"prompt": "x", "size": "97x64"}', "size", "multiple of 8"),
        ('{"prompt": "x", "width": 97, "height": 64}', "width", "multiple of 8"),
        ('{"prompt": "x", "cache": "magic"}', "cache", "magic"),
        ('{"prompt": " "}', "prompt", "empty"),
        ('{"prompt": "x", "mask": "/etc/passwd"}', "mask", "hash"),
    ],
)
def test_a_value_out_of_range_refuses_the_file_with_line_and_key(row, key, said):
    lines = parse("# a comment\na fox\n" + row)
    assert request_fields(lines[0]) == {"prompt": "a fox"}
    with pytest.raises(PromptFileError, match=said) as caught:
        request_fields(lines[1])
    assert (caught.value.values["line"], caught.value.values["key"]) == (3, key)


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("a fox\n{no json", "file.json", {"line": 2}),
        ('"unfinished', "file.json", {"line": 1}),
        ('a fox\n[{"prompt": "a cat"}]', "file.list", {"line": 2}),
        ('a fox\n\n{"prompt": "x", "step": 3}', "file.key", {"line": 3, "key": "step"}),
        ('{"steps": 3}', "file.prompt", {"line": 1, "key": "prompt"}),
        ("# nothing\n\n", "file.empty", {"file": "prompts.jsonl"}),
        ("a fox\n" * 101, "file.lines", {"value": 101, "most": 100}),
    ],
)
def test_a_line_that_is_not_understood_refuses_the_file(text, key, values):
    assert parse("[sketch] a fox")[0].values == {"prompt": "[sketch] a fox"}  # a bracket alone is no JSON
    with pytest.raises(PromptFileError) as caught:
        parse(text)
    assert caught.value.key == key
    assert values.items() <= caught.value.values.items()
    with pytest.raises(PromptFileError, match="UTF-8"):
        read_text(b"\xff\xfea", "prompts.txt")


def test_the_command_line_takes_names_of_requests_too(tmp_path):
    (tmp_path / "batch.jsonl").write_text(
        '{"prompt": "x", "width": 96, "height": 64, "num_images": 2, "step_cache": {"preset": "fora", "amount": 3},'
        ' "expand": {"left": 0.5}, "finish_after": 2}'
    )
    (line,) = read_lines(tmp_path / "batch.jsonl", make_options())
    assert (line.options.size, line.options.num, line.options.cache) == ("96x64", 2, "fora:every=3")
    assert line.options.expand == "left=0.5"
    assert line.options.finish_after == 2


def test_names_of_files_stay_as_they_were(tmp_path):
    """A second run of an old batch finds what the first one has done."""
    (tmp_path / "batch.jsonl").write_text('a red apple\n{"prompt": "a fox", "seed": 4}\n')
    assert [line.name for line in read_lines(tmp_path / "batch.jsonl", make_options(steps=2))] == [
        "00001-b0b5bffc", "00002-d7145c0d",
    ]  # fmt: skip


def test_settings_of_a_line_replace_those_of_the_page(page):
    changes = page.take('a cat\n{"prompt": "a fox", "seed": 7, "steps": 3, "size": "96x64", "guidance": 2.5}\n')
    seen = [one for changed in page.generate(changes["many"]) for one in changed.get("visit", ())]
    found = {one.settings.prompt: one.settings for one in seen}
    assert (found["a cat"].steps, found["a cat"].seed) == (PAGE["steps"], PAGE["seed"])
    fox = found["a fox"]
    assert (fox.steps, fox.seed, fox.width, fox.height, fox.guidance) == (3, 7, 96, 64, 2.5)


def test_as_many_prompts_are_taken_as_the_queue_holds_and_no_more(page):
    assert len(page.take("a fox\n" * 3)["many"]) == 3
    refused = page.take("a fox\n" * 4)
    assert refused["many"] == []
    assert "has 4 prompts" in refused[PLACE]
    assert "at most 3" in refused[PLACE]


def test_a_file_that_does_not_fit_into_the_queue_is_queued_not_at_all(page):
    lines = page.take("a fox\n" * 3)["many"]
    page.engine.limits = ServerLimits(queue_per_user=2)
    said = page.generate(lines)
    assert "at most 2 fit" in said[-1][PLACE]
    assert page.engine.jobs() == []


def test_a_wrong_file_takes_the_place_of_no_other_and_names_the_line(page):
    refused = page.take('a fox\n{"prompt": "x", "steps": 1000}')
    assert refused["many"] == []
    assert "Line 2, steps" in refused[PLACE]
    assert "\u201cSteps\u201d is 1000: choose 1 to 200" in refused[PLACE]
    assert "UTF-8" in page.take(b"\xff\xfe")[PLACE]
    lines = page.take('{"prompt": "x", "kv_policy": "full"}')["many"]  # of another task
    assert "Line 1, kv_policy" in page.generate(lines)[-1][PLACE]


def test_a_wrong_file_is_refused_in_the_language_of_the_page(page):
    handlers = SettingsHandlers(
        page.engine, Strings("zh"), Sessions(None), GenerationHandlers(page.engine, Strings("zh"), Sessions(None))
    )
    file = page.engine.output_dir / "prompts.txt"
    file.write_text('{"prompt": "x", "steps": 1000}')
    said = handlers.take_prompts(str(file))[PLACE]
    assert "\u6b65\u6570" in said  # the label of the steps
    assert "choose" not in said
