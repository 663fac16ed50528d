"""`pymongo`'s asynchronous client on the twin of a replica set, as far as `workers.store` uses it.

Requests and replies take time and can be lost; an operation whose process has died or no longer waits may still be
carried out. The driver's own second try of a write is left out: its outcomes are among those of a slow first one.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from pymongo import ReplaceOne, UpdateMany, UpdateOne, WriteConcern
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    NetworkTimeout,
    NotPrimaryError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern

from bench.simulation.documents import aggregated, candidates, inserted_by, matches, ordered, shown, stored, updated
from bench.simulation.gaps import NotTwinned
from bench.simulation.network import OWNER, Answer
from bench.simulation.replica_set import SELECTION_SECONDS, Taken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from bench.simulation.documents import Document
    from bench.simulation.network import Process
    from bench.simulation.replica_set import Collections, ReplicaSet

SET: ContextVar[ReplicaSet] = ContextVar("replica_set")
"""The one replica set of this world."""
Operation = UpdateOne | UpdateMany | ReplaceOne[Any]


class TwinMongo:
    """See `AsyncMongoClient`."""

    def __init__(self) -> None:
        self.set: ReplicaSet = SET.get()
        self.owner: Process | None = OWNER.get()

    def get_database(self, _name: str, *, write_concern: WriteConcern, read_concern: ReadConcern, **_: Any) -> Any:
        """See `AsyncMongoClient.get_database`."""
        return TwinDatabase(self, write_concern, read_concern)

    @property
    def admin(self) -> TwinDatabase:
        """See `AsyncMongoClient.admin`."""
        return TwinDatabase(self, WriteConcern(), ReadConcern())

    @asynccontextmanager
    async def start_session(self, snapshot: bool) -> AsyncIterator[TwinSession]:
        """A session whose reads all see what a majority held at its first."""
        assert snapshot
        yield TwinSession()

    async def ask(self, serve: Callable[[], Any], *, durable: bool = False, bulk: bool = False) -> Any:
        """Let the primary carry something out. `durable`: answer when a majority has it. Raises the driver's errors."""
        if self.owner is not None and not self.owner.alive:
            raise AutoReconnect("the process is dead")
        asked = _Asked(self.set, serve, durable=durable, bulk=bulk)
        network = self.set.network
        network.at(network.delay(), None, asked.arrive, network.now)
        return await asked.answer.wait()


class TwinSession:
    """See `AsyncClientSession`."""

    def __init__(self) -> None:
        self.snapshot: Collections | None = None


class TwinDatabase:
    """See `AsyncDatabase`."""

    def __init__(self, client: TwinMongo, write_concern: WriteConcern, read_concern: ReadConcern) -> None:
        self._client = client
        self.write_concern = write_concern
        self.read_concern = read_concern

    def __getitem__(self, name: str) -> TwinCollection:
        return TwinCollection(self._client, name, self.write_concern, self.read_concern)

    async def command(self, name: str) -> Document:
        """`ping`, to the primary."""
        if name != "ping":
            raise NotTwinned(name)
        answer: Document = await self._client.ask(lambda: {"ok": 1.0})
        return answer


