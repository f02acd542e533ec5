"""Quotas of users: where they stand, what they refuse, and how that is said."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import datetime

import pytest
from typer.testing import CliRunner

from apps.api.tokens import TokenTable, add_user, read_users
from apps.cli import app as command_line
from apps.service.accounting import Used, day_of, end_of_day
from apps.service.engine import Engine
from apps.service.events import Failed
from apps.service.job_store import QueueFullError
from apps.service.quotas import NO_QUOTAS, QuotaError, Quotas, check_submit, read_quotas
from apps.service.requests import TextToImageRequest
from apps.studio.problems import explain, explain_failure
from apps.studio.strings import Strings, languages
from tests.studio.fakes import FakePipeline
from tests.studio.serving import bearer, client_of, serving_page

NOON = datetime(2026, 12, 1, 12, 0).timestamp()
ASK = {"task": "text_to_image", "prompt": "a fox", "steps": 2}


@contextmanager
def working(quotas, pipe=None, owner="ann"):
    """Yield an engine whose one user has quotas."""
    engine = Engine({"fake": "x"}, None, device="cpu", load=lambda source: pipe or FakePipeline(0.001))
    engine.quotas_of = lambda name: quotas if name == owner else NO_QUOTAS
    engine.model().result(60)
    try:
        yield engine
    finally:
        engine.close()


def ask(**more):
    return TextToImageRequest(**{"prompt": "a fox", "steps": 2, **more})


@pytest.mark.parametrize(
    ("quotas", "used", "images", "key", "again"),
    [
        ({"images_per_day": 10}, Used(images=6, pending=3), 2, "quota.images", 12 * 3600),
        ({"images_per_day": 10}, Used(), 11, "quota.large", None),
        ({"seconds_per_day": 60}, Used(seconds=60.0), 1, "quota.seconds", 12 * 3600),
        ({"queued_jobs": 2}, Used(waiting=2), 1, "quota.queued", 5),
        ({"storage_mb": 1.5}, Used(stored=1_500_000), 1, "quota.storage", None),
    ],
)
def test_a_quota_refuses_what_it_has_no_room_for(quotas, used, images, key, again):
    with pytest.raises(QuotaError) as refused:
        check_submit(Quotas(**quotas), used, images, NOON)
    assert (refused.value.key, refused.value.retry_after) == (key, again)
    (limit,) = quotas.values()
    for words in map(Strings, languages()):
        said = explain(refused.value, words)
        assert f"{limit:g}" in said
        assert "{" not in said
    assert f"{limit:g}" in str(refused.value)
    check_submit(NO_QUOTAS, used, images, NOON)


@pytest.mark.parametrize(
    ("quotas", "used", "images"),
    [
        ({"images_per_day": 10}, Used(images=6, pending=3), 1),
        ({"seconds_per_day": 60}, Used(seconds=59.9), 1),
        ({"queued_jobs": 2}, Used(waiting=1, running=4), 1),
        ({"storage_mb": 1.5}, Used(stored=1_499_999), 1),
    ],
)
def test_a_quota_lets_pass_what_there_is_room_for(quotas, used, images):
    check_submit(Quotas(**quotas), used, images, NOON)


def test_a_day_is_that_of_the_server():
    assert day_of(NOON) == "2026-12-01"
    assert datetime.fromtimestamp(end_of_day(NOON)) == datetime(2026, 12, 2)


def test_images_that_wait_count_and_a_refused_request_leaves_no_trace():
    pipe = FakePipeline(0.2)
    with working(Quotas(images_per_day=4), pipe) as engine:
        first = engine.submit(ask(num_images=3, steps=100), "ann")
        with pytest.raises(QuotaError, match="3 of your 4 images"):
            engine.submit(ask(num_images=2), "ann")
        engine.submit(ask(), "ann")
        engine.submit(ask(num_images=16), "bob")  # who has no quota
        assert [job.owner for job in engine.jobs()] == ["bob", "ann", "ann"]
        assert isinstance(QuotaError("a", "b"), QueueFullError)  # whoever handles a full queue handles this
        engine.stop(first)


def test_seconds_are_asked_for_again_when_the_work_begins():
    """Who queues many requests while there is room does not get all of them generated."""
    pipe = FakePipeline(0.05)
    with working(Quotas(seconds_per_day=0.2), pipe) as engine:
        jobs = [engine.submit(ask(steps=10), "ann") for _ in range(3)]
        for job in jobs:
            assert engine.stream(job).wait_closed(60)
        assert [engine.job(job).state for job in jobs] == ["done", "failed", "failed"]
        assert engine.job(jobs[1]).code == "quota"
        last = engine.stream(jobs[1]).read()[-1][1]
        assert isinstance(last, Failed)
        assert Strings("zh")("error.quota.seconds", used=1, most="0.2", hours=1, minutes=1)[:6] in explain_failure(
            last, Strings("zh")
        )
        with pytest.raises(QuotaError, match="device seconds of today are used"):
            engine.submit(ask(), "ann")


def test_a_user_keeps_quotas_until_new_ones_are_given(tmp_path):
    file = tmp_path / "users.json"
    add_user(file, "ann", "generate", {"images_per_day": 100, "seconds_per_day": 3600.0})
    add_user(file, "ann", "admin")
    add_user(file, "ann", "admin", {"images_per_day": None, "queued_jobs": 4})
    (ann,) = read_users(file)
    assert ann.quotas == Quotas(seconds_per_day=3600.0, queued_jobs=4)
    assert ann.role == "admin"
    for wrong in ({"images_per_day": -1}, {"seconds_per_day": float("nan")}, {"queued_jobs": "many"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            add_user(file, "bob", "generate", wrong)
    assert [user.name for user in read_users(file)] == ["ann"]
    table = TokenTable(file)
    assert table.quotas_of("ann").queued_jobs == 4
    assert table.quotas_of("a stranger") == NO_QUOTAS
    file.chmod(0o644)
    table._stamp = 0
    with pytest.raises(RuntimeError) as broken:  # a job that fails by it says no path
        table.quotas_of("ann")
    assert str(tmp_path) not in str(broken.value)


def test_a_file_of_users_of_an_older_version_is_read_and_stays_as_it_was(tmp_path):
    file = tmp_path / "users.json"
    row = {"name": "ann", "role": "generate", "salt": "0" * 32, "digest": "1" * 64}
    file.write_text(json.dumps({"users": [row]}))
    file.chmod(0o600)
    assert read_users(file)[0].quotas == NO_QUOTAS
    add_user(file, "bob")
    assert json.loads(file.read_text())["users"][0] == row  # readable by an older version too


def test_the_command_line_sets_quotas(tmp_path):
    file, run = tmp_path / "users.json", CliRunner()
    options = ["--images-per-day", "100", "--seconds-per-day", "3600.5", "--storage-mb", "50"]
    assert run.invoke(command_line, ["token", "ann", "--auth-file", str(file), *options]).exit_code == 0
    assert read_users(file)[0].quotas == Quotas(images_per_day=100, seconds_per_day=3600.5, storage_mb=50)
    assert run.invoke(command_line, ["token", "ann", "--auth-file", str(file), "--storage-mb", "none"]).exit_code == 0
    assert read_users(file)[0].quotas == Quotas(images_per_day=100, seconds_per_day=3600.5)
    for name, text in (("queued_jobs", "1.5"), ("images_per_day", "-1"), ("seconds_per_day", "nan")):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is '{text}'"):
            read_quotas({name: text})


def test_http_answers_when_there_is_room_again_and_everybody_sees_their_own_use(tmp_path):
    with serving_page(tmp_path) as served, client_of(served) as client:
        served.tokens["ann"] = add_user(served.users, "ann", "generate", {"images_per_day": 2})
        ann = bearer(served, "ann")
        job = client.post("/v1/jobs", json={**ASK, "num_images": 2}, headers=ann).json()["id"]
        assert served.engine.stream(job).wait_closed(30)
        refused = client.post("/v1/jobs", json=ASK, headers=ann)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota")
        assert 0 < int(refused.headers["retry-after"]) <= 86_400 + 3_600
        asked = {"prompt": "a fox", "n": 1, "size": "64x64"}
        assert client.post("/v1/images/generations", json=asked, headers=ann).status_code == 429
        too_many = client.post("/v1/jobs", json={**ASK, "num_images": 3}, headers=ann)
        assert (too_many.status_code, "retry-after" in too_many.headers) == (429, False)  # waiting would not help
        mine = client.get("/v1/usage", headers=ann).json()
        assert (mine["user"], mine["today"]["images"], mine["quotas"]["images_per_day"]) == ("ann", 2, 2)
        assert mine["today"]["seconds"] > 0
        bobs = client.get("/v1/usage", headers=bearer(served, "bob")).json()
        assert (bobs["today"], bobs["quotas"]["images_per_day"]) == ({"images": 0, "seconds": 0.0}, None)
        assert client.get("/v1/usage").status_code == 401
        document = client.get("/v1/openapi.json", headers=ann).json()
        assert {"/v1/usage", "/v1/admin/users", "/ready", "/metrics"} <= document["paths"].keys()
