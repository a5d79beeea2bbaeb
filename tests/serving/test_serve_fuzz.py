"""For any request to any route, the response conforms to the OpenAPI schema and is not a 5xx."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from ray import serve

from tests.support.served import service_of
from umarvel_ray.serving.app import build
from umarvel_ray.serving.auth import Keys
from umarvel_ray.serving.ingress import make_app
from umarvel_ray.serving.settings import Limits

KEY = "tests:" + "k" * 24
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def url(address, run, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY + "\n")
    keys.chmod(0o600)
    serve.run(build(service_of(run, keys=str(keys))), name="umarvel", route_prefix="/")
    return address


@pytest.mark.parametrize(
    ("key", "examples"),
    [
        (KEY.partition(":")[2], 10),
        pytest.param(KEY.partition(":")[2], 300, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
        pytest.param(None, 100, marks=pytest.mark.slow),
    ],
)
def test_schemathesis_finds_nothing(url, key, examples, tmp_path):
    """Schemathesis in another process: examples, the schema's boundary values, valid and invalid random requests."""
    (tmp_path / "openapi.json").write_text(json.dumps(make_app(None, Limits(), Keys()).openapi()))
    options = ["--url", url, "--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--no-color"]
    options += ["-n", str(examples), "--seed", "1", "-w", "1", "--request-timeout", "60"]
    options += ["-H", f"Authorization: Bearer {key}"] if key else []
    fuzzed = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert fuzzed.returncode == 0, fuzzed.stdout[-8000:] + fuzzed.stderr[-2000:]
