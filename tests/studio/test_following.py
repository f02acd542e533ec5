"""Jobs belong to the user and not to the page: what a page shows of them, whoever opened it and whenever."""

from __future__ import annotations

import asyncio
import re
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from apps.service.engine import Engine
from apps.service.limits import ServerLimits
from apps.service.metadata import read_picture
from apps.service.prompt_file import PromptLine
from apps.service.requests import TextToImageRequest
from apps.studio import views
from apps.studio.album import Shown
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.wiring import POLL_SECONDS, paced
from tests.studio.fakes import FakePipeline
from tests.studio.test_page import ENGLISH, PAGE, TAB, follow, followed, generate, pictures, studio  # noqa: F401

PHONE = SimpleNamespace(session_hash="another tab", username=None)


def until(told, part, text):
    """Return the changes up to the first that says a text in a part of the page."""
    seen = []
    for changes in told:
        seen.append(changes)
        if text in changes.get(part, ""):
            return seen
    raise AssertionError(f"{part} never said {text!r}")


def last(told, part):
    """Return what was said of a part last."""
    return [changes[part] for changes in told if part in changes][-1]


def open_studio(folder, step_seconds=0.01, pipe=None, **limits):
    pipe = pipe or FakePipeline(step_seconds)
    engine = Engine({"fake": "x"}, folder, device="cpu", load=lambda source: pipe, server_limits=ServerLimits(**limits))
    engine.model().result(10)
    sessions = Sessions(None)
    generation = GenerationHandlers(engine, ENGLISH, sessions)
    handlers = SettingsHandlers(engine, ENGLISH, sessions, generation)
    return SimpleNamespace(engine=engine, generation=generation, handlers=handlers, sessions=sessions, pipe=pipe)


def acts_on(told):
    """Return what the buttons act on, after checking that they are on exactly if there is something."""
    told = list(told)
    chosen = last(told, "chosen")
    for name in ("save", "reuse_seed", "reuse_settings"):
        assert last(told, name)["interactive"] is (chosen is not None), name
    return chosen


# ----------------------------------------------------------------------------- one page


def test_a_picture_reaches_strip_and_stage_as_the_file_itself(studio):  # noqa: F811
    told = list(generate(studio, num_images=2))
    visit = pictures(told)
    assert [item.settings.seed for item in visit] == [4, 3]  # newest first
    assert read_picture(visit[0].path) == visit[0].settings
    assert views.file_address(visit[0].path) in last(told, "stage")
    assert acts_on(told) == visit[0]
    captions = [caption.splitlines() for _, caption in last(told, "strip")["value"]]
    assert captions == [["4", "a fox, seed 4"], ["3", "a fox, seed 3"]]  # the second line is for screen readers
    assert "Done in" in last(told, "stage")
    buttons = [changes["stop"]["interactive"] for changes in told if "stop" in changes]
    assert (buttons[0], buttons[-1]) == (True, False)


def test_a_second_click_waits_in_line_and_is_shown_in_its_turn(studio):  # noqa: F811
    first = generate(studio, steps=30)
    until(first, "stage", "Step")
    second = studio.generation.generate({**PAGE, "seed": 50}, TAB)
    assert "1 waiting" in second["queue_note"]
    assert second["clear"]["visible"] is True
    assert "stage" not in second  # which shows the first one
    assert [item.settings.seed for item in pictures(first)] == [50, 3]


def test_the_line_can_be_cleared(studio):  # noqa: F811
    job = generate(studio, steps=30)
    until(job, "stage", "Step")
    for seed in (50, 51):
        studio.generation.generate({**PAGE, "seed": seed}, TAB)
    assert studio.generation.clear(TAB)["queue_note"] == ""
    assert [item.settings.seed for item in pictures(job)] == [3]
    assert [one.state for one in studio.engine.jobs()] == ["stopped", "stopped", "done"]


