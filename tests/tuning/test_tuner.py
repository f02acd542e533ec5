"""The tuner on a tiny pipeline: tables, pairs, verification, front, the file, resuming, and speed_up by a goal."""

import json
import math
import shutil
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.runtime.artifacts import ArtifactError
from pipelines import speed_up
from pipelines.tuning.candidates import Candidate, Offer, key_of, offer
from pipelines.tuning.conditions import Conditions
from pipelines.tuning.front import dominates
from pipelines.tuning.goals import Goal
from pipelines.tuning.measuring import Baseline, measure
from pipelines.tuning.profiles import find_profile
from pipelines.tuning.progress import Progress
from pipelines.tuning.prompts import divide, usual_prompts
from pipelines.tuning.record import TUNING_FILE, Choice, TuningRecord, record_path
from pipelines.tuning.solvers import solvers_of, try_solvers, winner
from pipelines.tuning.tuner import Tuner
from pipelines.tuning.workload import Workload, pixels_of, similarity
from tests.acceleration.test_apply import generate, make, traces
from tests.pipes.tiny import tiny_text_to_image_pipeline

STEPS = 6
CALL = {"num_inference_steps": STEPS}
LEARNED, HELD_OUT = ["a cat", "a red apple"], ["three frogs", "a blue bicycle"]
ONLY = frozenset({"step_cache", "guidance_cache"})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, so that the time of the process counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny() -> Any:
    pipe = tiny_text_to_image_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tuner(path: Path, pipe: Any = None, **more: Any) -> Tuner:
    settings = {"minutes": 1.0, "only": ONLY, **more}
    return Tuner(pipe or tiny(), LEARNED, HELD_OUT, path, CALL, **settings)


