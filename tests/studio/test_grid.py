"""Grids on the page: jobs of their user like any other, found again, repeated from their sheet, read on a phone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from apps.service.gallery_store import Person, Wanted
from apps.service.grid import Axis, Filled, compose, mosaic
from apps.service.metadata import MetadataError, parse
from apps.service.prompt_file import PromptLine
from apps.service.requests import TextToImageRequest
from apps.service.sheet import CHUNK, GridSettings, read_sheet, save_sheet
from apps.studio import grid_view
from apps.studio.album import ShownSheet
from apps.studio.gallery_tab import GalleryHandlers, record_sheets
from apps.studio.grids import GridRecord
from apps.studio.page_values import PageError
from apps.studio.problems import PLACE
from apps.studio.sessions import Sessions
from tests.studio.test_following import PHONE, acts_on, last, open_studio, until
from tests.studio.test_page import ENGLISH, PAGE, TAB, follow, followed, generate, pictures

LOCAL = Person("local")
GRID = {"mode": "grid", "grid_x": "steps", "grid_x_values": "2, 3", "grid_y": "guidance", "grid_y_values": "1, 4.5"}


@pytest.fixture
def here(tmp_path):
    studio = open_studio(tmp_path)
    yield studio
    studio.engine.close()


def sheets(folder):
    return sorted(folder.glob("*-grid-*.png"))


def test_a_grid_is_generated_cell_by_cell_and_its_sheet_repeats_it(here, tmp_path):
    told = list(
        generate(
            here, **GRID, seed=7, num_images=4, batch_size=2, many=[PromptLine(1, {"prompt": "not asked for here"})]
        )
    )
    assert any("Cell 2 of 4" in changes.get("stage", "") for changes in told)
    sheet = acts_on(told)
    assert isinstance(sheet, ShownSheet)
    assert sheets(tmp_path) == [sheet.path]
    assert last(told, "save")["value"] == str(sheet.path)
    assert last(told, "start_from")["interactive"] is False
    cells = [parse(one.settings) for one in here.engine.history()]
    assert {(one.steps, one.guidance, one.seed, one.prompt) for one in cells} == {
        (2, 1.0, 7, "a fox"), (3, 1.0, 7, "a fox"), (2, 4.5, 7, "a fox"), (3, 4.5, 7, "a fox"),
    }  # fmt: skip
    for said in ("seed 7", "Steps: 2, 3", "Guidance: 1, 4.5", "4 of 4 cells"):
        assert said in last(told, "details")

    assert here.handlers.reuse_seed(sheet)["seed"] == 7
    changes = here.handlers.load_settings(str(sheet.path))
    assert changes == here.handlers.reuse_settings(sheet)
    assert (changes["mode"], changes["tabs"]["selected"], changes["grid_y_values"]) == ("grid", "grid", "1, 4.5")
    again = acts_on(generate(here, **{name: value for name, value in changes.items() if name in PAGE}))
    assert again.record.settings == sheet.record.settings
    assert again.path != sheet.path
    with Image.open(again.path) as one:
        assert one.width > 2 * 192


def test_what_a_style_or_an_open_size_was_comes_back(here):
    """The request is repeated, and not the settings of a cell, in which both are settled."""
    asked = GRID | {"grid_y": "style", "grid_y_values": "off, watercolour", "shape": "auto", "style": "watercolour"}
    sheet = acts_on(generate(here, **asked))
    changes = here.handlers.load_settings(str(sheet.path))
    assert (changes["prompt"], changes["style"], changes["shape"]) == ("a fox", "watercolour", "auto")


def test_a_grid_is_in_the_strip_and_in_the_gallery_before_its_cells(here):
    list(generate(here, **GRID))
    list(generate(here, seed=50))
    items = here.engine.gallery.page(LOCAL, Wanted(), 10)
    assert [item.kind for item in items] == ["image", "sheet", "image", "image", "image", "image"]
    gallery = GalleryHandlers(here.engine, Sessions(None), here.generation)
    looked = gallery.pick(TAB, f"{items[1].number} use")
    sheet = looked["chosen"]
    assert isinstance(sheet, ShownSheet)
    assert "<table>" in looked["stage"]
    assert (items[1].text, items[1].seed, items[1].width > 0) == ("a fox", None, True)
    opened = list(follow(here, PHONE, seen=None))
    assert [caption.splitlines()[0] for _, caption in last(opened, "strip")["value"]][:2] == ["50", "Grid"]
    sheet.path.unlink()  # by its user, and the cells stay
    with pytest.raises(PageError, match="gone"):
        gallery.pick(TAB, f"{items[1].number} use")


def test_a_sheet_of_an_older_version_comes_into_the_gallery(here):
    list(generate(here, **GRID))
    with here.engine._store.using() as db:
        db.execute("DELETE FROM gallery_items WHERE kind = 'sheet'")
    for _ in range(2):
        record_sheets(here.engine)
        assert len(here.engine.gallery.page(LOCAL, Wanted(kind="sheet"), 10)) == 1
    gone = here.engine.gallery.remove(LOCAL, [here.engine.gallery.page(LOCAL, Wanted(kind="image"), 1)[0].number])
    assert len(gone.numbers) == 2  # the sheet shows what was deleted
    record_sheets(here.engine)
    assert here.engine.gallery.numbers(LOCAL, Wanted(kind="sheet")) == []


def test_the_thumbnail_of_a_grid_fits_a_dark_page_too(here):
    """The sheet, a file, is white wherever it is opened; its small view on the page has no ground of its own."""
    told = list(generate(here, **GRID))
    sheet = acts_on(told)
    with Image.open(sheet.path) as file:
        assert file.mode == "RGB"
        assert file.getpixel((file.width - 1, 0)) == (255, 255, 255)
    small = last(told, "strip")["value"][0][0]
    assert small.mode == "RGBA"
    gaps = [small.getpixel((small.width // 2, 0)), small.getpixel((0, small.height // 2))]
    assert {gap[3] for gap in gaps} == {0}
    corners = [small.getpixel((x, y)) for x in (0, small.width - 1) for y in (0, small.height - 1)]
    assert {corner[3] for corner in corners} == {255}
    assert last(list(follow(here, PHONE, seen=None)), "strip")["value"][0][0] is small  # made once
    told = list(generate(here, **GRID | {"grid_y": "", "grid_y_values": ""}))
    wide = last(told, "strip")["value"][0][0]
    assert wide.width == wide.height  # the page would cut the sides off
    top, middle = (wide.getpixel((wide.width // 4, y)) for y in (0, wide.height // 2))
    assert (top[3], middle[3]) == (0, 255)


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 2, 1), (2, 1, 4), (8, 8, 1)])
@pytest.mark.parametrize("size", [(64, 64), (96, 32), (16, 256)])
def test_a_mosaic_holds_every_cell_in_its_place(counts, size):
    axes = [Axis("seed", tuple(map(str, range(count)))) for count in counts]
    places = list(itertools.product(*map(range, counts)))
    cells = {place: Image.new("RGB", size, (25 * place[0], 25 * place[1], 25 * place[2])) for place in places}
    laid = mosaic(axes, cells, 320)
    assert max(laid.size) <= 320
    columns, rows = counts[0], counts[1] * counts[2]
    cells_of = [(x, z * counts[1] + y, (25 * x, 25 * y, 25 * z, 255)) for x, y, z in places]
    for column, row, tone in cells_of:
        box = (column * laid.width // columns, row * laid.height // rows,
               -(-(column + 1) * laid.width // columns), -(-(row + 1) * laid.height // rows))  # fmt: skip
        counted = {colour: count for count, colour in laid.crop(box).getcolors(1 << 20) or [] if colour[3]}
        assert max(counted, key=lambda colour: counted[colour]) == tone


def test_a_reload_finds_a_grid_and_goes_on_with_it(here, tmp_path):
    page = generate(here, **GRID | {"grid_x_values": "40, 41"})
    until(page, "stage", "Cell 2 of 4")
    page.close()
    other = follow(here, PHONE, seen=None)
    seen = until(other, "stage", "Cell 3 of 4")
    assert acts_on(seen) is None
    assert last(seen, "stage").count("<img") == 2
    titles = [title for title, _ in last(seen, "waiting")["choices"]]
    assert titles == ["1. Grid: steps 41, guidance 4.5"]
    seen += other
    assert acts_on(seen).path in sheets(tmp_path)


def test_a_restart_finds_a_grid_and_a_sheet_that_nobody_was_there_to_see(here, tmp_path):
    here.generation.generate({**PAGE, **GRID, "grid_x_values": "20, 21"}, TAB)
    here.engine.close()
    after = open_studio(tmp_path, 0.0)
    for job in after.engine.unfinished("local"):
        assert after.engine.stream(job.id).wait_closed(20)
    assert sheets(tmp_path) == []
    sheet = acts_on(follow(after, PHONE, seen=None))
    assert [sheet.path] == sheets(tmp_path)
    assert len(sheet.record.jobs) == 4
    after.engine.close()


def test_stop_ends_what_is_left_of_a_grid_and_skip_one_cell(here):
    told = generate(here, **GRID | {"grid_x_values": "50, 60"})
    seen = until(told, "stage", "Cell 1")
    here.generation.skip(TAB, followed(seen))
    seen = until(told, "stage", "Cell 3")
    here.generation.stop(TAB, followed(seen))
    seen += told
    assert "Stopped" in last(seen, "stage")
    assert [one.state for one in here.engine.jobs()] == ["stopped", "stopped", "done", "done"]
    assert "1 of 4 cells" in last(seen, "details")
    assert acts_on(seen).record.settings.axes[0].values == ("50", "60")
    assert pictures(generate(here))


def test_a_grid_that_does_not_fit_is_refused_as_a_whole(tmp_path):
    studio = open_studio(tmp_path, queue_per_user=3)
    refused = studio.generation.generate({**PAGE, **GRID}, TAB)["problem"]
    assert "4 requests" in refused
    assert "at most 3" in refused
    assert studio.engine.jobs() == []
    assert list(follow(studio, seen=None))[-1]["job"] is None
    studio.engine.close()


def test_two_grids_at_the_same_moment_have_sheets_of_their_own(here, tmp_path):
    asked = [here.generation.generate({**PAGE, **GRID, "seed": seed}, TAB) for seed in (1, 2)]
    assert all(changes["problem"] == "" for changes in asked)
    list(follow(here))
    assert len(sheets(tmp_path)) == 2
    assert {read_sheet(path).request.seed for path in sheets(tmp_path)} == {1, 2}


# ------------------------------------------------------------------------------ metadata


def settings_of(**changes):
    axes = (Axis("steps", ("2", "3")), Axis(), Axis())
    return GridSettings(axes=axes, request=TextToImageRequest(prompt="a fox", seed=1, **changes))


def test_a_file_carries_a_grid_only_if_it_passes_the_checks(here, tmp_path):
    plain = Image.new("RGB", (8, 8))
    path = save_sheet(plain, tmp_path / "sheet.png", settings_of())
    assert read_sheet(path) == settings_of()
    assert read_sheet(save_sheet(plain, tmp_path / "bare.png", settings_of(), keep_settings=False)) is None
    (tmp_path / "x.png").write_bytes(b"\x89PNG but no")
    assert read_sheet(tmp_path / "x.png") is None
    good = json.loads(settings_of().model_dump_json())
    hostile = [
        "{" * 100_000,
        "x" * 100_000,
        json.dumps(good | {"path": "/etc"}),
        json.dumps(good | {"axes": [{"name": "module", "values": ["os"]}, {}, {}]}),
        json.dumps(good | {"axes": [{"name": "steps", "values": ["1"] * 99}, {}, {}]}),
        json.dumps(good | {"axes": [{"name": "steps", "values": ["1000000"]}, {}, {}]}),
        json.dumps(good | {"request": {**good["request"], "seed": None}}),
    ]
    for text in hostile:
        chunk = PngImagePlugin.PngInfo()
        chunk.add_itxt(CHUNK, text)
        plain.save(tmp_path / "hostile.png", pnginfo=chunk)
        with pytest.raises(MetadataError, match="settings"):
            read_sheet(tmp_path / "hostile.png")
        assert set(here.handlers.load_settings(str(tmp_path / "hostile.png"))) == {PLACE}


def test_a_sheet_without_settings_is_one_that_was_asked_for_without(here):
    assert read_sheet(acts_on(generate(here, **GRID, keep_settings=False)).path) is None


# ---------------------------------------------------------------------------------- looks


def test_the_labels_of_the_page_are_text_and_escaped():
    axes = (Axis("prompt", ("<b>", "dog")), Axis("steps", ("2",)), Axis("seed", ("1", "2")))
    request = TextToImageRequest(prompt="a <b>", seed=1)
    record = GridRecord(
        id="0" * 16, created=0.0, settings=GridSettings(axes=axes, request=request), jobs=("a", "b", "c", "d")
    )
    cells = {(1, 0, 1): (Path("/out/cell 1.png"), 2.25)}
    drawn = grid_view.table(record, cells, ENGLISH, busy=(0, 0, 0))
    assert "<b>" not in drawn
    assert drawn.count("<table>") == 2
    assert '<th scope="row"><span>Steps</span> 2</th>' in drawn
    assert "<caption><span>Seed</span> 2</caption>" in drawn
    assert 'alt="Prompt (replace) dog, Steps 2, Seed 2"' in drawn
    assert "2.2 s" in drawn
    assert drawn.count('class="cell busy"') == 1
    assert record.label("b") == "prompt dog, steps 2, seed 1"


def test_the_labels_of_a_sheet_are_legible_at_the_width_of_a_phone():
    """A sheet of three cells is shown at about half its size there: letters need 20 pixels for 10 that can be read."""
    axes = [Axis("steps", ("8", "16", "28")), Axis(), Axis()]
    picture = Image.new("RGB", (128, 128), "#808080")
    sheet = compose(axes, {(i, 0, 0): Filled(picture, 1.0) for i in range(3)})
    rows = np.asarray(sheet.convert("L")).min(axis=1)
    first = int((rows < 128).argmax())
    height = int((rows[first:] >= 128).argmax())
    assert height * 362 / sheet.width >= 8


def test_a_label_that_is_too_long_is_cut_and_stays_in_its_place():
    axes = [Axis("prompt", ("fox", "a very long text " * 20)), Axis("style", ("off", "w" * 200)), Axis()]
    white = Image.new("RGB", (64, 64), "white")
    sheet = compose(axes, {(i, j, 0): Filled(white, 1.0, "x" * 300) for i in range(2) for j in range(2)})
    assert sheet.width < 2 * 192 + 230
    assert np.asarray(sheet)[:, -4:].min() == 255
