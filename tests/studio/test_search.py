"""Searches among candidates, from the command line and in the engine: who competes is shown, what came out is told."""

import json
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from apps.commands.generate import run
from apps.commands.given_options import make_options
from apps.service.engine import Engine
from apps.service.events import Picture, Step
from apps.service.media import candidate_sheet
from apps.service.metadata import read_picture
from apps.service.requests import REQUEST

SEARCHED = make_options(prompt="a fox left of a key on blue", model="stickers-var", search="best_of", candidates=3)


def test_the_command_line_searches_and_tells_what_it_found(tmp_path, capsys):
    run(SEARCHED, tmp_path / "fox.png")
    told = capsys.readouterr().out
    assert "search: 3 of 3 candidates finished, best fits" in told
    assert "3.00 x the tokens" in told
    settings = read_picture(tmp_path / "fox.png")
    assert (settings.search, settings.candidates) == ("best_of", 3)
    run(make_options(), tmp_path / "again.png", settings=tmp_path / "fox.png")
    first, again = (np.asarray(Image.open(tmp_path / name)) for name in ("fox.png", "again.png"))
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    ("method", "candidates", "finished", "cost"), [("tts", 4, "2 of 10", "3.92"), ("beam", 3, "1 of 9", "2.92")]
)
def test_a_search_pays_for_so_many_pictures_and_spends_them_early(tmp_path, capsys, method, candidates, finished, cost):
    run(SEARCHED.changed(search=method, candidates=candidates), tmp_path / "fox.png")
    told = capsys.readouterr().out
    assert f"search: {finished} candidates finished" in told
    assert f"{cost} x the tokens" in told


def test_the_history_of_the_built_in_model_can_be_compressed_at_once(tmp_path, capsys):
    wishes = make_options(
        prompt="a fox on blue", model="stickers-var", kv_policy="scalekv", kv_budget=0.25, temperature=1.2
    )
    run(wishes, tmp_path / "fox.png", json_output=True)
    (row,) = json.loads(capsys.readouterr().out)["pictures"]
    assert row["report"].startswith("KV cache scalekv: 2")
    assert (row["kv_policy"], row["kv_budget"], row["temperature"]) == ("scalekv", 0.25, 1.2)


@pytest.mark.parametrize(
    ("wishes", "why"),
    [
        (make_options(prompt="a fox", search="tts"), "search: text_to_image has no such setting; leave it out"),
        (make_options(prompt="a fox", model="stickers-var", candidates=3), "--candidates goes with --search"),
        (make_options(prompt="a fox", model="stickers-var", kv_policy="most"), "choose one of 'full'"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, wishes, why):
    with pytest.raises(ValueError, match=why) as caught:
        run(wishes, tmp_path / "fox.png")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_previews_show_all_candidates():
    request = REQUEST.validate_python(
        {"task": "next_scale_text", "prompt": "a fox on blue", "model": "stickers-var", "search": "tts", "seed": 1}
    )
    with closing(Engine({"stickers-var": "stickers-var"})) as engine, closing(engine.generate(request)) as events:
        seen = list(events)
    sizes = [event.preview.size for event in seen if isinstance(event, Step) and event.preview is not None]
    (picture,) = [event for event in seen if isinstance(event, Picture)]
    assert sizes[0][0] > 2 * sizes[-1][0], "eight candidates stand in rows of three, one alone"
    assert "of 8 candidates finished" in picture.report


@pytest.mark.parametrize(("count", "shape"), [(1, (64, 64)), (2, (129, 64)), (3, (129, 129)), (30, (259, 259))])
def test_candidates_are_laid_out_in_rows(count, shape):
    colours = [Image.new("RGB", (64, 64), (8 * index, 0, 0)) for index in range(count)]
    sheet = candidate_sheet(colours)
    assert sheet.size == shape
    assert sheet.getpixel((0, 0)) == (0, 0, 0)
    last = min(count, 16) - 1
    columns = round((shape[0] + 1) / 65)
    row, column = divmod(last, columns)
    assert sheet.getpixel((65 * column + 32, 65 * row + 32)) == (8 * last, 0, 0)