def offer_few(techniques: Collection[str], *given: Any) -> Offer:
    """Offer the first two candidates of each technique."""
    found = offer(*given)
    kept = [[one for one in found.candidates if one.technique == name][:2] for name in sorted(techniques)]
    return Offer(tuple(chain(*kept)), found.left_out)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TuningRecord, Path, list[Progress]]:
    """One tuning that several tests look at."""
    torch.set_num_threads(1)
    path, told = tmp_path_factory.mktemp("tuned") / TUNING_FILE, []
    pipe = tiny()
    Workload(pipe, LEARNED, CALL).generate(0)  # diffusers' hook of a first call stays
    clean = traces(pipe)
    goals = {"rough": Goal("psnr", 10.0), "exact": Goal("psnr", 99.0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.tuning.tuner.offer", partial(offer_few, ONLY))
        patch.setattr("pipelines.tuning.solvers.SHARES", (0.5,))
        record = tuner(path, pipe, listener=told.append).run(goals)
    assert traces(pipe) == clean, "tuning left something on the pipeline"
    return record, path, told


def test_tables_hold_single_techniques(tuned: Any) -> None:
    record, _, _ = tuned
    singles = [one for one in record.measurements if one.purpose == "single"]
    assert {next(iter(one.parts)) for one in singles} == set(ONLY)
    measured = [one for one in singles if not one.error]
    assert measured
    assert all(len(one.psnr) == len(one.ssim) == len(LEARNED) for one in measured)
    caches = [one for one in measured if "step_cache" in one.parts and not one.inactive]
    assert all(0 < one.computed_share < 1 for one in caches)


def test_settings_are_verified_on_prompts_that_no_table_saw(tuned: Any) -> None:
    record, _, _ = tuned
    assert not set(record.learned) & set(record.held_out)
    found: Choice = record.profiles["rough"]
    measured = record.found(key_of(found.parts), "verified")
    assert measured is not None
    assert len(measured.psnr) == len(HELD_OUT)
    assert found.is_verified
    assert found.quality["psnr"] == pytest.approx(sum(measured.psnr) / len(measured.psnr))
    assert found.gain == pytest.approx(1 / measured.share)
    assert found.quality["psnr"] >= 10
    assert found.reached == sum(value >= 10 for value in measured.psnr) / len(measured.psnr)
    assert set(found.part_gains) == set(found.parts)
    assert "exact" not in record.profiles, "nothing that leaves steps out is as near as that"


def test_no_setting_of_the_front_dominates_another(tuned: Any) -> None:
    front = tuned[0].front
    assert front
    measures = [(-one.gain, -one.quality["psnr"], one.memory) for one in front]
    assert not any(dominates(first, second) for first in measures for second in measures)


def test_a_tuning_tells_its_phases_and_the_time_left(tuned: Any) -> None:
    told = tuned[2]
    assert [one for one in dict.fromkeys(moment.phase for moment in told) if one != "pair"] == [
        "plain",
        "single",
        "verify",
        "solvers",
    ]
    left = [one.seconds_left for one in told]
    assert left == sorted(left, reverse=True)
    assert told[-1].front


def test_the_file_is_read_again_and_a_second_run_measures_nothing_anew(
    tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, path, _ = tuned
    loaded = TuningRecord.load(path)
    assert loaded == record
    assert json.loads(path.read_text())["format"] == "tessera-tuning-1"

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured anew")

    again = tuner(path)
    assert again.record == record
    singles = {one.key for one in record.measurements if one.purpose == "single"}
    baseline = Baseline.of(again.work)
    monkeypatch.setattr("pipelines.tuning.tuner.measure", refuse)
    for key in singles:
        assert again._measure(json.loads(key), baseline, "single").key == key


def test_a_file_of_other_prompts_or_steps_is_replaced(tuned: Any, tmp_path: Path, caplog: Any) -> None:
    copy = tmp_path / TUNING_FILE
    copy.write_text(tuned[1].read_text())
    other = Tuner(tiny(), LEARNED, HELD_OUT, copy, {"num_inference_steps": STEPS + 1}, only=ONLY)
    assert other.record.measurements == []
    assert "steps is 7 here, and was 6" in caplog.text
    verifying_others = Tuner(tiny(), LEARNED, ["a dog"], copy, CALL, only=ONLY)
    kept = verifying_others.record
    assert [one.purpose for one in kept.measurements].count("single") == len(
        [one for one in tuned[0].measurements if one.purpose == "single"]
    )
    assert not any(one.purpose == "verified" for one in kept.measurements)
    assert (kept.held_out, kept.front, kept.profiles) == (["a dog"], [], {})


def test_files_of_other_models_and_broken_ones_are_refused(tuned: Any, tmp_path: Path) -> None:
    record, path, _ = tuned
    with pytest.raises(ArtifactError, match="architecture"):
        speed_up(make("dit"), profile=str(path))
    broken = tmp_path / "broken.json"
    for text, said in (
        ("{", "no JSON"),
        ('{"format": "other"}', "tessera tune"),
        ('{"format": "tessera-tuning-1"}', "conditions"),
    ):
        broken.write_text(text)
        with pytest.raises(ArtifactError, match=said):
            TuningRecord.load(broken)
    values = json.loads(path.read_text())
    values["profiles"] = {}
    broken.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="no setting"):
        speed_up(tiny(), profile=str(broken))
    assert record.profiles


def test_fields_of_other_types_are_refused_by_name(tuned: Any, tmp_path: Path) -> None:
    values = json.loads(tuned[1].read_text())
    broken = tmp_path / "broken.json"
    setting = values["profiles"]["rough"]
    for change, said in (
        ({"profiles": []}, "can't be read"),
        ({"conditions": {**values["conditions"], "shape": [math.inf, 1, 1]}}, "can't be read"),
        ({"profiles": {"rough": {**setting, "parts": ["step_cache"]}}}, "parts of a setting is a list"),
        ({"profiles": {"rough": {**setting, "quality": {"psnr": "high"}}}}, "is no number"),
    ):
        broken.write_text(json.dumps({**values, **change}))
        with pytest.raises(ArtifactError, match=said):
            TuningRecord.load(broken)


def test_a_tuning_that_came_with_a_model_names_no_files_elsewhere(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("sampling.step_cache.Profile.load", lambda path: opened.append(str(path)))
    tiny().save_pretrained(tmp_path / "model")
    pipe = type(tiny()).from_pretrained(tmp_path / "model")
    conditions = Conditions.of(Workload(pipe, usual_prompts(pipe.info())))
    (choice,) = tuned[0].profiles.values()
    elsewhere = ("../other.safetensors", str(tmp_path / "other.safetensors"), "model/../../other.safetensors")
    for parts in (
        *({"step_cache": {"preset": "budget", "params": {"profile": file}}} for file in elsewhere),
        {"next_scale": {"refiner": "somebody/model", "refine_from": 3}},
        {"attention": {"plan": "/dev/zero"}},
    ):
        named = replace(choice, parts=parts)
        record = TuningRecord(conditions, front=[named], profiles={"balanced": named})
        record.save(tmp_path / "model" / TUNING_FILE)
        for profile in ("balanced", str(tmp_path / "model" / TUNING_FILE)):
            with pytest.raises(ArtifactError, match="own folder"):
                speed_up(pipe, profile=profile)
        with pytest.raises(ArtifactError, match="own folder"):
            speed_up(pipe, quality="psnr>=10")
    assert opened == []
    for file in ("mine.safetensors", str(tmp_path / "model" / "mine.safetensors")):
        mine = replace(choice, parts={"step_cache": {"preset": "budget", "params": {"profile": file}}})
        TuningRecord(conditions, profiles={"balanced": mine}).save(tmp_path / "model" / TUNING_FILE)
        assert find_profile(pipe, "balanced", conditions).choice == mine


def test_a_tuned_file_is_a_profile_whose_gains_are_reported(tuned: Any) -> None:
    record, path, _ = tuned
    pipe = tiny()
    plain = generate(pipe, "text")
    with speed_up(pipe, profile=str(path)) as handle:
        generate(pipe, "text")
        report = handle.report()
    assert torch.equal(generate(pipe, "text"), plain)
    assert report.origin == str(path)
    assert report.measured["all"] == record.profiles["rough"].gain
    assert report.predicted["all"] == record.profiles["rough"].predicted_gain
    assert f"{report.measured['all']:.2f}x" in report.text()
    assert "predicted" in report.text()


def test_a_goal_uses_the_saved_tuning_beside_the_model(tuned: Any, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    pipe = type(tiny()).from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    work = Workload(pipe, usual_prompts(pipe.info()))
    record = tuned[0]
    path = record_path(pipe, Conditions.of(work))
    assert path == tmp_path / "model" / TUNING_FILE
    for file in tuned[1].parent.glob("*.safetensors"):  # profiles of step caches, which the settings name
        shutil.copy(file, path.parent)
    path.write_text(tuned[1].read_text().replace(f"{tuned[1].parent}/", ""))
    replace(TuningRecord.load(path), conditions=Conditions.of(work)).save(path)
    with speed_up(pipe, quality="psnr>=10") as handle:
        assert handle.config.to_dict()["version"] == 1
        assert set(handle.config.parts) == set(record.profiles["rough"].parts)
        assert handle.report().origin == str(path)


def test_a_goal_without_a_saved_tuning_runs_the_tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("pipelines.tuning.speed_up.MINUTES", 1.0)
    monkeypatch.setattr("pipelines.tuning.speed_up.usual_prompts_of", lambda pipe: [*LEARNED, *HELD_OUT])
    monkeypatch.setattr("pipelines.tuning.tuner.try_solvers", lambda *_: [])
    monkeypatch.setattr("pipelines.tuning.tuner.offer", partial(offer_few, {"step_cache"}))
    pipe = tiny()
    pipe.register_to_config(defaults=CALL)
    with pytest.raises(ValueError, match="no setting reaches psnr>=100"):
        speed_up(pipe, quality="psnr>=100")
    with speed_up(pipe, quality="psnr>=5") as handle:
        assert "step_cache" in handle.config.parts
    assert len(list((tmp_path / "tessera").glob("tuning-*.json"))) == 1


def test_candidates_that_cannot_be_had_stand_in_the_file_with_the_reason() -> None:
    work = Workload(tiny(), LEARNED, CALL)
    baseline = Baseline.of(work)
    found = measure({"next_scale": {"skip_last": 1}}, baseline, "single")
    assert "next-scale pipeline" in found.error
    assert not found.is_useful


def test_few_step_and_short_models_are_offered_no_step_cache_and_no_pattern() -> None:
    pipe = tiny()
    work = Workload(pipe, LEARNED, {"num_inference_steps": 4})
    work.generate(0)
    found = offer(pipe, Conditions.of(work), False, [None], 64)
    assert "step_cache" not in {one.technique for one in found.candidates}
    assert "4 steps" in found.left_out["step_cache"]
    assert "64 tokens" in found.left_out["attention (patterns)"]
    assert any("pattern" in one.key for one in offer(pipe, Conditions.of(work), False, [None], 512).candidates)


@pytest.mark.parametrize("name", ["next-scale class", "dit", "flux"])
def test_every_kind_of_pipeline_can_be_tuned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make(name)
    is_scales = "scale" in name
    prompts = {"next-scale class": [0, 1], "dit": [0, 1], "flux": ["a cat", "a dog"]}[name]
    call = {} if is_scales else CALL
    if name == "flux":
        call = {**CALL, "height": 16, "width": 16, "max_sequence_length": 8}
    Workload(pipe, prompts, call).generate(0)
    clean = traces(pipe)
    only = frozenset({"next_scale"} if is_scales else {"step_cache"})
    monkeypatch.setattr("pipelines.tuning.tuner.offer", partial(offer_few, only))
    monkeypatch.setattr("pipelines.tuning.tuner.try_solvers", lambda *_: [])
    record = Tuner(pipe, prompts[:1], prompts[1:], tmp_path / "t.json", call, 1.0, only=only).run({"any": Goal()})
    assert any(not one.error for one in record.measurements), [one.error for one in record.measurements]
    assert traces(pipe) == clean


def test_fewer_steps_of_other_solvers_are_rivals() -> None:
    pipe = tiny()
    own = pipe.scheduler
    baseline = Baseline.of(Workload(pipe, LEARNED, CALL))
    rows = try_solvers(baseline, STEPS, "num_inference_steps")
    assert pipe.scheduler is own
    assert {row["solver"] for row in rows} == set(solvers_of(own))
    assert "UniPCMultistepScheduler" in solvers_of(own)
    measured = [row for row in rows if "error" not in row]
    assert len(measured) == len(rows)
    assert winner([{"solver": "A", "steps": 3, "share": 0.3, "psnr": 35.0}], 30.0, 0.4) is not None
    assert winner([{"solver": "A", "steps": 3, "share": 0.3, "psnr": 25.0}], 30.0, 0.4) is None


def test_pixels_have_one_form_whatever_a_pipeline_returns() -> None:
    image = torch.rand(2, 16, 16, 3)
    expected = image.movedim(-1, 1)
    assert torch.equal(pixels_of(image.numpy()), expected)
    assert torch.equal(pixels_of([image.numpy()]), expected), "the frames of a clip"
    assert torch.equal(pixels_of(expected), expected)
    assert similarity(expected, expected)["psnr"] == 100.0
    assert similarity(expected, expected)["ssim"] == pytest.approx(1)


def test_prompts_are_divided_and_too_few_are_refused() -> None:
    assert divide(["a", "b"]) == (["a"], ["b"])
    learned, held_out = divide([str(number) for number in range(20)])
    assert (len(learned), len(held_out)) == (4, 16)
    with pytest.raises(ValueError, match="at least 2"):
        divide(["a"])
    with pytest.raises(ValueError, match="minutes"):
        Tuner(tiny(), LEARNED, HELD_OUT, Path("t.json"), minutes=0)


def test_candidates_are_the_same_by_their_parts() -> None:
    assert Candidate("a", {"x": 1, "y": 2}).key == Candidate("b", {"y": 2, "x": 1}).key
