"""Many conversations at once, as creation records in the ingest stream: thousands of HTTP calls would take minutes.

Called by `persist` and `gateway_cost`. The records are those the HTTP API would write, so conversations and memberships
come into being by the worker's own path.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from bench.accounts import Account, Community, SetupError
from protocol import codec, dev_keys, keys, records
from protocol.models import ConversationType
from workers.tokens import Tokens

if TYPE_CHECKING:
    import pymongo
    import redis

DEVICE_ID: Final = "load-1"
TOKEN_SECONDS: Final = 3600
DEADLINE_SECONDS: Final = 120.0
POLL_SECONDS: Final = 0.1
PIPELINE: Final = 500


def seed_direct(client: redis.Redis, mongo: pymongo.MongoClient[dict[str, Any]], pairs: int) -> Community:
    """`pairs` new 1:1 conversations with two new accounts each, usable when this returns. Raises SetupError."""
    run = secrets.token_hex(6)
    names = [(f"usr_{run}{number:08d}a", f"usr_{run}{number:08d}b") for number in range(pairs)]
    conversations = [keys.direct_conversation_id(*pair) for pair in names]
    made = [
        records.CreateConversation(
            instance="",
            request="",
            command_id=f"seed-{run}",
            conversation_id=conversation_id,
            conversation_type=ConversationType.ONE_TO_ONE,
            actor=pair[0],
            participants=list(pair),
            agent_id="",
        )
        for conversation_id, pair in zip(conversations, names, strict=True)
    ]
    wait_until(lambda: client.get(keys.SHARDS) is not None, "a worker")
    append(client, made)
    memberships = mongo.get_default_database("trireme")["memberships"]
    wait_until(lambda: memberships.count_documents({"_id": {"$regex": f":usr_{run}"}}) >= 2 * pairs, "conversations")
    tokens = Tokens(dev_keys.PRIVATE_JWK)
    now = time.time_ns() // 1_000_000
    members = [
        [Account(name, DEVICE_ID, tokens.sign(name, DEVICE_ID, now, TOKEN_SECONDS, run)[0]) for name in pair]
        for pair in names
    ]
    return Community(conversations, members)


def append(client: redis.Redis, ingest: list[Any]) -> None:
    """XADD these records, each to the shard of its conversation."""
    stored: Any = client.get(keys.SHARDS)
    if stored is None:
        raise SetupError("no shard count is recorded: has a worker started?")
    shards = int(stored)
    for start in range(0, len(ingest), PIPELINE):
        pipe = client.pipeline(transaction=False)
        for record in ingest[start : start + PIPELINE]:
            stream = keys.ingest(keys.shard_of(record.conversation_id, shards))
            pipe.xadd(stream, {keys.FIELD: codec.encode_record(record)})
        pipe.execute()


def wait_until(done: Any, what: str) -> None:
    """Poll until `done()` is true. Raises SetupError after `DEADLINE_SECONDS`."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise SetupError(f"{what} not there after {DEADLINE_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
