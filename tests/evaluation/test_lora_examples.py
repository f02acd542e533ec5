"""Examples of fine-tuning an object and a motion: what they are learned from, how they are asked for and measured."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

from apps.benchmarks.around_lora import generate_around, load_base
from apps.benchmarks.lora_object import list_requests
from apps.benchmarks.next_scale import Asked
from apps.benchmarks.run import run
from apps.commands.evaluate import painter
from apps.lora_examples.new_motion import (
    BASIC_COLOURS,
    LEARNED,
    known_stickers,
    motion_caption,
    read_track,
    render_circling,
    split_names,
)
from apps.lora_examples.new_object import LEARNED_COLOURS, OTHER_COLOURS, PAIRS, SINGLES, draw_object_examples
from apps.service.usage import UsageError
from apps.stickers import load_sprites
from apps.stickers.moving import load_clips, render_clip
from apps.stickers.moving.scene import ClipScene, MovingSticker, Pose
from apps.stickers.vocabulary import COMMON
from tests.fresh import run_python
from tests.pipes.tiny import tiny_text_to_image_pipeline


def test_images_of_the_object_name_it_and_no_other_background():
    rows = draw_object_examples(load_sprites())
    assert len({row.stem for row in rows}) == len(rows) == SINGLES + PAIRS
    said = [caption for row in rows for caption in row.captions]
    assert all("dodo" in caption for caption in said)
    assert not [caption for caption in said for colour in OTHER_COLOURS if colour in caption.split()]
    assert torch.equal(rows[3].pixels, draw_object_examples(load_sprites())[3].pixels)
    assert rows[0].pixels.shape == (3, 128, 128)


def test_prompts_ask_for_what_was_not_shown():
    sets = list_requests("dodo", 20)
    shown = {caption for row in draw_object_examples(load_sprites()) for caption in row.captions}
    asked = [one.prompt for requests in sets.values() for one in requests]
    assert not shown & set(asked)
    *of_it, others = sets.values()
    assert all("dodo" in one.prompt for requests in of_it for one in requests)
    assert not [one for one in others if "dodo" in one.prompt]
    assert {len(requests) for requests in sets.values()} == {20}
    assert len(LEARNED_COLOURS) == len(OTHER_COLOURS) == 10


def test_known_stickers_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="draws 'fox' already"):
        draw_object_examples(load_sprites(), COMMON[2])
    with pytest.raises(KeyError, match="no sticker is called 'dodoo'"):
        draw_object_examples(load_sprites(), "dodoo")


def test_a_track_is_told_from_others():
    sheet, (learned, unseen) = load_clips(), split_names(known_stickers())
    assert len(learned) == LEARNED
    assert not set(learned) & set(unseen)
    assert {*learned, *unseen} == set(known_stickers())
    for name in unseen[:4]:
        right = render_circling(name, "blue", sheet)
        assert read_track(right).circles
        assert read_track(right).radius == pytest.approx(1, abs=0.05)
        assert not read_track(right.flip(0)).circles  # the other way round
        assert not read_track(right[:1].expand(16, -1, -1, -1)).circles
    clip = sheet.index(unseen[0])
    straight = MovingSticker(clip, "animated", Pose(0.3, 0.5, 0.55), Pose(0.7, 0.5, 0.55))
    assert not read_track(render_clip(ClipScene("single", (straight,), 3, "right"), sheet)).circles
    assert motion_caption("owl", BASIC_COLOURS[9]) == "an owl circling on an orange background"


@pytest.mark.parametrize(("kind", "suffix"), [("object", ".png"), ("motion", ".mp4")])
def test_the_command_writes_files_with_captions(kind, suffix, tmp_path):
    _, shown, _ = run_python("-m", "apps.lora_examples", kind, tmp_path / "files")
    files = sorted(path for path in (tmp_path / "files").iterdir() if path.suffix != ".txt")
    assert shown.startswith("24 files")
    assert len(files) == 24
    assert {path.suffix for path in files} == {suffix}
    assert all(path.with_suffix(".txt").read_text().strip() for path in files)


def test_a_lora_of_an_object_is_measured(tmp_path, capsys):
    pipe = tiny_text_to_image_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.transformer), weight_name="dodo.safetensors")
    output, lora = tmp_path / "report.json", tmp_path / "dodo.safetensors"
    model = str(tmp_path / "model")
    report = run("lora-object", model=model, lora=lora, output=output, smoke=True, json_output=True)
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text()) == report
    assert report["same bits after unloading"] is True
    assert [row["prompts"] for row in report["tables"]["right by the judge"]] == list(list_requests("dodo", 2))
    with Image.open(output.with_suffix(".webp")) as sheet:
        assert sheet.width > 8 * 64
    with pytest.raises(UsageError, match="give --lora FILE"):
        run("lora-object", model=model, smoke=True)
    with pytest.raises(UsageError, match="makes no clips"):
        run("lora-motion", model=model, lora=lora, smoke=True)


def test_a_lora_is_measured_beside_another_one_at_other_steps(tmp_path):
    pipe = tiny_text_to_image_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    for number, name in enumerate(("dodo", "few")):
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), name)
        pipe.save_lora_weights(
            tmp_path,
            get_peft_model_state_dict(pipe.transformer, adapter_name=name),
            weight_name=f"{number}.safetensors",
        )
    loras = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    asked = Asked(str(tmp_path / "model"), 1, 2, "cpu", None, lora=loras[0], beside=loras[1])
    pipe, file = load_base(asked, "stickers", "images")

    def generate(*_: object) -> Tensor:
        return painter(pipe, 2, 1.0)(["a fox on blue"] * 2, range(2))

    alone = generate()
    before, both, is_restored = generate_around(pipe, asked, file, generate)
    _, one, _ = generate_around(pipe, replace(asked, beside=None), file, generate)
    assert is_restored
    shown = [alone, before, one, both]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(shown, 2))
    assert torch.equal(alone, generate())
    report = run("lora-object", model=asked.model, lora=file, smoke=True, steps=3, guidance=1.0, beside=loras[1])
    assert (report["steps"], report["guidance"], report["beside"]) == (3, 1.0, "1.safetensors")
    with pytest.raises(UsageError, match="kv takes no --steps"):
        run("kv", steps=3)
