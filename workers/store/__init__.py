"""The MongoDB seam: client, collections with their concerns, indexes, and one sub-store per noun.

Opened once per process by `workers/__main__.py`. Nobody outside `workers/store` touches the driver. Every handle writes
with majority and journal and reads what a majority has, because a read that a failover can take back is no ground for
an ack (reliability.md section 0, fact 3).
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import structlog
from bson.codec_options import CodecOptions
from pymongo import ASCENDING, DESCENDING, AsyncMongoClient, IndexModel
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Document = dict[str, Any]
Client = AsyncMongoClient[Document]
Database = AsyncDatabase[Document]
Collection = AsyncCollection[Document]

DEFAULT_DATABASE: Final = "trireme"
WRITE_CONCERN: Final = WriteConcern("majority", j=True, wtimeout=5000)
READ_CONCERN: Final = ReadConcern("majority")
DAY_SECONDS: Final = 86_400
SYSTEM_INDEX: Final = "system_messages"
"""Partial index over a group's system messages: its state is the fold of them."""
SCOPED_KEY_INDEX: Final = "scoped_idempotency_key"
SEQUENCE_INDEX: Final = "conversation_sequence"

StoreError = PyMongoError
"""Whatever the driver raises. Callers outside this package catch this name, never the driver's."""

_CONNECT_MS: Final = 2000
_SOCKET_MS: Final = 12_000
"""Above the write concern's 5 s and one retry, so that the server's answer is preferred to our giving up."""

log = structlog.get_logger(__name__)


class StoreUnavailable(Exception):
    """No primary answers (yet): worth another try."""


class StoreUnfit(Exception):
    """The server cannot hold this data as it is: one line for the operator, no use trying again."""


class Store:
    """All collections of the system and the sub-stores over them. Safe to share between the tasks of one event loop."""

    def __init__(self, client: Client, database: str, retention_days: int) -> None:
        self.client = client
        self.db: Database = client.get_database(
            database,
            codec_options=CodecOptions(tz_aware=True),
            write_concern=WRITE_CONCERN,
            read_concern=READ_CONCERN,
        )
        self.retention_days = retention_days

    async def ping(self) -> None:
        """Round trip to a writable primary. Raises StoreError."""
        await self.client.admin.command("ping")

    async def check_server(self) -> None:
        """Raises StoreUnavailable without a primary, StoreUnfit when the server is no member of a replica set."""
        try:
            hello = await self.client.admin.command("hello")
        except OperationFailure as error:
            raise StoreUnfit(f"MongoDB refused us: {error.details and error.details.get('errmsg')}") from error
        except PyMongoError as error:
            raise StoreUnavailable(_first_line(error)) from error
        if hello.get("msg") == "isdbgrid":
            return
        if "setName" not in hello and not hello.get("isreplicaset"):
            raise StoreUnfit("MongoDB is not a replica set member: majority writes need one (start it with --replSet)")
        if not hello.get("isWritablePrimary"):
            raise StoreUnavailable("the replica set has no primary yet")

    async def ensure_indexes(self) -> None:
        """Create every index of design.md section 6. Raises StoreError."""
        for name, indexes in index_models(self.retention_days).items():
            await self.db[name].create_indexes(indexes)


def index_models(retention_days: int) -> dict[str, list[IndexModel]]:
    """Collection → its indexes. `_id` is the seed's id everywhere, so no index repeats it (design.md section 6.1)."""
    return {
        "messages": [
            IndexModel(
                [("conversation_id", ASCENDING), ("sequence_number", ASCENDING)], name=SEQUENCE_INDEX, unique=True
            ),
            IndexModel(
                [("conversation_id", ASCENDING), ("sender_id", ASCENDING), ("idempotency_key", ASCENDING)],
                name=SCOPED_KEY_INDEX,
                unique=True,
            ),
            IndexModel([("conversation_id", ASCENDING), ("timestamp", DESCENDING)], name="conversation_timestamp"),
            IndexModel([("created_at", ASCENDING)], name="retention", expireAfterSeconds=retention_days * DAY_SECONDS),
            IndexModel(
                [("conversation_id", ASCENDING), ("sequence_number", ASCENDING)],
                name=SYSTEM_INDEX,
                partialFilterExpression={"type": "system"},
            ),
        ],
        "conversations": [
            IndexModel([("user_id", ASCENDING), ("agent_id", ASCENDING)], name="user_agent"),
        ],
        "memberships": [
            IndexModel([("user_id", ASCENDING), ("conversation_id", ASCENDING)], name="user_conversation"),
            IndexModel([("conversation_id", ASCENDING)], name="conversation"),
        ],
        "users": [
            IndexModel(
                [(field, ASCENDING)],
                name=f"unique_{field}",
                unique=True,
                partialFilterExpression={field: {"$type": "string"}},
            )
            for field in ("phone", "email")
        ],
        "idempotency_keys": [
            IndexModel([("created_at", ASCENDING)], name="retention", expireAfterSeconds=DAY_SECONDS),
        ],
        "dead_letter_queue": [
            IndexModel([("status", ASCENDING), ("next_retry_at", ASCENDING)], name="status_next_retry"),
            IndexModel([("created_at", DESCENDING)], name="newest"),
            IndexModel([("message._id", ASCENDING)], name="message"),
            IndexModel([("expires_at", ASCENDING)], name="retention", expireAfterSeconds=0),
        ],
    }


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


@asynccontextmanager
async def open_store(url: str, retention_days: int = 90) -> AsyncIterator[Store]:
    """Connect, check the server, create what is missing, yield the store, close the client.

    The database's name is the URL's path, `trireme` without one.

    Raises: StoreUnavailable (try again), StoreUnfit (tell the operator), both before anything is yielded.
    Cancellation: closes the client.
    """
    try:
        client: Client = AsyncMongoClient(
            url,
            appname="trireme-workers",
            tz_aware=True,
            serverSelectionTimeoutMS=_CONNECT_MS,
            connectTimeoutMS=_CONNECT_MS,
            socketTimeoutMS=_SOCKET_MS,
        )
    except (ConfigurationError, ValueError) as error:
        raise StoreUnfit(f"TRIREME_MONGODB_URL is malformed: {_first_line(error)}") from error
    async with client:
        database = client.get_default_database(DEFAULT_DATABASE).name
        store = Store(client, database, retention_days)
        await store.check_server()
        try:
            await store.ensure_indexes()
        except (AutoReconnect, NetworkTimeout, NotPrimaryError, ServerSelectionTimeoutError) as error:
            raise StoreUnavailable(_first_line(error)) from error
        except OperationFailure as error:
            raise StoreUnfit(f"MongoDB refused an index: {_first_line(error)}") from error
        yield store
