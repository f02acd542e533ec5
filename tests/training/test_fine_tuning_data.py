"""Data of fine-tuning: sizes, batches, captions, what is held out, and what is said about files that don't fit."""

import json
import math
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from apps.service.media import Clip, save_mp4
from apps.training.config import ConfigError
from apps.training.data import fine_tuning
from apps.training.data.base import BatchAddress, DataError
from apps.training.data.bucket_schedule import BucketSchedule
from apps.training.data.buckets import bucket_sizes, cover_scale, nearest_bucket
from apps.training.data.caption_rules import CaptionRules
from apps.training.data.clip_excerpts import FileFacts, chosen_frames, inspect_file
from apps.training.data.fine_tuning import open_fine_tuning
from apps.training.data.fine_tuning_config import FineTuningData

SHAPES = {"a": (64, 64), "b": (64, 64), "c": (128, 64), "d": (64, 128), "e": (96, 96), "f": (128, 64), "g": (130, 70)}
"""Width and height of some files."""


def write_image(path, size=(64, 64), colour="blue", caption=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def folder(tmp_path):
    """Seven images of three aspect ratios with captions."""
    for shade, (name, size) in enumerate(SHAPES.items()):
        write_image(tmp_path / "photos" / f"{name}.png", size, (30 * shade, 0, 0), f"photo {name}\n")
    return tmp_path / "photos"


def opened(folder, resolution=64, step=16, quiet=True, **settings):
    section = FineTuningData(folder=folder, **settings)
    return open_fine_tuning(section, resolution, step, folder.parent / "run", quiet)


def epoch_of(rows, batches, size, **address):
    return [rows.draw(BatchAddress(3, index, size, **address)) for index in range(batches)]


def name_of(rows, row):
    """The name of a row's file."""
    return rows.examples[row // rows.variants].entry.name


# Buckets.


@pytest.mark.parametrize(("resolution", "step", "most"), [(64, 16, 2.0), (512, 64, 2.0), (500, 64, 3.0), (128, 8, 1.5)])
def test_buckets_have_the_area_of_the_square_and_no_more(resolution, step, most):
    sizes = bucket_sizes(resolution, step, most)
    side = resolution // step * step
    assert (side, side) in sizes
    assert len(set(sizes)) == len(sizes) > 2
    for height, width in sizes:
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        if height != width:  # a step more on the short side is too much
            assert resolution**2 < max(height, width) * (min(height, width) + step)
        assert max(height, width) <= most * min(height, width)
        assert (width, height) in sizes
    assert [h / w for h, w in sizes] == sorted(h / w for h, w in sizes)


def test_a_ratio_of_one_has_only_the_square():
    assert bucket_sizes(70, 16, 1.0) == [(64, 64)]
    with pytest.raises(ValueError, match="resolution = 8 is smaller than a step of 16"):
        bucket_sizes(8, 16, 2.0)


def test_images_go_to_the_nearest_aspect_ratio_on_both_sides():
    sizes = bucket_sizes(512, 64, 2.0)
    assert nearest_bucket((1000, 1000), sizes) == (512, 512)
    assert nearest_bucket((1080, 1920), sizes) == (384, 640)
    assert nearest_bucket((1920, 1080), sizes) == (640, 384)
    assert nearest_bucket((10, 1000), sizes) == sizes[0]
    for height, width in [(300, 411), (411, 300), (77, 150), (999, 1000)]:
        chosen = nearest_bucket((height, width), sizes)
        errors = [abs(math.log(height / width * w / h)) for h, w in sizes]
        assert abs(math.log(height / width * chosen[1] / chosen[0])) == pytest.approx(min(errors))
        assert nearest_bucket((width, height), sizes) == chosen[::-1]


def test_an_image_is_enlarged_if_one_side_is_too_short():
    assert cover_scale((128, 128), (64, 64)) == 0.5
    assert cover_scale((32, 640), (64, 128)) == 2


# Batches.


def test_each_image_is_seen_repeats_times_an_epoch_if_the_buckets_divide():
    buckets = [[0, 1, 2, 3] * 3, [4, 5] * 3, [6, 7, 8, 9, 10, 11] * 3]
    schedule = BucketSchedule(buckets)
    batches = [schedule.draw(BatchAddress(0, index, 2)) for index in range(18 * 4)]
    for epoch in range(4):  # 36 examples are 18 batches
        seen = np.concatenate(batches[18 * epoch : 18 * (epoch + 1)])
        assert np.bincount(seen).tolist() == [3] * 12
    assert [batch.tolist() for batch in batches[:18]] != [batch.tolist() for batch in batches[18:36]]


def test_small_buckets_go_on_into_their_next_permutation_and_get_no_more_than_their_share():
    buckets = [[0], [1, 2, 3], list(range(4, 14))]
    schedule = BucketSchedule(buckets)
    epochs, size = 12, 4  # after as many epochs the batches come out even: 12, 36 and 120 examples
    batches = [schedule.draw(BatchAddress(0, index, size)) for index in range(14 * epochs // size)]
    for batch in batches:
        assert sum(set(batch) <= set(bucket) for bucket in buckets) == 1
    assert np.bincount(np.concatenate(batches)).tolist() == [epochs] * 14
    middle = np.concatenate([batch for batch in batches if batch[0] in buckets[1]])  # (36,)
    assert all(sorted(part) == buckets[1] for part in middle.reshape(12, 3).tolist())
    assert len({tuple(part) for part in middle.reshape(12, 3).tolist()}) > 1


@pytest.mark.parametrize("size", [1, 3, 5, 40])
def test_every_number_has_a_batch_of_one_bucket(size):
    schedule = BucketSchedule([[0, 1, 2], [3], [4, 5, 6, 7, 8]])
    counts = np.zeros(9)
    for index in range(200):
        batch = schedule.draw(BatchAddress(7, index, size))
        assert len(batch) == size
        counts += np.bincount(batch, minlength=9)
        assert max(set(batch)) <= 2 or set(batch) == {3} or min(set(batch)) >= 4
    # No image falls behind by more than the batches that its bucket is waiting for.
    assert counts.max() - counts.min() <= 2 * size


def test_draws_depend_on_the_address_alone_and_ranks_share_an_epoch(folder, tmp_path):
    data = opened(folder, held_out_fraction=0)
    whole = epoch_of(data, 12, 2)
    resumed = opened(folder, held_out_fraction=0)
    for index in (11, 3, 7):
        assert (resumed.draw(BatchAddress(3, index, 2)) == whole[index]).all()
    assert any((data.draw(BatchAddress(4, index, 2)) != whole[index]).any() for index in range(12))
    ranks = [data.draw(BatchAddress(3, index, 2, rank=rank, world_size=2)) for index in range(6) for rank in (0, 1)]
    assert [batch.tolist() for batch in ranks] == [batch.tolist() for batch in whole]


def test_a_batch_has_one_size_and_an_epoch_has_every_file(folder):
    data = opened(folder, held_out_fraction=0, repeats=2)
    assert data.histogram() == {(1, 48, 80): 3, (1, 64, 64): 3, (1, 80, 48): 1}
    seen = []
    for rows in epoch_of(data, 7, 2):
        assert len({data.bucket(row) for row in rows}) == 1
        assert data.pixels(rows).shape == (2, 3, *data.bucket(rows[0])[1:])
        seen += [name_of(data, row) for row in rows]
    assert sorted(seen) == sorted([f"{name}.png" for name in SHAPES] * 2)  # 6, 6 and 2 examples in batches of 2
    assert sorted(np.concatenate(list(data.batches(2)))) == list(range(7))
    assert [len(rows) for rows in data.batches(2)] == [2, 1, 2, 1, 1]
    with pytest.raises(ValueError, match="rows of one bucket"):
        data.pixels(range(7))


def test_mirrored_rows_are_rows_of_their_own(folder):
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (0, 0, 32, 64))
    image.save(folder / "a.png")
    data, plain = opened(folder, random_flip=True, held_out_fraction=0), opened(folder, held_out_fraction=0)
    assert (len(data), len(plain)) == (14, 7)
    number = next(row for row in range(7) if name_of(plain, row) == "a.png")
    assert [name_of(data, 2 * number + flip) for flip in (0, 1)] == ["a.png"] * 2
    pixels = data.pixels([2 * number, 2 * number + 1])
    assert torch.equal(pixels[0], pixels[1].flip(-1))
    assert pixels[0, :, 32, 5].tolist() == [-1, -1, 1]  # blue is on the left
    assert data.content_key(2 * number) == plain.content_key(number) != data.content_key(2 * number + 1)
    drawn = np.concatenate(epoch_of(data, 60, 2))
    assert 0.3 < (drawn % 2).mean() < 0.7
    assert sum(data.histogram().values()) == 7
    assert not any(data.held_out.is_mirrored(row) for row in range(len(data.held_out)))


# Pixels.


def test_pixels_are_upright_on_white_and_near_their_own_shape(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned: the camera was upright
    write_image(tmp_path / "p" / "turned.png", (128, 64), "red", "x", exif=exif)
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 64, 32))
    half.save(tmp_path / "p" / "clear.png")
    wide = Image.new("RGB", (200, 64), "green")  # wider than the widest bucket: its ends are cut off
    wide.paste("blue", (60, 0, 140, 64))
    wide.save(tmp_path / "p" / "wide.png")
    data = opened(tmp_path / "p", held_out_fraction=0)
    rows = {name_of(data, row): row for row in range(3)}
    assert data.bucket(rows["turned.png"]) == (1, 80, 48)
    clear = data.pixels([rows["clear.png"]])  # (1, 3, 64, 64)
    assert clear.dtype == torch.float32
    assert clear[0, :, 10].min() == 1
    assert clear[0, :, 50].max() == -1
    wide = data.pixels([rows["wide.png"]])  # (1, 3, 48, 80)
    assert wide.shape[2:] == (48, 80)
    assert wide[0, :, 24, 40].tolist() == [-1, -1, 1]
    assert wide[0, 2, 24].gt(0).sum() == pytest.approx(80 * 80 / (64 * 80 / 48), abs=1)


@pytest.mark.parametrize(("fit", "corner"), [("crop", -1), ("pad", 1), ("stretch", -1)])
def test_without_buckets_all_are_squares(folder, fit, corner):
    data = opened(folder, aspect_ratio_buckets=False, fit=fit, held_out_fraction=0)
    assert data.histogram() == {(1, 64, 64): 7}
    row = next(row for row in range(7) if name_of(data, row) == "c.png")
    pixels = data.pixels([row])  # (1, 3, 64, 64)
    assert pixels[0, 2, 2, 2] == corner  # blue, of which the image has none, at the upper side


def test_files_that_are_enlarged_or_cropped_a_lot_are_named(tmp_path, capsys):
    write_image(tmp_path / "p" / "small.png", (40, 70), caption="x")
    write_image(tmp_path / "p" / "long.png", (1000, 100), caption="x")
    write_image(tmp_path / "p" / "fine.png", (640, 640), caption="x")
    data = opened(tmp_path / "p", quiet=False)
    told = capsys.readouterr().err
    assert "1 file(s) are smaller than their size in training and are enlarged" in told
    assert "small.png (70 x 40 to 80 x 48)" in told
    assert "1 file(s) lose more than a third to cropping: long.png (83%)" in told
    assert all(note in told for note in data.notes)
    assert "fine.png" not in told


def test_content_keys_outlive_renames_and_change_with_what_pixels_depend_on(folder, tmp_path):
    data = opened(folder, held_out_fraction=0)
    keys = {name_of(data, row): data.content_key(row) for row in range(7)}
    assert len(set(keys.values())) == 7
    shutil.copytree(folder, tmp_path / "other" / "photos")
    for name in "abcdefg":
        (tmp_path / "other" / "photos" / f"{name}.png").rename(tmp_path / "other" / "photos" / f"new-{name}.png")
    moved = opened(tmp_path / "other" / "photos", held_out_fraction=0, caption="x")
    assert {name_of(moved, row).removeprefix("new-"): moved.content_key(row) for row in range(7)} == keys
    for settings in ({"aspect_ratio_buckets": False, "fit": "pad"}, {"num_frames": 5}):
        other = opened(folder, held_out_fraction=0, **settings)
        assert not {other.content_key(row) for row in range(7)} & set(keys.values())
    larger = opened(folder, resolution=96, held_out_fraction=0)
    assert not {larger.content_key(row) for row in range(7)} & set(keys.values())


def test_a_file_that_changes_while_it_is_used_is_named(folder):
    data = opened(folder, held_out_fraction=0)
    row = next(row for row in range(7) if name_of(data, row) == "b.png")
    write_image(folder / "b.png", (64, 64), "green")
    for use in (data.content_key, lambda row: data.pixels([row])):
        with pytest.raises(DataError, match=r"b.png was changed since the run began"):
            use(row)
    (folder / "b.png").unlink()
    with pytest.raises(DataError, match=r"b.png cannot be read any more"):
        data.pixels([row])


# Captions.


def test_the_trigger_is_put_before_captions_that_lack_it():
    rules = CaptionRules(trigger="sks", fallback="a dog")
    assert rules.texts(["a cat", "my sks cat", "sksy"]) == ("sks a cat", "my sks cat", "sks sksy")
    assert rules.texts([]) == ("sks a dog",)
    assert CaptionRules(trigger="sks").texts([]) == ("sks",)
    assert CaptionRules(fallback="a dog").texts(["a cat"]) == ("a cat",)
    assert CaptionRules().texts([]) == ("",)
    assert CaptionRules(trigger="a (b").texts(["see a (b) there"]) == ("see a (b) there",)


def test_captions_are_dropped_at_the_given_rate_and_only_where_they_may_be(folder):
    (folder / "a.txt").write_text("one\ntwo\n")
    data = opened(folder, trigger="sks", caption_dropout=0.25, held_out_fraction=0)
    row = next(row for row in range(7) if name_of(data, row) == "a.png")
    rng = np.random.default_rng(0)
    drawn = [data.caption(row, rng) for _ in range(2000)]
    assert 0.22 < drawn.count("") / 2000 < 0.28
    assert set(drawn) == {"", "sks one", "sks two"}
    assert 0.44 < drawn.count("sks one") / (2000 - drawn.count("")) < 0.56
    assert {data.caption(row, rng, drop=False) for _ in range(200)} == {"sks one", "sks two"}
    assert {data.held_out.caption(row, rng) for _ in range(50)} == {"sks one"}


def test_all_captions_that_may_be_drawn_are_known_before(folder):
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "b.txt").unlink()
    write_image(folder.parent / "class" / "x.png", caption="a sheep")
    write_image(folder.parent / "class" / "y.png")
    data = opened(folder, trigger="sks", class_folder=folder.parent / "class", class_caption="a goat")
    rng, drawn = np.random.default_rng(0), set()
    for rows in (data, data.held_out, data.class_images):
        drawn |= {rows.caption(row, rng) for row in range(len(rows)) for _ in range(200)}
    assert data.captions_of_all() == sorted(drawn)
    assert {"", "a goat", "a sheep", "sks"} <= drawn
    assert "" not in opened(folder, caption_dropout=0, trigger="sks").captions_of_all()
    assert len(data.captions_of_all()) == len(set(data.captions_of_all()))


def test_captions_of_a_size_are_those_of_its_files(folder):
    data = opened(folder, held_out_fraction=0)
    found = {bucket: data.captions_in(bucket) for bucket in data.histogram()}
    assert len(found) > 1
    for bucket, captions in found.items():
        names = [example.entry.name.removesuffix(".png") for example in data.examples if example.bucket == bucket]
        assert captions == ["", *(f"photo {name}" for name in names)]


def test_files_without_a_caption_are_named_if_others_have_one(folder):
    (folder / "b.txt").unlink()
    assert any("1 file(s) have no caption and are trained with the empty one: b.png" in n for n in opened(folder).notes)
    assert not any("empty one" in note for note in opened(folder, caption="a photo").notes)
    assert "a photo" in opened(folder, caption="a photo").captions_of_all()


# Held out, class images.


def test_held_out_files_are_in_no_batch(folder):
    data = opened(folder, held_out_fraction=0.3)
    held_out = [name_of(data.held_out, row) for row in range(len(data.held_out))]
    training = [name_of(data, row) for row in range(len(data))]
    assert (len(held_out), len(training)) == (2, 5)
    assert sorted(held_out + training) == [f"{name}.png" for name in SHAPES]
    again = opened(folder, held_out_fraction=0.3, repeats=3, random_flip=True)
    assert [name_of(again.held_out, row) for row in range(2)] == held_out
    assert not data.is_validated_on_training
    assert len(opened(folder, held_out_fraction=0.01).held_out) == 1
    (rows, *_) = data.held_out.batches(8)
    assert data.held_out.pixels(rows).shape[0] == len(rows)


def test_it_is_said_when_validation_looks_at_the_training_files(folder):
    for name in "aeg":
        (folder / f"{name}.png").unlink()
    few, none = opened(folder), opened(folder, held_out_fraction=0)
    assert len(few) == len(few.held_out) == 4
    assert few.is_validated_on_training
    assert none.is_validated_on_training
    assert "4 files are too few to hold one out" in few.notes[-1]
    assert "no file is held out (data.held_out_fraction = 0.0)" in none.notes[-1]
    assert "does not show overfitting" in none.notes[-1]


def test_class_images_are_drawn_on_their_own_without_the_trigger(folder):
    for name, size in SHAPES.items():
        write_image(folder.parent / "class" / f"{name}.jpg", size)
    settings = {"trigger": "sks", "class_folder": folder.parent / "class", "class_caption": "a dog"}
    data = opened(folder, held_out_fraction=0, caption_dropout=0, **settings)
    rows = data.class_images.draw(BatchAddress(3, 0, 2))
    assert len({data.class_images.bucket(row) for row in rows}) == 1
    assert data.class_images.caption(rows[0], np.random.default_rng(0)) == "a dog"
    own, other = epoch_of(data, 14, 2), epoch_of(data.class_images, 14, 2)
    assert [rows.tolist() for rows in own] != [rows.tolist() for rows in other]  # not the same order twice
    assert opened(folder).class_images is None
    assert set(json.loads((folder.parent / "run" / "class_data.json").read_text())["files"]) == {
        f"{name}.jpg" for name in SHAPES
    }


# Clips.


@pytest.fixture
def clip_folder(tmp_path):
    """Three clips of 24, 24 and 6 frames, whose brightness is the number of the frame, and an image."""
    pytest.importorskip("av")
    (tmp_path / "clips").mkdir()
    for name, count, fps in [("long", 24, 12), ("slow", 24, 6), ("short", 6, 12)]:
        frames = tuple(Image.new("RGB", (128, 64), (10 * number,) * 3) for number in range(count))
        save_mp4(Clip(frames, fps), tmp_path / "clips" / f"{name}.mp4", None)
    write_image(tmp_path / "clips" / "still.png", (128, 64), (50, 50, 50))
    return tmp_path / "clips"


def numbers_of(clip):
    """Returns the numbers of the frames of a clip, (3, T, H, W) in [-1, 1]."""
    return [round(float(shade)) for shade in (clip.mean((0, 2, 3)) + 1) * 12.75]


def test_clips_give_frames_spread_over_them_and_images_a_single_one(clip_folder):
    data = opened(clip_folder, num_frames=8, caption="x", held_out_fraction=0)
    rows = {name_of(data, row): row for row in range(len(data))}
    assert set(rows) == {"long.mp4", "slow.mp4", "still.png"}
    assert "left out 1 clip(s) that are shorter than data.num_frames = 8: short.mp4 (6 frames, 0.50 s)" in data.notes[0]
    assert data.histogram() == {(1, 48, 80): 1, (8, 48, 80): 2}
    clip = data.pixels([rows["long.mp4"], rows["slow.mp4"]])  # (2, 3, 8, 48, 80)
    assert clip.shape == (2, 3, 8, 48, 80)
    assert numbers_of(clip[0]) == [1, 4, 7, 10, 13, 16, 19, 22]
    assert data.pixels([rows["still.png"]]).shape == (1, 3, 1, 48, 80)
    with pytest.raises(ValueError, match="rows of one bucket"):
        data.pixels([rows["long.mp4"], rows["still.png"]])


def test_clips_give_an_excerpt_of_their_middle_at_a_frame_rate(clip_folder):
    data = opened(clip_folder, num_frames=8, frame_rate=6, caption="x", held_out_fraction=0)
    rows = {name_of(data, row): row for row in range(len(data))}
    assert numbers_of(data.pixels([rows["long.mp4"]])[0]) == list(range(4, 20, 2))  # every other of 12 a second
    assert numbers_of(data.pixels([rows["slow.mp4"]])[0]) == list(range(8, 16))  # its own frames
    fast = opened(clip_folder, num_frames=6, frame_rate=12, caption="x", held_out_fraction=0)
    assert any("1 clip(s) have fewer frames a second" in note and "slow.mp4 (6)" in note for note in fast.notes)
    rows = {name_of(fast, row): row for row in range(len(fast))}
    assert numbers_of(fast.pixels([rows["short.mp4"]])[0]) == list(range(6))
    spread = opened(clip_folder, num_frames=6, caption="x", held_out_fraction=0)
    assert spread.content_key(rows["short.mp4"]) != fast.content_key(rows["short.mp4"])
    assert spread.content_key(rows["still.png"]) == fast.content_key(rows["still.png"])


def test_one_frame_of_a_clip_is_its_middle_and_it_is_said(clip_folder):
    data = opened(clip_folder, caption="x", held_out_fraction=0)
    rows = {name_of(data, row): row for row in range(len(data))}
    image = data.pixels([rows["long.mp4"]])  # (1, 3, 48, 80)
    assert image.shape == (1, 3, 48, 80)
    assert numbers_of(image[0][:, None]) == [12]
    assert any("3 clip(s) give the frame in their middle" in note for note in data.notes)


def test_clips_of_phones_are_turned_upright(clip_folder):
    """A phone writes frames on their side, and how to turn them in the header of the track."""
    file = clip_folder / "long.mp4"
    content = bytearray(file.read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[matrix : matrix + 36])[:2] == (1 << 16, 0)
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    file.write_bytes(content)
    data = opened(clip_folder, num_frames=8, caption="x", held_out_fraction=0)
    row = next(row for row in range(len(data)) if name_of(data, row) == "long.mp4")
    assert data.bucket(row) == (8, 80, 48)
    assert data.pixels([row]).shape == (1, 3, 8, 80, 48)


def test_frames_are_chosen_by_their_times():
    times = np.array([0, 1, 2, 3, 3.1, 3.2, 3.3, 3.4, 7])
    assert chosen_frames(times, 3, 0.5).tolist() == [1, 3, 7]  # 1, 3 and 5 s: nearest to these are 1, 3 and 3.4
    assert chosen_frames(times, 1, None).tolist() == [4]


def test_whether_a_clip_is_long_enough():
    facts = FileFacts(64, 64, frames=49, seconds=49 / 24)
    assert facts.has_excerpt(17, 8)
    assert not facts.has_excerpt(18, 8)
    assert facts.has_excerpt(49, None)
    assert not facts.has_excerpt(50, None)
    assert not FileFacts(64, 64).has_excerpt(2, 8)


# What cannot be used.


def test_broken_files_are_left_out_and_named(folder, capsys):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    data = opened(folder, held_out_fraction=0, quiet=False)
    assert "skipped 1 broken file(s)" in capsys.readouterr().err
    assert "a.png" not in {name_of(data, row) for row in range(len(data))}
    index = json.loads((folder.parent / "run" / "data.json").read_text())
    assert set(index["skipped"]) == {"a.png"}
    assert index["facts"]["c.png"] == [64, 128, 1, 0.0]


def test_files_are_looked_at_again_only_if_they_changed(folder, monkeypatch):
    opened(folder)
    write_image(folder / "a.png", (128, 64))
    looked = []
    monkeypatch.setattr(fine_tuning, "inspect_file", lambda path: looked.append(path.name) or inspect_file(path))
    data = opened(folder, held_out_fraction=0)
    assert looked == ["a.png"]
    assert data.bucket(0) == (1, 48, 80)


def test_empty_folders_and_files_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data.folder = .*empty' holds no images or clips; accepted are"):
        opened(tmp_path / "empty", caption="x")
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="has 0 usable files of 1; give at least 1"):
        opened(tmp_path / "empty", caption="x")
    write_image(tmp_path / "empty" / "b.png")
    with pytest.raises(ConfigError, match=r"data.class_folder = .*none' is no folder"):
        opened(tmp_path / "empty", caption="x", class_folder=tmp_path / "none", class_caption="y")


