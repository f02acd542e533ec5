"""Stickers in Fluent 3D style: the sheet, the split, the training folder, and the judge of the style."""

import json

import pytest
import torch
from PIL import Image
from torch import Tensor

from apps.perceptual.style_ceiling import style_ceilings
from apps.perceptual.style_judge import StyleJudge, blurred, find_direction
from apps.stickers import BASIC_COLOURS, STARTER, Scene, SceneSampler, SpriteSheet, load_sprites, render
from apps.stickers.fluent import (
    TRAINING,
    UNSEEN,
    draw_examples,
    in_style,
    load_fluent,
    plain_caption,
    single_scene,
    with_trigger,
    write_training_folder,
)
from apps.stickers.sprites import DATA, SIDE
from apps.training.data.image_folder import list_folder
from dit.runtime.metrics import psnr

FLUENT, FLAT = load_fluent(), load_sprites()
FEW = ("fox", "penguin", "tulip", "taxi", "key", "ghost")


def test_the_sheet_holds_the_starter_names_each_in_its_whole_tile() -> None:
    assert FLUENT.names == STARTER
    assert FLUENT.pixels.shape == (128, 4, SIDE, SIDE)
    assert all(FLUENT.keywords[FLUENT.index(name)] == FLAT.keywords[FLAT.index(name)] for name in STARTER)
    for box in FLUENT.pixels[:, 3] > 8:  # (128, 128)
        across, down = box.any(0).nonzero().flatten(), box.any(1).nonzero().flatten()
        assert max(int(line[-1] - line[0]) + 1 for line in (across, down)) >= SIDE - 2
        assert all(abs(int(line[0] + line[-1]) - SIDE + 1) <= 3 for line in (across, down))
    with pytest.raises(KeyError, match=r"no Fluent 3D sticker is called 'red fox'; names near it: \['fox'.*fluent_3d"):
        FLUENT.index("red fox")


def test_the_sheet_stays_small_and_its_licence_lies_beside_it() -> None:
    assert sum((DATA / name).stat().st_size for name in ("fluent_3d.webp", "fluent_3d.json")) < 600_000
    notice = (DATA / "NOTICE").read_text(encoding="utf-8")
    assert "fluent_3d.webp" in notice
    assert "Copyright (c) Microsoft Corporation." in notice


def test_the_split_is_fixed_and_disjoint() -> None:
    assert len(TRAINING) == len(set(TRAINING)) == 24
    assert len(UNSEEN) == 104
    assert set(TRAINING) | set(UNSEEN) == set(STARTER)
    assert (TRAINING[0], TRAINING[-1], UNSEEN[0], UNSEEN[-1]) == ("tiger face", "camera", "cat face", "trophy")


def test_one_scene_is_drawn_in_both_styles() -> None:
    sampler = SceneSampler(FLAT, STARTER, split="all")
    scenes = [sampler.scene(0, number) for number in range(6)]
    styled = [in_style(scene, FLAT, FLUENT) for scene in scenes]
    assert {scene.kind for scene in scenes} == {"single", "pair", "count"}
    for flat, new in zip(scenes, styled, strict=True):
        assert [FLAT.names[p.sprite] for p in flat.placements] == [FLUENT.names[p.sprite] for p in new.placements]
        assert [(p.x, p.y, p.size) for p in flat.placements] == [(p.x, p.y, p.size) for p in new.placements]
        assert in_style(new, FLUENT, FLAT) == flat
    images = [render(some, sheet, 64) for some, sheet in ((scenes, FLAT), (styled, FLUENT))]
    assert torch.equal(images[0][..., 0, 0], images[1][..., 0, 0])  # the backgrounds
    assert 5 < psnr(*images, data_range=2.0) < 25
    with pytest.raises(KeyError, match="wolf"):
        in_style(single_scene("wolf", "white", FLAT), FLAT, FLUENT)


def test_a_single_scene_is_what_it_says() -> None:
    scene = single_scene("fox", "blue", FLUENT, x=0.4, size=0.5)
    assert isinstance(scene, Scene)
    assert (scene.placements[0].x, scene.placements[0].y, scene.placements[0].size) == (0.4, 0.5, 0.5)
    with pytest.raises(ValueError, match="colour is 'plaid': give one of white"):
        single_scene("fox", "plaid", FLUENT)


def test_captions_take_any_trigger_or_none() -> None:
    assert plain_caption("owl", "orange", "3d style") == "an owl on an orange background, 3d style"
    assert plain_caption("owl", "white", "") == "an owl on a white background"
    assert with_trigger("owls", "clay") == "owls, clay"


def test_the_training_folder_is_read_as_it_was_written(tmp_path) -> None:
    files = write_training_folder(tmp_path / "3d", trigger="clay", phrasings=3)
    assert len(files) == 24
    entries = list_folder(tmp_path / "3d")
    assert {entry.name for entry in entries} == {file.name for file in files}
    grounds = set()
    for entry in entries:
        name = entry.name.removesuffix(".png").replace("_", " ")
        assert name in TRAINING
        assert len(entry.captions) == 3
        assert all(caption.endswith(", clay") and name in caption for caption in entry.captions)
        with Image.open(entry.path) as image:
            assert (image.size, image.mode) == ((SIDE, SIDE), "RGB")
            grounds.add(image.getpixel((0, 0)))
    assert len(grounds) == len(BASIC_COLOURS)