class _Asked:
    """One operation on its way there and back."""

    __slots__ = ("_bulk", "_durable", "_serve", "_set", "answer")

    def __init__(self, replica_set: ReplicaSet, serve: Callable[[], Any], *, durable: bool, bulk: bool) -> None:
        self._set = replica_set
        self._serve = serve
        self._durable = durable
        self._bulk = bulk
        self.answer = Answer()

    def arrive(self, asked_at: float) -> None:
        replica_set = self._set
        network = replica_set.network
        if replica_set.primary_at > network.now:
            if replica_set.primary_at > asked_at + SELECTION_SECONDS:
                network.at_time(
                    asked_at + SELECTION_SECONDS, None, self._fail, ServerSelectionTimeoutError("no primary")
                )
            else:
                network.at_time(replica_set.primary_at, None, self.arrive, asked_at)
            return
        chance = replica_set.faults.lost
        if chance and network.rng.random() < chance:
            executed = network.rng.random() < 0.7
            network.note("mongo", "lost", "reply" if executed else "request")
            if executed:
                self._serve_deaf()
            network.at(network.delay(), None, self._fail, AutoReconnect("connection closed"))
            return
        position = replica_set.position
        try:
            value = self._serve()
        except BulkWriteError as refused:
            error = refused
            if replica_set.position > position and self._durable:
                replica_set.when_majority(replica_set.position, lambda done: self._after_error(error, done))
            else:
                self._reply_error(error)
            return
        if self._durable:
            # An update that changed nothing waits for what it saw, as the server does.
            replica_set.when_majority(replica_set.position, lambda done: self._after_write(value, done))
        else:
            self._reply(value)

    def _serve_deaf(self) -> None:
        with suppress(BulkWriteError):
            self._serve()

    def _after_write(self, value: Any, done: bool) -> None:
        if done:
            self._reply(value)
        else:
            self._reply_error(self._unmet({"writeErrors": [], "writeConcernErrors": []}))

    def _after_error(self, error: BulkWriteError, done: bool) -> None:
        self._reply_error(error if done else self._unmet(error.details))

    def _unmet(self, details: Mapping[str, Any]) -> Exception:
        """How a driver says that nobody knows what became of a write."""
        kind = self._set.network.rng.randrange(4)
        if kind == 0:
            return AutoReconnect("connection closed")
        if kind == 1:
            return NetworkTimeout("timed out")
        if kind == 2:
            return NotPrimaryError("not primary", {"code": 10107})
        unmet = {"code": 64, "errmsg": "waiting for replication timed out"}
        if self._bulk:
            return BulkWriteError({**details, "writeConcernErrors": [unmet]})
        return WriteConcernError("waiting for replication timed out", 64, unmet)

    def _reply(self, value: Any) -> None:
        network = self._set.network
        network.at(network.delay(), None, self.answer.give, value)

    def _reply_error(self, error: Exception) -> None:
        network = self._set.network
        network.at(network.delay(), None, self._fail, error)

    def _fail(self, error: Exception) -> None:
        self.answer.give(error=error)


