"""`tessera evaluate` from end to end, with a perfect painter and with a random model."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from apps.commands import evaluate
from apps.stickers import BASIC_COLOURS, COLOURS, COMMON, STARTER, SpriteSheet, load_sprites, render, unique_keywords
from apps.stickers.contact_sheet import contact_sheet
from apps.stickers.judge import Judge
from apps.stickers.prompt_sets import SETS, draw_requests, further_sheet_requests, sheet_requests
from apps.stickers.scene import combinations, is_held_out
from tests.pipes.tiny import tiny_text_to_image_pipeline

SHEET = load_sprites()


@pytest.fixture
def examiner() -> evaluate.Evaluator:
    quiet = Progress(console=Console(quiet=True))
    return evaluate.Evaluator(SHEET, STARTER, Judge(SHEET), prompts=8, seed=0, batch_size=3, progress=quiet)


def test_a_perfect_painter_gets_full_marks(examiner: evaluate.Evaluator) -> None:
    scenes = {
        request.prompt: request.scene for name in ("single", "synonyms") for request in examiner.requests(SETS[name])
    }
    seeds_seen: list[int] = []

    def paint(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        seeds_seen.extend(seeds)
        return render([scenes[prompt] for prompt in prompts], SHEET)

    assert examiner.scores("single", paint) == {"colour": 1.0, "recall": 1.0}
    assert examiner.scores("synonyms", paint) == {"colour": 1.0, "recall": 1.0}
    assert len(set(seeds_seen)) == 16, "two pictures share their noise"


def test_a_painter_of_something_else_gets_none(examiner: evaluate.Evaluator) -> None:
    other = [request.scene for request in draw_requests(SETS["pair"], 8, SHEET, STARTER, seed=1)]
    result = examiner.scores("pair", lambda prompts, seeds: render(other[: len(prompts)], SHEET))
    assert result["relation"] == 0.0
    assert result["colour"] < 0.6


def test_a_random_model_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [SHEET.index(name) for name in STARTER]  # the second judge looks at every sticker that it knows
    small = SpriteSheet(STARTER, tuple(SHEET.keywords[row] for row in rows), SHEET.pixels[rows])
    monkeypatch.setattr(evaluate, "load_sprites", lambda: small)
    model = tmp_path / "tiny"
    tiny_text_to_image_pipeline().save_pretrained(model)
    with pytest.raises(ValueError, match=r"no vocabulary\.txt"):
        evaluate.run(str(model), prompts=2, output=tmp_path, device="cpu")
    (model / "vocabulary.txt").write_text("cat face\nhouse\npizza\n")
    settings = {"prompts": 2, "steps": 1, "sets": ["count"], "device": "cpu", "batch_size": 32}
    report = evaluate.run(str(model), output=tmp_path, json_output=True, **settings)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["scores"] == report.scores
    assert set(report.scores["count"]) == {"colour", "count", "count_strict"}
    assert written["settings"]["steps"] == 1
    assert written["settings"]["guidance"] == 4.0
    assert written["vocabulary"] == 3
    assert written["machine"]["dtype"] == "float32"
    assert min(written["ceiling"]["single"].values()) == 1.0
    assert 0 < written["autoencoder"]["psnr_in_boxes"] < 40
    assert Image.open(tmp_path / "contact_sheet.webp").size[0] > 1000
    table = Console(record=True, width=100, file=io.StringIO())
    evaluate.show(report, table)
    text = table.export_text()
    assert "count_strict" in text
    assert "dB inside sticker boxes" in text


def test_unknown_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="choose from single, pair"):
        evaluate.run(sets=["triples"])


def test_box_psnr_counts_only_pixels_in_boxes() -> None:
    scenes = [request.scene for request in draw_requests(SETS["single"], 4, SHEET, STARTER, seed=0)]

    def spoil_corner(pictures: torch.Tensor) -> torch.Tensor:
        spoiled = pictures.clone()
        spoiled[..., :2, :2] += 1
        return spoiled

    assert min(evaluate.box_psnr(scenes, SHEET, 128, spoil_corner).values()) >= 99
    both = evaluate.box_psnr(scenes, SHEET, 128, lambda pictures: pictures + 0.2)
    assert both == pytest.approx({"psnr_in_boxes": 20, "psnr_in_boxes_pooled": 20}, abs=1e-3)


@pytest.mark.parametrize("name", SETS)
def test_sets_ask_for_what_they_say(name: str) -> None:
    prompts = SETS[name]
    requests = draw_requests(prompts, 20, SHEET, STARTER, seed=0)
    assert requests == draw_requests(prompts, 20, SHEET, STARTER, seed=0)
    assert {request.scene.kind for request in requests} == {prompts.kind}
    for request in requests:
        held_out = any(is_held_out(*each) for each in combinations(request.scene, SHEET))
        assert held_out == (prompts.split == "heldout_combination")
        if prompts.synonyms:
            keywords = unique_keywords(SHEET, STARTER)[SHEET.names[request.scene.sprites[0]]]
            assert any(word in request.prompt for word in keywords)


def test_the_fixed_prompts_stay_fixed() -> None:
    requests = sheet_requests(SHEET, STARTER)
    kinds = [request.scene.kind for request in requests]
    assert [kinds.count(kind) for kind in ("single", "pair", "count")] == [40, 16, 8]
    assert len({request.prompt for request in requests}) == 64
    assert [request.prompt for request in requests[:3]] == [
        "a tiger face on a white background",
        "a bus on a blue background",
        "a sushi left of a fire engine on pink",
    ]
    assert len(sheet_requests(SHEET, STARTER[:5])) == 64
    assert sheet_requests(SHEET, COMMON) == requests, "a larger vocabulary shows the same prompts"


def test_further_prompts_show_what_the_fixed_ones_cannot() -> None:
    assert further_sheet_requests(SHEET, STARTER) == []
    assert further_sheet_requests(SHEET, STARTER[:9]) == []
    requests = further_sheet_requests(SHEET, COMMON, COLOURS)
    assert len({request.prompt for request in requests}) == 64
    starters = {SHEET.index(name) for name in STARTER}
    assert not any(starters & set(request.scene.sprites) for request in requests)
    assert {COLOURS[request.scene.background] for request in requests} == set(COLOURS[10:])
    basic = further_sheet_requests(SHEET, COMMON)
    assert {COLOURS[request.scene.background] for request in basic} == set(BASIC_COLOURS)


def test_contact_sheets_need_a_caption_for_each_picture() -> None:
    pictures = torch.zeros(3, 3, 16, 16)
    sheet = contact_sheet(
        pictures, ["one", "two words", "a very long caption that never fits " * 5], "t", "s", columns=2
    )
    assert sheet.size == contact_sheet(pictures, ["a", "b", "c"], "t", "s", columns=2).size
    with pytest.raises(ValueError, match="one caption for each image"):
        contact_sheet(pictures, ["one"], "t", "s")
