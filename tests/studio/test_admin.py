"""What administrators see and may do, and what monitoring reads: /v1/admin, /metrics, /ready."""

from __future__ import annotations

import re
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from apps.api import metrics
from apps.api.tokens import add_user
from apps.service import device_state
from apps.service.accounting import Histogram
from apps.service.engine import Engine
from apps.service.job_store import StoreError
from tests.studio.fakes import FakePipeline
from tests.studio.serving import bearer, client_of, serving_page

ASK = {"task": "text_to_image", "prompt": "my secret garden", "steps": 100}
ADMIN = ("/v1/admin/users", "/v1/admin/queue", "/v1/admin/devices", "/metrics")
LINE = re.compile(
    r'([a-z_]+)(?:\{([a-z_]+="(?:[^"\\\n]|\\.)*"(?:,[a-z_]+="(?:[^"\\\n]|\\.)*")*)\})? '
    r"(\+Inf|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
)


def parse(text):
    """Return name and labels -> value, and name -> type, of the text format of Prometheus."""
    assert text.endswith("\n")
    values, kinds = {}, {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
            continue
        found = LINE.fullmatch(line)
        assert found, line
        name, labels, value = found.groups()
        assert (name, labels) not in values
        assert any(name in (kind, f"{kind}_bucket", f"{kind}_sum", f"{kind}_count") for kind in kinds), name
        values[name, labels] = float(value)
    return values, kinds


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    pipe = FakePipeline(0.02)
    with serving_page(tmp_path_factory.mktemp("admin"), pipe) as found:
        add_user(found.users, "eve", "view", {"images_per_day": 5})
        yield found


@pytest.mark.parametrize("path", ADMIN)
def test_only_administrators_read_what_is_everybodys(served, path):
    with client_of(served) as client:
        assert client.get(path).status_code == 401
        assert client.get(path, headers=bearer(served, "ann")).status_code == 403
        assert client.get(path, headers=bearer(served, "root")).status_code == 200
    with client_of(served, "bob") as client:  # signed in on the page
        assert client.get(path).status_code == 403


def test_an_administrator_sees_the_queue_without_prompts_and_stops_anybodys_job(served):
    with client_of(served) as client:
        ann, bob, root = (bearer(served, name) for name in ("ann", "bob", "root"))
        first = client.post("/v1/jobs", json=ASK, headers=ann).json()["id"]
        second = client.post("/v1/jobs", json={**ASK, "num_images": 3}, headers=bob).json()["id"]
        answer = client.get("/v1/admin/queue", headers=root)
        assert "secret" not in answer.text
        rows = {row["id"]: row for row in answer.json()["jobs"]}
        assert set(rows) == {first, second}
        assert (rows[second]["owner"], rows[second]["state"], rows[second]["images"]) == ("bob", "queued", 3)
        assert rows[second]["started"] is None
        assert rows[first]["model"] == "fake"
        people = {one["user"]: one for one in client.get("/v1/admin/users", headers=root).json()["users"]}
        assert set(people) == {"ann", "bob", "eve", "root"}
        assert (people["bob"]["waiting"], people["bob"]["pending_images"]) == (1, 3)
        assert people["eve"]["quotas"]["images_per_day"] == 5
        for who, status in ((bob, 403), (root, 200)):
            assert client.delete(f"/v1/admin/jobs/{first}", headers=who).status_code == status
        assert client.delete(f"/v1/admin/jobs/{second}", headers=root).json() == {"id": second}
        for job in (first, second):
            assert served.engine.stream(job).wait_closed(30)
            assert served.engine.job(job).state == "stopped"
        assert client.delete(f"/v1/admin/jobs/{'0' * 16}", headers=root).status_code == 404
        assert client.delete("/v1/admin/jobs/../x", headers=root).status_code in (404, 405, 422)
        assert client.get("/v1/admin/queue", headers=root).json() == {"jobs": []}


def test_devices_tell_memory_and_models(served):
    with client_of(served) as client:
        (cpu,) = client.get("/v1/admin/devices", headers=bearer(served, "root")).json()["devices"]
    assert (cpu["device"], cpu["models"]) == ("cpu", [{"id": "fake", "loaded": True}])
    memory = cpu["memory"]
    assert 0 < memory["free"] <= memory["total"]
    assert memory["used"] == memory["total"] - memory["free"]


def test_a_gpu_is_named_and_what_others_hold_of_it_counts_as_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(device_state, "free_memory", lambda device: 30)
    found = device_state.state_of("cuda:1", {"fake": False})
    assert (found.device, found.name, found.total, found.used, found.free) == ("cuda:1", "GPU 1", 100, 70, 30)


def test_metrics_are_prometheus_text_without_names(served):
    with client_of(served) as client:
        root = bearer(served, "root")
        before, _ = parse(client.get("/metrics", headers=root).text)
        job = client.post("/v1/jobs", json={**ASK, "steps": 2}, headers=bearer(served, "ann")).json()["id"]
        assert served.engine.stream(job).wait_closed(30)
        client.get("/v1/nothing", headers=root)
        answer = client.get("/metrics", headers=root)
        after, kinds = parse(answer.text)
    assert answer.headers["content-type"] == metrics.CONTENT_TYPE
    assert after["tessera_images_total", None] == before["tessera_images_total", None] + 1
    assert after["tessera_device_seconds_total", None] > before["tessera_device_seconds_total", None]
    assert after["tessera_jobs_waiting", None] == after["tessera_jobs_running", None] == 0
    assert after["tessera_job_seconds_count", None] == before["tessera_job_seconds_count", None] + 1
    missing = 'class="4xx"'
    assert after["tessera_http_responses_total", missing] >= before["tessera_http_responses_total", missing] + 1
    assert after["tessera_device_memory_bytes", 'device="cpu",state="free"'] > 0
    assert (kinds["tessera_images_total"], kinds["tessera_job_seconds"]) == ("counter", "histogram")
    assert not any(name in answer.text for name in ("ann", "root", "secret"))


def test_a_histogram_counts_up_to_each_bound():
    values = Histogram((1.0, 5.0))
    for value in (0.5, 1.0, 3.0, 99.5):
        values.add(value)
    found, _ = parse(metrics._histogram("x", "About.", values))
    buckets = {labels: value for (name, labels), value in found.items() if name == "x_bucket"}
    assert buckets == {'le="1"': 2, 'le="5"': 3, 'le="+Inf"': 4}
    assert (found["x_sum", None], found["x_count", None]) == (104.0, 4)
    assert metrics._sample("x", {"device": 'a"b\\c\n'}, 1) == 'x{device="a\\"b\\\\c\\n"} 1\n'


def test_two_workers_on_one_device_are_one_device_in_the_metrics():
    engine = Engine({"fake": "x"}, None, device="cpu,cpu", load=lambda source: FakePipeline())
    try:
        values, _ = parse(metrics.render(engine, {"2xx": 7}))
    finally:
        engine.close()
    assert values["tessera_models_loaded", 'device="cpu"'] == 0
    assert values["tessera_http_responses_total", 'class="2xx"'] == 7


def test_ready_says_why_it_is_not_and_asks_nobody_to_sign_in(served, monkeypatch):
    readiness = served.app.state.readiness
    with client_of(served) as client:
        assert (client.get("/ready").status_code, client.get("/ready").json()) == (200, {"status": "ready"})

        def full():
            raise StoreError("/srv/secret is full")

        monkeypatch.setattr(served.engine, "check_store", full)
        assert client.get("/ready").status_code == 200  # not every question writes
        monkeypatch.setattr(readiness, "_checked", float("-inf"))
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "The queue can't be written.")
        assert "retry-after" in answer.headers
        monkeypatch.undo()
        monkeypatch.setattr(readiness, "_checked", float("-inf"))
        assert client.get("/ready").status_code == 200


def test_a_server_is_ready_when_its_preset_model_has_been_loaded():
    class Waiting:
        is_closing, models = False, ("fake",)
        future: Future | None = Future()

        def loaded(self, key):
            return self.future

        def check_store(self):
            pass

        def health(self):
            return type("Health", (), {"problems": ()})

    engine = Waiting()
    ready = metrics.Readiness(engine)
    assert "not loaded" in ready.reason()
    engine.future.set_result("a model")
    assert ready.reason() == ""
    engine.future = None  # it has made room for another, and comes back when it is asked for
    assert ready.reason() == ""
    engine.future = Future()
    engine.future.set_exception(OSError("/srv/secret"))
    assert ready.reason() == "The preset model could not be loaded."


def test_without_users_everybody_on_this_machine_may_look(tmp_path):
    with serving_page(tmp_path, with_users=False) as served, client_of(served) as client:
        for path in ADMIN:
            assert client.get(path).status_code == 200
        (local,) = client.get("/v1/admin/users").json()["users"]
        assert (local["user"], local["role"], local["quotas"]["images_per_day"]) == ("local", "admin", None)
        assert client.get("/v1/usage").json()["user"] == "local"
