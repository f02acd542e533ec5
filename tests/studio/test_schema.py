"""The API against its own OpenAPI schema: schemathesis makes requests from it, wrong ones included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.studio.fakes import FakePipeline
from tests.studio.serving import bearer, serving_page

PROJECT = Path(__file__).parents[2]
SECONDS = 120
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth"


def test_files_in_forms_are_described_as_openapi_3_1_has_it(tmp_path):
    """Of `format: binary`, which is that of 3.0, schemathesis makes values on which its own validator raises."""
    with serving_page(tmp_path, FakePipeline()) as served:
        schema = httpx.get(f"{served.address}/v1/openapi.json", headers=bearer(served, "root"), trust_env=False).json()
    assert schema["openapi"].startswith("3.1")
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    forms = {}
    for path, methods in schema["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if (form := content.get("multipart/form-data")) is not None:
            assert '"binary"' not in json.dumps(form)
            forms[path] = {name for name, one in form["schema"]["properties"].items() if one == file}
            assert forms[path] == form["encoding"].keys()
            assert "image" in form["schema"]["required"]
    assert forms == {"/v1/images/edits": {"image", "mask"}, "/v1/images/variations": {"image"}}
    content = schema["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert content["encoding"]["mask"]["contentType"] == "image/png, image/webp"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_api_keeps_to_its_schema(tmp_path):
    with serving_page(tmp_path, FakePipeline(), queue=10_000, queue_per_user=10_000) as served:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/v1/openapi.json",
                   "--header", f"Authorization: Bearer {served.tokens['root']}", "--checks", CHECKS,
                   "--max-time", str(SECONDS), "--request-timeout", "60", "--seed", "0", "--no-color",
                   "--exclude-path-regex", "/events$"]  # fmt: skip
        env = os.environ | {"SCHEMATHESIS_HOOKS": "tests.studio.schemathesis_hooks", "PYTHONPATH": str(PROJECT)}
        told = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=500, env=env)
        assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-2000:]
        assert served.engine.health().problems == ()
