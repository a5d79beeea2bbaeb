"""The service on a store: what the tests of our own index expect, and what clients see when the engine is away.

It runs on PostgreSQL here, and on a Qdrant server where one is named; `tests/index/test_stores.py` has all engines.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.serving.test_serve import (  # the same tests
    embedder,  # noqa: F401
    test_a_picture_finds_itself,  # noqa: F401
    test_added_documents_are_found_and_deleted_ones_are_not,  # noqa: F401
    test_health_when_ready,  # noqa: F401
    test_search_equals_the_library,  # noqa: F401
)
from tests.support.served import call, config_file, service_of
from tests.support.stores import QDRANT_URL, close_database, new_database, new_name, postgres
from umarvel_ray.errors import UserError
from umarvel_ray.index.store import Unreachable
from umarvel_ray.serving.app import build
from umarvel_ray.serving.settings import Service
from umarvel_ray.serving.store import fill_store


@pytest.fixture(scope="module")
def database():
    with postgres() as url, new_database(url) as (own, admin):
        yield own, admin


@pytest.fixture(scope="module", params=["pgvector", "qdrant"])
def store(request) -> dict:
    if request.param == "pgvector":
        return {"kind": "pgvector", "url": request.getfixturevalue("database")[0]}
    if not os.environ.get(QDRANT_URL):
        pytest.skip(f"no Qdrant server; set {QDRANT_URL}")
    return {"kind": "qdrant", "url": os.environ[QDRANT_URL], "collection": new_name()}


@pytest.fixture(scope="module")
def service(run, store, tmp_path_factory) -> Service:
    """A service whose store has the documents of the run."""
    service = service_of(run, live=None)
    fill_store(config_file(service, tmp_path_factory.mktemp("config"), store=store))
    return Service.model_validate(service.model_dump() | {"index": None, "store": store})


def test_a_read_after_a_write_sees_it_and_an_early_one_waits(url):
    for number in range(3):
        document = {"id": "again", "text": f"version {number}"}
        _, added, _ = call(f"{url}/v1/index", {"documents": [document]})
        body = {"query": document["text"], "top_k": 1, "after": added["sequence"], "return_documents": True}
        _, response, _ = call(f"{url}/v1/search", body)
        assert response["results"][0]["document"]["text"] == document["text"]
    assert call(f"{url}/v1/index/delete", {"ids": ["again"]})[1]["deleted"] == 1


def test_an_engine_that_is_away_is_one_clear_line(url, store, request):
    if store["kind"] != "pgvector":
        pytest.skip("only a database can be closed from here")
    _, admin = request.getfixturevalue("database")
    close_database(admin, store["url"], closed=True)
    try:
        for route, body in (
            ("search", {"query": "a fox"}),
            ("index", {"documents": [{"id": "x", "text": "a fox"}]}),
            ("index/delete", {"ids": ["x"]}),
            ("index", None),
            ("documents/i1/image", None),
        ):
            status, response, headers = call(f"{url}/v1/{route}", body)
            assert (status, response["error"]["type"]) == (503, "store_unreachable")
            assert response["error"]["message"].startswith("the store of the documents does not respond")
            assert headers["Retry-After"] == "1"
        assert call(f"{url}/health")[0] == call(f"{url}/v1/embeddings", {"input": "a fox"})[0] == 200
    finally:
        close_database(admin, store["url"], closed=False)
    assert len(call(f"{url}/v1/search", {"query": "a fox", "top_k": 15})[1]["results"]) == 15


def test_what_the_engine_cannot_hold_is_the_clients_error(url, store):
    status, response, _ = call(f"{url}/v1/index", {"documents": [{"id": "a\0", "text": "a"}]})
    assert status == (400 if store["kind"] == "pgvector" else 200)
    if status == 400:
        assert "U+0000" in response["error"]["message"]
    call(f"{url}/v1/index/delete", {"ids": ["a\0"]})


class TestSettings:
    """Without a running service."""

    def test_a_store_of_another_model_is_refused_before_anything_starts(self, run, service):
        other = run / "checkpoints" / "reranker"
        with pytest.raises(UserError, match="was embedded with another model"):
            build(service.model_copy(update={"embedder": str(other), "reranker": None}))

    @pytest.mark.parametrize(
        "store",
        [
            {"kind": "pgvector", "url": "postgresql://me:s3cret@127.0.0.1:1/x"},
            {"kind": "qdrant", "url": "http://127.0.0.1:1"},
        ],
    )
    def test_an_engine_that_is_not_there_is_refused(self, run, store):
        service = service_of(run, index=None, live=None, store=store)
        with pytest.raises(Unreachable, match="does not respond") as error:
            build(service)
        assert "s3cret" not in f"{error.value!r} {service!r}"
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "store",
        [
            {"kind": "milvus", "url": "s3cret"},
            {"kind": "pgvector", "url": ["s3cret"]},
            {"kind": "pgvector", "url": "postgresql://me:s3cret@h/x", "table": "a; drop"},
            {"kind": "qdrant", "url": "s3cret", "table": "x"},
        ],
    )
    def test_a_malformed_store_is_one_line_without_secrets(self, run, store, tmp_path, capsys):
        with pytest.raises(UserError, match="not a config of one application") as error:
            fill_store(config_file(service_of(run), tmp_path, store=store))
        assert "s3cret" not in str(error.value)
        assert "\n" not in str(error.value)

    def test_the_command_copies_again_without_changes(self, run, tmp_path, database):
        own, _ = database
        path = config_file(
            service_of(run, live=None), tmp_path, store={"kind": "pgvector", "url": own, "table": new_name()}
        )
        outputs = [
            subprocess.run(
                [sys.executable, "-m", "umarvel_ray.cli", "index", "--config", str(path)],
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            ).stdout
            for _ in range(2)
        ]
        assert outputs[0].startswith("copied 15 documents and changes;")
        assert outputs[1].startswith("copied 0 documents and changes;")
        assert outputs[1].endswith("holds 15\n")
