"""Document stores for tests: PostgreSQL with pgvector that runs here, Qdrant in this process, and a Qdrant server."""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from qdrant_client import QdrantClient

from umarvel_ray.index.pgvector import PgvectorStore
from umarvel_ray.index.qdrant import QdrantStore, connect
from umarvel_ray.index.store import Store

QDRANT_URL = "UMARVEL_TEST_QDRANT_URL"
ENGINES = ("pgvector", "qdrant", "qdrant server")

Open = Callable[..., Store]


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own while the block runs; yields the URL of its database."""
    server = _started()
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def _started() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pgserver
    except ImportError as error:
        pytest.skip(f"no PostgreSQL for the tests: {error}")
    for again in (True, True, False):
        folder = tempfile.mkdtemp(prefix="umarvel-pg-")
        try:
            return pgserver.get_server(folder, cleanup_mode="delete")
        except subprocess.TimeoutExpired:  # it waits for ten seconds, and it may still be starting
            with suppress(Exception):
                user = "pgserver" if os.geteuid() == 0 else None
                pgserver.pg_ctl(["-m", "immediate", "stop"], pgdata=Path(folder), user=user, timeout=60)
            if not again:
                raise
        except Exception as error:  # as where root may not make the user that PostgreSQL insists on
            pytest.skip(f"PostgreSQL cannot be run here: {error!r}")
    raise AssertionError


def new_name() -> str:
    """A name that no table or collection has."""
    return f"documents_{uuid.uuid4().hex[:12]}"


@contextmanager
def new_database(url: str) -> Iterator[tuple[str, psycopg.Connection]]:
    """A database of its own: its URL, and a connection to another one, which may close the new one."""
    name = new_name()
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            yield url.replace("/postgres?", f"/{name}?"), admin
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def close_database(admin: psycopg.Connection, url: str, closed: bool) -> None:
    """End a database's connections and take no new ones, as if its server was down; or take them again."""
    name = url.rpartition("/postgres:@/")[2].partition("?")[0]
    admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {not closed}")
    if closed:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])


def opener(engine: str, postgres_url: Callable[[], str]) -> Open:
    """Opens stores of an engine: `open(name, identity, dimension, exact=True)`; equal names, equal collections."""
    if engine == "pgvector":
        url = postgres_url()
        return lambda *args, **more: PgvectorStore(url, *args, **more)
    if engine == "qdrant":
        client = QdrantClient(":memory:")
        return lambda *args, **more: QdrantStore(client, *args, **more)
    if not os.environ.get(QDRANT_URL):
        pytest.skip(f"no Qdrant server; set {QDRANT_URL}")
    url, key = os.environ[QDRANT_URL], os.environ.get("UMARVEL_STORE_API_KEY")
    return lambda *args, **more: QdrantStore(connect(url, key), *args, **more)
