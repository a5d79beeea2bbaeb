"""Documents in PostgreSQL with the pgvector extension: one table, and one row of state beside it.

`NAME` has the columns id, vector, text, media (msgpack), pictures (their number), labels (the modality, the source and
all metadata as JSON) and digest. `NAME_state` says which model the vectors are from, how many documents there are, and
the last commit's number. A commit is a transaction that begins by locking that row, so that commits are applied one
after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import psycopg
from pgvector.psycopg import register_vector
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Jsonb

from umarvel_ray.errors import UserError
from umarvel_ray.index.hits import Hit
from umarvel_ray.index.labels import LABELS, Filters
from umarvel_ray.index.log import NoSpace
from umarvel_ray.index.records import Add, Record
from umarvel_ray.index.store import (
    FORMAT,
    LEAST_CANDIDATES,
    Unreachable,
    Unstorable,
    check_model,
    digest_of,
    media_of,
    packed_media,
    settle,
)
from umarvel_ray.index.writer import Committed
from umarvel_ray.items.images import pictures_of

CONNECTION = {"connect_timeout": 5, "tcp_user_timeout": 30_000, "application_name": "umarvel"}  # unless the URL says so
LOCK = 0x756D6172  # held while a table is created
MOST_CANDIDATES = 1000  # pgvector's own limit

TABLE = """
CREATE TABLE {table} (
    id text PRIMARY KEY, vector vector({dimension}) NOT NULL, text text, media bytea, pictures integer NOT NULL,
    labels jsonb NOT NULL, digest text NOT NULL
);
CREATE INDEX ON {table} USING gin (labels jsonb_path_ops);
CREATE TABLE {state} (format integer, identity text, sequence bigint, documents bigint);
"""
PUT = """
INSERT INTO {table} (id, vector, text, media, pictures, labels, digest) VALUES (%s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (id) DO UPDATE SET (vector, text, media, pictures, labels, digest)
    = (EXCLUDED.vector, EXCLUDED.text, EXCLUDED.media, EXCLUDED.pictures, EXCLUDED.labels, EXCLUDED.digest)
"""

Connection = psycopg.Connection[tuple[Any, ...]]
Result = TypeVar("Result")


class PgvectorStore:
    """See `Store`. The table is created if it does not exist.

    Args:
        url: of the database; whatever it lacks comes from the PG* variables, ~/.pgpass and ~/.pg_service.conf.
        table: its name, or SCHEMA.NAME.
        identity: of the checkpoint (see `CheckpointRef`).
        dimension: of a new table, and the most that an existing one may have.
        exact: whether to compare the query with every vector that the filters allow; otherwise an index on the vectors
            is used, if the table has one.

    Raises:
        Unreachable: the database does not respond.
        UserError: a malformed URL, a table of something else or of another model, or a missing extension or right.
    """

    def __init__(self, url: str, table: str, identity: str, dimension: int, exact: bool = True) -> None:
        try:
            self._options = CONNECTION | conninfo_to_dict(url)
        except psycopg.Error:  # it repeats the URL, which may hold a password
            raise UserError("store: the url is not one of PostgreSQL; write postgresql://USER@HOST/DATABASE") from None
        self._where, self._exact, self._local = f"store: the table {table}", exact, threading.local()
        self._open: list[Connection] = []
        names = table.split(".")
        self._names = {
            "table": sql.Identifier(*names),
            "state": sql.Identifier(*names[:-1], f"{names[-1]}_state"),
        }
        self._run(lambda connection: self._create(connection, identity, dimension), vectors=False)
        found = self._run(self._found, vectors=False)
        self.dimension = check_model(self._where, found, identity, dimension)

    @property
    def sequence(self) -> int:
        """See `Searchable`."""
        return int(self._state("sequence"))

    def __len__(self) -> int:
        return int(self._state("documents"))

    def search(self, vector: np.ndarray, top_k: int, *, filters: Filters | None = None) -> list[Hit]:
        """See `Searchable`. An approximate search that finds fewer than `top_k` documents is repeated exactly."""
        where, values = _conditions(filters or {})
        values |= {"vector": np.ascontiguousarray(vector, np.float32), "top_k": top_k}

        def nearest(connection: Connection, exact: bool) -> list[Hit]:
            # No index serves an expression other than the bare distance.
            distance = "(vector <#> %(vector)s) + 0" if exact else "vector <#> %(vector)s"
            query = self._sql(
                f"SELECT id, text, pictures, labels, {distance} AS distance FROM {{table}} WHERE {where} "
                "ORDER BY distance LIMIT %(top_k)s"
            )
            with nullcontext() if exact else connection.transaction():
                if not exact:
                    candidates = min(max(top_k, LEAST_CANDIDATES), MOST_CANDIDATES)
                    connection.execute(f"SET LOCAL hnsw.ef_search = {candidates}")
                rows = connection.execute(query, values).fetchall()
            return [
                Hit(_document(id_, text, labels), -distance, pictures=pictures)
                for id_, text, pictures, labels, distance in rows
            ]

        if not self._exact:
            hits = self._run(lambda connection: nearest(connection, exact=False))
            if len(hits) == top_k:
                return hits
        return self._run(lambda connection: nearest(connection, exact=True))

    def documents(self, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """See `Searchable`."""
        rows = self._rows_of("id, text, labels, media", ids)
        found = {row[0]: _document(*row[:3]) | media_of(row[3]) for row in rows}
        return [found.get(id_) for id_ in ids]

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """See `Store`."""
        return dict(self._rows_of("id, digest", ids))

    def commit(self, records: Sequence[Record]) -> Committed:
        """See `Store`."""
        digests = {one.id: digest_of(one, self.dimension) for one in records if isinstance(one, Add)}

        def work(connection: Connection) -> Committed:
            with connection.transaction():
                sequence: int = self._one(connection, "SELECT sequence FROM {state} FOR UPDATE")
                if not records:
                    return Committed(sequence, [])
                ids = _without_nul(record.id for record in records)
                known = connection.execute(self._sql("SELECT id FROM {table} WHERE id = ANY(%s)"), [ids]).fetchall()
                change = settle(records, {id_ for (id_,) in known})
                connection.execute(self._sql("DELETE FROM {table} WHERE id = ANY(%s)"), [change.deleted])
                with connection.cursor() as cursor:
                    cursor.executemany(self._sql(PUT), [_row(one, digests[one.id]) for one in change.put])
                state = "UPDATE {state} SET sequence = sequence + 1, documents = documents + %s"
                connection.execute(self._sql(state), [change.growth])
                return Committed(sequence + 1, change.existed)

        return self._run(work)

    def close(self) -> None:
        """See `Store`."""
        while self._open:
            self._open.pop().close()

    def _create(self, connection: Connection, identity: str, dimension: int) -> None:
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            if self._is_there(connection, "state"):
                return
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            if self._is_there(connection, "table"):
                raise UserError(f"{self._where} is not one of documents; name another one")
            connection.execute(self._sql(TABLE, dimension=sql.Literal(dimension)))
            connection.execute(self._sql("INSERT INTO {state} VALUES (%s, %s, 0, 0)"), [FORMAT, identity])

    def _found(self, connection: Connection) -> tuple[int, str, int]:
        """The format, the identity and the dimension of the table that is there."""
        query = "SELECT atttypmod FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = 'vector'"
        size = connection.execute(query, [self._names["table"].as_string(connection)]).fetchone()
        if size is None:
            raise UserError(f"{self._where} has no vectors; drop its state or restore it")
        format_, identity = connection.execute(self._sql("SELECT format, identity FROM {state}")).fetchall()[0]
        return format_, identity, size[0]

    def _is_there(self, connection: Connection, name: str) -> bool:
        found = connection.execute("SELECT to_regclass(%s)", [self._names[name].as_string(connection)]).fetchall()
        return found[0][0] is not None

    def _state(self, column: str) -> Any:
        return self._run(lambda connection: self._one(connection, f"SELECT {column} FROM {{state}}"))

    def _one(self, connection: Connection, query: str) -> Any:
        return connection.execute(self._sql(query)).fetchall()[0][0]

    def _rows_of(self, columns: str, ids: Sequence[str]) -> list[tuple[Any, ...]]:
        query = self._sql(f"SELECT {columns} FROM {{table}} WHERE id = ANY(%s)")
        return self._run(lambda connection: connection.execute(query, [_without_nul(ids)]).fetchall())

    def _sql(self, query: str, **more: sql.Composable) -> sql.Composed:
        return sql.SQL(query).format(**self._names, **more)  # no part comes from a client

    def _run(self, work: Callable[[Connection], Result], vectors: bool = True) -> Result:
        """Do work in a connection of this thread; once more if the connection was lost, as when a server restarts."""
        for again in (True, False):
            try:
                return work(self._connection(vectors))
            except psycopg.errors.DiskFull:
                raise NoSpace(f"{self._where}: the database's disk is full; free space") from None
            except psycopg.DataError as error:
                raise Unstorable(f"{self._where} cannot hold a document: {_line(error)}") from None
            except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction) as error:
                if not again:
                    raise Unreachable(f"store: the database does not respond: {_line(error)}") from None
            except psycopg.Error as error:
                raise UserError(f"{self._where}: {_line(error)}") from None
        raise AssertionError

    def _connection(self, vectors: bool) -> Connection:
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None or connection.closed:
            # Statements are not prepared, so that a pool such as PgBouncer may stand between.
            connection = psycopg.connect(**self._options, autocommit=True, prepare_threshold=None)  # type: ignore[arg-type]
            self._local.connection, self._local.vectors = connection, False
            self._open = [*(one for one in self._open if not one.closed), connection]
        if vectors and not self._local.vectors:
            register_vector(connection)
            self._local.vectors = True
        return connection


def _conditions(filters: Filters) -> tuple[str, dict[str, Any]]:
    """What follows WHERE, and its values by name."""
    values: dict[str, Any] = {}
    parts = ["true"]
    for name, wanted in filters.items():
        usable = [Jsonb({name: value}) for value in wanted if "\0" not in f"{name}{value}"]
        named = {f"label{len(values) + number}": label for number, label in enumerate(usable)}
        values |= named
        parts.append(" OR ".join(f"labels @> %({label})s" for label in named) or "false")
    return " AND ".join(f"({part})" for part in parts), values


def _row(document: Add, digest: str) -> tuple[Any, ...]:
    labels = Jsonb(document.labels)
    vector = np.ascontiguousarray(document.vector, np.float32)
    pictures = len(pictures_of(document.image))
    return document.id, vector, document.text, packed_media(document), pictures, labels, digest


def _document(id_: str, text: str | None, labels: dict[str, Any]) -> dict[str, Any]:
    metadata = {name: value for name, value in labels.items() if name not in LABELS}
    return {"id": id_, "text": text, **{name: labels[name] for name in LABELS}, "metadata": metadata}


def _without_nul(texts: Iterable[str]) -> list[str]:
    """The texts that PostgreSQL can hold; no other is in a table."""
    return [text for text in texts if "\0" not in text]


def _line(error: psycopg.Error) -> str:
    return error.diag.message_primary or (str(error).splitlines() or [type(error).__name__])[0]
