"""The evaluation of models of clips: what a perfect, a still and a random model score, and what is written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from apps.commands.evaluate import run
from apps.commands.evaluate_clips import ClipEvaluator, show_clips
from apps.service.usage import UsageError
from apps.stickers.moving import ClipJudge, load_clips, render_clip
from apps.stickers.moving.completion_set import evaluate_completion
from apps.stickers.moving.known_words import known_words
from apps.stickers.moving.prompt_sets import CLIP_SETS, draw_clip_requests, sheet_prompts
from apps.stickers.scene import BASIC_COLOURS
from pipelines import TextToVideoPipeline
from pipelines.inputs.words import split_words, write_words
from tests.pipes.tiny_video import tiny_video_pipeline

NAMES = ("fox", "dolphin", "turtle", "person running", "rocket", "alarm clock")


@pytest.fixture(scope="module")
def sheet():
    return load_clips()


@pytest.fixture(scope="module")
def judge(sheet):
    return ClipJudge(sheet)


@pytest.fixture
def evaluator(sheet, judge):
    names = [name for name in NAMES if name in sheet.names]
    progress = Progress(console=Console(quiet=True))
    return ClipEvaluator(sheet, names, BASIC_COLOURS, judge, 4, 16, 64, 0, 3, progress)


def test_a_perfect_model_scores_as_the_ceiling(evaluator, sheet):
    for name in ("moving", "passing"):
        drawn = {request.prompt: request.scene for request in evaluator.requests(name)}

        def perfect(prompts, seeds, drawn=drawn):
            assert len(prompts) == len(seeds) <= 3
            return torch.stack([render_clip(drawn[prompt], sheet, 16, 64) for prompt in prompts])

        found, ceiling = evaluator.generated(name, perfect), evaluator.rendered(name, None, "fresh")
        assert found == ceiling
        assert ceiling["all"] == 1.0


def test_a_model_of_still_clips_shows_no_motion(evaluator, sheet):
    drawn = {request.prompt: request.scene for request in evaluator.requests("moving")}

    def still(prompts, seeds):
        first = [render_clip(drawn[prompt], sheet, 16, 64)[:1] for prompt in prompts]
        return torch.stack([frame.expand(16, -1, -1, -1) for frame in first])

    found = evaluator.generated("moving", still)
    staying = np.mean([scene.motion == "stays" for scene in drawn.values()])
    assert found["motion"] == pytest.approx(staying)
    assert found["identity"] == 1.0
    assert found["flicker"] == 0
    assert found["unexplained"] < 1e-3
    assert evaluator.rendered_flicker("moving") > 0.005


def test_a_round_trip_is_measured(evaluator):
    found = evaluator.rendered("moving", lambda clips: (clips + 0.02).clamp(-1, 1), "a little brighter")
    assert 30 < found["psnr"] < 60
    assert found["identity"] == 1.0


@pytest.mark.parametrize("kind", ["predict", "interpolate"])
def test_completion_measures_the_track_and_the_known_frames(kind, sheet, judge):
    def measured(change):
        options = {"num_frames": 16, "resolution": 64, "colours": BASIC_COLOURS, "batch_size": 2}
        complete = lambda prompts, clips, mask, seeds: change(clips.clone())  # noqa: E731
        return list(evaluate_completion(kind, 3, sheet, ("fox", "dolphin"), judge, complete, **options))

    for one in measured(lambda clips: clips):
        assert one.kept
        assert one.track_error < 1.0

    def moved(clips):  # generated frames are 4 pixels off
        clips[:, 6:8] = clips[:, 6:8].roll(4, dims=-1)
        return clips

    found = measured(moved)
    assert all(one.kept for one in found)
    assert max(one.track_error for one in found) > 0.3

    def spoiled(clips):
        clips[:, 0, :, 0, 0] = -clips[:, 0, :, 0, 0]
        return clips

    assert not any(one.kept for one in measured(spoiled))


def test_prompts_of_the_sheet_name_what_the_model_knows(sheet):
    prompts = sheet_prompts(sheet, sheet.names)
    words = set(known_words(sheet, sheet.names, BASIC_COLOURS))
    assert len(set(prompts)) == 24
    assert all(set(split_words(prompt)) <= words for prompt in prompts)


def test_requests_are_the_same_for_the_same_seed(sheet):
    for prompts in CLIP_SETS.values():
        one, two = (draw_clip_requests(prompts, 5, sheet, sheet.names, 3) for _ in range(2))
        assert one == two
        assert {request.scene.kind for request in one} == {prompts.kind}


@pytest.mark.slow
def test_the_command_writes_a_report_and_an_animated_sheet(tmp_path, sheet, capsys):
    pipe: TextToVideoPipeline = tiny_video_pipeline(num_inference_steps=1, num_frames=14)
    folder = tmp_path / "model"
    pipe.save_pretrained(str(folder))
    (folder / "vocabulary.txt").write_text("fox\ndolphin\nturtle\n")
    write_words(known_words(sheet, ("fox", "dolphin", "turtle"), BASIC_COLOURS), folder)
    report = run(str(folder), prompts=1, output=tmp_path / "out", batch_size=2)
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert set(written["scores"]) == set(CLIP_SETS)
    assert set(written["completion"]) == {"predict", "interpolate"}
    assert written["completion"]["predict"]["kept"] == 1.0
    assert written["settings"]["frames"] == 14
    with Image.open(tmp_path / "out/contact_sheet.webp") as sheet_file:
        assert sheet_file.n_frames == 14
    assert "one sticker" in capsys.readouterr().out
    show_clips(report, Console(quiet=True))
    for sets, problem in ((["single"], "choose from moving"), (["nonsense"], "choose from single")):
        with pytest.raises(UsageError, match=problem):
            run(str(folder), prompts=1, sets=sets, output=tmp_path / "out")
    (folder / "vocabulary.txt").write_text("banana\n")
    with pytest.raises(UsageError, match="banana"):
        run(str(folder), prompts=1, output=tmp_path / "out")
