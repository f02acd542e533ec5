"""The benchmarks run on tiny pipelines and say what they measured."""

import json

import pytest

from apps.benchmarks.run import run
from apps.benchmarks.runs import add_run, has_ratios
from apps.service.usage import UsageError
from dit.runtime.cost_model import load_costs
from pipelines import NextScaleClassToImagePipeline
from tests.models.tiny_next_scale import tokenizer, transformer
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.pipes.tiny_video import tiny_video_pipeline


def test_painting_report(tmp_path, capsys):
    folder = str(tmp_path / "tiny")
    tiny_text_to_image_pipeline().save_pretrained(folder)
    report = run("image", model=folder, output=tmp_path / "report.json", smoke=True, json_output=True)
    assert json.loads(capsys.readouterr().out) == report
    kept = json.loads((tmp_path / "report.json").read_text())["models"]
    assert {"benchmark": "image", "model": folder, **kept[folder]} == report
    assert all(report["seconds"][part] > 0 for part in ("picture", "forward pass", "decoder", "upscaling by 4"))
    assert report["steps"] == 28
    assert report["gflops_per_pass"] >= 0
    assert report["machine"]["dtype"] == "float32"


def test_next_scale_models_are_painted_too_and_go_beside_others_in_the_file(tmp_path):
    folder, output = str(tmp_path / "tiny"), tmp_path / "paint.json"
    NextScaleClassToImagePipeline(transformer(), tokenizer()).save_pretrained(folder)
    other = {"steps": 28}
    output.write_text(json.dumps({"benchmark": "paint", "models": {"other": other, folder: {"steps": 1}}}))
    report = run("paint", model=folder, output=output, smoke=True)
    assert report["scales"] == len(transformer().grids)
    assert all(report["seconds"][part] > 0 for part in ("picture", "all scales", "decoder"))
    assert report["seconds"]["all scales"] > 0
    held = json.loads(output.read_text())
    assert held["benchmark"] == "image"
    assert list(held["models"]) == ["other", folder]
    assert held["models"]["other"] == other
    assert held["models"][folder]["seconds"] == report["seconds"]


def test_costs_of_this_machine_are_shown_saved_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("apps.benchmarks.costs.DEFAULT_SHAPES", (("matmul", (16, 8, 4)), ("elementwise", (32,))))
    options = {"device": "cpu", "dtype": "float32", "repeats": 1}
    run("costs", **options, smoke=True)
    assert load_costs() is None, "a rehearsal was kept"
    assert "16x8x4" in capsys.readouterr().out
    report = run("costs", **options, output=tmp_path / "costs.json", json_output=True)
    assert report == json.loads(capsys.readouterr().out)
    (kept,) = json.loads((tmp_path / "costs.json").read_text())["runs"]
    assert {"benchmark": "costs", **kept} == report
    rows, kept = report["tables"]["costs"], load_costs()
    assert [(row["operation"], row["shape"]) for row in rows] == [("matmul", "16x8x4"), ("elementwise", "32")]
    assert [row["milliseconds"] for row in rows] == [round(1e3 * cost.seconds, 4) for cost in kept.costs]
    assert all(row["giga operations / s"] >= 0 for row in rows)


@pytest.mark.slow  # four fresh imports of diffusers
def test_import_report():
    report = run("start", smoke=True)
    assert report["seconds"]["diffusers + pipelines"] > 0
    assert 0.2 < report["ratio"] < 5


def test_unknown_benchmark_lists_the_known():
    with pytest.raises(
        ValueError,
        match="one of image, start, costs, cache, cache-time, cache-transfer, clips, kv, shortcuts, search, released",
    ):
        run("nothing")


def test_a_report_keeps_the_runs_of_other_days_and_their_range():
    def report(ratio):
        rows = [{"code": "ours", "of released": ratio}, {"code": "released", "of released": 1.0}]
        return {"benchmark": "released", "machine": {"date": "2026-01-01"}, "tables": {"one": rows}}

    assert has_ratios(report(0.5))
    assert not has_ratios({"benchmark": "paint", "tables": {"one": [{"code": "x"}]}})
    held = report(0.6)  # a file of the older form is its first run
    for ratio in (0.9, 0.7):
        held = add_run(report(ratio), held)
    assert len(held["runs"]) == 3
    assert held["ranges"][0] == {"of": "ours", "ratio": "of released", "from": 0.6, "to": 0.9, "runs": 3}
    assert add_run(report(0.8), {"benchmark": "costs"})["ranges"][0]["runs"] == 1


@pytest.mark.slow
def test_clips_report_what_a_cache_saves_and_what_length_costs(tmp_path, capsys):
    folder = str(tmp_path / "tiny")
    tiny_video_pipeline(num_frames=4, window_frames=4, window_overlap=1, num_inference_steps=6).save_pretrained(folder)
    report = run("clips", model=folder, output=tmp_path / "clips.json", smoke=True)
    cache, length = report["tables"].values()
    assert cache[0]["times faster"] > 0
    assert "clips" not in cache[0], "the judge knows no clips of this model"
    assert [(row["frames"], row["parts"]) for row in length] == [("4", 1), ("8", 3)]
    assert length[0]["times the seconds"] == length[0]["times the memory"] == 1.0
    assert length[0]["first frames after, %"] > length[1]["first frames after, %"] > 0
    assert 100 < length[1]["peak memory, MiB"] < 10_000
    kept = json.loads((tmp_path / "clips.json").read_text())
    assert {(row["of"], row["ratio"]) for row in kept["ranges"]} == {
        ("0.35", "times faster"), ("4", "times the seconds"), ("8", "times the seconds"), ("4", "times the memory"),
        ("8", "times the memory"),
    }  # fmt: skip
    assert "length of a clip" in capsys.readouterr().out
    with pytest.raises(UsageError, match="makes no clips in parts: give a text-to-video model"):
        run("clips", model="stickers", smoke=True)