def test_the_line_can_be_reordered_and_one_of_it_removed(studio):  # noqa: F811
    first = generate(studio, steps=60)
    until(first, "stage", "Step")
    told = [studio.generation.generate({**PAGE, "seed": s, "prompt": f"a fox <b>{s}</b>"}, TAB) for s in (50, 60, 70)]
    assert told[-1]["order"]["visible"] is True
    jobs = [job for _, job in told[-1]["waiting"]["choices"]]
    assert [title for title, _ in told[-1]["waiting"]["choices"]][1] == "2. a fox <b>60</b>"

    moved = studio.generation.move(TAB, jobs[2], -1)["waiting"]
    assert (moved["value"], [job for _, job in moved["choices"]]) == (jobs[2], [jobs[0], jobs[2], jobs[1]])
    for job, by in ((jobs[0], -1), (jobs[1], 1), ("0" * 16, 1), (None, 1)):  # at the ends, and what isn't in line
        order = studio.generation.move(PHONE, job, by)["waiting"]["choices"]
        assert [one for _, one in order] == [jobs[0], jobs[2], jobs[1]]
    left = studio.generation.drop(PHONE, jobs[0])  # the queue of the same user, whatever page
    assert "2 waiting" in left["queue_note"]
    assert studio.engine.job(jobs[0]).state == "stopped"
    seen = [*first]
    assert [item.settings.seed for item in pictures(seen)] == [60, 70, 3]  # as they were finished
    assert seen[-2]["order"]["visible"] is False


def test_one_picture_of_several_is_skipped(studio):  # noqa: F811
    told = generate(studio, num_images=2, steps=30)
    seen = until(told, "stage", "Image 1")
    assert last(seen, "skip")["visible"] is True
    studio.generation.skip(TAB, followed(seen))
    seen += told
    assert [item.settings.seed for item in pictures(seen)] == [4]
    assert last(seen, "skip")["visible"] is False
    alone = [changes["skip"]["visible"] for changes in generate(studio) if "skip" in changes]
    assert set(alone) == {False}  # nothing to go on with


class BatchPipeline(FakePipeline):
    """Generates several images at once, all the same."""

    def __call__(
        self, prompt, negative_prompt=None, height=None, width=None, num_inference_steps=28, guidance_scale=4.0,
        generator=None, num_images_per_prompt=1, output_type="pil", callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=("latents",),
    ):  # fmt: skip
        first = generator[0] if isinstance(generator, list) else generator
        found = self._run(height, width, num_inference_steps, first, callback_on_step_end,
                          callback_on_step_end_tensor_inputs)  # fmt: skip
        return SimpleNamespace(images=found.images * num_images_per_prompt)


def test_images_are_counted_and_not_batches(tmp_path):
    here = open_studio(tmp_path, pipe=BatchPipeline(0.01))
    notes = [changes.get("stage", "") for changes in generate(here, num_images=3, batch_size=2, steps=20)]
    assert any("Images 1 to 2 of 3" in note for note in notes)
    assert any("Image 3 of 3" in note for note in notes)
    bars = [float(found) for note in notes for found in re.findall(r'<div class="bar"><i style="width:([\d.]+)%', note)]
    assert bars == sorted(bars)
    here.engine.close()


def test_many_prompts_are_all_queued_or_none(tmp_path):
    here = open_studio(tmp_path, queue_per_user=3)
    running = generate(here, steps=200)
    until(running, "stage", "Step")
    refused = here.generation.generate({**PAGE, "many": [PromptLine(i, {"prompt": "a fox"}) for i in range(3)]}, TAB)[
        "problem"
    ]
    for number in ("3 requests", "1 of yours", "at most 3"):
        assert number in refused
    assert len(here.engine.jobs()) == 1
    here.engine.close()