class TwinCollection:
    """See `AsyncCollection`."""

    def __init__(self, client: TwinMongo, name: str, write_concern: WriteConcern, read_concern: ReadConcern) -> None:
        self._client = client
        self._set = client.set
        self._name = name
        self._write_concern = write_concern
        self._read_concern = read_concern
        self._durable = write_concern.document.get("w") == "majority"

    def with_options(
        self, write_concern: WriteConcern | None = None, read_concern: ReadConcern | None = None
    ) -> TwinCollection:
        """See `AsyncCollection.with_options`."""
        return TwinCollection(
            self._client, self._name, write_concern or self._write_concern, read_concern or self._read_concern
        )

    # --- writing -----------------------------------------------------------------------------------------------------

    async def insert_many(self, documents: Sequence[Document], ordered: bool = True) -> None:
        """Raises BulkWriteError with the server's details."""
        encoded = [stored(document) for document in documents]

        def serve() -> None:
            self._each(encoded, lambda document: self._set.insert(self._name, document), ordered=ordered)

        self._set.network.pass_by(self._client.owner, "write")
        await self._client.ask(serve, durable=self._durable, bulk=True)

    async def bulk_write(self, operations: Sequence[Operation], ordered: bool = True) -> None:
        """UpdateOne, UpdateMany, ReplaceOne. Raises BulkWriteError with the server's details."""
        encoded = [_encoded(operation) for operation in operations]

        def serve() -> None:
            self._each(encoded, lambda operation: self._update(*operation), ordered=ordered)

        await self._client.ask(serve, durable=self._durable, bulk=True)

    async def update_one(self, query: Document, update: Any, upsert: bool = False) -> Any:
        """See `AsyncCollection.update_one`."""
        return await self._single(query, update, upsert=upsert, many=False)

    async def update_many(self, query: Document, update: Any) -> Any:
        """See `AsyncCollection.update_many`."""
        return await self._single(query, update, upsert=False, many=True)

    async def _single(self, query: Document, update: Any, *, upsert: bool, many: bool) -> Any:
        encoded = stored({"u": update})["u"]

        def serve() -> _Result:
            return _Result(self._update(query, encoded, upsert, many, False))

        return await self._client.ask(serve, durable=self._durable)

    async def find_one_and_update(self, query: Document, update: Any, upsert: bool = False, **_options: Any) -> Any:
        """Always returns the document as it is afterwards."""
        encoded = stored({"u": update})["u"]

        def serve() -> Document | None:
            self._update(query, encoded, upsert, False, False)
            return next(self._matching(self._set.local, query), None)

        return await self._client.ask(serve, durable=self._durable)

    def _each(self, items: Sequence[Any], write: Callable[[Any], object], *, ordered: bool) -> None:
        errors = []
        for index, item in enumerate(items):
            try:
                write(item)
            except Taken as taken:
                errors.append(
                    {
                        "index": index,
                        "code": 11000,
                        "errmsg": str(taken),
                        "keyPattern": taken.pattern,
                        "keyValue": taken.value,
                    }
                )
                if ordered:
                    break
        if errors:
            raise BulkWriteError({"writeErrors": errors, "writeConcernErrors": []})

    def _update(self, query: Mapping[str, Any], update: Any, upsert: bool, many: bool, replaces: bool) -> int:
        """How many documents the filter found."""
        found = [
            document for document in candidates(self._set.local.get(self._name, {}), query) if matches(document, query)
        ]
        for document in found if many else found[:1]:
            changed = {"_id": document["_id"], **update} if replaces else updated(document, update)
            if changed is not document and changed != document:
                self._set.put(self._name, changed)
        if not found and upsert:
            fresh = {"_id": query["_id"], **update} if replaces else inserted_by(query, update)
            self._set.insert(self._name, fresh)
        return len(found)

    # --- reading -----------------------------------------------------------------------------------------------------

    def find(
        self,
        query: Document,
        projection: Mapping[str, Any] | None = None,
        *,
        sort: Sequence[tuple[str, int]] | None = None,
        limit: int = 0,
        skip: int = 0,
        hint: str | None = None,
        session: TwinSession | None = None,
    ) -> TwinCursor:
        """See `AsyncCollection.find`."""

        def serve() -> list[Document]:
            found = ordered(self._matching(self._state(session), query), sort)[skip:]
            return [shown(document, projection) for document in (found[:limit] if limit else found)]

        return TwinCursor(self._client, serve)

    async def find_one(self, query: Document, projection: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """See `AsyncCollection.find_one`."""
        found = await self.find(query, projection, limit=1, **options).to_list()
        return found[0] if found else None

    async def count_documents(self, query: Document, limit: int = 0) -> int:
        """See `AsyncCollection.count_documents`."""
        return len(await self.find(query, {"_id": 1}, limit=limit).to_list())

    async def aggregate(
        self, pipeline: Sequence[Document], session: TwinSession | None = None, hint: str | None = None
    ) -> TwinCursor:
        """See `AsyncCollection.aggregate`."""

        def serve() -> list[Document]:
            return aggregated(self._state(session).get(self._name, {}).values(), pipeline)

        self._set.network.pass_by(self._client.owner, "load")
        return TwinCursor(self._client, serve, await self._client.ask(serve))

    def _matching(self, state: Collections, query: Document) -> Any:
        return (one for one in candidates(state.get(self._name, {}), query) if matches(one, query))

    def _state(self, session: TwinSession | None) -> Collections:
        if session is not None:
            if session.snapshot is None:
                session.snapshot = self._set.snapshot()
            return session.snapshot
        return self._set.committed if self._read_concern.level == "majority" else self._set.local


class TwinCursor:
    """See `AsyncCursor`: everything comes in one batch."""

    def __init__(self, client: TwinMongo, serve: Callable[[], Any], found: list[Document] | None = None) -> None:
        self._client = client
        self._serve = serve
        self._found = found

    async def to_list(self) -> list[Document]:
        """All of it."""
        if self._found is None:
            self._found = await self._client.ask(self._serve)
        return self._found

    async def __aiter__(self) -> AsyncIterator[Document]:
        for document in await self.to_list():
            yield document

    async def __aenter__(self) -> TwinCursor:
        return self

    async def __aexit__(self, *_error: object) -> None:
        pass


class _Result:
    """See `UpdateResult`."""

    def __init__(self, matched: int) -> None:
        self.matched_count = matched


def _encoded(operation: Operation) -> tuple[Mapping[str, Any], Any, bool, bool, bool]:
    """Filter, update, upsert?, many?, replaces? of the driver's object."""
    if not isinstance(operation, (UpdateOne, UpdateMany, ReplaceOne)):
        raise NotTwinned(type(operation).__name__)
    encoded = stored({"u": operation._doc})["u"]
    return (
        operation._filter,
        encoded,
        bool(operation._upsert),
        isinstance(operation, UpdateMany),
        isinstance(operation, ReplaceOne),
    )
