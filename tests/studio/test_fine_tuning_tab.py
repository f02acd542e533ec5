"""The tab Fine-tune: its form, its listeners, and a person in a browser."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from filelock import FileLock
from PIL import Image

from apps.api.tokens import TokenTable, add_user
from apps.service import limits
from apps.service.engine import Engine
from apps.service.fine_tuning import FineTuning
from apps.service.fine_tuning_plan import Example
from apps.service.fine_tuning_process import FineTuningError
from apps.service.fine_tuning_run import Best, Point, Record, RunFolder
from apps.studio import fine_tune_views, loss_curve
from apps.studio.fine_tune_files import address
from apps.studio.fine_tune_handlers import BUTTONS, FineTuneHandlers, preview_prompts
from apps.studio.fine_tune_settings import SETTINGS, to_document
from apps.studio.fine_tune_views import Item
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.page_values import PageError
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.training.checkpoint_choice import Choice, Score, write_choice
from apps.training.tasks.lora_config import LoraConfig
from tests.studio.fakes import FakePipeline
from tests.studio.serving import client_of, serving_page
from tests.studio.test_fine_tuning import finished, plan
from tests.studio.test_page import ENGLISH
from tests.studio.test_server import browser, open_page, page, server

__all__ = ["browser", "page", "server"]

HERE = SimpleNamespace(session_hash="one tab", username=None, client=SimpleNamespace(host="127.0.0.1"))
FORM = {
    "ft_model": "fake", "ft_name": "cats", "ft_layers": "attention", "ft_trigger": "zxc", "ft_caption": "",
    **{f"ft_{name}": one.default for name, one in SETTINGS.items()},
}  # fmt: skip


@pytest.fixture
def tab(tmp_path):
    """Yield the listeners of the tab, on a server that asks nobody who this is."""
    with serving_tab(tmp_path, None) as one:
        yield one


@contextmanager
def serving_tab(folder, tokens):
    (folder / "out").mkdir()
    engine = Engine({"fake": "x"}, folder / "out", device="cpu", load=lambda source: FakePipeline())
    runs, sessions = FineTuning(folder / "out", engine.uploads, engine.lora_files), Sessions(tokens)
    generation = GenerationHandlers(engine, ENGLISH, sessions)
    settings = SettingsHandlers(engine, ENGLISH, sessions, generation)
    handlers = FineTuneHandlers(engine, runs, ENGLISH, sessions, settings)
    yield SimpleNamespace(handlers=handlers, runs=runs, engine=engine, folder=folder)
    engine.close()


def running(runs, name):
    """Have a run look as if it were trained."""
    folder = runs.folder(name)
    folder.change(state="running")
    runs._active = name, SimpleNamespace(stop=lambda: None, wait=lambda seconds: True, is_stopping=False)
    return folder


def files(folder, count=3):
    made = []
    for i in range(count):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(folder / f"p{i}.png")
        made.append(folder / f"p{i}.png")
    return made


def test_the_defaults_and_ranges_are_those_of_the_configuration():
    sections: Any = LoraConfig.model_fields
    config = {
        name: kind.annotation.model_fields
        for name, kind in sections.items()
        if hasattr(kind.annotation, "model_fields")  # optional sections aren't on the page
    }
    for name, one in SETTINGS.items():
        assert one.default == config[one.section][one.name].default
        assert one.read(one.default) == one.default
        assert f"ft.{name}" in ENGLISH
    assert (SETTINGS["learning_rate"].least, SETTINGS["learning_rate"].is_above) == (0, True)
    assert SETTINGS["caption_dropout"].highest == 1
    document = to_document({**FORM, "ft_resolution": 0}, "stickers", 1)
    assert document["data"]["resolution"] is None  # the model's own
    assert document["optimizer"] == {"learning_rate": LoraConfig.model_fields["optimizer"].default.learning_rate}
    assert document["run"]["save_every"] == 100
    assert to_document({**FORM, "ft_steps": 4}, "stickers", 1)["run"] == {
        "steps": 4, "batch_size": 4, "seed": 0, "preview_every": 4, "log_every": 1, "validate_every": 1,
        "save_every": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("steps", 10**9), ("steps", 2.5), ("rank", "8"), ("rank", True), ("learning_rate", 0),
     ("learning_rate", float("nan")), ("steps", float("nan")), ("steps", float("inf")), ("steps", -float("inf")),
     ("learning_rate", 1e300), ("learning_rate", 10**400), ("steps", 10**400), ("steps", [1]), ("steps", {}),
     ("preview_every", -1), ("resolution", -8), ("rank", "9" * 10**6), ("layers", ["x"] * 10**5),
     ("trigger", "x" * 10**7),
     ("caption_dropout", 1.1), ("resolution", 8), ("seed", -1), ("batch_size", None),
     ("layers", "blocks.*"), ("trigger", "x" * 201)],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(FineTuningError) as error:
        to_document({**FORM, f"ft_{name}": value}, "stickers", 1)
    from apps.studio.problems import explain

    text = explain(error.value, ENGLISH)
    assert ENGLISH(f"ft.{name}") in text
    assert not re.search(r"{\w", text)


def test_images_get_the_captions_of_files_of_their_name(tab, tmp_path):
    (tmp_path / "p1.txt").write_text("  a red\tpatch \n\n a second line ")
    (tmp_path / "alone.txt").write_text("x")
    handed = [*files(tmp_path), tmp_path / "p1.txt", tmp_path / "alone.txt"]
    told = tab.handlers.take_files(HERE, [str(file) for file in handed], [], "")
    items = told["ft_items"]
    assert [(one.name, one.caption) for one in items] == [("p0", ""), ("p1", "a red patch\na second line"), ("p2", "")]
    assert "alone.txt belongs to no image" in told["ft_problem"]
    captions = json.dumps({items[0].upload: "<b>\x00first</b>", items[2].upload: None, "other": "x"})
    told = tab.handlers.take_files(HERE, [str(tmp_path / "p1.png")], items, captions)  # the same image again
    assert [(one.name, one.caption) for one in told["ft_items"]] == [
        ("p0", "<b> first</b>"),
        ("p1", "a red patch\na second line"),
    ]
    assert "&lt;b&gt; first&lt;/b&gt;" in told["ft_cards"]
    for nonsense in ("[", "[1]", '"x"', "9" * 5000, "[" * 9000):
        assert len(tab.handlers.take_files(HERE, [], items, nonsense)["ft_items"]) == 3


def test_hostile_files_are_refused_and_the_others_taken(tab, tmp_path):
    (tmp_path / "evil.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    (tmp_path / "zip.png").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "p0.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "p1.txt").write_text("x" * (limits.MAX_PROMPT_CHARS + 1))
    (tmp_path / "big.png").write_bytes(bytes(limits.MAX_UPLOAD_BYTES + 1))
    names = ("evil.svg", "zip.png", "p0.txt", "p1.txt", "big.png")
    handed = [*files(tmp_path, 2), *(tmp_path / name for name in names)]
    told = tab.handlers.take_files(HERE, [str(file) for file in handed], [], "")
    assert [one.name for one in told["ft_items"]] == ["p0", "p1"]
    assert all(name in told["ft_problem"] for name in ("big.png", "evil.svg", "zip.png"))
    assert "<svg" not in told["ft_problem"]


def test_names_and_captions_of_any_kind_are_taken_or_refused(tab, tmp_path):
    strange = "\x1b[31m\u202e" + "x" * 90
    Image.new("RGB", (64, 64), "red").save(tmp_path / f"{strange}.png")
    (tmp_path / f"{strange}.txt").write_text("\x00a \x07cat\ud83d".encode("utf-8", "ignore").decode())
    handed = [str(tmp_path / f"{strange}.{ending}") for ending in ("png", "txt")]
    told = tab.handlers.take_files(HERE, [*handed, str(files(tmp_path, 1)[0])], [], "")
    assert [one.caption for one in told["ft_items"]] == ["a cat", ""]
    assert told["ft_items"][0].name.isprintable()
    assert "\x1b" not in told["ft_cards"]
    items = told["ft_items"]
    for length in (limits.MAX_PROMPT_CHARS + 1, 10**7):
        with pytest.raises(FineTuningError, match="A caption has"):
            tab.handlers.take_files(HERE, [], items, json.dumps({items[0].upload: "x" * length}))
    for nonsense in (7, None, [1], {"a": 1}):
        kept = tab.handlers.take_files(HERE, [], items, json.dumps({items[0].upload: nonsense, items[1].upload: "b"}))
        assert len(kept["ft_items"]) == (1 if nonsense is None else 2)


def test_nobody_trains_from_another_machine_without_a_name(tab):
    for client in (SimpleNamespace(host="192.168.1.9"), SimpleNamespace(host="testclient"), None):
        stranger = SimpleNamespace(session_hash="x", username=None, client=client)
        for act in (lambda who: tab.handlers.start(who, FORM), lambda who: tab.handlers.take_files(who, [], [], "")):
            with pytest.raises(PageError, match=r"ft\.strangers"):
                act(stranger)
    assert tab.runs.runs() == []


def test_who_may_only_look_trains_nothing(tmp_path):
    add_user(tmp_path / "users.json", "eve", "view")
    add_user(tmp_path / "users.json", "ann", "generate")
    eve = SimpleNamespace(session_hash="x", username="eve", client=None)
    ann = SimpleNamespace(session_hash="y", username="ann", client=None)
    with serving_tab(tmp_path, TokenTable(tmp_path / "users.json")) as one:
        for act in (
            lambda: one.handlers.start(eve, FORM),
            lambda: one.handlers.check(eve, FORM),
            lambda: one.handlers.take_files(eve, [], [], ""),
            lambda: one.handlers.resume(eve, "cats"),
            lambda: one.handlers.delete(eve, "cats"),
        ):
            with pytest.raises(PageError, match="no_rights"):
                act()
        assert one.handlers.owner(ann) == "ann"


def test_a_run_is_drawn_watched_and_tried(tab, tmp_path):
    items = tab.handlers.take_files(HERE, [str(file) for file in files(tmp_path)], [], "")["ft_items"]
    values = {**FORM, "ft_items": items, "ft_captions": ""}
    planned = tab.handlers._plan(values)
    assert planned.document["task"]["preview_prompts"] == ["zxc"]
    tab.runs.write(planned, "local")
    assert "<script" not in tab.handlers.list_runs(HERE, "cats")["ft_run"]
    folder = running(tab.runs, "cats")
    shown = tab.handlers.open(HERE, None)
    assert shown["ft_timer"]["active"]
    assert tab.handlers.tick(HERE, "cats", shown["ft_seen"], True) == {}  # no news
    assert tab.handlers.tick(HERE, "cats", None, False) == {}  # another tab is open
    (folder.training / "previews").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder.training / "previews" / "step-000002.png")
    (folder.training / "previews" / "prompts.txt").write_text("<i>a cat</i>\n")
    drawn = tab.handlers.tick(HERE, "cats", shown["ft_seen"], True)["ft_run"]
    assert "Preview at step 2" in drawn
    assert "&lt;i&gt;a cat" in drawn
    assert "<i>a" not in drawn
    tab.runs._active = None
    finished(tab.runs, "cats", "local")
    tab.engine.lora_files.put("cats", folder.loras(), "local")
    ended = tab.handlers.tick(HERE, "cats", shown["ft_seen"], True)
    assert not ended["ft_timer"]["active"]
    assert ("cats" in ended["lora"]["choices"], ended["lora_row"]["visible"]) == (True, True)
    tried = tab.handlers.try_it(HERE, "cats", "fake")
    assert (tried["lora"]["value"], tried["prompt"], tried["mode"]) == ("cats", "zxc", "text")
    assert (tried["lora_scale"], tried["lora_2"]["value"], "cats" in tried["lora_2"]["choices"]) == (1, "", True)


def test_previews_show_captions_of_some_images():
    items = [Item(str(i), str(i), 1, "", f"image {i}\nmore" if i else "") for i in range(9)]
    data = {"trigger": "zxc", "caption": "a cat"}
    assert preview_prompts(items, data) == ["zxc a cat", "zxc image 2", "zxc image 4", "zxc image 6"]
    assert preview_prompts(items[:2], data) == ["zxc a cat", "zxc image 1"]
    assert preview_prompts(items[:1], {"trigger": "", "caption": ""}) == []
    assert preview_prompts([Item("0", "0", 1, "", "a zxc cat")], data) == ["a zxc cat"]  # as in training


@pytest.mark.parametrize("reason", get_args(Choice.__annotations__["reason"]))
def test_every_reason_of_the_training_has_its_sentence(tmp_path, reason):
    folder = RunFolder(tmp_path / "cats")
    folder.training.mkdir(parents=True)
    write_choice(Choice(Score(2, 0.5, 0.4), reason, "in English", 12.34), "x", folder.training / "best.json")
    assert folder.best() == Best(2, 0.5, "in English", reason, 12.3)
    record = Record("cats", "ann", "fake", 4, 2, "", 0.0, "finished")
    text = fine_tune_views.run(record, folder, False, ENGLISH, fine_tune_views.ShownImages())
    assert ENGLISH(f"ft.advice.{reason}", percent=12) in text
    assert "in English" not in text


def test_a_curve_of_one_point_or_of_nonsense_is_drawn():
    assert loss_curve.draw([], 10, None, ENGLISH) == ""
    assert loss_curve.draw([Point("train", 1, float("nan"))], 10, None, ENGLISH) == ""
    assert "<circle" in loss_curve.draw([Point("train", 1, 0.0)], 0, 1, ENGLISH)
    many = loss_curve.draw([Point("train", step, 1 / step) for step in range(1, 5000)], 5000, None, ENGLISH)
    assert len(many) < 12_000


def visible(changes):
    return {name[3:] for name, one in changes.items() if name[3:] in BUTTONS and one["visible"]}


def test_every_state_offers_the_way_on(tab):
    upload = [tab.engine.uploads.add(Image.new("RGB", (8, 8), color)) for color in ("red", "blue")]
    tab.runs.write(plan([Example(one) for one in upload]), "local")
    folder = tab.runs.folder("cats")
    assert visible(tab.handlers.show(HERE, "cats")) == {"resume", "delete"}
    folder.change(state="failed", reason="ft.start")
    shown = tab.handlers.show(HERE, "cats")
    assert visible(shown) == {"resume", "delete"}
    assert ENGLISH("error.ft.start") in shown["ft_run"]
    assert ENGLISH("ft.again") in shown["ft_run"]
    folder.change(state="running", reason="")  # its end could not be written: nothing trains
    shown = tab.handlers.stop(HERE, "cats")
    assert visible(shown) == {"resume", "delete"}
    assert not shown["ft_timer"]["active"]
    assert ENGLISH("ft.lost") in shown["ft_run"]
    finished(tab.runs, "cats", "local")
    assert visible(tab.handlers.show(HERE, "cats")) == {"try", "download", "delete"}
    running(tab.runs, "cats")
    assert visible(tab.handlers.show(HERE, "cats")) == {"stop"}
    tab.runs._active = None


def test_a_refusal_shows_how_the_run_stands(tab, tmp_path, monkeypatch):
    items = tab.handlers.take_files(HERE, [str(file) for file in files(tmp_path)], [], "")["ft_items"]
    values = {**FORM, "ft_items": items, "ft_captions": ""}

    def fail(*given):
        raise OSError("no such program")

    monkeypatch.setattr("apps.service.fine_tuning.TrainingProcess", fail)
    told = tab.handlers.start(HERE, values)
    assert ENGLISH("error.ft.start") in told["ft_problem"]
    assert "ft_name" not in told  # it is kept for the next attempt
    assert (told["ft_runs"]["value"], visible(told)) == ("cats", {"resume", "delete"})
    assert tab.runs.record("cats").state == "failed"
    told = tab.handlers.resume(HERE, "cats")
    assert ENGLISH("error.ft.start") in told["ft_problem"]
    with FileLock(tab.runs.folder("cats").lock):
        for act in (tab.handlers.resume, tab.handlers.delete):
            assert "still being saved" in act(HERE, "cats")["ft_problem"]
    with pytest.raises(FineTuningError):
        tab.handlers.resume(HERE, "dogs")
    assert visible(tab.handlers.delete(HERE, "cats")) == set()


def test_a_training_whose_end_can_not_be_written_is_not_shown_as_running(tab, monkeypatch):
    upload = [tab.engine.uploads.add(Image.new("RGB", (8, 8), color)) for color in ("red", "blue")]
    tab.runs.write(plan([Example(one) for one in upload]), "local")
    folder = running(tab.runs, "cats")

    def fail(record):
        raise OSError("the disk is full")

    monkeypatch.setattr(RunFolder, "write", lambda self, record: fail(record))
    tab.runs._end(tab.runs._active[1], 1)
    assert folder.record().state == "running"
    assert (tab.runs.record("cats").state, tab.runs.record("cats").reason) == ("stopped", "ft.lost")
    assert tab.runs.running is None


def test_nobody_looks_at_runs_of_others_or_from_elsewhere(tmp_path):
    for name, role in (("ann", "generate"), ("bob", "generate"), ("root", "admin")):
        add_user(tmp_path / "users.json", name, role)
    who = {name: SimpleNamespace(session_hash=name, username=name, client=None) for name in ("ann", "bob", "root")}
    with serving_tab(tmp_path, TokenTable(tmp_path / "users.json")) as one:
        upload = [one.engine.uploads.add(Image.new("RGB", (8, 8), color), "ann") for color in ("red", "blue")]
        one.runs.write(plan([Example(name) for name in upload]), "ann")
        finished(one.runs, "cats", "ann")
        one.engine.lora_files.put("cats", one.runs.folder("cats").loras(), "ann")
        for name in ("ann", "root"):
            assert "cats" in one.handlers.show(who[name], "cats")["ft_run"]
        assert "cats" not in str(one.handlers.show(who["bob"], "cats"))
        assert "cats" not in str(one.handlers.open(who["bob"], "cats"))
        for act in (one.handlers.stop, one.handlers.resume, one.handlers.delete):
            with pytest.raises(FineTuningError, match="no fine-tuning run"):
                act(who["bob"], "cats")
        with pytest.raises(FineTuningError, match="no fine-tuning run"):
            one.handlers.try_it(who["bob"], "cats", "fake")
        with pytest.raises(PageError, match=r"ft\.no_lora"):
            one.handlers.try_it(who["root"], "cats", "fake")  # it isn't offered to them


def test_a_stranger_sees_no_run(tab):
    upload = [tab.engine.uploads.add(Image.new("RGB", (8, 8), color)) for color in ("red", "blue")]
    tab.runs.write(plan([Example(one) for one in upload]), "local")
    stranger = SimpleNamespace(session_hash="x", username=None, client=SimpleNamespace(host="192.168.1.9"))
    assert "cats" not in str([tab.handlers.show(stranger, "cats"), tab.handlers.list_runs(stranger, "cats")])
    assert tab.handlers.tick(stranger, "cats", None, True) == {"ft_timer": {"active": False, "__type__": "update"}}
    with pytest.raises(PageError, match=r"ft\.strangers"):
        tab.handlers.try_it(stranger, "cats", "fake")


def test_an_image_of_a_run_is_drawn_once(tmp_path, monkeypatch):
    images, made = fine_tune_views.ShownImages(), []
    monkeypatch.setattr(fine_tune_views, "thumbnail", lambda image, side: made.append(image.size) or "data:")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert [images.data(tmp_path / "a.png") for _ in range(3)] == ["data:"] * 3
    assert len(made) == 1
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png")
    images.data(tmp_path / "a.png")
    assert made == [(8, 8), (16, 8)]
    assert images.data(tmp_path / "none.png") == ""


def test_a_lora_is_fetched_by_its_owner(tmp_path):
    with serving_page(tmp_path) as served:
        runs = served.app.state.fine_tuning
        upload = [runs._uploads.add(Image.new("RGB", (8, 8), color), "ann") for color in ("red", "blue")]
        runs.write(plan([Example(one) for one in upload]), "ann")
        with client_of(served, "ann") as client:
            assert client.get(address("cats")).status_code == 404  # there is none yet
            finished(runs, "cats", "ann")
            answer = client.get(address("cats"))
            assert (answer.status_code, answer.content) == (200, b"xx")  # the best
            assert 'filename="cats.safetensors"' in answer.headers["content-disposition"]
            assert [client.get(address(name)).status_code for name in ("dogs", "..%2Fcats", "x" * 99)] == [404] * 3
        for name, status in (("bob", 404), ("eve", 404), ("root", 200)):
            with client_of(served, name) as client:
                assert client.get(address("cats")).status_code == status
        with client_of(served) as client:
            assert client.get(address("cats")).status_code in (303, 401)


def test_the_files_of_runs_are_not_served(tmp_path):
    with serving_page(tmp_path) as served:
        runs = served.app.state.fine_tuning
        upload = [runs._uploads.add(Image.new("RGB", (8, 8), color), "ann") for color in ("red", "blue")]
        runs.write(plan([Example(one) for one in upload]), "ann")
        file = runs.folder("cats").data / "0001.png"
        assert file.is_file()
        paths = (f"/gradio_api/file={file}", "/outputs/fine-tuning", "/outputs/fine-tuning%2Fcats%2Fdata%2F0001.png")
        for name in ("ann", "bob"):
            with client_of(served, name) as client:
                assert [client.get(path).status_code for path in paths] == [403, 404, 404]


def test_a_server_without_the_page_has_no_fine_tuning(tmp_path):
    from apps.api.app import create_app

    (tmp_path / "out").mkdir()
    engine = Engine({"fake": "x"}, tmp_path / "out", device="cpu", load=lambda source: FakePipeline())
    app = create_app(engine)
    assert not hasattr(app.state, "fine_tuning")
    assert not [route for route in app.router.routes if "fine" in getattr(route, "path", "")]
    engine.close()


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_person_fine_tunes_in_a_browser(server, page, tmp_path):
    page.set_default_timeout(600_000)
    (tmp_path / "p1.txt").write_text("a fox")
    handed = [*files(tmp_path), tmp_path / "p1.txt"]
    page.get_by_role("tab", name="Fine-tune").first.click()
    page.set_input_files("#ft-files input[type=file]", handed)
    page.locator(".ft-card").nth(2).wait_for()
    assert page.locator(".ft-card textarea").nth(1).input_value() == "a fox"
    page.locator(".ft-card textarea").nth(0).fill("a ghost")
    page.fill("#ft-name :is(input, textarea)", "../fox")
    page.fill("#ft-trigger :is(input, textarea)", "fox")
    page.click("#ft-advanced > button")
    for name, value in (("steps", 4), ("batch-size", 1), ("preview-every", 2), ("rank", 2)):
        page.fill(f"#ft-{name} input", str(value))
        page.press(f"#ft-{name} input", "Tab")
    page.click("#ft-start")
    page.locator("#ft-problem [role=alert]").wait_for()
    page.fill("#ft-name :is(input, textarea)", "foxes")
    page.click("#ft-start")
    page.locator(".ft-run h3 .running").wait_for()
    page.locator(".curve svg polyline").first.wait_for()
    page.locator(".ft-run > img").wait_for()
    page.locator(".ft-run h3 .finished").wait_for()
    data = server[1] / "fine-tuning" / "foxes" / "data"
    assert [file.read_text() for file in sorted(data.glob("*.txt"))] == ["a ghost", "a fox"]
    open_page(page, server[0])  # a reload: it is read from the files
    page.get_by_role("tab", name="Fine-tune").first.click()
    page.locator(".ft-run h3 .finished").wait_for()
    assert RunFolder(server[1] / "fine-tuning" / "foxes").best() is not None
    page.click("#ft-try")
    page.wait_for_function("document.querySelector('#workspace').dataset.tab === 'text'")
    page.wait_for_function("document.querySelector('#lora input').value === 'foxes'")
    assert page.input_value("#prompt textarea") == "fox"