def test_fast_steps_do_not_flood_the_page(tmp_path):
    here = open_studio(tmp_path, 0.0)
    here.generation.generate({**PAGE, "steps": 150, "num_images": 4}, TAB)

    async def told():
        return [one async for one in paced(here.generation.following.follow(TAB, (), None)) if "stage" in one]

    started = time.monotonic()
    steps = asyncio.run(told())
    assert 1 <= len(steps) <= (time.monotonic() - started) / POLL_SECONDS + 4 < 600
    here.engine.close()


# ------------------------------------------------------------- what the stage shows, and what acts


def test_after_stop_the_buttons_act_on_what_the_stage_shows(studio):  # noqa: F811
    (first,) = pictures(generate(studio, seed=9))
    told = generate(studio, steps=100)
    seen = until(told, "stage", 'class="preview"')
    assert acts_on(seen) is None
    assert last(seen, "details") == ""
    studio.generation.stop(TAB, followed(seen))
    seen += told
    assert "Stopped" in last(seen, "stage")
    assert views.file_address(first.path) in last(seen, "stage")
    assert acts_on(seen) == first
    assert "seed 9" in last(seen, "details")


def test_nothing_acts_on_an_empty_stage(studio):  # noqa: F811
    told = generate(studio, steps=100)
    seen = until(told, "stage", "Step")
    studio.generation.stop(TAB, followed(seen))
    seen += told
    assert acts_on(seen) is None
    assert "<img" not in last(seen, "stage")


def test_an_error_has_its_own_place_and_goes_with_the_next_request(studio):  # noqa: F811
    (first,) = pictures(generate(studio, seed=9))
    refused = studio.generation.generate({**PAGE, "prompt": ""}, TAB)
    assert set(refused) == {"problem"}
    failed = list(generate(studio, style="unheard of"))  # is found out when the job begins
    assert 'role="alert"' in last(failed, "problem")
    assert views.file_address(first.path) in last(failed, "stage")
    assert acts_on(failed) == first
    assert next(generate(studio))["problem"] == ""


def test_a_picture_that_was_chosen_stays_while_others_are_generated(studio):  # noqa: F811
    (first,) = pictures(generate(studio, seed=9))
    told = generate(studio, steps=60)
    seen = until(told, "stage", 'class="preview"')
    studio.generation.displays.hold(TAB, first)
    seen = until(told, "queue_note", "Step")
    assert acts_on(seen) == first
    rest = list(told)
    assert not any("stage" in changes for changes in rest)
    assert len(pictures(rest)) == 2
    assert "chosen" in studio.generation.generate(PAGE, TAB)  # asking again shows what comes
    assert acts_on(follow(studio, seen=studio.generation.album.names("local"))).settings.seed == 3


# ------------------------------------------------------------------------- pages come and go


def test_closing_a_page_stops_nothing_and_another_one_goes_on(studio):  # noqa: F811
    page = generate(studio, steps=100, num_images=2)
    until(page, "stage", "Image 1")
    studio.generation.generate({**PAGE, "seed": 50}, TAB)
    page.close()
    jobs = [job.id for job in studio.engine.unfinished("local")]
    assert [studio.engine.job(job).state for job in jobs] == ["running", "queued"]

    other = follow(studio, PHONE, seen=None)
    seen = until(other, "stage", "Image 1 of 2")
    assert followed(seen) == jobs[0]
    assert last(seen, "stop")["interactive"] is True
    assert last(seen, "skip")["visible"] is True
    assert [job for _, job in last(seen, "waiting")["choices"]] == jobs[1:]
    studio.generation.skip(PHONE, followed(seen))
    seen += other
    assert [item.settings.seed for item in pictures(seen)] == [50, 4]


def test_two_pages_see_the_same_queue(studio):  # noqa: F811
    first = generate(studio, steps=100)
    until(first, "stage", "Step")
    second = follow(studio, PHONE, seen=None)
    until(second, "stage", "Step")
    studio.generation.generate({**PAGE, "seed": 50}, TAB)
    until(second, "queue_note", "1 waiting")
    job = studio.engine.waiting("local")[0]
    studio.generation.drop(PHONE, job)
    assert last(until(first, "queue_note", ""), "queue_note") == ""
    studio.generation.stop(PHONE, studio.engine.unfinished("local")[0].id)
    assert any("Stopped" in changes.get("stage", "") for changes in first)
    assert any("Stopped" in changes.get("stage", "") for changes in second)