def test_a_set_without_any_caption_is_refused_with_the_remedy(folder):
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"none of its 7 files has a caption.*cat.txt beside cat.png.*data.caption ="):
        opened(folder)
    assert opened(folder, trigger="sks").captions_of_all() == ["", "sks"]


def test_class_images_without_captions_or_in_the_folder_of_the_others_are_refused(folder):
    write_image(folder / "class" / "x.png")
    with pytest.raises(ConfigError, match=r"1 of its 1 files have no caption \(x.png\).*data.class_caption is empty"):
        opened(folder, class_folder=folder / "class")
    with pytest.raises(ConfigError, match=r"1 of its files are trained on as well \(x.png\): move it out"):
        opened(folder, class_folder=folder / "class", class_caption="a dog")


def test_a_list_of_files_has_weights_that_are_whole_numbers(folder):
    lines = ['{"file": "a.png", "caption": "x", "weight": 3}', '{"file": "b.png"}', '{"file": "c.png", "weight": 0}']
    file = folder / "list.jsonl"
    file.write_text("\n".join(lines))
    section = FineTuningData(kind="jsonl", file=file, repeats=2)
    data = open_fine_tuning(section, 64, 16, folder.parent / "run", quiet=True)
    seen = [name_of(data, row) for rows in epoch_of(data, 4, 2) for row in rows]
    assert (seen.count("a.png"), seen.count("b.png")) == (6, 2)
    file.write_text(lines[0].replace("3", "2.5"))
    with pytest.raises(ConfigError, match=r"weight = 2.5 of a.png: in fine-tuning .* whole number"):
        open_fine_tuning(section, 64, 16, folder.parent / "run", quiet=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "jsonl"}, "data.kind = 'jsonl' needs data.file: give its path"),
        ({"folder": None}, "data.kind = 'images' needs data.folder: give its path"),
        ({"file": "a.jsonl"}, "data.file = 'a.jsonl' works with data.kind = 'jsonl' only"),
        ({"fit": "pad"}, "data.fit = 'pad' makes squares: remove it, or set data.aspect_ratio_buckets = false"),
        ({"aspect_ratio_buckets": False, "max_aspect_ratio": 3}, "data.max_aspect_ratio = 3.0 is for aspect-ratio"),
        ({"frame_rate": 8}, "data.frame_rate = 8.0 is for clips: remove it, or set data.num_frames to at least 2"),
        ({"class_caption": "a dog"}, "data.class_caption = 'a dog' captions the images of data.class_folder"),
        ({"held_out_fraction": 1}, "less than 1"),
        ({"max_aspect_ratio": 0.5}, "greater than or equal to 1"),
        ({"repeats": 0}, "greater than or equal to 1"),
        ({"caption_dropout": 1.5}, "less than or equal to 1"),
        ({"triger": "sks"}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_say_what_is_accepted(settings, message):
    with pytest.raises(ValidationError) as caught:
        FineTuningData(**{"folder": "photos", **settings})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "resolution", "message"),
    [
        ({}, 8, "data.resolution = 8 must be at least 16 for this model: set it to 16"),
        ({"aspect_ratio_buckets": False}, 72, "must be a multiple of 16 for this model: set it to 64 or 80"),
    ],
)
def test_a_resolution_that_the_model_does_not_have_is_refused(folder, settings, resolution, message):
    with pytest.raises(ConfigError) as caught:
        opened(folder, resolution, **settings)
    assert message in str(caught.value)
