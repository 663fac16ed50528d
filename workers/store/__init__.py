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
from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import (
    AutoReconnect,
    CollectionInvalid,
    ConfigurationError,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from workers.breaker import Breaker
from workers.store.agent_tasks import AgentTaskStore
from workers.store.agents import AgentStore
from workers.store.blocks import BlockStore
from workers.store.changes import ChangeStore
from workers.store.condition import Condition, look
from workers.store.contacts import ContactStore
from workers.store.conversations import ConversationStore
from workers.store.dead_letters import DeadLetterStore
from workers.store.deliveries import DeliveryStore
from workers.store.device_keys import DeviceKeyStore
from workers.store.devices import DeviceStore
from workers.store.driver import mend_driver
from workers.store.errors import StoreUnavailable, store_errors
from workers.store.events import EventStore
from workers.store.evidence import EvidenceReader
from workers.store.heads import HeadReader
from workers.store.indexes import DAY_SECONDS, PLAIN_COLLECTIONS, RETENTION_INDEX, index_models
from workers.store.journeys import JourneyReader
from workers.store.logs import LogReader
from workers.store.marks import MarkStore
from workers.store.media import MediaStore
from workers.store.memberships import MembershipStore
from workers.store.messages import MessageStore
from workers.store.overviews import OverviewReader
from workers.store.push_tokens import PushTokenStore
from workers.store.pushes import PushStore
from workers.store.search import SearchReader
from workers.store.stays import StayReader
from workers.store.users import UserStore
from workers.store.verifications import VerificationStore
from workers.store.webhooks import WebhookStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Document = dict[str, Any]
Client = AsyncMongoClient[Document]
Database = AsyncDatabase[Document]
Collection = AsyncCollection[Document]

DEFAULT_DATABASE: Final = "trireme"
WRITE_CONCERN: Final = WriteConcern("majority", j=True, wtimeout=5000)
READ_CONCERN: Final = ReadConcern("majority")

BREAKER_FAILURES: Final = 5
BREAKER_OPEN_SECONDS: Final = 30.0
"""Reliability.md section 11."""
_NAMESPACE_EXISTS: Final = 48
"""What the server says when two processes create the same collection at the same moment."""
_CONNECT_MS: Final = 2000
_SOCKET_MS: Final = 12_000
"""Above the write concern's 5 s and one retry, so that the server's answer is preferred to our giving up."""

log = structlog.get_logger(__name__)


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
        self.breaker = Breaker("mongodb", BREAKER_FAILURES, BREAKER_OPEN_SECONDS)
        """For requests only: see `breaker.guarding`."""
        self.messages = MessageStore(self.db)
        self.dead_letters = DeadLetterStore(self.db)
        self.changes = ChangeStore(self.db)
        self.conversations = ConversationStore(self.db)
        self.marks = MarkStore(self.db)
        self.users = UserStore(self.db)
        self.contacts = ContactStore(self.db)
        self.devices = DeviceStore(self.db)
        self.stays = StayReader(self.db)
        self.verifications = VerificationStore(self.db)
        self.blocks = BlockStore(self.db)
        self.device_keys = DeviceKeyStore(client, self.db)
        self.heads = HeadReader(client, self.db)
        self.logs = LogReader(client, self.db)
        self.journeys = JourneyReader(self.db)
        self.overviews = OverviewReader(client, self.db)
        self.memberships = MembershipStore(self.db)
        self.events = EventStore(self.db)
        self.agents = AgentStore(self.db)
        self.agent_tasks = AgentTaskStore(self.db)
        self.webhooks = WebhookStore(self.db)
        self.deliveries = DeliveryStore(self.db)
        self.pushes = PushStore(self.db)
        self.push_tokens = PushTokenStore(self.db)
        self.media = MediaStore(self.db)
        self.search = SearchReader(self.db)
        self.evidence = EvidenceReader(client, self.db)

    async def condition(self) -> Condition:
        """The server's state. Raises StoreUnavailable."""
        return await look(self.client, self.db)

    async def ping(self) -> None:
        """Round trip to the primary. Raises StoreUnavailable."""
        with store_errors():
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
        """Create every collection, and every index of design.md section 6. Idempotent. Raises the driver's errors."""
        present = set(await self.db.list_collection_names())
        for name in PLAIN_COLLECTIONS:
            if name not in present:
                try:
                    await self.db.create_collection(name)
                except CollectionInvalid:
                    log.debug("collection_made_elsewhere", name=name)
                except OperationFailure as error:
                    if error.code != _NAMESPACE_EXISTS:
                        raise
                    log.debug("collection_made_elsewhere", name=name)
        if "messages" in present:
            await self._agree_retention()
        for name, indexes in index_models(self.retention_days).items():
            await self.db[name].create_indexes(indexes)

    async def _agree_retention(self) -> None:
        """A TTL index cannot be created again with another lifetime, but it can be changed."""
        seconds = self.retention_days * DAY_SECONDS
        async for index in await self.db["messages"].list_indexes():
            if index["name"] == RETENTION_INDEX and index["expireAfterSeconds"] != seconds:
                change = {"name": RETENTION_INDEX, "expireAfterSeconds": seconds}
                await self.db.command("collMod", "messages", index=change)
                log.warning("message_retention_changed", days=self.retention_days)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


@asynccontextmanager
async def open_store(url: str, retention_days: int = 90, *, as_it_is: bool = False) -> AsyncIterator[Store]:
    """Connect, check the server, create what is missing, yield the store, close the client.

    The database's name is the URL's path, `trireme` without one. `as_it_is`: create and change nothing.

    Raises: StoreUnavailable (try again), StoreUnfit (tell the operator), both before anything is yielded.
    Cancellation: closes the client.
    """
    mend_driver()
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
            if not as_it_is:
                await store.ensure_indexes()
        except (AutoReconnect, NetworkTimeout, NotPrimaryError, ServerSelectionTimeoutError) as error:
            raise StoreUnavailable(_first_line(error)) from error
        except OperationFailure as error:
            raise StoreUnfit(f"MongoDB refused an index: {_first_line(error)}") from error
        yield store