def test_a_page_that_opens_shows_what_was_finished_last(studio):  # noqa: F811
    list(generate(studio, seed=9, num_images=2))
    opened = list(follow(studio, PHONE, seen=None))
    assert acts_on(opened).settings.seed == 10
    assert [item.settings.seed for item in pictures(opened)] == [10, 9]
    assert studio.generation.following.look(PHONE, last(opened, "seen")) == ""
    list(generate(studio, seed=20))
    assert studio.generation.following.look(PHONE, last(opened, "seen")) != ""
    assert acts_on(follow(studio, PHONE, last(opened, "seen"), acts_on(opened))).settings.seed == 20


def test_a_page_follows_after_a_restart_of_the_server(tmp_path):
    before = open_studio(tmp_path, 0.02)
    page = generate(before, steps=30, num_images=2)
    until(page, "stage", "Image 1")
    before.generation.generate({**PAGE, "seed": 50}, TAB)
    jobs = [job.id for job in before.engine.unfinished("local")]
    before.engine.close()
    assert not any("Stopped" in changes.get("stage", "") for changes in page)

    after = open_studio(tmp_path)
    opened = list(follow(after, PHONE, seen=None))
    assert [changes["job"] for changes in opened if "job" in changes] == [*jobs, None]
    assert [item.settings.seed for item in pictures(opened)] == [50, 4, 3]
    after.engine.close()


def test_another_job_of_the_user_that_begins_first_is_followed(tmp_path):
    """Moved to the front, or asked for on another device, while the page shows one that waits."""
    here = open_studio(tmp_path)
    foreign = here.engine.submit(TextToImageRequest(prompt="x", height=64, width=64, steps=100), "somebody else")
    assert here.pipe.in_step.wait(10)
    told = generate(here, seed=50)
    seen = until(told, "stage", "1 ahead in the queue")
    here.generation.generate({**PAGE, "seed": 60}, PHONE)
    first, second = here.engine.waiting("local")
    here.generation.move(PHONE, second, -1)
    here.engine.stop(foreign)
    seen += told
    assert [changes["job"] for changes in seen if changes.get("job")] == [first, second, first]
    assert [item.settings.seed for item in pictures(seen)] == [50, 60]
    here.engine.close()


def test_a_preview_after_a_finished_picture_takes_the_buttons_with_it(studio):  # noqa: F811
    told = generate(studio, num_images=2, steps=40)
    seen = until(told, "stage", "Image 2")
    for changes in told:
        seen.append(changes)
        if 'class="preview"' in changes.get("stage", "") and "Image 2" in changes["stage"]:
            break
    assert acts_on(seen) is None
    assert isinstance(acts_on([*seen, *told]), Shown)


@pytest.mark.parametrize(("finish_after", "said"), [(None, "60 steps"), (5, "5 of 60 steps"), (60, "60 steps")])
def test_facts_say_how_many_steps_were_taken(studio, finish_after, said):  # noqa: F811
    settings = pictures(generate(studio))[0].settings
    ended = settings.model_copy(update={"steps": 60, "finish_after": finish_after})
    assert f"<span>{said}</span>" in views.details(ended, 1.0, ENGLISH)


def test_a_picture_whose_file_is_gone_is_not_shown(studio):  # noqa: F811
    for one in pictures(generate(studio, num_images=2))[:1]:
        one.path.unlink()
    opened = list(follow(studio, PHONE, seen=None))
    assert [item.settings.seed for item in pictures(opened)] == [3]
    with Image.open(acts_on(opened).path) as image:
        assert image.size == (64, 64)