def test_the_training_folder_may_hold_all_stickers(tmp_path) -> None:
    files = write_training_folder(tmp_path, names=STARTER)
    assert {file.stem.replace("_", " ") for file in files} == set(STARTER)


def test_the_training_folder_is_the_same_each_time_but_for_the_seed(tmp_path) -> None:
    first, again = (write_training_folder(tmp_path / name, phrasings=2) for name in ("first", "again"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
    assert [f.with_suffix(".txt").read_text() for f in first] == [f.with_suffix(".txt").read_text() for f in again]
    other = draw_examples(seed=1)
    assert [example.name for example in other] == list(TRAINING)
    assert all(a.scene != b.scene for a, b in zip(other, draw_examples(), strict=True))
    with pytest.raises(ValueError, match="phrasings is 0"):
        draw_examples(phrasings=0)


@pytest.fixture(scope="module")
def judge() -> StyleJudge:
    """The judge of the starter names; the flat sheet cut to these, so that nothing else is drawn."""
    rows = [FLAT.index(name) for name in STARTER]
    flat = SpriteSheet(STARTER, tuple(FLAT.keywords[row] for row in rows), FLAT.pixels[rows])
    return StyleJudge(flat, FLUENT, TRAINING)


def test_what_the_judge_says_about_true_images(judge: StyleJudge) -> None:
    """The ceiling: styled images, even blurred, are what they are; flat ones of the same things lie far away."""

    def blur(images: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
        return torch.nn.functional.avg_pool2d(padded, 3, stride=1)

    found = style_ceilings(judge, blur, names=FEW)
    assert found["styled"]["identity"] == found["styled, round trip"]["identity"] == 1
    assert found["styled"]["nearer"] == found["styled, round trip"]["nearer"] == 1
    assert found["styled"]["distance"] < 0.01
    assert found["styled"]["scale"] > 0.2
    assert found["styled, round trip"]["fallen"] > 0.6
    assert found["styled"]["style"] > 0.6
    assert found["plain"]["distance"] == pytest.approx(found["plain"]["scale"], rel=0.05)
    assert found["plain"]["nearer"] == found["plain, round trip"]["nearer"] == 0
    assert found["plain"]["style"] < 0.4
    assert style_ceilings(judge, names=FEW)["plain"] == found["plain"]


def test_wrong_things_in_the_right_style_are_found_out(judge: StyleJudge) -> None:
    shown, asked = ["fox", "bell", "tent"], ["penguin", "tulip", "key"]
    images = render([single_scene(name, "teal", FLUENT) for name in shown], FLUENT, SIDE)
    reading = judge.measure(images, asked, ["teal"] * 3, batch_size=2)
    assert [FLUENT.names[sprite] for sprite in reading.sprites.tolist()] == shown
    assert not reading.right.any()
    assert bool((reading.distance > reading.scale).all())
    assert reading.part(torch.tensor([2, 0])).distance.tolist() == reading.distance[[2, 0]].tolist()


def test_damage_is_not_taken_for_the_style(judge: StyleJudge) -> None:
    """Flat images that are badly blurred come a quarter of the way, but hardly nearer to the truth."""
    names = UNSEEN[::4]
    flat = render([single_scene(name, "pink", judge.plain) for name in names], judge.plain, SIDE)
    found = judge.measure(blurred(flat, 4), names, ["pink"] * len(names)).figures()
    assert found["style"] < 0.35
    assert found["fallen"] < 0.1
    worse = judge.measure(blurred(flat, 8), names, ["pink"] * len(names)).figures()
    assert 0.25 < worse["style"] < 0.8
    assert worse["fallen"] < -0.1


def test_empty_images_show_nothing(judge: StyleJudge) -> None:
    reading = judge.measure(torch.ones(1, 3, 32, 32), ["fox"], ["white"])
    assert reading.sprites.tolist() == [-1]
    assert reading.figures()["identity"] == 0


def test_wrong_calls_say_what_is_accepted(judge: StyleJudge) -> None:
    with pytest.raises(ValueError, match=r"give \(B, 3, H, H\)"):
        judge.measure(torch.zeros(1, 3, 64, 32), ["fox"], ["white"])
    with pytest.raises(ValueError, match="2 images, 1 names, 1 colours"):
        judge.measure(torch.zeros(2, 3, 64, 64), ["fox"], ["white"])
    with pytest.raises(ValueError, match="128 names are learned and 0 are left"):
        StyleJudge(FLAT, FLUENT, STARTER)


def test_the_direction_is_that_in_which_two_sets_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, styled = (torch.randn(40, 5, generator=generator) for _ in range(2))
    styled[:, 2] += 8
    weight = find_direction(plain, styled, ridge=0.01)
    assert int(weight.abs().argmax()) == 2
    assert bool((styled @ weight).min() > (plain @ weight).max())


def test_names_of_the_table_are_in_the_order_of_the_sheet() -> None:
    assert json.loads((DATA / "fluent_3d.json").read_text(encoding="ascii")) == list(STARTER)
