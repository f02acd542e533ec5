"""The API against its own OpenAPI schema: schemathesis makes requests from it, wrong ones included."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.studio.fakes import FakePipeline
from tests.studio.serving import serving_page

SECONDS = 120
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_api_keeps_to_its_schema(tmp_path):
    with serving_page(tmp_path, FakePipeline(), queue=10_000, queue_per_user=10_000) as served:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/v1/openapi.json",
                   "--header", f"Authorization: Bearer {served.tokens['root']}", "--checks", CHECKS,
                   "--max-time", str(SECONDS), "--request-timeout", "60", "--seed", "0", "--no-color",
                   "--exclude-path-regex", "/events$"]  # fmt: skip
        told = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=500)
        assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-2000:]
        assert served.engine.health().problems == ()
